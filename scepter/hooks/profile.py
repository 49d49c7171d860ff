"""Where the time goes."""
from __future__ import annotations

from typing import Any

from scepter.core.env import we
from scepter.core.registry import HOOKS
from scepter.core.schema import param
from scepter.hooks.base import Hook


@HOOKS.register_class()
class ProfileHook(Hook):
    """Records a few steps with torch.profiler: WORK_DIR/profile/trace.json (for chrome://tracing or Perfetto) and a table in the log."""

    START: int = param(10, 'Step at which to begin; the ones before it warm up.', least=0)
    STEPS: int = param(3, 'Steps to record.', least=1)

    def before_iter(self, solver: Any) -> None:
        if we.is_main and solver.mode == 'train' and solver.step == self.START:
            from torch.profiler import ProfilerActivity, profile
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if we.device.type == 'cuda' else [])
            self.profiler = profile(activities=activities)
            self.profiler.start()

    def after_iter(self, solver: Any) -> None:
        if hasattr(self, 'profiler') and solver.step == self.START + self.STEPS:
            self._finish(solver)

    def after_all_iter(self, solver: Any) -> None:
        if hasattr(self, 'profiler'):
            self._finish(solver)

    def _finish(self, solver: Any) -> None:
        self.profiler.stop()
        folder = solver.work_dir / 'profile'
        folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(folder / 'trace.json'))
        key = 'self_cuda_time_total' if we.device.type == 'cuda' else 'self_cpu_time_total'
        self.logger.info(f'profile of {self.STEPS} steps, in {folder}:\n' + self.profiler.key_averages().table(sort_by=key, row_limit=15))
        del self.profiler
