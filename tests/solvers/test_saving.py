"""ASYNC_SAVE: the loop goes on while a checkpoint is written, and nothing that is promised of checkpoints is lost by it."""
from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.env import Stopped, we
from scepter.core.errors import CheckpointError
from scepter.core.launch import launch
from scepter.core.registry import HOOKS
from scepter.core.schema import param
from scepter.hooks.base import Hook
from tiny import config, groups, run, same

EMA = {'NAME': 'ModelEmaHook', 'BETA': 0.9, 'DEVICE': 'cpu'}


@HOOKS.register_class()
class Heavy(Hook):
    """Has a checkpoint take its time: so many megabytes, which tell the step at which they were copied."""

    MEGABYTES: int = param(32)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.load = torch.zeros(self.MEGABYTES, 1 << 18)

    def after_iter(self, solver: Any) -> None:
        self.load.fill_(solver.step)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {f'{i}': megabyte for i, megabyte in enumerate(self.load)}


@HOOKS.register_class()
class DiskIsFull(Hook):
    """From this step on no file may grow beyond a megabyte."""

    STEP: int = param(3)
    RANK: int = param(0)

    def after_iter(self, solver: Any) -> None:
        if solver.step == self.STEP:
            solver._saver.wait()    # the one before is to be whole
        if solver.step == self.STEP and we.rank == self.RANK:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@HOOKS.register_class()
class SaveAt2And4(Hook):
    """Asks for two checkpoints, and for none at the end."""

    def after_iter(self, solver: Any) -> None:
        if solver.step in (2, 4):
            solver.request_save()


@contextmanager
def largest_file_restored() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def beside(folder: Path, steps: int = 6, interval: int = 2, more: list[dict] | None = None, **solver: Any) -> Any:
    hooks = [EMA, {'NAME': 'CheckpointHook', 'INTERVAL': interval}, *(more or [])]
    return config(folder, steps, **{'TRAIN_HOOKS': hooks, 'LR_SCHEDULER': None, 'ASYNC_SAVE': True, **solver})


def test_what_is_written_beside_the_loop_is_what_the_loop_would_have_written(tmp_path):
    run(beside(tmp_path / 'beside', interval=1, SHARD_SIZE=2e-7))
    run(beside(tmp_path / 'waiting', interval=1, ASYNC_SAVE=False))

    for step in range(1, 7):
        assert same(groups(tmp_path / 'beside', step), groups(tmp_path / 'waiting', step))
    assert (tmp_path / 'beside/checkpoints/step-00000006/model-00002.safetensors').exists()


def test_it_goes_on_to_the_bit(tmp_path):
    run(beside(tmp_path / 'whole', 10))
    run(beside(tmp_path / 'cut', 5))
    run(beside(tmp_path / 'cut', 10, RESUME_FROM='latest'))

    assert same(groups(tmp_path / 'whole', 10), groups(tmp_path / 'cut', 10))


def test_steps_that_are_made_while_it_is_written_do_not_show_in_it(tmp_path):
    solver = run(beside(tmp_path, 12, interval=4, more=[{'NAME': 'Heavy'}]))

    assert solver.step == 12
    for step in (4, 8, 12):
        assert all((megabyte == step).all() for megabyte in groups(tmp_path, step)['Heavy'].values())


def test_the_loop_waits_for_the_copy_alone(tmp_path):
    """The first save finds new memory, those after it what the first one left."""
    solver, waited = run(beside(tmp_path, 1, more=[{'NAME': 'Heavy', 'MEGABYTES': 128}])), []
    for is_async in (True, False) * 3:
        solver._saver.is_async, begin = is_async, time.monotonic()
        solver.save_checkpoint()
        waited.append(time.monotonic() - begin)
        solver._saver.wait()

    assert min(waited[0::2]) < 0.4 * min(waited[1::2]), waited     # 0.1 by itself; others work on this machine


def test_retention_counts_what_is_committed_and_keeps_the_best(tmp_path):
    evaluated = {'EVAL_DATA': {'NAME': 'TinyPoints', 'BATCH_SIZE': 4}, 'EVAL_INTERVAL': 2, 'EVAL_LOSS': False,
                 'METRICS': [{'NAME': 'MeanValue'}], 'KEEP_CHECKPOINTS': 2}
    hooks = [{'NAME': 'CheckpointHook', 'INTERVAL': 1, 'SAVE_BEST_BY': '-value'}, {'NAME': 'Heavy', 'MEGABYTES': 4}]
    run(beside(tmp_path, 8, TRAIN_HOOKS=hooks, **evaluated))     # the figure never changes: the first is the best

    assert [checkpoints.step_of(f) for f in checkpoints.folders(tmp_path / 'checkpoints')] == [8, 7, 2]
    assert all(checkpoints.is_sound(f) for f in checkpoints.folders(tmp_path / 'checkpoints'))


@pytest.mark.parametrize(('interval', 'step'), [(2, 5), (5, 5)], ids=['a new save', 'one that is being written'])
def test_a_stop_signal_waits_until_its_step_is_written(tmp_path, interval, step):
    with pytest.raises(Stopped) as stop:
        run(beside(tmp_path, 50, interval, more=[{'NAME': 'Heavy'}, {'NAME': 'StopAfter', 'BATCHES': 5}]))

    assert stop.value.signal == signal.SIGTERM and checkpoints.resolve(tmp_path, 'latest').step == step


@pytest.mark.parametrize(('steps', 'seen'), [(3000, range(4, 3000)), (4, [4])], ids=['at the end of a step', 'at the end of the run'])
def test_an_error_of_the_writer_ends_the_run(tmp_path, steps, seen):
    hooks = [{'NAME': 'SaveAt2And4'}, {'NAME': 'Heavy', 'MEGABYTES': 4}, {'NAME': 'DiskIsFull', 'STEP': 4}, {'NAME': 'NoteSamples'}]
    with largest_file_restored(), pytest.raises(CheckpointError, match=r'no space for .*step-00000004') as error:
        run(beside(tmp_path, steps, TRAIN_HOOKS=hooks))

    assert error.value.exit_code == 4 and checkpoints.resolve(tmp_path, 'latest').step == 2
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['step-00000002']
    assert len((tmp_path / 'samples.jsonl').read_text().splitlines()) in seen


def test_a_stop_whose_step_cannot_be_written_is_an_error_and_no_stop(tmp_path):
    hooks = [{'NAME': 'SaveAt2And4'}, {'NAME': 'Heavy', 'MEGABYTES': 4}, {'NAME': 'DiskIsFull'}, {'NAME': 'StopAfter', 'BATCHES': 3}]
    with largest_file_restored(), pytest.raises(CheckpointError, match=r'no space for .*step-00000003'):
        run(beside(tmp_path, 50, TRAIN_HOOKS=hooks))


def test_a_tensor_that_is_not_finite_is_refused_beside_the_loop_too(tmp_path):
    solver = run(beside(tmp_path, 1))
    next(solver.model.parameters()).data[0, 0] = float('nan')
    solver.save_checkpoint()

    with pytest.raises(CheckpointError, match=r'NaN or infinity: model: net\.0\.weight'):
        solver._saver.wait()
    assert not solver._saver.has_failed


def test_a_run_that_fails_while_its_last_checkpoint_is_written_leaves_it_whole(tmp_path):
    class Fails(Hook):
        def after_iter(self, solver: Any) -> None:
            if solver.step == 3:
                raise RuntimeError('of the user')

    HOOKS.register_class('FailsAtStep3')(Fails)
    with pytest.raises(RuntimeError, match='of the user'):
        run(beside(tmp_path, 9, more=[{'NAME': 'Heavy'}, {'NAME': 'FailsAtStep3'}]))

    assert checkpoints.resolve(tmp_path, 'latest').step == 2
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['step-00000002']


# ------------------------------------------------------------------------------------------------ several processes
TWO = {'NPROC': 2, 'DEVICE': 'cpu', 'THREADS': 1}


def of_two(folder: Path, steps: int = 6, more: list[dict] | None = None, **solver: Any) -> Any:
    return beside(folder, steps, more=more, **{'GLOBAL_BATCH_SIZE': 4, 'SHARD_SIZE': 2e-7, **solver})


def both(cfg: Config) -> None:
    """What each of two processes does."""
    folder = Path(cfg.FOLDER)
    for parallel in ('ddp', 'fsdp'):
        run(of_two(folder / parallel / 'beside', PARALLEL=parallel))
        run(of_two(folder / parallel / 'waiting', PARALLEL=parallel, ASYNC_SAVE=False))
        run(of_two(folder / parallel / 'again', 3, PARALLEL=parallel))
        run(of_two(folder / parallel / 'again', PARALLEL=parallel, RESUME_FROM='latest'))
        for name, hook, kind, words in (('full', {'NAME': 'DiskIsFull', 'STEP': 3, 'RANK': 1}, CheckpointError, 'no space'),
                                        ('stopped', {'NAME': 'StopAfter', 'BATCHES': 5, 'RANK': 1}, Stopped, 'stopped')):
            # both processes raise it, so neither is left waiting for the other
            with largest_file_restored(), pytest.raises(kind, match=words):
                run(of_two(folder / parallel / name, 50, more=[{'NAME': 'Heavy', 'MEGABYTES': 8}, hook], PARALLEL=parallel))


def test_two_processes_write_beside_their_loops_what_they_would_have_waited_for(tmp_path):
    launch(Config({'FOLDER': str(tmp_path), 'ENV': TWO}), both)

    for parallel in (tmp_path / 'ddp', tmp_path / 'fsdp'):
        for step in (2, 4, 6):
            assert same(groups(parallel / 'beside', step), groups(parallel / 'waiting', step)), (parallel, step)
        assert same(groups(parallel / 'again', 6), groups(parallel / 'waiting', 6))
        assert (parallel / 'beside/checkpoints/step-00000006/optimizer-00002.safetensors').exists()
        assert [f.name for f in (parallel / 'full' / 'checkpoints').iterdir()] == ['step-00000002']
        assert checkpoints.resolve(parallel / 'stopped', 'latest').step == 5
