"""What a first pass over a dataset found, kept until what it was read from changes: ten million rows open in a second.

    $SCEPTER_CACHE/index/<hash of what is indexed>/<hash of its state>/    told.json  rows.u1  starts.i8  sizes.i4

A version's folder appears whole, by one rename; several processes that make the same one at once do the work twice and no harm.
It may be deleted at any time. What took less than WORTH_KEEPING seconds is done again rather than kept.
"""
from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scepter.core.disk import atomic
from scepter.core.errors import DataError
from scepter.core.logger import get_logger
from scepter.core.stores import FS

FORMAT = 2
WORTH_KEEPING = 0.5    # seconds
ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(',', ':')).encode    # json.dumps makes one for each value
DECODE = json.JSONDecoder().raw_decode    # json.loads looks for space around it, which ENCODE writes none of


class Packed(Sequence[Any]):
    """Many small values of JSON in one run of bytes, so that ten million are one object, which forked workers share.

    data: [bytes] uint8.  starts: [N + 1] int64, where each value begins, and the end.
    """

    def __init__(self, data: np.ndarray, starts: np.ndarray):
        self.data, self.starts = data, starts
        self._data, self._starts, self._count = data.data, starts.data, len(starts) - 1    # a view's entry costs a tenth of an array's

    def __reduce__(self) -> Any:
        return Packed, (self.data, self.starts)

    @classmethod
    def of(cls, values: Iterable[Any]) -> Packed:
        """Values that JSON has, e.g. lists of texts and numbers."""
        data, starts = bytearray(), array('q', [0])
        for value in values:
            data += ENCODE(value).encode('utf-8', 'surrogatepass')
            starts.append(len(data))
        return cls(np.frombuffer(data, np.uint8), np.frombuffer(starts, np.int64))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self._count:
            raise IndexError(f'row {i} of {self._count}')
        return DECODE(str(self._data[self._starts[i]:self._starts[i + 1]], 'utf-8', 'surrogatepass'))[0]


class Index:
    """The rows of a dataset, what was `told` of all of them, and `sizes` that may be worked out later.

    place: the folder of this version, there or not; None: nothing is kept.
    """

    def __init__(self, rows: Packed, told: dict[str, Any], place: Path | None, logger: logging.Logger | None = None):
        self.rows, self.told, self.place, self.logger = rows, told, place, logger or get_logger()

    @classmethod
    def made(cls, shown: str, what: Any, sources: Sequence[str], find: Callable[[], Iterable[Any]], told: Callable[[], dict[str, Any]],
             logger: logging.Logger | None = None) -> Index:
        """The index of files: the one that is kept, where they have not changed since, else a new one.

        shown: what messages call them.  what: the settings that decide what `find` finds.  told: asked when `find` is through.
        Raises DataError where a file changes while it is read.
        """
        logger = logger or get_logger()
        state = stamps(sources)
        place = place_of([what, [os.path.abspath(source) for source in sources]], state) if sources else None
        if place is not None:
            if (kept := cls.kept(place, logger)) is not None:
                return kept
            if place.parent.exists() and any(place.parent.glob('[0-9a-f]*')):
                logger.info(f'{shown} has changed since it was indexed: it is read again')
        began = time.monotonic()
        rows = Packed.of(find())
        if stamps(sources) != state:
            raise DataError(f'{shown} changed while it was read: start again when it is whole')
        index = cls(rows, told(), place, logger)
        if (passed := time.monotonic() - began) > WORTH_KEEPING:
            logger.info(f'{shown}: {len(rows)} rows indexed in {passed:.1f} s')
            index.keep()
        return index

    @classmethod
    def kept(cls, place: Path, logger: logging.Logger | None = None) -> Index | None:
        """The index in this folder; None where there is none that is whole."""
        try:
            told = json.loads((place / 'told.json').read_text(encoding='utf-8'))
            starts = _mapped(place / 'starts.i8', '<i8', told['rows'] + 1)
            return cls(Packed(_mapped(place / 'rows.u1', 'u1', told['bytes']), starts), told['told'], place, logger)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, sizes: np.ndarray | None = None) -> None:
        """Write the index to its place, unless it is there. Where that cannot be, a line says so, and nothing else is lost."""
        if self.place is None:
            return
        told = {'rows': len(self.rows), 'bytes': len(self.rows.data), 'told': self.told}
        try:
            if Index.kept(self.place) is None:
                temp = atomic.beside(self.place, 'tmp')
                atomic.make_folder(temp)
                atomic.write_file(temp / 'rows.u1', [self.rows.data.data])
                atomic.write_file(temp / 'starts.i8', [self.rows.starts.astype('<i8').data.cast('B')])
                atomic.write_file(temp / 'told.json', [json.dumps(told).encode()])
                _publish(temp, self.place)
            if sizes is not None:
                with atomic.replacing(self.place / 'sizes.i4') as path:
                    atomic.write_file(path, [np.ascontiguousarray(sizes, '<i4').data.cast('B')])
        except OSError as error:
            self.logger.warning(f'an index cannot be kept in {self.place.parent} ({error.strerror}): it is made again at every start')

    def sizes(self, measure: Callable[[Index | None, np.ndarray | None], np.ndarray]) -> np.ndarray:
        """[N, 2] int32 (height, width) of each row's picture: those that are kept, else what `measure` says.

        measure is given an earlier version of this index and its sizes, where there is one.
        """
        if self.place is not None and (known := _sizes_in(self.place, len(self.rows))) is not None:
            return known
        began = time.monotonic()
        sizes = measure(*self._earlier())
        if (passed := time.monotonic() - began) > WORTH_KEEPING:
            self.logger.info(f'sizes of {len(sizes)} images read in {passed:.1f} s')
            self.keep(sizes)
        return sizes

    def _earlier(self) -> tuple[Index, np.ndarray] | tuple[None, None]:
        if self.place is not None and self.place.parent.exists():
            for place in self.place.parent.glob('[0-9a-f]*'):
                before = Index.kept(place)
                if place != self.place and before is not None and (sizes := _sizes_in(place, len(before.rows))) is not None:
                    return before, sizes
        return None, None


def place_of(what: Any, state: Any) -> Path:
    """The folder of one version of an index. what: what is indexed.  state: changes when it does; both of values that JSON has."""
    return FS.cache / 'index' / digest([FORMAT, what]) / digest(state)


def stamps(files: Iterable[str]) -> list[tuple[int, int, int]]:
    """Length and times of each file, which change when it does. Raises DataError where it is not there."""
    try:
        states = [os.stat(file) for file in files]
    except OSError as error:
        raise DataError(f'{error.filename}: {error.strerror}') from error
    return [(state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states]


def _publish(temp: Path, place: Path) -> None:
    """Put a finished version in its place and take the others away; they stay open where they are in use."""
    if place.exists() and Index.kept(place) is None:    # a part of it is gone
        atomic.trash(place)
    try:
        atomic.publish(temp, place)
    except OSError:
        if not place.is_dir():
            raise
        atomic.trash(temp)    # another process was quicker
    for other in place.parent.glob('[0-9a-f]*'):
        if other != place:
            try:
                atomic.trash(other)
            except FileNotFoundError:    # another process did it
                pass


def _sizes_in(place: Path, count: int) -> np.ndarray | None:
    try:
        return _mapped(place / 'sizes.i4', '<i4', 2 * count).reshape(count, 2)
    except (OSError, ValueError):
        return None


def _mapped(path: Path, kind: str, count: int) -> np.ndarray:
    """The numbers of a file without reading them. Raises ValueError where it has not so many."""
    if path.stat().st_size != count * np.dtype(kind).itemsize:
        raise ValueError(f'{path} is cut off')
    return np.memmap(path, kind, 'r', shape=(count,)) if count else np.empty(0, kind)


def digest(value: Any) -> str:
    """32 hex digits for a value that JSON has."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
