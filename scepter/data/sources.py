"""What a file held: its sha256, remembered beside its stat, so that only a file that may have changed is read again."""
from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from scepter.core import jsonl

Stamp = tuple[int, int, int, int]    # bytes, modified, changed, number in its file system
CHUNK = 1 << 20


class Source(NamedTuple):
    """The bytes that a picture is decoded from: a file, or a span of one."""
    path: str
    first: int = 0
    size: int | None = None    # None: up to the end

    def stamp(self) -> Stamp:
        """What changes with the file, without reading it. Raises OSError."""
        found = os.stat(self.path)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino

    def open(self) -> BinaryIO:
        """The bytes, as a file. Raises OSError."""
        if self.size is None and not self.first:
            return open(self.path, 'rb')
        with open(self.path, 'rb') as file:
            file.seek(self.first)
            return io.BytesIO(file.read(-1 if self.size is None else self.size))

    def digest(self) -> str:
        """sha256 of the bytes. Raises OSError."""
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
                    self.known[Source(row['path'], row['first'], row['size'])] = Known(tuple(row['stamp']), row['sha256'])
                except (ValueError, KeyError, TypeError):
                    continue    # a line that a kill has torn: its file is read again

    def digests(self, sources: Iterable[Source], anew: bool = False) -> dict[Source, str | None]:
        """sha256 of each; None where it cannot be read. Those that may have changed, or all where anew, are read, by four threads.
        """
        stamps: dict[Source, Stamp | None] = {}
        for source in sources:
            try:
                stamps[source] = source.stamp()
            except OSError:
                stamps[source] = None
        unsure = [s for s, stamp in stamps.items() if stamp is not None and (anew or s not in self.known or self.known[s].stamp != stamp)]
        with ThreadPoolExecutor(4) as pool:
            read = dict(zip(unsure, pool.map(_digest, unsure)))
        rows = []
        for source, sha in read.items():
            if sha is not None and self.known.get(source) != (known := Known(stamps[source], sha)):    # type: ignore[arg-type]
                self.known[source] = known
                rows.append({**source._asdict(), 'stamp': known.stamp, 'sha256': sha})
        jsonl.append(self.file, rows)
        return {s: None if stamp is None else read[s] if s in read else self.known[s].sha256 for s, stamp in stamps.items()}


def _digest(source: Source) -> str | None:
    try:
        return source.digest()
    except OSError:
        return None


def code_of(transform: Any) -> str:
    """A digest of the file that a transform of a user's own is written in; empty for ours and a library's, whose arguments say it all."""
    if transform.__module__.split('.')[0] in ('scepter', 'torchvision'):
        return ''
    try:
        return hashlib.sha256(inspect.getsource(sys.modules[transform.__module__]).encode()).hexdigest()
    except (OSError, TypeError, KeyError):
        return ''
