"""How the endless stream of samples is cut into steps, where a run begins in it and where it ends."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from scepter.core.config import Config
from scepter.core.faults import ConfigError


class Plan(NamedTuple):
    """How the stream of samples is cut into steps.    global_size = micro * accu * processes; the run ends after max_steps"""
    micro: int           # samples of one forward pass of one process
    accu: int            # forward passes of one process in a step
    global_size: int     # samples of one step over all processes
    max_steps: int
    step: int            # where the run begins: steps of the optimizer,
    samples: int         # ... and the number of the next sample

    @classmethod
    def of(cls, cfg: Config, batch_size: int, dataset_size: int, world_size: int, state: Mapping[str, Any] | None) -> Plan:
        """From a solver's config, the state of the checkpoint that it goes on from, if any, and the processes at hand.

        The number of samples is the clock: MAX_EPOCHS counts them from the beginning, whatever the sizes of the steps were. Without
        GLOBAL_BATCH_SIZE a resumed run keeps the size of its steps on any number of processes. Raises ConfigError.
        """
        state = state or {}
        asked = cfg.GLOBAL_BATCH_SIZE if cfg.GLOBAL_BATCH_SIZE is not None else state.get('global_batch_size')
        micro, accu = batch_size, cfg.ACCU_STEP
        if asked is not None:
            if asked % world_size:
                fitting = [w for w in range(1, 2 * world_size) if asked % w == 0]
                raise ConfigError(f'a global batch of {asked} cannot be shared by {world_size} processes evenly: '
                                  f'use {", ".join(map(str, fitting))}')
            share = asked // world_size
            accu = next(a for a in range(max(1, math.ceil(share / micro)), share + 1) if share % a == 0)
            micro = share // accu
        size = micro * accu * world_size
        step = state.get('step', 0)
        samples = state.get('samples', 0)
        if cfg.MAX_STEPS is not None:
            return cls(micro, accu, size, cfg.MAX_STEPS, step, samples)
        left = dataset_size * cfg.MAX_EPOCHS - samples
        return cls(micro, accu, size, step + max(0, math.ceil(left / size)), step, samples)
