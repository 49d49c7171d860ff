"""What every network is built on."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from scepter.core.errors import CheckpointError
from scepter.core.files import atomic
from scepter.core.schema import Component


class BaseModel(Component, nn.Module, base=True):
    """A registered nn.Module. Reads its parameters in __init__; the bricks below it take plain typed arguments."""

    is_frozen = False
    pretrained_from: str | None = None
    left_as_built: Sequence[str] = ()    # names that pretrained_from did not fill, as IGNORE_KEYS allowed

    def load_pretrained(self, path: str, ignore_keys: Sequence[str] = (), use_ema: bool = False) -> None:
        """Load published or own weights from any place that FS knows; a part below that has a file of its own keeps what that gave.

        Missing, unexpected and mis-shaped keys are a CheckpointError unless ignore_keys (exact names or globs) names them.
        """
        from scepter.models.weights import load_pretrained
        self.left_as_built = load_pretrained(self, path, ignore_keys, use_ema)
        self.pretrained_from = path

    def freeze(self) -> None:
        """Evaluation mode for good, no gradients; what is trained is decided by a network's own FREEZE."""
        self.is_frozen = True
        self.eval()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> BaseModel:
        return super().train(mode and not self.is_frozen)


class TrainModule(BaseModel, base=True):
    """What a solver trains: it owns its loss (forward_train) and what it draws (forward_test)."""

    def forward(self, task: Literal['train', 'test'] | None = None, /, **batch: Any) -> Any:
        """forward_train or forward_test; by default the one that the mode says. The one way in for solvers: DDP, FSDP2 and
        torch.compile act on a module's call, not on its methods."""
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

    # ---------------------------------------------------------------- what a checkpoint holds
    def trained_state(self) -> dict[str, Tensor]:
        """The state dict without the frozen parts that their own files can give back."""
        left_out = self._from_files()
        return {name: value for name, value in self.state_dict().items() if name not in left_out}

    def load_trained_state(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Take what trained_state gave. Raises CheckpointError with every name or shape that does not fit."""
        own, left_out = self.state_dict(), self._from_files()
        faults = [f'missing: {name} {list(own[name].shape)}' for name in own if name not in tensors and name not in left_out]
        faults += [f'unexpected: {name} {list(value.shape)}' for name, value in tensors.items() if name not in own]
        faults += [f'{name}: shape {list(own[name].shape)} expected, {list(value.shape)} found'
                   for name, value in tensors.items() if name in own and own[name].shape != value.shape]
        if faults:
            more = f'\n  and {len(faults) - 10} more' if len(faults) > 10 else ''
            raise CheckpointError(f'{where} is of another network than {type(self).__name__}:\n  ' + '\n  '.join(faults[:10]) + more)
        self.load_state_dict(dict(tensors), strict=False)

    def frozen_sources(self) -> dict[str, dict[str, Any]]:
        """Where the weights of frozen parts came from: {part: {said, path, size, sha256}}, `said` being the config's own word."""
        return {name: {'said': source, 'path': str(Path(source).resolve()) if Path(source).exists() else source, **source_digest(source)}
                for name, module, source in self._parts_from_files() if not any(p.requires_grad for p in module.parameters())}

    def _from_files(self) -> set[str]:
        """Names in the state dict that are not trained and came from a file that the config names."""
        names = set()
        for name, module, _ in self._parts_from_files():
            prefix = f'{name}.' if name else ''
            for below, part in module.named_modules(prefix=name):
                if not any(p.requires_grad for p in part.parameters()):    # its buffers do not change either
                    names |= {f'{below}.{key}' if below else key for key in part.state_dict()}
            names |= {f'{prefix}{key}' for key, p in module.named_parameters() if not p.requires_grad}
        return names

    def _parts_from_files(self) -> list[tuple[str, nn.Module, str]]:
        return [(name, module, source) for name, module in self.named_modules()
                if isinstance(module, BaseModel) and (source := module.pretrained_from or module.cfg.get('PRETRAINED_MODEL'))]


def source_digest(path: str | Path) -> dict[str, Any]:
    """Size and sha256 of a file that weights came from, or of a checkpoint's manifest, which holds those of its files."""
    path = Path(path)
    if (path / 'MANIFEST.json').is_file():
        path = path / 'MANIFEST.json'
    return dict(atomic.digest(path)._asdict()) if path.is_file() else {}
