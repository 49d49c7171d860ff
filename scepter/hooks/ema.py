"""An average of the weights along the run, which draws better pictures than the last ones."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scepter.core.registry import HOOKS
from scepter.core.schema import param
from scepter.hooks.base import Hook


@HOOKS.register_class()
class ModelEmaHook(Hook):
    """ema = beta * ema + (1 - beta) * weights, after each step of the optimizer that changed them.

    Parameters are averaged, buffers copied: an averaged noise schedule would be no schedule. With WARMUP the rate begins at 0.1 and
    rises as (1 + step) / (10 + step) to BETA, so that a short run is not dominated by its random start.
    """

    group = 'ema'     # ema.safetensors, under the network's own names

    BETA: float = param(0.9999, 'How much of the average stays at each step.', least=0, below=1)
    WARMUP: bool = param(True, 'Let the average follow quickly at first.')
    EVERY: int = param(1, 'Average once in so many steps; BETA is per averaging.', least=1)
    DEVICE: Literal['model', 'cpu'] = param('model', 'Where the average is kept; cpu saves memory of the GPU.')

    def before_solve(self, solver: Any) -> None:
        if not hasattr(self, 'average'):      # a resumed run has its own
            self._begin(solver.model)

    def after_iter(self, solver: Any) -> None:
        if solver.is_last_step_finite and solver.step % self.EVERY == 0:
            self.update(solver.model, solver.step // self.EVERY)

    @torch.no_grad()
    def update(self, model: nn.Module, count: int) -> None:
        beta = min(self.BETA, (1 + count) / (10 + count)) if self.WARMUP else self.BETA
        live = _trained(model)
        pairs = [(average, live[name].to(average)) for name, average in self.average.items()]
        averages, weights = [a for a, _ in pairs], [w for _, w in pairs]
        torch._foreach_lerp_(averages, weights, 1 - beta)
        for name, buffer in _changing_buffers(model).items():
            self.buffers[name].copy_(buffer)

    @contextlib.contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside, the network has the averaged weights; its own come back untouched, also after an error."""
        live = {**_trained(model), **_changing_buffers(model)}
        own = {name: p.data for name, p in live.items()}
        try:
            for name, value in {**self.average, **self.buffers}.items():
                live[name].data = value.to(own[name].device, own[name].dtype)
            yield
        finally:
            for name, value in own.items():
                live[name].data = value

    def state_tensors(self) -> dict[str, Tensor]:
        return {**self.average, **self.buffers}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._loaded = tensors

    def _begin(self, model: nn.Module) -> None:
        def copy(p: Tensor) -> Tensor:
            # float32, or small steps would be lost in the rounding; the network's layout, or each update would reorder
            return p.detach().to(torch.float32 if p.is_floating_point() else p.dtype).to(
                'cpu' if self.DEVICE == 'cpu' else p.device, copy=True)

        self.average = {name: copy(p) for name, p in _trained(model).items()}
        self.buffers = {name: b.detach().to('cpu' if self.DEVICE == 'cpu' else b.device, copy=True)
                        for name, b in _changing_buffers(model).items()}
        for name, value in self.__dict__.pop('_loaded', {}).items():
            {**self.average, **self.buffers}[name].copy_(value)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _changing_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a part which is trained: running statistics and the like."""
    kept = model.state_dict()
    return {f'{path}.{name}' if path else name: buffer for path, module in model.named_modules()
            if any(p.requires_grad for p in module.parameters())
            for name, buffer in module.named_buffers(recurse=False) if (f'{path}.{name}' if path else name) in kept}
