"""The process of a config, for every network that is trained by one: PARAMETERIZATION, TIMESTEPS, SCHEDULE_ARGS, ZERO_TERMINAL_SNR."""
from __future__ import annotations

import torch

from scepter.core.config import Config
from scepter.core.registry import SCHEDULES
from scepter.diffusion.process import Diffusion
from scepter.diffusion.schedules import zero_terminal_snr


def process_of(cfg: Config) -> Diffusion:
    """The Diffusion that those keys describe.

    Raises ValueError where the schedule is none, or the prediction says nothing about x0 at some level.
    """
    with torch.device('cpu'):    # numbers, also where the networks are built on the meta device
        schedule = SCHEDULES.function(cfg.SCHEDULE_ARGS)(n=cfg.TIMESTEPS)
        if cfg.ZERO_TERMINAL_SNR:
            schedule = zero_terminal_snr(*schedule)
        return Diffusion(*schedule, prediction=cfg.PARAMETERIZATION)
