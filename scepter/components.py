"""Every component of the package, registered by being imported. Called by the doors and by tests, never by core."""
from __future__ import annotations

from scepter.data import datasets, transforms
from scepter.diffusion import samplers, schedules
from scepter.models import autoencoder, losses, unet
from scepter.models.embedders import clip
from scepter.solvers import metrics, optim

__all__ = ['autoencoder', 'clip', 'datasets', 'losses', 'metrics', 'optim', 'samplers', 'schedules', 'transforms', 'unet']
