"""Safetensors files, written without a second copy in memory and read without trust.

    8 bytes        length of the header, little endian
    header         JSON: name -> {dtype, shape, data_offsets}, padded with spaces to a multiple of 8
    data           the tensors' bytes, contiguous, largest element first so that each is aligned

The reader checks every number of the header against the file's length before it allocates anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from scepter.core.disk.atomic import Digest, write_file
from scepter.core.errors import CheckpointError

DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
    'I64': torch.int64, 'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8,
    'U64': torch.uint64, 'U32': torch.uint32, 'U16': torch.uint16, 'U8': torch.uint8,
    'F8_E4M3': torch.float8_e4m3fn, 'F8_E5M2': torch.float8_e5m2, 'C64': torch.complex64, 'BOOL': torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 1 << 24      # bytes. Parsed JSON takes up to 20 times its text, so this also bounds memory
TENSOR_LIMIT = 1 << 15      # SDXL has 2,500; each costs the reader time whatever its size, 200,000 empty ones took 35 s

# how files that are often mistaken for safetensors begin
LOOKALIKES = {
    b'version https://git-lfs': 'a Git LFS pointer, not the file itself: run `git lfs pull`',
    b'PK\x03\x04': 'a zip archive, as torch.save writes it, not a safetensors file',
    b'\x80\x02': 'a Python pickle, not a safetensors file',
    b'<': 'a web page or XML, not a safetensors file: the download did not return the file',
}


class Slot(NamedTuple):
    """Where one tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int      # bytes from the beginning of the file
    size: int       # bytes


class Stored(Mapping[str, Tensor]):
    """Tensors on the disk, each read when it is asked for."""

    def slot(self, name: str) -> Slot:
        """Type and shape of a tensor, which is not read for it."""
        raise NotImplementedError

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Of a tensor its rows from first to last, that one not included; no others are read."""
        raise NotImplementedError


class TensorFile(Stored):
    """The tensors of a safetensors file, each read from the disk when it is asked for.

    `slots` tells names, types and shapes without reading any tensor, `metadata` holds the writer's own strings.
    Raises CheckpointError, with the path, for whatever is not a sound safetensors file.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            with open(self.path, 'rb') as file:
                self.metadata, self.slots = _read_header(self.path, file)
        except OSError as error:
            raise CheckpointError(f'{self.path}: cannot be read: {error.strerror}') from error

    def __getitem__(self, name: str) -> Tensor:
        slot = self.slots[name]
        return self._read(name, torch.empty(slot.shape, dtype=slot.dtype), slot.start)

    def slot(self, name: str) -> Slot:
        return self.slots[name]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        slot = self.slots[name]
        begin = slot.start + slot.size // max(1, slot.shape[0]) * first
        return self._read(name, torch.empty((last - first, *slot.shape[1:]), dtype=slot.dtype), begin)

    def _read(self, name: str, tensor: Tensor, start: int) -> Tensor:
        if tensor.numel():
            buffer = tensor.view(-1).view(torch.uint8).numpy()
            # readinto, not mmap: a file that shrinks under a map kills the process, here it is an error
            with open(self.path, 'rb', buffering=0) as file:
                file.seek(start)
                found = _read_fully(file, buffer.data)
            if found != tensor.nbytes:
                raise CheckpointError(f'{self.path}: ends inside {name}: {tensor.nbytes} bytes expected, {found} found')
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def __contains__(self, name: object) -> bool:
        return name in self.slots


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None,
                  whole: Callable[[str], Tensor] | None = None) -> Digest:
    """Write tensors of any device and layout to a new safetensors file and fsync it; the digest is of the whole file.

    At most one tensor at a time is copied. Names that share memory are each written out, so every reader finds every name.
    whole: gives each tensor by its name when its turn has come, in `writing_order`; `tensors` then need tell types and shapes alone.
    Raises OSError, and CheckpointError for a tensor that the format cannot hold.
    """
    if '__metadata__' in tensors:
        raise CheckpointError(f'{path}: no tensor can be named __metadata__')
    header: dict[str, object] = {'__metadata__': dict(metadata)} if metadata else {}
    names = writing_order(tensors)
    offset = 0
    for name in names:
        tensor = tensors[name]
        if whole is None and hasattr(tensor, '__tensor_flatten__'):     # what .cpu() would give is a part of it
            raise CheckpointError(f'{path}: {name}: this process holds a share of it only: gather it on all processes at once')
        if tensor.layout != torch.strided or (whole is None and tensor.is_meta) or tensor.dtype not in CODES:
            raise CheckpointError(f'{path}: {name}: a {tensor.device} tensor of {tensor.dtype}, {tensor.layout} cannot be written')
        size = tensor.numel() * tensor.element_size()
        header[name] = {'dtype': CODES[tensor.dtype], 'shape': list(tensor.shape), 'data_offsets': [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(',', ':')).encode()
    if len(text) > HEADER_LIMIT or len(names) > TENSOR_LIMIT:
        raise CheckpointError(f'{path}: {len(names)} tensors need a header of {len(text)} bytes; the limits are {TENSOR_LIMIT} tensors, '
                              f'{HEADER_LIMIT} bytes')
    text += b' ' * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, 'little') + text
        for name in names:
            if tensors[name].numel():
                tensor = tensors[name] if whole is None else whole(name)
                yield tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().data

    return write_file(path, chunks())


def writing_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names as they stand in a file: those of large elements first, so that each is aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.element_size() == 1:      # float8 has no arithmetic of its own
        tensor = tensor.float()
    # NaN passes through min and max, so one look without a temporary tells all; isfinite would make a mask as large as the weights
    low, high = torch.aminmax(tensor.detach())
    return (low * 0 + high * 0).item() == 0     # NaN for NaN and infinity; one look at the device instead of two


def nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors' elements take."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, str], dict[str, Slot]]:
    length = path.stat().st_size
    start = file.read(64)
    size = int.from_bytes(start[:8], 'little')
    if length < 8 or size > HEADER_LIMIT or size + 8 > length:
        for beginning, meaning in LOOKALIKES.items():
            if start.startswith(beginning):
                raise CheckpointError(f'{path}: this is {meaning}')
        raise CheckpointError(f'{path}: not a whole safetensors file: the file has {length} bytes, its header claims {size} '
                              f'(the limit is {HEADER_LIMIT})')
    file.seek(8)
    try:
        text = file.read(size)
        if (count := text.count(b'data_offsets')) > TENSOR_LIMIT:
            raise ValueError(f'it lists {count} tensors; the limit is {TENSOR_LIMIT}')
        header = json.loads(text.decode())
        metadata = header.pop('__metadata__', {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError('its metadata holds more than strings')
        slots = {name: _slot(name, entry, 8 + size) for name, entry in header.items()}
        _check_cover(slots, 8 + size, length)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(f'{path}: its header is refused: {_reason(error)}') from error
    return metadata, slots


def _slot(name: str, entry: dict, base: int) -> Slot:
    dtype, shape, (begin, end) = DTYPES[entry['dtype']], tuple(entry['shape']), entry['data_offsets']
    numbers = (*shape, begin, end)
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers) or len(shape) > 64:
        raise ValueError(f'{name} has shape {list(shape)[:8]} at {begin}..{end}')
    if math.prod(max(n, 1) for n in shape) >= 1 << 59:      # torch counts bytes in 63 bits, also of an empty tensor's strides
        raise ValueError(f'{name} has shape {list(shape)}')
    size = math.prod(shape) * dtype.itemsize
    if size != end - begin:
        raise ValueError(f'{name} takes {size} bytes by its type and shape, {end - begin} by its place')
    return Slot(dtype, shape, base + begin, size)


def _check_cover(slots: dict[str, Slot], base: int, length: int) -> None:
    """Each byte of the data belongs to exactly one tensor, or a header could claim more memory than the file has bytes."""
    place = base
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].size)):
        if slot.start != place:
            raise ValueError(f'{name} begins at byte {slot.start}, expected {place}')
        place += slot.size
    if place != length:
        raise ValueError(f'its tensors end at byte {place}, the file at {length}')


def _read_fully(file: FileIO, view: memoryview) -> int:
    total = 0
    while total < len(view) and (count := file.readinto(view[total:])):
        total += count
    return total


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return 'nested too deeply'
    return f'no such type or entry: {error}' if isinstance(error, KeyError) else str(error)
