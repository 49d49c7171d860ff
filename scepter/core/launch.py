"""How the processes of a run begin, hear signals, and end together.

    launch(cfg, run_task)     # run_task(cfg) in this process, or in one new process per device
"""
from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scepter.core.config import Config
from scepter.core.env import Env, Exit, Limits, Stopped, _choose_device, guarded, seed_everything, we
from scepter.core.errors import PeerError
from scepter.core.faults import ConfigError
from scepter.core.logger import get_logger
from scepter.core.signals import STOP_SIGNALS, Wish, handle_stop_signals, listening
from scepter.core.watch import Board, FolderBoard, StoreBoard, Watch

if TYPE_CHECKING:
    from torch.distributed import Store

FIRST_WORD, NEXT_WORD = 5.0, 30.0      # seconds of waiting for other processes until it is said, and said again

Task = Callable[[Config], None]


@dataclass(frozen=True)
class Place:
    """One process's place among those of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    here: int = 1                       # processes on this machine
    launcher: str = 'single'
    rendezvous: str = ''                # where the processes meet: a URL


def launch(cfg: Config, fn: Task, launcher: str = 'spawn', debug: bool = False) -> None:
    """Call fn(cfg) in each process of the run, and return when all have ended well.

    spawn: one process per device of this machine (in-process when that is one); WORLD_SIZE and RANK in the environment then count
    machines. torchrun: this process is one of many, as its environment says. Raises what fn raises; PeerError if a process died.
    """
    env = Env(cfg.get('ENV', {}))
    if launcher == 'torchrun':
        if 'LOCAL_RANK' not in os.environ:
            get_logger().warning('--launcher torchrun, but torchrun did not start this process: running as a single one')
            with listening():
                _run(fn, cfg, env, Place(), debug)
            return
        rank, world_size, local_rank = (_count(name) for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'))
        here = _count('LOCAL_WORLD_SIZE', 1)
        _refuse_crowding(env, here)
        with listening():
            _run(fn, cfg, env, Place(rank, world_size, local_rank, here, 'torchrun', 'env://'), debug)
        return
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        raise ConfigError('torchrun started this process, so it must not start others: add --launcher torchrun')
    machines, machine, here = _count('WORLD_SIZE', 1), _count('RANK', 0), _processes_here(env)
    if here < 1 or not 0 <= machine < machines:
        raise ConfigError(f'ENV.NPROC is {here}, and this is machine {machine} of {machines}: expected at least one process, '
                          'and RANK below WORLD_SIZE')
    if here * machines == 1:
        with listening():
            _run(fn, cfg, env, Place(), debug)
        return
    _refuse_crowding(env, here)
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
    we.seed, we.debug, we.use_pl, we.peak_tflops = env.SEED, debug, env.USE_PL, env.PEAK_TFLOPS
    we._device = _choose_device(env.DEVICE, place.local_rank)
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
    if not faulthandler.is_enabled():
        faulthandler.enable()           # a crash in native code shows where
    limits = {name.lower(): getattr(env.LIMITS, name) for name in vars(Limits) if name.isupper()}
    watch = Watch(limits, place.rank, place.world_size, has_launcher=place.launcher == 'torchrun')
    try:
        with _ends_told(watch):
            if we.is_distributed:
                watch.board = _connect(place, env)
            watch.start()
            seed_everything(env.SEED, 'start')    # the same on every rank: networks begin equal
            fn(cfg)
    finally:
        _disconnect()


_PEER_GONE = re.compile(r'closed by peer|reset by peer|connection refused|timed out|broken pipe|gloo/|nccl', re.IGNORECASE)


@contextlib.contextmanager
def _ends_told(watch: Watch) -> Iterator[None]:
    """Tell the others how this process ends, and turn what talking to one that is gone raises into a PeerError that names it."""
    told: BaseException | None = None
    try:
        try:
            yield
        except Exit:
            raise
        except SystemExit as end:
            told = RuntimeError(f'sys.exit({end.code!r}) was called in the midst of the run')
            raise told from end
        except RuntimeError as error:
            if not we.is_distributed or not _PEER_GONE.search(str(error)):
                raise
            story, is_first = watch.explain()
            if not is_first:
                get_logger().info(story)
                raise Exit(PeerError.exit_code) from error
            raise PeerError(story or f'rank {we.rank}: another rank is gone or does not answer '
                                     f'({str(error).splitlines()[0][:200]})') from error
    except Stopped as stop:
        story, is_first = watch.explain(0.05) if watch.parent else ('', False)
        if story and is_first:      # torchrun stops the others as soon as one is gone, wherever they are by then
            raise PeerError(story) from stop
        raise
    except (Exit, KeyboardInterrupt, PeerError):
        raise
    except BaseException as error:
        told = error
        raise
    finally:
        watch.close(told)


def _processes_here(env: Env) -> int:
    return _visible_devices(env.DEVICE) if env.NPROC is None else env.NPROC


def _refuse_crowding(env: Env, here: int) -> None:
    """Raise ConfigError where so many processes of this machine have no GPU each, but need one."""
    import torch
    gpus = torch.cuda.device_count()
    if gpus and here > gpus and env.DEVICE in ('auto', 'cuda') and env.BACKEND != 'gloo':
        raise ConfigError(f'{here} processes on this machine, but {gpus} GPU{"s" * (gpus > 1)}: NCCL wants one for each. '
                          f'Start {gpus} (ENV.NPROC, --nproc_per_node), or share them with ENV.BACKEND=gloo')
    _choose_device(env.DEVICE, 0)


def _visible_devices(wish: str) -> int:
    import torch
    return max(1, torch.cuda.device_count()) if wish in ('auto', 'cuda') else 1


# ------------------------------------------------------------------------------------------------ finding one another
def _connect(place: Place, env: Env) -> Board:
    """Join the processes of the run; where they leave word for one another. Raises PeerError where some do not come within ENV.TIMEOUT."""
    import torch.distributed as dist
    if env.BACKEND == 'nccl' and we.device.type != 'cuda':
        raise ConfigError(f'ENV.BACKEND is nccl, which talks between GPUs, but ENV.DEVICE is {we.device.type}: use gloo')
    timeout = datetime.timedelta(seconds=env.TIMEOUT)
    try:
        store = _meet(place, env.TIMEOUT)
        dist.init_process_group(env.BACKEND or ('nccl' if we.device.type == 'cuda' else 'gloo'), store=store, rank=place.rank,
                                world_size=place.world_size, timeout=timeout)
        we._talk = we.new_line()
        scheme, _, address = place.rendezvous.partition('://')
        return FolderBoard(Path(address).parent) if scheme == 'file' else StoreBoard(store)
    except RuntimeError as error:    # of torch's own classes and without
        raise PeerError(f'rank {place.rank} cannot join the others at {place.rendezvous} ({str(error).splitlines()[0][:200]})') from error


def _disconnect() -> None:
    we._talk = None
    if we.is_distributed:
        import torch.distributed as dist
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(place: Place, timeout: float) -> Store:
    """The store through which all processes find one another, once all are there; tells meanwhile whom it waits for.

    Below torchrun the store outlives processes that were killed and holds what they had put there. So each rank calls with a word of its
    own, rank 0 answers all with one of its own, and whoever has that answer signs below it: what is signed by all is an attempt whose
    processes are alive. Every wait is one of Python's, so that a stop signal ends it. Raises PeerError after `timeout` seconds.
    """
    import torch.distributed as dist
    waiting, mine = _Waiting(place, timeout), uuid.uuid4().hex
    store = _store(place, timeout, waiting)
    store.set(f'scepter/{place.rank}', mine)
    while True:
        for rank in range(place.world_size) if place.rank == 0 else []:
            if store.check([f'scepter/{rank}']):
                store.set(f'scepter/{store.get(f"scepter/{rank}").decode()}', mine)
        missing = [0]
        if store.check([f'scepter/{mine}']):
            attempt = store.get(f'scepter/{mine}').decode()
            store.set(f'scepter/{attempt}/{place.rank}', socket.gethostname())
            missing = [rank for rank in range(place.world_size) if not store.check([f'scepter/{attempt}/{rank}'])]
            if not missing:
                return dist.PrefixStore(attempt, store)
        waiting.go_on('rank ' + ', '.join(map(str, missing[:8])) + ' ...' * (len(missing) > 8))


def _store(place: Place, timeout: float, waiting: _Waiting) -> Store:
    import torch.distributed as dist
    scheme, _, address = place.rendezvous.partition('://')
    limit = datetime.timedelta(seconds=timeout)
    if scheme == 'env':                  # torchrun has brought all machines together and keeps a store
        return next(iter(dist.rendezvous(place.rendezvous, timeout=limit)))[0]
    if scheme == 'file':
        return dist.FileStore(address, place.world_size)
    host, _, port = address.rpartition(':')
    while place.rank and not _is_open(host, int(port)):
        waiting.go_on('machine 0 (MASTER_ADDR, MASTER_PORT)')
    return dist.TCPStore(host, int(port), place.world_size, is_master=place.rank == 0, timeout=limit, wait_for_workers=False)


def _is_open(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


class _Waiting:
    """Says on each machine whom a rendezvous waits for, and ends it."""

    def __init__(self, place: Place, timeout: float):
        self.place, self.timeout = place, timeout
        self.begin = time.monotonic()
        self.next_word = FIRST_WORD

    def go_on(self, missing: str) -> None:
        waited = time.monotonic() - self.begin
        where = f'of {self.place.world_size} at {self.place.rendezvous}'
        if waited >= self.timeout:
            raise PeerError(f'rank {self.place.rank} waited {waited:.0f} s (ENV.TIMEOUT) for {missing} {where}: is it running there, with '
                            'the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and does no firewall stand between?')
        if waited >= self.next_word and self.place.local_rank == 0:
            self.next_word += NEXT_WORD
            get_logger().warning(f'waiting for {missing} {where}; given up after {self.timeout:g} s (ENV.TIMEOUT)')
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------ many processes
def _spawn(fn: Task, cfg: Config, here: int, machine: int, machines: int, debug: bool) -> None:
    context = multiprocessing.get_context('spawn')
    with tempfile.TemporaryDirectory(prefix='scepter-') as folder:
        if machines == 1:     # a file cannot collide with another job, as a fixed port can
            rendezvous = f'file://{folder}/rendezvous'
        else:
            rendezvous = f'tcp://{os.environ.get("MASTER_ADDR", "localhost")}:{os.environ.get("MASTER_PORT", "29500")}'
        places = [Place(machine * here + i, machines * here, i, here, 'spawn', rendezvous) for i in range(here)]
        pipes = [context.Pipe(duplex=False) for _ in places]
        processes = [context.Process(target=_worker, args=(fn, cfg, place, debug, ours)) for place, (ours, _) in zip(places, pipes)]
        with _passing_on([theirs for _, theirs in pipes]) as wish:
            try:
                _start(processes)
                _wait(processes, machine * here, wish, FolderBoard(Path(folder)))
            finally:
                for process in processes:
                    if process.is_alive():
                        process.kill()
                    if process.pid:
                        process.join()


def _start(processes: list) -> None:
    # these reach a new process before it can listen; held back until then, Ctrl-C does not become a traceback. multiprocessing's
    # resource tracker, which starts along, ignores the others but would die of SIGHUP
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [n for n in STOP_SIGNALS if n != signal.SIGTERM])
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _passing_on(pipes: list[Connection]) -> Iterator[Wish]:
    """Inside, what this process is asked by signals goes on through the pipes; yields what it was asked."""
    wish = Wish()
    we.stop_signal = 0

    def pass_on(number: int, frame: Any) -> None:
        meaning = wish.hear(number)
        we.stop_signal = wish.number
        for pipe in pipes if meaning != 'echo' else []:
            with contextlib.suppress(OSError):    # it has ended already
                pipe.send((number, meaning == 'now'))

    before = handle_stop_signals(pass_on) if threading.current_thread() is threading.main_thread() else {}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for pipe in pipes:
            pipe.close()


def _wait(processes: list, first_rank: int, wish: Wish, board: Board) -> None:
    """Until all have ended; one that fails ends the others. Raises Exit with the code of the first that failed."""
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes) and not wish.is_second:
        time.sleep(0.02)
    for rank, process in enumerate(processes, first_rank):
        number = -(process.exitcode or 0)
        if number > 0 and not (wish.number and number in STOP_SIGNALS):
            story = (f'rank {rank} on {socket.gethostname()} (pid {process.pid}) was killed by {signal.Signals(number).name}'
                     + (': was the machine out of memory?' if number == signal.SIGKILL else ''))
            if board.decide(story):
                get_logger().error(story)
    # a rank that fails takes its peers along through the collective: give them time to say so, and after a signal to save
    grace = time.monotonic() + (60 if wish.number and not wish.is_second else 1.2 if wish.is_second else 3)
    while any(p.is_alive() for p in processes) and time.monotonic() < grace:
        time.sleep(0.02)
    if wish.is_second and any(p.is_alive() for p in processes):
        raise Exit(128 + wish.number)
    failed = [(p.exitcode, first_rank + i) for i, p in enumerate(processes) if p.exitcode]
    if not failed:
        return
    codes = [128 - code if code < 0 else code for code, _ in failed]     # a signal that came before a rank could listen for it
    if codes[0] > 128 and set(codes) == {codes[0]} and (wish.number or failed[0][0] > 0):
        raise Exit(codes[0])
    if any(code < 0 for code, _ in failed):
        raise Exit(PeerError.exit_code)
    raise Exit(next((code for code in codes if code != PeerError.exit_code), PeerError.exit_code))


def _worker(fn: Task, cfg: Config, place: Place, debug: bool, parent: Connection) -> None:
    def run() -> None:
        with listening(parent):
            _run(fn, cfg, Env(cfg.get('ENV', {})), place, debug)

    sys.exit(guarded(run))
