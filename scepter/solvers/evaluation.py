"""Evaluations in training, and test runs: what the network gives for every sample of a dataset, under its averaged weights.

Every draw is keyed by the number of its sample, so a picture depends on neither its batch nor the process that makes it. Processes go
through their batches in rounds, and agree before each on whether a signal has asked to stop.
"""
from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scepter.core import jsonl, pulse, streams
from scepter.core.calls import accepted
from scepter.core.env import Stopped, seed_everything, we
from scepter.core.errors import DataError
from scepter.core.faults import ConfigError
from scepter.core.images import free_path, save_results
from scepter.data.loader import OrderedLoader
from scepter.solvers.metrics import Totals
from scepter.solvers.run import Evaluation, Run

Task = Literal['loss', 'results']
NONE = torch.zeros(0, dtype=torch.int64)


def run_eval(run: Run) -> None:
    """Make the evaluations that are due, one after the other; called when none is, all. Raises ConfigError where there are none.

    A stop signal ends the one that is going on before it has any figure. It and those behind it stay due, and the run that goes on from
    the checkpoint begins with them.
    """
    if not run.evaluations:
        raise ConfigError('nothing to evaluate: give EVAL_DATA and EVAL_INTERVAL, or EVALS')
    run.evals_due = run.evals_due or list(run.evaluations)
    while run.evals_due and measure(run, run.evaluations[run.evals_due[0]]):
        del run.evals_due[0]
    run.train_mode()


def measure(run: Run, evaluation: Evaluation) -> bool:
    """One evaluation: the loss at fixed levels and noise, and what its metrics say of forward_test's results. False if it was cut off."""
    own, totals = Totals(), [Totals() for _ in evaluation.metrics]

    def take(batch: dict[str, Any], n: Tensor) -> None:
        if not len(n):
            return
        own.add({'samples': len(n), 'loss': run.outputs.get('loss', 0.0) * len(n)})
        for metric, total in zip(evaluation.metrics, totals):
            total.add(metric.sums(run.outputs['results'], batch))

    run.evaluation = evaluation
    run.eval_mode()
    run.call_hooks('before_eval', 'train')
    tasks: dict[Task, bool] = {'loss': evaluation.LOSS, 'results': bool(evaluation.metrics or run.hooks['eval'])}
    if run_over(run, 'eval', evaluation.dataset, [task for task, is_wanted in tasks.items() if is_wanted], take):
        return False
    seen = own.everywhere()
    if not seen:
        raise DataError(f'{evaluation.place}: none of its {len(evaluation.dataset)} samples can be read, so there is nothing to measure')
    figures = {'loss': seen['loss'] / seen['samples']} if evaluation.LOSS else {}
    for metric, total in zip(evaluation.metrics, totals):
        figures |= metric.figures(**total.everywhere())
    run.eval_outputs = {evaluation.called(name): value for name, value in figures.items()}
    run.call_hooks('after_all_iter', 'eval')
    run.call_hooks('after_eval', 'train')
    run.hand_out_log({f'val/{name}': value for name, value in run.eval_outputs.items()})
    return True


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

    stop = run_over(run, 'test', run.datasets['test'], ['results'], save, told['seed'])
    if stop:
        run.logger.warning(f'asked to stop: {done} of {len(run.datasets["test"])} results are in {folder}')
        raise Stopped(stop)
    run.call_hooks('after_all_iter', 'test')
    run.logger.info(f'{done} results in {folder}')


def run_over(run: Run, mode: Literal['eval', 'test'], dataset: Any, tasks: Iterable[Task],
             take: Callable[[dict[str, Any], Tensor], None], seed: int | None = None) -> int:
    """One pass over a dataset: run.outputs gets `loss` and `results` of each batch, and `take` the batch and n [B].

    Every process calls `take` equally often, where it has no batch left with an empty n. Answers the signal that ended the pass, or 0.
    """
    seed = base_seed(run) if seed is None else seed
    run.set_mode(mode)
    loader = OrderedLoader(dataset, seed=we.seed, rank=we.rank, world_size=we.world_size,
                           skipped_file=run.work_dir / 'skipped.jsonl', logger=run.logger)
    run.call_hooks('before_all_iter', mode)
    with pulse.phase('evaluation'), contextlib.closing(iter(loader)) as batches, run.ema_weights():
        for _ in range(we.any(len(loader))):
            pulse.beat()
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
