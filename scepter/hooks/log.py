"""What the run says: a progress bar, lines of text, a JSONL file, TensorBoard."""
from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from scepter.core import jsonl
from scepter.core.disk.tensors import Stored
from scepter.core.env import we
from scepter.core.images import is_figure, to_uint8
from scepter.core.logger import duration
from scepter.core.registry import HOOKS, need
from scepter.core.schema import param
from scepter.hooks.base import Hook

# how a line of text shows what is no plain number
SHOWN = {'perf/throughput': '{:.3g} samples/s', 'perf/data_wait': 'waited for data {:.0%}', 'perf/mfu': '{:.1%} of the peak',
         'perf/memory': '{:.3g} GiB'}
RATES = ('perf/throughput', 'perf/mfu')     # over several steps, their harmonic mean: what was done, by the time that it took


@HOOKS.register_class()
class LogHook(Hook):
    """A progress bar, a line every LOG_INTERVAL steps with the mean since the last one, and WORK_DIR/log.jsonl, on the main process.

    In log.jsonl are the figures of docs/concepts.md; one that is not finite is null. A resumed run cuts off the lines of the steps that it
    goes through again.
    """

    LOG_INTERVAL: int = param(10, 'Steps between lines.', least=1)
    PROGRESS: bool = param(True, 'Show a progress bar where the terminal can.')
    SHOW_GPU_MEM: bool = param(False, 'Show the peak of the memory in the line too; log.jsonl has it always, as perf/memory.')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.sums: dict[str, Any] = {}        # since the last line; tensors stay on their device until there is one
        self.counts: dict[str, int] = {}
        self.bar: Any = None
        self._first: tuple[int, float] | None = None     # step and time after the first step, which compiles and warms up

    def before_all_iter(self, solver: Any) -> None:
        if not we.is_main or solver.mode != 'train':
            return
        self.path = solver.work_dir / 'log.jsonl'
        jsonl.keep_while(self.path, lambda row: row.get('step', 0) <= solver.step)
        if self.PROGRESS:
            from tqdm import tqdm
            self.bar = tqdm(total=solver.max_steps, initial=solver.step, disable=None, dynamic_ncols=True, unit='step')

    def read_log(self, solver: Any, logged: dict[str, Any]) -> None:
        if not we.is_main:
            return
        figures = {key: value for key, value in logged.items() if is_figure(value)}
        if solver.mode == 'eval':
            self._write(solver, {key: float(value) for key, value in figures.items()})
            return
        self._first = self._first or (solver.step, time.monotonic())
        for key, value in figures.items():
            # the rate is shown as it is now, all others as their mean
            value = 1 / value if key in RATES else value
            is_kept = key in self.sums and not key.startswith('train/lr')
            self.sums[key] = self.sums[key] + value if is_kept else value
            self.counts[key] = self.counts[key] + 1 if is_kept else 1
        self._move_bar(figures)
        if solver.step % self.LOG_INTERVAL == 0 or solver.step == solver.max_steps:
            means = {key: float(total) / self.counts[key] for key, total in self.sums.items()}
            means |= {key: 1 / means[key] for key in RATES if key in means}
            self._write(solver, means)
            self.sums, self.counts = {}, {}

    def after_solve(self, solver: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def state_dict(self) -> dict[str, Any]:
        sums = {key: float(total) for key, total in self.sums.items()}
        return {'sums': {key: total if math.isfinite(total) else None for key, total in sums.items()}, 'counts': self.counts}

    def load_state_dict(self, state: dict[str, Any], tensors: Stored) -> None:
        self.sums = {key: math.nan if total is None else total for key, total in state.get('sums', {}).items()}
        self.counts = dict(state.get('counts', {}))

    def _move_bar(self, figures: dict[str, Any]) -> None:
        if self.bar is not None:
            self.bar.update(1)
            if 'train/loss' in figures and not self.bar.disable:
                self.bar.set_postfix_str(f'loss {float(figures["train/loss"]):.4f}', refresh=False)

    def _write(self, solver: Any, values: dict[str, float]) -> None:
        jsonl.append(self.path, [{'step': solver.step, 'time': round(time.time(), 3), **values}])
        shown = [_shown(key, value) for key, value in values.items() if self.SHOW_GPU_MEM or key != 'perf/memory']
        self.logger.info('  '.join([f'step {solver.step}/{solver.max_steps}', *self._time_left(solver), *shown]))

    def _time_left(self, solver: Any) -> list[str]:
        if self._first is None or not self._first[0] < solver.step < solver.max_steps:
            return []
        step, begin = self._first
        return [f'eta {duration((time.monotonic() - begin) / (solver.step - step) * (solver.max_steps - solver.step))}']


@HOOKS.register_class()
class TensorboardLogHook(Hook):
    """Figures and pictures for TensorBoard, in WORK_DIR/tensorboard."""

    LOG_DIR: str | None = param(None, 'Folder; default WORK_DIR/tensorboard.')
    LOG_INTERVAL: int = param(10, 'Steps between points; pictures and evaluations are shown whenever there are some.', least=1)

    def before_all_iter(self, solver: Any) -> None:
        if we.is_main:
            need('tensorboard', 'data')
            from torch.utils.tensorboard import SummaryWriter
            # purge_step: a resumed run draws over what an interrupted one had drawn beyond its last checkpoint
            self.writer = SummaryWriter(self.LOG_DIR or str(solver.work_dir / 'tensorboard'), purge_step=solver.step + 1)

    def read_log(self, solver: Any, logged: dict[str, Any]) -> None:
        if not we.is_main:
            return
        is_due = solver.mode == 'eval' or solver.step % self.LOG_INTERVAL == 0
        for key, value in logged.items():
            if not is_figure(value):
                picture = value if isinstance(value, np.ndarray) else to_uint8(value)
                self.writer.add_image(key, picture, solver.step, dataformats='HWC')
            elif is_due:
                self.writer.add_scalar(key, float(value), solver.step)

    def after_solve(self, solver: Any) -> None:
        if hasattr(self, 'writer'):
            self.writer.close()


def _shown(key: str, value: float) -> str:
    if key in SHOWN:
        return SHOWN[key].format(value)
    return f'{key.removeprefix("train/")} {value:.4g}' if abs(value) < 1000 else f'{key.removeprefix("train/")} {value:,.0f}'
