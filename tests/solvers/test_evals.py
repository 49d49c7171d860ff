"""Named evaluations: what each of them measures and when, and what a stop, a resume, an average or a second process has to do with it."""
from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from scepter import run_train
from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.env import Stopped, we
from scepter.core.errors import DataError
from scepter.core.experiment import check_experiment
from scepter.core.faults import ConfigError
from scepter.core.registry import DATASETS, HOOKS
from scepter.core.schema import param
from scepter.data.datasets import UnreadableError
from scepter.hooks.base import Hook
from scepter.solvers.metrics import Totals
from tiny import TinyPoints, config, run

POINTS = {'NAME': 'TinyPoints', 'BATCH_SIZE': 3}
LOG = {'NAME': 'LogHook', 'LOG_INTERVAL': 1, 'PROGRESS': False}
BEST = {'NAME': 'CheckpointHook', 'INTERVAL': 0, 'SAVE_BEST_BY': '-full/loss'}
QUICK = {'DATA': {**POINTS, 'COUNT': 6}, 'INTERVAL': 2, 'METRICS': [{'NAME': 'MeanValue'}]}
FULL = {'DATA': POINTS, 'INTERVAL': 4, 'METRICS': [{'NAME': 'MeanValue'}]}


@DATASETS.register_class()
class TornPoints(TinyPoints):
    """TinyPoints of which some cannot be read."""

    TORN: list[int] = param([])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.TORN:
            raise UnreadableError('torn')
        return super().__getitem__(index)


@HOOKS.register_class()
class StopIn(Hook):
    """A signal in the first batch of an evaluation (in EVAL_HOOKS), or at its end (in TRAIN_HOOKS)."""

    EVALUATION: str = param('')

    def after_iter(self, solver: Any) -> None:
        if solver.mode == 'eval':
            self.after_eval(solver)

    def after_eval(self, solver: Any) -> None:
        if solver.evaluation.name == self.EVALUATION:
            we.stop_signal = signal.SIGTERM


def settings(work_dir: Path, steps: int = 8, **more: Any) -> Config:
    return config(work_dir, steps, **{'TRAIN_HOOKS': [LOG, BEST], 'EVALS': {'quick': QUICK, 'full': FULL}, **more})


def figures(work_dir: Path) -> list[dict[str, Any]]:
    """The rows of evaluations, without the time."""
    rows = [json.loads(line) for line in (work_dir / 'log.jsonl').read_text(encoding='utf-8').splitlines()]
    return [{k: v for k, v in row.items() if k != 'time'} for row in rows if any(k.startswith('val/') for k in row)]


def state_of(work_dir: Path, step: int) -> Any:
    return checkpoints.load(checkpoints.folder_of(work_dir / 'checkpoints', step)).state


# ------------------------------------------------------------------------------------------------ what and when
def test_each_evaluation_has_its_own_data_interval_and_names_beside_that_without_a_name(tmp_path):
    solver = run(settings(tmp_path, EVAL_DATA=POINTS, EVAL_INTERVAL=4, EVALS={'quick': {**QUICK, 'LOSS': False}, 'full': FULL}))
    rows = figures(tmp_path)
    assert [(row['step'], *sorted(row.keys() - {'step'})) for row in rows] == [
        (2, 'val/quick/value'), (4, 'val/loss'), (4, 'val/quick/value'), (4, 'val/full/loss', 'val/full/value'),
        (6, 'val/quick/value'), (8, 'val/loss'), (8, 'val/quick/value'), (8, 'val/full/loss', 'val/full/value')]
    assert all(row['val/loss'] == full['val/full/loss'] for row, full in ((rows[1], rows[3]), (rows[5], rows[7])))
    points = [solver.evaluations['quick'].dataset[i]['image'].sum().item() / 10 for i in range(6)]
    assert rows[0]['val/quick/value'] == pytest.approx(sum(points) / 6)
    assert set(solver.eval_outputs) == {'full/loss', 'full/value'}


def test_the_best_of_a_named_figure_is_kept_whatever_others_say(tmp_path):
    run(settings(tmp_path, KEEP_CHECKPOINTS=1))
    full = {row['step']: row['val/full/loss'] for row in figures(tmp_path) if 'val/full/loss' in row}
    best = min(full, key=full.__getitem__)
    state = state_of(tmp_path, 8)['hooks']['CheckpointHook']
    assert (state['best'], state['best_step'], len(full)) == (full[best], best, 2)


def test_a_best_of_another_figure_is_not_compared_with(tmp_path):
    run(settings(tmp_path, steps=4))
    by_value = {**BEST, 'SAVE_BEST_BY': '+quick/value'}
    solver = run(settings(tmp_path, steps=4, RESUME_FROM='latest', TRAIN_HOOKS=[LOG, by_value]))
    assert solver.hooks['train'][1].best is None


def test_a_named_evaluation_looks_at_the_averaged_weights(tmp_path):
    average = {'NAME': 'ModelEmaHook', 'BETA': 0.9, 'WARMUP': False}
    averaged = run(settings(tmp_path / 'averaged', steps=4, TRAIN_HOOKS=[LOG, average]))
    own = run(settings(tmp_path / 'own', steps=4, TRAIN_HOOKS=[LOG]))
    assert averaged.eval_outputs['full/loss'] != own.eval_outputs['full/loss']
    averaged.hooks['train'] = []
    averaged.run_eval()
    assert averaged.eval_outputs == own.eval_outputs     # so the weights themselves are the same


def test_sheets_of_two_evaluations_of_one_step_stand_beside_one_another(tmp_path):
    run(settings(tmp_path, steps=4, MODEL={'NAME': 'TinyPainter'}, TRAIN_HOOKS=[LOG], EVAL_HOOKS=[{'NAME': 'ProbeDataHook'}],
                 EVALS={name: {**one, 'METRICS': []} for name, one in (('quick', QUICK), ('full', FULL))}))
    assert {str(f.relative_to(tmp_path / 'eval_images')) for f in (tmp_path / 'eval_images').rglob('*.png')} == {
        'quick/step-00000002.png', 'quick/step-00000004.png', 'full/step-00000004.png'}


# ------------------------------------------------------------------------------------------------ a stop, and going on
@pytest.mark.parametrize(('hooks', 'left'), [
    ({'EVAL_HOOKS': [{'NAME': 'StopIn', 'EVALUATION': 'quick'}]}, None),
    ({'TRAIN_HOOKS': [LOG, BEST, {'NAME': 'StopIn', 'EVALUATION': ''}]}, ['quick', 'full']),
    ({'EVAL_HOOKS': [{'NAME': 'StopIn', 'EVALUATION': 'full'}]}, ['full']),
    ({'TRAIN_HOOKS': [LOG, BEST, {'NAME': 'StopIn', 'EVALUATION': 'full'}]}, []),
], ids=['in the first', 'between two', 'in the last', 'after all'])
def test_a_stop_loses_no_evaluation_and_doubles_none(tmp_path, hooks, left):
    more = {'EVAL_DATA': POINTS, 'EVAL_INTERVAL': 4}
    with pytest.raises(Stopped):
        run(settings(tmp_path / 'cut', **more, **hooks))
    step = 2 if left is None else 4
    assert state_of(tmp_path / 'cut', step)['evals_due'] == (['quick'] if left is None else left)
    run(settings(tmp_path / 'whole', **more))
    run(settings(tmp_path / 'cut', RESUME_FROM='auto', **more))
    assert figures(tmp_path / 'cut') == figures(tmp_path / 'whole')
    assert state_of(tmp_path / 'cut', 8)['hooks']['CheckpointHook'] == state_of(tmp_path / 'whole', 8)['hooks']['CheckpointHook']


def test_a_second_stop_in_what_the_first_had_left_doubles_nothing_either(tmp_path):
    more = {'EVAL_DATA': POINTS, 'EVAL_INTERVAL': 4, 'steps': 4}
    for hooks in ({'TRAIN_HOOKS': [LOG, BEST, {'NAME': 'StopIn', 'EVALUATION': ''}]},
                  {'EVAL_HOOKS': [{'NAME': 'StopIn', 'EVALUATION': 'full'}]}):
        with pytest.raises(Stopped):
            run(settings(tmp_path / 'cut', RESUME_FROM='auto', **more, **hooks))
    for _ in range(2):      # the second of them has nothing left to do
        run(settings(tmp_path / 'cut', RESUME_FROM='auto', **more))
    run(settings(tmp_path / 'whole', **more))
    assert figures(tmp_path / 'cut') == figures(tmp_path / 'whole')


@HOOKS.register_class()
class FailAt(Hook):
    """Ends the run as a crash would."""

    STEP: int = param(5)

    def after_iter(self, solver: Any) -> None:
        if solver.step == self.STEP:
            raise RuntimeError('crashed')


def test_what_was_made_up_for_is_not_made_again_after_a_crash(tmp_path):
    with pytest.raises(Stopped):
        run(settings(tmp_path / 'cut', TRAIN_HOOKS=[LOG], EVAL_HOOKS=[{'NAME': 'StopIn', 'EVALUATION': 'full'}]))
    with pytest.raises(RuntimeError, match='crashed'):
        run(settings(tmp_path / 'cut', RESUME_FROM='auto', TRAIN_HOOKS=[LOG, {'NAME': 'FailAt'}]))
    run(settings(tmp_path / 'cut', RESUME_FROM='auto', TRAIN_HOOKS=[LOG]))
    run(settings(tmp_path / 'whole', TRAIN_HOOKS=[LOG]))
    assert figures(tmp_path / 'cut') == figures(tmp_path / 'whole')


def test_a_resumed_run_may_have_lost_the_evaluation_that_is_due_and_gained_another(tmp_path):
    with pytest.raises(Stopped):
        run(settings(tmp_path, EVAL_HOOKS=[{'NAME': 'StopIn', 'EVALUATION': 'full'}]))
    solver = run(settings(tmp_path, RESUME_FROM='auto', TRAIN_HOOKS=[LOG], EVALS={'quick': QUICK, 'late': {**FULL, 'INTERVAL': 8}}))
    assert [(row['step'], *sorted(row.keys() - {'step'})) for row in figures(tmp_path)] == [
        *((step, 'val/quick/loss', 'val/quick/value') for step in (2, 4, 6, 8)), (8, 'val/late/loss', 'val/late/value')]
    assert solver.evals_due == []


@pytest.mark.parametrize('is_due', [True, False])
def test_a_checkpoint_from_when_there_was_one_evaluation_resumes(tmp_path, is_due):
    more = {'EVAL_DATA': POINTS, 'EVAL_INTERVAL': 2, 'TRAIN_HOOKS': [LOG, {'NAME': 'CheckpointHook', 'INTERVAL': 2}], 'EVALS': {}}
    run(settings(tmp_path, steps=2, **more))
    old = checkpoints.load(checkpoints.folder_of(tmp_path / 'checkpoints', 2))
    state = {key: value for key, value in old.state.items() if key != 'evals_due'}
    checkpoints.save(tmp_path / 'checkpoints', 2, {g: old.group(g) for g in old.groups}, {**state, 'is_eval_due': is_due}, old.config)
    run(settings(tmp_path, steps=4, RESUME_FROM='auto', **more))
    assert [row['step'] for row in figures(tmp_path)] == [2, *([2] if is_due else []), 4]
    assert 'is_eval_due' not in state_of(tmp_path, 4)


# ------------------------------------------------------------------------------------------------ several processes, bad samples
def test_two_processes_measure_to_the_bit_what_one_does(tmp_path):
    def go(name: str, processes: int) -> list[dict[str, Any]]:
        cfg = settings(tmp_path / name, steps=4, OPTIMIZER={'NAME': 'SGD', 'LR': 0.0}, GLOBAL_BATCH_SIZE=6)
        cfg.update(IMPORTS=[str(Path(tiny.__file__))],
                   ENV={'NPROC': processes, 'DEVICE': 'cpu', 'SEED': 5, 'THREADS': 1})
        (tmp_path / f'{name}.yaml').write_text(str(cfg), encoding='utf-8')
        assert run_train.main(['--cfg', str(tmp_path / f'{name}.yaml')]) == 0
        return figures(tmp_path / name)

    alone = go('alone', 1)
    assert [len(row) for row in alone] == [3, 3, 3] and go('shared', 2) == alone


def test_a_sample_that_cannot_be_read_is_left_out_of_every_figure(tmp_path):
    torn = {'NAME': 'TornPoints', 'BATCH_SIZE': 3, 'TORN': [1, 5]}
    solver = run(settings(tmp_path, steps=4, TRAIN_HOOKS=[LOG], EVALS={'torn': {**FULL, 'DATA': torn}}))
    points = [solver.evaluations['torn'].dataset[i]['image'].sum().item() / 10 for i in range(16) if i not in (1, 5)]
    assert solver.eval_outputs['torn/value'] == pytest.approx(math.fsum(points) / 14)


def test_an_evaluation_of_nothing_has_no_figure(tmp_path):
    torn = {'NAME': 'TornPoints', 'BATCH_SIZE': 1, 'COUNT': 2, 'TORN': [0, 1]}
    with pytest.raises(DataError, match=r'EVALS\.torn\.DATA: none of its 2 samples can be read'):
        run(settings(tmp_path / 'torn', steps=4, TRAIN_HOOKS=[LOG], EVALS={'torn': {**FULL, 'DATA': torn}}))
    with pytest.raises(DataError, match=r'EVALS\.empty\.DATA holds no sample'):
        run(settings(tmp_path / 'empty', steps=4, TRAIN_HOOKS=[LOG], EVALS={'empty': {**FULL, 'DATA': {**POINTS, 'COUNT': 0}}}))


# ------------------------------------------------------------------------------------------------ faults of a config
@pytest.mark.parametrize(('changes', 'message'), [
    ({'SOLVER.EVALS.quick.INTERVL': 3}, r'EVALS\.quick\.INTERVL: no such parameter; did you mean INTERVAL\?'),
    ({'SOLVER.EVALS.quick.INTERVAL': 0}, r'EVALS\.quick\.INTERVAL: expected at least 1, got 0'),
    ({'SOLVER.EVALS.quick': {'INTERVAL': 3}}, r'EVALS\.quick\.DATA: required, but missing'),
    ({'SOLVER.EVALS.quick': {'DATA': POINTS}}, r'EVALS\.quick\.INTERVAL: required, but missing'),
    ({'SOLVER.EVALS.quick': 3}, r'EVALS\.quick: expected a section \(DATA, METRICS, INTERVAL, LOSS\), got 3'),
    ({'SOLVER.EVALS.quick.DATA.COUNTS': 3}, r'EVALS\.quick\.DATA\.COUNTS: no such parameter; did you mean COUNT\?'),
    ({'SOLVER.EVALS.quick.METRICS[0].NAME': 'MeanValu'}, r'EVALS\.quick\.METRICS\[0\]\.NAME: METRICS has no MeanValu; did you mean'),
    ({'SOLVER.EVALS.a/b': FULL}, r"EVALS: has 'a/b': the name of an evaluation is a word without a slash"),
    ({'SOLVER.METRICS': [{'NAME': 'MeanValue'}]}, r'METRICS: belong to the evaluation on EVAL_DATA, which EVAL_INTERVAL 0 leaves out'),
    ({'SOLVER.TRAIN_HOOKS[1].SAVE_BEST_BY': '-quik/loss'}, r'TRAIN_HOOKS\[1\]\.SAVE_BEST_BY: is -quik/loss, but the evaluations give no '
                                                           r'quik/loss'),
    ({'SOLVER.TRAIN_HOOKS[1].SAVE_BEST_BY': '-loss'}, r'the evaluations give no loss'),
    ({'SOLVER.EVALS': {}}, r'SAVE_BEST_BY: is -full/loss, but nothing is evaluated'),
    ({'SOLVER.EVALS': {'full': {**FULL, 'METRICS': [{'NAME': 'AccuracyMetric'}]}},
      'SOLVER.TRAIN_HOOKS[1].SAVE_BEST_BY': '+full/acuracy'}, r'no full/acuracy; did you mean full/accuracy\? \('),
], ids=str)
def test_a_fault_below_evals_is_told_before_anything_is_built(tmp_path, changes, message):
    cfg = settings(tmp_path)
    check_experiment(cfg)
    for path, value in changes.items():
        *above, key = path.replace('[', '.').replace(']', '').split('.')
        node: Any = cfg
        for step in above:
            node = node[int(step)] if isinstance(node, list) else node[step]
        node[key] = value
    with pytest.raises(ConfigError, match=message) as caught:
        check_experiment(cfg)
    assert len(caught.value.faults) == 1


def test_a_fault_below_evals_bears_its_line(tmp_path):
    text = str(settings(tmp_path)).replace('COUNT: 6', 'CONT: 6')
    (tmp_path / 'train.yaml').write_text(text, encoding='utf-8')
    line = next(i for i, row in enumerate(text.splitlines(), 1) if 'CONT: 6' in row)
    with pytest.raises(ConfigError, match=rf'line {line}  SOLVER\.EVALS\.quick\.DATA\.CONT: no such parameter; did you mean COUNT\?'):
        check_experiment(Config.load(tmp_path / 'train.yaml'))


def test_null_takes_away_an_evaluation_that_a_base_has(tmp_path):
    solver = run(settings(tmp_path, steps=4, EVALS={'quick': None, 'full': FULL}))
    assert list(solver.evaluations) == ['full']


def test_a_figure_that_no_metric_had_told_of_is_missed_at_the_first_evaluation_that_should_give_it(tmp_path):
    by_other = {**BEST, 'SAVE_BEST_BY': '+full/valeu'}
    with pytest.raises(ConfigError, match='SAVE_BEST_BY: the evaluation gives full/loss, full/value, not full/valeu'):
        run(settings(tmp_path, TRAIN_HOOKS=[LOG, by_other]))
    assert [row['step'] for row in figures(tmp_path)] == [2, 4]     # quick at 2 and 4 passed it by


# ------------------------------------------------------------------------------------------------ sums
def test_totals_of_numbers_are_exact_and_those_of_arrays_float64():
    values = [1e16, 1.0, 0.1, -1e16, 1.0]
    totals = [Totals(), Totals()]
    for total, order in zip(totals, (values, values[::-1])):
        for value in order:
            total.add({'number': value, 'tensor': torch.tensor(value), 'array': torch.tensor([value, 1.0]), 'count': 1})
    forward, backward = (total.everywhere() for total in totals)
    assert forward['number'] == backward['number'] == math.fsum(values) and sum(values) != sum(values[::-1])
    assert forward['tensor'] == backward['tensor'] and forward['array'].dtype == torch.float64 and forward['count'] == 5


def test_a_total_that_is_not_finite_says_so():
    total = Totals()
    for value in (1.0, math.inf, 2.0):
        total.add({'loss': value})
    assert total.everywhere() == {'loss': math.inf}
    total.add({'loss': -math.inf})
    assert math.isnan(total.everywhere()['loss'])


@pytest.mark.parametrize('value', [[1.0], (1.0,), 'one', {'a': 1}], ids=str)
def test_what_would_be_strung_together_is_no_sum(value):
    with pytest.raises(TypeError, match=rf'sums\(\) gave a {type(value).__name__} for features: give what adds up'):
        Totals().add({'features': value})
