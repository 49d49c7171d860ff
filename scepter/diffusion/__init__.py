"""The mathematics of diffusion: schedules, the process, samplers and guidance. It does not know what a config file is."""
from __future__ import annotations

from scepter.diffusion import levels, samplers, schedules
from scepter.diffusion.process import PREDICTIONS, Diffusion, Level
from scepter.diffusion.schedules import zero_terminal_snr

__all__ = ['PREDICTIONS', 'Diffusion', 'Level', 'levels', 'samplers', 'schedules', 'zero_terminal_snr']
