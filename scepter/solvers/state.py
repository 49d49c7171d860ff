"""What a checkpoint holds of a run, and how a run goes on from one."""
from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from scepter.core.config import Config, masked, plain
from scepter.core.disk.checkpoints import Checkpoint
from scepter.core.env import we
from scepter.core.errors import CheckpointError
from scepter.solvers.run import Run


def contents(run: Run) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by group, and the JSON state, of a checkpoint of this moment."""
    groups = {'model': run.model.trained_state(),
              'optimizer': {f'{o.name}/{key}': value for o in run.optimizers for key, value in o.state_tensors().items()}}
    hooks: dict[str, Any] = {}
    for name, group, hook in named_hooks(run):
        hooks[name] = hook.state_dict()
        if tensors := hook.state_tensors():
            groups[group] = tensors
    scaler = run.train_step.scaler
    state = {'step': run.step, 'samples': run.samples, 'seed': we.seed, 'global_batch_size': run.plan.global_size,
             'world_size': we.world_size, 'optimizers': {o.name: o.record() for o in run.optimizers},
             'scaler': scaler.state_dict() if scaler.is_enabled() else {}, 'hooks': hooks,
             'left_out': run.model.sources(run.work_dir), 'evals_due': run.evals_due}
    return groups, state


def check(loaded: Checkpoint) -> None:
    """Whether the state holds what a run goes on from: a manifest that is true says nothing of it. Raises CheckpointError."""
    kinds = {'step': int, 'samples': int, 'seed': int, 'global_batch_size': int, 'world_size': int, 'optimizers': dict, 'scaler': dict,
             'hooks': dict, 'evals_due': list}
    state = {'evals_due': _due_before_they_had_names(loaded.state), **loaded.state}
    for key, kind in kinds.items():
        value = state.get(key)
        if type(value) is not kind or (kind is int and value < 0):
            raise CheckpointError(f'{loaded.path}/state.json: {key} is {value!r}, expected {kind.__name__}: no run of ours wrote this')
    if state['step'] != loaded.step or state['global_batch_size'] < 1:
        raise CheckpointError(f'{loaded.path}/state.json: its step is {state["step"]}, its global_batch_size {state["global_batch_size"]}, '
                              f'but the manifest is of step {loaded.step}')


def restore(run: Run, loaded: Checkpoint) -> None:
    """Go on exactly where a checkpoint was written: weights, optimizers, hooks. Raises CheckpointError where it does not fit."""
    state = loaded.state
    run.model.agree_on_sources()
    run.model.load_trained_state(loaded)
    _restore_optimizers(run, loaded, state)
    scaler = run.train_step.scaler
    if scaler.is_enabled() and state['scaler']:
        with _told(loaded, 'scaler'):
            scaler.load_state_dict(state['scaler'])
    for name, group, hook in named_hooks(run):
        if name in state['hooks']:
            tensors = loaded.group(group) if group in loaded.groups else {}
            with _told(loaded, f'state of {name}'):
                hook.load_state_dict(state['hooks'][name], tensors)
    run.step, run.samples = run.plan.step, run.plan.samples
    due = state.get('evals_due', _due_before_they_had_names(state))
    run.evals_due = [name for name in run.evaluations if name in due]    # what the config has lost is due no longer
    if we.seed != state['seed']:
        run.logger.warning(f'ENV.SEED is {we.seed}, but {loaded.path} was trained with {state["seed"]}: going on with that one')
        we.seed = state['seed']
    _note_changes(run, Config.parse(loaded.config, environment=False))


def _due_before_they_had_names(state: Mapping[str, Any]) -> list[str] | None:
    """What was cut off, of a checkpoint from when there was one evaluation: `is_eval_due`."""
    is_due = state.get('is_eval_due')
    return [''] if is_due is True else [] if is_due is False else None


def _restore_optimizers(run: Run, loaded: Checkpoint, state: Mapping[str, Any]) -> None:
    tensors = loaded.group('optimizer') if 'optimizer' in loaded.groups else {}
    now = {o.name: o.record()['class'] for o in run.optimizers}
    records = state['optimizers']
    with _told(loaded, 'optimizers'):
        then = {name: record['class'] for name, record in records.items()}
    if now != then:
        raise CheckpointError(f'{loaded.path} was trained with the optimizers {_spelled(then)}; this config has {_spelled(now)}. '
                              'Their state cannot be carried over: restore the config, or begin a new run from the weights alone '
                              '(another WORK_DIR, and PretrainedHook with this checkpoint)')
    for o in run.optimizers:
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


def named_hooks(run: Run) -> Iterator[tuple[str, str, Any]]:
    """Training hooks, each under its NAME and the group of its tensors: #2, #3, ... behind those that stand several times."""
    seen: Counter[str] = Counter()

    def numbered(kind: str, word: str) -> str:
        seen[kind + word] += 1
        return word if seen[kind + word] == 1 else f'{word}#{seen[kind + word]}'

    for hook in run.hooks['train']:
        name = type(hook).__name__
        yield numbered('name ', name), numbered('group ', hook.group or name), hook


def _note_changes(run: Run, before: Config) -> None:
    old, new = _leaves(plain(before.get('SOLVER', {}))), _leaves(plain(masked(run.experiment).get('SOLVER', {})))
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and not k.startswith('RESUME_FROM'))
    if changed:
        rows = [f'  SOLVER.{k}: {old.get(k, "absent")} -> {new.get(k, "absent")}' for k in changed[:20]]
        run.logger.warning('the config has changed since this checkpoint:\n' + '\n'.join(rows))


def _leaves(value: Any, path: str = '') -> dict[str, Any]:
    if isinstance(value, (dict, list)) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, below in entries for k, v in _leaves(below, f'{path}.{key}' if path else str(key)).items()}
    return {path: value}
