"""Rows of a cache that a dataset needs: which of them are there, which are missing, and who is to write them."""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scepter.core import pulse
from scepter.core.errors import DataError
from scepter.core.logger import duration, get_logger
from scepter.data.images import UnreadableError
from scepter.data.shards import NO_PARTS, Fault, Shards, Slot, restore_index, write_shard


def encoder_word(fingerprint: str, arithmetic: torch.dtype, weights: str) -> str:
    """All that an encoder's results depend on beside what it is given: what it is, and the types that it computes in."""
    return f'{fingerprint} {arithmetic} {weights}'


class Table:
    """The rows that a dataset needs of one encoder, some of them in shards already. A subclass says what the keys are.

    keys: uint8 [N, KEY_BYTES], one for each index.  has_key: bool [N], False where a source cannot be read.
    """

    keys: np.ndarray
    has_key: np.ndarray

    def __init__(self, folder: Path, rows: int, logger: logging.Logger | None = None):
        self.folder, self.rows, self.logger = folder, rows, logger or get_logger()

    def missing(self) -> list[list[int]]:
        """What is to be computed, by the shard that each is to be in."""
        raise NotImplementedError

    def look(self) -> None:
        """Find the rows that are there. Raises nothing for a damaged shard: `faults` tells, and its rows are missing."""
        self.shards = Shards(self.folder)
        self.numbers = self.shards.find(self.keys)
        self.numbers[~self.has_key] = -1

    @property
    def faults(self) -> list[Fault]:
        """What is wrong with the shards at first sight."""
        return self.shards.faults

    def parts(self, groups: Sequence[Sequence[int]]) -> list[list[int]]:
        """The indices whose rows are missing, by the shard that each is to be in; groups: indices whose rows have one shape.

        Where a shard begins is decided by what the dataset holds, not by what is missing: so one that was killed goes on with the same
        shards, and several processes can share them.
        """
        parts, seen = [], set[bytes]()
        for group in groups:
            unique = []
            for index in group:
                key = self.keys[index].tobytes()
                if self.has_key[index] and key not in seen:
                    seen.add(key)
                    unique.append(index)
            for first in range(0, len(unique), self.rows):
                if missing := [i for i in unique[first:first + self.rows] if self.numbers[i] < 0]:
                    parts.append(missing)
        return parts

    def write(self, indices: Sequence[int], rows: dict[str, Tensor], name: Callable[[int], str]) -> None:
        """Keep the rows of these indices as one shard. Raises DataError where one is not finite."""
        for key, value in rows.items():
            if value.is_floating_point() and not value.isfinite().all():
                bad = next(i for i, row in zip(indices, value) if not row.isfinite().all())
                raise DataError(f'{name(bad)}: its {key} are not finite in {str(value.dtype).removeprefix("torch.")}: encode in float32 '
                                '(SOLVER.DTYPE), or keep them in another type (CACHE.DTYPE)')
        write_shard(self.folder, [self.keys[i].tobytes() for i in indices], rows)

    def restore_indices(self) -> None:
        """Write indices that were lost again."""
        for shard in self.shards.shards:
            if not shard.has_index and shard.whole.all():
                restore_index(shard)

    def read(self, indices: Sequence[int], parts: Mapping[str, np.ndarray] = NO_PARTS) -> list[Slot | UnreadableError]:
        """The row of each index, or why there is none.    parts: as `Shards.rows` takes them"""
        numbers = self.numbers[np.asarray(indices, np.int64)]
        there = np.flatnonzero(numbers >= 0)
        found: list[Slot | UnreadableError] = [UnreadableError('could not be read when the cache was filled')] * len(numbers)
        for i, row in zip(there.tolist(), self.shards.rows(numbers[there], {name: part[there] for name, part in parts.items()})):
            found[i] = row if isinstance(row, tuple) else UnreadableError(
                f'{row}; `scepter latents prune` drops it, and the next run computes it again')
        return found


class Clock:
    """Says how far it is: pictures a second and the time left, every ten seconds and at the end."""

    def __init__(self, total: int, what: str, logger: logging.Logger | None, every: float = 10.0, word: str = 'cache'):
        self.total, self.what, self.logger, self.every, self.word = total, what, logger or get_logger(), every, word
        self.done, self.begin = 0, time.monotonic()
        self.said = self.begin

    def tick(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        pulse.beat()
        now = time.monotonic()
        if now - self.said < self.every and self.done < self.total:
            return
        self.said, rate = now, self.done / max(1e-9, now - self.begin)
        self.logger.info(f'{self.word}: {self.done:,} of {self.total:,} {self.what}, {rate:.3g} a second, '
                         f'{duration((self.total - self.done) / rate)} left')
