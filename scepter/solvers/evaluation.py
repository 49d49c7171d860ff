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
from typing import Any, Literal

import torch
from torch import Tensor

from scepter.core import jsonl, streams
from scepter.core.calls import accepted
from scepter.core.env import Stopped, seed_everything, we
from scepter.core.faults import ConfigError
from scepter.core.images import free_path, save_results
from scepter.data.loader import OrderedLoader
from scepter.solvers.run import Run

Task = Literal['loss', 'results']
NONE = torch.zeros(0, dtype=torch.int64)


def run_eval(run: Run) -> None:
    """Measure on EVAL_DATA: the loss at fixed levels and noise, and METRICS on what forward_test gives.

    A stop signal ends it before there is any figure; the run that goes on from the checkpoint begins with this evaluation.
    """
    if run.datasets['eval'] is None:
        raise ConfigError('nothing to evaluate on: give EVAL_DATA and EVAL_INTERVAL')
    losses: list[tuple[float, int]] = []

    def measure(batch: dict[str, Any], n: Tensor) -> None:
        if len(n) and run.EVAL_LOSS:
            losses.append((float(run.outputs['loss']), len(n)))
        for metric in run.metrics if len(n) else []:
            metric.update(run.outputs['results'], batch)

    run.eval_mode()
    run.call_hooks('before_eval', 'train')
    for metric in run.metrics:
        metric.reset()
    tasks: dict[Task, bool] = {'loss': run.EVAL_LOSS, 'results': bool(run.metrics or run.hooks['eval'])}
    run.is_eval_due = bool(run_over(run, 'eval', [task for task, is_wanted in tasks.items() if is_wanted], measure))
    if not run.is_eval_due:
        run.eval_outputs = {'loss': mean_over_processes(losses)} if run.EVAL_LOSS else {}
        for metric in run.metrics:
            run.eval_outputs |= metric.compute()
        run.call_hooks('after_all_iter', 'eval')
        run.call_hooks('after_eval', 'train')
        run.hand_out_log(run.eval_outputs)
    run.train_mode()


def run_test(run: Run) -> None:
    """Let the network draw or predict all of TEST_DATA, into WORK_DIR/test_results; a later run takes test_results-2, and so on.

    Raises Stopped where a signal has asked for it; what was written until then are whole files.
    """
    folder = Path(we.broadcast(str(free_path(run.work_dir / 'test_results'))))
    told = {'seed': base_seed(run), 'step': run.step}
    done = 0

    def save(batch: dict[str, Any], n: Tensor) -> None:
        nonlocal done
        rows = save_results(run.outputs['results'], n.tolist(), folder, told) if len(n) else []
        counts, parts = zip(*we.gather((len(n), rows)))
        done += sum(counts)
        if we.is_main:     # one writer, so that lines stand in the order of the samples and never in one another
            jsonl.append(folder / 'results.jsonl', (row for part in parts for row in part))

    stop = run_over(run, 'test', ['results'], save, told['seed'])
    if stop:
        run.logger.warning(f'asked to stop: {done} of {len(run.datasets["test"])} results are in {folder}')
        raise Stopped(stop)
    run.call_hooks('after_all_iter', 'test')
    run.logger.info(f'{done} results in {folder}')


def run_over(run: Run, mode: Literal['eval', 'test'], tasks: Iterable[Task],
             take: Callable[[dict[str, Any], Tensor], None], seed: int | None = None) -> int:
    """One pass over the dataset of a mode: run.outputs gets `loss` and `results` of each batch, and `take` the batch and n [B].

    Every process calls `take` equally often, where it has no batch left with an empty n. Answers the signal that ended the pass, or 0.
    """
    seed = base_seed(run) if seed is None else seed
    run.set_mode(mode)
    loader = OrderedLoader(run.datasets[mode], seed=we.seed, rank=we.rank, world_size=we.world_size,
                           skipped_file=run.work_dir / 'skipped.jsonl', logger=run.logger)
    run.call_hooks('before_all_iter', mode)
    with contextlib.closing(iter(loader)) as batches, run.ema_weights():
        for _ in range(we.any(len(loader))):
            if stop := we.any(we.stop_signal):
                return stop
            batch, n = next(batches, ({}, NONE))
            if not len(n):
                take(batch, n)
                continue
            run.batches = [(batch, n)]
            run.call_hooks('before_iter', mode)
            moved = run.to_device(batch)
            run.outputs = outputs_of(run, mode, tasks, moved, n, seed)
            take(moved, n)
            run.call_hooks('after_iter', mode)
    return 0


def outputs_of(run: Run, mode: str, tasks: Iterable[Task], batch: dict[str, Any], n: Tensor, seed: int) -> dict[str, Any]:
    """`loss` and `results` of one batch, keyed by its samples and never by the step: the same levels and noise in every evaluation."""
    outputs: dict[str, Any] = {}
    seed_everything(we.seed, mode, int(n[0]))     # for a network that draws from torch's own generator: each batch has other noise
    with torch.no_grad(), streams.current(streams.seed_global(we.seed, mode), n), run.autocast():
        if 'loss' in tasks:
            outputs['loss'] = float(run.model('train', **batch)['loss'])
        if 'results' in tasks:
            how = {**run.test_arguments(), 'seed': seed + int(n[0]), 'row_seeds': seeds_of(seed, n), **batch}
            outputs['results'] = run.model('test', **accepted(run.model.forward_test, how))
    return outputs


def base_seed(run: Run) -> int:
    """The seed of a pass: SAMPLE_ARGS.SEED, else forward_test's own default, else the run's; below 0 another one each time."""
    own = inspect.signature(run.model.forward_test).parameters.get('seed')
    seed = run.test_arguments().get('seed', own.default if own is not None and isinstance(own.default, int) else we.seed)
    return seed if seed >= 0 else we.broadcast(random.SystemRandom().randrange(2 ** 32))


def seeds_of(seed: int, n: Tensor) -> list[int]:
    """The key of each picture; that of sample n is also the key of picture n of run_inference.py with this seed."""
    return [streams.row_seeds(seed, 1, first=number)[0] for number in n.tolist()]


def mean_over_processes(losses: list[tuple[float, int]]) -> float:
    """The mean of (mean of a batch, samples in it), to the bit the same however the batches were shared out."""
    everywhere = [pair for part in we.gather(losses) for pair in part]
    return math.fsum(loss * count for loss, count in everywhere) / max(1, sum(count for _, count in everywhere))
