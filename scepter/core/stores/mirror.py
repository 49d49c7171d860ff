"""A WORK_DIR in a store: the run works in a folder of this machine, and its mirror follows in order.

    oss://bucket/runs/a/
        checkpoints/step-00000100/     the data first, each file proven by its length and the store's checksum; MANIFEST.json last
        log.txt, log.jsonl, ...        after each checkpoint, and at the end
        RUN.json                       whose run it is: another one that takes the address ends this one at its next checkpoint

A folder there without a MANIFEST.json is no checkpoint, so whatever is killed leaves nothing that could be chosen by mistake. The commit
stays on this machine: a thread looks for what has been committed and sends it. What fails is said and tried again; it is an error when it
still fails at the third checkpoint in a row, or at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from scepter.core.disk import atomic, checkpoints, manifests
from scepter.core.disk.manifests import MANIFEST
from scepter.core.disk.writing import Kept
from scepter.core.errors import CheckpointError, DataError
from scepter.core.logger import get_logger
from scepter.core.stores.client import base_name, shown
from scepter.core.stores.front import FS
from scepter.core.stores.local import local_path

FAILURES = 3            # checkpoints in a row at which sending may fail before the run ends
LOOK, LONGEST = 1.0, 60.0       # seconds between two looks at the folder; between two tries at the most
OWNER = 'RUN.json'
OUTGOING = '.outgoing'
_STEP = re.compile(r'(?:.*/)?step-(\d{8,})/MANIFEST\.json')


class Mirror:
    """A folder of this machine, and the address that follows it. For the main process, but for `bring`."""

    def __init__(self, address: str, folder: Path):
        self.address, self.folder = address.rstrip('/'), folder
        self.root = folder / 'checkpoints'
        self._token = secrets.token_hex(8)
        self._done: dict[int, str] = {}                 # step -> sha256 of the manifest that is there
        self._sent: dict[Path, tuple[int, int]] = {}    # logs as they are there: (size, time)
        self._kept: Callable[[], Kept] = Kept
        self._failures = 0
        self._error: Exception | None = None
        self._is_lost = False
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    @staticmethod
    def of(work_dir: str) -> tuple[Path, Mirror | None]:
        """The folder to work in, and its mirror where WORK_DIR is an address."""
        if FS.is_local(work_dir):
            return local_path(work_dir), None
        digest = hashlib.sha256(work_dir.rstrip('/').encode()).hexdigest()[:8]
        folder = FS.cache / 'runs' / f'{base_name(work_dir)}-{digest}'
        return folder, Mirror(work_dir, folder)

    # ---------------------------------------------------------------- beginning
    def begin(self, resume_from: str | None, kept: Callable[[], Kept] = Kept) -> None:
        """Take the address, bring here what a run goes on from, and begin to follow. kept: what of it stays there at a moment.

        Raises CheckpointError, also where nothing can be written there.
        """
        self._kept = kept
        with _as_checkpoint_error():
            there = self.steps()
            if there and resume_from is None:
                raise CheckpointError(f'{shown(self.address)} already holds a run, up to step {there[0]}. Set SOLVER.RESUME_FROM: auto to '
                                      'continue it, or give another WORK_DIR to start afresh')
            FS.put_object(json.dumps({'token': self._token, 'host': socket.gethostname(), 'pid': os.getpid(), 'time': time.time()}),
                          f'{self.address}/{OWNER}')
            self._bring_logs()
            if resume_from in ('auto', 'latest'):
                self._bring_newest(there)
        shutil.rmtree(self.folder / OUTGOING, ignore_errors=True)
        # what is here and not there, though older than what is there, was given up there
        self._done = {step: sha for step, sha in self._here().items() if step <= max(there, default=-1)}
        get_logger().info(f'working in {self.folder}, which {shown(self.address)} follows')
        self._thread = threading.Thread(target=self._follow, name='scepter-mirror', daemon=True)
        self._thread.start()

    def steps(self) -> list[int]:
        """Steps whose checkpoints are there whole, the newest first."""
        root = f'{self.address}/checkpoints'
        return steps_in(FS.list(root)) if FS.exists(root) else []

    def bring(self, step: int) -> Path:
        """The checkpoint of a step, on this machine, after fetching it where it is not. Raises CheckpointError where it is damaged."""
        here = checkpoints.folder_of(self.root, step)
        there = f'{self.address}/checkpoints/{here.name}'
        with _as_checkpoint_error():
            if here.exists():
                manifest = FS.get_object(f'{there}/{MANIFEST}', 0, manifests.MANIFEST_LIMIT)
                if (here / MANIFEST).is_file() and (here / MANIFEST).read_bytes() == manifest:
                    return here
                atomic.trash(here)      # of another run that has been at this address since
            FS.get_dir_to_local_dir(there, here)
            checkpoints.load(here)
        return here

    def _bring_newest(self, there: list[int]) -> None:
        for step in there:
            if any(manifests.step_of(f) > step and checkpoints.is_sound(f) for f in checkpoints.folders(self.root)):
                return      # this machine is ahead: uploads had failed
            try:
                self.bring(step)
                return
            except CheckpointError as error:
                get_logger().warning(f'DAMAGED CHECKPOINT, falling back to the one before it: {error}')
                shutil.rmtree(checkpoints.folder_of(self.root, step), ignore_errors=True)
        if there:
            raise CheckpointError(f'{shown(self.address)} holds {len(there)} checkpoints, and none can be taken: the warnings say why')

    def _bring_logs(self) -> None:
        """Logs that this machine lacks: it appends to them, and the mirror then replaces those there."""
        for name in FS.list(self.address):
            if '/' not in name and name != OWNER and not (self.folder / name).exists():
                FS.get_from(f'{self.address}/{name}', atomic.safe_join(self.folder, name))

    # ---------------------------------------------------------------- following
    def check(self) -> None:
        """To be asked at each checkpoint. Raises CheckpointError where sending has failed too often, or the address is another run's."""
        self._failures = 0 if self._error is None else self._failures + 1
        if self._is_lost or self._failures >= FAILURES:
            raise CheckpointError(f'{shown(self.address)} cannot follow: {self._error}. {self._left()}')

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Wait until all is there. Raises CheckpointError where something is not, unless another error is what ends the run."""
        if self._thread is None:
            return
        self._ending.set()
        self._thread.join()
        self._thread = None
        if self._error is not None:
            told = f'{shown(self.address)} lacks the end of this run: {self._error}. {self._left()}'
            if error is None:
                raise CheckpointError(told)
            get_logger().error(told)

    def _left(self) -> str:
        steps = f'Steps {", ".join(map(str, self._waiting()))} are' if self._waiting() else 'All of it is'
        return f'{steps} in {self.folder}; the same command with RESUME_FROM: auto sends and goes on'

    def _here(self) -> dict[int, str]:
        """step -> sha256 of the manifest, of each checkpoint that is committed here."""
        found = {}
        for folder in reversed(checkpoints.folders(self.root)):
            with contextlib.suppress(OSError):      # pruned at this moment
                found[manifests.step_of(folder)] = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        return found

    def _waiting(self) -> list[int]:
        return [step for step, sha in self._here().items() if self._done.get(step) != sha]

    def _follow(self) -> None:
        """The mirror's thread: look, send, and once more at the end."""
        pause, is_over = LOOK, False
        while not is_over:
            is_over = self._ending.wait(pause)
            try:
                waiting = self._waiting()
                for step in waiting:
                    self._send(step)
                    self._prune(self._kept())
                if waiting or is_over:
                    self._check_owner()
                    self._send_logs()
                pause, self._error = LOOK, None
            except (DataError, CheckpointError, OSError) as error:
                pause, self._error = min(LONGEST, pause * 2), error
                get_logger().warning(f'{shown(self.address)} could not follow: {error}')
            if self._is_lost:
                return

    def _send(self, step: int) -> None:
        """Data first, then MANIFEST.json; from second names, since this machine may be done with a checkpoint before the store has it."""
        here, outgoing = checkpoints.folder_of(self.root, step), self.folder / OUTGOING / str(step)
        there = f'{self.address}/checkpoints/{here.name}'
        shutil.rmtree(outgoing, ignore_errors=True)
        outgoing.mkdir(parents=True)
        source = outgoing
        try:
            for file in here.iterdir():
                os.link(file, outgoing / file.name)
        except FileNotFoundError:       # pruned: a newer one waits
            return
        except OSError:                 # a file system without such names: then it must last
            source = here
        manifest = (source / MANIFEST).read_bytes()
        files = json.loads(manifest)['files']
        self._check_owner()
        left = FS.list(there) if FS.exists(there) else []
        for name in sorted(left, key=lambda name: name != MANIFEST):     # of an upload that broke, or a run that went back: no longer whole
            if name == MANIFEST or name not in files:
                FS.delete_object(f'{there}/{name}')
        for name in files:
            FS.put_object_from_local_file(source / name, f'{there}/{name}')
        self._check_owner()
        FS.put_object_from_local_file(source / MANIFEST, f'{there}/{MANIFEST}')
        self._done[step] = hashlib.sha256(manifest).hexdigest()
        shutil.rmtree(outgoing, ignore_errors=True)

    def _prune(self, kept: Kept) -> None:
        """Remove what no longer stays, its MANIFEST first, so that a part of it is never taken for a whole."""
        for step in self.steps()[kept.keep:] if kept.keep is not None else []:
            if step in kept.pinned or (kept.every and step % kept.every == 0):
                continue
            there = f'{self.address}/checkpoints/{checkpoints.folder_of(self.root, step).name}'
            for name in sorted(FS.list(there), key=lambda name: name != MANIFEST):
                FS.delete_object(f'{there}/{name}')

    def _send_logs(self) -> None:
        for file in sorted(self.folder.rglob('*')):
            name = file.relative_to(self.folder)
            if name.parts[0] == 'checkpoints' or any(part.startswith('.') for part in name.parts) or not file.is_file():
                continue
            state = file.stat()
            now = state.st_size, state.st_mtime_ns
            if self._sent.get(file) != now:
                FS.extend_object_from_local_file(file, f'{self.address}/{name.as_posix()}')
                self._sent[file] = now

    def _check_owner(self) -> None:
        owner = json.loads(FS.get_object(f'{self.address}/{OWNER}', 0, 10_000))
        if owner.get('token') != self._token:
            self._is_lost = True
            raise CheckpointError(f'it was taken over by a run on {owner.get("host")} (pid {owner.get("pid")})')


def steps_in(names: Collection[str]) -> list[int]:
    """Steps whose checkpoints are whole, the newest first, in a listing of names."""
    return sorted({int(match[1]) for name in names if (match := _STEP.fullmatch(name))}, reverse=True)


def newest_at(address: str) -> str:
    """The newest checkpoint of a run at an address, by what is whole there; the address itself where it is no run's."""
    if FS.is_local(address):
        return address
    names = [name for name in FS.list(address) if _STEP.fullmatch(name)]
    newest = max(names, key=lambda name: steps_in([name]), default=None)
    return address if newest is None else f'{address.rstrip("/")}/{newest.rpartition("/")[0]}'


@contextlib.contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise CheckpointError(str(error)) from error
