"""NOVA's loss: what is hidden of each frame is to be told from what is visible, one token at a time, by the error of the head."""
from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scepter.core import streams
from scepter.diffusion.process import Diffusion, network_dtype
from scepter.models.nova.blocks import patchify
from scepter.models.nova.transformer import NovaTransformer, hidden


class Chance(NamedTuple):
    """What is random in a training pass over B clips of T frames of N tokens of E numbers, each token learnt from r times."""
    order: Tensor      # [B*T, N] int64: tokens of each frame; the first `visible` of them are seen
    visible: int
    noise: Tensor      # [r*B*T, N, E]
    t: Tensor          # [r*B*T, N] int64: indices of the process


def frame_losses(network: NovaTransformer, diffusion: Diffusion, latents: Tensor, condition: Tensor, chance: Chance) -> Tensor:
    """The share of each frame in the mean squared error of hidden tokens: [T], in float32.

    latents [B, C, T, h, w] float32, condition [B, K, D].  Rows of a chance: copies outermost, then clips, then frames.
    """
    kind, length = network_dtype(network, latents), latents.shape[2]
    z = network(latents.to(kind), condition, chance.order, chance.visible)    # [B*T, N, D]
    x0 = patchify(latents.transpose(1, 2).flatten(0, 1), network.patch)
    copies = len(chance.t) // len(x0)
    z, x0, mask = (x.repeat(copies, 1, 1) for x in (z, x0, hidden(chance.order, chance.visible)))
    level = diffusion.level(chance.t, x0)    # of each token
    out = network.image_decoder(diffusion.diffuse(x0, chance.noise, level).to(kind), level.t, z)
    error = (out.float() - diffusion.target(x0, chance.noise, level)).square().mean(-1, keepdim=True) * mask
    return error.unflatten(0, (-1, length)).sum((0, 2, 3)) / (mask.sum() + 1e-5)


def visible_tokens(tokens: int, low: float, std: float) -> int:
    """How many tokens are seen: a share of 1 - rho, with rho normal about 1 and cut to low .. 1 (Li et al. 2024, arXiv 2406.11838).

    One number for all frames of a step, on all processes; keyed by the step.
    """
    keys = streams.captured()
    if keys is streams.NO_CONTEXT:
        u = float(torch.rand((), dtype=torch.float64))
    else:
        u = float(streams.bits(keys.seed, 'visible', np.array([keys.step]))[0] >> np.uint64(11)) * 2.0 ** -53
    normal = NormalDist()
    below = normal.cdf((low - 1) / std)
    return round(-std * normal.inv_cdf(below + u * (0.5 - below)) * tokens)
