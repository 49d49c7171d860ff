"""Every component of the package, registered by being imported. Called by the doors and by tests, never by core."""
from __future__ import annotations

from scepter.data import datasets, transforms
from scepter.diffusion import samplers, schedules
from scepter.hooks import checkpoint, ema, log, pretrained, probe, profile
from scepter.models import autoencoder, latent_diffusion, losses, unet
from scepter.models.embedders import clip
from scepter.solvers import base, diffusion, metrics, optim

__all__ = ['autoencoder', 'base', 'checkpoint', 'clip', 'datasets', 'diffusion', 'ema', 'latent_diffusion', 'log', 'losses', 'metrics', 'optim',
           'pretrained', 'probe', 'profile', 'samplers', 'schedules', 'transforms', 'unet']
