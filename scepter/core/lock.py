"""One run at a time in a WORK_DIR, on any file system and from any machine that sees it.

    WORK_DIR/.lock/00000007     {"host": ..., "pid": ..., ...}; its time of change is a heartbeat

Who takes the folder creates the file with the next number, which the file system lets only one process do (O_EXCL, also on NFS and
Lustre, where flock may do nothing). Nothing is ever taken away before the next number is there, so no late-comer can take what was not
meant for it. A holder on this machine is asked for by its pid and the time it began; one elsewhere is dead when its heart has not
beaten for STALE seconds, by the file system's own clock.
"""
from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scepter.core import processes
from scepter.core.disk import atomic
from scepter.core.errors import CheckpointError
from scepter.core.logger import get_logger

HEARTBEAT = 20.0    # seconds
STALE = 180.0       # seconds


class WorkDirLock:
    """Holds a WORK_DIR for one run of this process, from `take` to `close`; dies with the process."""

    def __init__(self, work_dir: Path):
        self.work_dir, self.folder = work_dir, work_dir / '.lock'
        self.number: int | None = None
        self._stop = threading.Event()

    def take(self) -> None:
        """Raises CheckpointError naming the run that is there, or where the folder cannot be written."""
        with refusals(self.work_dir):
            if self.work_dir.is_symlink() and not self.work_dir.exists():
                raise CheckpointError(f'SOLVER.WORK_DIR is {self.work_dir}, a link to {os.readlink(self.work_dir)}, which is not there')
            atomic.make_folder(self.folder)
            while self.number is None:
                self._try_next(max(self._numbers(), default=0))
        threading.Thread(target=self._beat, name='scepter-heartbeat', daemon=True).start()

    def close(self) -> None:
        """The file stays, so that its number is never given twice, and says that nobody is behind it."""
        self._stop.set()
        if self.number is not None and self._is_highest():
            try:
                os.truncate(self._path(self.number), 0)
                self._path(self.number).write_text(json.dumps({'ended': time.time()}))
            except OSError as error:
                get_logger().warning(f'{self.folder} could not be released ({error.strerror}); the next run will find us gone')
        self.number = None

    def check(self) -> None:
        """Raises CheckpointError where another run has taken the folder since, because this machine seemed dead."""
        if self.number is not None and not self._is_highest():
            owner = _read(self._path(max(self._numbers(), default=0)))
            raise CheckpointError(f'{self.work_dir} was taken over by {_spelled(owner)}, since this process gave no sign of life for '
                                  f'{STALE:g} s: nothing was written')

    def _try_next(self, newest: int) -> None:
        """Create the next number if the newest one is dead; where another process is quicker, the caller looks again."""
        if newest and (owner := _read(self._path(newest))) is not None and self._is_alive(newest, owner):
            raise CheckpointError(f'{self.work_dir} is in use: {_spelled(owner)} is writing there. '
                                  'Give this run another SOLVER.WORK_DIR, or wait for that one, or stop it')
        mine = self._path(newest + 1)
        try:
            file = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return
        try:
            os.write(file, json.dumps({**processes.myself(), 'time': time.time()}).encode())
        finally:
            os.close(file)
        if max(self._numbers()) > newest + 1:      # the look that led here was older than two runs
            mine.unlink(missing_ok=True)
            return
        self.number = newest + 1
        for number in self._numbers():
            if number < newest:                    # the last one stays: it stops whoever has still seen it as the newest
                self._path(number).unlink(missing_ok=True)

    def _is_alive(self, number: int, owner: dict[str, Any]) -> bool:
        if 'ended' in owner:
            return False
        if 'pid' in owner and owner.get('place') == processes.place():
            start = processes.start_of(owner['pid'])
            if start is None or start != owner['start'] or owner['pid'] == os.getpid():    # gone, or ours and given up
                return False
            if start != processes.UNKNOWN:
                return True
        return self._age(number) < STALE

    def _age(self, number: int) -> float:
        """Seconds since the heart beat, by the clock that stamps files: other machines' clocks differ."""
        probe = atomic.beside(self._path(number), 'now')
        try:
            probe.touch()
            with open(self._path(number), 'rb') as file:    # NFS looks anew at a file that is opened
                return probe.stat().st_mtime - os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return STALE
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            try:
                if self.number is not None:
                    os.utime(self._path(self.number))
            except OSError:    # the next beat may succeed; `check` says where it matters
                pass

    def _is_highest(self) -> bool:
        return self.number == max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        return [int(name) for name in os.listdir(self.folder) if name.isdecimal()]

    def _path(self, number: int) -> Path:
        return self.folder / f'{number:08d}'


@contextmanager
def refusals(work_dir: Path) -> Iterator[None]:
    """Turn what the operating system refuses below WORK_DIR into a CheckpointError."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in atomic.NO_SPACE
        if not is_full and not _is_below(error.filename, work_dir):
            raise
        where = error.filename or work_dir
        why = f'{error.strerror}, {atomic.space(work_dir):,} bytes free' if is_full else error.strerror
        raise CheckpointError(f'{where} cannot be written or read: {why}. SOLVER.WORK_DIR is {work_dir}; '
                              'checkpoints that are there are intact') from error


def _is_below(name: Any, folder: Path) -> bool:
    if not isinstance(name, (str, os.PathLike)):
        return False
    path, folder = Path(os.path.abspath(name)), Path(os.path.abspath(folder))
    return path.is_relative_to(folder) or folder.is_relative_to(path)    # below it, or where it would have to be made


def _read(path: Path) -> dict[str, Any] | None:
    """Who is behind a lock; {} where the file does not say (it was created this moment), None where it is gone."""
    try:
        owner = json.loads(path.read_text())
        return owner if isinstance(owner, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _spelled(owner: dict[str, Any] | None) -> str:
    if not owner or 'pid' not in owner:
        return 'a run that is just beginning'
    return f'a run on {owner["host"]} (pid {owner["pid"]}, since {time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["time"]))})'
