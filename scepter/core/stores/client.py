"""What the front asks of a store: get, put, exists, list, remove, and the two words in which a store fails."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from scepter.core.errors import DataError
from scepter.core.schema import Component, param


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

    def staging(self, path: str, cache: Path) -> Path:
        """A free local path for `put_to` to write to; the folder exists, the name ends as path does."""
        folder = cache / 'outgoing'
        folder.mkdir(parents=True, exist_ok=True)
        return folder / base_name(path)

    def put(self, source: Path, path: str) -> None:
        """Make source, which may be consumed, the file at path: all of it, or nothing is seen there."""
        raise self.lacks(path, 'be written')

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder; a failure to find out is an error, never False."""
        raise self.lacks(path, 'be asked what it holds')

    def list(self, path: str) -> list[str]:
        """Names of all files below the folder, relative to it, with /, sorted."""
        raise self.lacks(path, 'be listed')

    def remove(self, path: str) -> None:
        """Remove a file."""
        raise self.lacks(path, 'have files removed')

    def lacks(self, path: str, verb: str) -> DataError:
        """The error of a store that cannot do this; verb: what it is asked to, e.g. 'have files removed'."""
        return DataError(f'{shown(path)}: {urlsplit(path).scheme}:// cannot {verb}')


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
