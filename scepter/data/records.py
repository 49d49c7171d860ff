"""Record files as codewithgpu writes them: a folder of shards of examples, each a dict of bytes, strings, numbers, lists and dicts.

    METADATA                    JSON: how many entries, the type of each feature
    00000.data  00000.index     examples one behind the other; a line "<first byte> <bytes>" for each

    features = {'moments': 'bytes', 'shape': ['int64'], 'caption': 'string'}
    with RecordWriter('latents', features) as writer:
        writer.write({'moments': x.tobytes(), 'shape': x.shape, 'caption': 'a bird'})
    RecordReader('latents')[0]['caption']

An example is a protocol buffer of proto3, read and written here: Features = {1: entry {1: name, 2: Feature}, ...} and
Feature = {1: bytes | 2: float32 | 3: int64 | 4: list of Feature, each under 1 | 5: Features}. Floats have 32 bits in this format.
"""
from __future__ import annotations

import json
import os
import shutil
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from scepter.core.disk import atomic
from scepter.core.errors import DataError
from scepter.core.faults import did_you_mean

TYPES = {'bytes': 'BYTES', 'string': 'STRING', **dict.fromkeys(('float', 'float32', 'float64'), 'FLOAT32'),
         **dict.fromkeys(('int', 'int32', 'int64'), 'INT64')}
NOTHING: dict[str, Any] = {'BYTES': b'', 'STRING': '', 'FLOAT32': 0.0, 'INT64': 0}    # what a feature that is missing reads as
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5
WORD = (1 << 64) - 1
HEAD = 64    # bytes of an example that are read for its shape


class RecordWriter:
    """Write examples into a folder that is there; `close` makes it whole.

    features: name -> bytes, string, int64, float64 (kept as float32), [type] for a list, {name: type} for a dict.
    max_examples: of one shard.  zfill_width: digits of a shard's name.
    Raises DataError for types that are none, for a shard that is there already, and for an example that does not fit its features.
    """

    def __init__(self, path: str | os.PathLike[str], features: Mapping[str, Any], max_examples: int = 2 ** 63 - 1, zfill_width: int = 5):
        self.path, self.max_examples, self.zfill_width = Path(path), max_examples, zfill_width
        self.features = {name: _canonical(kind, name) for name, kind in features.items()}
        self.entries = self.shard_entries = self.shards = self.offset = 0
        self._data: BinaryIO | None = None
        self._index: BinaryIO | None = None
        self._is_closed = False
        if not self.path.is_dir():
            raise DataError(f'{self.path} is no folder: make it before records are written into it')

    def write(self, example: Mapping[str, Any]) -> None:
        """Add one example. A feature that it lacks reads back as empty, or 0."""
        if self._is_closed:
            raise DataError(f'{self.path} has been closed: nothing can be added to it')
        data = _encode_map(example, self.features, f'example {self.entries}')
        if self._data is None or self._index is None or self.shard_entries == self.max_examples:
            self._data, self._index = self._next_shard()
        self._data.write(data)
        self._index.write(f'{self.offset} {len(data)}\n'.encode())
        self.offset, self.entries, self.shard_entries = self.offset + len(data), self.entries + 1, self.shard_entries + 1

    def close(self) -> None:
        """Finish the last shard and write METADATA, where there is anything to tell of. Twice is no harm."""
        if self._is_closed:
            return
        self._is_closed = True
        self._close_shard()
        if self.entries:
            write_metadata(self.path, self.features, self.entries)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _next_shard(self) -> tuple[BinaryIO, BinaryIO]:
        self._close_shard()
        stem = str(self.shards).zfill(self.zfill_width)
        self.shards, self.offset, self.shard_entries = self.shards + 1, 0, 0
        try:
            return open(self.path / f'{stem}.data', 'xb'), open(self.path / f'{stem}.index', 'xb')
        except FileExistsError as error:
            raise DataError(f'{error.filename} is there already: write into an empty folder') from error

    def _close_shard(self) -> None:
        for file in (self._data, self._index):
            if file is not None:
                file.close()


def write_metadata(folder: Path, features: Mapping[str, Any], entries: int) -> None:
    """Make a folder of shards whole: what says how many examples they hold, and of what."""
    told = {'entries': entries, 'features': {name: _canonical(kind, name) for name, kind in features.items()}, 'version': 1}
    with atomic.replacing(folder / 'METADATA') as file:
        file.write_text(json.dumps(told, indent=2), encoding='utf-8')


def join_shards(folders: Iterable[Path], stem: Path) -> int:
    """Put the examples of several folders behind one another as one shard, <stem>.data and <stem>.index; answers how many they are.

    The index appears last, so where it is the shard is whole. Raises FileNotFoundError, and leaves none, where a folder is gone.
    """
    spans, offset = [], 0
    with atomic.replacing(stem.with_suffix('.data')) as target:
        with open(target, 'wb') as joined:
            for shard in (shard for folder in folders for shard in _shards_of(folder)):
                spans.append(_read_index(shard) + np.array([offset, 0]))
                with open(shard.with_suffix('.data'), 'rb') as file:
                    shutil.copyfileobj(file, joined)
                offset = joined.tell()
    rows = np.concatenate(spans).tolist() if spans else []
    with atomic.replacing(stem.with_suffix('.index')) as target:
        target.write_text(''.join(f'{first} {size}\n' for first, size in rows), encoding='utf-8')
    return len(rows)


class RecordReader:
    """The examples of a folder, by number. Opening reads the indices alone, and an example is read when it is asked for.

    Raises DataError where the folder is not whole, and IndexError and ValueError from reading, as `read` says.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        metadata = self.path / 'METADATA'
        try:
            told = json.loads(metadata.read_text(encoding='utf-8'))
            self.features, entries = dict(told['features']), int(told['entries'])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f'{metadata}: {type(error).__name__}: {error}; a writer that was not closed leaves none') from error
        self.shards = _shards_of(self.path)
        self.spans = [_read_index(shard) for shard in self.shards]    # [examples, 2] int64 each: first byte, bytes
        self.ends = list(accumulate(len(span) for span in self.spans))
        if len(self) != entries:
            raise DataError(f'{self.path}: METADATA counts {entries} examples, but the {len(self.shards)} indices {len(self)}: '
                            'a shard is missing or left over')

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example at 0 <= index < len(self), its features in the order in which they were written.

        Raises ValueError, naming the example, where the file ends within it or it is no example.
        """
        return self._parsed(index, self.features)

    def shapes(self) -> list[tuple[int, ...] | None]:
        """The feature `shape` of every example, from its first bytes where it stands there, as the public writer has it; None where it
        cannot be read. 200,000 take 1 s."""
        known: dict[bytes, tuple[int, ...] | None] = {}    # first entry of an example -> the shape that it says
        found: list[tuple[int, ...] | None] = []
        for shard, spans in zip(self.shards, self.spans):
            with open(shard.with_suffix('.data'), 'rb', buffering=0) as file:
                for first, size in spans.tolist():
                    head = os.pread(file.fileno(), min(size, HEAD), first)
                    entry = head[:2 + head[1]] if len(head) > 1 and head[1] < HEAD - 2 else b''
                    if entry not in known:
                        known[entry] = self._shape_in(entry)
                    found.append(known[entry] or self._shape_of(len(found)))
        return found

    def _shape_in(self, entry: bytes) -> tuple[int, ...] | None:
        """The shape that is all there is in this first entry of an example; None where that says something else."""
        try:
            values = _decode_map(memoryview(entry), {'shape': self.features['shape']})
        except ValueError:
            return None
        return tuple(values['shape']) or None

    def _shape_of(self, index: int) -> tuple[int, ...] | None:
        try:
            return tuple(self._parsed(index, {'shape': self.features['shape']})['shape'])
        except ValueError:
            return None

    def name_of(self, index: int) -> str:
        """Where an example is, for messages."""
        shard, row = self._place(index)
        return f'{self.shards[shard].with_suffix(".data")}: example {row}'

    def read(self, index: int) -> bytes:
        """The bytes of an example. Raises ValueError where the file has not all of them."""
        shard, row = self._place(index)
        first, size = (int(number) for number in self.spans[shard][row])
        with open(self.shards[shard].with_suffix('.data'), 'rb') as file:
            file.seek(first)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f'the file is truncated: {len(data)} of {size} bytes are there')
        return data

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f'example {index} of {len(self)}')
        shard = bisect_right(self.ends, index)
        return shard, index - (self.ends[shard - 1] if shard else 0)

    def _parsed(self, index: int, features: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return _decode_map(memoryview(self.read(index)), features)
        except (ValueError, IndexError, struct.error, AttributeError) as error:    # UnicodeDecodeError is a ValueError
            raise ValueError(f'{self.name_of(index)}: {error}') from error


def _shards_of(folder: Path) -> list[Path]:
    """The indices of a folder; a hidden one is what a writer that was killed left. Raises FileNotFoundError where there is no folder."""
    return sorted(folder / name for name in os.listdir(folder) if name.endswith('.index') and not name.startswith('.'))


def _read_index(file: Path) -> np.ndarray:
    """[examples, 2] int64: the first byte and the number of bytes of each example. A million lines take 0.1 s."""
    text = file.read_bytes()
    try:
        numbers = np.fromstring(text, dtype=np.int64, sep=' ') if text else np.empty(0, np.int64)
    except ValueError:
        numbers = np.array([-1])
    if not text.endswith(b'\n' if text else b'') or len(numbers) != 2 * text.count(b'\n') or (numbers < 0).any():
        raise DataError(f'{file}: expected a line "<first byte> <bytes>" for each example; it is cut off or damaged')
    return numbers.reshape(-1, 2)


def _canonical(kind: Any, name: str) -> Any:
    """A feature's type as METADATA tells it."""
    if isinstance(kind, str) and (kind in TYPES or kind in NOTHING):
        return TYPES.get(kind, kind)
    if isinstance(kind, list) and len(kind) == 1:
        return [_canonical(kind[0], name)]
    if isinstance(kind, Mapping):
        return {key: _canonical(value, f'{name}.{key}') for key, value in kind.items()}
    raise DataError(f'feature {name} has type {kind!r}: expected {", ".join(TYPES)}, [type] for a list, or {{name: type}}')


# ---------------------------------------------------------------------------------------- writing
def _encode_map(values: Mapping[str, Any], features: Mapping[str, Any], where: str) -> bytes:
    out = bytearray()
    for name, value in values.items():
        if name not in features:
            raise DataError(f'{where} has {name!r}, which is none of its features{did_you_mean(name, features)}')
        entry = _delimited(1, name.encode()) + _delimited(2, _encode(value, features[name], f'{where}: {name}'))
        out += _delimited(1, entry)
    return bytes(out)


def _encode(value: Any, kind: Any, where: str) -> bytes:
    try:
        if isinstance(kind, list):
            elements = b''.join(_delimited(1, _encode(element, kind[0], where)) for element in value)
            return _delimited(4, elements) if elements else b''
        if isinstance(kind, Mapping):
            return _delimited(5, _encode_map(value, kind, where))
        if kind == 'STRING':
            return _delimited(1, value.encode('utf-8'))
        if kind == 'BYTES':
            return _delimited(1, memoryview(value).cast('B'))
        if kind == 'FLOAT32':
            return _tag(2, FIXED32) + struct.pack('<f', value)
        number = value.__index__()
        if not -2 ** 63 <= number < 2 ** 63:
            raise ValueError('it has more than 64 bits')
        return _tag(3, VARINT) + _varint(number & WORD)
    except (TypeError, AttributeError, ValueError, OverflowError, struct.error) as error:
        raise DataError(f'{where} is {value!r:.80}, expected {kind}: {error}') from error


def _tag(number: int, wire: int) -> bytes:
    return bytes([number << 3 | wire])


def _delimited(number: int, data: bytes | memoryview) -> bytes:
    return b''.join((_tag(number, DELIMITED), _varint(len(data)), data))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


# ---------------------------------------------------------------------------------------- reading
def _decode_map(data: memoryview, features: Mapping[str, Any]) -> dict[str, Any]:
    """The features of a map, in its own order, then those that it lacks. What is not asked for is stepped over."""
    values: dict[str, Any] = {}
    for number, entry in _fields(data):
        if number != 1:
            continue
        parts = dict(_fields(entry))
        name = bytes(parts.get(1, b'')).decode('utf-8')
        if name in features:
            values[name] = _decode(parts.get(2, memoryview(b'')), features[name])
    return {**values, **{name: _nothing(kind) for name, kind in features.items() if name not in values}}


def _decode(data: memoryview, kind: Any) -> Any:
    parts = dict(_fields(data))
    if not parts:
        return _nothing(kind)
    if isinstance(kind, list):
        return [_decode(element, kind[0]) for number, element in _fields(_part(parts, 4, kind)) if number == 1]
    if isinstance(kind, Mapping):
        return _decode_map(_part(parts, 5, kind), kind)
    if kind == 'INT64':
        number = _part(parts, 3, kind)
        return number - (1 << 64) if number >> 63 else number
    if kind == 'FLOAT32':
        return struct.unpack('<f', _part(parts, 2, kind))[0]
    content = bytes(_part(parts, 1, kind))
    return content.decode('utf-8') if kind == 'STRING' else content


def _part(parts: Mapping[int, Any], number: int, kind: Any) -> Any:
    if number not in parts:
        raise ValueError(f'a feature of type {kind} is stored as something else')
    return parts[number]


def _nothing(kind: Any) -> Any:
    if isinstance(kind, list):
        return []
    return {name: _nothing(inner) for name, inner in kind.items()} if isinstance(kind, Mapping) else NOTHING[kind]


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, content) of each field of a message: whole numbers for varints, bytes for all else."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        wire = tag & 7
        if wire == VARINT:
            value, at = _read_varint(data, at)
            yield tag >> 3, value
            continue
        size, at = _read_varint(data, at) if wire == DELIMITED else ({FIXED32: 4, FIXED64: 8}.get(wire, -1), at)
        if size < 0 or at + size > len(data):
            raise ValueError(f'it is damaged: at byte {at} a field of {size} bytes, where {len(data) - at} are left')
        yield tag >> 3, data[at:at + size]
        at += size


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f'it is damaged: a number at byte {at} does not end')
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number & WORD, at
