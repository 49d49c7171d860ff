"""Evaluations in training, and test runs: what the network gives for every sample of a dataset, under its averaged weights."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from scepter.core import streams
from scepter.core.calls import accepted
from scepter.core.config import ConfigError
from scepter.core.env import we
from scepter.core.images import save_results
from scepter.data.loader import OrderedLoader

if TYPE_CHECKING:
    from scepter.solvers.base import BaseSolver


def run_eval(solver: BaseSolver) -> None:
    """Measure on EVAL_DATA: the loss at fixed levels and noise, and METRICS on what forward_test gives."""
    if solver.datasets['eval'] is None:
        raise ConfigError('EVAL_INTERVAL is set, but there is no EVAL_DATA')
    solver._call('before_eval', 'train')
    with ema_weights(solver):
        solver.eval_outputs = run_over(solver, 'eval', with_loss=solver.EVAL_LOSS,
                                       with_results=bool(solver.metrics or solver.hooks['eval']))
    solver.train_mode()
    solver._call('after_eval', 'train')


def run_test(solver: BaseSolver) -> None:
    """Let the network draw or predict all of TEST_DATA, into WORK_DIR/test_results/."""
    with ema_weights(solver):
        run_over(solver, 'test', with_loss=False, with_results=True)


def run_over(solver: BaseSolver, mode: str, with_loss: bool, with_results: bool) -> dict[str, float]:
    """The figures of one pass over the dataset of this mode."""
    solver._set_mode(mode)
    loader = OrderedLoader(solver.datasets[mode], seed=we.seed, rank=we.rank, world_size=we.world_size,
                           skipped_file=solver.work_dir / 'skipped.jsonl', logger=solver.logger)
    losses, count = 0.0, 0
    metrics = solver.metrics if mode == 'eval' else []
    for metric in metrics:
        metric.reset()
    solver._call('before_all_iter', mode)
    for batch, n in loader:
        if we.stop_signal and not we.is_distributed:
            break
        solver.batches = [(batch, n)]
        solver._call('before_iter', mode)
        moved = solver.to_device(batch)
        solver.outputs = {}
        # keyed by the sample and never by the step: the same levels and the same noise in every evaluation
        with torch.no_grad(), streams.current(streams.seed_global(we.seed, mode), n), solver.autocast():
            if with_loss:
                loss = solver.model('train', **moved)['loss']
                losses += float(loss) * len(n)
                solver.outputs['loss'] = float(loss)
            if with_results:
                given = accepted(solver.model.forward_test, {**solver.test_arguments(), **moved})
                solver.outputs['results'] = solver.model('test', **given)
        count += len(n)
        for metric in metrics:
            metric.update(solver.outputs['results'], moved)
        if mode == 'test':
            save_results(solver.outputs['results'], n.tolist(), solver.work_dir / 'test_results')
        solver._call('after_iter', mode)
    figures: dict[str, float] = {}
    if with_loss:
        total, seen = (sum(values) for values in zip(*we.gather((losses, count))))
        figures['loss'] = total / max(1, seen)
    for metric in metrics:
        figures |= metric.compute()
    solver._call('after_all_iter', mode)
    return figures


@contextlib.contextmanager
def ema_weights(solver: BaseSolver) -> Iterator[None]:
    """Inside, the network has its averaged weights, where a hook keeps some."""
    with contextlib.ExitStack() as stack:
        for hook in solver.hooks['train']:
            if hasattr(hook, 'swapped'):
                stack.enter_context(hook.swapped(solver.model))
        yield
