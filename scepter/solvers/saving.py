"""When a checkpoint is written: while the loop waits, or beside it (ASYNC_SAVE), from a copy of the state in memory."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from scepter.core import pulse
from scepter.core.disk import checkpoints
from scepter.core.disk.writing import Key, Save
from scepter.core.env import we

PATIENCE = 30.0     # seconds that a run of several processes which has failed waits for its last save: it may need one that is gone
HURRY = 1.0         # ... that one waits which is to end at once


class Saver:
    """Writes one checkpoint at a time. Every process has one, and calls it at the same moments.

    Beside the loop, the thread of each process talks to those of the others on a line of its own, so that what the loop says meanwhile
    cannot be taken for it. What ends such a save is raised by `wait`, in all processes.
    """

    def __init__(self, is_async: bool, logger: Any):
        self.is_async, self.logger = is_async, logger
        self._line: Any = None
        self._room: dict[Key, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, to_save: Callable[[Any], Save]) -> None:
        """Write a checkpoint; beside the loop, copy it, once the one before it is written. Raises CheckpointError, also of that one."""
        self.wait()
        begin = time.monotonic()
        if not self.is_async:
            self._write(to_save(None), begin)
            return
        self._line = self._line or we.new_line()
        save = to_save(self._line)
        save.hold(self._room)
        self._thread = threading.Thread(target=self._write_beside, args=(save, begin, time.monotonic() - begin), name='save', daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether a save beside the loop has ended in an error that nobody has heard of yet."""
        return self._error is not None

    def wait(self) -> None:
        """Until nothing is being written. Raises what ended the last save."""
        if self._thread is not None:
            with pulse.phase('saving'):
                self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def end(self, error: BaseException | None) -> None:
        """The run ends by this error, if it is one: a save that is going on may still become whole."""
        if self._thread is None:
            return
        self._thread.join(HURRY if not isinstance(error, Exception) else PATIENCE if we.is_distributed else None)
        if self._thread.is_alive():
            self.logger.warning('the last checkpoint was not written to its end, and is none')
        elif self._error is not None and self._error is not error:
            self.logger.warning(f'nor was the last checkpoint written: {self._error}')

    def _write(self, save: Save, begin: float, held: float | None = None) -> None:
        path = checkpoints.write(save)
        if we.is_main:
            beside = '' if held is None else f', beside the loop, which waited {held:.2f} s'
            self.logger.info(f'saved {path} in {time.monotonic() - begin:.1f} s{beside}')

    def _write_beside(self, save: Save, begin: float, held: float) -> None:
        try:
            self._write(save, begin, held)
        except BaseException as error:     # a thread's own is nobody's: `wait` raises it
            self._error = error
