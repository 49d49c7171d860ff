"""Worker processes that read ahead, and that may die without taking the training with them.

Each worker has a pipe of its own and answers its jobs in their order; job j goes to worker j modulo their number, so batches come in
the order of the stream. A dead worker is seen at once by its sentinel, and only its own jobs are handed out again. An answer is one
file descriptor of memory that outlives its writer, so main never waits for a process that is dead or stopped.

torch's DataLoader cannot promise this: it raises from a signal handler in the midst of an optimizer step when a worker dies, its
workers share a queue whose lock dies with its holder, they fetch tensors from one another's live processes, and it ends them by
SIGTERM, which ours ignore.
"""
from __future__ import annotations

import io
import logging
import math
import mmap
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import get_context, reduction, util
from multiprocessing.connection import Connection, wait
from typing import IO, Any

import torch
from torch import Tensor

from scepter.core import pulse
from scepter.core.errors import DataError
from scepter.core.signals import STOP_SIGNALS

MAX_RESTARTS, PERIOD = 3, 3600.0    # so many within so many seconds: a run of weeks may see a few
SLICE = 10.0      # seconds of a wait after which it is said that it goes on
ALIGNMENT = 64    # bytes; vector instructions want it

# A fork has the dataset and the user's registered components without pickling either, and starts in milliseconds. It is safe here:
# workers neither touch a GPU nor use more than one thread. Elsewhere than on Linux, system libraries do not survive a fork.
_context: Any = get_context('fork' if sys.platform == 'linux' else 'spawn')


class Workers(Iterator[Any]):
    """read(job) for each of the jobs, in their order, computed ahead in `number` processes.

    Raises what `read` raised, and DataError when workers have died more than MAX_RESTARTS times within PERIOD seconds.
    """

    def __init__(self, read: Callable[[Any], Any], jobs: Iterator[Any], number: int, *, prefetch: int, timeout: float,
                 logger: logging.Logger):
        self.read, self.jobs, self.timeout, self.logger = read, jobs, timeout, logger
        self.restarts: deque[float] = deque()     # when they were
        self.pending: deque[tuple[int, Any]] = deque()     # (worker, job), oldest first
        self.depth = number * max(1, prefetch)
        self.workers: list[tuple[Any, Connection]] = [self._start() for _ in range(number)]
        self.turn = 0
        # with a priority, so that it runs at exit before multiprocessing itself waits for its children
        self._finalizer = util.Finalize(self, _stop, args=(self.workers,), exitpriority=10)

    def __next__(self) -> Any:
        while len(self.pending) < self.depth and (job := next(self.jobs, None)) is not None:
            self._send(self.turn, job)
            self.pending.append((self.turn, job))
            self.turn = (self.turn + 1) % len(self.workers)
        if not self.pending:
            raise StopIteration
        while (answer := self._receive(self.pending[0][0])) is None:
            self._restart(self.pending[0][0])
        self.pending.popleft()
        kind, value = answer
        if kind == 'error':
            error, text = value
            raise error from _InWorker(text)
        return value

    def close(self) -> None:
        """Stop the processes. They hold nothing that would need to be saved."""
        self._finalizer()

    def _send(self, worker: int, job: Any) -> None:
        try:
            self.workers[worker][1].send(job)
        except OSError:    # it is dead: noticed, and handed out again, when its answer is due
            pass

    def _receive(self, worker: int) -> tuple[str, Any] | None:
        """The worker's next answer, or None where it died or is stuck."""
        process, pipe = self.workers[worker]
        end = time.monotonic() + self.timeout
        while not (ready := wait([pipe, process.sentinel], min(SLICE, max(0.0, end - time.monotonic())))) and time.monotonic() < end:
            pulse.beat()      # TIMEOUT is the limit of this wait, and no other
        if pipe not in ready:
            return None
        try:
            return unpack(reduction.recv_handle(pipe))
        except (EOFError, OSError):    # its end of the pipe is closed
            return None

    def _restart(self, worker: int) -> None:
        process, _ = self.workers[worker]
        is_stuck = process.is_alive() and not wait([process.sentinel], 0.5)
        _stop([self.workers[worker]])
        end = f'did not answer for {self.timeout:g} s' if is_stuck else _spell_exit(process.exitcode)
        job = next(j for w, j in self.pending if w == worker)
        story = (f'loader worker {worker} (pid {process.pid}) {end} while it read {job}. The usual cause is memory (RAM): the system '
                 'ends the largest process when it runs out (OOM). Lower NUM_WORKERS, PREFETCH or BATCH_SIZE'
                 + ', or raise TIMEOUT' * is_stuck)
        now = time.monotonic()
        while self.restarts and now - self.restarts[0] > PERIOD:
            self.restarts.popleft()
        if len(self.restarts) == MAX_RESTARTS:
            raise DataError(f'{story}. It is the {MAX_RESTARTS + 1}th time within {PERIOD / 60:g} minutes: given up')
        self.restarts.append(now)
        self.logger.warning(f'{story}. Started again at the same place ({len(self.restarts)} of {MAX_RESTARTS} in {PERIOD / 60:g} minutes)')
        self.workers[worker] = self._start()
        for w, pending in self.pending:
            if w == worker:
                self._send(worker, pending)

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_work, args=(theirs, ours, self.read), daemon=True, name='scepter-loader')
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)    # inherited, until the worker has learnt to ignore them
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        return process, ours


def _work(pipe: Connection, parents_end: Connection, read: Callable[[Any], Any]) -> None:
    """A worker's life: jobs in, answers out, until it is killed or its parent is gone."""
    signal.set_wakeup_fd(-1)    # the trainer's
    for number in STOP_SIGNALS:    # sent to the whole group; the trainer needs its batches until it has saved
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)                         # N workers must not start N x cores threads; and threads do not survive a fork
    parents_end.close()
    parent = os.getppid()
    try:
        while True:
            while not pipe.poll(1):
                if os.getppid() != parent:           # killed: a sibling's copy of its end keeps the pipe open
                    return
            job = pipe.recv()
            try:
                answer = ('value', read(job))
            except Exception as error:
                answer = ('error', _portable(error))
            with pack(answer) as file:
                reduction.send_handle(pipe, file.fileno(), parent)
    except (EOFError, OSError):
        return


def pack(answer: Any) -> IO[bytes]:
    """An open, nameless file in memory: the answer's tensors as they are, then a pickle of all the rest, then its length.

    The memory is the file's own, so it needs no room in /dev/shm, which containers keep small.
    """
    file = os.fdopen(os.memfd_create('batch'), 'w+b') if sys.platform == 'linux' else tempfile.TemporaryFile()
    rest = io.BytesIO()
    _Packer(rest, file).dump(answer)
    file.write(rest.getvalue() + len(rest.getvalue()).to_bytes(8, 'little'))
    file.flush()
    return file


def unpack(descriptor: int) -> Any:
    """What was packed into the file; its tensors lie in the file's memory, which is freed with the last of them."""
    with os.fdopen(descriptor, 'rb') as file:
        memory = mmap.mmap(file.fileno(), 0)
    length = int.from_bytes(memory[-8:], 'little')
    return _Unpacker(io.BytesIO(memory[-8 - length:-8]), memory).load()


class _Packer(pickle.Pickler):
    """Puts tensors into a file of their own and leaves (dtype, shape, place) where they were."""

    def __init__(self, rest: IO[bytes], file: IO[bytes]):
        super().__init__(rest, protocol=5)
        self.file = file

    def persistent_id(self, obj: Any) -> tuple[torch.dtype, tuple[int, ...], int] | None:
        if not isinstance(obj, Tensor):
            return None
        self.file.write(bytes(-self.file.tell() % ALIGNMENT))
        place = self.file.tell()
        self.file.write(obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return obj.dtype, tuple(obj.shape), place


class _Unpacker(pickle.Unpickler):
    """The way back. What it reads was written by our own worker."""

    def __init__(self, rest: IO[bytes], memory: mmap.mmap):
        super().__init__(rest)
        self.memory = memory

    def persistent_load(self, pid: tuple[torch.dtype, tuple[int, ...], int]) -> Tensor:
        dtype, shape, place = pid
        if not (count := math.prod(shape)):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=place).reshape(shape)


def _portable(error: Exception) -> tuple[Exception, str]:
    """The error as it is where it survives a pipe, else its text; and the traceback, which does not."""
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
    except Exception:    # an exception may ask for any arguments
        error = RuntimeError(f'{type(error).__name__}: {error}')
    return error, text


class _InWorker(Exception):
    """The traceback of the process in which an error arose."""

    def __str__(self) -> str:
        return f'in a loader worker:\n{self.args[0]}'


def _stop(workers: list[tuple[Any, Connection]]) -> None:
    for process, pipe in workers:
        process.kill()
        pipe.close()
    for process, _ in workers:
        process.join()


def _spell_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f'was killed by {signal.Signals(-code).name}'
    return f'ended with code {code}'
