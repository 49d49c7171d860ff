"""Every other store that fsspec can open: s3://, gs://, memory://, sftp://, ..."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from scepter.core.errors import DataError
from scepter.core.registry import FILE_SYSTEMS
from scepter.core.schema import param
from scepter.core.secrets import hide
from scepter.core.stores.client import FileClient, Kind, Transient, need_space, shown

T = TypeVar('T')
BUCKETS = ('s3', 's3a', 'gs', 'gcs', 'az', 'abfs', 'abfss', 'oci', 'obs')     # where making a folder makes a bucket, also of a typo


@FILE_SYSTEMS.register_class()
class FsspecFs(FileClient):
    """Stores through fsspec, with credentials where its packages look for them. `put_to` is as atomic as the store's own upload."""

    SCHEMES: list[str] = param([], 'Schemes whose addresses this client serves, e.g. [s3]; a client without any config serves each.')
    OPTIONS: dict = param({}, "What the scheme's package takes, e.g. {endpoint_url: https://...} for s3fs.")

    @property
    def prefixes(self) -> list[str]:
        return [f'{scheme}://' for scheme in self.SCHEMES]

    @staticmethod
    def serves(scheme: str) -> bool:
        """Whether fsspec is here and can open this scheme with the packages installed."""
        try:
            from fsspec import get_filesystem_class
            get_filesystem_class(scheme)
        except (ImportError, ValueError):
            return False
        return True

    def stamp(self, path: str) -> str:
        return self._do(path, lambda fs, name: str(fs.ukey(name)))

    def get(self, path: str, target: Path) -> bool:
        expected = self._do(path, lambda fs, name: fs.info(name).get('size'))
        if expected is not None:
            need_space(path, target.parent, expected)
        self._do(path, lambda fs, name: fs.get_file(name, str(target)))
        if expected is not None and (found := target.stat().st_size) != expected:
            raise Transient(f'{expected} bytes expected, {found} received')
        return expected is not None

    def read(self, path: str, start: int, size: int) -> bytes:
        return self._do(path, lambda fs, name: fs.cat_file(name, start=start, end=start + size))

    def put(self, source: Path, path: str) -> None:
        def send(fs: Any, name: str) -> int | None:
            if path.partition('://')[0].lower() not in BUCKETS:
                fs.makedirs(fs._parent(name), exist_ok=True)
            fs.put_file(str(source), name)
            fs.invalidate_cache()
            return fs.info(name).get('size')

        found, expected = self._do(path, send), source.stat().st_size
        if found not in (None, expected):
            raise Transient(f'{expected} bytes were sent, {found} arrived')

    def kind(self, path: str) -> Kind | None:
        def found(fs: Any, name: str) -> Kind | None:      # not fs.exists: it calls every error absence
            try:
                return 'folder' if fs.info(name)['type'] == 'directory' else 'file'
            except FileNotFoundError:
                return None
        return self._do(path, found)

    def size(self, path: str) -> int:
        size = self._do(path, lambda fs, name: fs.info(name).get('size'))
        if size is None:
            raise DataError(f'{shown(path)}: the store tells no length')
        return size

    def list(self, path: str) -> list[str]:
        def names(fs: Any, name: str) -> list[str]:
            root = name.rstrip('/') + '/'
            if not fs.isdir(name):
                raise FileNotFoundError
            return sorted(found[len(root):] for found in fs.find(name))
        return self._do(path, names)

    def remove(self, path: str) -> None:
        self._do(path, lambda fs, name: fs.rm_file(name))

    def make_folder(self, path: str) -> None:
        self._do(path, lambda fs, name: fs.makedirs(name, exist_ok=True))

    def url(self, path: str, seconds: int) -> str:
        try:
            return self._do(path, lambda fs, name: fs.sign(name, expiration=seconds))
        except NotImplementedError as error:
            raise self.lacks(path, 'give web addresses') from error

    def _do(self, path: str, work: Callable[[Any, str], T]) -> T:
        import fsspec
        try:
            fs, name = fsspec.core.url_to_fs(path, **self.OPTIONS)
            return work(fs, name)
        except FileNotFoundError as error:
            raise DataError(f'{shown(path)}: does not exist') from error
        except PermissionError as error:
            raise DataError(f'{shown(path)}: permission denied') from error
        except (ConnectionError, TimeoutError) as error:
            raise Transient(str(error) or type(error).__name__) from error
        except (OSError, DataError, Transient):
            raise
        except Exception as error:      # each package has classes of its own for a network that fails
            if type(error).__module__ == 'builtins':
                raise
            raise Transient(hide(str(error).split('\n')[0]) or type(error).__name__) from error
