"""How a version of a file or folder comes into the cache: whole or not at all, once for many processes, its orphans collected."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from scepter.core.disk import atomic
from scepter.core.errors import DataError
from scepter.core.logger import get_logger
from scepter.core.stores.client import FileClient, Transient, base_name, persist, shown

PIN = '#sha256='
ORPHAN_AGE = 3600      # seconds; a download that has not been touched for so long is nobody's


class Cache:
    """The copies of remote files below a folder:    files/<hash of the address>/<hash of its version>/<name>"""

    def __init__(self, folder: Path):
        self.folder = folder
        self._is_swept = False

    def entry(self, address: str) -> Path:
        """The folder of all versions of what is at an address."""
        return self.folder / 'files' / _hash(address)[:32]

    def version(self, address: str, word: str) -> Path:
        """The folder of one version; it is there when it is whole."""
        return self.entry(address) / _hash(word)[:16]

    def newest(self, address: str, pin: str, is_folder: bool) -> Path | None:
        """The copy that is here of this sha256, or the newest where none is asked for."""
        found = [self.version(address, pin)] if pin else self.entry(address).glob('[0-9a-f]*')
        folder = max((f for f in found if f.is_dir()), key=lambda p: p.stat().st_mtime, default=None)
        return folder if folder is None or is_folder else folder / base_name(address)

    def fetched(self, client: FileClient, address: str, pin: str, is_folder: bool, wait: bool) -> Path:
        """Where the version that the store has now lies, after fetching it where it is not here. Raises DataError and OSError."""
        sources = {base_name(address): address}
        try:
            sources = files_of(client, address) if is_folder else sources
            version = pin or repr([(name, client.stamp(source)) for name, source in sources.items()])
        except Transient as error:
            if (old := self.newest(address, pin, is_folder)) is not None:
                get_logger().warning(f'{shown(address)} cannot be asked whether it changed ({error}): using the copy in {old}')
                return old
            if is_folder:
                sources = persist(client, address, lambda: files_of(client, address))
            version = pin
        final = self.version(address, version)
        if not final.exists():
            self._sweep()
            with _writable(self.folder):
                atomic.make_folder(final.parent)
            with _lock(final.parent, wait, shown(address)):
                if not final.exists():
                    fetch_version(client, sources, pin, final)
        return final if is_folder else final / next(iter(sources))

    def _sweep(self) -> None:
        """Once per process: what killed downloads left behind goes."""
        if self._is_swept:
            return
        self._is_swept = True
        for left in self.folder.glob('files/*/.tmp-*'):
            try:
                newest = max((p.stat().st_mtime for p in (left, *left.rglob('*'))), default=0)
            except FileNotFoundError:    # its owner has just published it
                continue
            if newest < time.time() - ORPHAN_AGE:
                shutil.rmtree(left, ignore_errors=True)


def files_of(client: FileClient, address: str) -> dict[str, str]:
    """Name below a folder -> address, of each of its files."""
    if not (names := client.list(address)):
        raise DataError(f'{shown(address)}: holds no file')
    return {name: client.below(address, name) for name in names}


def fetch_version(client: FileClient, sources: Mapping[str, str], pin: str, final: Path) -> None:
    """Bring files (name -> address) into a new folder `final`, which appears whole, by one rename. Raises DataError and OSError."""
    temp = atomic.beside(final, 'tmp')
    with _writable(final.parent):
        temp.mkdir()
    try:
        for name, source in sources.items():
            target = _place(temp, name, source)
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch(client, source, target, pin)
            atomic.sync(target)
        for folder in {temp, *(p for p in temp.rglob('*') if p.is_dir())}:
            atomic.sync(folder)
        try:
            atomic.publish(temp, final)
        except OSError:
            if not final.exists():      # another process was first, which is as good
                raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _place(root: Path, name: str, source: str) -> Path:
    try:
        return atomic.safe_join(root, name)
    except ValueError as error:
        raise DataError(f'{shown(source)}: refused: {error}') from error


def _fetch(client: FileClient, address: str, target: Path, pin: str) -> None:
    def once() -> None:
        is_proven = client.get(address, target)
        if not is_proven and not pin:
            raise DataError(f'{shown(address)}: the server tells no length, so a broken transfer would pass for a whole file. '
                            f'Add {PIN}<hash> to the address')
        if pin and (found := atomic.digest(target).sha256) != pin:
            target.unlink()
            raise Transient(f'sha256 {pin} expected, {found} found')

    persist(client, address, once, lambda: target.stat().st_size if target.exists() else 0)


def split_pin(path: str, is_folder: bool) -> tuple[str, str]:
    """An address and the sha256 that it ends in, or ''. Raises DataError for one that is none."""
    address, mark, pin = path.partition(PIN)
    if mark and not re.fullmatch('[0-9a-f]{64}', pin):
        raise DataError(f'{shown(address)}: {PIN[1:]} takes 64 lower-case hex digits, got {pin!r}')
    if mark and is_folder:
        raise DataError(f'{shown(address)}: {PIN[1:]} is of a file, and a folder is asked for')
    return address, pin


@contextmanager
def _lock(folder: Path, wait: bool, what: str) -> Iterator[None]:
    """Hold the folder's lock, where the file system has locks; without them, or with wait off, work is only done twice."""
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if wait:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                get_logger().info(f'waiting for another process that fetches {what}')
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass
        yield
    finally:
        os.close(file)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in atomic.NO_SPACE:
            raise
        raise DataError(f'the cache {folder} cannot be written: {error.strerror}. SCEPTER_CACHE names another folder') from error


@contextmanager
def explained(address: str) -> Iterator[None]:
    """What the operating system refuses, as a DataError."""
    try:
        yield
    except OSError as error:
        if error.errno in atomic.NO_SPACE:
            raise DataError(f'no space for {shown(address)}: {error.strerror}; {error.filename or ""}') from error
        raise DataError(f'{shown(address)}: {error.strerror or error}{f": {error.filename}" if error.filename else ""}') from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()
