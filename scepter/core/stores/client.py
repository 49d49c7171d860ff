"""What the front asks of a store: get, put, kind, list, remove, and the two words in which a store fails."""

from __future__ import annotations

import errno
import http.client
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Literal, TypeVar
from urllib.parse import urlsplit

from scepter.core.disk import atomic
from scepter.core.errors import DataError
from scepter.core.logger import get_logger
from scepter.core.schema import Component, param

SLOWEST = 100       # bytes a second; below it over TIMEOUT seconds a transfer has stalled, though bytes still drip
CRAWL = 1024        # bytes a second; a try that brings less has brought nothing
Kind = Literal['file', 'folder']
T = TypeVar('T')

# whether the addresses at hand were written by a stranger, so that only public machines may be asked
is_public_only: ContextVar[bool] = ContextVar('is_public_only', default=False)


class Transient(Exception):
    """A failure that another try may cure; `wait`: seconds the store asked us to wait, or None."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class FileClient(Component, base=True):
    """One store. A client says only what is special: caching, locks, retries and atomic appearance are the front's.

    Every method takes the whole address, scheme included. It raises DataError for what is final, Transient for what may pass.
    """

    schemes: tuple[str, ...] = ()

    RETRY_TIMES: int = param(5, 'Tries after the first that bring no new byte, before giving up.', least=0)
    RETRY_DELAY: float = param(0.5, 'Seconds before the second try; it doubles with each one, up to 30.', least=0)
    PATIENCE: float = param(18.0, 'Seconds without a new byte after which there is no further try.', above=0)
    TEMP_DIR: str | None = param(None, 'Folder of the copies on this machine, which stay; default $SCEPTER_CACHE.')

    @property
    def prefixes(self) -> list[str]:
        """Beginnings of the addresses that are this client's."""
        return [f'{scheme}://' for scheme in self.schemes]

    def here(self, path: str, is_folder: bool) -> Path | None:
        """Where the file or folder lies on this machine, for a store that keeps it here itself; None: the front downloads it."""
        return None

    def kept(self, path: str, is_folder: bool) -> Path | None:
        """A copy that the store's own library keeps on this machine, found without asking the store; None: the front looks in its cache."""
        return None

    def stamp(self, path: str) -> str:
        """A word that changes when the file's content does, asked once per process and file; '' where the store has none."""
        return ''

    def get(self, path: str, target: Path) -> bool:
        """Bring the file's bytes to target, which may hold the first of them from an earlier try; whether its length was proven."""
        raise self.lacks(path, 'be read')

    def read(self, path: str, start: int, size: int) -> bytes:
        """So many bytes of the file from start on; fewer where it ends."""
        if (local := self.here(path, is_folder=False)) is None:
            raise self.lacks(path, 'be read in parts')
        with open(local, 'rb') as file:
            file.seek(start)
            return file.read(size)

    def staging(self, path: str, cache: Path) -> Path:
        """A free local path for `put_to` to write to; the folder exists, the name ends as path does."""
        folder = cache / 'outgoing'
        folder.mkdir(parents=True, exist_ok=True)
        return folder / base_name(path)

    def put(self, source: Path, path: str) -> None:
        """Make source, which the store of this machine consumes, the file at path: all of it, or nothing is seen. Proves what arrived."""
        raise self.lacks(path, 'be written')

    def extend(self, source: Path, path: str) -> None:
        """Make source, which grows at its end, the file at path; a store that can is sent what is new alone."""
        with tempfile.NamedTemporaryFile() as still:
            shutil.copyfile(source, still.name)
            self.put(Path(still.name), path)

    def kind(self, path: str) -> Kind | None:
        """What is at path; None: nothing. A failure to find out is an error, never None."""
        raise self.lacks(path, 'be asked what it holds')

    def size(self, path: str) -> int:
        """Bytes of a file."""
        if (local := self.here(path, is_folder=False)) is None:
            raise self.lacks(path, 'be asked for sizes')
        return local.stat().st_size

    def list(self, path: str) -> list[str]:
        """Names of all files below the folder, relative to it, with /, sorted."""
        raise self.lacks(path, 'be listed')

    def below(self, path: str, name: str) -> str:
        """The address of a file that `list` names."""
        return f'{path.rstrip("/")}/{name}'

    def remove(self, path: str) -> None:
        """Remove a file; where there is none, an error if the store says so."""
        raise self.lacks(path, 'have files removed')

    def make_folder(self, path: str) -> None:
        """Make a folder, where the store has such a thing apart from the files in it."""

    def url(self, path: str, seconds: int) -> str:
        """A web address of the file that anybody can read for so long."""
        raise self.lacks(path, 'give web addresses')

    def lacks(self, path: str, verb: str) -> DataError:
        """The error of a store that cannot do this; verb: what it is asked to, e.g. 'have files removed'."""
        return DataError(f'{shown(path)}: {urlsplit(path).scheme}:// cannot {verb}')


def persist(client: FileClient, address: str, work: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Do work, again after each transient failure, until RETRY_TIMES tries in a row, or PATIENCE seconds, brought nothing new."""
    tries, best, since = 0, 0, time.monotonic()
    while True:
        began = time.monotonic()
        try:
            return work()
        except Transient as error:
            reached, now = progress(), time.monotonic()
            if now - began > client.PATIENCE:    # what has stalled ends sooner: this one was at work
                since = now
            if reached - best > CRAWL * (now - began):
                tries, since = 0, now
            tries, best = tries + 1, max(best, reached)
            pause = min(30.0, client.RETRY_DELAY * 2 ** (tries - 1)) if error.wait is None else min(60.0, error.wait)
            if tries > client.RETRY_TIMES or (error.wait is None and now - since + pause > client.PATIENCE):
                raise DataError(f'{shown(address)}: gave up after {tries} tries: {error}') from error
            get_logger().info(f'{shown(address)}: {error}; trying again')
            time.sleep(pause * random.uniform(0.75, 1.25))      # so that many processes do not come back in step


def receive(read: Callable[[int], bytes], file: IO[bytes], timeout: float) -> None:
    """Write what comes to the file, to its end. Raises Transient where bytes only drip, or the connection breaks."""
    began, received = time.monotonic(), 0
    try:
        while data := read(1 << 18):
            file.write(data)
            received += len(data)
            now = time.monotonic()
            if now - began > timeout:
                if received < SLOWEST * (now - began):
                    raise Transient(f'stalled: {received} bytes in {now - began:.0f} s')
                began, received = now, 0
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in atomic.NO_SPACE:
            raise
        raise Transient(reason(error)) from error


def reason(error: object) -> str:
    """Why a connection failed, in words."""
    if isinstance(error, TimeoutError):
        return 'no answer in time'
    if isinstance(error, http.client.IncompleteRead):
        return f'the connection broke off after {len(error.partial)} bytes of a chunk'
    return str(error) or type(error).__name__


def need_space(path: str, folder: Path, size: int) -> None:
    """Raises OSError where the folder's disk cannot take so many bytes, before they are asked for."""
    if (free := atomic.space(folder)) < size:
        raise OSError(errno.ENOSPC, f'{size:,} bytes needed, {free:,} free', str(folder))


def shown(path: str) -> str:
    """An address as messages may show it: without user, password and query, which can be secrets."""
    if '://' not in path:
        return path
    parts = urlsplit(path)
    return parts._replace(netloc=parts.netloc.rpartition('@')[2], query='', fragment='').geturl()


def base_name(path: str) -> str:
    """A harmless file name that ends as the address does."""
    name = shown(path).rstrip('/').replace('@', '/').rpartition('/')[2]
    name = ''.join(c if c.isascii() and (c.isalnum() or c in '._-') else '-' for c in name).lstrip('.-')
    return name[-100:] or 'file'
