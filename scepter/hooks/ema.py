"""An average of the weights along the run, which draws better pictures than the last ones."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scepter.core.disk.tensors import Slot, Stored
from scepter.core.errors import CheckpointError
from scepter.core.logger import get_logger
from scepter.core.registry import HOOKS
from scepter.core.schema import param
from scepter.core.shards import copy_of, fill_from, local
from scepter.hooks.base import Hook


@HOOKS.register_class()
class ModelEmaHook(Hook):
    """ema = beta * ema + (1 - beta) * weights, after each step of the optimizer that changed them.

    Parameters are averaged, buffers copied: an averaged noise schedule would be no schedule. With WARMUP the rate begins at 0.1 and
    rises as (1 + step) / (10 + step) to BETA, so that a short run is not dominated by its random start.
    Of several of these hooks the first one in the list draws, in evaluations, probes and tests, and from a checkpoint its average is
    `ema`; those of the others are kept beside it as `ema#2`, ...
    """

    group = 'ema'     # ema.safetensors, under the network's own names

    BETA: float = param(0.9999, 'How much of the average stays at each step.', least=0, below=1)
    WARMUP: bool = param(True, 'Let the average follow quickly at first.')
    EVERY: int = param(1, 'Average once in so many steps; BETA is per averaging.', least=1)
    DEVICE: Literal['model', 'cpu'] = param('model', 'Where the average is kept; cpu saves memory of the GPU.')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.average: dict[str, Tensor] = {}    # of the parameters that are trained
        self.buffers: dict[str, Tensor] = {}    # copies of the buffers that change
        self._loaded: Stored | None = None
        self._is_begun = self._is_swapped = False

    def before_all_iter(self, solver: Any) -> None:
        if solver.mode == 'train' and not self._is_begun:    # not sooner: other hooks may load weights before they are trained
            self.begin(solver.model)

    def after_iter(self, solver: Any) -> None:
        if solver.is_last_step_finite and solver.step % self.EVERY == 0:
            self.update(solver.step // self.EVERY)

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Take the weights as the first average, or what a checkpoint held. Raises CheckpointError where that does not fit."""
        def copy(value: Tensor, dtype: torch.dtype) -> Tensor:    # in the layout of the value, or each update would reorder
            return copy_of(value, 'cpu' if self.DEVICE == 'cpu' else value.device, dtype)

        # walking the names and modules of Stable Diffusion takes 43 ms of Python, so it is done once and not at each step
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # of a share, what this process holds: averaging it needs nobody else
        self._parameters, self._owners = [local(p) for p in trained.values()], _changing_buffers(model)
        # float32, or small steps would be lost in the rounding
        self.average = {name: copy(p, torch.float32 if p.is_floating_point() else p.dtype) for name, p in trained.items()}
        self.buffers = {name: copy(getattr(module, key), getattr(module, key).dtype) for name, (module, key) in self._owners.items()}
        self._are_alike = all(p.dtype == a.dtype and p.device == a.device for p, a in zip(self._parameters, self.average.values()))
        self._averages = [local(a) for a in self.average.values()]
        self._is_begun = True
        self._take_loaded()

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Average once more, for the count-th time."""
        beta = min(self.BETA, (1 + count) / (10 + count)) if self.WARMUP else self.BETA
        weights = self._parameters if self._are_alike else [p.to(a) for p, a in zip(self._parameters, self._averages)]
        if weights:
            torch._foreach_lerp_(self._averages, weights, 1 - beta)
        for copy, (module, key) in zip(self.buffers.values(), self._owners.values()):
            copy.copy_(getattr(module, key))

    def swapped(self, model: nn.Module) -> contextlib.AbstractContextManager[None] | None:
        """Inside, the network has the averaged weights; its own come back untouched, also after an error. Within itself it does nothing."""
        if not self._is_begun and self._loaded is not None:
            self.begin(model)
        if not self._is_begun:
            return None
        return contextlib.nullcontext() if self._is_swapped else self._swap()

    @contextlib.contextmanager
    def _swap(self) -> Iterator[None]:
        # copied and not re-pointed, which a sharded tensor would not notice; a pair of one type changes places, so that no third copy of
        # all weights is needed
        pairs = list(zip([*self._parameters, *(getattr(module, key) for module, key in self._owners.values())],
                         [*self._averages, *self.buffers.values()]))
        own = {i: live.detach().clone() for i, (live, kept) in enumerate(pairs) if live.dtype != kept.dtype}
        self._is_swapped = True
        _exchange(pairs)
        try:
            yield
        finally:
            _exchange(pairs)
            with torch.no_grad():
                for i, value in own.items():
                    pairs[i][0].copy_(value)
            self._is_swapped = False

    def state_tensors(self) -> dict[str, Tensor]:
        assert not self._is_swapped, 'the averages are in the network'
        return {**self.average, **self.buffers}

    def load_state_dict(self, state: dict[str, Any], tensors: Stored) -> None:
        self._loaded = tensors or None

    def _take_loaded(self) -> None:
        own, loaded, self._loaded = self.state_tensors(), self._loaded, None
        if loaded is None:
            return
        faults = []
        for name in sorted(own.keys() & loaded.keys()):
            if _told(own[name]) == (found := _told(loaded.slot(name))):
                fill_from(own[name], partial(loaded.__getitem__, name), partial(loaded.rows, name))
            else:
                faults.append(f'{name}: {_told(own[name])} expected, {found} found')
        if faults:
            raise CheckpointError(f"the average in the checkpoint's {self.group} is of another network:\n  " + '\n  '.join(faults[:10]))
        for names, what in ((loaded.keys() - own.keys(), 'are trained no longer: they are drawn as they are, without their average'),
                            (own.keys() - loaded.keys(), 'were not averaged before: their average begins now')):
            if names:
                get_logger().warning(f'{type(self).__name__}: {len(names)} weights {what} ({", ".join(sorted(names)[:3])}, ...)')


@torch.no_grad()
def _exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Put each average into its weight, and the weight where the average was if that can hold it."""
    for live, kept in pairs:
        if live.dtype != kept.dtype:
            live.copy_(kept)
            continue
        own = live.to(kept.device, copy=True)
        live.copy_(kept)
        kept.copy_(own)


def _changing_buffers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Buffers that belong to a part which is trained (running statistics and the like), by the module that holds each: it may put
    another tensor in its place."""
    kept = model.state_dict()
    return {name: (module, key) for path, module in model.named_modules() if any(p.requires_grad for p in module.parameters())
            for key, buffer in module._buffers.items() if buffer is not None and (name := f'{path}.{key}' if path else key) in kept}


def _told(value: Tensor | Slot) -> str:
    return f'{str(value.dtype).removeprefix("torch.")} {list(value.shape)}'
