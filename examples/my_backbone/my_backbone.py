"""A network of one's own in the place of the shipped UNet: this file and the name of it in the config are all it takes."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scepter.core.registry import BACKBONES
from scepter.core.schema import param
from scepter.models.base import BaseModel
from scepter.models.layers import timestep_embedding


@BACKBONES.register_class()
class TinyMixer(BaseModel):
    """Patches that are mixed over space, then over channels, steered by time and prompt (after Tolstikhin et al. 2021).

    x [B, C, H, W], t [B], cond [B, L, D]  ->  [B, C, H, W]
    """

    CHANNELS: int = param(2, 'Channels of x.', least=1)
    SIZE: int = param(8, 'Side of x.', least=1)
    PATCH: int = param(2, 'Side of a patch.', least=1)
    WIDTH: int = param(192, 'Channels inside.', least=1)
    DEPTH: int = param(4, 'Blocks.', least=1)
    CONTEXT_DIM: int = param(128, 'Width of the text context.', least=1)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        tokens = (self.SIZE // self.PATCH) ** 2
        self.patches = nn.Conv2d(self.CHANNELS, self.WIDTH, self.PATCH, self.PATCH)
        self.place = nn.Parameter(torch.randn(tokens, self.WIDTH) * 0.02)
        self.time = nn.Sequential(nn.Linear(self.WIDTH, self.WIDTH), nn.SiLU(), nn.Linear(self.WIDTH, self.WIDTH))
        self.text = nn.Linear(self.CONTEXT_DIM, self.WIDTH)
        self.blocks = nn.ModuleList(MixerBlock(tokens, self.WIDTH) for _ in range(self.DEPTH))
        self.out = nn.Sequential(nn.LayerNorm(self.WIDTH), zeroed(nn.Linear(self.WIDTH, self.CHANNELS * self.PATCH ** 2)))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        height, width = (side // self.PATCH for side in x.shape[-2:])
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place                     # [B, H*W/P^2, D]
        steer = self.time(timestep_embedding(t, self.WIDTH).to(x.dtype)) + self.text(cond.to(x.dtype)).mean(1)
        for block in self.blocks:
            tokens = block(tokens, F.silu(steer)[:, None])
        return F.pixel_shuffle(self.out(tokens).transpose(1, 2).unflatten(2, (height, width)), self.PATCH)


class MixerBlock(nn.Module):
    """[B, N, D], steer [B, 1, D] -> [B, N, D]. Begins as nothing: each branch's gate is zero, and opens as it proves useful."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.steer = zeroed(nn.Linear(width, 6 * width))
        self.over_space = nn.Sequential(nn.Linear(tokens, 4 * tokens), nn.GELU(), nn.Linear(4 * tokens, tokens))
        self.over_channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, steer: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.steer(steer).chunk(6, -1)
        x = x + gate1 * self.over_space((self.norm(x) * (1 + scale1) + shift1).transpose(1, 2)).transpose(1, 2)
        return x + gate2 * self.over_channels(self.norm(x) * (1 + scale2) + shift2)


def zeroed(layer: nn.Linear) -> nn.Linear:
    """A layer that gives zeros at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
