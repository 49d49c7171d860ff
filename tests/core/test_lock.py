"""One run at a time in a WORK_DIR: the second is refused by name, a dead one blocks nobody, and two never hold it together."""
from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scepter.core.errors import CheckpointError
from scepter.core.lock import STALE, WorkDirLock

ROOT = Path(__file__).resolve().parents[2]


def hold(folder: Path) -> subprocess.Popen:
    """Another process that has taken the folder, and keeps it."""
    code = ('import sys, time; from pathlib import Path; from scepter.core.lock import WorkDirLock\n'
            'WorkDirLock(Path(sys.argv[1])).take(); print("taken", flush=True); time.sleep(1000)')
    process = subprocess.Popen([sys.executable, '-c', code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == 'taken\n'
    return process


def forge(folder: Path, age: float, **owner: Any) -> Path:
    """A lock as a run on another machine wrote it, whose heart beat `age` seconds ago."""
    file = folder / '.lock' / '00000004'
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({'host': 'node7', 'pid': 17, 'start': '5', 'place': ['node7', 'x', 'y'], 'time': 1.0, **owner}))
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def test_a_second_run_is_refused_by_host_and_pid_and_a_killed_one_does_not_block(tmp_path: Path):
    with hold(tmp_path) as process:
        with pytest.raises(CheckpointError, match=rf'in use: a run on {os.uname().nodename} \(pid {process.pid}, since '):
            WorkDirLock(tmp_path).take()
        os.kill(process.pid, signal.SIGSTOP)      # stopped is not dead
        with pytest.raises(CheckpointError, match=f'pid {process.pid}'):
            WorkDirLock(tmp_path).take()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)    # dead, and nobody has asked for its exit code: a zombie
        lock = WorkDirLock(tmp_path)
        lock.take()
        lock.check()
    lock.close()
    assert len(list((tmp_path / '.lock').iterdir())) <= 2


def test_a_pid_that_was_given_to_another_process_since_does_not_block(tmp_path: Path):
    with hold(tmp_path) as process:
        file, = (tmp_path / '.lock').iterdir()
        file.write_text(json.dumps({**json.loads(file.read_text()), 'start': '1'}))
        WorkDirLock(tmp_path).take()
        process.kill()


def test_a_run_on_another_machine_holds_while_its_heart_beats(tmp_path: Path):
    forge(tmp_path, STALE / 2)
    with pytest.raises(CheckpointError, match='a run on node7'):
        WorkDirLock(tmp_path).take()
    forge(tmp_path / 'b', STALE * 2)
    WorkDirLock(tmp_path / 'b').take()
    forge(tmp_path / 'c', 1, ended=2.0)
    WorkDirLock(tmp_path / 'c').take()


@pytest.mark.parametrize(('age', 'is_refused'), [(0, True), (STALE * 2, False)])
def test_a_lock_that_says_nothing_yet_is_held_while_it_is_young(tmp_path: Path, age: float, is_refused: bool):
    forge(tmp_path, 0).write_text('')
    os.utime(tmp_path / '.lock' / '00000004', (time.time() - age, time.time() - age))
    if is_refused:
        with pytest.raises(CheckpointError, match='just beginning'):
            WorkDirLock(tmp_path).take()
    else:
        WorkDirLock(tmp_path).take()


def test_a_late_comer_cannot_take_what_was_free_two_runs_ago(tmp_path: Path):
    forge(tmp_path, STALE * 2)
    first, late = WorkDirLock(tmp_path), WorkDirLock(tmp_path)
    first.take()
    for newest in (1, 2, 3, 4):      # what it may have seen as the newest before it fell asleep
        late._try_next(newest)
        assert late.number is None
    first.check()


def test_who_was_taken_for_dead_is_told_before_it_writes(tmp_path: Path):
    lock = WorkDirLock(tmp_path)
    lock.take()
    lock.check()
    file, = (tmp_path / '.lock').iterdir()
    file.with_name('00000002').write_text(json.dumps({'host': 'node7', 'pid': 17, 'start': '5', 'place': ['node7'], 'time': 1.0}))
    with pytest.raises(CheckpointError, match='taken over by a run on node7'):
        lock.check()
    lock.close()
    assert 'node7' in file.with_name('00000002').read_text()


def compete(folder: Path, start: Any, won: Any) -> None:
    start.wait()
    try:
        WorkDirLock(folder).take()
    except CheckpointError:
        return
    with won.get_lock():
        won.value += 1
    time.sleep(1000)


def test_of_many_that_find_a_dead_run_one_alone_takes_its_place(tmp_path: Path):
    context = multiprocessing.get_context('fork')
    for game in range(5):
        folder = tmp_path / str(game)
        forge(folder, STALE * 2)
        start, won = context.Barrier(6), context.Value('i', 0)
        players = [context.Process(target=compete, args=(folder, start, won), daemon=True) for _ in range(6)]
        for player in players:
            player.start()
        deadline = time.monotonic() + 60
        while sum(p.is_alive() for p in players) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        for player in players:
            player.kill()
            player.join()
        assert won.value == 1


@pytest.mark.parametrize('where', ['a_file', 'a_file/below', 'a_link', '/proc/nowhere', '/sys/nowhere', 'x' * 300])
def test_a_folder_that_cannot_be_written_is_a_checkpoint_error_that_names_it(tmp_path: Path, where: str):
    (tmp_path / 'a_file').touch()
    (tmp_path / 'a_link').symlink_to(tmp_path / 'gone')
    with pytest.raises(CheckpointError, match=f'{where[:20]}'):
        WorkDirLock(tmp_path / where).take()
