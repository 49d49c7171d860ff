"""What can happen to one process of a run, and data that is slow: registered as a user would."""
from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Literal

from scepter.core import jsonl
from scepter.core.env import we
from scepter.core.registry import DATASETS, HOOKS
from scepter.core.schema import param
from scepter.hooks.base import Hook
from tiny import TinyPoints


@HOOKS.register_class()
class Trouble(Hook):
    """At one moment of one rank, once in the life of a WORK_DIR.    WORK_DIR/struck: the time at which it happened"""

    WHAT: Literal['sleep', 'raise', 'exit', 'vanish', 'abort', 'kill', 'halt', 'term'] = param('raise')
    MOMENT: Literal['before_solve', 'after_iter', 'state_dict'] = param('after_iter')
    AT: int = param(3, 'Steps, for after_iter.')
    RANK: int = param(1)

    def before_solve(self, solver: Any) -> None:
        self.work_dir: Path = solver.work_dir
        self._strike('before_solve')

    def after_iter(self, solver: Any) -> None:
        if solver.step == self.AT:
            self._strike('after_iter')

    def state_dict(self) -> dict[str, Any]:
        self._strike('state_dict')
        return {}

    def _strike(self, moment: str) -> None:
        struck = self.work_dir / 'struck'
        if moment != self.MOMENT or we.rank != self.RANK or struck.exists():
            return
        struck.write_text(str(time.time()))
        if self.WHAT == 'raise':
            raise ValueError('a defect of mine')
        does: dict[str, Any] = {'sleep': lambda: time.sleep(1000), 'exit': lambda: sys.exit(0), 'vanish': lambda: os._exit(0),
                                'abort': os.abort, 'kill': lambda: os.kill(os.getpid(), signal.SIGKILL),
                                'halt': lambda: os.kill(os.getpid(), signal.SIGSTOP), 'term': lambda: os.kill(os.getpid(), signal.SIGTERM)}
        does[self.WHAT]()


@HOOKS.register_class()
class Dawdle(Hook):
    """The main process takes two seconds at one moment.    WORK_DIR/dawdling: it has begun to"""

    MOMENT: Literal['before_solve', 'after_iter', 'state_dict'] = param('after_iter')

    def before_solve(self, solver: Any) -> None:
        self.work_dir: Path = solver.work_dir
        self._dawdle('before_solve')

    def after_iter(self, solver: Any) -> None:
        if solver.step == 20:
            self._dawdle('after_iter')

    def state_dict(self) -> dict[str, Any]:
        self._dawdle('state_dict')
        return {}

    def _dawdle(self, moment: str) -> None:
        mark = self.work_dir / 'dawdling'
        if we.is_main and moment == self.MOMENT and not mark.exists():
            mark.touch()
            time.sleep(2)


@HOOKS.register_class()
class Inventory(Hook):
    """What a process holds.    WORK_DIR/inventory.jsonl: step, mib, descriptors, threads"""

    def after_iter(self, solver: Any) -> None:
        if solver.step % 50 == 0:
            pages = int(Path('/proc/self/statm').read_text().split()[1])
            jsonl.append(solver.work_dir / 'inventory.jsonl', [{
                'step': solver.step, 'mib': pages * os.sysconf('SC_PAGE_SIZE') / 2 ** 20, 'descriptors': len(os.listdir('/proc/self/fd')),
                'threads': len(os.listdir('/proc/self/task'))}])


@DATASETS.register_class()
class SlowPoints(TinyPoints):
    """Points that take their time."""

    SECONDS: float = param(0.3)

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.SECONDS)
        return super().__getitem__(index)
