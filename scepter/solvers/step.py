"""One step of the optimizers: forward, backward, average, clip, and update, or refuse."""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scepter.core import flops, pulse, streams
from scepter.core.env import we
from scepter.core.errors import NonFiniteError
from scepter.core.faults import ConfigError
from scepter.core.logger import get_logger
from scepter.core.shards import local
from scepter.solvers.optim import NamedOptimizer
from scepter.solvers.parallel import average_gradients, clip, is_sharded, release, share_buffers, total_norm

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
PATIENCE = 3     # steps in a row with a loss or gradient that is not finite, before the run gives up
Outputs = dict[str, Any]
Batches = list[tuple[dict[str, Any], Tensor]]     # (what the network gets, draw numbers [B]) of each of ACCU_STEP parts


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """What a network counts inside (running statistics, steps of a schedule) is forgotten afterwards."""
    before = [(module, name, buffer.clone()) for module in model.modules() for name, buffer in module._buffers.items()
              if buffer is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, value in before:
                if (buffer := module._buffers[name]) is not None and buffer.shape == value.shape:    # else it is a table that has grown
                    buffer.copy_(value)


class TrainStep:
    """From ACCU_STEP batches to new weights. A step whose loss or gradient is not finite changes nothing.

    Holds what belongs to the arithmetic alone: optimizers, the rate as a function of the step, the scale of float16, and how many
    steps in a row were refused. Nothing of an earlier step's gradients is kept: an optimizer with EVERY takes those of its own step.
    """

    def __init__(self, model: nn.Module, optimizers: list[NamedOptimizer], factor: Callable[[int], float], dtype: torch.dtype,
                 clip: float | None, prepare: Callable[[dict[str, Any]], dict[str, Any]]):
        self.model, self.optimizers, self.factor, self.dtype, self.clip, self.prepare = model, optimizers, factor, dtype, clip, prepare
        self.scale = LossScale(dtype == torch.float16)
        self._owned = [p for o in optimizers for p in o.owned.values()]
        self.refused = 0           # steps in a row
        self.has_changed = False   # whether the last step changed the weights
        self.everybody: list[list[float]] = []
        self._counting = [(module, name) for module in model.modules() if any(p.requires_grad for p in module.parameters())
                          for name in module._buffers]

    def __call__(self, batches: Batches, step: int, own: Sequence[float] = ()) -> Outputs:
        """The network's outputs for the last batch, its scalars averaged over batches and processes, and lr and grad_norm.

        own: figures of this process that all should know; `everybody` has them afterwards, by rank.
        Raises NonFiniteError at the PATIENCEth refused step in a row.
        """
        due = [o for o in self.optimizers if step % o.every == 0]
        before = [buffer.clone() for buffer in self.buffers]
        totals: dict[str, Tensor] = {}
        for batch, n in batches:
            with streams.current(we.seed, n, step):    # backward too: what is computed again there draws again
                with self.autocast():
                    outputs = self.model('train', **self.prepare(batch))
                self._backward(outputs, due, len(batches))
            pulse.beat()
            for key, value in outputs.items():
                if isinstance(value, Tensor) and value.ndim == 0:
                    totals[key] = totals.get(key, 0) + value.detach().float() / len(batches)
        parameters = self._owned if len(due) == len(self.optimizers) else [p for o in due for p in o.owned.values()]
        average_gradients(parameters)
        if not due:
            release(self.model)
        self.scale.take_off(parameters)
        norm = total_norm(parameters)
        names = list(totals)
        # the step's one look at the device
        told = torch.stack([*totals.values(), norm.float().to(we.device)])
        if we.is_distributed and own:      # a mean of which all but one are 0
            said = [[value * we.world_size * (rank == we.rank) for value in own] for rank in range(we.world_size)]
            told = torch.cat([told, torch.tensor(said, device=we.device).flatten()])
        with we.waiting():
            figures = we.all_reduce(told, 'mean').tolist()
        self.everybody = [figures[i:i + len(own)] for i in range(len(names) + 1, len(figures), len(own) or 1)] or [list(own)]
        scalars = dict(zip([*names, 'grad_norm'], figures))
        for o in self.optimizers:
            o.set_rate(self.factor(step))
        if self._is_finite(scalars, step, batches):
            self._update(due, parameters, norm, scalars['grad_norm'])
            share_buffers(self.buffers)
            self.has_changed = bool(due)
        else:
            for buffer, value in zip(self.buffers, before):
                buffer.copy_(value)
        if due:
            self.scale.adapt(math.isfinite(scalars['grad_norm']))
        for o in self.optimizers:
            o.zero_grad()
        rates = {f'lr_{o.name}' if i else 'lr': o.rate for i, o in enumerate(self.optimizers)}
        return {**{k: v for k, v in outputs.items() if k not in totals}, **scalars, **rates}

    def flops(self, batch: dict[str, Any], n: Tensor, step: int) -> int:
        """Floating point operations of a batch, forward and backward for all optimizers, by one more pass that leaves no trace."""
        devices = [we.device] if we.device.type == 'cuda' else []
        with torch.random.fork_rng(devices), torch.compiler.set_stance('force_eager'), flops.counting() as count, \
                buffers_kept(self.model), streams.current(we.seed, n, step):
            with self.autocast():
                outputs = self.model('train', **self.prepare(batch))
            self._backward(outputs, self.optimizers, 1)
        for o in self.optimizers:
            o.zero_grad()
        return count()

    @property
    def buffers(self) -> list[Tensor]:
        """What the forward passes of the trained parts may count: statistics of batch normalisation, steps of a schedule."""
        return [buffer for module, name in self._counting if (buffer := module._buffers[name]) is not None]

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the network computes in DTYPE."""
        return contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(we.device.type, self.dtype)

    def _backward(self, outputs: Outputs, due: list[NamedOptimizer], parts: int) -> None:
        followers: dict[str, list[Tensor]] = {}    # one pass for each loss, however many optimizers follow it
        for o in self.optimizers:
            if o.loss not in outputs:
                raise ConfigError(f'the optimizer {o.name} follows {o.loss}, but {type(self.model).__name__}.forward_train gave '
                                  f'{", ".join(outputs)}')
        for o in due:
            followers.setdefault(o.loss, []).extend(o.owned.values())
        # shares have one loss, and their backward pass goes through all weights: what is not due is thrown away with the rest
        is_whole = len(followers) == 1 and (len(due) == len(self.optimizers) or is_sharded(self.model))
        for i, (name, owned) in enumerate(followers.items()):
            loss = self.scale.put_on(outputs[name] / parts)
            if is_whole:
                loss.backward()
            elif loss.requires_grad:    # each loss reaches only what its own optimizers own
                loss.backward(inputs=owned, retain_graph=i + 1 < len(followers))

    def _is_finite(self, scalars: dict[str, float], step: int, batches: Batches) -> bool:
        losses_finite = all(math.isfinite(scalars[o.loss]) for o in self.optimizers)
        self.has_changed = losses_finite and math.isfinite(scalars['grad_norm'])
        if self.has_changed:
            self.refused = 0
            return True
        if losses_finite and self.scale.value > 1:
            return False        # float16 looks for the scale at which its gradients do not overflow; below 1 there is none
        self.refused += 1
        shown = ', '.join(f'{k} {v:g}' for k, v in scalars.items())
        get_logger().warning(f'step {step}: not finite ({shown}); weights, optimizer and EMA stay as they were '
                             f'({self.refused} of {PATIENCE})')
        if self.refused >= PATIENCE:
            numbers = ', '.join(str(int(v)) for _, n in batches for v in n[:8])
            raise NonFiniteError(f'{PATIENCE} steps in a row were not finite, the last at step {step} (samples {numbers}, ...). '
                                 'Lower the learning rate, set GRADIENT_CLIP, or look at these samples; the last checkpoint is intact')
        return False

    def _update(self, due: list[NamedOptimizer], parameters: list[Tensor], norm: Tensor, norm_value: float) -> None:
        if self.clip is not None and norm_value > self.clip:
            clip(parameters, self.clip, norm)
        for o in due:
            o.step()


class LossScale:
    """What the loss of float16 is multiplied by, or small gradients would vanish: halved where one overflows, doubled after 2,000 steps
    without. 1 for all other types. As PyTorch's GradScaler, whose state it shares; but whether a step is finite all processes know already,
    from the norm of what each of them holds.
    """

    START, PATIENCE = 2.0 ** 16, 2000

    def __init__(self, is_used: bool):
        self.is_used = is_used
        self.value = self.START if is_used else 1.0
        self.steps = 0      # since it changed

    def put_on(self, loss: Tensor) -> Tensor:
        """The loss times the scale, in float32."""
        return loss.float() * self.value if self.is_used else loss    # which float16 could not hold

    def take_off(self, parameters: list[Tensor]) -> None:
        """Divide the gradients by it."""
        if self.is_used and (gradients := [local(p.grad) for p in parameters if p.grad is not None]):
            torch._foreach_mul_(gradients, 1 / self.value)

    def adapt(self, is_finite: bool) -> None:
        """After a step."""
        self.steps = self.steps + 1 if is_finite else 0
        if self.is_used and (not is_finite or self.steps == self.PATIENCE):
            self.value, self.steps = self.value * (2.0 if is_finite else 0.5), 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {'scale': self.value, '_growth_tracker': self.steps} if self.is_used else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what state_dict gave, in this version or by a GradScaler of torch."""
        if self.is_used and state:
            self.value, self.steps = float(state['scale']), int(state['_growth_tracker'])


def arithmetic(word: str) -> torch.dtype:
    """What DTYPE means on this process's device."""
    return best_dtype(we.device) if word == 'auto' else DTYPES[word]


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes in it; elsewhere it is emulated, and slower than float32."""
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == 'cpu':
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32
    return torch.float32
