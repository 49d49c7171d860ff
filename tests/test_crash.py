"""What goes wrong with one process ends all of them, soon, with a code and a first line that names it; a wish to stop loses nothing."""
from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launched import LONG, command, ranks, start
from scepter.core import pulse
from scepter.core.disk import atomic

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='looks up processes in /proc')
slow = pytest.mark.slow
HOST = socket.gethostname()


def ended(process: subprocess.Popen, folder: Path, seconds: float) -> tuple[int, list[str]]:
    """The exit code of a run that something has struck, and what it said since, within so many seconds of it."""
    struck = folder / 'work' / 'struck'
    while not struck.exists() or not struck.read_text():
        assert process.poll() is None, (folder / 'said.txt').read_text()[-4000:]
        time.sleep(0.01)
    trained = ranks(process)
    try:
        code = process.wait(120)
    finally:
        process.kill()
    took, said = time.time() - float(struck.read_text()), (folder / 'said.txt').read_text()
    assert took < seconds, f'{took:.1f} s\n{said[-4000:]}'
    assert not [pid for pid in trained if is_running(pid)], 'a process was left behind'
    return code, said.splitlines()


def is_running(pid: int) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
    except FileNotFoundError:
        return False


def first_of(lines: list[str], *marks: str) -> str:
    """The first warning or error of ours."""
    return next(line for line in lines if line[9:11] in ('E ', 'W ') or any(mark in line for mark in marks))


# ------------------------------------------------------------------------------------------------ stuck
AT, LIMIT, BEYOND = 400, 4, 2 + 10     # a step; seconds that one may take, and until it is named and all have ended


@pytest.mark.parametrize(('what', 'launcher', 'rank'), [
    ('sleep', 'single', 0), ('halt', 'spawn', 1),
    *(pytest.param(*row, marks=slow) for row in (('sleep', 'spawn', 1), ('halt', 'torchrun', 1), ('sleep', 'torchrun', 0),
                                                 ('halt', 'spawn', 0), ('sleep', 'lightning-2', 1), ('halt', 'torchrun-lightning', 0)))])
def test_a_process_that_is_stuck_is_named_and_all_end(tmp_path, what, launcher, rank):
    line = command(tmp_path, launcher, LONG, f'ENV.LIMITS.STEP={LIMIT}', hooks=[{'NAME': 'Trouble', 'WHAT': what, 'RANK': rank, 'AT': AT}])
    code, said = ended(start(line, tmp_path), tmp_path, LIMIT + BEYOND)

    how = 'is stuck: it has done nothing for' if what == 'sleep' else 'has given no sign of life for'
    first = first_of(said)
    step = int(re.search(r'in step (\d+) \(step\)', first).group(1))      # of a halted one, that in which it was last heard of
    assert f'rank {rank} on {HOST} (pid ' in first and how in first and 0 < step < AT, said[-40:]
    assert code == (1 if 'torchrun' in launcher else 5)
    if what == 'sleep':
        assert step == AT - 1 and f'ENV.LIMITS.STEP allows {LIMIT} s' in first
        assert any('trouble.py' in row and 'in <lambda>' in row for row in said)     # where it is
    else:
        assert 'stopped by a signal' in first


def test_what_is_slow_and_goes_on_is_not_stuck(tmp_path):
    line = command(tmp_path, 'single', 'SOLVER.MAX_STEPS=2', 'ENV.LIMITS.EVALUATION=2', 'ENV.LIMITS.STEP=2', 'ENV.LIMITS.FIRST_STEP=5',
                   EVAL_DATA={'NAME': 'SlowPoints', 'BATCH_SIZE': 1, 'SECONDS': 0.4}, EVAL_INTERVAL=1)
    process = start(line, tmp_path)

    assert process.wait(120) == 0, (tmp_path / 'said.txt').read_text()[-4000:]


def test_a_save_reports_its_progress(tmp_path):
    before = pulse.beats
    atomic.write_file(tmp_path / 'file', [bytes(3 * atomic.CHUNK)])

    assert pulse.beats >= before + 3


def test_to_say_where_one_is_costs_a_step_next_to_nothing():
    def step() -> None:
        pulse.at(1)
        with pulse.phase('data'):
            pulse.beat()
        with pulse.waiting():
            pulse.beat()
        pulse.enter('step')

    times = []
    for _ in range(200):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    assert sorted(times)[100] < 20e-6
