"""Shards of rows that were computed once: each row is found by a key, and carries a checksum of its own.

    <name>.safetensors    name -> [rows, ...]: row i of every tensor is of key i; keys and checksums stand in its metadata
    <name>.json           the same index once more, with the place of each tensor and the digest of the file

A shard's name is a digest of its keys, and it appears whole, by one rename, after its index. So a writer that is killed leaves whole
shards behind, two that write the same one write the same bytes, and whatever damages a file or its index is noticed, and costs only the
rows that it hit.
"""
from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scepter.core.disk import atomic
from scepter.core.disk.manifests import sealed
from scepter.core.disk.tensors import CODES, DTYPES, TensorFile, write_tensors
from scepter.core.errors import CheckpointError, DataError

FORMAT = 1
KEY_BYTES = 16
OPEN_FILES = 64     # of one process
AGAIN = 64          # readings of a row, on average, until its checksum is looked at once more; the longest span, 1.5 of it, fits a byte

Row = dict[str, Tensor]
Slot = tuple[Row, int]    # rows that were read together, name -> [B, ...], and which of them it is
NO_PARTS: Mapping[str, np.ndarray] = {}


def key_of(*parts: Any) -> bytes:
    """The key of what is computed from these, which are plain values: half a sha256 of their JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(',', ':')).encode()).digest()[:KEY_BYTES]


class Fault(NamedTuple):
    """What is wrong with a shard."""
    file: Path
    what: str
    rows: int      # that are lost


class Field(NamedTuple):
    """One tensor of a shard."""
    dtype: torch.dtype
    shape: tuple[int, ...]    # of one row
    start: int                # byte of the file at which row 0 begins
    size: int                 # bytes of one row


class Shard:
    """One file of rows, as its index describes it. Nothing of the rows is read before it is asked for."""

    def __init__(self, path: Path, fields: Mapping[str, Field], keys: np.ndarray, crcs: np.ndarray, digest: atomic.Digest | None):
        self.path, self.fields, self.keys, self.crcs, self.digest = path, dict(fields), keys, crcs, digest
        self.size = path.stat().st_size
        self.has_index = digest is not None

    @classmethod
    def open(cls, path: Path) -> Shard:
        """By the index beside it; where that is lost, by its own. Raises DataError where neither can be read."""
        try:
            return cls._of_index(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f'{type(error).__name__}: {error}'
        try:
            file = TensorFile(path)
            return cls(path, _fields(file), *_parse(file.metadata, len(next(iter(file.values())))), None)
        except (CheckpointError, OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise DataError(f'{path}: neither its index ({reason}) nor its own header can be read ({error})') from error

    @classmethod
    def _of_index(cls, path: Path) -> Shard:
        text = index_of(path).read_bytes()
        told = json.loads(text)
        told.pop('sha256')
        if sealed(told) != text:
            raise ValueError('the index is damaged')
        fields = {name: Field(DTYPES[f['dtype']], tuple(f['shape']), f['start'], math.prod(f['shape']) * DTYPES[f['dtype']].itemsize)
                  for name, f in told['fields'].items()}
        return cls(path, fields, *_parse(told, told['rows']), atomic.Digest(told['file']['size'], told['file']['sha256']))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def whole(self) -> np.ndarray:
        """bool [rows]: which rows lie within the file, which may have been cut off."""
        ends = np.max([f.start + f.size * np.arange(1, len(self) + 1) for f in self.fields.values()], axis=0)
        return ends <= self.size

    def read(self, row: int, file: int, memory: Sequence[memoryview], parts: Sequence[int]) -> None:
        """Fill memory, one for each field, with row `row`, by a descriptor of the file; what is smaller than a field gets that part of it.

        Raises ValueError where the file ends before.
        """
        for field, data, part in zip(self.fields.values(), memory, parts):
            if os.preadv(file, [data], field.start + row * field.size + part * len(data)) != len(data):
                raise ValueError(f'{self.path} ends within row {row}')

    def read_checked(self, row: int, file: int, memory: Sequence[memoryview] = (), parts: Sequence[int] = ()) -> None:
        """The same, out of bytes that pass the checksum. Raises ValueError where they are not those that were written."""
        whole = [data if data is not None and len(data) == field.size else memoryview(bytearray(field.size))
                 for field, data in zip_longest(self.fields.values(), memory)]
        self.read(row, file, whole, [0] * len(whole))
        crc = zlib.crc32(self.keys[row].tobytes())
        for read in whole:
            crc = zlib.crc32(read, crc)
        if crc != self.crcs[row]:
            raise ValueError(f'{self.path}: row {row} is damaged: checksum {self.crcs[row]:08x} expected, {crc:08x} found')
        for read, data, part in zip(whole, memory, parts):
            if read is not data:
                data[:] = read[part * len(data):(part + 1) * len(data)]

    def faults(self) -> Iterator[Fault]:
        """What reading every byte of it finds."""
        if not self.has_index:
            yield Fault(index_of(self.path), 'the index is lost or damaged; the one within the shard serves', 0)
        bad = []
        with open(self.path, 'rb', buffering=0) as file:
            for row in range(len(self)):
                try:
                    self.read_checked(row, file.fileno())
                except ValueError as error:
                    bad.append(str(error))
        if bad:
            yield Fault(self.path, f'{len(bad)} of {len(self)} rows are damaged, the first: {bad[0]}', len(bad))
        elif self.digest is not None and atomic.digest(self.path) != self.digest:
            yield Fault(self.path, 'its header is damaged; all rows are sound', 0)


def index_of(path: Path) -> Path:
    """The index beside a shard."""
    return path.with_suffix('.json')


def name_of(keys: Sequence[bytes]) -> str:
    """What a shard of these rows is called."""
    return hashlib.sha256(b''.join(keys)).hexdigest()[:2 * KEY_BYTES]


def write_shard(folder: Path, keys: Sequence[bytes], rows: Mapping[str, Tensor]) -> Path:
    """Write rows, name -> [len(keys), ...], as one shard; nobody sees it before it is whole.

    The bytes depend on keys and rows alone. Raises OSError.
    """
    path = folder / f'{name_of(keys)}.safetensors'
    rows = {name: value.detach().cpu().contiguous() for name, value in sorted(rows.items())}
    flat = [value.reshape(len(keys), -1).view(torch.uint8).numpy() for value in rows.values()]
    crcs = [zlib.crc32(key) for key in keys]
    for data in flat:
        crcs = [zlib.crc32(data[i], crc) for i, crc in enumerate(crcs)]
    told = {'format': str(FORMAT), 'keys': b''.join(keys).hex(), 'crcs': ''.join(f'{crc:08x}' for crc in crcs)}
    with atomic.replacing(path) as temporary:
        digest = write_tensors(temporary, rows, told)
        _write_index(path, _fields(TensorFile(temporary)), told, len(keys), digest)    # first: whoever sees a shard sees its index
    return path


def restore_index(shard: Shard) -> None:
    """Write the index beside a shard again, from the one within it."""
    told = {'format': str(FORMAT), 'keys': shard.keys.tobytes().hex(), 'crcs': ''.join(f'{crc:08x}' for crc in shard.crcs.tolist())}
    _write_index(shard.path, shard.fields, told, len(shard), atomic.digest(shard.path))


def _write_index(path: Path, fields: Mapping[str, Field], told: Mapping[str, str], rows: int, digest: atomic.Digest) -> None:
    text = sealed({**told, 'rows': rows, 'file': digest._asdict(),
                   'fields': {name: {'dtype': CODES[f.dtype], 'shape': list(f.shape), 'start': f.start} for name, f in fields.items()}})
    with atomic.replacing(index_of(path)) as temporary:
        atomic.write_file(temporary, [text])


def _fields(file: TensorFile) -> dict[str, Field]:
    return {name: Field(slot.dtype, slot.shape[1:], slot.start, slot.size // max(1, slot.shape[0]))
            for name, slot in sorted(file.slots.items())}


def _parse(told: Mapping[str, str], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(keys [rows, KEY_BYTES] uint8, checksums [rows]) of an index. Raises ValueError."""
    if told['format'] != str(FORMAT):
        raise ValueError(f'format {told["format"]}, this version of scepter reads format {FORMAT}')
    keys = np.frombuffer(bytes.fromhex(told['keys']), np.uint8).reshape(-1, KEY_BYTES)
    crcs = np.array([int(told['crcs'][i:i + 8], 16) for i in range(0, len(told['crcs']), 8)], np.int64)
    if not len(keys) == len(crcs) == rows:
        raise ValueError(f'{len(keys)} keys and {len(crcs)} checksums for {rows} rows')
    return keys, crcs


class Shards:
    """All rows of a folder of shards.    key -> number -> row

    Opening reads the indices alone. Numbers hold for this object; it may be sent to workers, which open files of their own.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.shards: list[Shard] = []
        self.faults: list[Fault] = []
        for path in sorted(self.folder.glob('[!.]*.safetensors')):    # a hidden one is still being written
            try:
                self.shards.append(Shard.open(path))
            except DataError as error:
                self.faults.append(Fault(path, str(error), 0))
        self.firsts = np.cumsum([0, *map(len, self.shards)])
        keys = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *(shard.keys for shard in self.shards)])
        whole = np.concatenate([np.empty(0, bool), *(shard.whole for shard in self.shards)])
        for shard in self.shards:
            if lost := int((~shard.whole).sum()):
                self.faults.append(Fault(shard.path, f'cut off at byte {shard.size}: {lost} of {len(shard)} rows are lost', lost))
        numbers = np.flatnonzero(whole)
        words = _words(keys[numbers])
        order = np.lexsort((words[:, 1], words[:, 0]))
        self._words, self._numbers = words[order], numbers[order]
        self._files: OrderedDict[int, int] = OrderedDict()
        forms = [{name: (field.dtype, field.shape) for name, field in shard.fields.items()} for shard in self.shards]
        kinds = [form for i, form in enumerate(forms) if form not in forms[:i]]
        self._kinds = [kinds.index(form) for form in forms]    # of each shard: those of one have rows of one form
        self._left: mmap.mmap | bytearray = mmap.mmap(-1, max(1, len(keys)))    # readings of each row until its checksum is looked at

    def __len__(self) -> int:
        return len(self._numbers)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """uint8 [N, KEY_BYTES] -> the number of each key's row, int64 [N]; -1 where there is none."""
        wanted = _words(keys)
        if not len(self):
            return np.full(len(keys), -1, np.int64)
        place = np.searchsorted(self._words[:, 0], wanted[:, 0])
        found = np.full(len(keys), -1, np.int64)
        open_ = np.arange(len(keys))
        while len(open_ := open_[place[open_] < len(self)]):    # once, as two keys of the same first half are rarer than a broken disk
            there = self._words[place[open_]]
            is_it, may_follow = (there == wanted[open_]).all(1), there[:, 0] == wanted[open_, 0]
            found[open_[is_it]] = self._numbers[place[open_[is_it]]]
            open_ = open_[may_follow & ~is_it]
            place[open_] += 1
        return found

    def rows(self, numbers: np.ndarray, parts: Mapping[str, np.ndarray] = NO_PARTS) -> list[Slot | ValueError | OSError]:
        """The row of each number that `find` gave, or what is wrong with it.

        numbers: int64 [B].  parts: name -> int64 [B], the one entry of a tensor that is wanted, where its first dimension counts several.
        A row is held against its checksum when it is first read, and again after AGAIN readings or so, by all forked processes together.
        """
        if not len(numbers):
            return []
        which = np.searchsorted(self.firsts, numbers, side='right') - 1
        rows, shards = (numbers - self.firsts[which]).tolist(), which.tolist()
        if len({self._kinds[shard] for shard in shards}) > 1:    # no batch, as collating them says
            return [self.rows(numbers[i:i + 1], {name: part[i:i + 1] for name, part in parts.items()})[0] for i in range(len(numbers))]
        count, fields = len(numbers), self.shards[shards[0]].fields
        columns = {name: torch.empty((count, *field.shape[name in parts:]), dtype=field.dtype) for name, field in fields.items()}
        memory = zip(*([row.data for row in column.reshape(count, -1).view(torch.uint8).numpy()] for column in columns.values()))
        chosen = zip(*(parts[name].tolist() if name in parts else [0] * count for name in columns))
        found: list[Slot | ValueError | OSError] = list(zip(repeat(columns), range(count)))
        for i, (number, shard, row, data, part) in enumerate(zip(numbers.tolist(), shards, rows, memory, chosen)):
            try:
                if left := self._left[number]:
                    self.shards[shard].read(row, self._file(shard), data, part)
                    self._left[number] = left - 1
                else:
                    self.shards[shard].read_checked(row, self._file(shard), data, part)
                    self._left[number] = AGAIN // 2 + number % AGAIN    # not the same for all, or all would come due in one epoch
            except (ValueError, OSError) as error:
                found[i] = error
        return found

    def _file(self, which: int) -> int:
        if which in self._files:
            self._files.move_to_end(which)
            return self._files[which]
        self._files[which] = os.open(self.shards[which].path, os.O_RDONLY | os.O_CLOEXEC)
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return self._files[which]

    def close(self) -> None:
        """Give the open files back."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_files': OrderedDict(), '_left': bytearray(self._left)}

    def __del__(self) -> None:
        if os is not None:    # where the interpreter ends, modules are gone first, and the files go with it
            self.close()

    def verify(self) -> list[Fault]:
        """Every fault that reading every byte finds."""
        unreadable = [fault for fault in self.faults if all(fault.file != shard.path for shard in self.shards)]
        return [*unreadable, *(fault for shard in self.shards for fault in shard.faults())]


def _words(keys: np.ndarray) -> np.ndarray:
    """uint8 [N, KEY_BYTES] -> uint64 [N, 2]"""
    return np.ascontiguousarray(keys).view('>u8').astype(np.uint64).reshape(-1, 2)
