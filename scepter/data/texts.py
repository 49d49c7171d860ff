"""Features of prompts, computed once."""
from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scepter.core import streams
from scepter.core.errors import DataError
from scepter.data.datasets import BaseDataset
from scepter.data.generators import generators_restored, seed_generators
from scepter.data.images import UnreadableError
from scepter.data.kept import Clock, Table
from scepter.data.shards import KEY_BYTES, Row, Slot, key_of


class Texts(Table):
    """Features of each of some prompts: name -> a tensor of one shape."""

    def __init__(self, prompts: Sequence[str], folder: Path, encoder: str, dtype: torch.dtype | None = None, rows: int = 256,
                 logger: logging.Logger | None = None):
        super().__init__(folder / 'texts', rows, logger)
        self.prompts, self.encoder, self.dtype = list(prompts), encoder, dtype
        self.place = {prompt: i for i, prompt in enumerate(self.prompts)}
        keys = [key_of('text', prompt, encoder, str(dtype)) for prompt in self.prompts]
        self.keys, self.has_key = np.frombuffer(b''.join(keys), np.uint8).reshape(-1, KEY_BYTES), np.ones(len(keys), bool)
        self.look()

    def missing(self) -> list[list[int]]:
        return self.parts([range(len(self.prompts))])

    def fill(self, encode: Callable[[list[str]], Row], batch_size: int, parts: Sequence[Sequence[int]] | None = None) -> None:
        """Compute what is missing, or these parts of it. encode: prompts -> name -> [B, ...]"""
        parts = self.missing() if parts is None else parts
        clock = Clock(sum(map(len, parts)), 'prompts', self.logger)
        for part in parts:
            found: list[Row] = []
            for first in range(0, len(part), batch_size):
                found.append(encode([self.prompts[i] for i in part[first:first + batch_size]]))
                clock.tick(len(part[first:first + batch_size]))
            rows = {name: torch.cat([row[name] for row in found]).cpu() for name in found[0]}
            self.write(part, {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in rows.items()},
                       lambda i: repr(self.prompts[i]))

    def of(self, prompts: Sequence[str]) -> list[Slot | UnreadableError]:
        """The features of prompts, or what is wrong with them. Raises DataError for one that was not there."""
        if (new := next((prompt for prompt in prompts if prompt not in self.place), None)) is not None:
            raise DataError(f'{new!r:.200} was no prompt of TRAIN_DATA when the cache was filled: captions have changed meanwhile, or '
                            'are drawn by chance. Start again; where they are drawn, set SOLVER.CACHE.PROMPTS to false')
        return self.read([self.place[prompt] for prompt in prompts])


def prompts_of(dataset: BaseDataset) -> list[str] | None:
    """Every prompt of a dataset, in the order of its samples; None where they are no words, or differ from draw to draw."""
    found: dict[str, None] = {}
    for index in range(len(dataset)):
        with generators_restored():
            drawn: list[Any] = []
            for attempt in range(2):    # of every sample, so that of words that are drawn at all some are seen to be
                seed_generators(streams.seed_global(attempt, 'words', index))
                with contextlib.suppress(UnreadableError):
                    drawn.append(dataset.beside(index).get('prompt'))
        if any(prompt != drawn[0] or not isinstance(prompt, str) for prompt in drawn):
            return None
        found |= dict.fromkeys(drawn)
    return list(found)
