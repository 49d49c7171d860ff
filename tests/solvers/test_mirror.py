"""A WORK_DIR in a store: what is there is whole at every moment, a fresh machine goes on from it, and what cannot be sent is told."""
from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import tiny
from scepter import drawing
from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.disk.writing import Kept
from scepter.core.env import Stopped
from scepter.core.errors import CheckpointError
from scepter.core.experiment import check_experiment
from scepter.core.faults import ConfigError
from scepter.core.stores import FS, mirror
from scepter.core.stores.mirror import Mirror, newest_at

oss = pytest.importorskip('tests.servers.oss')    # needs oss2
ROOT = Path(__file__).resolve().parents[2]
RUN = 'oss://bucket/runs/a'
EVERY_TWO = [{'NAME': 'ModelEmaHook', 'BETA': 0.9}, {'NAME': 'CheckpointHook', 'INTERVAL': 2}, {'NAME': 'LogHook', 'LOG_INTERVAL': 1}]


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[oss.OssServer]:
    """A bucket, a machine that has seen nothing, and a mirror that looks at once."""
    running = oss.OssServer()
    running.enter(monkeypatch)
    another_machine(tmp_path / 'one', monkeypatch)
    monkeypatch.setattr(mirror, 'LOOK', 0.01)
    FS.init_fs_client({'NAME': 'AliyunOssFs', 'RETRY_TIMES': 1, 'RETRY_DELAY': 0.01, 'TIMEOUT': 1})
    yield running
    FS._clients.pop('oss://')
    running.close()


def another_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('SCEPTER_CACHE', str(folder))
    FS._fetched.clear()


def config(steps: int, **more: object):
    return tiny.config(RUN, steps, **{'TRAIN_HOOKS': EVERY_TWO, **more})


def whole_steps(server: oss.OssServer, root: str = 'runs/a') -> dict[int, bool]:
    """step -> whether each file that its manifest names is there to the byte, of each that could be chosen."""
    found = {}
    for key in [key for key in list(server.objects) if key.startswith(root) and key.endswith('MANIFEST.json')]:
        folder, files = key.rpartition('/')[0], json.loads(server.objects[key].body)['files']
        bodies = {name: server.objects[f'{folder}/{name}'].body if f'{folder}/{name}' in server.objects else b'' for name in files}
        found[int(folder[-8:])] = all(hashlib.sha256(bodies[name]).hexdigest() == told['sha256'] for name, told in files.items())
    return found


def eventually(claim: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.01)


def save(one: Mirror, step: int, keep: int | None = None) -> Path:
    tensors = {'model': {'weight': torch.full([1000], float(step))}}
    return checkpoints.save(one.root, step, tensors, {'step': step}, 'A: 1\n', keep=keep)


# -------------------------------------------------------------------- runs
def test_a_fresh_machine_goes_on_bit_for_bit_from_what_a_stopped_run_left_in_a_bucket(server, tmp_path, monkeypatch):
    tiny.run(tiny.config(tmp_path / 'whole', 10, TRAIN_HOOKS=EVERY_TWO))
    with pytest.raises(Stopped):
        tiny.run(config(10, TRAIN_HOOKS=[*EVERY_TWO, {'NAME': 'StopAfter', 'BATCHES': 5}]))
    assert whole_steps(server) == {2: True, 4: True, 5: True}

    another_machine(tmp_path / 'two', monkeypatch)
    solver = tiny.run(config(10, RESUME_FROM='auto'))

    here = checkpoints.folders(solver.work_dir / 'checkpoints')
    assert solver.work_dir.is_relative_to(tmp_path / 'two') and [checkpoints.step_of(f) for f in here] == [10, 8, 6, 5]
    assert whole_steps(server) == dict.fromkeys((2, 4, 5, 6, 8, 10), True)
    assert tiny.same(tiny.groups(tmp_path / 'whole', 10), tiny.groups(solver.work_dir, 10))
    rows = [json.loads(line) for line in server.objects['runs/a/log.jsonl'].body.splitlines()]
    assert [row['step'] for row in rows if 'train/loss' in row] == [*range(1, 11)]
    assert server.objects['runs/a/log.txt'].body == (solver.work_dir / 'log.txt').read_bytes()


def test_a_manifest_appears_after_all_that_it_names(server):
    tiny.run(config(4, KEEP_CHECKPOINTS=1))

    for key in [key for key in server.history if key.endswith('MANIFEST.json')]:
        before = server.history[:server.history.index(key)]
        assert {f'{key.rpartition("/")[0]}/{name}' for name in ('model.safetensors', 'optimizer.safetensors', 'state.json')} <= set(before)


def test_what_keep_checkpoints_leaves_is_left_there_too(server):
    tiny.run(config(10, KEEP_CHECKPOINTS=1, KEEP_EVERY=4))

    assert sorted(whole_steps(server)) == [4, 8, 10]
    assert {int(key.split('/')[3][5:]) for key in server.objects if '/checkpoints/' in key} == {4, 8, 10}


def test_a_second_run_at_the_address_is_refused_until_it_is_told_to_go_on(server, tmp_path, monkeypatch):
    tiny.run(config(2))
    another_machine(tmp_path / 'two', monkeypatch)

    with pytest.raises(CheckpointError, match=f'{RUN} already holds a run, up to step 2. Set SOLVER.RESUME_FROM: auto'):
        tiny.run(config(2))
    assert tiny.run(config(4, RESUME_FROM='latest')).step == 4


def test_what_cannot_be_sent_ends_no_training_but_is_an_error_at_the_end_and_the_same_command_mends_it(server):
    server.put_fault = 'fine'
    server.refused = ('runs/a/checkpoints',)

    with pytest.raises(CheckpointError, match=r'lacks the end of this run: .*Steps 2, 4, 6 are in .*RESUME_FROM: auto sends and goes on'):
        tiny.run(config(6))
    assert whole_steps(server) == {}
    server.refused = ()
    solver = tiny.run(config(6, RESUME_FROM='auto'))

    assert solver.step == 6 and whole_steps(server) == dict.fromkeys((2, 4, 6), True)


def test_an_address_that_cannot_be_written_is_told_before_the_first_step(server):
    server.refused = ('runs/a',)

    with pytest.raises(CheckpointError, match=r'runs/a/RUN.json: gave up after 2 tries: 500'):
        tiny.run(config(6))


@pytest.mark.parametrize('address, words', [('https://host/run', 'https:// can only be read'), ('nope://run', 'no client for nope://')])
def test_an_address_where_nothing_can_be_written_is_a_fault_of_the_config(address, words):
    with pytest.raises(ConfigError, match=words):
        check_experiment(tiny.config(address, 2))


def test_resume_from_takes_the_newest_checkpoint_of_another_address(server, tmp_path):
    tiny.run(config(4))

    solver = tiny.run(tiny.config(tmp_path / 'next', 6, RESUME_FROM=RUN))

    assert solver.step == 6 and newest_at(RUN) == f'{RUN}/checkpoints/step-00000004'
    assert not [key for key, _ in server.gets if 'step-00000002' in key]


def test_a_run_in_a_bucket_can_be_drawn_from(server, tmp_path, monkeypatch):
    trained = tiny.run(config(4, MODEL={'NAME': 'TinyPainter'}))
    another_machine(tmp_path / 'two', monkeypatch)

    pipe = drawing.load(RUN)

    averaged = tiny.groups(trained.work_dir, 4)['ema']
    assert pipe.source == RUN and torch.equal(pipe.model.state_dict()['net.0.weight'], averaged['net.0.weight'])
    assert not [key for key, _ in server.gets if 'step-00000002' in key]


def test_any_store_of_fsspec_will_do(tmp_path, monkeypatch):
    fsspec = pytest.importorskip('fsspec')
    monkeypatch.setattr(mirror, 'LOOK', 0.01)
    another_machine(tmp_path / 'one', monkeypatch)
    address = f'memory://{tmp_path.name}/run'
    tiny.run(tiny.config(address, 4, TRAIN_HOOKS=EVERY_TWO))
    another_machine(tmp_path / 'two', monkeypatch)

    assert tiny.run(tiny.config(address, 6, TRAIN_HOOKS=EVERY_TWO, RESUME_FROM='auto')).step == 6

    assert sorted(mirror.steps_in(FS.list(address))) == [2, 4, 6]
    fsspec.filesystem('memory').store.clear()


# -------------------------------------------------------------------- the mirror itself
def test_the_newest_that_is_damaged_there_is_passed_over(server, tmp_path, monkeypatch, caplog):
    tiny.run(config(4))
    key = next(key for key in server.objects if 'step-00000004/model' in key)
    body = server.objects[key].body
    server.objects[key] = oss.Object(body[:-1] + bytes([body[-1] ^ 1]))     # the store itself believes in it
    another_machine(tmp_path / 'two', monkeypatch)

    solver = tiny.run(config(6, RESUME_FROM='auto'))

    assert solver.step == 6 and whole_steps(server)[6] and whole_steps(server)[4]    # made anew on the way


def test_the_third_checkpoint_that_cannot_be_sent_ends_the_run(server, tmp_path):
    one = Mirror(RUN, tmp_path / 'run')
    one.begin(None)
    server.refused = ('runs/a/checkpoints',)
    for step in (1, 2, 3):
        one.check()
        save(one, step)
        eventually(lambda: one._error is not None)
    with pytest.raises(CheckpointError, match=r'cannot follow: .*500.*Steps 1, 2, 3 are in'):
        one.check()
    with pytest.raises(CheckpointError):
        one.close()


def test_who_comes_later_takes_the_address_and_the_earlier_run_writes_no_more(server, tmp_path):
    one, two = Mirror(RUN, tmp_path / 'one'), Mirror(RUN, tmp_path / 'two')
    one.begin('auto')
    save(one, 1)
    eventually(lambda: 1 in whole_steps(server))
    two.begin('auto')
    assert (two.root / 'step-00000001').is_dir()

    save(one, 2)
    eventually(lambda: one._error is not None)

    with pytest.raises(CheckpointError, match=r'was taken over by a run on .* \(pid \d+\)'):
        one.check()
    assert list(whole_steps(server)) == [1]
    with pytest.raises(CheckpointError):
        one.close()
    two.close()


def test_a_step_that_is_made_anew_replaces_what_is_there(server, tmp_path):
    one = Mirror(RUN, tmp_path / 'one')
    one.begin(None)
    server.objects['runs/a/checkpoints/step-00000001/left-over.safetensors'] = oss.Object(b'of an upload that broke')
    save(one, 1)
    eventually(lambda: whole_steps(server) == {1: True})
    checkpoints.save(one.root, 1, {'model': {'weight': torch.ones(7)}}, {'step': 1}, 'A: 2\n')
    one.close()

    assert whole_steps(server) == {1: True} and server.objects['runs/a/checkpoints/step-00000001/config.yaml'].body == b'A: 2\n'
    assert not [key for key in server.objects if 'left-over' in key] and not list((tmp_path / 'one' / '.outgoing').iterdir())


def _write_for_ever(folder: Path, begin: int) -> None:
    one = Mirror(RUN, folder)
    one.begin('auto', lambda: Kept(2))
    for step in range(begin, begin + 1000):
        save(one, step, keep=2)
        time.sleep(0.02)


@pytest.mark.parametrize('kills', [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_nothing_there_that_is_not_whole(server, tmp_path, kills):
    dice = random.Random(0)
    for kill in range(kills):
        seen, begin = len(server.history), 1 + max(whole_steps(server), default=0)
        child = os.fork()
        if child == 0:
            try:
                _write_for_ever(tmp_path / f'machine-{kill % 3}', begin)
            finally:
                os._exit(1)
        eventually(lambda seen=seen: len(server.history) > seen + 8)
        time.sleep(dice.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps = whole_steps(server)
        assert steps and all(steps.values())


@pytest.mark.slow
@pytest.mark.parametrize('more', [{'ASYNC_SAVE': True}, {'PARALLEL': 'fsdp', 'ASYNC_SAVE': True}], ids=['beside the loop', 'in shares'])
def test_two_processes_that_save_beside_the_loop_are_followed_and_gone_on_from(server, tmp_path, more):
    def go(machine: str, steps: int) -> int:
        cfg = config(10, RESUME_FROM='auto', KEEP_CHECKPOINTS=2, FILE_SYSTEM={'NAME': 'AliyunOssFs', 'TIMEOUT': 5}, **more)
        cfg.SOLVER.MAX_STEPS = steps
        (tmp_path / 'train.yaml').write_text(str(Config({**cfg, 'ENV': {'DEVICE': 'cpu', 'NPROC': 2, 'THREADS': 1},
                                                         'IMPORTS': [tiny.__file__]})))
        done = subprocess.run([sys.executable, 'scepter/run_train.py', '--cfg', str(tmp_path / 'train.yaml')], cwd=ROOT, text=True,
                              capture_output=True, env={**os.environ, 'SCEPTER_CACHE': str(tmp_path / machine), 'PYTHONPATH': str(ROOT)})
        assert 'Traceback' not in done.stderr, done.stderr
        return done.returncode

    assert go('one', 6) == 0 and whole_steps(server) == {4: True, 6: True}
    assert go('two', 10) == 0 and whole_steps(server) == {8: True, 10: True}
    assert 'step-00000006 at step 6' in server.objects['runs/a/log.txt'].body.decode()
