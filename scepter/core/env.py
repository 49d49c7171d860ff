"""`we`: which process this is, on which device, and how the processes of a run talk. How they begin is core/launch.py."""
from __future__ import annotations

import contextlib
import datetime
import random
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from scepter.core import pulse
from scepter.core.errors import PeerError, ScepterError
from scepter.core.faults import ConfigError
from scepter.core.logger import get_logger, note_traceback
from scepter.core.schema import Component, param

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LONG_TALK = 86400.0    # seconds that the others wait while the main process writes a checkpoint


class Limits(Component):
    """Seconds in which a process must have done something, by what it is doing; null for no limit. A step may always take three times as
    long as the longest one before it."""

    START: float | None = param(None, 'Building, loading and downloading, before the first step.', above=0)
    FIRST_STEP: float | None = param(300.0, 'Each part of the first step, which warms up.', above=0)
    STEP: float | None = param(120.0, 'Each part of a step: a batch forward and backward, the optimizers, a hook.', above=0)
    COMPILE: float | None = param(1800.0, 'One graph of torch.compile.', above=0)
    DATA: float | None = param(600.0, 'Waiting for a batch.', above=0)
    EVALUATION: float | None = param(600.0, 'Each batch of an evaluation or a test run; in drawing, each step of the sampler.', above=0)
    SAVING: float | None = param(1800.0, 'Each piece of a checkpoint.', above=0)
    CACHING: float | None = param(600.0, 'Each batch of what is computed once and kept.', above=0)


class Env(Component):
    """The section ENV of a config: what differs between machines."""

    SEED: int = param(2023, 'Every random draw of training is a function of this seed and the number of the sample.', least=0)
    DEVICE: Literal['auto', 'cuda', 'mps', 'cpu'] = param('auto', 'Where to compute; auto takes CUDA, else MPS, else the CPU.')
    NPROC: int | None = param(None, 'Processes on this machine in spawn mode; default one per visible GPU, else one.', least=1)
    BACKEND: Literal['nccl', 'gloo'] | None = param(None, 'How processes talk; default nccl with CUDA, else gloo.')
    TIMEOUT: float = param(300.0, 'Seconds after which a process that does not answer is taken for lost; a save may take longer.', above=0)
    LIMITS: Limits = param({}, 'After how many seconds without progress a process is taken for stuck, by phase; it is named, and all end.')
    PEAK_TFLOPS: float | None = param(None, 'What one device can do in DTYPE, for perf/mfu; default known by the name of the GPU.', above=0)
    DETERMINISTIC: bool = param(False, 'Only algorithms that give the same bits on each run; slower on CUDA.')
    ALLOW_TF32: bool = param(True, 'Let CUDA use TF32 for float32 matrix products and convolutions.')
    USE_PL: bool = param(False, "PyTorch Lightning's Trainer turns the loop of training; steps, checkpoints and signals stay the solver's.")
    THREADS: int | None = param(None, 'Threads for work within one operation on the CPU; default cores / processes.', least=1)


class WorkEnv:
    """The one object called `we`. Before `launch` it describes a single process."""

    def __init__(self) -> None:
        self.rank, self.world_size, self.local_rank = 0, 1, 0
        self.launcher = 'single'
        self.seed = 2023
        self.debug = False
        self.peak_tflops: float | None = None     # of the device, where the config says it
        self.use_pl = False           # whether Lightning turns the loop
        self.stop_signal = 0          # the number of the signal that asked this process to stop
        self.defers_stop = False      # whether there is something to save first
        self._device: torch.device | None = None
        self._talk: Any = None        # the processes once more, over the CPU and in no hurry

    # ---------------------------------------------------------------- who am I
    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes: rank 0."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are other processes."""
        return self.world_size > 1

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        if self._device is None:
            self._device = _choose_device('auto', self.local_rank)
        return self._device

    @property
    def device_id(self) -> Any:
        """What .to() takes: the GPU's number, or the device where there is no CUDA."""
        return self.device.index or 0 if self.device.type == 'cuda' else self.device

    # ---------------------------------------------------------------- stopping
    @contextlib.contextmanager
    def saving_on_stop(self) -> Iterator[None]:
        """Inside, a first stop signal is noted in `stop_signal` and waits to be looked at; outside it ends the process at once."""
        if self.stop_signal:    # what it raised was lost on the way
            raise Stopped(self.stop_signal)
        self.defers_stop = True
        try:
            yield
        finally:
            self.defers_stop = False

    # ---------------------------------------------------------------- talking; each is free in a single process
    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Inside, whatever takes long is the doing of another process, where there are others (core/watch.py)."""
        return pulse.waiting() if self.is_distributed else contextlib.nullcontext()

    def barrier(self) -> None:
        """Until all are here, however long the main process writes or reads."""
        if self.is_distributed:
            import torch.distributed as dist
            with pulse.waiting():
                dist.barrier(self._talk)

    def all_reduce(self, value: Tensor, op: Literal['sum', 'mean', 'max', 'min'] = 'sum') -> Tensor:
        """The value, reduced over all processes, in place."""
        if self.is_distributed:
            import torch.distributed as dist
            with pulse.waiting():
                dist.all_reduce(value, {'max': dist.ReduceOp.MAX, 'min': dist.ReduceOp.MIN}.get(op, dist.ReduceOp.SUM))
            if op == 'mean':
                value /= self.world_size
        return value

    def any(self, flag: bool | int) -> int:
        """The largest of all processes' flags, so that all of them turn the same way."""
        if not self.is_distributed:
            return int(flag)
        import torch
        with pulse.waiting():      # on a GPU it is here that the host waits
            return int(self.all_reduce(torch.tensor(int(flag), device=self.device), 'max'))

    def broadcast(self, value: Any) -> Any:
        """The main process's value (anything plain), in every process."""
        if not self.is_distributed:
            return value
        import torch.distributed as dist
        box = [value]
        with pulse.waiting():
            dist.broadcast_object_list(box, src=0, group=self._talk)
        return box[0]

    def gather(self, value: Any, line: Any = None) -> list[Any]:
        """Every process's value (anything plain), in rank order, in every process."""
        if not self.is_distributed:
            return [value]
        import torch.distributed as dist
        values: list[Any] = [None] * self.world_size
        with pulse.waiting():
            dist.all_gather_object(values, value, group=line or self._talk)
        return values

    def new_line(self) -> Any:
        """The processes once more, over the CPU and in no hurry: for what is said in another thread. Every process asks for one."""
        if not self.is_distributed:
            return None
        import torch.distributed as dist
        return dist.new_group(backend='gloo', timeout=datetime.timedelta(seconds=LONG_TALK))


we = WorkEnv()


def seed_everything(*words: int | str) -> None:
    """Seed the generators of python, numpy and torch with a function of the words."""
    import numpy as np
    import torch

    from scepter.core import streams
    seed = streams.seed_global(*words)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)     # torch.manual_seed notes a call for a CUDA that may never come, at every step
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def guarded(main: Callable[[], None]) -> int:
    """Run main and answer the process's exit code: deliberate failures are a message, all others a traceback."""
    try:
        main()
    except ScepterError as error:
        begin = '' if isinstance(error, PeerError) else who()
        get_logger().error(begin + '\n'.join([str(error), *getattr(error, '__notes__', [])]))
        note_traceback()
        return error.exit_code
    except KeyboardInterrupt:
        if we.is_main:
            get_logger().error('stopped by Ctrl-C')
        return 130
    except Stopped as stop:
        if we.is_main:
            get_logger().error(f'stopped by {signal.Signals(stop.signal).name}')
        return 128 + stop.signal
    except Exit as end:
        return int(end.code or 0)
    except Exception:
        get_logger().exception(f'{who()}an error that should not happen')
        return 1
    return 0


def who() -> str:
    """How a line of an error begins: which process speaks, where there are several."""
    return f'rank {we.rank} on {socket.gethostname()}: ' if we.is_distributed else ''


class Stopped(BaseException):
    """The run was asked to stop, has saved what there was, and ends."""

    def __init__(self, signal_number: int):
        self.signal = signal_number
        super().__init__(f'stopped by signal {signal_number}')


class Exit(SystemExit):
    """A worker has already said what went wrong; the parent only answers its code."""


def _choose_device(wish: str, local_rank: int) -> torch.device:
    import torch
    if wish in ('auto', 'cuda') and torch.cuda.is_available():
        return torch.device('cuda', local_rank % torch.cuda.device_count())
    if wish in ('auto', 'mps') and torch.backends.mps.is_available():
        return torch.device('mps')
    if wish in ('auto', 'cpu'):
        return torch.device('cpu')
    raise ConfigError(f'ENV.DEVICE is {wish}, but torch sees no such device on this machine')
