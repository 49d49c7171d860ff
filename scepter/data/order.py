"""Orders: which sample is the n-th of the endless stream. A function of (seed, n) and the dataset's shape, never of what came before.

    order.indices(n)            int64 [B] draw numbers  ->  int64 [B] indices
    order.instead(n, index)     the indices that may take the place of one that cannot be read, first choice first
    order.together              so many draws in a row have one shape and come from one part; 1: each draw is by itself

So a rank, a worker or a resumed run asks for its own numbers alone, in any pieces, and costs nothing to begin anywhere.
Where `together` is more than 1, draws k * together ... are a group; the loader lets a group begin where a step of the optimizer does.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from scepter.core import streams

MIXED_WITHIN = 16    # groups whose parts are shuffled among themselves: their shares are exact from one such block to the next


class Order(Protocol):
    """What the loader asks."""
    together: int

    def indices(self, n: np.ndarray) -> np.ndarray:
        """int64 [B] -> int64 [B]"""

    def instead(self, n: int, index: int) -> Iterator[int]:
        """Indices for draw n, whose own cannot be read: of the same shape and part, the same ones after a resume."""


class Sequential(Order):
    """The dataset's own order, again and again."""
    together = 1

    def __init__(self, size: int):
        self.size = size

    def indices(self, n: np.ndarray) -> np.ndarray:
        return np.asarray(n, np.int64) % self.size

    def instead(self, n: int, index: int) -> Iterator[int]:
        yield from ((index + i) % self.size for i in range(1, self.size))


class Shuffled(Order):
    """Each sample once per epoch, in an order of the epoch's own: a keyed bijection, so nothing is stored."""
    together = 1

    def __init__(self, seed: int, size: int):
        self.seed, self.size = seed, size

    def indices(self, n: np.ndarray) -> np.ndarray:
        return streams.permuted(self.seed, n, self.size)

    def instead(self, n: int, index: int) -> Iterator[int]:
        key = streams.seed_global(self.seed, 'replace')
        yield from (streams.permute(key, n, place, self.size) for place in range(self.size))


class Bucketed(Order):
    """Groups of `together` samples of one bucket each; the groups of an epoch are shuffled among themselves.

    A bucket of c samples hands out shuffled epochs of its own. By the end of epoch e it has given floor(c * e / together) whole groups;
    what does not fill a group waits, and opens the bucket's share of the next epoch. So no sample is dropped or repeated to fill up: each
    has come e or e - 1 times, and a bucket smaller than a group comes once in several epochs, then with samples repeated.
    An epoch is as long as its groups, so len(dataset) on average.

    buckets: the indices of each one's samples.
    """

    def __init__(self, seed: int, buckets: Sequence[np.ndarray], together: int):
        self.seed, self.together = seed, together
        self.buckets = [np.asarray(bucket, np.int64) for bucket in buckets if len(bucket)]
        self.seeds = [streams.seed_global(seed, 'bucket', i) for i in range(len(self.buckets))]
        self.sizes = np.array([len(bucket) for bucket in self.buckets], np.int64)

    def indices(self, n: np.ndarray) -> np.ndarray:
        n = np.asarray(n, np.int64)
        groups, which = np.unique(n // self.together, return_inverse=True)
        bucket, number = self._groups(groups)
        draw = number[which] * self.together + n % self.together
        found = np.empty(len(n), np.int64)
        for b in np.unique(bucket):
            rows = bucket[which] == b
            found[rows] = self.buckets[b][streams.permuted(self.seeds[b], draw[rows], len(self.buckets[b]))]
        return found

    def instead(self, n: int, index: int) -> Iterator[int]:
        b = next(i for i, bucket in enumerate(self.buckets) if index in bucket)
        key = streams.seed_global(self.seeds[b], 'replace')
        yield from (int(self.buckets[b][streams.permute(key, n, place, len(self.buckets[b]))]) for place in range(len(self.buckets[b])))

    def _groups(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [G], numbers of groups -> the bucket of each, and the number of the group within its bucket."""
        bucket, number = np.empty_like(groups), np.empty_like(groups)
        at = 0
        while at < len(groups):
            epoch = self._epoch_of(int(groups[at]))
            before, after = self._given(epoch), self._given(epoch + 1)
            first, count = int(before.sum()), int((after - before).sum())
            end = int(np.searchsorted(groups, first + count))
            place = streams.permuted(streams.seed_global(self.seed, 'groups', epoch), groups[at:end] - first, count)
            bounds = np.cumsum(after - before)
            bucket[at:end] = np.searchsorted(bounds, place, side='right')
            number[at:end] = before[bucket[at:end]] + place - (bounds - (after - before))[bucket[at:end]]
            at = end
        return bucket, number

    def _given(self, epochs: int) -> np.ndarray:
        """[buckets] The groups that each bucket has handed out after so many epochs."""
        return self.sizes * epochs // self.together

    def _epoch_of(self, group: int) -> int:
        """The epoch in which this group comes: the last one that begins at or before it."""
        epoch = group * self.together // int(self.sizes.sum())    # at the earliest, for groups that wait make epochs shorter
        while int(self._given(epoch + 1).sum()) <= group:
            epoch += 1
        return epoch


class Mixed(Order):
    """Several orders, each with a weight, as one. Each goes through shuffled epochs of its own, whatever the others' lengths.

    In any window of w groups a part with share p has p * w of them, to within 2 * (parts + MIXED_WITHIN / 4): after each MIXED_WITHIN
    groups from the beginning on, the counts are those of a nested division by floor, which is off by less than the number of parts, and
    within such a block the parts are shuffled, so that nothing that comes every so many steps can fall in step with one of them.

    offsets: what is added to each part's own indices.
    """

    def __init__(self, seed: int, parts: Sequence[Order], weights: Sequence[float], offsets: Sequence[int]):
        self.seed, self.parts, self.offsets = seed, list(parts), list(offsets)
        self.together = max(part.together for part in parts)
        shares = [Fraction(str(weight)) for weight in weights]    # as they are written: 0.1 is a tenth
        whole = math.lcm(*(share.denominator for share in shares))
        self.weights = [int(share * whole) for share in shares]

    def indices(self, n: np.ndarray) -> np.ndarray:
        n = np.asarray(n, np.int64)
        groups, which = np.unique(n // self.together, return_inverse=True)
        part, number = self._groups(groups)
        draw = number[which] * self.together + n % self.together
        found = np.empty(len(n), np.int64)
        for i in np.unique(part):
            rows = part[which] == i
            found[rows] = self.parts[i].indices(draw[rows]) + self.offsets[i]
        return found

    def instead(self, n: int, index: int) -> Iterator[int]:
        i = int(np.searchsorted(self.offsets, index, side='right')) - 1
        yield from (self.offsets[i] + other for other in self.parts[i].instead(n, index - self.offsets[i]))

    def _groups(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [G], numbers of groups -> the part of each, and the number of the group within its part."""
        blocks, which = np.unique(groups // MIXED_WITHIN, return_inverse=True)
        before, after = (np.array([self._given((block + more) * MIXED_WITHIN) for block in blocks.tolist()]) for more in (0, 1))  # [K, P]
        places = blocks[:, None] * MIXED_WITHIN + np.arange(MIXED_WITHIN)
        shuffled = streams.permuted(self.seed, places.ravel(), MIXED_WITHIN).reshape(places.shape)                    # [K, MIXED_WITHIN]
        part = (shuffled[..., None] >= np.cumsum(after - before, 1)[:, None]).sum(-1)
        earlier = np.cumsum(part[..., None] == np.arange(before.shape[1]), 1) - 1      # of each part, before and with this place
        number = np.take_along_axis(before, part, 1) + np.take_along_axis(earlier, part[..., None], 2)[..., 0]
        return part[which, groups % MIXED_WITHIN], number[which, groups % MIXED_WITHIN]

    def _given(self, groups: int) -> list[int]:
        """How many of the first so many groups are each part's. Never falls as `groups` grows, and adds up to it."""
        given, left, weight_left = [], groups, sum(self.weights)
        for weight in self.weights:
            given.append(left * weight // weight_left if weight_left else 0)
            left, weight_left = left - given[-1], weight_left - weight
        return given
