"""A run that is cut off and goes on, twice in a row, is the run that was not: weights, optimizer, averages, order, curves, to the bit."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pairs import FACTORS, Crash, Row, config, differences, outcome, train
from scepter.core.config import Config
from scepter.core.env import guarded, we
from scepter.core.launch import launch
from scepter.hooks.base import Hook
from scepter.hooks.ema import ModelEmaHook
from scepter.models.base import TrainModule
from scepter.solvers import state
from scepter.solvers.optim import NamedOptimizer
from scepter.solvers.step import LossScale
from tests.models import nova_runs

ROOT = Path(__file__).resolve().parents[1]
EQUAL = 'resumes, twice in a row, equal to the bit'
EPOCH, STEPS = 6, 14                    # steps: 24 samples, 4 of them in a step
CUTS = {'first': 1, 'mid-epoch': 3, 'before the epoch ends': EPOCH - 1, 'epoch end': EPOCH, 'after the epoch': EPOCH + 1,
        'before the last': STEPS - 1}
ROW: Row = {name: values[-1] for name, values in FACTORS.items()} | {
    'OPTIMIZER': FACTORS['OPTIMIZER'][0], 'DTYPE': 'float32', 'PARAM_DTYPE': 'float32', 'COMPILE': False, 'ACCU_STEP': 1, 'REPEATS': 1,
    'CHANNELS_LAST': False, 'CHECKPOINTING': False, 'LENGTH': 'MAX_STEPS', 'EVAL_INTERVAL': 4, 'PROCESSES': 1, 'NUM_WORKERS': 0}


class CutOff(Hook):
    """Saves a step, and ends the run in the midst of the one after it, as a crash would."""

    def __init__(self, step: int):
        super().__init__({})
        self.step = step

    def after_iter(self, solver: Any) -> None:
        if solver.step == self.step:
            solver.request_save()
        elif solver.step == self.step + 1:
            raise Crash


def run(folder: Path, cut: int | None = None, clips: str | None = None, **row: Any) -> None:
    """All of a run into the folder; with a cut, in three parts: cut off after that step, again after the next, and ended.

    clips: the data of NOVA, where that is what is trained.
    """
    cfg = config(folder, {**ROW, **row}, STEPS) if clips is None else nova_runs.experiment(folder, Path(clips), MAX_STEPS=STEPS)
    cfg.SOLVER.TRAIN_HOOKS[0].LOG_INTERVAL = 1
    cfg.SOLVER.TRAIN_HOOKS.append(Config({'NAME': 'TensorboardLogHook', 'LOG_INTERVAL': 1}))
    for step in [] if cut is None else [cut, min(cut + 1, STEPS - 1)]:
        try:
            train(cfg, CutOff(step))
        except Crash:
            pass
    train(cfg)


def everywhere(cfg: Config) -> None:
    """What each process of a run of several does: the whole, and all cuts."""
    we.use_pl = cfg.ENV.USE_PL
    for name, cut in {'whole': None, **CUTS}.items():
        run(Path(cfg.FOLDER) / name, cut, cfg.get('CLIPS'), PROCESSES=we.world_size, NUM_WORKERS=cfg.WORKERS)


def of_all_processes(folder: Path, processes: int, workers: int, use_pl: bool = False) -> Config:
    return Config({'FOLDER': str(folder), 'WORKERS': workers, 'ENV': {'NPROC': processes, 'DEVICE': 'cpu', 'THREADS': 1, 'USE_PL': use_pl}})


def found(folder: Path) -> dict[str, list[str]]:
    """What differs from the whole run, by cut."""
    whole = outcome(folder / 'whole', STEPS)
    return {name: differences(whole, outcome(folder / name, STEPS)) for name in CUTS}


# ------------------------------------------------------------------------------------------------ one process
@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('whole') / 'run'
    run(folder)
    return folder


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('cut', CUTS.values(), ids=CUTS)
def test_a_run_cut_off_twice_in_a_row_is_the_whole_run(whole, tmp_path, cut, workers, record_figure):
    run(tmp_path, cut, NUM_WORKERS=workers)

    assert not differences(outcome(whole, STEPS), outcome(tmp_path, STEPS))
    record_figure(EQUAL)


def test_no_curve_has_a_gap_or_a_doubled_step(whole, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run(tmp_path, EPOCH)
    curves = []
    for folder in (whole, tmp_path):
        events = EventAccumulator(str(folder / 'tensorboard')).Reload()
        curves.append([(event.step, event.value) for event in events.Scalars('train/loss')])
        rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
        assert [row['step'] for row in rows if 'train/loss' in row] == list(range(1, STEPS + 1))

    assert [step for step, _ in curves[0]] == list(range(1, STEPS + 1)) and curves[0] == curves[1]


# ------------------------------------------------------------------------------------------------ what each restored thing is for
def leave_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break one part of a resume."""
    restore = state.restore

    def without_samples(solver: Any, loaded: Any) -> None:
        restore(solver, loaded)
        solver.samples = 0

    if what == 'samples':
        monkeypatch.setattr(state, 'restore', without_samples)
        return
    owner, method = {'weights': (TrainModule, 'load_trained_state'), 'optimizer': (NamedOptimizer, 'load_state_tensors'),
                     'EMA': (ModelEmaHook, 'load_state_dict'), 'scaler': (LossScale, 'load_state_dict')}[what]
    monkeypatch.setattr(owner, method, lambda *args, **kwargs: None)


@pytest.mark.parametrize('what', ['weights', 'optimizer', 'EMA', 'samples', 'scaler'])
def test_whatever_a_resume_leaves_out_is_seen(tmp_path, monkeypatch, what, record_figure):
    row = {'DTYPE': 'float16'} if what == 'scaler' else {}
    run(tmp_path / 'whole', **row)
    run(tmp_path / 'sound', EPOCH, **row)
    leave_out(what, monkeypatch)
    run(tmp_path / 'broken', EPOCH, **row)

    assert not differences(outcome(tmp_path / 'whole', STEPS), outcome(tmp_path / 'sound', STEPS))
    assert differences(outcome(tmp_path / 'whole', STEPS), outcome(tmp_path / 'broken', STEPS))
    record_figure('restored things whose loss is seen')


# ------------------------------------------------------------------------------------------------ several processes
@pytest.mark.parametrize(('workers', 'use_pl'), [(0, False), pytest.param(2, False, marks=pytest.mark.slow),
                                                 pytest.param(0, True, marks=pytest.mark.slow)])
def test_nor_does_it_differ_on_two_processes(tmp_path, workers, use_pl, record_figure):
    launch(of_all_processes(tmp_path, 2, workers, use_pl), everywhere)

    assert found(tmp_path) == {name: [] for name in CUTS}
    record_figure(EQUAL, len(CUTS), of=len(CUTS))


@pytest.mark.slow
@pytest.mark.parametrize('use_pl', [False, True])
def test_nor_below_torchrun(tmp_path, use_pl, record_figure):
    words = [str(Path(sys.executable).with_name('torchrun')), '--nproc_per_node', '2', __file__, str(tmp_path), str(int(use_pl))]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=280)

    assert done.returncode == 0, done.stderr[-4000:]
    assert found(tmp_path) == {name: [] for name in CUTS}
    record_figure(EQUAL, len(CUTS), of=len(CUTS))


@pytest.mark.slow
def test_nor_with_lightning(whole, tmp_path, monkeypatch, record_figure):
    monkeypatch.setattr(we, 'use_pl', True)
    for name, cut in CUTS.items():
        run(tmp_path / name, cut)
        assert not differences(outcome(whole, STEPS), outcome(tmp_path / name, STEPS)), name
        record_figure(EQUAL)


# ------------------------------------------------------------------------------------------------ NOVA
@pytest.fixture(scope='module')
def clips(tmp_path_factory) -> str:
    """Clips of several lengths, so that which of them a step takes matters too."""
    return str(nova_runs.write_clips(tmp_path_factory.mktemp('clips'), [3, 2, 3, 3, 2, 1, 3, 3]))


@pytest.mark.parametrize('name', ['mid-epoch', *(pytest.param(name, marks=pytest.mark.slow) for name in CUTS if name != 'mid-epoch')])
def test_nova_cut_off_twice_in_a_row_is_the_whole_run(tmp_path, clips, name):
    run(tmp_path / 'whole', None, clips)
    run(tmp_path / 'cut', CUTS[name], clips)

    assert not differences(outcome(tmp_path / 'whole', STEPS), outcome(tmp_path / 'cut', STEPS))


@pytest.mark.slow
def test_nor_does_nova_differ_on_two_processes(tmp_path, clips):
    launch(Config({**of_all_processes(tmp_path, 2, 0), 'CLIPS': clips}), everywhere)

    assert found(tmp_path) == {name: [] for name in CUTS}


if __name__ == '__main__':     # what torchrun starts
    sys.exit(guarded(lambda: launch(of_all_processes(Path(sys.argv[1]), 2, 0, sys.argv[2] == '1'), everywhere, 'torchrun')))
