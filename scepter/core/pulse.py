"""Where this process is, said so cheaply that it can be said everywhere: a phase, a step, and a count that rises while things go on.

    with pulse.phase('evaluation'):      # which limit of ENV.LIMITS holds
        pulse.beat()                     # something was done: the limit begins anew
    with pulse.waiting():                # for another process: whatever takes long is that one's doing

Almost nobody reads the clock here. core/watch.py looks at the count now and then, from a thread of its own.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

phase_name = 'start'
step = 0             # of the optimizer
beats = 0            # rises with everything that is done
waits = 0            # waits for another process that this one is in, one within the other
waits_beside = 0     # likewise of the thread that writes a checkpoint beside the loop
compiles = 0         # of torch.compile, that have ended
aside = 0.0          # seconds spent on what is no part of a step
ASIDE = ('evaluation', 'saving', 'caching')
_owner = threading.get_ident()


def beat() -> None:
    """Something was done. By the thread of the run: what another one writes is no progress of its, but where the run waits for that."""
    global beats
    if threading.get_ident() == _owner or phase_name == 'saving':
        beats += 1


def at(number: int) -> None:
    """A step begins."""
    global step
    step = number
    beat()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Inside, this process is in another phase: start, first_step, step, compile, data, evaluation, saving or caching."""
    global aside
    before = phase_name
    begin = time.monotonic() if name in ASIDE and before not in ASIDE else None
    enter(name)
    try:
        yield
    finally:
        enter(before)
        if begin is not None:
            aside += time.monotonic() - begin


def enter(name: str) -> None:
    """From here on this process is in that phase."""
    global phase_name
    phase_name = name
    beat()


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, this process waits for another one; or its thread that writes does, which counts where the run waits for that."""
    global waits, waits_beside
    own = threading.get_ident() == _owner
    waits, waits_beside = waits + own, waits_beside + (not own)
    try:
        yield
    finally:
        waits, waits_beside = waits - own, waits_beside - (not own)
        beat()


def is_waiting() -> bool:
    """Whether whatever takes long now is the doing of another process."""
    return waits > 0 or (waits_beside > 0 and phase_name == 'saving')


def reset() -> None:
    """A run begins."""
    global step, waits, _owner
    step, waits, _owner = 0, 0, threading.get_ident()
    enter('start')


_before_compiling: list[str] = []


def hear_compiler() -> None:
    """From now on what torch.compile does is a phase of its own, whenever it does it: also for a shape that comes late."""
    from torch._dynamo.callback import callback_handler

    def begin(_: object) -> None:
        _before_compiling.append(phase_name)
        enter('compile')

    def end(_: object) -> None:
        global compiles
        compiles += 1
        enter(_before_compiling.pop())

    if not _is_heard:
        _is_heard.append(True)
        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)


_is_heard: list[bool] = []
