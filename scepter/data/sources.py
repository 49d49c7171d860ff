"""What a file held: its sha256, remembered beside its stat, so that only a file that may have changed is read again."""
from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from scepter.core import jsonl
from scepter.data.images import UnreadableError

Stamp = tuple[int, int, int, int]    # bytes, modified, changed, number in its file system
CHUNK = 1 << 20
Found = TypeVar('Found')


class Source(NamedTuple):
    """The bytes that a picture is decoded from: a file, a span of one, or a cell of a table, which its dataset alone can open."""
    path: str
    first: int = 0
    size: int | None = None    # None: up to the end
    cell: str = ''             # which cell of the file; a change of the file may be one of it

    @property
    def is_file(self) -> bool:
        """Whether it is all of a file."""
        return not self.first and self.size is None and not self.cell

    def stamp(self) -> Stamp:
        """What changes with the file, without reading it. Raises OSError."""
        found = os.stat(self.path)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino

    def open(self) -> BinaryIO:
        """The bytes, as a file; not of a cell. Raises OSError."""
        if self.is_file:
            return open(self.path, 'rb')
        with open(self.path, 'rb') as file:
            file.seek(self.first)
            return io.BytesIO(file.read(-1 if self.size is None else self.size))

    def digest(self) -> str:
        """sha256 of the bytes; not of a cell. Raises OSError."""
        sha, left = hashlib.sha256(), self.size
        with open(self.path, 'rb', buffering=0) as file:
            file.seek(self.first)
            while left != 0 and (data := file.read(CHUNK if left is None else min(CHUNK, left))):
                sha.update(data)
                left = None if left is None else left - len(data)
        return sha.hexdigest()


class Known(NamedTuple):
    """What is remembered of a source."""
    stamp: Stamp
    sha256: str


class SourceBook:
    """The digests of sources, in a file of lines that only grows; the last line of a source holds.

    A source whose stamp is the one that stands here is taken to be what it was. Times are those of the file system, and a change within
    the tick of a clock is not seen there: `digests(…, anew=True)` reads every byte.
    """

    def __init__(self, file: str | os.PathLike[str]):
        self.file = Path(file)
        self.known: dict[Source, Known] = {}
        if self.file.is_file():
            for line in self.file.read_bytes().splitlines(keepends=True):
                try:
                    row = json.loads(line)
                    self.known[Source(row['path'], row['first'], row['size'], row['cell'])] = Known(tuple(row['stamp']), row['sha256'])
                except (ValueError, KeyError, TypeError):
                    continue    # a line that a kill has torn: its file is read again

    def digests(self, sources: Mapping[Source, int], bytes_of: Callable[[int], bytes], anew: bool = False) -> dict[Source, str | None]:
        """sha256 of each; None where it cannot be read. Those that may have changed, or all where anew, are read, files by four threads.

        sources: each with the index of a sample that is made of it.  bytes_of: what the cell of an index holds; asked in their order.
        """
        of_file = {path: _or_none(Source(path).stamp) for path in {source.path for source in sources}}
        stamps = {source: of_file[source.path] for source in sources}
        unsure = [s for s, stamp in stamps.items() if stamp is not None and (anew or s not in self.known or self.known[s].stamp != stamp)]
        files = [source for source in unsure if not source.cell]
        with ThreadPoolExecutor(4) as pool:
            read = dict(zip(files, pool.map(_or_none, [source.digest for source in files])))
        read |= {s: _or_none(partial(_digest_of, bytes_of, sources[s])) for s in unsure if s.cell}
        rows = []
        for source, sha in read.items():
            if sha is not None and self.known.get(source) != (known := Known(stamps[source], sha)):    # type: ignore[arg-type]
                self.known[source] = known
                rows.append({**source._asdict(), 'stamp': known.stamp, 'sha256': sha})
        jsonl.append(self.file, rows)
        return {s: None if stamp is None else read[s] if s in read else self.known[s].sha256 for s, stamp in stamps.items()}


def _digest_of(bytes_of: Callable[[int], bytes], index: int) -> str:
    return hashlib.sha256(bytes_of(index)).hexdigest()


def _or_none(ask: Callable[[], Found]) -> Found | None:
    try:
        return ask()
    except (OSError, UnreadableError):
        return None


def code_of(transform: Any) -> str:
    """A digest of the file that a transform of a user's own is written in; empty for ours and a library's, whose arguments say it all."""
    if transform.__module__.split('.')[0] in ('scepter', 'torchvision'):
        return ''
    try:
        return hashlib.sha256(inspect.getsource(sys.modules[transform.__module__]).encode()).hexdigest()
    except (OSError, TypeError, KeyError):
        return ''
