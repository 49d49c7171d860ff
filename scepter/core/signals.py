"""How a process hears that it should stop, and what it does then.

SIGTERM, SIGHUP and Ctrl-C ask for the same. Where there is something to save (`we.saving_on_stop()`) the first one lets the step end and
be saved, and a second one ends the process at once; everywhere else the first one does. One wish often comes as several signals: timeout
and torchrun signal a process and then its group, a terminal signals all of them, within milliseconds. So what arrives within ECHO seconds
is the same wish, by the clock of the thread that hears it at once: Python runs a handler only when the main thread is back from wherever
it is. A process that another one has started hears of its parent's through a pipe, where it cannot be taken for a second one.
"""
from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from scepter.core.env import Stopped, we
from scepter.core.logger import get_logger

STOP_SIGNALS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP') if hasattr(signal, name))
ECHO = 1.0     # seconds within which a signal repeats the one before it
GRACE = 5.0    # seconds to tidy up in, when a process is to end at once; it may be waiting where Python cannot interrupt it
SHORT_GRACE = 1.0     # ... after a second wish


class Wish:
    """What has been asked of this process so far."""

    def __init__(self) -> None:
        self.number = 0          # of the first signal
        self.is_second = False   # whether it was asked twice
        self.is_urgent = False   # whether the next signal is a second one, however soon it comes
        self._heard = 0.0

    def hear(self, number: int) -> Literal['stop', 'now', 'echo']:
        """What a signal means: the first wish to stop, a second one, or the first once more."""
        if self.number and not self.is_repeated:
            return 'echo'
        self.is_second, self.is_urgent = self.is_repeated, False
        self.number, self._heard = self.number or number, time.monotonic()
        return 'now' if self.is_second else 'stop'

    @property
    def is_repeated(self) -> bool:
        """Whether a signal that comes at this moment asks a second time."""
        return self.is_urgent or (bool(self.number) and time.monotonic() - self._heard >= ECHO)


@contextmanager
def listening(parent: Connection | None = None) -> Iterator[None]:
    """Inside, this process hears stop signals, and what the process that started it passes on; it dies with that process.

    In another thread than the main one nothing is done: its owner handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    we.stop_signal = 0
    listener = _Listener(parent)
    listener.start()
    before = handle_stop_signals(listener.handle)
    wakeup = signal.set_wakeup_fd(listener.writer, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)    # blocked by the parent until now
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        listener.close()


def handle_stop_signals(handler: Any) -> dict[signal.Signals, Any]:
    """Set the handler of all stop signals but those that are to be ignored (nohup), and answer the ones before."""
    heard = [n for n in STOP_SIGNALS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


class _Listener(threading.Thread):
    """Python runs a handler only once the main thread is back in Python. This thread sees to the rest: it hears the parent, and
    ends the process where the main thread does not come back."""

    def __init__(self, parent: Connection | None):
        super().__init__(name='scepter-signals', daemon=True)
        self.parent, self.wish, self.closed = parent, Wish(), threading.Event()
        self.done, self.seen = 0, 0       # how often the main thread, and this one, has taken up that it was asked
        self.lock = threading.RLock()     # a handler may interrupt a handler
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        os.set_blocking(self.reader, False)

    @property
    def asked(self) -> int:
        """How often this process was asked to end: 0, 1, or 2 for more than once."""
        return 2 if self.wish.is_second else min(1, self.wish.number)

    def handle(self, number: int, frame: Any) -> None:
        """In the main thread: note the wish, or raise. It may come long after the signal, which has been heard by then."""
        self._hear()
        if self.done == self.asked:
            return
        self.done = self.asked
        os.write(self.writer, b'\0')      # this thread sees to it as well
        if self.done == 1:
            we.stop_signal = self.wish.number
        if self.done == 2 or not we.defers_stop:
            raise KeyboardInterrupt if self.wish.number == signal.SIGINT else Stopped(self.wish.number)

    def run(self) -> None:
        sources: list[Any] = [self.reader] if self.parent is None else [self.reader, self.parent]
        while not self.closed.is_set():
            ready = wait(sources)
            if self.parent in ready:
                self._hear_parent()
            if self.reader in ready:
                self._hear()
                self._see_to()

    def close(self) -> None:
        self.closed.set()
        os.write(self.writer, b'\0')    # it wakes up
        self.join(1)
        if not self.is_alive():
            os.close(self.reader)
            os.close(self.writer)

    def _hear(self) -> None:
        """Take in what signals have arrived, whichever thread is the first to look."""
        with self.lock, contextlib.suppress(BlockingIOError):
            for number in os.read(self.reader, 64):
                if number in STOP_SIGNALS:
                    self.wish.hear(number)

    def _hear_parent(self) -> None:
        assert self.parent is not None
        try:
            number, is_urgent = self.parent.recv()
        except (EOFError, OSError):      # the parent is gone, by whatever end: nobody would ever look at this process again
            os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))
            return
        self.wish.is_urgent = self.wish.is_urgent or is_urgent
        if is_urgent or not self.wish.number:
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _see_to(self) -> None:
        if self.seen == self.asked:
            return
        self.seen, number = self.asked, self.wish.number
        if not self.closed.wait(0.05) and self.done < self.seen:     # its handler may have looked before the signal was in the pipe
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        if we.defers_stop and self.seen == 1:
            if we.is_main:
                get_logger().warning(f'{signal.Signals(number).name}: this step ends, is saved, and then the run stops; '
                                     f'another signal after {ECHO:g} s ends it at once')
        elif not self.closed.wait(GRACE if self.seen == 1 else SHORT_GRACE):
            os.write(2, f'{signal.Signals(number).name}: ended in the midst of what could not be interrupted\n'.encode())
            os._exit(128 + number)
