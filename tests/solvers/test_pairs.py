"""A run that is stopped goes on bit for bit as if nothing had happened, whatever two settings meet in it."""
from __future__ import annotations

import inspect
import itertools
from pathlib import Path

import pytest
import torch

from pairs import FACTORS, REFUSED, Crash, Stop, all_rows, config, differences, outcome, table, train, whole_and_halves
from scepter.core.config import Config
from scepter.core.experiment import check_experiment
from scepter.core.faults import ConfigError
from scepter.core.launch import launch
from scepter.core.registry import OPTIMIZERS
from tests.twins import three_images, twin

ROWS = table()
TWO = {'NPROC': 2, 'DEVICE': 'cpu', 'THREADS': 1}
PLAIN = {name: values[0] for name, values in FACTORS.items()}
ALONE = [i for i, row in enumerate(ROWS) if row['PROCESSES'] == 1]
# those that are compiled take seconds: one of them is enough for every day, the one whose graph is gone through for two losses
SLOW = [i for i, row in enumerate(ROWS) if row['COMPILE'] and 'first' not in row['OPTIMIZER']]


def is_exact(folder: Path) -> bool:
    found = differences(outcome(folder / 'whole'), outcome(folder / 'halves'))
    assert not found, found
    return True


def test_every_two_settings_meet_in_some_row():
    for (a, values), (b, others) in itertools.combinations(FACTORS.items(), 2):
        missing = {frozenset(((a, i), (b, j))) for i, x in enumerate(values) for j, y in enumerate(others)
                   if not any(row[a] is x and row[b] is y for row in ROWS)}
        assert missing <= REFUSED, missing


def test_the_pair_that_is_left_out_is_refused(tmp_path):
    cfg = config(tmp_path, {**PLAIN, 'DTYPE': 'float16', 'PARAM_DTYPE': 'bfloat16'})
    with pytest.raises(ConfigError, match=r'SOLVER\.DTYPE: is float16, but PARAM_DTYPE is bfloat16'):
        check_experiment(cfg)


def test_shares_follow_one_loss(tmp_path):
    launch(Config({'FOLDER': str(tmp_path), 'ENV': TWO}), two_losses_of_shares)


def two_losses_of_shares(cfg: Config) -> None:
    with pytest.raises(ConfigError, match=r'PARALLEL is fsdp.* follow 2 losses \(loss, other\): use PARALLEL: ddp'):
        train(config(Path(cfg.FOLDER), {**PLAIN, 'OPTIMIZER': FACTORS['OPTIMIZER'][4], 'PROCESSES': 2, 'PARALLEL': 'fsdp'}))


@pytest.mark.parametrize('i', [pytest.param(i, marks=[pytest.mark.slow] if i in SLOW else []) for i in ALONE])
def test_five_steps_and_five_more_are_ten_to_the_bit(tmp_path, i):
    whole_and_halves(tmp_path, ROWS[i])
    assert is_exact(tmp_path), ROWS[i]


@pytest.mark.parametrize('rows', [pytest.param([i for i in range(len(ROWS)) if i not in ALONE + SLOW], id='fast'),
                                  pytest.param([i for i in SLOW if i not in ALONE], id='compiled', marks=pytest.mark.slow)])
def test_and_so_they_are_on_two_processes(tmp_path, rows):
    launch(Config({'FOLDER': str(tmp_path), 'ROWS': rows, 'ENV': TWO}), all_rows)
    assert len(rows) > 0 and all(is_exact(tmp_path / str(i)) for i in rows)


# ------------------------------------------------------------------------------------------------ every optimizer that is shipped
EXTRA = {'Adam': {'AMSGRAD': True}, 'AdamW': {'AMSGRAD': True, 'MAXIMIZE': True}, 'RMSprop': {'MOMENTUM': 0.9, 'CENTERED': True},
         'SGD': {'MOMENTUM': 0.9}, 'Adagrad': {'INITIAL_ACCUMULATOR_VALUE': 0.1}, 'ASGD': {'T0': 2.0}}


def optimizers():
    for name in OPTIMIZERS:
        if OPTIMIZERS.get(name).__module__.startswith('torch.'):
            has_fused = 'fused' in inspect.signature(OPTIMIZERS.get(name)).parameters
            for how in [{}, EXTRA.get(name), {**EXTRA.get(name, {}), 'FUSED': False} if has_fused else None]:
                if how is not None:
                    yield pytest.param(name, how, id='-'.join([name, *how]))


@pytest.mark.parametrize(('name', 'how'), optimizers())
def test_every_optimizer_goes_on_to_the_bit(tmp_path, name, how):
    node = {'NAME': name, 'LR': 1e-2, **how}
    if name == 'Muon':      # takes matrices alone
        node = {'matrices': {**node, 'PARAMS': ['mix.weight', 'idle.weight']}, 'rest': PLAIN['OPTIMIZER']}
    whole_and_halves(tmp_path, {**PLAIN, 'OPTIMIZER': node, 'CHANNELS_LAST': True, 'EMA': FACTORS['EMA'][1]})
    assert is_exact(tmp_path)


# ------------------------------------------------------------------------------------------------ a step that is refused
def test_a_refused_step_leaves_no_trace_in_the_statistics_of_a_normalisation(tmp_path):
    solver = train(config(tmp_path, PLAIN, steps=3))
    before = {name: value.clone() for name, value in solver.model.state_dict().items()}
    batch = {'image': torch.full((4, 1, 8, 8), float('inf')), 'number': torch.arange(4)}
    solver.model.train()
    solver.run_step_train([(batch, torch.arange(4))])
    assert not solver.is_last_step_finite
    after = solver.model.state_dict()
    assert any('running_mean' in name for name in before) and all(torch.equal(value, after[name]) for name, value in before.items())


# ------------------------------------------------------------------------------------------------ the shipped recipe
def test_the_shipped_recipe_goes_on_to_the_bit(tmp_path):
    images = three_images(tmp_path / 'images')
    hooks = [{'NAME': 'LogHook', 'LOG_INTERVAL': 3, 'PROGRESS': False}, {'NAME': 'ModelEmaHook', 'BETA': 0.9},
             {'NAME': 'CheckpointHook', 'INTERVAL': 5}]

    def recipe(name: str) -> Config:
        (tmp_path / name).mkdir()
        return twin('sd15/sd15_512_full', tmp_path / name / 'tiny.yaml', images=images, MAX_STEPS=10, WARMUP_STEPS=2, TRAIN_HOOKS=hooks)

    train(recipe('whole'))
    halves = recipe('halves')
    with pytest.raises(Crash):
        train(halves, Stop({}))
    assert train(halves).CHANNELS_LAST and halves.SOLVER.RESUME_FROM == 'auto'
    found = differences(outcome(tmp_path / 'whole' / 'work'), outcome(tmp_path / 'halves' / 'work'))
    assert not found
