"""What the run says: a progress bar, lines of text, a JSONL file, TensorBoard."""
from __future__ import annotations

import json
import time
from typing import Any

import torch

from scepter.core.env import we
from scepter.core.registry import HOOKS, need
from scepter.core.schema import param
from scepter.hooks.base import Hook

PERFORMANCE = ('samples_per_sec', 'data_wait')


def figures(outputs: dict[str, Any], prefix: str = 'train') -> dict[str, float]:
    """The numbers among outputs under their names in logs: train/loss, train/lr, train/grad_norm, perf/samples_per_sec, val/accuracy."""
    return {f'{"perf" if k in PERFORMANCE else prefix}/{k}': float(v) for k, v in outputs.items() if isinstance(v, (int, float))}


@HOOKS.register_class()
class LogHook(Hook):
    """A progress bar, a line every LOG_INTERVAL steps with the mean since the last one, and WORK_DIR/log.jsonl, on the main process."""

    LOG_INTERVAL: int = param(10, 'Steps between lines.', least=1)
    PROGRESS: bool = param(True, 'Show a progress bar where the terminal can.')
    SHOW_GPU_MEM: bool = param(False, 'Add the peak of the GPU memory.')

    def before_all_iter(self, solver: Any) -> None:
        self.sums: dict[str, float] = {}
        self.count, self.bar = 0, None
        if we.is_main and solver.mode == 'train':
            if self.PROGRESS:
                from tqdm import tqdm
                self.bar = tqdm(total=solver.max_steps, initial=solver.step, disable=None, dynamic_ncols=True, unit='step')
            self.file = open(solver.work_dir / 'log.jsonl', 'a', encoding='utf-8')

    def after_iter(self, solver: Any) -> None:
        if not we.is_main or solver.mode != 'train':
            return
        for key, value in figures(solver.outputs).items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += 1
        if self.bar is not None:
            self.bar.update(1)
            if 'loss' in solver.outputs and not self.bar.disable:
                self.bar.set_postfix_str(f'loss {solver.outputs["loss"]:.4f}', refresh=False)
        if solver.step % self.LOG_INTERVAL == 0 or solver.step == solver.max_steps:
            means = {key: value / self.count for key, value in self.sums.items()}
            # the rates as they are now
            means |= {f'train/{key}': float(value) for key, value in solver.outputs.items() if key == 'lr' or key.startswith('lr_')}
            if self.SHOW_GPU_MEM and we.device.type == 'cuda':
                means['perf/gpu_gib'] = torch.cuda.max_memory_allocated() / 2 ** 30
            self._write(solver, means)
            self.sums, self.count = {}, 0

    def after_eval(self, solver: Any) -> None:
        if we.is_main and solver.eval_outputs:
            self._write(solver, figures(solver.eval_outputs, 'val'))

    def after_solve(self, solver: Any) -> None:
        for opened in (getattr(self, 'bar', None), getattr(self, 'file', None)):
            if opened is not None:
                opened.close()

    def _write(self, solver: Any, values: dict[str, float]) -> None:
        self.file.write(json.dumps({'step': solver.step, 'time': round(time.time(), 3), **values}) + '\n')
        self.file.flush()
        shown = '  '.join(f'{key.removeprefix("train/").removeprefix("perf/")} {_short(value)}' for key, value in values.items())
        self.logger.info(f'step {solver.step}/{solver.max_steps}  {shown}')


@HOOKS.register_class()
class TensorboardLogHook(Hook):
    """Scalars for TensorBoard, in WORK_DIR/tensorboard."""

    LOG_DIR: str | None = param(None, 'Folder; default WORK_DIR/tensorboard.')
    LOG_INTERVAL: int = param(10, 'Steps between points.', least=1)

    def before_all_iter(self, solver: Any) -> None:
        if we.is_main:
            need('tensorboard', 'data')
            from torch.utils.tensorboard import SummaryWriter
            # purge_step: a resumed run draws over what an interrupted one had drawn beyond its last checkpoint
            self.writer = SummaryWriter(self.LOG_DIR or str(solver.work_dir / 'tensorboard'), purge_step=solver.step + 1)

    def after_iter(self, solver: Any) -> None:
        if we.is_main and solver.step % self.LOG_INTERVAL == 0:
            for key, value in figures(solver.outputs).items():
                self.writer.add_scalar(key, value, solver.step)

    def after_eval(self, solver: Any) -> None:
        if we.is_main:
            for key, value in figures(solver.eval_outputs, 'val').items():
                self.writer.add_scalar(key, value, solver.step)

    def after_solve(self, solver: Any) -> None:
        if hasattr(self, 'writer'):
            self.writer.close()


def _short(value: float) -> str:
    return f'{value:.4g}' if abs(value) < 1000 else f'{value:,.0f}'
