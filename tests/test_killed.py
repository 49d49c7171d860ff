"""The README's promise: "A run that is killed, at any moment and by any means, goes on with the same command, bit for bit as if nothing
had happened." """
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pairs import FACTORS, Row, config, differences, outcome
from scepter.core.config import Config

ROOT = Path(__file__).resolve().parents[1]
STEPS = 100
ROW: Row = {name: values[-1] for name, values in FACTORS.items()} | {
    'PARALLEL': 'ddp', 'DTYPE': 'bfloat16', 'PARAM_DTYPE': 'float32', 'COMPILE': False, 'ACCU_STEP': 1, 'REPEATS': 1}


def start(folder: Path, row: Row, **env: Any) -> subprocess.Popen:
    """The command of a run, as a user types it; again, where it had been started before."""
    cfg = config(folder, {**ROW, **row, 'PROCESSES': env['NPROC'], 'EVAL_INTERVAL': 30}, STEPS)
    cfg.SOLVER.TRAIN_HOOKS[1].INTERVAL = 20
    file = folder.with_suffix('.yaml')
    file.write_text(str(Config({**cfg, 'IMPORTS': [str(ROOT / 'tests/pairs.py')], 'ENV': {'DEVICE': 'cpu', 'THREADS': 1, **env}})))
    words = [sys.executable, 'scepter/run_train.py', '--cfg', str(file)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=open(folder.with_suffix('.err'), 'w'))


def wait_for(step: int, folder: Path, process: subprocess.Popen) -> None:
    """Until the run has written this step into its log; wherever it is by then, it is killed there."""
    log = folder / 'log.jsonl'
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, folder.with_suffix('.err').read_text()
        time.sleep(0.005)


def child_of(process: subprocess.Popen) -> int:
    """The first of the processes that a run has begun."""
    words = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    return next(int(pid) for pid in words if 'spawn_main' in Path(f'/proc/{pid}/cmdline').read_text())


def undisturbed(folder: Path, row: Row, **env: Any) -> dict[str, Any]:
    assert start(folder, row, **env).wait() == 0, folder.with_suffix('.err').read_text()
    return outcome(folder, STEPS)


def test_a_run_that_is_killed_at_any_moment_goes_on_with_the_same_command_bit_for_bit_as_if_nothing_had_happened(tmp_path):
    whole, killed = start(tmp_path / 'whole', {}, NPROC=1), tmp_path / 'killed'
    for step in (9, 54):     # before the first checkpoint, and between two
        process = start(killed, {}, NPROC=1)
        wait_for(step, killed, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start(killed, {}, NPROC=1).wait() == 0, killed.with_suffix('.err').read_text()
    assert whole.wait() == 0, (tmp_path / 'whole.err').read_text()
    assert not differences(outcome(tmp_path / 'whole', STEPS), outcome(killed, STEPS))


@pytest.mark.parametrize('recipe', sorted((ROOT / 'examples').glob('[!_]*/*.yaml')), ids=lambda recipe: recipe.stem)
def test_every_shipped_recipe_goes_on_without_being_asked(recipe):
    assert Config.load(recipe).SOLVER.RESUME_FROM == 'auto'


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != 'linux', reason='looks up processes in /proc')
@pytest.mark.parametrize('row', [{}, {'PARALLEL': 'fsdp', 'OPTIMIZER': FACTORS['OPTIMIZER'][0]}], ids=['ddp', 'fsdp'])
def test_so_does_one_of_two_processes_whichever_of_them_is_killed_and_by_whatever_signal(tmp_path, row):
    whole, killed = undisturbed(tmp_path / 'whole', row, NPROC=2), tmp_path / 'killed'
    for step, number, which in ((9, signal.SIGKILL, child_of), (27, signal.SIGKILL, None), (48, signal.SIGTERM, None),
                                (72, signal.SIGSEGV, child_of)):
        process = start(killed, row, NPROC=2)
        wait_for(step, killed, process)
        os.kill(which(process) if which else process.pid, number)
        assert process.wait() != 0
    assert start(killed, row, NPROC=2).wait() == 0, killed.with_suffix('.err').read_text()
    assert not differences(whole, outcome(killed, STEPS))
