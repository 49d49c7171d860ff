"""A process that is stuck, or gone, is named, and all others end: nobody waits for ever.

Each process has a thread that looks at its own pulse (core/pulse.py) every PERIOD seconds, puts what it sees where the others find it, and
looks at the next rank: so somebody watches each of them, at the cost of one look, and a process whose threads have all been stopped is
missed as well. Who finds out writes a verdict, which all read: one story, told once. Processes of one machine meet in a folder, those of
several in the store through which they found one another.
"""
from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from scepter.core import processes, pulse
from scepter.core.errors import PeerError
from scepter.core.logger import get_logger

if TYPE_CHECKING:
    from torch.distributed import Store

PERIOD = 0.5      # seconds between looks
SILENT = 5.0      # seconds without a sign of life, after which a process is the first to be suspected
PATIENCE = 300.0  # seconds of silence in a phase without a limit
GRACE = 2.0       # seconds in which a process may still end by itself after a verdict
SLOWER = 3.0      # a step may take so many times as long as the longest one before it
DEBUGGERS = ('bdb', 'pdb', 'pydevd')     # files of theirs that a halted thread is in
SIZE = 1024       # bytes of a record in a folder


class Board:
    """Where each process leaves what the others should know."""

    def put(self, rank: int, record: str) -> None:
        """Leave a rank's record, in the place of the one before."""
        self._write(f'rank-{rank}', record)

    def get(self, rank: int) -> str:
        """The record of a rank, or ''."""
        return self._read(f'rank-{rank}')

    def decide(self, verdict: str) -> bool:
        """Whether this is the first verdict, and so the one that holds."""
        raise NotImplementedError

    def verdict(self) -> str:
        """The one that holds, or ''."""
        return self._read('verdict')

    def _write(self, name: str, text: str) -> None:
        raise NotImplementedError

    def _read(self, name: str) -> str:
        raise NotImplementedError


class FolderBoard(Board):
    """A folder of this machine."""

    def __init__(self, folder: Path):
        self.folder = folder

    def decide(self, verdict: str) -> bool:
        """Whether this is the first verdict: a link can be made once, and to a whole file."""
        self._write(mine := f'verdict-{os.getpid()}', verdict)
        try:
            os.link(self.folder / mine, self.folder / 'verdict')
        except FileExistsError:
            return False
        return True

    def _write(self, name: str, text: str) -> None:
        file = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(file, text.encode().ljust(SIZE), 0)    # in one piece, and over what was there
        finally:
            os.close(file)

    def _read(self, name: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / name).read_text(encoding='utf-8').rstrip()
        return ''


class StoreBoard(Board):
    """The store of torch.distributed, over a connection of its own: the other one may be busy waiting."""

    def __init__(self, store: Store):
        self.store = store.clone()

    def decide(self, verdict: str) -> bool:
        """Whether this is the first verdict: the store compares and sets in one."""
        return self.store.compare_set('watch/verdict', '', verdict).decode() == verdict

    def _write(self, name: str, text: str) -> None:
        self.store.set(f'watch/{name}', text)

    def _read(self, name: str) -> str:
        key = f'watch/{name}'
        return self.store.get(key).decode() if self.store.check([key]) else ''


class Watch:
    """The thread of one process. limits: seconds without progress by phase, None for no limit."""

    def __init__(self, limits: Mapping[str, float | None], rank: int = 0, world_size: int = 1, board: Board | None = None,
                 has_launcher: bool = False):
        self.limits, self.rank, self.world_size, self.board = limits, rank, world_size, board
        self.parent = os.getppid() if has_launcher else 0
        self.me = processes.myself()
        self.looks, self.beats, self.longest = 0, -1, 0.0
        self.since = self.heard = self.looked = time.monotonic()
        self.phase = pulse.phase_name
        self.quiet, self.last_look = 0.0, -1     # of the next rank
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name='scepter-watch', daemon=True)

    def start(self) -> None:
        """Begin to look."""
        pulse.reset()
        if self.board is not None:
            self.board.put(self.rank, json.dumps(self._record()))
        self.thread.start()

    def close(self, error: BaseException | None = None) -> None:
        """The run has ended here. error: what the others should know of it."""
        self.closed.set()
        if self.board is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self.board.put(self.rank, json.dumps({**self._record(), 'ended': True}))
                if error is not None:
                    self.board.decide(f'rank {self.rank} on {self.me["host"]} ended in step {pulse.step}: {type(error).__name__}: {error}')

    def explain(self, seconds: float = GRACE) -> tuple[str, bool]:
        """Why talking to the others has failed, and whether this process is the one to tell it; '' where nobody knows."""
        end = time.monotonic() + seconds
        while self.board is not None and time.monotonic() < end:
            with contextlib.suppress(OSError, RuntimeError):
                if text := self.board.verdict():
                    return text, False
                if gone := [r for r in self._records() if _is_gone(r)]:
                    time.sleep(0 if self.parent else PERIOD)      # a parent of ours knows more, and may be about to say it
                    text = self.board.verdict()
                    return (text, False) if text else ((story := _stories(gone)), self.board.decide(story))
            time.sleep(0.1)
        return '', True

    # ---------------------------------------------------------------- the thread
    def _run(self) -> None:
        while not self.closed.wait(PERIOD):
            try:
                self._look()
            except (OSError, RuntimeError) as error:      # the others are gone with the place where they left their words
                get_logger().debug(f'nothing is heard of the other processes any more: {error}')
                self.board = None

    def _look(self) -> None:
        own = self._record()
        if self.parent and os.getppid() != self.parent:
            self.parent = 0
            get_logger().warning('the launcher is gone: this process ends as if it had been asked to')
            os.kill(os.getpid(), signal.SIGTERM)
        if self.board is not None:
            self.board.put(self.rank, json.dumps(own))
            if text := self.board.verdict():
                self._end(text, is_told=True)
                return
        suspects = [own] if own['limit'] and own['still'] > own['limit'] and not is_debugged() else []
        suspects += self._next_one(own)
        if suspects:
            self._judge(suspects)

    def _record(self) -> dict[str, Any]:
        """What this process is doing at this moment."""
        now, name = time.monotonic(), pulse.phase_name
        if now - self.looked > SILENT:      # this process was halted, and all others with it perhaps: what it sees is old
            self.since = self.heard = now
        elif pulse.beats != self.beats or pulse.is_waiting():
            if self.phase in ('first_step', 'step') and not pulse.is_waiting():
                self.longest = max(self.longest, now - self.since)
            self.since = now
        self.looked, self.beats, self.phase = now, pulse.beats, name
        limit = self.limits.get(name)
        if limit is not None and name == 'step':
            limit = max(limit, SLOWER * self.longest)
        self.looks += 1
        return {**self.me, 'rank': self.rank, 'look': self.looks, 'phase': name, 'step': pulse.step, 'still': round(now - self.since, 1),
                'limit': limit or 0, 'waits': pulse.is_waiting(), 'quiet': round(self.quiet, 1), 'ended': False}

    def _next_one(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """The next rank, if it is gone or has not been heard of for too long: longer than its own phase allows, or this process's."""
        if self.board is None:
            return []
        other, now = _parsed(self.board.get((self.rank + 1) % self.world_size)), time.monotonic()
        if other is None or other['ended'] or other['look'] != self.last_look:
            self.heard, self.last_look = now, other['look'] if other else -1
        self.quiet = now - self.heard
        if other is None or other['ended']:
            return []
        limit = min((one['limit'] for one in (own, other) if one['limit']), default=PATIENCE)
        return [{**other, 'silent': self.quiet}] if _is_gone(other) or self.quiet > limit else []

    def _judge(self, suspects: list[dict[str, Any]]) -> None:
        """Tell who is to blame, and end. Where a process is silent, those that wait for it somewhere in torch are not."""
        everybody = self._records() or suspects
        silent = [{**other, 'silent': one['quiet']} for one in everybody if one['quiet'] > SILENT
                  for other in everybody if other['rank'] == (one['rank'] + 1) % self.world_size and not other['ended']]
        named = [s for s in suspects if _is_gone(s)] or silent or suspects
        text = _stories(named)
        if any(s['rank'] == self.rank for s in named):
            text += f'\nit is at\n{_main_stack()}'
        is_told = self.board is not None and not self.board.decide(text)
        for one in named:      # what has been stopped hears no signal but this one; torchrun would try others for half a minute
            if self.parent and one['rank'] != self.rank and one['place'] == self.me['place'] and not _is_gone(one):
                with contextlib.suppress(OSError):
                    os.kill(one['pid'], signal.SIGKILL)
        self._end(text, is_told)

    def _end(self, text: str, is_told: bool) -> None:
        logger = get_logger()
        logger.log(20 if is_told else 40, text)
        if not self.closed.wait(GRACE):
            logger.info(f'rank {self.rank} was in step {pulse.step} ({pulse.phase_name}), at\n{_main_stack()}')
            for handler in logger.handlers:
                handler.flush()
            os._exit(PeerError.exit_code)

    def _records(self) -> list[dict[str, Any]]:
        if self.board is None:
            return []
        return [record for rank in range(self.world_size) if (record := _parsed(self.board.get(rank))) is not None]


def _parsed(record: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):      # it is being written
        return json.loads(record) if record else None
    return None


def _is_gone(record: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended without a word."""
    return not record['ended'] and record['place'] == processes.place() and processes.start_of(record['pid']) != record['start']


def _stories(named: list[dict[str, Any]]) -> str:
    return '\n'.join(map(_story, named))


def _story(one: dict[str, Any]) -> str:
    who, where = f'rank {one["rank"]} on {one["host"]} (pid {one["pid"]})', f'in step {one["step"]} ({one["phase"]})'
    if _is_gone(one):
        return f'{who} is gone without a word: killed, or out of memory; last heard of {where}'
    if 'silent' in one:
        stopped = ': it has been stopped by a signal' if one['place'] == processes.place() and processes.is_stopped(one['pid']) else ''
        return f'{who} has given no sign of life for {one["silent"]:.0f} s, last {where}{stopped}'
    return (f'{who} is stuck: it has done nothing for {one["still"]:.0f} s, {where}; ENV.LIMITS.{one["phase"].upper()} allows '
            f'{one["limit"]:g} s')


def is_debugged() -> bool:
    """Whether somebody has halted the main thread in a debugger, to look at it."""
    return any(Path(frame.f_code.co_filename).stem in DEBUGGERS for frame, _ in traceback.walk_stack(_main_frame()))


def _main_stack() -> str:
    return ''.join(traceback.format_stack(_main_frame())).rstrip()


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)
