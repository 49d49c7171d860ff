"""`we`: which process this is, on which device, and how the processes of a run begin, talk and end.

    we.init_env(cfg, run_task)     # calls run_task(cfg) in this process, or in one new process per device
"""
from __future__ import annotations

import ctypes
import datetime
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from scepter.core.config import Config, ConfigError
from scepter.core.errors import PeerError, ScepterError
from scepter.core.logger import get_logger, note_traceback
from scepter.core.schema import Component, param

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Env(Component):
    """The section ENV of a config: what differs between machines."""

    SEED: int = param(2023, 'Every random draw of training is a function of this seed and the number of the sample.', least=0)
    DEVICE: Literal['auto', 'cuda', 'mps', 'cpu'] = param('auto', 'Where to compute; auto takes CUDA, else MPS, else the CPU.')
    NPROC: int | None = param(None, 'Processes on this machine in spawn mode; default one per visible GPU, else one.', least=1)
    BACKEND: Literal['nccl', 'gloo'] | None = param(None, 'How processes talk; default nccl with CUDA, else gloo.')
    TIMEOUT: float = param(300.0, 'Seconds after which a process that does not answer is taken for lost.', above=0)
    DETERMINISTIC: bool = param(False, 'Only algorithms that give the same bits on each run; slower on CUDA.')
    ALLOW_TF32: bool = param(True, 'Let CUDA use TF32 for float32 matrix products and convolutions.')
    THREADS: int | None = param(None, 'Threads for work within one operation on the CPU; default cores / processes.', least=1)


class WorkEnv:
    """The one object called `we`. Before init_env it describes a single process."""

    def __init__(self) -> None:
        self.rank, self.world_size, self.local_rank = 0, 1, 0
        self.launcher = 'single'
        self.seed = 2023
        self.debug = False
        self.stop_signal = 0          # the number of the signal that asked this process to stop
        self._device: torch.device | None = None

    # ---------------------------------------------------------------- who am I
    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    @property
    def device(self) -> torch.device:
        if self._device is None:
            self._device = _choose_device('auto', self.local_rank)
        return self._device

    @property
    def device_id(self) -> Any:
        """What .to() takes: the GPU's number, or the device where there is no CUDA."""
        return self.device.index or 0 if self.device.type == 'cuda' else self.device

    # ---------------------------------------------------------------- beginning
    def init_env(self, cfg: Config, fn: Callable[[Config], None], launcher: str = 'spawn', debug: bool = False) -> None:
        """Call fn(cfg) in each process of the run, and return when all have ended well.

        spawn: one process per device of this machine (in-process when that is one); WORLD_SIZE and RANK in the environment then count
        machines. torchrun: this process is one of many, as its environment says. Raises what fn raises; PeerError if a process died.
        """
        env = Env(cfg.get('ENV', {}))
        self.debug = debug
        if launcher == 'torchrun':
            if 'LOCAL_RANK' not in os.environ:
                get_logger().warning('--launcher torchrun, but torchrun did not start this process: running as a single one')
                _run(fn, cfg, env, 0, 1, 0, 'single', None, debug)
                return
            rank, world_size, local_rank = (_count(name) for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'))
            _run(fn, cfg, env, rank, world_size, local_rank, 'torchrun', 'env://', debug)
            return
        if 'TORCHELASTIC_RUN_ID' in os.environ:
            raise ConfigError('torchrun started this process, so it must not start others: add --launcher torchrun')
        machines, machine, here = _count('WORLD_SIZE', 1), _count('RANK', 0), _processes_here(env)
        if here < 1 or not 0 <= machine < machines:
            raise ConfigError(f'ENV.NPROC is {here}, and this is machine {machine} of {machines}: expected at least one process, '
                              'and RANK below WORLD_SIZE')
        if here * machines == 1:
            _run(fn, cfg, env, 0, 1, 0, 'single', None, debug)
            return
        _spawn(fn, cfg, here, machine, machines, debug)

    # ---------------------------------------------------------------- talking; each is free in a single process
    def barrier(self) -> None:
        if self.is_distributed:
            import torch.distributed as dist
            dist.barrier()

    def all_reduce(self, value: Tensor, op: Literal['sum', 'mean', 'max', 'min'] = 'sum') -> Tensor:
        """The value, reduced over all processes, in place."""
        if self.is_distributed:
            import torch.distributed as dist
            dist.all_reduce(value, {'max': dist.ReduceOp.MAX, 'min': dist.ReduceOp.MIN}.get(op, dist.ReduceOp.SUM))
            if op == 'mean':
                value /= self.world_size
        return value

    def any(self, flag: bool | int) -> int:
        """The largest of all processes' flags, so that all of them turn the same way."""
        if not self.is_distributed:
            return int(flag)
        import torch
        return int(self.all_reduce(torch.tensor(int(flag), device=self.device), 'max'))

    def broadcast(self, value: Any) -> Any:
        """The main process's value (anything plain), in every process."""
        if not self.is_distributed:
            return value
        import torch.distributed as dist
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == 'cuda' else None)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value (anything plain), in rank order, in every process."""
        if not self.is_distributed:
            return [value]
        import torch.distributed as dist
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


we = WorkEnv()


def seed_everything(*words: int | str) -> None:
    """Seed the generators of python, numpy and torch with a function of the words."""
    import numpy as np
    import torch

    from scepter.core import streams
    seed = streams.seed_global(*words)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def guarded(main: Callable[[], None]) -> int:
    """Run main and answer the process's exit code: deliberate failures are a message, all others a traceback."""
    try:
        main()
    except ScepterError as error:
        get_logger().error('\n'.join([str(error), *getattr(error, '__notes__', [])]))
        note_traceback()
        return error.exit_code
    except KeyboardInterrupt:
        get_logger().error('stopped by Ctrl-C')
        return 130
    except Stopped as stop:
        return 128 + stop.signal
    except Exit as end:
        return int(end.code or 0)
    except Exception:
        get_logger().exception('an error that should not happen')
        return 1
    return 0


class Stopped(BaseException):
    """The run was asked to stop, has saved, and ends."""

    def __init__(self, signal_number: int):
        self.signal = signal_number
        super().__init__(f'stopped by signal {signal_number}')


# ------------------------------------------------------------------------------------------------ one process
def _run(fn: Callable[[Config], None], cfg: Config, env: Env, rank: int, world_size: int, local_rank: int, launcher: str,
         rendezvous: str | None, debug: bool) -> None:
    import torch
    we.rank, we.world_size, we.local_rank, we.launcher, we.seed, we.debug = rank, world_size, local_rank, launcher, env.SEED, debug
    we._device = _choose_device(env.DEVICE, local_rank)
    we.stop_signal = 0
    _listen_for_stop()
    here = _count('LOCAL_WORLD_SIZE', 1) if launcher == 'torchrun' else _processes_here(env) if launcher == 'spawn' else 1
    if env.THREADS or here > 1:   # N processes on M cores must not start N * M threads; torchrun's default of 1 is too few
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        torch.set_num_threads(env.THREADS or max(1, cores // here))
    if we.device.type == 'cuda':
        torch.cuda.set_device(we.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = env.ALLOW_TF32
        torch.backends.cudnn.benchmark = not env.DETERMINISTIC
    if env.DETERMINISTIC:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if world_size > 1:
        import torch.distributed as dist
        if env.BACKEND == 'nccl' and we.device.type != 'cuda':
            raise ConfigError(f'ENV.BACKEND is nccl, which talks between GPUs, but ENV.DEVICE is {we.device.type}: use gloo')
        dist.init_process_group(env.BACKEND or ('nccl' if we.device.type == 'cuda' else 'gloo'), init_method=rendezvous, rank=rank,
                                world_size=world_size, timeout=datetime.timedelta(seconds=env.TIMEOUT))
    seed_everything(env.SEED, 'start')    # the same on every rank: networks begin equal
    try:
        fn(cfg)
    except RuntimeError as error:
        if world_size > 1 and _PEER_GONE.search(str(error)):
            raise PeerError(f'rank {rank}: another rank is gone or does not answer ({str(error).splitlines()[0][:200]})') from error
        raise
    finally:
        if world_size > 1:
            dist.destroy_process_group()


_PEER_GONE = re.compile(r'closed by peer|reset by peer|connection refused|timed out|broken pipe|gloo/|nccl', re.IGNORECASE)


def _count(name: str, default: int | None = None) -> int:
    """A number that the launcher has put into the environment."""
    text = os.environ.get(name, default)
    if text is None or not str(text).isdecimal():
        raise ConfigError(f'{name} in the environment is {text!r}: expected a number')
    return int(text)


def _processes_here(env: Env) -> int:
    return _visible_devices(env.DEVICE) if env.NPROC is None else env.NPROC


def _choose_device(wish: str, local_rank: int) -> torch.device:
    import torch
    if wish in ('auto', 'cuda') and torch.cuda.is_available():
        return torch.device('cuda', local_rank % torch.cuda.device_count())
    if wish in ('auto', 'mps') and torch.backends.mps.is_available():
        return torch.device('mps')
    if wish in ('auto', 'cpu'):
        return torch.device('cpu')
    raise ConfigError(f'ENV.DEVICE is {wish}, but torch sees no such device on this machine')


def _visible_devices(wish: str) -> int:
    import torch
    return max(1, torch.cuda.device_count()) if wish in ('auto', 'cuda') else 1


def _listen_for_stop() -> None:
    """First SIGTERM or Ctrl-C: finish the step, save, end. The second ends at once."""
    def on_signal(number: int, frame: Any) -> None:
        if we.stop_signal:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)
        we.stop_signal = number

    try:
        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)
    except ValueError:    # not the main thread: its owner handles signals
        pass


# ------------------------------------------------------------------------------------------------ many processes
def _spawn(fn: Callable[[Config], None], cfg: Config, here: int, machine: int, machines: int, debug: bool) -> None:
    import multiprocessing
    context = multiprocessing.get_context('spawn')
    we.stop_signal = 0
    with tempfile.TemporaryDirectory(prefix='scepter-') as folder:
        if machines == 1:     # a file cannot collide with another job, as a fixed port can
            rendezvous = f'file://{folder}/rendezvous'
        else:
            rendezvous = f'tcp://{os.environ.get("MASTER_ADDR", "localhost")}:{os.environ.get("MASTER_PORT", "29500")}'
        processes = [context.Process(target=_worker, args=(fn, cfg, machine * here + i, machines * here, i, rendezvous, debug))
                     for i in range(here)]

        def pass_on(number: int, frame: Any) -> None:
            we.stop_signal = number
            for process in processes if number == signal.SIGTERM else []:    # the terminal sends Ctrl-C to the children itself
                if process.pid and process.is_alive():
                    os.kill(process.pid, number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for process in processes:
                process.start()
            _wait(processes, machine * here)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid:
                    process.join()


def _wait(processes: list, first_rank: int) -> None:
    """Until all have ended; one that fails ends the others. Raises PeerError, or Exit with the code of the first that failed."""
    while any(p.is_alive() for p in processes):
        if any(p.exitcode for p in processes):
            break
        time.sleep(0.02)
    # a rank that fails takes its peers along through the collective: give them time to say so, and after a signal to save
    grace = time.monotonic() + (60 if we.stop_signal else 3)
    while any(p.is_alive() for p in processes) and time.monotonic() < grace:
        time.sleep(0.02)
    failed = [(p.exitcode, first_rank + i) for i, p in enumerate(processes) if p.exitcode]
    if not failed:
        return
    codes = [128 - code if code < 0 else code for code, _ in failed]     # a signal that came before a rank could listen for it
    if codes[0] > 128 and set(codes) == {codes[0]} and (we.stop_signal or failed[0][0] > 0):
        raise Stopped(codes[0] - 128)
    for code, rank in failed:
        if code < 0:
            raise PeerError(f'rank {rank} was killed by {signal.Signals(-code).name}'
                            + (': was the machine out of memory?' if code == -signal.SIGKILL else ''))
    raise Exit(next((code for code in codes if code != PeerError.exit_code), PeerError.exit_code))


class Exit(SystemExit):
    """A worker has already said what went wrong; the parent only answers its code."""


def _worker(fn: Callable[[Config], None], cfg: Config, rank: int, world_size: int, local_rank: int, rendezvous: str, debug: bool) -> None:
    if sys.platform == 'linux':     # when the parent is killed, so are we
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    sys.exit(guarded(lambda: _run(fn, cfg, Env(cfg.get('ENV', {})), rank, world_size, local_rank, 'spawn', rendezvous, debug)))
