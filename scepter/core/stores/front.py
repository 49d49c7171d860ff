"""FS: the one door to files in any store.

    with FS.get_from('https://host/model.safetensors#sha256=...') as local_path: ...
    with FS.get_dir_to_local_dir('hf://org/model') as local_dir: ...
    with FS.put_to('oss://bucket/samples.png') as local_path: ...

A remote file is fetched once per machine and version into $SCEPTER_CACHE (default ~/.cache/scepter), whose folder files/ may be deleted at
any time:

    files/<hash of the address>/<hash of its version>/<name>        a version's folder appears whole, by one rename

A lock spares the other processes the download. Nothing depends on it: each writes to a place of its own, the first to finish wins.
"""

from __future__ import annotations

import contextvars
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from scepter.core.disk import atomic
from scepter.core.errors import DataError
from scepter.core.registry import FILE_SYSTEMS
from scepter.core.stores.client import FileClient, Kind, is_public_only, persist, shown
from scepter.core.stores.fetch import PIN, Cache, explained, fetch_version, files_of, split_pin
from scepter.core.stores.generic import FsspecFs
from scepter.core.stores.local import LocalFs

OF_STRANGERS = ('http', 'https', 'hf', 'ms')    # schemes that a stranger's address may have
T = TypeVar('T')


class LocalPath(str):
    """A path on this machine, which `with` hands out as well. Nothing is cleaned up: it is the file itself or a cached copy."""

    def __enter__(self) -> str:
        return str(self)

    def __exit__(self, *error: object) -> None:
        pass


class FileSystem:
    """Files and folders of every store by their address. All failures are DataError, with the cause and without secrets."""

    def __init__(self) -> None:
        self._clients: dict[str, FileClient] = {}
        self._caches: dict[Path, Cache] = {}
        self._fetched: dict[tuple[str, bool], Path] = {}
        self._closed: ContextVar[tuple[str, frozenset[str]] | None] = ContextVar('closed', default=None)    # other threads go on
        self._own: ContextVar[frozenset[str]] = ContextVar('own', default=frozenset())

    @property
    def cache(self) -> Path:
        """The folder of downloads on this machine."""
        return Path(os.environ.get('SCEPTER_CACHE') or Path.home() / '.cache' / 'scepter').expanduser()

    def init_fs_client(self, cfg: dict, logger: Any = None) -> FileClient:
        """Build a client from its config, e.g. {'NAME': 'HttpFs', 'TIMEOUT': 5}, and use it for its addresses from now on."""
        client = FILE_SYSTEMS.build(cfg, logger=logger)
        self._clients.update(dict.fromkeys(client.prefixes, client))
        return client

    # ---------------------------------------------------------------- reading
    def get_from(self, path: str | os.PathLike, local_path: str | os.PathLike | None = None, wait_finish: bool = True) -> LocalPath:
        """A local path of the file: itself where it is local, else its cached copy, which must not be written to.

        local_path: copy it there and answer that.  wait_finish: wait for another process that is fetching it already, instead of
        fetching it twice.
        """
        found = self._local(os.fspath(path), False, wait_finish)
        if local_path is None:
            return LocalPath(found)
        with explained(os.fspath(path)):
            _copy(found, Path(local_path))
        return LocalPath(local_path)

    def get_dir_to_local_dir(self, path: str | os.PathLike, local_dir: str | os.PathLike | None = None,
                             wait_finish: bool = True) -> LocalPath:
        """A local path of the folder, all files in it; as `get_from`.

        local_dir: where there is no such folder yet, it is filled straight from the store and appears whole.
        """
        if local_dir is not None and not Path(local_dir).exists() and not self.is_local(path):
            with explained(os.fspath(path)):
                atomic.make_folder(Path(local_dir).absolute().parent)
            self._ask(path, lambda client, address: fetch_version(client, files_of(client, address), '', Path(local_dir)))
            return LocalPath(local_dir)
        found = self._local(os.fspath(path), True, wait_finish)
        if local_dir is None:
            return LocalPath(found)
        with explained(os.fspath(path)):
            for name in LocalFs({}).list(str(found)):
                _copy(found / name, Path(local_dir) / name)
        return LocalPath(local_dir)

    def get_batch_objects_from(self, paths: Iterable[str | os.PathLike], threads: int = 16) -> Iterator[LocalPath]:
        """Local paths of many files, in their order, while others are still on their way."""
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(lambda job: job[0].run(self.get_from, job[1]), [(contextvars.copy_context(), path) for path in paths])

    def get_object(self, path: str | os.PathLike, start: int = 0, size: int | None = None) -> bytes:
        """The bytes of a file; with a size, so many of them from `start` on, of which the store sends no others."""
        if size is None:
            with open(self.get_from(path), 'rb') as file:
                file.seek(start)
                return file.read()
        return self._ask(path, lambda client, address: client.read(address, start, size))

    # ---------------------------------------------------------------- writing
    @contextmanager
    def put_to(self, path: str | os.PathLike) -> Iterator[str]:
        """A local path to write a file to. It appears at `path`, whole, when the block ends well; otherwise nothing does."""
        path = os.fspath(path)
        client = self._client(path)
        with explained(path):
            temp = atomic.beside(client.staging(path, self._cache_of(client).folder), 'tmp')
        try:
            yield str(temp)
            if not temp.is_file():
                raise DataError(f'{shown(path)}: put_to expects one file to be written to the path it gives, '
                                f'{"a folder" if temp.is_dir() else "nothing"} was')
            with explained(path):
                persist(client, path, lambda: client.put(temp, path))
            self._forget(path)
        finally:
            shutil.rmtree(temp) if temp.is_dir() else temp.unlink(missing_ok=True)

    def put_object(self, data: bytes | str, path: str | os.PathLike) -> None:
        """Make data the file at path."""
        with self.put_to(path) as temp, explained(os.fspath(path)):
            atomic.write_file(Path(temp), [data.encode() if isinstance(data, str) else data])

    def put_object_from_local_file(self, local_path: str | os.PathLike, path: str | os.PathLike) -> None:
        """Make a copy of a local file, which must not change meanwhile, the file at path."""
        source, address = self._local(os.fspath(local_path), False, True), os.fspath(path)
        client = self._client(address)
        if not isinstance(client, LocalFs):
            with explained(address):
                persist(client, address, lambda: client.put(source, address))
            self._forget(address)
            return
        with self.put_to(path) as temp, explained(address):
            shutil.copyfile(source, temp)

    def extend_object_from_local_file(self, local_path: str | os.PathLike, path: str | os.PathLike) -> None:
        """The same for a file that grows at its end, as logs do: a store that can (oss) is sent what is new alone."""
        address = os.fspath(path)
        self._ask(address, lambda client, address: client.extend(Path(local_path), address))
        self._forget(address)

    def put_dir_from_local_dir(self, local_dir: str | os.PathLike, path: str | os.PathLike, threads: int = 8) -> None:
        """Copy every file below a local folder to below path, each whole or not at all."""
        root = os.fspath(path).rstrip('/')
        names = LocalFs({}).list(os.fspath(local_dir))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda name: self.put_object_from_local_file(Path(local_dir) / name, f'{root}/{name}'), names))

    def make_dir(self, path: str | os.PathLike) -> None:
        """Make a folder and its parents; a store that has folders only as parts of names has it already."""
        self._ask(path, lambda client, address: client.make_folder(address))

    def delete_object(self, path: str | os.PathLike) -> None:
        """Remove a file; an error where there is none, as far as the store tells."""
        self._ask(path, lambda client, address: client.remove(address))
        self._forget(os.fspath(path))

    def _forget(self, path: str) -> None:
        """What this process itself has changed is to be looked at again; so is every folder that it is in."""
        for known in [key for key in self._fetched if key[1] or key[0].partition(PIN)[0] == path]:
            self._fetched.pop(known, None)

    # ---------------------------------------------------------------- asking
    def exists(self, path: str | os.PathLike) -> bool:
        """Whether there is a file or folder at path. Raises DataError where that cannot be found out."""
        return self._kind(path) is not None

    def isfile(self, path: str | os.PathLike) -> bool:
        """Whether there is a file at path."""
        return self._kind(path) == 'file'

    def isdir(self, path: str | os.PathLike) -> bool:
        """Whether there is a folder at path: in a store of names, whether a name goes on below it."""
        return self._kind(path) == 'folder'

    def _kind(self, path: str | os.PathLike) -> Kind | None:
        return self._ask(path, lambda client, address: client.kind(address))

    def size(self, path: str | os.PathLike) -> int:
        """Bytes of a file."""
        return self._ask(path, lambda client, address: client.size(address))

    def list(self, path: str | os.PathLike) -> list[str]:
        """Names of all files below a folder, relative to it, with /, sorted."""
        return self._ask(path, lambda client, address: client.list(address))

    def walk_dir(self, path: str | os.PathLike, recurse: bool = True) -> Iterator[str]:
        """Addresses of all files below a folder, or of those right in it."""
        below = self._client(os.fspath(path)).below
        yield from (below(os.fspath(path), name) for name in self.list(path) if recurse or '/' not in name)

    def get_url(self, path: str | os.PathLike, seconds: int = 3600) -> str:
        """A web address at which anybody can read the file for so long. It is a secret: it holds the right to read."""
        return self._ask(path, lambda client, address: client.url(address, seconds))

    def get_fs_client(self, path: str | os.PathLike) -> FileClient:
        """The client that serves an address."""
        return self._client(os.fspath(path))

    def is_local(self, path: str | os.PathLike) -> bool:
        """Whether a path is of this machine's own file system."""
        return isinstance(self._client(os.fspath(path)), LocalFs)

    def can_write(self, path: str | os.PathLike) -> bool:
        """Whether this kind of store takes files at all."""
        return type(self._client(os.fspath(path))).put is not FileClient.put

    # ---------------------------------------------------------------- what strangers may have asked
    @contextmanager
    def without_requests(self, reason: str, but: Collection[str] = ()) -> Iterator[None]:
        """Inside, no store is asked for anything but the addresses in `but`; a copy that is on this machine already will do.

        For addresses that a stranger wrote. What is not here is a DataError that gives the reason.
        """
        token = self._closed.set((reason, frozenset(address.partition(PIN)[0] for address in but)))
        try:
            yield
        finally:
            self._closed.reset(token)

    @contextmanager
    def public_only(self, but: Collection[str] = ()) -> Iterator[None]:
        """Inside, of all machines only those of the public network are asked, but for the addresses in `but`.

        For addresses that a stranger wrote and the user lets be fetched: none may reach into the user's own network, by whatever
        spelling, name, redirect or second answer of a name server.
        """
        own, token = self._own.set(frozenset(address.partition(PIN)[0] for address in but)), is_public_only.set(True)
        try:
            yield
        finally:
            is_public_only.reset(token)
            self._own.reset(own)

    # ---------------------------------------------------------------- finding the client
    def _client(self, path: str) -> FileClient:
        # without a scheme it is a path, also where it looks like org/name: a typo must not fetch a stranger's repository
        scheme = path.partition('://')[0].lower() if '://' in path else 'file'
        known = f'{scheme}://{path.partition("://")[2]}'
        longest = max((prefix for prefix in self._clients if known.startswith(prefix)), key=len, default=None)
        if longest is not None:
            return self._clients[longest]
        names = {s: name for name in FILE_SYSTEMS for s in FILE_SYSTEMS.get(name).schemes}
        if scheme not in names and not FsspecFs.serves(scheme):
            there = ', '.join(f'{s}://' for s in sorted(names))
            raise DataError(f'{shown(path)}: no client for {scheme}://. There is {there}, and whatever fsspec can open '
                            'with the packages installed here (memory://, s3:// with s3fs, gs:// with gcsfs, ...)')
        client = self._clients[f'{scheme}://'] = FILE_SYSTEMS.build({'NAME': names.get(scheme, 'FsspecFs')})
        return client

    def _cache_of(self, client: FileClient) -> Cache:
        folder = Path(client.TEMP_DIR).expanduser() if client.TEMP_DIR else self.cache
        return self._caches.setdefault(folder, Cache(folder))

    def _ask(self, path: str | os.PathLike, question: Callable[[FileClient, str], T]) -> T:
        address = os.fspath(path).partition(PIN)[0]
        client = self._client(address)
        if (why := self._refusal(client, address)) is not None:
            raise DataError(f'{shown(address)} was not fetched: {why}')
        with explained(address), self._trusting(address):
            return persist(client, address, lambda: question(client, address))

    def _local(self, path: str, is_folder: bool, wait: bool) -> Path:
        """Where the file or folder lies on this machine, after fetching it where it does not."""
        address, pin = split_pin(path, is_folder)
        client = self._client(address)
        cache = self._cache_of(client)
        with explained(address), self._trusting(address):
            if (why := self._refusal(client, address)) is not None:
                copy = client.kept(address, is_folder) or cache.newest(address, pin, is_folder)
                if copy is None:
                    raise DataError(f'{shown(address)} was not fetched: {why}')
                return copy
            here = persist(client, address, lambda: client.here(address, is_folder))
            if here is not None:
                return here
            known = self._fetched.get((path, is_folder))
            if known is None or not known.exists():
                known = self._fetched[path, is_folder] = cache.fetched(client, address, pin, is_folder, wait)
            return known

    def _refusal(self, client: FileClient, address: str) -> str | None:
        """Why no store may be asked for an address, or None."""
        if isinstance(client, LocalFs) and not ('://' in address and is_public_only.get()):
            return None
        if os.environ.get('SCEPTER_OFFLINE', '').lower() in ('1', 'true', 'yes', 'on'):
            return 'SCEPTER_OFFLINE is set'
        if (closed := self._closed.get()) is not None and address not in closed[1]:
            return closed[0]
        if is_public_only.get() and address not in self._own.get() and address.partition('://')[0].lower() not in OF_STRANGERS:
            return f'a stranger named it, and may name {", ".join(f"{scheme}://" for scheme in OF_STRANGERS)} alone'
        return None

    @contextmanager
    def _trusting(self, address: str) -> Iterator[None]:
        """Inside, what the user named may be asked for wherever it lies."""
        token = is_public_only.set(is_public_only.get() and address not in self._own.get())
        try:
            yield
        finally:
            is_public_only.reset(token)


FS = FileSystem()


def _copy(source: Path, target: Path) -> None:
    with atomic.replacing(target) as temp:
        shutil.copyfile(source, temp)
