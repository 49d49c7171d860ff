"""Names both ways: rows of ours and theirs, read in either direction."""
from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch

from scepter.weights.files import Entry, Weights

OURS, THEIRS = 0, 1


class Row(NamedTuple):
    """A module or a weight, under our name and under theirs; {n} stands for a number, and all that is below a module goes along.

    Several names on one side are stacked along the first axis of the one on the other. transposed: a matrix that they keep the other way
    round; conv: a 1x1 convolution with us, a linear layer with them. Of rows with one of our names the first is what we write.
    """
    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    how: Literal['', 'transposed', 'conv'] = ''

    def names(self, side: int) -> tuple[str, ...]:
        """Its names on one side: one, or those of a stack."""
        found = self[side]
        return (found,) if isinstance(found, str) else found


class Found(NamedTuple):
    """The longest row that knows a name: which of its names on this side, the numbers in it, and what stands below."""
    row: Row
    place: int
    numbers: tuple[str, ...]
    rest: str

    def on(self, side: int) -> list[str]:
        """The full names on one side."""
        return [_filled(name, self.numbers) + self.rest for name in self.row.names(side)]


class Table:
    """Rows, indexed for both directions."""

    def __init__(self, rows: Iterable[Row]):
        self.exact: tuple[dict[str, tuple[Row, int]], ...] = ({}, {})
        self.patterns: tuple[dict[str, list[tuple[re.Pattern[str], Row, int]]], ...] = ({}, {})    # by their first word
        for row in rows:
            for side in (OURS, THEIRS):
                for place, name in enumerate(row.names(side)):
                    if '{n}' not in name:
                        self.exact[side].setdefault(name, (row, place))
                        continue
                    pattern = re.compile(re.escape(name).replace(r'\{n\}', r'(\d+)') + r'(?=\.|$)')
                    self.patterns[side].setdefault(name.split('.')[0], []).append((pattern, row, place))

    def find(self, name: str, side: int) -> Found | None:
        """The row of a name of ours (side 0) or theirs (side 1); None where no row knows it."""
        words, found, length = name.split('.'), None, 0
        for cut in range(len(words), 0, -1):
            head = '.'.join(words[:cut])
            if head in self.exact[side]:
                found, length = Found(*self.exact[side][head], (), name[len(head):]), len(head)
                break
        for pattern, row, place in self.patterns[side].get(words[0], ()):
            match = pattern.match(name)
            if match and match.end() > length:
                found, length = Found(row, place, match.groups(), name[match.end():]), match.end()
        return found

    def to_theirs(self, weights: Weights) -> Weights:
        """Ours under their names; a name that no row knows stays."""
        return self._turn(weights, OURS)

    def to_ours(self, weights: Weights) -> Weights:
        """Theirs under our names; a name that no row knows stays."""
        return self._turn(weights, THEIRS)

    def unknown(self, names: Iterable[str], side: int) -> list[str]:
        """Names that no row has on this side."""
        return [name for name in names if self.find(name, side) is None]

    def _turn(self, weights: Weights, side: int) -> Weights:
        entries: dict[str, Entry] = {}
        for name, entry in weights.entries.items():
            found = self.find(name, side)
            if found is None:
                entries[name] = entry
            elif len(here := found.on(side)) == 1:
                there = found.on(1 - side)
                entries |= {new: _shaped(_slice(entry, i, len(there)), found.row.how, side) for i, new in enumerate(there)}
            elif found.place == 0:
                entries[found.on(1 - side)[0]] = _shaped(_joined(weights, here, entry), found.row.how, side)
        return weights.with_entries(entries)


def _filled(name: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        name = name.replace('{n}', number, 1)
    return name


def _shaped(entry: Entry, how: str, side: int) -> Entry:
    if how == 'transposed':
        return entry._replace(shape=entry.shape[::-1], read=lambda: entry.read().T.contiguous())
    if how == 'conv' and side == OURS and entry.shape[2:] == (1, 1):
        return _reshaped(entry, entry.shape[:2])
    return _reshaped(entry, (*entry.shape, 1, 1)) if how == 'conv' and side == THEIRS and len(entry.shape) == 2 else entry


def _reshaped(entry: Entry, shape: tuple[int, ...]) -> Entry:
    return entry._replace(shape=shape, read=lambda: entry.read().reshape(shape))


def _slice(entry: Entry, place: int, count: int) -> Entry:
    """One of `count` equal pieces along the first axis."""
    if count == 1:
        return entry
    size = entry.shape[0] // count
    return entry._replace(shape=(size, *entry.shape[1:]), read=lambda: entry.read()[place * size:(place + 1) * size].contiguous())


def _joined(weights: Weights, names: list[str], like: Entry) -> Entry:
    """Several tensors stacked along their first axis. Raises KeyError on reading where one is absent; its shape tells it before."""
    parts = [weights.entries[n] for n in names if n in weights]
    files = tuple({file: None for e in parts for file in e.files})
    return like._replace(shape=(sum(e.shape[0] for e in parts), *like.shape[1:]), files=files,
                         read=lambda: torch.cat([weights[n] for n in names]))
