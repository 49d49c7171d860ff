"""Optimizers by their own signatures, learning rates as functions, and the bookkeeping that joins them to named parameters."""
from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from scepter.core.config import Config
from scepter.core.disk.tensors import Stored
from scepter.core.errors import CheckpointError
from scepter.core.faults import ConfigError
from scepter.core.registry import LR_SCHEDULERS, OPTIMIZERS
from scepter.core.schema import Component, param, split_node
from scepter.core.shards import fill_from, is_share
from scepter.core.values import Bounds

for _name, _value in vars(torch.optim).items():
    # LBFGS calls the network itself, several times a step; SparseAdam takes gradients that cannot be averaged or clipped
    if isinstance(_value, type) and issubclass(_value, torch.optim.Optimizer) and _name not in ('Optimizer', 'LBFGS', 'SparseAdam'):
        OPTIMIZERS.register_class(_name)(_value)
OPTIMIZERS.trial = lambda: {'params': [nn.Parameter(torch.zeros(2, 2))]}


# ------------------------------------------------------------------------------------------------ learning rates
# factor(step, max_steps, ...) -> what the optimizer's rate is multiplied by at this step (counted from 0). Without state, so a changed
# MAX_STEPS or a resume can never disagree with it.
Factor = Annotated[float, Bounds(least=0)]

@LR_SCHEDULERS.register_function()
def Constant(step: int, max_steps: int) -> float:
    """The same rate throughout."""
    return 1.0


@LR_SCHEDULERS.register_function()
def Linear(step: int, max_steps: int, final: Factor = 0.0) -> float:
    """From 1 straight to `final` at the last step."""
    return 1.0 + (final - 1.0) * _progress(step, max_steps)


@LR_SCHEDULERS.register_function()
def Cosine(step: int, max_steps: int, final: Factor = 0.0) -> float:
    """From 1 along half a cosine to `final` at the last step (Loshchilov & Hutter 2016, without restarts)."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, max_steps)))


@LR_SCHEDULERS.register_function()
def Polynomial(step: int, max_steps: int, power: Annotated[float, Bounds(above=0)] = 2.0, final: Factor = 0.0) -> float:
    """From 1 along (1 - progress) ** power to `final`."""
    return final + (1.0 - final) * (1.0 - _progress(step, max_steps)) ** power


@LR_SCHEDULERS.register_function()
def Step(step: int, max_steps: int, milestones: Annotated[list[int], Bounds(least=1)], gamma: Factor = 0.1,
         final: Factor = 0.0) -> float:
    """What it is above `final` is multiplied by gamma at each milestone (a step)."""
    return final + (1.0 - final) * gamma ** sum(step >= m for m in milestones)


@LR_SCHEDULERS.register_function()
def CosineAfter(step: int, max_steps: int, begin: Annotated[int, Bounds(least=0)] = 0, every: Annotated[int, Bounds(least=1)] = 1,
                final: Factor = 0.0) -> float:
    """1 up to step `begin`, then along half a cosine that is at `final` after the last step, changed once in `every` steps (NOVA)."""
    passed = max(0, step - begin) // every * every
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * passed / max(1, max_steps - begin)))


@LR_SCHEDULERS.register_function()
def ConstantThenDecay(step: int, max_steps: int, decay: Annotated[float, Bounds(above=0, most=1)] = 0.2, final: Factor = 0.0) -> float:
    """Constant, then 1 - sqrt to `final` over the last share `decay` of the run (Hägele et al. 2024)."""
    begin = max_steps * (1.0 - decay)
    return 1.0 if step < begin else final + (1.0 - final) * (1.0 - math.sqrt((step - begin) / max(1.0, max_steps - begin)))


def _progress(step: int, max_steps: int) -> float:
    return min(1.0, step / max(1, max_steps - 1))


# ------------------------------------------------------------------------------------------------ optimizers
NOT_FUSED = ('SGD', 'Adagrad')    # where each process holds a share of the weights: PyTorch 2.14 has no such kernel for shares


class OptimizerPlace(Component):
    """What an optimizer's node says about its place, beside the optimizer's own arguments."""

    PARAMS: list[str] = param(['*'], 'Names (globs) of the parameters it owns; each parameter belongs to the first that names it.')
    LOSS: str = param('loss', "The key of the network's outputs that it follows.")
    EVERY: int = param(1, 'It steps once in so many steps, by the gradients of that step.', least=1)
    LR_SCALE: float = param(1.0, "Multiplies the solver's rate for this optimizer.", least=0)


class NamedOptimizer:
    """One torch optimizer with the names of what it owns.    state: tensors by parameter name, so that no order matters

    With EVERY it steps once in so many steps, by the gradients of that step alone.
    """

    def __init__(self, name: str, node: Config, owned: dict[str, nn.Parameter], groups: list[dict[str, Any]]):
        own, (schema, beside) = split_node(node, OptimizerPlace)
        place = schema.fill(beside)
        self.name, self.loss, self.every = name, place.LOSS, place.EVERY
        self.owned = owned
        params = _grouped(owned, groups)
        self.optimizer: torch.optim.Optimizer = OPTIMIZERS.build(_with_fused(own, owned), params=params)
        for group in self.optimizer.param_groups:
            group['base_lr'] = float(group['lr']) * group.pop('lr_scale', 1.0) * place.LR_SCALE

    def set_rate(self, factor: float) -> None:
        """Multiply the learning rate of each group by a factor of the schedule."""
        for group in self.optimizer.param_groups:
            group['lr'] = group['base_lr'] * factor

    @property
    def rate(self) -> float:
        """The learning rate of the first group."""
        return self.optimizer.param_groups[0]['lr']

    def step(self) -> None:
        """Change the weights by their gradients."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """{'parameter name/exp_avg': tensor}; numbers as 0-d tensors."""
        state = self.optimizer.state
        return {f'{name}/{key}': value if isinstance(value, Tensor) else torch.tensor(value)
                for name, p in self.owned.items() for key, value in state.get(p, {}).items() if value is not None}

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of it beside its tensors: its class, and which of its parameters have no state (yet)."""
        stateless = [name for name, p in self.owned.items() if not self.optimizer.state.get(p)]
        return {'class': type(self.optimizer).__name__, 'stateless': stateless}

    def load_state_tensors(self, tensors: Stored, prefix: str, stateless: Collection[str], where: str) -> None:
        """Take the state of each owned parameter by its name behind the prefix, in the parameter's own layout, as fused kernels need it.

        tensors: each is read when its turn has come. stateless: parameters that had none. Raises CheckpointError where another one has
        none, or a state is of another shape.
        """
        found: dict[str, list[str]] = {}
        for key in tensors:
            if key.startswith(prefix):
                name, _, entry = key[len(prefix):].rpartition('/')
                found.setdefault(name, []).append(entry)
        missing = [name for name in self.owned if name not in found and name not in stateless]
        if missing:
            raise CheckpointError(f'{where}: the optimizer {self.name} has no state for {", ".join(missing[:5])}'
                                  f'{" ..." if len(missing) > 5 else ""}; this config trains other parameters')
        for name, p in self.owned.items():
            if name in found:
                self.optimizer.state[p] = {entry: self._like_its_parameter(tensors, f'{prefix}{name}/{entry}', p, where)
                                           for entry in found[name]}

    def _like_its_parameter(self, tensors: Stored, key: str, p: nn.Parameter, where: str) -> Tensor:
        entry = key.rpartition('/')[2]
        if p.ndim and tensors.slot(key).shape == p.shape:
            # a state in another memory order than its weight is read in the wrong order by the fused kernels, without a word
            fill_from(own := torch.empty_like(p, requires_grad=False), partial(tensors.__getitem__, key), partial(tensors.rows, key))
            return own
        value = tensors[key]
        if value.ndim == 0:
            # torch keeps the step counter on the CPU unless the step is fused or captured, and all else beside the parameter
            group = self.optimizer.param_groups[0]
            return value.to('cpu' if entry == 'step' and not (group.get('fused') or group.get('capturable')) else p.device)
        if value.ndim != p.ndim or any(v not in (1, d) for v, d in zip(value.shape, p.shape)):     # Adafactor keeps rows and columns
            raise CheckpointError(f'{where}: {key} has shape {list(value.shape)}, the parameter has {list(p.shape)}')
        return value.to(p.device)


def build_optimizers(cfg: Config, model: nn.Module) -> list[NamedOptimizer]:
    """The optimizers of OPTIMIZER: one config, or a map of named ones. Every trainable parameter belongs to exactly one.

    Raises ConfigError where a parameter is in none, or an optimizer owns nothing.
    """
    nodes = {'main': cfg} if 'NAME' in cfg else dict(cfg)
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not left:
        raise ConfigError('nothing is trained: every parameter of the network is frozen (FREEZE)')
    groups = model.parameter_groups() if hasattr(model, 'parameter_groups') else []
    built = []
    for name, node in nodes.items():
        patterns = node.get('PARAMS', ['*'])
        owned = {n: p for n, p in left.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)}
        if not owned:
            raise ConfigError(f'OPTIMIZER.{name}.PARAMS {patterns} matches no trainable parameter that is left; '
                              f'there are {", ".join(list(left)[:5])}')
        left = {n: p for n, p in left.items() if n not in owned}
        built.append(NamedOptimizer(name, node, owned, groups))
    if left:
        raise ConfigError(f'{len(left)} trainable parameters are in no optimizer: {", ".join(list(left)[:5])} ...; '
                          'name them in PARAMS, or freeze them')
    return built


def _grouped(owned: dict[str, nn.Parameter], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    left, result = dict(owned), []
    for group in groups:
        members = [left.pop(name) for name in group['params'] if name in left]
        if members:
            result.append({**group, 'params': members})
    result = ([{'params': list(left.values())}] if left else []) + result
    # what every process has whole and what it has a share of cannot be stepped in one call
    kinds = [{**group, 'params': [p for p in group['params'] if is_share(p) == kind]} for group in result for kind in (True, False)]
    return [group for group in kinds if group['params']]


def _with_fused(node: Config, owned: dict[str, nn.Parameter]) -> Config:
    """One kernel for all parameters where the optimizer has one for this device and the user did not choose."""
    parameters = inspect.signature(OPTIMIZERS.get(node['NAME'])).parameters
    asked = {key.lower() for key in node}
    kinds = {p.device.type for p in owned.values()}
    if 'fused' not in parameters or asked & {'fused', 'foreach', 'capturable', 'differentiable'} or not kinds <= {'cuda', 'cpu', 'mps'}:
        return node
    if not all(p.is_floating_point() for p in owned.values()) or (node['NAME'] in NOT_FUSED and any(map(is_share, owned.values()))):
        return node
    node = node.copy()
    node['FUSED'] = True
    return node


def rate_function(cfg: Config | None, warmup: int, max_steps: int, low: float = 0.0) -> Callable[[int], float]:
    """step -> the factor on every optimizer's rate: the scheduler's, times a linear warm-up from `low` to 1."""
    schedule = LR_SCHEDULERS.function(cfg) if cfg is not None else Constant

    def factor(step: int) -> float:
        risen = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return schedule(step=step, max_steps=max_steps) * (risen + (1.0 - risen) * low)

    return factor
