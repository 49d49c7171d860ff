"""What every network is built on."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scepter.core.config import Config
from scepter.core.disk.checkpoints import Checkpoint
from scepter.core.faults import ConfigError, did_you_mean
from scepter.core.schema import Component
from scepter.models import resting
from scepter.models.condition import Widths
from scepter.models.resting import Encoder
from scepter.weights import marks, sources


class BaseModel(Component, nn.Module, base=True):
    """A registered nn.Module. Reads its parameters in __init__; the bricks below it take plain typed arguments."""

    is_frozen = False
    takes: Widths | None = None          # a backbone may say what it takes: then it is held against the embedder and the autoencoder
    forward_methods: tuple[str, ...] = ()    # called from outside in the place of the module itself: FSDP2 gathers its weights for these
    keeps_float32 = False                # computes without autocast, in the type of its weights

    def load_pretrained(self, path: str, ignore_keys: Sequence[str] = (), part: str = '', use_ema: bool = False) -> None:
        """Load published or own weights, into one part where that is named, from any place that FS knows.

        A part whose own config names a PRETRAINED_MODEL keeps what that gave it.
        Missing, unexpected and mis-shaped keys are a CheckpointError unless ignore_keys (exact names or globs) names them.
        """
        modules = dict(self.named_modules())
        if part not in modules:
            raise ConfigError(f'{type(self).__name__} has no part {part}{did_you_mean(part, modules)}')
        sources.load_pretrained(modules[part], path, ignore_keys, use_ema)

    def main_blocks(self) -> list[nn.Module]:
        """Large modules that run one after the other, each by its own call: FSDP2 gathers the weights of one at a time.

        Nobody else may touch their weights in a training step. Without any, the network's weights are gathered all at once.
        """
        return []

    def same_weights(self) -> AbstractContextManager[None]:
        """Inside, parameters may be put in the place of others that hold the same: they go on remembering the file that they came from."""
        return marks.carried(self)

    def freeze(self) -> None:
        """Evaluation mode for good, no gradients; what is trained is decided by a network's own FREEZE."""
        self.is_frozen = True
        self.eval()
        self.requires_grad_(False)

    def precompute(self, cond: Any) -> Any:
        """A condition with all that is the same at every step of sampling already computed; a backbone that has such things says so."""
        return cond

    def train(self, mode: bool = True) -> BaseModel:
        return super().train(mode and not self.is_frozen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BaseModel:
        found = self.__dict__.get('_resting')
        if found is None or found.is_awake:
            return super()._apply(fn, recurse)
        found.moves.append(fn)    # done when it wakes
        return self


class TrainModule(BaseModel, base=True):
    """What a solver trains: it owns its loss (forward_train) and what it draws (forward_test)."""

    def lay_channels_last(self) -> None:
        """Let weights of four axes, and of five, have their channels last in memory, in place."""
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        self._apply(lambda tensor: tensor.to(memory_format=layouts.get(tensor.ndim, torch.preserve_format)))

    @classmethod
    def side_multiple(cls, cfg: Config) -> int | None:
        """What the sides of its pictures are multiples of, where its config, filled, tells; None where it does not."""
        return None

    def forward(self, task: Literal['train', 'test'] | None = None, /, **batch: Any) -> Any:
        """A batch -> what forward_train or forward_test gives; by default the one that the mode says.

        The one way in for solvers: FSDP2 and torch.compile act on a module's call, not on its methods.
        """
        is_training = self.training if task is None else task == 'train'
        return self.forward_train(**batch) if is_training else self.forward_test(**batch)

    def forward_train(self, **batch: Any) -> dict[str, Any]:
        """A batch -> {'loss': scalar, 'probe_data': dict of what to look at, and any other scalar, which is logged}."""
        raise TypeError(f'{type(self).__name__} has no forward_train: write one that returns a dict with its loss')

    def forward_test(self, **batch: Any) -> list[dict[str, Any]]:
        """A batch -> one dict per sample: prompt, image [3, H, W] in 0..1, label, ..."""
        raise TypeError(f'{type(self).__name__} has no forward_test: write one that returns a list of results')

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer, each {'params': [names], and any of its arguments, e.g. 'weight_decay': 0.0, 'lr_scale': 0.1}.

        One group with the optimizer's own settings unless a network knows better. A parameter in no group takes the defaults.
        """
        return []

    def compile_network(self) -> None:
        """Compile in place what the time is spent in; names in the state dict stay."""
        self.compile()

    # ---------------------------------------------------------------- what is computed once, before training
    def encoders(self) -> dict[Literal['picture', 'prompt'], Encoder]:
        """What it makes of a sample's picture, or prompt, that no step of training changes, so that a cache may keep it. Default: nothing.

        forward_train is then given `moments` in the place of the picture, and each entry of the prompt's as `text_<name>` beside it.
        """
        return {}

    def fingerprint(self, part: str) -> str:
        """All that a part's results depend on, beside what it is given: its config, weights and buffers, as one word."""
        return resting.fingerprint(self.get_submodule(part))

    def rest(self, part: str, file: Path, is_writer: bool = True) -> bool:
        """Free the memory of a part that only `awake` needs, its weights in this file meanwhile.

        False, and nothing is done, where a checkpoint must hold them: where they are trained, or came from no file.
        """
        module = self.get_submodule(part)
        if not resting.can_rest(self, module):
            return False
        resting.rest(module, file, is_writer)
        return True

    def awake(self) -> AbstractContextManager[None]:
        """Inside, parts that rest have their weights: to draw, and to encode."""
        return resting.awake(self)

    # ---------------------------------------------------------------- what a checkpoint holds
    def left_out(self) -> dict[str, Any]:
        """What a checkpoint leaves out, by its name in the state dict, and where it came from: frozen, from a file whose digest is known.

        What is saved (trained_state), recorded (sources) and loaded (load_trained_state) follows from it.
        """
        return marks.left_out(self)

    def trained_state(self) -> dict[str, Tensor]:
        """The state dict without what is left out."""
        left_out = self.left_out()
        return {name: value for name, value in self.state_dict().items() if name not in left_out}

    def sources(self, folder: str | Path) -> list[dict[str, Any]]:
        """What a checkpoint below this folder records as its `left_out`, as JSON."""
        return marks.record(self, folder)

    def agree_on_sources(self) -> None:
        """Let the main process hash the files that this network was loaded from, for all. Every process calls it."""
        marks.agree(self)

    def load_trained_state(self, checkpoint: Checkpoint, use_ema: bool = False) -> None:
        """Take a checkpoint's weights, and from its sources what it left out.

        What the network's own files gave already is not read again. Raises CheckpointError with every name or shape that does not fit,
        and where a source is gone or another one now, with both digests.
        """
        sources.fill(self, checkpoint, use_ema)

    def refuse_unfilled(self) -> None:
        """Raises CheckpointError where parameters are as they were built, since no file gave them."""
        marks.refuse_unfilled(self)
