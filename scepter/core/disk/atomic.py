"""Writing so that a reader finds the whole file or none, also after a kill, a full disk or a power cut.

Every byte that must survive goes through here: write to a name nobody reads, flush and fsync, rename, fsync the folder.
The module calls the operating system as `os.<call>` only, so that tests can record each call and replay every possible crash.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from scepter.core import pulse

CHUNK = 1 << 23     # bytes; large enough that hashing and writing overlap, small enough to stay out of the way
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Digest(NamedTuple):
    """What a file must look like: its length in bytes and its sha256 in hex."""

    size: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> Digest:
    """Write the chunks to a new file and fsync it; hashed on the way, so nothing is read twice. Raises OSError."""
    size, sha = 0, hashlib.sha256()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with ThreadPoolExecutor(1) as hasher:
            for view in _pieces(chunks):
                size += len(view)
                pulse.beat()
                hashed = hasher.submit(sha.update, view)
                while view:
                    view = view[os.write(file, view):]
                hashed.result()
        os.fsync(file)
    finally:
        os.close(file)
    return Digest(size, sha.hexdigest())


def _pieces(chunks: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """The same bytes in pieces of at most CHUNK; small chunks are gathered, a network has hundreds of them."""
    gathered = bytearray()
    for chunk in chunks:
        if len(gathered) + len(chunk) <= CHUNK // 8:
            gathered += chunk
            continue
        if gathered:
            yield memoryview(gathered)
            gathered = bytearray()
        for start in range(0, len(chunk), CHUNK):
            yield memoryview(chunk)[start:start + CHUNK]
    if gathered:
        yield memoryview(gathered)


def digest(path: Path) -> Digest:
    """Length and sha256 of a file as it lies on the disk. Raises OSError."""
    size, sha, buffer = 0, hashlib.sha256(), bytearray(CHUNK)
    with open(path, 'rb', buffering=0) as file:
        while count := file.readinto(buffer):
            sha.update(memoryview(buffer)[:count])
            size += count
    return Digest(size, sha.hexdigest())


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, each durable in its own parent."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    for folder in reversed(missing):
        try:
            os.mkdir(folder)
        except FileExistsError:
            continue
        sync(folder.parent)


def publish(source: Path, target: Path) -> None:
    """Rename source, durable already, to target in the same file system, and make the rename durable."""
    os.rename(source, target)
    sync(target.parent)


def trash(path: Path) -> None:
    """Take a folder out of sight by one rename, then delete it: a kill in between leaves no half folder at its name."""
    doomed = path if path.name.startswith('.trash-') else beside(path, 'trash')
    if doomed != path:
        publish(path, doomed)
    shutil.rmtree(doomed)


def beside(path: Path, word: str) -> Path:
    """A hidden name in path's own folder (so that a rename never crosses a file system), unique to this attempt.

    It ends in path's own name: whoever writes there chooses the format by the suffix.
    """
    return path.with_name(f'.{word}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}')


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there appears at `path`, whole, when the block ends well, else never.

    Raises FileNotFoundError where the block wrote nothing; the temporary file is removed in every case.
    """
    make_folder(path.parent)
    temp = beside(path, 'tmp')
    try:
        yield temp
        sync(temp)
        publish(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def safe_join(root: Path, name: str) -> Path:
    """root / name for a name out of a manifest, an index or a listing. Raises ValueError where it could leave root."""
    parts = name.split('/')
    if any(not 0 < len(p.encode('utf-8', 'surrogateescape')) < 256 or p in ('.', '..') for p in parts):
        raise ValueError(f'{name!r} is not a plain relative name')
    if any(c in name for c in '\\:\0') or parts[0].startswith('~') or not name.isprintable():
        raise ValueError(f'{name!r} is not a plain relative name')
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f'{name!r} leads out of {root}')
    return path


def space(folder: Path) -> int:
    """Free bytes where folder, or its nearest existing parent, lies."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free
