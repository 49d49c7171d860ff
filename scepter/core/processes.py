"""Which process of which machine: enough to tell whether it is still there, and that its pid is not another one's by now."""
from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

UNKNOWN = 'some time'


def myself() -> dict[str, Any]:
    """Of this process: host, pid, start, and the place in which a pid means the same."""
    return {'host': socket.gethostname(), 'pid': os.getpid(), 'start': start_of(os.getpid()), 'place': place()}


def place() -> list[str]:
    """Where a pid means the same process: this machine since it was switched on, in this container."""
    def look(read: Any, path: str) -> str:
        try:
            return read(path).strip()
        except OSError:
            return ''

    boot = look(lambda path: Path(path).read_text(), '/proc/sys/kernel/random/boot_id')
    return [socket.gethostname(), boot, look(os.readlink, '/proc/self/ns/pid')]


def start_of(pid: int) -> str | None:
    """When a process began, so that its pid cannot be taken for another's; None where there is no such process, or it is a zombie."""
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
        return None if fields[0] in 'ZX' else fields[19]
    except FileNotFoundError:
        if os.path.exists('/proc/self/stat'):
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return UNKNOWN


def is_stopped(pid: int) -> bool:
    """Whether a process has been halted (SIGSTOP, Ctrl-Z, a debugger)."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] in 'Tt'
    except OSError:
        return False
