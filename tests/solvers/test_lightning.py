"""Lightning turns the loop and changes nothing: the same bits, checkpoints, signals, errors and exit codes."""
from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from pairs import FACTORS, STEPS, Row, config, differences, outcome, train, whole_and_halves
from scepter import run_train
from scepter.core import signals
from scepter.core.disk import checkpoints
from scepter.core.env import Stopped, we
from scepter.core.errors import NonFiniteError
from scepter.core.signals import listening
from scepter.hooks.base import Hook
from tiny import config as tiny

ROW: Row = {name: values[-1] for name, values in FACTORS.items()} | {
    'DTYPE': 'bfloat16', 'PARAM_DTYPE': 'float32', 'COMPILE': False, 'ACCU_STEP': 2, 'REPEATS': 1, 'PROCESSES': 1, 'NUM_WORKERS': 0}


@pytest.fixture(autouse=True)
def by_lightning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(we, 'use_pl', True)
    yield
    we.stop_signal = 0


class Signal(Hook):
    """This process is sent a signal after a step, so often."""

    def __init__(self, number: int, times: int = 1):
        super().__init__({})
        self.number, self.times = number, times

    def after_iter(self, solver) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)
        if solver.step == 4:
            for _ in range(self.times):
                signal.raise_signal(self.number)


def test_a_run_of_lightning_is_a_plain_run_to_the_bit_and_so_is_one_that_was_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole_and_halves(tmp_path, ROW)
    monkeypatch.setattr(we, 'use_pl', False)
    train(config(tmp_path / 'plain', ROW))

    plain = outcome(tmp_path / 'plain')
    assert not differences(plain, outcome(tmp_path / 'whole')) and not differences(plain, outcome(tmp_path / 'halves'))


def test_of_a_run_that_is_complete_no_step_is_left(tmp_path: Path):
    train(config(tmp_path, ROW))
    solver = train(config(tmp_path, ROW))

    assert solver.step == STEPS and 'lightning_logs' not in os.listdir(tmp_path) and not list(tmp_path.rglob('*.ckpt'))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_the_step_end_and_be_saved(tmp_path: Path, number: int):
    before, hook = signal.getsignal(number), Signal(number)
    with pytest.raises(Stopped) as stop, listening():
        ours = signal.getsignal(signal.SIGTERM)
        train(config(tmp_path, ROW), hook)

    assert stop.value.signal == number and checkpoints.resolve(tmp_path, 'latest').step == 4
    assert hook.handler is ours and signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_the_run_at_once_as_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, 'ECHO', 0.0)
    with pytest.raises(KeyboardInterrupt), listening():
        train(config(tmp_path, ROW), Signal(signal.SIGINT, times=2))

    assert checkpoints.resolve(tmp_path, 'auto') is None


def test_what_a_step_raises_comes_out_as_it_was(tmp_path: Path):
    with pytest.raises(NonFiniteError, match='3 steps in a row were not finite'):
        train(tiny(tmp_path, MODEL={'NAME': 'TinyDenoiser', 'NAN_AT': [1, 2, 3]}))


def test_without_lightning_the_config_is_refused_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (tmp_path / 'tiny.yaml').write_text(str(tiny(tmp_path / 'work')))
    monkeypatch.setitem(sys.modules, 'pytorch_lightning', None)
    words = ['--cfg', str(tmp_path / 'tiny.yaml'), '--check', 'ENV.DEVICE=cpu']

    assert run_train.main([*words, 'ENV.USE_PL=true']) == 2
    assert '.[lightning]' in capsys.readouterr().err and run_train.main(words) == 0
