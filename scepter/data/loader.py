"""The loader: an endless stream of samples in which every draw is a function of (seed, n), n being its number in the stream.

Which sample draw n is says the dataset's order (data/order.py). Step s of training covers n in [s * G, (s + 1) * G), G the global batch,
cut into micro-batches and each of those into ranks. So 1, 2 and 4 processes with the same G see the same samples, and to resume is to
begin at a number.

    loader = Loader(dataset, seed=2024, rank=we.rank, world_size=we.world_size, first=samples, step=G)
    batch, n = next(loader)        # dict, int64 [B]
"""
from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scepter.core import streams
from scepter.core.errors import DataError
from scepter.core.logger import get_logger
from scepter.data.datasets import BaseDataset
from scepter.data.generators import generators_restored, seed_generators
from scepter.data.guard import Guard
from scepter.data.images import UnreadableError
from scepter.data.order import Order, Sequential
from scepter.data.workers import Workers

Batch = tuple[dict[str, Any], Tensor]
BLOCK = 4096     # draws whose places in the order are worked out at once


class Loader(Iterator[Batch]):
    """The endless stream, for training. Yields (batch, n): the samples as the dataset collates them, and their draw numbers, int64 [B].

    first: the number of the sample to begin with, over all processes.
    step: samples of one step of the optimizer over all processes; those that belong together, of one bucket, share it.
    batch_size: of one process and micro-batch; the dataset's own BATCH_SIZE when left out, and likewise num_workers and its order.
    skipped_file: where each unreadable file is noted, one JSON line (path, reason) each; `skipped` holds those met so far.
    Raises DataError when more files are unreadable than MAX_BAD_FRACTION allows, or when workers keep dying.
    """

    def __init__(self, dataset: BaseDataset, batch_size: int | None = None, *, seed: int, rank: int = 0, world_size: int = 1,
                 first: int = 0, step: int | None = None, num_workers: int | None = None, order: Order | None = None,
                 skipped_file: str | Path | None = None, logger: logging.Logger | None = None):
        size = dataset.BATCH_SIZE if batch_size is None else batch_size
        if len(dataset) == 0:
            raise DataError(f'{type(dataset).__name__} holds no sample')
        step = step or world_size * size
        order = order or dataset.order(seed, step)
        # a group of samples that belong together begins where a step does, also after a resume with another global batch
        self._reader = Reader(dataset, seed, order, phase=first % step if order.together > 1 else 0, replace=True)
        if rank == 0:
            self._reader.guard.tell(logger or get_logger())
        firsts = count(first + rank * size, world_size * size)
        self._batches = _Batches(self._reader, (range(first, first + size) for first in firsts), num_workers, skipped_file, logger)

    @property
    def skipped(self) -> dict[str, str]:
        """Unreadable file -> reason, as met by this process."""
        return self._batches.skipped

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Stop the workers. Also happens when the loader is dropped, and at exit."""
        self._batches.close()


class OrderedLoader:
    """Every sample once, in the dataset's `batches`, for evaluation; each `for` begins anew. Yields (batch, n), n the samples' indices.

    Rank r takes each batch whose number is r modulo world_size, so batches are the same for every world size. An unreadable sample
    is left out. A draw is keyed as in Loader, so a transform's randomness is the same in every evaluation.
    """

    def __init__(self, dataset: BaseDataset, batch_size: int | None = None, *, seed: int = 0, rank: int = 0, world_size: int = 1,
                 num_workers: int | None = None, skipped_file: str | Path | None = None, logger: logging.Logger | None = None):
        self._reader = Reader(dataset, seed, Sequential(len(dataset)), replace=False)
        self._parts = dataset.batches(dataset.BATCH_SIZE if batch_size is None else batch_size)[rank::world_size]
        self._num_workers, self._skipped_file, self._logger = num_workers, skipped_file, logger

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        batches = _Batches(self._reader, iter(self._parts), self._num_workers, self._skipped_file, self._logger)
        try:
            yield from (batch for batch in batches if len(batch[1]))
        finally:
            batches.close()


class Read(NamedTuple):
    """What came of reading one batch."""
    batch: dict[str, Any]
    n: Tensor                        # [B] int64
    bad: list[tuple[str, str]]       # (path, reason) of each unreadable file that was met
    lost: str | None = None          # a sample that nothing could replace


class Reader:
    """Draw numbers in, a batch out: nothing but (seed, n) and the files decide. Runs in the main process and in workers alike."""

    def __init__(self, dataset: BaseDataset, seed: int, order: Order, *, phase: int = 0, replace: bool):
        self.dataset, self.seed, self.order, self.phase, self.replace = dataset, seed, order, phase, replace
        self._block, self._order = -1, list[int]()    # the indices of the last block that was asked for
        self.guard = Guard(dataset)
        fraction = dataset.MAX_BAD_FRACTION
        self.bad_allowed = max(2, int(fraction * dataset.file_count)) if fraction > 0 else 0

    def __call__(self, ns: Sequence[int]) -> Read:
        bad: dict[str, str] = {}
        indices = [self._index(n - self.phase) for n in ns]
        with generators_restored(self.dataset.draws_from):
            samples = self._read(ns, indices, bad)
            if self.replace:
                for place in [place for place, sample in enumerate(samples) if sample is None]:
                    indices[place], samples[place] = self._instead(ns[place], indices[place], bad)
        there = [place for place, sample in enumerate(samples) if sample is not None]
        lost = next((index for index, sample in zip(indices, samples) if sample is None), None) if self.replace else None
        names = _Names(self.dataset, [indices[place] for place in there])
        batch = self.dataset.collate([sample for sample in samples if sample is not None], names) if there else {}
        return Read(batch, torch.from_numpy(np.array([ns[place] for place in there], np.int64)), list(bad.items()),
                    None if lost is None else self.dataset.name_of(lost))

    def _index(self, draw: int) -> int:
        """Which sample it is. Worked out for a block of draws at once: one by one they cost 12 us each, together 0.7."""
        if draw // BLOCK != self._block:
            self._block = draw // BLOCK
            self._order = self.order.indices(np.arange(self._block * BLOCK, (self._block + 1) * BLOCK)).tolist()
        return self._order[draw % BLOCK]

    def _read(self, ns: Sequence[int], indices: Sequence[int], bad: dict[str, str]) -> list[dict[str, Any] | None]:
        """The sample of each draw; None where it is passed over, or cannot be read."""
        wanted = [place for place, index in enumerate(indices) if self._is_wanted(index, bad)]
        draws = self.dataset.draws_from
        seeds = streams.seeds_global(self.seed, 'transform', n=np.array([ns[place] for place in wanted], np.int64)) if draws else []
        read = self.dataset.samples_of([indices[place] for place in wanted], lambda place: seed_generators(seeds[place], draws))
        samples: list[dict[str, Any] | None] = [None] * len(indices)
        for place, sample in zip(wanted, read):
            if isinstance(sample, UnreadableError):
                bad[self.dataset.name_of(indices[place])] = str(sample)
            else:
                samples[place] = sample
        return samples

    def _is_wanted(self, index: int, bad: dict[str, str]) -> bool:
        """Whether a sample is neither passed over nor has another checksum than it is to have."""
        if index in self.guard.passed_over:
            return False
        try:
            self.guard.check(index)
        except UnreadableError as error:
            bad[self.dataset.name_of(index)] = str(error)
            return False
        return True

    def _instead(self, n: int, index: int, bad: dict[str, str]) -> tuple[int, dict[str, Any] | None]:
        """(index, sample) of the first that can be read of those that may take the place of draw n's own; that and None where none can."""
        for candidate in self.order.instead(n, index):
            if len(bad) > self.bad_allowed:
                break
            if (sample := self._read([n], [candidate], bad)[0]) is not None:
                return candidate, sample
        return index, None


class _Names(Sequence[str]):
    """What the samples of a batch are called, worked out when somebody asks: as a rule only a message does."""

    def __init__(self, dataset: BaseDataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: Any) -> Any:
        return self.dataset.name_of(self.indices[place])


class _Batches(Iterator[Batch]):
    """Reads one list of draw numbers after the other, here or in workers, and keeps the account of unreadable files."""

    def __init__(self, reader: Reader, parts: Iterator[Sequence[int]], num_workers: int | None, skipped_file: str | Path | None,
                 logger: logging.Logger | None):
        dataset = reader.dataset
        self.reader, self.logger = reader, logger or get_logger()
        self.skipped: dict[str, str] = {}
        self.skipped_file = None if skipped_file is None else _SkippedFile(skipped_file)
        self.pin_memory = dataset.PIN_MEMORY and torch.cuda.is_available()
        num_workers = dataset.NUM_WORKERS if num_workers is None else num_workers
        self.reads: Iterator[Read] = map(reader, parts) if num_workers == 0 else Workers(
            reader, parts, num_workers, prefetch=dataset.PREFETCH, timeout=dataset.TIMEOUT, logger=self.logger)

    def __next__(self) -> Batch:
        read = next(self.reads)
        for path, reason in read.bad:
            self._note(path, reason)
        if read.lost is not None:
            raise DataError(f'{read.lost} cannot be read, and neither can any that may take its place, of the same shape and part: '
                            'mend it, or take it out of the data')
        batch = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in read.batch.items()} if self.pin_memory else read.batch
        return batch, read.n

    def close(self) -> None:
        if isinstance(self.reads, Workers):
            self.reads.close()

    def _note(self, path: str, reason: str) -> None:
        if path in self.skipped:
            return
        self.skipped[path] = reason
        self.logger.warning(f'unreadable, {"another sample takes its place" if self.reader.replace else "left out"}: {path}: {reason}')
        if self.skipped_file is not None:
            self.skipped_file.add(path, reason)
        if len(self.skipped) > self.reader.bad_allowed:
            named = '\n'.join(f'  {p}: {r}' for p, r in list(self.skipped.items())[:20])
            dataset = self.reader.dataset
            raise DataError(f'{len(self.skipped)} of {dataset.file_count} files are unreadable, more than the {self.reader.bad_allowed} '
                            f'that MAX_BAD_FRACTION {dataset.MAX_BAD_FRACTION} allows:\n{named}')


class _SkippedFile:
    """skipped.jsonl: one line for each unreadable file, also over resumes and over the ranks that share it."""

    def __init__(self, path: str | Path):
        self.path, self.known, self.read_to = Path(path), set[str](), 0

    def add(self, path: str, reason: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, 'a+b') as file:
            file.seek(self.read_to)    # what others have added since
            self.known |= {json.loads(line)['path'] for line in file if line.endswith(b'}\n')}    # not one that a crash cut off
            if path not in self.known:
                file.write(json.dumps({'path': path, 'reason': reason}).encode() + b'\n')
            self.read_to = file.tell()
            self.known.add(path)
