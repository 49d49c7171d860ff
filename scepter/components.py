"""Every component of the package, registered by being imported. Called by the doors and by tests, never by core."""
from __future__ import annotations

import scepter.core.stores
import scepter.data.folders
import scepter.data.latents
import scepter.data.mixture
import scepter.data.prompts
import scepter.data.tables
import scepter.data.tars
import scepter.data.transforms
import scepter.diffusion.levels
import scepter.diffusion.samplers
import scepter.diffusion.schedules
import scepter.hooks.checkpoint
import scepter.hooks.ema
import scepter.hooks.log
import scepter.hooks.pretrained
import scepter.hooks.probe
import scepter.hooks.profile
import scepter.models.autoencoder
import scepter.models.autoencoder_video
import scepter.models.coders
import scepter.models.embedders.clip
import scepter.models.embedders.conditioner
import scepter.models.embedders.labels
import scepter.models.embedders.openclip
import scepter.models.embedders.phi
import scepter.models.latent_diffusion
import scepter.models.losses
import scepter.models.nova.model
import scepter.models.unet
import scepter.solvers.diffusion
import scepter.solvers.metrics
import scepter.solvers.optim  # noqa: F401
