"""What a run is at a moment: how its steps are cut, what a checkpoint holds of it, and how it goes on from one."""
from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from scepter.core.config import Config, masked, plain
from scepter.core.disk.checkpoints import Checkpoint
from scepter.core.env import we
from scepter.core.errors import CheckpointError
from scepter.core.faults import ConfigError

if TYPE_CHECKING:
    from scepter.solvers.base import BaseSolver


class Plan(NamedTuple):
    """How the stream of samples is cut into steps.    global_size = micro * accu * processes; the run ends after max_steps"""
    micro: int           # samples of one forward pass of one process
    accu: int            # forward passes of one process in a step
    global_size: int     # samples of one step over all processes
    max_steps: int
    step: int            # where the run begins: steps of the optimizer,
    samples: int         # ... and the number of the next sample

    @classmethod
    def of(cls, cfg: Config, batch_size: int, dataset_size: int, world_size: int, state: Mapping[str, Any] | None) -> Plan:
        """From a solver's config, the state of the checkpoint that it goes on from, if any, and the processes at hand.

        The number of samples is the clock: MAX_EPOCHS counts them from the beginning, whatever the sizes of the steps were. Without
        GLOBAL_BATCH_SIZE a resumed run keeps the size of its steps on any number of processes. Raises ConfigError.
        """
        state = state or {}
        asked = cfg.GLOBAL_BATCH_SIZE if cfg.GLOBAL_BATCH_SIZE is not None else state.get('global_batch_size')
        micro, accu = batch_size, cfg.ACCU_STEP
        if asked is not None:
            if asked % world_size:
                fitting = [w for w in range(1, 2 * world_size) if asked % w == 0]
                raise ConfigError(f'a global batch of {asked} cannot be shared by {world_size} processes evenly: '
                                  f'use {", ".join(map(str, fitting))}')
            share = asked // world_size
            accu = next(a for a in range(max(1, math.ceil(share / micro)), share + 1) if share % a == 0)
            micro = share // accu
        size = micro * accu * world_size
        step = state.get('step', 0)
        samples = state.get('samples', 0)
        if cfg.MAX_STEPS is not None:
            return cls(micro, accu, size, cfg.MAX_STEPS, step, samples)
        left = dataset_size * cfg.MAX_EPOCHS - samples
        return cls(micro, accu, size, step + max(0, math.ceil(left / size)), step, samples)


def contents(solver: BaseSolver) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by group, and the JSON state, of a checkpoint of this moment."""
    groups = {'model': solver.model.trained_state(),
              'optimizer': {f'{o.name}/{key}': value for o in solver.optimizers for key, value in o.state_tensors().items()}}
    hooks: dict[str, Any] = {}
    for name, group, hook in named_hooks(solver):
        hooks[name] = hook.state_dict()
        if tensors := hook.state_tensors():
            groups[group] = tensors
    scaler = solver.train_step.scaler
    state = {'step': solver.step, 'samples': solver.samples, 'seed': we.seed, 'global_batch_size': solver.plan.global_size,
             'world_size': we.world_size, 'optimizers': {o.name: o.record() for o in solver.optimizers},
             'scaler': scaler.state_dict() if scaler.is_enabled() else {}, 'hooks': hooks,
             'left_out': solver.model.sources(solver.work_dir), 'is_eval_due': solver.is_eval_due}
    return groups, state


def check(loaded: Checkpoint) -> None:
    """Whether the state holds what a run goes on from: a manifest that is true says nothing of it. Raises CheckpointError."""
    kinds = {'step': int, 'samples': int, 'seed': int, 'global_batch_size': int, 'world_size': int, 'optimizers': dict, 'scaler': dict,
             'hooks': dict, 'is_eval_due': bool}
    state = loaded.state
    for key, kind in kinds.items():
        value = state.get(key)
        if type(value) is not kind or (kind is int and value < 0):
            raise CheckpointError(f'{loaded.path}/state.json: {key} is {value!r}, expected {kind.__name__}: no run of ours wrote this')
    if state['step'] != loaded.step or state['global_batch_size'] < 1:
        raise CheckpointError(f'{loaded.path}/state.json: its step is {state["step"]}, its global_batch_size {state["global_batch_size"]}, '
                              f'but the manifest is of step {loaded.step}')


def restore(solver: BaseSolver, loaded: Checkpoint) -> None:
    """Go on exactly where a checkpoint was written: weights, optimizers, hooks. Raises CheckpointError where it does not fit."""
    state = loaded.state
    solver.model.agree_on_sources()
    solver.model.load_trained_state(loaded)
    _restore_optimizers(solver, loaded, state)
    scaler = solver.train_step.scaler
    if scaler.is_enabled() and state['scaler']:
        with _told(loaded, 'scaler'):
            scaler.load_state_dict(state['scaler'])
    for name, group, hook in named_hooks(solver):
        if name in state['hooks']:
            tensors = loaded.group(group) if group in loaded.groups else {}
            with _told(loaded, f'state of {name}'):
                hook.load_state_dict(state['hooks'][name], tensors)
    solver.step, solver.samples, solver.is_eval_due = solver.plan.step, solver.plan.samples, state['is_eval_due']
    if we.seed != state['seed']:
        solver.logger.warning(f'ENV.SEED is {we.seed}, but {loaded.path} was trained with {state["seed"]}: going on with that one')
        we.seed = state['seed']
    _note_changes(solver, Config.parse(loaded.config, environment=False))


def _restore_optimizers(solver: BaseSolver, loaded: Checkpoint, state: Mapping[str, Any]) -> None:
    tensors = loaded.group('optimizer') if 'optimizer' in loaded.groups else {}
    now = {o.name: o.record()['class'] for o in solver.optimizers}
    records = state['optimizers']
    with _told(loaded, 'optimizers'):
        then = {name: record['class'] for name, record in records.items()}
    if now != then:
        raise CheckpointError(f'{loaded.path} was trained with the optimizers {_spelled(then)}; this config has {_spelled(now)}. '
                              'Their state cannot be carried over: restore the config, or begin a new run from the weights alone '
                              '(another WORK_DIR, and PretrainedHook with this checkpoint)')
    for o in solver.optimizers:
        own = {key[len(o.name) + 1:]: value for key, value in tensors.items() if key.startswith(f'{o.name}/')}
        with _told(loaded, f'record of the optimizer {o.name}'):
            o.load_state_tensors(own, records[o.name]['stateless'], str(loaded.path))


@contextlib.contextmanager
def _told(loaded: Checkpoint, what: str) -> Iterator[None]:
    """Turn what a forged or foreign entry of state.json makes its reader raise into a CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f'{loaded.path}/state.json: its {what} cannot be taken up ({type(error).__name__}: {error})') from error


def _spelled(optimizers: Mapping[str, str]) -> str:
    return ', '.join(f'{name}: {kind}' for name, kind in optimizers.items())


def named_hooks(solver: BaseSolver) -> Iterator[tuple[str, str, Any]]:
    """Training hooks, each under its NAME and the group of its tensors: #2, #3, ... behind those that stand several times."""
    seen: Counter[str] = Counter()

    def numbered(kind: str, word: str) -> str:
        seen[kind + word] += 1
        return word if seen[kind + word] == 1 else f'{word}#{seen[kind + word]}'

    for hook in solver.hooks['train']:
        name = type(hook).__name__
        yield numbered('name ', name), numbered('group ', hook.group or name), hook


def _note_changes(solver: BaseSolver, before: Config) -> None:
    old, new = _leaves(plain(before.get('SOLVER', {}))), _leaves(plain(masked(solver.experiment).get('SOLVER', {})))
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and not k.startswith('RESUME_FROM'))
    if changed:
        rows = [f'  SOLVER.{k}: {old.get(k, "absent")} -> {new.get(k, "absent")}' for k in changed[:20]]
        solver.logger.warning('the config has changed since this checkpoint:\n' + '\n'.join(rows))


def _leaves(value: Any, path: str = '') -> dict[str, Any]:
    if isinstance(value, (dict, list)) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, below in entries for k, v in _leaves(below, f'{path}.{key}' if path else str(key)).items()}
    return {path: value}
