"""How fast a run is: figures of a step of the optimizer over all processes, logged as perf/...

throughput  samples a second, of all processes: a step begins where the one before it ended, so loading and hooks are in it
mfu         of the operations that the devices could have done, the share that the network needed (arXiv:2204.02311, appendix B)
data_wait   share of the step in which the process that waited longest waited for its samples
memory      GiB at its peak, of the process that needs most: what its GPU has allocated; without one, what the process holds

A step that compiled or counted is left out, and so is the first one of a process; evaluations, drawing and saves are no part of a step.
"""
from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

from scepter.core import flops, pulse
from scepter.core.env import we
from scepter.solvers.run import Run


class Speed:
    """The clock of a run."""

    def __init__(self) -> None:
        self._end: float | None = None     # of the last step
        self._aside, self._compiles, self._wait = 0.0, 0, 0.0
        self._is_disturbed = False         # whether this step did more than a step does
        self._flops: dict[Any, float | None] = {}     # of a sample, by the shapes of its batch; None: too much memory would be needed

    def fetched(self, seconds: float) -> None:
        """So long this process has waited for its samples."""
        self._wait = seconds

    @property
    def own(self) -> list[float]:
        """What the other processes should know of this one: seconds that it waited, and GiB that it needs."""
        return [self._wait, memory()]

    def of_step(self, run: Run, everybody: list[list[float]]) -> dict[str, float]:
        """The step has ended; everybody: `own` of each process."""
        now, end = time.monotonic(), self._end
        seconds = now - (end or now) - (pulse.aside - self._aside)
        is_plain = end is not None and not self._is_disturbed and pulse.compiles == self._compiles
        self._end, self._aside, self._compiles, self._is_disturbed = now, pulse.aside, pulse.compiles, False
        waits, sizes = zip(*everybody)
        found = {'memory': max(sizes)}
        if is_plain and seconds > 0:
            found |= {'throughput': run.plan.global_size / seconds, 'data_wait': min(1.0, max(waits) / seconds)}
            if per_step := self._of_batches(run):
                found['mfu'] = per_step / (seconds * peak(run.dtype) * we.world_size)
        return {f'perf/{name}': value for name, value in found.items()}

    def count(self, run: Run) -> None:
        """Count the operations of batches whose shapes are new, by one pass more, where anybody knows the device's peak."""
        if not peak(run.dtype):
            return
        for batch, n in run.batches:
            if (key := _shapes(batch)) not in self._flops:
                self._is_disturbed = True
                try:
                    self._flops[key] = run.train_step.flops(batch, n, run.step) / len(n)
                except torch.cuda.OutOfMemoryError:
                    run.logger.warning('perf/mfu is left out: to count the operations of a step would take more memory than there is')
                    self._flops[key] = None

    def _of_batches(self, run: Run) -> float:
        """Operations of this step, over all processes; 0 where they are not known."""
        each = [(self._flops.get(_shapes(batch)), len(n)) for batch, n in run.batches]
        return 0.0 if any(count is None for count, _ in each) else we.world_size * sum(count * size for count, size in each)


def peak(dtype: torch.dtype) -> float | None:
    """Operations a second that a device of this run can do: what ENV.PEAK_TFLOPS says, else what its name does."""
    if we.peak_tflops is not None:
        return we.peak_tflops * 1e12
    if we.device.type != 'cuda':
        return None
    return flops.peak_of(torch.cuda.get_device_name(we.device), dtype, torch.backends.cuda.matmul.allow_tf32)


def memory() -> float:
    """GiB of this process at its peak so far."""
    if we.device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if sys.platform == 'win32':
        return 0.0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == 'darwin' else 20)


def _shapes(batch: dict[str, Any]) -> tuple:
    return tuple((key, tuple(value.shape[1:])) for key, value in batch.items() if isinstance(value, Tensor))
