"""What a checkpoint holds of a run, and how a run goes on from one."""
from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from scepter.core.config import Config, masked, plain
from scepter.core.disk.checkpoints import Checkpoint
from scepter.core.disk.writing import Save, as_json
from scepter.core.env import we
from scepter.core.errors import CheckpointError
from scepter.core.schema import schema_of
from scepter.solvers.run import Run


def contents(run: Run) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by group, and the JSON state, of a checkpoint of this moment."""
    groups = _tensors(run, run.model.trained_state())
    hooks = {name: hook.state_dict() for name, _, hook in named_hooks(run)}
    state = {'step': run.step, 'samples': run.samples, 'seed': we.seed, 'global_batch_size': run.plan.global_size,
             'world_size': we.world_size, 'optimizers': {o.name: o.record() for o in run.optimizers},
             'scaler': run.train_step.scale.state_dict(), 'hooks': hooks,
             'left_out': run.model.sources(run.work_dir), 'evals_due': run.evals_due}
    return groups, state


def _tensors(run: Run, model: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups = {'model': model,
              'optimizer': {f'{o.name}/{key}': value for o in run.optimizers for key, value in o.state_tensors().items()}}
    for _, group, hook in named_hooks(run):
        if tensors := hook.state_tensors():
            groups[group] = tensors
    return groups


def to_save(run: Run, root: Path, line: Any = None) -> Save:
    """A checkpoint of this moment, to be written below root, under the names and with the bytes of a single process's. All call it."""
    def contents() -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
        if not we.is_main:     # what is left out, and what else is saved, the main process says
            return _tensors(run, run.model.state_dict()), {}
        groups, state = run.checkpoint_contents()
        return groups, {'state.json': as_json(state, 'the state'), 'config.yaml': masked(run.experiment).dump()}

    return Save.of(root, run.step, contents, run.SHARD_SIZE * 1e9, run.kept(), line)


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
    with _told(loaded, 'scaler'):
        run.train_step.scale.load_state_dict(state['scaler'])
    for name, group, hook in named_hooks(run):
        if name in state['hooks']:
            tensors = loaded.tensors(group) if group in loaded.groups else {}
            with _told(loaded, f'state of {name}'):
                hook.load_state_dict(state['hooks'][name], tensors)
    run.step, run.samples = run.plan.step, run.plan.samples
    due = state.get('evals_due', _due_before_they_had_names(state))
    run.evals_due = [name for name in run.evaluations if name in due]    # what the config has lost is due no longer
    if we.seed != state['seed']:
        run.logger.warning(f'ENV.SEED is {we.seed}, but {loaded.path} was trained with {state["seed"]}: going on with that one')
        we.seed = state['seed']
    _note_changes(run, loaded)


def _due_before_they_had_names(state: Mapping[str, Any]) -> list[str] | None:
    """What was cut off, of a checkpoint from when there was one evaluation: `is_eval_due`."""
    is_due = state.get('is_eval_due')
    return [''] if is_due is True else [] if is_due is False else None


def _restore_optimizers(run: Run, loaded: Checkpoint, state: Mapping[str, Any]) -> None:
    tensors = loaded.tensors('optimizer') if 'optimizer' in loaded.groups else {}
    now = {o.name: o.record()['class'] for o in run.optimizers}
    records = state['optimizers']
    with _told(loaded, 'optimizers'):
        then = {name: record['class'] for name, record in records.items()}
    if now != then:
        raise CheckpointError(f'{loaded.path} was trained with the optimizers {_spelled(then)}; this config has {_spelled(now)}. '
                              'Their state cannot be carried over: restore the config, or begin a new run from the weights alone '
                              '(another WORK_DIR, and PretrainedHook with this checkpoint)')
    for o in run.optimizers:
        with _told(loaded, f'record of the optimizer {o.name}'):
            o.load_state_tensors(tensors, f'{o.name}/', records[o.name]['stateless'], str(loaded.path))


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


# what makes another training of it, and below that, what does not
DECISIVE = ('NAME', 'MODEL', 'TRAIN_DATA', 'OPTIMIZER', 'LR_SCHEDULER', 'WARMUP_STEPS', 'GRADIENT_CLIP', 'DTYPE', 'PARAM_DTYPE')
FREE = {'PRETRAINED_MODEL', 'IGNORE_KEYS', 'TOKENIZER_PATH', 'CHECKPOINTING', 'TILE_SIZE', 'IMAGE_SIZE', 'DEFAULT_N_PROMPT', 'BATCH_SIZE',
        'NUM_WORKERS', 'PREFETCH', 'PIN_MEMORY', 'TIMEOUT', 'MAX_BAD_FRACTION', 'QUARANTINE', 'CHECKSUMS'}


def refuse_another_run(run: Run, loaded: Checkpoint) -> None:
    """Raises CheckpointError where the WORK_DIR holds a run of other samples, another network or another optimizer than is asked for.

    MAX_STEPS, intervals, hooks, evaluations, the size of batches and how data is read may change freely. Files of weights are told apart
    by what they hold (weights/sources.py), and not here.
    """
    rows = [f'  {row}' for key, row in _changes(run, loaded).items() if _is_decisive(key)]
    if rows:
        raise CheckpointError(f'{run.work_dir} holds another run, up to {loaded.path.name}:\n' + '\n'.join(rows[:20])
                              + '\nGive another WORK_DIR, take these back, or add --force to go on with the new values from here')


def _is_decisive(key: str) -> bool:
    top, _, below = key.partition('.')
    return top in DECISIVE and FREE.isdisjoint(below.split('.'))


def _note_changes(run: Run, loaded: Checkpoint) -> None:
    rows = [f'  {row}' for row in _changes(run, loaded).values()]
    if rows:
        run.logger.warning('the config has changed since this checkpoint:\n' + '\n'.join(rows[:20]))


def _changes(run: Run, loaded: Checkpoint) -> dict[str, str]:
    """Key below SOLVER -> what it was and what it is, as written, where the two differ; a key that now spells its default does not."""
    before = Config.parse(loaded.config, environment=False).get('SOLVER', {})
    now = masked(run.experiment).get('SOLVER', {})
    old, new = _leaves(plain(before)), _leaves(plain(now))
    own = schema_of(type(run))
    same = {key for key, p in own.items() if {repr(plain(cfg.get(key, p.default))) for cfg in (before, now)} == {repr(plain(p.default))}}
    return {k: f'SOLVER.{k}: {old.get(k, "absent")} -> {new.get(k, "absent")}' for k in sorted(old.keys() | new.keys())
            if old.get(k) != new.get(k) and not k.startswith('RESUME_FROM') and k.partition('.')[0] not in same}


def _leaves(value: Any, path: str = '') -> dict[str, Any]:
    if isinstance(value, (dict, list)) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, below in entries for k, v in _leaves(below, f'{path}.{key}' if path else str(key)).items()}
    return {path: value}
