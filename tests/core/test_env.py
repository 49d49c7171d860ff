"""`we`: one process or many begin, talk, fail and end the same way, with the exit codes of the design."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from scepter.core import launch as launching
from scepter.core.config import Config
from scepter.core.env import Stopped, WorkEnv, guarded, we
from scepter.core.errors import CheckpointError, DataError, NonFiniteError, PeerError, ScepterError
from scepter.core.faults import ConfigError
from scepter.core.launch import Place, launch
from scepter.core.logger import get_logger
from scepter.core.signals import listening

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'TORCHELASTIC_RUN_ID')


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


# ------------------------------------------------------------------------------------------------ one process
def test_a_single_process_talks_to_itself_for_free():
    we, x = WorkEnv(), torch.tensor([1.0, 2.0])

    we.barrier()
    assert we.all_reduce(x, 'mean') is x and we.broadcast('a') == 'a' and we.gather(3) == [3] and we.any(2) == 2
    assert we.is_main and not we.is_distributed and (we.rank, we.world_size) == (0, 1)


def test_one_process_runs_in_place_with_the_configs_seed_and_device():
    seen = []
    cfg = Config({'ENV': {'NPROC': 1, 'DEVICE': 'cpu', 'SEED': 5}})
    for _ in range(2):
        launch(cfg, lambda c: seen.append((c is cfg, we.seed, we.device.type, torch.rand(1).item())))

    assert seen[0] == seen[1] and seen[0][:3] == (True, 5, 'cpu')


@pytest.mark.parametrize(('error', 'code'), [
    (ConfigError('x'), 2), (DataError('x'), 3), (CheckpointError('x'), 4), (PeerError('x'), 5), (NonFiniteError('x'), 6),
    (KeyboardInterrupt(), 130), (Stopped(signal.SIGTERM), 143), (Stopped(signal.SIGINT), 130), (ZeroDivisionError('x'), 1),
])
def test_each_end_has_its_exit_code_and_a_deliberate_one_no_traceback(error: BaseException, code: int, capsys: pytest.CaptureFixture):
    def main() -> None:
        raise error

    assert guarded(main) == code
    assert ('Traceback' in capsys.readouterr().err) == isinstance(error, ZeroDivisionError)


def test_success_is_zero_and_a_note_is_shown_beside_its_error(capsys: pytest.CaptureFixture):
    def main() -> None:
        error = ScepterError('it is full')
        error.__notes__ = ['while saving']
        raise error

    assert guarded(lambda: None) == 0
    assert guarded(main) == 1 and 'it is full\nwhile saving' in capsys.readouterr().err


@pytest.mark.parametrize(('env', 'environment', 'launcher', 'words'), [
    ({'NPROC': 0}, {}, 'spawn', 'NPROC is 0'),
    ({}, {'WORLD_SIZE': '2', 'RANK': '2'}, 'spawn', 'machine 2 of 2'),
    ({}, {'WORLD_SIZE': 'two'}, 'spawn', "WORLD_SIZE in the environment is 'two'"),
    ({}, {'LOCAL_RANK': '0', 'RANK': '0'}, 'torchrun', 'WORLD_SIZE in the environment is None'),
    ({}, {'TORCHELASTIC_RUN_ID': 'x', 'WORLD_SIZE': '2', 'RANK': '0'}, 'spawn', 'add --launcher torchrun'),
    ({'BACKEND': 'nccl', 'DEVICE': 'cpu'}, {'LOCAL_RANK': '0', 'RANK': '0', 'WORLD_SIZE': '2'}, 'torchrun', 'BACKEND is nccl'),
])
def test_a_launch_that_cannot_be_is_a_fault_of_the_config(env: dict, environment: dict, launcher: str, words: str,
                                                          monkeypatch: pytest.MonkeyPatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ConfigError, match=words):
        launch(Config({'ENV': {'DEVICE': 'cpu', **env}}), print, launcher)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_device_that_is_not_there_is_a_fault_of_the_config():
    with pytest.raises(ConfigError, match='torch sees no such device'):
        launch(Config({'ENV': {'DEVICE': 'cuda', 'NPROC': 1}}), print)


# ------------------------------------------------------------------------------------------------ many processes
def start(folder: Path, task: str) -> subprocess.Popen:
    """Two processes on the CPU that run `task(cfg)`."""
    script = folder / 'job.py'
    script.write_text(textwrap.dedent('''
        import os, sys, time
        import torch
        from scepter.core.config import Config
        from scepter.core.env import Stopped, guarded, we
        from scepter.core.launch import launch
        from scepter.core.errors import DataError

        def say(*words):      # in one write: print's own two would mix with those of another rank
            os.write(1, (' '.join(map(str, words)) + '\\n').encode())

        def task(cfg):
        {}

        if __name__ == '__main__':
            sys.exit(guarded(lambda: launch(Config({{'ENV': {{'NPROC': 2, 'DEVICE': 'cpu', 'SEED': 5}}}}), task)))
    ''').format(textwrap.indent(textwrap.dedent(task).strip(), ' ' * 12).replace('\n' + ' ' * 8, '\n').removeprefix(' ' * 8)),
                      encoding='utf-8')
    environment = {**{k: v for k, v in os.environ.items() if k not in LAUNCHERS}, 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
                            start_new_session=True)


def test_two_jobs_of_two_processes_run_side_by_side_and_each_ranks_talk(tmp_path: Path):
    jobs = []
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        jobs.append(start(tmp_path / name, '''
            total = we.all_reduce(torch.tensor([we.rank + 1.0]))
            say(we.rank, total.item(), we.gather(we.rank), we.broadcast(f'from {we.rank}'), we.any(we.rank), torch.rand(1).item(),
                torch.get_num_threads() <= os.cpu_count(), we.launcher)
            we.barrier()
        '''))
    outputs = [job.communicate(timeout=240)[0] for job in jobs]

    assert [job.returncode for job in jobs] == [0, 0], outputs
    lines = sorted(outputs[0].splitlines())
    assert [line[0] for line in lines] == ['0', '1'] and '3.0 [0, 1] from 0 1' in lines[0]
    assert lines[0][1:] == lines[1][1:] and lines == sorted(outputs[1].splitlines())    # the same seed on every rank and job


def test_a_rank_that_fails_ends_the_others_with_its_exit_code(tmp_path: Path):
    job = start(tmp_path, '''
        we.barrier()
        if we.rank == 1:
            say(time.time())
            raise DataError('nothing to read here')
        we.barrier()
    ''')
    output = job.communicate(timeout=240)[0]

    assert job.returncode == 3, output
    assert time.time() - float(next(line for line in output.splitlines() if line[:9].isdigit())) < 60    # not ENV.TIMEOUT
    assert f'rank 1 on {socket.gethostname()}: nothing to read here' in output and 'Traceback' not in output
    assert 'ended in step 0: DataError: nothing to read here' in output      # so the other one knows it too


def test_a_rank_that_hangs_beside_a_failed_one_is_ended(tmp_path: Path):
    job = start(tmp_path, '''
        we.barrier()
        if we.rank == 1:
            os.kill(os.getpid(), 9)
        time.sleep(1000)
    ''')
    output = job.communicate(timeout=240)[0]

    assert job.returncode == 5, output
    first = output.splitlines()[0]
    assert f'rank 1 on {socket.gethostname()}' in first and 'was killed by SIGKILL' in first


@pytest.mark.parametrize(('number', 'is_to_all'), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_signal_to_the_parent_or_to_all_lets_every_rank_end_in_its_own_time(tmp_path: Path, number: int, is_to_all: bool):
    job = start(tmp_path, '''
        with we.saving_on_stop():
            we.barrier()
            say('ready')
            while not we.stop_signal:
                time.sleep(0.02)
            time.sleep(1)      # meanwhile the parent passes on what this rank has heard itself
            say('saved')
        raise Stopped(we.stop_signal)
    ''')
    assert job.stdout is not None
    ready = [job.stdout.readline(), job.stdout.readline()]
    os.killpg(job.pid, number) if is_to_all else job.send_signal(number)
    output = job.communicate(timeout=240)[0]

    assert ready == ['ready\n', 'ready\n'] and output.splitlines().count('saved') == 2 and job.returncode == 128 + number, output


def test_ranks_whose_parent_is_killed_while_they_begin_do_not_live_on(tmp_path: Path):
    job = start(tmp_path, '''
        say('a rank lives on')
        time.sleep(1000)
    ''')
    while len(ranks_of(job.pid)) < 2:
        time.sleep(0.01)
    job.kill()
    output = job.communicate(timeout=240)[0]      # until the last process has closed its end of the pipe

    assert 'lives on' not in output


def ranks_of(parent: int) -> list[str]:
    """The pids of the ranks that a process has started."""
    children = Path(f'/proc/{parent}/task/{parent}/children').read_text().split()
    return [child for child in children if b'spawn_main' in Path(f'/proc/{child}/cmdline').read_bytes()]


def test_the_others_wait_for_a_save_as_long_as_it_takes_and_not_for_ever(tmp_path: Path):
    job = start(tmp_path, '''
        import datetime
        import torch.distributed as dist
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1))     # as if ENV.TIMEOUT were this
        if we.is_main:
            time.sleep(3)      # it writes
        we.barrier()
        say(we.broadcast('saved'), len(we.gather(1)))
        if we.is_main:
            time.sleep(1000)
        we.all_reduce(torch.zeros(1))
    ''')
    output = job.communicate(timeout=240)[0]

    assert output.splitlines().count('saved 2') == 2 and job.returncode == 5 and 'does not answer' in output, output


# ------------------------------------------------------------------------------------------------ finding one another
def meet(rank: int, timeout: float, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """What a rank says, and the error, when the others of its four on two machines do not come."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    said: list[str] = []
    monkeypatch.setattr(launching, 'FIRST_WORD', 0.1)
    monkeypatch.setattr(get_logger(), 'warning', said.append)
    with pytest.raises(PeerError) as error:
        launching._meet(Place(rank, 4, rank % 2, 2, 'spawn', f'tcp://127.0.0.1:{port}'), timeout)
    return said[0], str(error.value)


def test_a_rank_says_soon_for_whom_it_waits_and_gives_up_in_time(monkeypatch: pytest.MonkeyPatch):
    said, error = meet(0, 0.5, monkeypatch)
    assert said.startswith('waiting for rank 1, 2, 3 of 4 at tcp://127.0.0.1:') and 'waited' in error and 'for rank 1, 2, 3' in error
    said, error = meet(2, 0.5, monkeypatch)
    assert said.startswith('waiting for machine 0 (MASTER_ADDR, MASTER_PORT) of 4') and 'firewall' in error


def test_who_was_killed_is_not_taken_for_one_who_has_come_though_the_store_remembers(tmp_path: Path):
    places = [Place(i, 2, i, 2, 'torchrun', f'file://{tmp_path}/store') for i in range(2)]
    for _ in range(2):     # an attempt, and the next one on the same store
        with ThreadPoolExecutor() as pool:
            first, second = pool.map(lambda place: launching._meet(place, 20.0), places)
        assert not first.check(['word'])      # of the attempt before
        first.set('word', 'said')
        assert second.get('word') == b'said'

    with pytest.raises(PeerError, match='for rank 1 of 2'):
        launching._meet(places[0], 0.3)
    with pytest.raises(PeerError, match='for rank 0 of 2'):
        launching._meet(places[1], 0.3)


def test_a_stop_signal_ends_the_waiting_at_once(monkeypatch: pytest.MonkeyPatch):
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped), listening():
        timer.start()
        launching._meet(Place(0, 2, 0, 2, 'spawn', f'file://{tempfile.mkdtemp()}/here'), 200.0)
