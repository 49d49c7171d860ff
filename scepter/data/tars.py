"""Shards of images with captions, as WebDataset and img2dataset write them: tar files that are indexed once and then read by seek.

    a/0001.jpg  a/0001.txt  a/0001.json    one sample: the members whose path is the same up to the first dot of the name

Only places of members are kept, so a shard is never unpacked: where a member's name or link leads has no meaning here.
"""
from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from scepter.core.errors import DataError
from scepter.core.registry import DATASETS
from scepter.core.schema import param
from scepter.core.stores import FS
from scepter.data.captions import CAPTION_SUFFIXES, MAX_CAPTION_BYTES, texts_of
from scepter.data.datasets import ImageTextDataset, Record
from scepter.data.images import IMAGE_SUFFIXES
from scepter.data.rows import addresses
from scepter.data.sources import Source

CAPTION_KEYS = ('text', 'caption')    # of a .json member, where there is no .txt
BLOCK = 512                           # bytes; a tar ends with two blocks of zeros


class Member(NamedTuple):
    """Where the bytes of one member are."""
    shard: int
    suffix: str
    offset: int
    size: int


@DATASETS.register_class()
class ImageTextTarDataset(ImageTextDataset):
    """Images with captions out of tar files (WebDataset).    index  ->  image [3, H, W] float32 in -1..1, prompt str

    A sample is an image and, under the same key, a .txt or .caption, else a .json with "text" or "caption". The headers of all members
    are read once, at the start; then every sample can be read in any order, so that a run resumes exactly, without reading up to its place.
    Raises DataError for a shard that is cut off, compressed, or holds no image.
    """

    SHARDS: list[str] = param(doc='Tar files, local or in any store; {000..012} counts, and a local name may hold * and ?.')

    def sources(self) -> list[str]:
        self.place = self.SHARDS[0] if len(self.SHARDS) == 1 else f'{self.SHARDS[0]} and {len(self.SHARDS) - 1} more'
        self.addresses = [found for word in self.SHARDS for found in addresses(word, 'SHARDS')]
        self.paths: list[str] = []
        for address in self.addresses:
            with FS.get_from(address) as path:
                self.paths.append(os.path.abspath(path))
        return self.paths

    def find(self) -> Iterator[Record]:
        if not self.paths:
            raise DataError(f'SHARDS: {self.place} hold no sample')
        for shard, (path, address) in enumerate(zip(self.paths, self.addresses)):
            yield from _records(path, address, shard)

    def open_image(self, place: list[Any]) -> BinaryIO:
        return self._open(Member(*place))

    def source_of(self, index: int) -> Source:
        member = Member(*self.record(index).place)
        return Source(self.paths[member.shard], member.offset, member.size)

    def texts_in(self, sidecar: list[Any]) -> list[str]:
        member = Member(*sidecar)
        with self._open(member) as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
        return self.captions.texts_of_file(data) if member.suffix != '.json' else texts_of(_text_of_json(data.decode('utf-8-sig')))

    def _open(self, member: Member) -> BinaryIO:
        return io.BufferedReader(_Window(self.paths[member.shard], member))


def _text_of_json(text: str) -> Any:
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError(f'expected an object, got {text[:60]}')
    return next((row[key] for key in CAPTION_KEYS if key in row), None)


def _records(path: str, address: str, shard: int) -> list[Record]:
    """One for each image of a shard, in the order of the shard."""
    members: dict[str, dict[str, Member]] = {}
    for name, offset, size in _members(path, address):
        folder, _, base = name.rpartition('/')
        stem, dot, suffix = base.partition('.')
        if not stem:    # .DS_Store, and what macOS writes beside each file
            continue
        beside = members.setdefault(f'{folder}/{stem}' if folder else stem, {})
        suffix = (dot + suffix).lower()
        if suffix in beside:
            raise DataError(f'{address} holds {name} twice: which one is meant?')
        beside[suffix] = Member(shard, suffix, offset, size)
    records = []
    for key, beside in members.items():
        images = [member for suffix, member in beside.items() if suffix in IMAGE_SUFFIXES]
        caption = next((beside[suffix] for suffix in (*CAPTION_SUFFIXES, '.json') if suffix in beside), None)
        records += [Record(f'{address}/{key}{image.suffix}', image, sidecar=caption) for image in images]
    if not records:
        found = ', '.join(list(members)[:3]) or 'nothing'
        raise DataError(f'{address} holds no image, i.e. no member that ends in {" ".join(IMAGE_SUFFIXES)}; it holds {found}')
    return records


def _members(path: str, address: str) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, bytes) of each plain file in a tar; links, folders and devices are left out. Raises DataError."""
    length = os.path.getsize(path)
    try:
        with tarfile.open(path, 'r:') as tar:
            for member in tar:
                if member.offset_data + member.size > length:
                    raise DataError(f'{address} is cut off within {member.name}: it has {length} bytes. Fetch it again')
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f'{address} is not a tar file that can be read by seek ({error}): it may be compressed (gunzip it) or cut '
                        'off (fetch it again)') from error
    with open(path, 'rb') as file:
        file.seek(end)    # tarfile stops without a word at whatever is no header
        rest = file.read(2 * BLOCK)
        is_ended = len(rest) >= BLOCK and not any(rest)
        while is_ended and (rest := file.read(1 << 20)):
            if any(rest):
                raise DataError(f'{address} has data after its end, at most {length - end} bytes: tar files are not joined by cat')
    if not is_ended:
        raise DataError(f'{address} is cut off or damaged at byte {end} of {length}, where a member or the end is due. Fetch it again')


class _Window(io.RawIOBase):
    """The bytes of one member as a file of its own, with a place of its own: nothing is shared between processes."""

    def __init__(self, path: str, member: Member):
        self.file, self.first, self.size, self.place = open(path, 'rb', buffering=0), member.offset, member.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence])
        return self.place

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.size - self.place))
        self.file.seek(self.first + self.place)
        read = self.file.readinto(memoryview(buffer)[:wanted]) or 0
        self.place += read
        return read

    def close(self) -> None:
        self.file.close()
        super().close()

