"""What every network is built on."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from scepter.core.registry import Component


class BaseModel(Component, nn.Module, base=True):
    """A registered nn.Module. Reads its parameters in __init__; the bricks below it take plain typed arguments."""

    is_frozen = False

    def load_pretrained(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load published or own weights from any place that FS knows.

        Missing, unexpected and mis-shaped keys are a CheckpointError unless ignore_keys (exact names or globs) names them.
        """
        from scepter.models.weights import load_pretrained
        load_pretrained(self, path, ignore_keys)

    def freeze(self) -> None:
        """Evaluation mode for good, no gradients; what is trained is decided by a network's own FREEZE."""
        self.is_frozen = True
        self.eval()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> BaseModel:
        return super().train(mode and not self.is_frozen)


class TrainModule(BaseModel, base=True):
    """What a solver trains: it owns its loss (forward_train) and what it draws (forward_test)."""

    def forward(self, **batch: Any) -> dict[str, Any] | list[dict[str, Any]]:
        return self.forward_train(**batch) if self.training else self.forward_test(**batch)

    def forward_train(self, **batch: Any) -> dict[str, Any]:
        """A batch -> {'loss': scalar, 'probe_data': dict of what to look at, and any other scalar, which is logged}."""
        raise TypeError(f'{type(self).__name__} has no forward_train: write one that returns a dict with its loss')

    def forward_test(self, **batch: Any) -> list[dict[str, Any]]:
        """A batch -> one dict per sample: prompt, image [3, H, W] in 0..1, label, ..."""
        raise TypeError(f'{type(self).__name__} has no forward_test: write one that returns a list of results')

    def named_trainable(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that training changes, by name."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer, each {'params': [names], and any of its arguments, e.g. 'weight_decay': 0.0, 'lr_scale': 0.1}.

        One group with the optimizer's own settings unless a network knows better. A parameter in no group takes the defaults.
        """
        return []
