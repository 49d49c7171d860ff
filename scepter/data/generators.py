"""The global generators that datasets and transforms draw from, seeded for each sample and left as they were."""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch


class Generator(NamedTuple):
    """One of them."""
    seed: Callable[[int], Any]
    state: Callable[[], Any]
    restore: Callable[[Any], Any]


GENERATORS = {
    'torch': Generator(torch.default_generator.manual_seed,    # not torch.manual_seed: that seeds every GPU as well
                       torch.default_generator.get_state, torch.default_generator.set_state),
    'numpy': Generator(lambda seed: np.random.seed(seed & 0xFFFFFFFF), np.random.get_state, np.random.set_state),
    'python': Generator(random.seed, random.getstate, random.setstate)}
ALL = tuple(GENERATORS)


def seed_generators(seed: int, names: Sequence[str] = ALL) -> None:
    """Seed these, all of them unless it is known who draws."""
    for name in names:
        GENERATORS[name].seed(seed)


@contextmanager
def generators_restored(names: Sequence[str] = ALL) -> Iterator[None]:
    """What was read leaves no trace in the global generators, so neither a probe nor an evaluation can disturb a training."""
    states = {name: GENERATORS[name].state() for name in names}
    try:
        yield
    finally:
        for name, state in states.items():
            GENERATORS[name].restore(state)
