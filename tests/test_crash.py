"""What goes wrong with one process ends all of them, soon, with a code and a first line that names it; a wish to stop loses nothing."""
from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launched import LONG, command, ranks, samples, start, wait_for
from scepter import run_train
from scepter.core import pulse
from scepter.core.config import Config
from scepter.core.disk import atomic, checkpoints
from scepter.core.env import we
from scepter.core.faults import ConfigError
from scepter.core.launch import launch
from scepter.core.shards import local
from scepter.core.watch import is_debugged
from tiny import config, groups, run, same

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='looks up processes in /proc')
slow = pytest.mark.slow
HOST = socket.gethostname()


def ended(process: subprocess.Popen, folder: Path, seconds: float) -> tuple[int, list[str], float]:
    """The exit code of a run that something has struck, what it said, and how long it took."""
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
    assert took < patience(seconds), f'{took:.1f} s\n{said[-4000:]}'
    assert not [pid for pid in trained if is_running(pid)], 'a process was left behind'
    return code, said.splitlines(), took


def patience(seconds: float) -> float:
    """So many seconds, in proportion more where a machine has more to do than processors."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


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
def test_a_process_that_is_stuck_is_named_and_all_end(tmp_path, what, launcher, rank, record_figure):
    line = command(tmp_path, launcher, LONG, f'ENV.LIMITS.STEP={LIMIT}', hooks=[{'NAME': 'Trouble', 'WHAT': what, 'RANK': rank, 'AT': AT}])
    code, said, took = ended(start(line, tmp_path), tmp_path, LIMIT + BEYOND)

    how = 'is stuck: it has done nothing for' if what == 'sleep' else 'has given no sign of life for'
    first = first_of(said)
    found = re.search(r'in step (\d+) \((\w+)\)', first)      # of a halted one, where it was last heard of
    assert found, said[-40:]
    step = int(found.group(1))
    assert f'rank {rank} on {HOST} (pid ' in first and how in first and 0 < step < AT, said[-40:]
    assert code == (1 if 'torchrun' in launcher else 5)
    if what == 'sleep':
        assert step == AT - 1 and found.group(2) == 'step' and f'ENV.LIMITS.STEP allows {LIMIT} s' in first
        assert any('trouble.py' in row and 'in <lambda>' in row for row in said)     # where it is
    else:
        assert 'stopped by a signal' in first
    record_figure('stuck ranks that were named')
    record_figure('a stuck rank until all have ended, beyond its limit', took - LIMIT)


def test_what_is_slow_and_goes_on_is_not_stuck(tmp_path):
    line = command(tmp_path, 'single', 'SOLVER.MAX_STEPS=2', 'ENV.LIMITS.EVALUATION=2', 'ENV.LIMITS.STEP=2', 'ENV.LIMITS.FIRST_STEP=5',
                   EVAL_DATA={'NAME': 'SlowPoints', 'BATCH_SIZE': 1, 'SECONDS': 0.4}, EVAL_INTERVAL=1)
    process = start(line, tmp_path)

    assert process.wait(120) == 0, (tmp_path / 'said.txt').read_text()[-4000:]


def test_who_is_looked_at_in_a_debugger_is_not_stuck():
    found: list[bool] = []
    exec(compile('found.append(is_debugged())', '/usr/lib/pdb.py', 'exec'), {'found': found, 'is_debugged': is_debugged})  # noqa: S102

    assert found == [True] and not is_debugged()


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


# ------------------------------------------------------------------------------------------------ gone
SAYS = {'kill': 'was killed by SIGKILL', 'abort': 'was killed by SIGABRT', 'vanish': 'is gone without a word',
        'raise': 'ValueError: a defect of mine',
        'exit': 'sys.exit(0) was called in the midst of the run'}
ENDS = [(what, moment) for what in ('kill', 'raise', 'exit', 'abort') for moment in ('before_solve', 'after_iter', 'state_dict')]


@pytest.mark.parametrize(('what', 'moment', 'launcher'), [
    ('exit', 'after_iter', 'spawn'), ('kill', 'state_dict', 'spawn'), pytest.param('vanish', 'after_iter', 'spawn', marks=slow),
    *(pytest.param(what, moment, launcher, marks=slow) for launcher in ('spawn', 'torchrun') for what, moment in ENDS
      if (what, moment, launcher) not in {('exit', 'after_iter', 'spawn'), ('kill', 'state_dict', 'spawn')})])
def test_a_process_that_ends_ends_the_others_which_name_it(tmp_path, what, moment, launcher, record_figure):
    rank = 0 if moment == 'state_dict' else 1      # the one that asks hooks for their state
    line = command(tmp_path, launcher, LONG, hooks=[{'NAME': 'Trouble', 'WHAT': what, 'MOMENT': moment, 'AT': 30, 'RANK': rank}])
    code, said, took = ended(start(line, tmp_path), tmp_path, 5 if launcher == 'spawn' else 10)

    told = ' '.join(said[said.index(first_of(said)):])
    is_seen_by_torchrun = what in ('kill', 'abort') and 'is gone without' in told      # which tells the signal itself, later
    assert f'rank {rank} on {HOST}' in first_of(said) and (SAYS[what] in told or is_seen_by_torchrun), said[-40:]
    assert code in ({1} if launcher == 'torchrun' else {5, 1} if what in ('raise', 'exit') else {5})     # or the code of its error
    if what in ('raise', 'exit', 'abort'):
        whole = ' '.join(said)      # its traceback; of an abort it is there before anybody else notices
        assert 'trouble.py' in whole and 'in _strike' in whole
    record_figure(f'ranks that end and end the others, by {launcher}')
    record_figure(f'a rank that ends until all have ended, by {launcher}', took)


# ------------------------------------------------------------------------------------------------ wishes
WHOLE, SLOWLY = 150, {'NAME': 'SlowPoints', 'BATCH_SIZE': 6, 'SECONDS': 0.005}      # a step takes 30 ms: it is stopped well before
TARGETS, WHEN = ('leader', 'group', 'one rank'), ('before', 'step', 'fetch', 'evaluation', 'drawing', 'saving')


def stop(process: subprocess.Popen, launcher: str, target: str, number: int) -> None:
    """Send a stop signal to the process that was started, to all of its processes, or to one rank."""
    group = [process.pid, *descendants(process.pid)]
    aims = {'leader': [process.pid], 'group': group, 'one rank': [process.pid if launcher == 'single' else ranks(process)[-1]]}
    for pid in aims[target]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    try:
        below = [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [one for child in below for one in (child, *descendants(child))]


def pairwise(*factors: Sequence[Any]) -> list[tuple]:
    """Rows in which each two values of two factors meet."""
    def pairs(row: Sequence[Any]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    left = set().union(*map(pairs, itertools.product(*factors)))
    rows = []
    while left:
        rows.append(max(itertools.product(*factors), key=lambda row: len(pairs(row) & left)))
        left -= pairs(rows[-1])
    return rows


STOPS = pairwise(WHEN, ('spawn', 'torchrun', 'lightning-2', 'single'), TARGETS, (0, 2))


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """A run of one process, or of two, that nobody stops, and that saves each of its steps; each once."""
    folder, done = tmp_path_factory.mktemp('undisturbed'), {}

    def of(launcher: str) -> Path:
        launcher = launcher if launcher == 'single' else 'spawn'      # to the bit the same as all others of two (tests/test_launch.py)
        if launcher not in done:
            line = command(folder / launcher, launcher, f'SOLVER.MAX_STEPS={WHOLE}', hooks=[{'NAME': 'CheckpointHook', 'INTERVAL': 1}])
            done[launcher] = start(line, folder / launcher)
        assert done[launcher].wait(120) == 0, (folder / launcher / 'said.txt').read_text()[-4000:]
        return folder / launcher / 'work'

    return of


@pytest.mark.parametrize(('when', 'launcher', 'target', 'workers', 'number'), [
    ('step', 'single', 'leader', 2, signal.SIGINT), ('fetch', 'spawn', 'group', 2, signal.SIGTERM),
    *(pytest.param(*row, signal.SIGINT if i % 3 == 2 else signal.SIGTERM, marks=slow) for i, row in enumerate(STOPS))])
def test_a_wish_to_stop_is_heard_wherever_it_comes_and_nothing_is_lost(undisturbed, tmp_path, when, launcher, target, workers, number,
                                                                       record_figure):
    data = {**SLOWLY, 'NUM_WORKERS': workers, **({'SECONDS': 0.05} if when == 'fetch' else {})}
    evaluation = {'EVAL_DATA': {**SLOWLY, 'BATCH_SIZE': 1, 'SECONDS': 0.1}, 'EVAL_INTERVAL': 20} if when == 'evaluation' else {}
    dawdle = {'before': 'before_solve', 'drawing': 'after_iter', 'saving': 'state_dict'}.get(when)
    hooks = [{'NAME': 'Dawdle', 'MOMENT': dawdle}] if dawdle else []
    process = start(command(tmp_path, launcher, LONG, hooks=hooks, TRAIN_DATA=data, **evaluation), tmp_path)
    if dawdle:
        while not (tmp_path / 'work' / 'dawdling').exists():
            assert process.poll() is None, (tmp_path / 'said.txt').read_text()[-4000:]
            time.sleep(0.01)
    else:
        wait_for(20 if evaluation else 3, tmp_path, process)
    everybody, memory, begin = descendants(process.pid), set(os.listdir('/dev/shm')), time.monotonic()
    stop(process, launcher, target, number)
    code, took = process.wait(120), time.monotonic() - begin

    said, work = (tmp_path / 'said.txt').read_text(), tmp_path / 'work'
    assert code == (1 if 'torchrun' in launcher else 128 + number), said[-4000:]
    deadline = time.monotonic() + 5
    while (left := [pid for pid in everybody if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left and not set(os.listdir('/dev/shm')) - memory and not list(work.glob('checkpoints/.*'))
    if when == 'before':
        assert not list(work.glob('checkpoints/step-*'))     # there was nothing to save
        return
    saved = checkpoints.resolve(work, 'latest')
    assert saved is not None and saved.step == len(samples(work)) < WHOLE and took < patience(5), said[-3000:]
    assert same(groups(undisturbed(launcher), saved.step), groups(work, saved.step))
    record_figure('stop signals after which the running step was saved, equal to the bit')
    record_figure('a stop signal until all have ended', took)


def test_a_second_wish_is_granted_within_two_seconds(tmp_path, record_figure):
    process = start(command(tmp_path, 'spawn', LONG, hooks=[{'NAME': 'Trouble', 'WHAT': 'sleep', 'AT': 5}]), tmp_path)
    wait_for(4, tmp_path, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)      # an echo
    time.sleep(1.5)
    assert process.poll() is None
    trained, begin = ranks(process), time.monotonic()
    process.send_signal(signal.SIGTERM)

    while [pid for pid in trained if is_running(pid)]:
        assert time.monotonic() - begin < patience(2), (tmp_path / 'said.txt').read_text()[-3000:]
        time.sleep(0.02)
    record_figure('a second stop signal until all ranks have ended', time.monotonic() - begin)
    assert process.wait(60) == 143, (tmp_path / 'said.txt').read_text()[-3000:]


@slow
@pytest.mark.parametrize('launcher', ['spawn', 'torchrun'])
def test_who_was_started_does_not_outlive_a_launcher_that_is_killed(tmp_path, launcher, record_figure):
    process = start(command(tmp_path, launcher, LONG, TRAIN_DATA={**SLOWLY, 'NUM_WORKERS': 2}), tmp_path)
    wait_for(3, tmp_path, process)
    everybody, begin = descendants(process.pid), time.monotonic()
    process.kill()
    process.wait()
    while left := [pid for pid in everybody if is_running(pid)]:
        assert time.monotonic() < begin + 20, left
        time.sleep(0.05)
    record_figure('a launcher that is killed until all others are gone', time.monotonic() - begin)


@slow
def test_nothing_grows_over_three_thousand_steps(tmp_path, record_figure):
    hooks = [{'NAME': 'Inventory'}]
    process = start(command(tmp_path, 'single', 'SOLVER.MAX_STEPS=3000', 'SOLVER.KEEP_CHECKPOINTS=2', hooks=hooks,
                            TRAIN_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 6, 'NUM_WORKERS': 2},
                            EVAL_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 8}, EVAL_INTERVAL=100), tmp_path)
    assert process.wait(280) == 0, (tmp_path / 'said.txt').read_text()[-3000:]
    rows = [json.loads(line) for line in (tmp_path / 'work' / 'inventory.jsonl').read_text().splitlines()]
    warm = [row for row in rows if row['step'] > 500]
    growth = np.polyfit([row['step'] for row in warm], [row['mib'] for row in warm], 1)[0] * 1000

    assert growth < 1, warm
    assert all(warm[-1][what] <= warm[0][what] for what in ('descriptors', 'threads')), warm
    record_figure('memory that 1,000 steps more take', growth)


# ------------------------------------------------------------------------------------------------ what two processes agree on
@pytest.mark.parametrize('parallel', ['fsdp', pytest.param('ddp', marks=slow)])
def test_what_one_process_alone_cannot_compute_changes_none_and_all_know_each_others_figures(tmp_path, parallel):
    cfg = Config({'FOLDER': str(tmp_path), 'PARALLEL': parallel, 'ENV': {'NPROC': 2, 'DEVICE': 'cpu', 'THREADS': 1, 'PEAK_TFLOPS': 1.0}})
    launch(cfg, agreed)


def without_a_gradient(module: Any, inputs: Any, out: torch.Tensor) -> None:
    out.register_hook(lambda gradient: gradient * math.nan)


def agreed(cfg: Config) -> None:
    """What each of the two does."""
    hooks = [{'NAME': 'ModelEmaHook', 'BETA': 0.5}, {'NAME': 'LogHook', 'LOG_INTERVAL': 1, 'PROGRESS': False}]
    solver = run(config(Path(cfg.FOLDER) / 'run', steps=2, PARALLEL=cfg.PARALLEL, GLOBAL_BATCH_SIZE=8, TRAIN_HOOKS=hooks))
    waits, sizes = zip(*solver.train_step.everybody)
    assert len(waits) == 2 and we.gather(sizes) == [sizes, sizes] and solver.speed.own[1] == pytest.approx(sizes[we.rank], rel=0.2)
    assert set(we.gather(tuple(solver.speed._flops.values()))) == {(2 * 2 * (3 * 16 + 16 * 2) + 2 * 16 * 2,)}      # a sample's, on both
    ema = solver.hooks['train'][0]

    def state() -> list[Any]:
        moments = [value for o in solver.optimizers for value in o.state_tensors().values()]
        tensors = [*solver.model.parameters(), *ema.state_tensors().values(), *moments]
        return [local(value).clone() for value in tensors]

    before, point = state(), torch.tensor([[0.5, 0.5]])
    solver.train_mode()
    for is_gradient in (False, True):
        handle = solver.model.net[0].register_forward_hook(without_a_gradient) if is_gradient and we.rank == 1 else None
        image = point * math.nan if not is_gradient and we.rank == 1 else point
        solver.outputs = solver.run_step_train([({'image': image, 'number': torch.zeros(1, dtype=torch.int64)}, torch.arange(1))])
        ema.after_iter(solver)
        if handle is not None:
            handle.remove()
        assert not solver.is_last_step_finite and all(torch.equal(a, b) for a, b in zip(before, state())), is_gradient


# ------------------------------------------------------------------------------------------------ bad input
def test_a_port_that_is_taken_is_a_message_and_no_waiting(tmp_path):
    with socket.socket() as taken:
        taken.bind(('0.0.0.0', 0))
        taken.listen()
        meeting = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(taken.getsockname()[1]), 'WORLD_SIZE': '2', 'RANK': '0'}
        process = start(command(tmp_path, 'single'), tmp_path, **meeting)
        assert process.wait(60) == 5

    said = (tmp_path / 'said.txt').read_text()
    assert f'cannot join the others at tcp://127.0.0.1:{meeting["MASTER_PORT"]}' in said and 'in use' in said and 'Traceback' not in said


def test_a_machine_that_is_not_there_is_a_message_within_the_limit(tmp_path):
    begin = time.monotonic()
    nowhere = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '9', 'WORLD_SIZE': '2', 'RANK': '1'}
    process = start(command(tmp_path, 'single', 'ENV.TIMEOUT=2'), tmp_path, **nowhere)

    assert process.wait(60) == 5 and time.monotonic() - begin < 60, (tmp_path / 'said.txt').read_text()
    said = (tmp_path / 'said.txt').read_text()
    assert 'same MASTER_ADDR, MASTER_PORT and WORLD_SIZE' in said and 'Traceback' not in said


def test_a_limit_that_is_misspelled_is_2_with_the_right_word(tmp_path, capsys):
    assert run_train.main([*command(tmp_path, 'single', 'ENV.LIMITS.STEPP=3', '--check')[2:]]) == 2
    assert 'ENV.LIMITS.STEPP: no such parameter; did you mean STEP?' in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused_in_words_of_ours(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(ConfigError, match='3 processes on this machine, but 2 GPUs: NCCL wants one for each'):
        launch(Config({'ENV': {'NPROC': 3, 'DEVICE': 'cuda'}}), print)


@slow
def test_a_batch_that_two_processes_cannot_share_is_2(tmp_path):
    process = start(command(tmp_path, 'spawn', 'SOLVER.GLOBAL_BATCH_SIZE=7'), tmp_path)

    assert process.wait(120) == 2 and 'cannot be shared by 2 processes evenly: use 1' in (tmp_path / 'said.txt').read_text()
