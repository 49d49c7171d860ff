"""What an encoder makes of a sample, computed once, before training: moments of its picture, features of its prompt.

A row is kept under a key that says all it depends on: the bytes of the source, what the dataset does to them, the encoder and its
weights, the types, the format. So nothing in a cache can be out of date: what has changed has another key, and is computed.

    pictures = Pictures(dataset, folder, encoder='sha256 of its weights', dtype=None)
    pictures.fill(encode, batch_size=16)                # [B, 3, H, W] in -1..1  ->  [B, ...]; only what is missing
    cached = CachedDataset(dataset, pictures)           # index -> the sample with `moments` in the place of its image
"""
from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scepter.core.errors import DataError
from scepter.core.faults import ConfigError
from scepter.core.schema import Component, param
from scepter.data.collating import collate
from scepter.data.datasets import PICTURES, BaseDataset
from scepter.data.generators import generators_restored, seed_generators
from scepter.data.guard import Guard
from scepter.data.images import UnreadableError
from scepter.data.kept import Clock, Table
from scepter.data.loader import OrderedLoader
from scepter.data.order import Order
from scepter.data.shards import KEY_BYTES, Row, Slot, key_of
from scepter.data.sources import Source, SourceBook
from scepter.data.texts import Texts

BESIDE = 'beside.'    # how what a transform noted of a sample is called in a row
ROWS = '(rows)'       # a sample's rows, until it is in a batch
TRIES = 4             # draws of a sample that must be alike to be kept,
TRIED = 16            # ... of so many samples
Encode = Callable[[Tensor], Tensor]


class Cache(Component):
    """What SOLVER.CACHE says."""

    FOLDER: str | None = param(None, 'Where moments of pictures are kept, for any number of runs; null: every step encodes its pictures.')
    DTYPE: Literal['float32', 'bfloat16', 'float16'] | None = param(None, 'What they are kept in; null: as they are computed, so that '
                                                                    'nothing is rounded.')
    PROMPTS: bool = param(True, 'Keep features of prompts too, where the text encoder is not trained and each sample always has the same.')
    ROWS: int = param(256, 'Samples of one file: what a kill costs at most.', least=1)
    BATCH_SIZE: int = param(16, 'Samples that are encoded at once.', least=1)


class Pictures(Table):
    """Moments of each picture of a dataset, and of its mirror image where the dataset mirrors by chance.

    encoder: all that the moments depend on beside the picture, as one word.  dtype: what they are kept in; None: as they are given.
    keys: those that another process has found.  anew: read every source, also those whose stat has not changed.
    Raises ConfigError where the pictures of the dataset differ from draw to draw.
    """

    def __init__(self, dataset: BaseDataset, folder: Path, encoder: str, dtype: torch.dtype | None = None, rows: int = 256,
                 keys: tuple[np.ndarray, np.ndarray] | None = None, anew: bool = False, logger: logging.Logger | None = None):
        super().__init__(folder / 'pictures', rows, logger)
        self.dataset, self.encoder, self.dtype, self.book = dataset, encoder, dtype, SourceBook(folder / 'sources.jsonl')
        self.reading = _Reading(dataset)
        self.keys, self.has_key = self._find_keys(anew) if keys is None else keys
        self.look()

    def _find_keys(self, anew: bool) -> tuple[np.ndarray, np.ndarray]:
        refuse_chance(self.dataset)
        keys, has_key = np.zeros((len(self.dataset), KEY_BYTES), np.uint8), np.zeros(len(self.dataset), bool)
        for index, content in self._contents(anew):
            key = key_of('picture', content, self.dataset.view_of(index), self.dataset.mirrors, self.encoder, str(self.dtype))
            keys[index], has_key[index] = np.frombuffer(key, np.uint8), True
        return keys, has_key

    def _contents(self, anew: bool) -> Iterator[tuple[int, str]]:
        """(index, digest of what its picture is made of), for all that are wanted and can be read."""
        unwanted = Guard(self.dataset).passed_over
        sources: dict[int, Source | None] = {i: self.dataset.source_of(i) for i in range(len(self.dataset)) if i not in unwanted}
        found = self.book.digests({s: i for i, s in sources.items() if s is not None}, self.dataset.bytes_of, anew)
        yield from ((i, sha) for i, s in sources.items() if s is not None and (sha := found[s]) is not None)
        for i in [i for i, source in sources.items() if source is None]:
            try:
                with generators_restored():
                    yield i, digest_of(picture_of(self.reading.dataset[i])[1])
            except UnreadableError:
                continue    # the loader names it, and puts another in its place

    def missing(self) -> list[list[int]]:
        return self.parts(self.dataset.batches(max(1, len(self.dataset))))

    def fill(self, encode: Encode, batch_size: int, parts: Sequence[Sequence[int]] | None = None,
             skipped_file: Path | None = None) -> None:
        """Compute what is missing, or these parts of it, shard by shard. encode: [B, 3, (T,) H, W] in -1..1 -> moments, of the same B."""
        parts = self.missing() if parts is None else parts
        clock = Clock(sum(map(len, parts)), 'pictures', self.logger)
        part_of = {index: i for i, part in enumerate(parts) for index in part}
        self.reading.parts = [part[first:first + batch_size] for part in parts for first in range(0, len(part), batch_size)]
        held: dict[int, Row] = {}
        at = 0
        for batch, n in OrderedLoader(self.reading, batch_size, skipped_file=skipped_file, logger=self.logger):
            if part_of[int(n[0])] != at and held:
                self._commit(held)
                held = {}
            at = part_of[int(n[0])]
            held |= dict(zip(n.tolist(), self._rows(batch, encode)))
            clock.tick(len(n))
        if held:
            self._commit(held)

    def _rows(self, batch: dict[str, Any], encode: Encode) -> list[Row]:
        _, picture = picture_of(batch)
        moments = encode(picture)
        if self.dataset.mirrors:
            moments = torch.stack([moments, encode(picture.flip(-1))], 1)
        moments = moments.detach().to('cpu', self.dtype)
        beside = {name: value for name, value in batch.items() if name.startswith(BESIDE)}
        return [{'moments': moments[i], **{name: value[i] for name, value in beside.items()}} for i in range(len(moments))]

    def _commit(self, held: dict[int, Row]) -> None:
        indices, rows = list(held), list(held.values())
        self._refuse_changed(indices)
        self.write(indices, {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, self.dataset.name_of)

    def _refuse_changed(self, indices: Sequence[int]) -> None:
        for index in indices:
            source = self.dataset.source_of(index)
            if source is not None and source.stamp() != self.book.known[source].stamp:
                raise DataError(f'{self.dataset.name_of(index)} has changed while the cache was filled: start again')


class CachedDataset(BaseDataset):
    """A dataset whose samples have `moments` in the place of their picture, and beside their prompt its features, each as text_<name>.

    Order, batches and names are the dataset's own.
    """

    def __init__(self, dataset: BaseDataset, pictures: Pictures, texts: Texts | None = None):
        self.__dict__.update(cfg=dataset.cfg, logger=dataset.logger)
        self.dataset, self.pictures, self.texts = dataset, pictures, texts

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As it is in a batch of one."""
        sample, = self.samples_of([index], lambda place: None)
        if isinstance(sample, UnreadableError):
            raise sample
        return {key: value[0] for key, value in self.collate([sample], [self.name_of(index)]).items()}

    @property
    def draws_from(self) -> Sequence[str]:    # type: ignore[override]
        return self.dataset.draws_beside

    def samples_of(self, indices: Sequence[int], seed: Callable[[int], None]) -> list[dict[str, Any] | UnreadableError]:
        """The words of each sample, and under ROWS where its rows are in the memory of all that were read together."""
        draws, mirrors = self.draws_from, self.dataset.mirrors
        found: list[Any] = []
        mirrored = np.zeros(len(indices), np.int64)
        for place, index in enumerate(indices):
            if draws:
                seed(place)
            try:    # drawn in the order in which the dataset itself draws: words, then the mirror
                found.append(self.dataset.beside(index))
                if mirrors:
                    mirrored[place] = self.dataset.draws_mirror(index)
            except UnreadableError as error:
                found[place:] = [error]
        whole = [place for place, words in enumerate(found) if isinstance(words, dict)]
        tables = [self.pictures.read([indices[place] for place in whole], {'moments': mirrored[whole]} if mirrors else {})]
        if self.texts is not None:
            tables.append(self.texts.of([found[place]['prompt'] for place in whole]))
        for place, rows in zip(whole, zip(*tables)):
            found[place][ROWS] = rows
        for table in tables:
            for place, row in zip(whole, table):
                if isinstance(row, UnreadableError):
                    found[place] = row
        return found

    def name_of(self, index: int) -> str:
        return self.dataset.name_of(index)

    def collate(self, samples: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        pictures, *texts = (_together(rows, names) for rows in zip(*(sample.pop(ROWS) for sample in samples)))
        batch = self.dataset.collate(samples, names)
        for name, value in pictures.items():
            batch[name.removeprefix(BESIDE)] = _widened(value, self.pictures.dtype) if name == 'moments' else value
        for features in texts:
            batch |= {f'text_{name}': _widened(value, self.texts.dtype) for name, value in features.items()}    # type: ignore[union-attr]
        return batch

    def order(self, seed: int, step: int) -> Order:
        return self.dataset.order(seed, step)

    def batches(self, size: int) -> list[Sequence[int]]:
        return self.dataset.batches(size)

    @property
    def file_count(self) -> int:
        return self.dataset.file_count


class _Reading(BaseDataset):
    """A dataset as a cache reads it: nothing mirrored, and of each sample the picture and what transforms noted of it."""

    def __init__(self, dataset: BaseDataset):
        self.__dict__.update(cfg=dataset.cfg, logger=dataset.logger)
        self.dataset, self.parts = dataset.unmirrored(), list[Sequence[int]]()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        name, picture = picture_of(sample)
        words = self.dataset.beside(index)
        noted = {key: value for key, value in sample.items() if key != name and key not in words}
        return {name: picture, **{f'{BESIDE}{key}': _as_tensor(key, value) for key, value in noted.items()}}

    def name_of(self, index: int) -> str:
        return self.dataset.name_of(index)

    def batches(self, size: int) -> list[Sequence[int]]:
        return self.parts

    def source_of(self, index: int) -> Source | None:
        return self.dataset.source_of(index)

    @property
    def file_count(self) -> int:
        return self.dataset.file_count


# ------------------------------------------------------------------------------------------------ what a picture is, and whether it stays
def picture_of(sample: dict[str, Any]) -> tuple[str, Tensor]:
    """(name, picture) of a sample or a batch. Raises ConfigError where it has none."""
    found = [name for name in PICTURES if name in sample]
    if not found:
        raise ConfigError(f'CACHE: samples of TRAIN_DATA have {", ".join(sample)}, but no {" or ".join(PICTURES)} to encode: '
                          'leave CACHE out')
    return found[0], sample[found[0]]


def digest_of(picture: Tensor) -> str:
    """sha256 of a tensor: its type, shape and bytes."""
    head = f'{picture.dtype} {list(picture.shape)} '.encode()
    return hashlib.sha256(head + picture.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def refuse_chance(dataset: BaseDataset) -> None:
    """Raises ConfigError where a sample's picture differs from draw to draw, but for its mirror image: one draw of many would be kept.

    So it does where transforms change what belongs to the words.
    """
    still = dataset.unmirrored()
    for index in range(0, len(still), max(1, len(still) // TRIED)):
        found = set()
        with generators_restored():
            for attempt in range(TRIES):
                seed_generators(attempt)
                try:
                    sample = still[index]
                    seed_generators(attempt)
                    words = still.beside(index)
                except UnreadableError:
                    break
                found.add(digest_of(picture_of(sample)[1]))
                if changed := [key for key, value in words.items() if isinstance(value, str) and sample.get(key) != value]:
                    raise ConfigError(f'CACHE: TRANSFORMS change the {changed[0]} of {dataset.name_of(index)}, which a cache of pictures '
                                      'does not: leave CACHE out')
        if len(found) > 1:
            raise ConfigError(f'CACHE: the picture of {dataset.name_of(index)} differs from draw to draw, and one draw would be kept for '
                              'good: take what is random out of TRANSFORMS (RANDOM, Random..., ColorJitter), or leave CACHE out. '
                              'The FLIP of RecordedCrop may stay: both images are kept')


def _together(rows: Sequence[Slot], names: Sequence[str]) -> Row:
    """Name -> [B, ...]: the memory that rows were read into, as it is where they are all of it; they are unless one was damaged."""
    columns = rows[0][0]
    count = len(next(iter(columns.values())))
    if [place for of, place in rows if of is columns] == list(range(count)) and len(rows) == count:
        return columns
    return collate([{name: column[place] for name, column in of.items()} for of, place in rows], names)


def _widened(value: Tensor, kept: torch.dtype | None) -> Tensor:
    """In float32 what was rounded to be kept."""
    return value.float() if kept is not None and value.is_floating_point() else value


def _as_tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f'CACHE: TRANSFORMS add {name}, a {type(value).__name__}: a cache keeps numbers and tensors') from error
