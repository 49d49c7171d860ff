"""Evaluations in training, and test runs: what the network gives for every sample of a dataset, under its averaged weights.

Every draw is keyed by the number of its sample, so a picture depends on neither its batch nor the process that makes it. Processes go
through their batches in rounds, and agree before each on whether a signal has asked to stop.
"""
from __future__ import annotations

import contextlib
import inspect
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from scepter.core import jsonl, streams
from scepter.core.calls import accepted
from scepter.core.env import Stopped, seed_everything, we
from scepter.core.faults import ConfigError
from scepter.core.images import free_path, save_results
from scepter.data.loader import OrderedLoader

if TYPE_CHECKING:
    from scepter.solvers.base import BaseSolver

Task = Literal['loss', 'results']
NONE = torch.zeros(0, dtype=torch.int64)


def run_eval(solver: BaseSolver) -> None:
    """Measure on EVAL_DATA: the loss at fixed levels and noise, and METRICS on what forward_test gives.

    A stop signal ends it before there is any figure; the run that goes on from the checkpoint begins with this evaluation.
    """
    if solver.datasets['eval'] is None:
        raise ConfigError('nothing to evaluate on: give EVAL_DATA and EVAL_INTERVAL')
    losses: list[tuple[float, int]] = []

    def measure(batch: dict[str, Any], n: Tensor) -> None:
        if len(n) and solver.EVAL_LOSS:
            losses.append((float(solver.outputs['loss']), len(n)))
        for metric in solver.metrics if len(n) else []:
            metric.update(solver.outputs['results'], batch)

    solver.eval_mode()
    solver._call('before_eval', 'train')
    for metric in solver.metrics:
        metric.reset()
    tasks: dict[Task, bool] = {'loss': solver.EVAL_LOSS, 'results': bool(solver.metrics or solver.hooks['eval'])}
    solver.is_eval_due = bool(run_over(solver, 'eval', [task for task, is_wanted in tasks.items() if is_wanted], measure))
    if not solver.is_eval_due:
        solver.eval_outputs = {'loss': mean_over_processes(losses)} if solver.EVAL_LOSS else {}
        for metric in solver.metrics:
            solver.eval_outputs |= metric.compute()
        solver._call('after_all_iter', 'eval')
        solver._call('after_eval', 'train')
        solver.hand_out_log(solver.eval_outputs)
    solver.train_mode()


def run_test(solver: BaseSolver) -> None:
    """Let the network draw or predict all of TEST_DATA, into WORK_DIR/test_results; a later run takes test_results-2, and so on.

    Raises Stopped where a signal has asked for it; what was written until then are whole files.
    """
    folder = Path(we.broadcast(str(free_path(solver.work_dir / 'test_results'))))
    told = {'seed': base_seed(solver), 'step': solver.step}
    done = 0

    def save(batch: dict[str, Any], n: Tensor) -> None:
        nonlocal done
        rows = save_results(solver.outputs['results'], n.tolist(), folder, told) if len(n) else []
        counts, parts = zip(*we.gather((len(n), rows)))
        done += sum(counts)
        if we.is_main:     # one writer, so that lines stand in the order of the samples and never in one another
            jsonl.append(folder / 'results.jsonl', (row for part in parts for row in part))

    stop = run_over(solver, 'test', ['results'], save, told['seed'])
    if stop:
        solver.logger.warning(f'asked to stop: {done} of {len(solver.datasets["test"])} results are in {folder}')
        raise Stopped(stop)
    solver._call('after_all_iter', 'test')
    solver.logger.info(f'{done} results in {folder}')


def run_over(solver: BaseSolver, mode: Literal['eval', 'test'], tasks: Iterable[Task],
             take: Callable[[dict[str, Any], Tensor], None], seed: int | None = None) -> int:
    """One pass over the dataset of a mode: solver.outputs gets `loss` and `results` of each batch, and `take` the batch and n [B].

    Every process calls `take` equally often, where it has no batch left with an empty n. Answers the signal that ended the pass, or 0.
    """
    seed = base_seed(solver) if seed is None else seed
    solver._set_mode(mode)
    loader = OrderedLoader(solver.datasets[mode], seed=we.seed, rank=we.rank, world_size=we.world_size,
                           skipped_file=solver.work_dir / 'skipped.jsonl', logger=solver.logger)
    solver._call('before_all_iter', mode)
    with contextlib.closing(iter(loader)) as batches, ema_weights(solver):
        for _ in range(we.any(len(loader))):
            if stop := we.any(we.stop_signal):
                return stop
            batch, n = next(batches, ({}, NONE))
            if not len(n):
                take(batch, n)
                continue
            solver.batches = [(batch, n)]
            solver._call('before_iter', mode)
            moved = solver.to_device(batch)
            solver.outputs = outputs_of(solver, mode, tasks, moved, n, seed)
            take(moved, n)
            solver._call('after_iter', mode)
    return 0


def outputs_of(solver: BaseSolver, mode: str, tasks: Iterable[Task], batch: dict[str, Any], n: Tensor, seed: int) -> dict[str, Any]:
    """`loss` and `results` of one batch, keyed by its samples and never by the step: the same levels and noise in every evaluation."""
    outputs: dict[str, Any] = {}
    seed_everything(we.seed, mode, int(n[0]))     # for a network that draws from torch's own generator: each batch has other noise
    with torch.no_grad(), streams.current(streams.seed_global(we.seed, mode), n), solver.autocast():
        if 'loss' in tasks:
            outputs['loss'] = float(solver.model('train', **batch)['loss'])
        if 'results' in tasks:
            how = {**solver.test_arguments(), 'seed': seed + int(n[0]), 'row_seeds': seeds_of(seed, n), **batch}
            outputs['results'] = solver.model('test', **accepted(solver.model.forward_test, how))
    return outputs


def base_seed(solver: BaseSolver) -> int:
    """The seed of a pass: SAMPLE_ARGS.SEED, else forward_test's own default, else the run's; below 0 another one each time."""
    own = inspect.signature(solver.model.forward_test).parameters.get('seed')
    seed = solver.test_arguments().get('seed', own.default if own is not None and isinstance(own.default, int) else we.seed)
    return seed if seed >= 0 else we.broadcast(random.SystemRandom().randrange(2 ** 32))


def seeds_of(seed: int, n: Tensor) -> list[int]:
    """The key of each picture; that of sample n is also the key of picture n of run_inference.py with this seed."""
    return [streams.row_seeds(seed, 1, first=number)[0] for number in n.tolist()]


def mean_over_processes(losses: list[tuple[float, int]]) -> float:
    """The mean of (mean of a batch, samples in it), to the bit the same however the batches were shared out."""
    everywhere = [pair for part in we.gather(losses) for pair in part]
    return math.fsum(loss * count for loss, count in everywhere) / max(1, sum(count for _, count in everywhere))


def ema_weights(solver: BaseSolver) -> contextlib.AbstractContextManager[None]:
    """Inside, the network has the averaged weights of the first training hook that keeps some; its own where none does."""
    kept = (hook.swapped(solver.model) for hook in solver.hooks['train'])
    return next((context for context in kept if context is not None), contextlib.nullcontext())
