"""FS: the one door to files in any store.

    with FS.get_from('https://host/model.safetensors#sha256=...') as local_path: ...
    with FS.get_dir_to_local_dir('hf://org/model') as local_dir: ...
    with FS.put_to('outputs/samples.png') as local_path: ...

A remote file is fetched once per machine and version into $SCEPTER_CACHE (default ~/.cache/scepter), which may be deleted at any time:

    files/<hash of the address>/<hash of its version>/<name>        a version's folder appears whole, by one rename

A lock spares the other processes the download. Nothing depends on it: each writes to a place of its own, the first to finish wins.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from scepter.core.disk import atomic
from scepter.core.errors import DataError
from scepter.core.logger import get_logger
from scepter.core.registry import FILE_SYSTEMS
from scepter.core.stores.client import FileClient, Transient, base_name, shown
from scepter.core.stores.generic import FsspecFs
from scepter.core.stores.local import LocalFs

PIN = '#sha256='
ORPHAN_AGE = 3600      # seconds; a download that has not been touched for so long is nobody's
T = TypeVar('T')


class FileSystem:
    """Files and folders of every store by their address. All failures are DataError, with the cause and without secrets."""

    def __init__(self) -> None:
        self._clients: dict[str, FileClient] = {}
        self._fetched: dict[tuple[str, bool], Path] = {}
        self._closed: tuple[str, frozenset[str]] | None = None

    @property
    def cache(self) -> Path:
        """The folder of downloads on this machine."""
        return Path(os.environ.get('SCEPTER_CACHE') or Path.home() / '.cache' / 'scepter').expanduser()

    def init_fs_client(self, cfg: dict, logger: Any = None) -> FileClient:
        """Build a client from its config, e.g. {'NAME': 'HttpFs', 'TIMEOUT': 5}, and use it for its schemes from now on."""
        client = FILE_SYSTEMS.build(cfg, logger=logger)
        self._clients.update(dict.fromkeys(client.schemes, client))
        return client

    @contextmanager
    def get_from(self, path: str | os.PathLike, wait_finish: bool = True) -> Iterator[str]:
        """A local path of the file: itself where it is local, else its cached copy, which must not be written to.

        wait_finish: wait for another process that is fetching it already, instead of fetching it twice.
        """
        yield str(self._local(os.fspath(path), False, wait_finish))

    @contextmanager
    def get_dir_to_local_dir(self, path: str | os.PathLike, wait_finish: bool = True) -> Iterator[str]:
        """A local path of the folder, all files in it; as `get_from`."""
        yield str(self._local(os.fspath(path), True, wait_finish))

    @contextmanager
    def put_to(self, path: str | os.PathLike) -> Iterator[str]:
        """A local path to write a file to. It appears at `path`, whole, when the block ends well; otherwise nothing does."""
        path = os.fspath(path)
        client = self._client(path)
        with _explained(path):
            temp = atomic.beside(client.staging(path, self.cache), 'tmp')
        try:
            yield str(temp)
            if not temp.is_file():
                raise DataError(f'{shown(path)}: put_to expects one file to be written to the path it gives, '
                                f'{"a folder" if temp.is_dir() else "nothing"} was')
            with _explained(path):
                _persist(client, path, lambda: client.put(temp, path))
        finally:
            shutil.rmtree(temp) if temp.is_dir() else temp.unlink(missing_ok=True)

    def exists(self, path: str | os.PathLike) -> bool:
        """Whether there is a file or folder at path. Raises DataError where that cannot be found out."""
        return self._ask(path, lambda client, address: client.exists(address))

    def list(self, path: str | os.PathLike) -> list[str]:
        """Names of all files below a folder, relative to it, with /, sorted."""
        return self._ask(path, lambda client, address: client.list(address))

    def remove(self, path: str | os.PathLike) -> None:
        """Remove a file; an error where there is none."""
        self._ask(path, lambda client, address: client.remove(address))

    @contextmanager
    def without_requests(self, reason: str, but: Collection[str] = ()) -> Iterator[None]:
        """Inside, no store is asked for anything but the addresses in `but`; a copy that is on this machine already will do.

        For addresses that a stranger wrote. What is not here is a DataError that gives the reason.
        """
        before, self._closed = self._closed, (reason, frozenset(address.partition(PIN)[0] for address in but))
        try:
            yield
        finally:
            self._closed = before

    # ---------------------------------------------------------------- finding the client
    def _client(self, path: str) -> FileClient:
        # without a scheme it is a path, also where it looks like org/name: a typo must not fetch a stranger's repository
        scheme = path.partition('://')[0].lower() if '://' in path else 'file'
        if scheme not in self._clients:
            names = {s: name for name in FILE_SYSTEMS for s in FILE_SYSTEMS.get(name).schemes}
            if scheme not in names and not FsspecFs.serves(scheme):
                known = ', '.join(f'{s}://' for s in sorted(names))
                raise DataError(f'{shown(path)}: no client for {scheme}://. There is {known}, and whatever fsspec can open '
                                'with the packages installed here (memory://, s3:// with s3fs, gs:// with gcsfs, ...)')
            self._clients[scheme] = FILE_SYSTEMS.build({'NAME': names.get(scheme, 'FsspecFs')})
        return self._clients[scheme]

    def _ask(self, path: str | os.PathLike, question: Callable[[FileClient, str], T]) -> T:
        address = os.fspath(path).partition(PIN)[0]
        client = self._client(address)
        if self._is_closed(client, address):
            raise self._refusal(address)
        with _explained(address):
            return _persist(client, address, lambda: question(client, address))

    # ---------------------------------------------------------------- fetching
    def _local(self, path: str, is_folder: bool, wait: bool) -> Path:
        address, _, pin = path.partition(PIN)
        client = self._client(address)
        with _explained(address):
            if self._is_closed(client, address):
                return self._kept(client, address, is_folder)
            here = _persist(client, address, lambda: client.here(address, is_folder))
            if here is not None:
                return here
            known = self._fetched.get((path, is_folder))
            if known is None or not known.exists():
                known = self._fetched[path, is_folder] = self._cached(client, address, pin, is_folder, wait)
            return known

    def _is_closed(self, client: FileClient, address: str) -> bool:
        return self._closed is not None and not isinstance(client, LocalFs) and address not in self._closed[1]

    def _kept(self, client: FileClient, address: str, is_folder: bool) -> Path:
        """The newest copy that is on this machine. Raises DataError where there is none."""
        copy = client.kept(address, is_folder)
        if copy is None:
            folder = self._newest(address)
            copy = folder if folder is None or is_folder else folder / base_name(address)
        if copy is None:
            raise self._refusal(address)
        return copy

    def _newest(self, address: str) -> Path | None:
        entry = self.cache / 'files' / _hash(address)[:32]
        return max(entry.glob('[0-9a-f]*'), key=lambda p: p.stat().st_mtime, default=None)

    def _refusal(self, address: str) -> DataError:
        assert self._closed is not None
        return DataError(f'{shown(address)} was not fetched: {self._closed[0]}')

    def _cached(self, client: FileClient, address: str, pin: str, is_folder: bool, wait: bool) -> Path:
        if pin and not re.fullmatch('[0-9a-f]{64}', pin):
            raise DataError(f'{shown(address)}: {PIN[1:]} takes 64 lower-case hex digits, got {pin!r}')
        entry = self.cache / 'files' / _hash(address)[:32]
        try:
            names = client.list(address) if is_folder else [base_name(address)]
            if not names:
                raise DataError(f'{shown(address)}: holds no file')
            sources = [f'{address.rstrip("/")}/{name}' for name in names] if is_folder else [address]
            version = pin or repr([(name, client.stamp(source)) for name, source in zip(names, sources)])
        except Transient as error:
            old = self._newest(address)
            if old is not None:
                get_logger().warning(f'{shown(address)} cannot be asked whether it changed ({error}): using the copy in {old}')
                return old if is_folder else old / base_name(address)
            if is_folder:
                names = _persist(client, address, lambda: client.list(address))
                sources = [f'{address.rstrip("/")}/{name}' for name in names]
            version = ''
        final = entry / _hash(version)[:16]
        if not final.exists():
            atomic.make_folder(entry)
            with _lock(entry, wait, shown(address)):
                if not final.exists():
                    _collect_orphans(entry)
                    _fetch_version(client, dict(zip(names, sources)), pin, final)
        return final if is_folder else final / names[0]


FS = FileSystem()


def _fetch_version(client: FileClient, sources: dict[str, str], pin: str, final: Path) -> None:
    temp = atomic.beside(final, 'tmp')
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

    _persist(client, address, once, lambda: target.stat().st_size if target.exists() else 0)


def _persist(client: FileClient, address: str, work: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Do work, again after each transient failure, until RETRY_TIMES tries in a row brought nothing new."""
    tries, best = 0, 0
    while True:
        try:
            return work()
        except Transient as error:
            reached = progress()
            tries, best = (1 if reached > best else tries + 1), max(best, reached)
            if tries > client.RETRY_TIMES:
                raise DataError(f'{shown(address)}: gave up after {tries} tries: {error}') from error
            pause = min(30.0, client.RETRY_DELAY * 2 ** (tries - 1)) if error.wait is None else min(60.0, error.wait)
            get_logger().info(f'{shown(address)}: {error}; trying again')
            time.sleep(pause * random.uniform(0.75, 1.25))      # so that many processes do not come back in step


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


def _collect_orphans(entry: Path) -> None:
    for left in entry.glob('.tmp-*'):
        try:
            newest = max((p.stat().st_mtime for p in (left, *left.rglob('*'))), default=0)
        except FileNotFoundError:    # its owner has just published it
            continue
        if newest < time.time() - ORPHAN_AGE:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """What the operating system refuses, as a DataError."""
    try:
        yield
    except OSError as error:
        if error.errno in atomic.NO_SPACE:
            raise DataError(f'no space for {shown(address)}: {error.strerror}; {error.filename or ""}') from error
        raise DataError(f'{shown(address)}: {error.strerror or error}{f": {error.filename}" if error.filename else ""}') from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()
