"""A mixture: several datasets as one, each with a weight."""
from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from scepter.core import streams
from scepter.core.config import Config
from scepter.core.errors import DataError
from scepter.core.faults import Fault
from scepter.core.registry import DATASETS
from scepter.core.schema import Component, param, part, schema_of, split_node
from scepter.data.datasets import BaseDataset
from scepter.data.generators import ALL
from scepter.data.order import Mixed, Order
from scepter.data.sources import Source


class MixturePlace(Component):
    """What a dataset's node says about its place in a mixture, beside its own keys."""

    WEIGHT: float = param(1.0, 'Its share of the samples is this over the sum of all weights; 0: none.', least=0)


@DATASETS.register_class()
class MixtureDataset(BaseDataset):
    """Several datasets as one, mixed by weight.    index  ->  the sample of the part that it falls into

    Each part goes through shuffled epochs of its own, whatever its length: a small one with a large weight is simply seen more often.
    Shares are exact to a few samples over any stretch of the training (data/order.py). An epoch, for MAX_EPOCHS, is as many samples as
    the parts with a weight have together. How samples are read and batched is said here, not in the parts.
    """

    PARTS: dict = part(DATASETS, 'The datasets, by names of your own.', place=MixturePlace)

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if 'NAME' in cfg.PARTS or not cfg.PARTS:
            yield Fault('PARTS', 'is a map of datasets, each under a name of your own, e.g. {photos: {NAME: ..., WEIGHT: 3}}')
            return
        for name, node in cfg.PARTS.items():
            for key in schema_of(BaseDataset).keys() & node.keys():
                yield Fault(f'PARTS.{name}.{key}', 'has no effect in a part: say it once, beside PARTS')
        if not any(node.get('WEIGHT', 1) for node in cfg.PARTS.values()):
            yield Fault('PARTS', 'every WEIGHT is 0: nothing is left')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.parts: dict[str, BaseDataset] = {}
        self.weights: list[float] = []
        for name, node in self.PARTS.items():
            own, (schema, beside) = split_node(node, MixturePlace)
            if weight := schema.fill(beside).WEIGHT:
                self.parts[name] = DATASETS.build(own, logger=logger)
                self.weights.append(weight)
                if len(self.parts[name]) == 0:
                    raise DataError(f'PARTS.{name} holds no sample')
        *self.offsets, self.size = accumulate(map(len, self.parts.values()), initial=0)
        self._list = list(self.parts.values())

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        found, own = self._part_of(index)
        return found[own]

    def name_of(self, index: int) -> str:
        found, own = self._part_of(index)
        return found.name_of(own)

    def collate(self, samples: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """As the first part does."""
        return self._list[0].collate(samples, names)

    def order(self, seed: int, step: int) -> Order:
        orders = [found.order(streams.seed_global(seed, 'part', name), step) for name, found in self.parts.items()]
        return Mixed(seed, orders, self.weights, self.offsets)

    def batches(self, size: int) -> list[Sequence[int]]:
        """One part after the other, none of which shares a batch with another."""
        return [[offset + i for i in batch] for offset, found in zip(self.offsets, self._list) for batch in found.batches(size)]

    @property
    def file_count(self) -> int:
        return sum(found.file_count for found in self._list)

    # ---------------------------------------------------------------- what a cache asks
    def beside(self, index: int) -> dict[str, Any]:
        found, own = self._part_of(index)
        return found.beside(own)

    def source_of(self, index: int) -> Source | None:
        found, own = self._part_of(index)
        return found.source_of(own)

    def bytes_of(self, index: int) -> bytes:
        found, own = self._part_of(index)
        return found.bytes_of(own)

    def view_of(self, index: int) -> Any:
        found, own = self._part_of(index)
        return found.view_of(own)

    @property
    def mirrors(self) -> bool:    # type: ignore[override]
        return any(found.mirrors for found in self._list)

    @property
    def draws_beside(self) -> Sequence[str]:    # type: ignore[override]
        return [name for name in ALL if any(name in found.draws_beside for found in self._list)]

    def unmirrored(self) -> MixtureDataset:
        still = copy.copy(self)
        still._list = [found.unmirrored() for found in self._list]
        return still

    def draws_mirror(self, index: int) -> bool:
        found, own = self._part_of(index)
        return found.draws_mirror(own)

    def _part_of(self, index: int) -> tuple[BaseDataset, int]:
        i = bisect_right(self.offsets, index) - 1
        return self._list[i], index - self.offsets[i]
