"""Models of the Hugging Face hub: hf://org/model[:revision][@file]."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from scepter.core.disk import atomic
from scepter.core.errors import DataError
from scepter.core.registry import FILE_SYSTEMS, need
from scepter.core.schema import param
from scepter.core.secrets import hide
from scepter.core.stores.client import FileClient, Kind

T = TypeVar('T')
# weights of other frameworks, which most repositories carry beside those of PyTorch
FOREIGN = ('*.msgpack', '*.h5', '*.ot', '*.onnx', '*.onnx_data', '*.tflite', '*.mlmodel', 'coreml/*', 'openvino_*')


class Address(NamedTuple):
    """The parts of `hf://org/name[:revision]@file`, or of one with ms://."""

    repo: str
    revision: str | None
    file: str       # '' for the whole repository


@FILE_SYSTEMS.register_class()
class HuggingfaceFs(FileClient):
    """The Hugging Face hub, through huggingface_hub and its own cache, which transformers and diffusers share.

    HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT and HF_TOKEN act as they do there.
    """

    schemes = ('hf',)

    ALLOW_PATTERNS: list[str] | None = param(None, 'Files of a repository to fetch, as globs; default all.')
    IGNORE_PATTERNS: list[str] = param(list(FOREIGN), 'Files of a repository to leave out, as globs.')

    def here(self, path: str, is_folder: bool) -> Path:
        hub, address = self._hub(), parse(path)
        if is_folder:
            allow = [f'{address.file}/*'] if address.file else self.ALLOW_PATTERNS
            folder = Path(_explain(path, lambda: hub.snapshot_download(address.repo, revision=address.revision, allow_patterns=allow,
                                                                       ignore_patterns=self.IGNORE_PATTERNS))) / address.file
            if not folder.is_dir():
                raise DataError(f'{path}: {address.repo} has no folder {address.file}')
            for file in folder.rglob('*'):
                self._verify(path, file)
            return folder
        if not address.file:
            raise DataError(f'{path}: name the file as well: hf://{address.repo}@<file>')
        file = Path(_explain(path, lambda: hub.hf_hub_download(address.repo, address.file, revision=address.revision)))
        self._verify(path, file)
        return file

    def kept(self, path: str, is_folder: bool) -> Path | None:
        hub, address = self._hub(), parse(path)
        try:
            if is_folder:
                folder = Path(hub.snapshot_download(address.repo, revision=address.revision, local_files_only=True)) / address.file
                return folder if folder.is_dir() else None
            # not hf_hub_download: it asks the hub what kinds of callers there are, also where it is to look at local files only
            found = hub.try_to_load_from_cache(address.repo, address.file, revision=address.revision)
            return Path(found) if isinstance(found, str) else None
        except Exception:    # the library has a class of its own for each way of not having it
            return None

    def kind(self, path: str) -> Kind | None:
        hub, address = self._hub(), parse(path)
        if not address.file:
            return 'folder' if _explain(path, lambda: hub.repo_exists(address.repo)) else None
        if _explain(path, lambda: hub.file_exists(address.repo, address.file, revision=address.revision)):
            return 'file'
        if not _explain(path, lambda: hub.repo_exists(address.repo)):
            return None
        return 'folder' if self.list(path) else None

    def list(self, path: str) -> list[str]:
        hub, address = self._hub(), parse(path)
        prefix = f'{address.file}/' if address.file else ''
        names = _explain(path, lambda: hub.list_repo_files(address.repo, revision=address.revision))
        return sorted(name[len(prefix):] for name in names if name.startswith(prefix))

    def below(self, path: str, name: str) -> str:
        return below(path, name)

    def _hub(self) -> Any:
        try:
            return need('huggingface_hub', 'clip')
        except ImportError as error:
            raise DataError(f'hf:// needs huggingface_hub: {error}') from error

    def _verify(self, path: str, file: Path) -> None:
        """Hash a large file once: the hub names it by its sha256, but its library compares the length alone."""
        blob = file.resolve()
        if not re.fullmatch('[0-9a-f]{64}', blob.name) or not blob.is_file():
            return
        mark = blob.with_name(f'{blob.name}.scepter-verified')
        state = blob.stat()
        now = f'{state.st_size} {state.st_mtime_ns}'
        if mark.exists() and mark.read_text() == now:
            return
        if (found := atomic.digest(blob).sha256) != blob.name:
            raise DataError(f'{path}: {file} is damaged: sha256 {blob.name} expected, {found} found; delete {blob} to fetch it again')
        try:
            mark.write_text(now)
        except OSError:     # a cache that only others may write to: hash again the next time
            pass


def parse(path: str) -> Address:
    """hf://org/model[:revision][@file], or ms:// of the same form.

    Raises DataError where it is not of this form, or the file could lead elsewhere.
    """
    match = re.fullmatch(r'(hf|ms)://([\w.-]+/[\w.-]+)(?::([\w./-]+))?(?:@(.+))?', path)
    if not match or '..' in match[2] or '..' in (match[3] or ''):
        scheme = path.partition('://')[0] or 'hf'
        raise DataError(f'{path}: expected {scheme}://org/model, {scheme}://org/model:revision or {scheme}://org/model@folder/file')
    file = (match[4] or '').rstrip('/')
    if file:
        try:
            atomic.safe_join(Path('/nowhere'), file)
        except ValueError as error:
            raise DataError(f'{path}: refused: {error}') from error
    return Address(match[2], match[3], file)


def below(path: str, name: str) -> str:
    """The address of a file in a repository, or in a folder of one."""
    return f'{path.rstrip("/")}{"/" if parse(path).file else "@"}{name}'


def _explain(path: str, work: Callable[[], T]) -> T:
    try:
        return work()
    except Exception as error:      # the library raises its own, httpx's and the standard library's errors, whatever the version
        first = hide(str(error).strip().split('\n')[0]) or type(error).__name__
        raise DataError(f'{path}: the Hugging Face hub: {first}') from error
