"""How the processes of a run begin, hear signals, and end together.

    launch(cfg, fn)     # what we.init_env does: fn(cfg) in this process, or in one new process per device
"""
from __future__ import annotations

import ctypes
import datetime
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scepter.core.config import Config, ConfigError
from scepter.core.env import Env, Exit, Stopped, _choose_device, guarded, seed_everything, we
from scepter.core.errors import PeerError
from scepter.core.logger import get_logger

Task = Callable[[Config], None]


@dataclass(frozen=True)
class Place:
    """One process's place among those of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    here: int = 1                       # processes on this machine
    launcher: str = 'single'
    rendezvous: str | None = None       # where the processes meet


def launch(cfg: Config, fn: Task, launcher: str = 'spawn', debug: bool = False) -> None:
    """Call fn(cfg) in each process of the run, as WorkEnv.init_env promises."""
    env = Env(cfg.get('ENV', {}))
    if launcher == 'torchrun':
        if 'LOCAL_RANK' not in os.environ:
            get_logger().warning('--launcher torchrun, but torchrun did not start this process: running as a single one')
            _run(fn, cfg, env, Place(), debug)
            return
        rank, world_size, local_rank = (_count(name) for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'))
        _run(fn, cfg, env, Place(rank, world_size, local_rank, _count('LOCAL_WORLD_SIZE', 1), 'torchrun', 'env://'), debug)
        return
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        raise ConfigError('torchrun started this process, so it must not start others: add --launcher torchrun')
    machines, machine, here = _count('WORLD_SIZE', 1), _count('RANK', 0), _processes_here(env)
    if here < 1 or not 0 <= machine < machines:
        raise ConfigError(f'ENV.NPROC is {here}, and this is machine {machine} of {machines}: expected at least one process, '
                          'and RANK below WORLD_SIZE')
    if here * machines == 1:
        _run(fn, cfg, env, Place(), debug)
        return
    _spawn(fn, cfg, here, machine, machines, debug)


def _count(name: str, default: int | None = None) -> int:
    """A number that the launcher has put into the environment."""
    text = os.environ.get(name, default)
    if text is None or not str(text).isdecimal():
        raise ConfigError(f'{name} in the environment is {text!r}: expected a number')
    return int(text)


# ------------------------------------------------------------------------------------------------ one process
def _run(fn: Task, cfg: Config, env: Env, place: Place, debug: bool) -> None:
    import torch
    we.rank, we.world_size, we.local_rank, we.launcher = place.rank, place.world_size, place.local_rank, place.launcher
    we.seed, we.debug, we.stop_signal = env.SEED, debug, 0
    we._device = _choose_device(env.DEVICE, place.local_rank)
    _listen_for_stop()
    if env.THREADS or place.here > 1:   # N processes on M cores must not start N * M threads; torchrun's default of 1 is too few
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        torch.set_num_threads(env.THREADS or max(1, cores // place.here))
    if we.device.type == 'cuda':
        torch.cuda.set_device(we.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = env.ALLOW_TF32
        torch.backends.cudnn.benchmark = not env.DETERMINISTIC
    if env.DETERMINISTIC:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if we.is_distributed:
        import torch.distributed as dist
        if env.BACKEND == 'nccl' and we.device.type != 'cuda':
            raise ConfigError(f'ENV.BACKEND is nccl, which talks between GPUs, but ENV.DEVICE is {we.device.type}: use gloo')
        dist.init_process_group(env.BACKEND or ('nccl' if we.device.type == 'cuda' else 'gloo'), init_method=place.rendezvous,
                                rank=place.rank, world_size=place.world_size, timeout=datetime.timedelta(seconds=env.TIMEOUT))
    seed_everything(env.SEED, 'start')    # the same on every rank: networks begin equal
    try:
        fn(cfg)
    except RuntimeError as error:
        if we.is_distributed and _PEER_GONE.search(str(error)):
            raise PeerError(f'rank {we.rank}: another rank is gone or does not answer ({str(error).splitlines()[0][:200]})') from error
        raise
    finally:
        if we.is_distributed:
            dist.destroy_process_group()


_PEER_GONE = re.compile(r'closed by peer|reset by peer|connection refused|timed out|broken pipe|gloo/|nccl', re.IGNORECASE)


def _processes_here(env: Env) -> int:
    return _visible_devices(env.DEVICE) if env.NPROC is None else env.NPROC


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
def _spawn(fn: Task, cfg: Config, here: int, machine: int, machines: int, debug: bool) -> None:
    import multiprocessing
    context = multiprocessing.get_context('spawn')
    we.stop_signal = 0
    with tempfile.TemporaryDirectory(prefix='scepter-') as folder:
        if machines == 1:     # a file cannot collide with another job, as a fixed port can
            rendezvous = f'file://{folder}/rendezvous'
        else:
            rendezvous = f'tcp://{os.environ.get("MASTER_ADDR", "localhost")}:{os.environ.get("MASTER_PORT", "29500")}'
        places = [Place(machine * here + i, machines * here, i, here, 'spawn', rendezvous) for i in range(here)]
        processes = [context.Process(target=_worker, args=(fn, cfg, place, debug)) for place in places]

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


def _worker(fn: Task, cfg: Config, place: Place, debug: bool) -> None:
    if sys.platform == 'linux':     # when the parent is killed, so are we
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    sys.exit(guarded(lambda: _run(fn, cfg, Env(cfg.get('ENV', {})), place, debug)))
