"""Plain paths and file:// addresses."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from scepter.core.disk import atomic
from scepter.core.errors import DataError
from scepter.core.faults import did_you_mean
from scepter.core.registry import FILE_SYSTEMS
from scepter.core.stores.client import FileClient, Kind

LIKE_A_REPOSITORY = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')


@FILE_SYSTEMS.register_class()
class LocalFs(FileClient):
    """The file system of this machine. Reading never copies and never creates anything."""

    schemes = ('file',)

    def here(self, path: str, is_folder: bool) -> Path:
        local = local_path(path)
        if is_folder and local.is_file():
            raise DataError(f'{local} is a file, a folder is expected here')
        if not is_folder and local.is_dir():
            raise DataError(f'{local} is a folder, a file is expected here')
        if not local.exists():
            raise DataError(missing(local))
        return local

    def staging(self, path: str, cache: Path) -> Path:
        local = local_path(path)
        atomic.make_folder(local.parent)
        return local

    def put(self, source: Path, path: str) -> None:
        atomic.sync(source)
        atomic.publish(source, local_path(path))

    def kind(self, path: str) -> Kind | None:
        local = local_path(path)
        return 'folder' if local.is_dir() else 'file' if local.exists() else None

    def list(self, path: str) -> list[str]:
        folder = self.here(path, is_folder=True)
        return sorted(Path(root, name).relative_to(folder).as_posix() for root, _, names in os.walk(folder) for name in names)

    def remove(self, path: str) -> None:
        self.here(path, is_folder=False).unlink()

    def make_folder(self, path: str) -> None:
        atomic.make_folder(local_path(path))

    def url(self, path: str, seconds: int) -> str:
        return local_path(path).absolute().as_uri()


def local_path(path: str) -> Path:
    """The path of a plain or file:// address; ~ is the user's home. Raises DataError for a file:// address of another machine."""
    if not path.lower().startswith('file://'):
        return Path(path).expanduser()
    parts = urlsplit(path)
    if parts.netloc not in ('', 'localhost'):
        raise DataError(f'{path}: file:// reaches this machine only; write file:///{parts.netloc}{parts.path} for an absolute path')
    return Path(unquote(parts.path))


def missing(path: Path) -> str:
    """What to say of a path that is not there: the nearest folder, the nearest name in it, and how a hub's repository is written."""
    nearest = next(p for p in path.absolute().parents if p.is_dir())
    step = path.absolute().relative_to(nearest).parts[0]
    hub = f'. A repository of the Hugging Face hub is written hf://{path}' if LIKE_A_REPOSITORY.fullmatch(str(path)) else ''
    return f'{path} does not exist; the nearest folder that does is {nearest}{did_you_mean(step, [p.name for p in nearest.iterdir()])}{hub}'
