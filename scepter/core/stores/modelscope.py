"""Models of ModelScope: ms://org/model[:revision][@file], over the web; every file is compared with the sha256 of the hub's list."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from scepter.core.disk import atomic
from scepter.core.errors import DataError
from scepter.core.registry import FILE_SYSTEMS
from scepter.core.secrets import note_secrets
from scepter.core.stores.client import Kind, Transient, is_public_only
from scepter.core.stores.http import HttpFs, Refused
from scepter.core.stores.hub import Address, below, parse

MOST = 3000     # entries of a list: the hub leaves out what is beyond them, without a word


@FILE_SYSTEMS.register_class()
class ModelscopeFs(HttpFs):
    """ModelScope's hub. MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN and MODELSCOPE_CACHE act as they do for its own library, whose copies
    are taken where they are the same files."""

    schemes = ('ms',)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self._lists: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}

    def stamp(self, path: str) -> str:
        entry = self._entry(path)
        return entry.get('Sha256') or str((entry.get('Size'), entry.get('Revision')))

    def kind(self, path: str) -> Kind | None:
        address = parse(path)
        try:
            files = self._files(path)
        except Refused as error:
            if error.code in (404, 410):
                return None
            raise
        if address.file in files:
            return 'file'
        return 'folder' if not address.file or any(name.startswith(f'{address.file}/') for name in files) else None

    def size(self, path: str) -> int:
        return int(self._entry(path)['Size'])

    def list(self, path: str) -> list[str]:
        address = parse(path)
        root = f'{address.file}/' if address.file else ''
        found = sorted(name[len(root):] for name in self._files(path) if name.startswith(root))
        if not found:
            raise DataError(f'{path}: {address.repo} has no folder {address.file}')
        return found

    def get(self, path: str, target: Path) -> bool:
        address, entry = parse(path), self._entry(path)
        expected = entry.get('Sha256')
        for copy in _copies(address):
            if expected and copy.stat().st_size == entry.get('Size') and atomic.digest(copy).sha256 == expected:
                shutil.copyfile(copy, target)
                return True
        with _own_hub():
            is_proven = super().get(self._url(address), target)
        found = atomic.digest(target)
        if expected and found.sha256 != expected:
            target.unlink()
            raise Transient(f'sha256 {expected} expected, {found.sha256} found')
        return is_proven or bool(expected)

    def read(self, path: str, start: int, size: int) -> bytes:
        with _own_hub():
            return super().read(self._url(parse(path)), start, size)

    def kept(self, path: str, is_folder: bool) -> Path | None:
        address = parse(path)
        found = [p for p in _copies(address) if (p.is_dir() if is_folder else p.is_file())]
        return found[0] if found else None

    def below(self, path: str, name: str) -> str:
        return below(path, name)

    def url(self, path: str, seconds: int) -> str:
        raise self.lacks(path, 'give web addresses')

    # ---------------------------------------------------------------- the hub's interface
    def _entry(self, path: str) -> dict[str, Any]:
        address = parse(path)
        if not address.file:
            raise DataError(f'{path}: name the file as well: ms://{address.repo}@<file>')
        files = self._files(path)
        if address.file not in files:
            raise DataError(f'{path}: {address.repo} has no file {address.file}')
        return files[address.file]

    def _files(self, path: str) -> dict[str, dict[str, Any]]:
        """Name -> what the hub tells of it, of all files of the repository; asked for once."""
        address = parse(path)
        place = address.repo, address.revision or 'master'
        if place not in self._lists:
            question = urlencode({'Revision': place[1], 'Recursive': 'True'})
            with _own_hub(), self._request(f'{_endpoint()}/api/v1/models/{address.repo}/repo/files?{question}') as answer:
                try:
                    entries = json.loads(answer.read())['Data']['Files']
                    files = {entry['Path']: entry for entry in entries if entry.get('Type') != 'tree'}
                except (ValueError, KeyError, TypeError) as error:
                    raise Transient('the hub answers with something that is no list of files') from error
            if len(entries) >= MOST:
                raise DataError(f'{path}: the hub lists {MOST} files at most, and this repository has more: clone it, and name the folder')
            self._lists[place] = files
        return self._lists[place]

    def _url(self, address: Address) -> str:
        question = urlencode({'Revision': address.revision or 'master', 'FilePath': address.file}, quote_via=quote)
        return f'{_endpoint()}/api/v1/models/{address.repo}/repo?{question}'

    def _private_headers(self) -> dict[str, str]:
        token = os.environ.get('MODELSCOPE_API_TOKEN', '').strip()
        note_secrets({'MODELSCOPE_API_TOKEN': token})
        return {'Authorization': f'Bearer {token}', 'Cookie': f'm_session_id={token}'} if token else {}


def _endpoint() -> str:
    return (os.environ.get('MODELSCOPE_ENDPOINT') or 'https://www.modelscope.cn').rstrip('/')


@contextmanager
def _own_hub() -> Iterator[None]:
    """Inside, the hub may be asked wherever it is: the user names it by MODELSCOPE_ENDPOINT, whoever wrote ms://."""
    token = is_public_only.set(False)
    try:
        yield
    finally:
        is_public_only.reset(token)


def _copies(address: Address) -> Iterator[Path]:
    """Where ModelScope's own library, of any version, may have put the file or folder."""
    cache = Path(os.environ.get('MODELSCOPE_CACHE') or Path.home() / '.cache' / 'modelscope').expanduser()
    owner, name = address.repo.split('/')
    folders = [cache / 'models' / f'{owner}--{name}' / 'snapshots' / (address.revision or 'master')]
    if address.revision is None:
        folders += [cache / folder / owner / name.replace('.', '___') for folder in ('models', 'hub/models')]
    yield from (folder / address.file for folder in folders if (folder / address.file).exists())
