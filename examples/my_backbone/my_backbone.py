"""A network of one's own in the place of the shipped UNet: this file and the name of it in the config are all it takes."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scepter.core.registry import BACKBONES
from scepter.core.schema import param
from scepter.models.base import BaseModel
from scepter.models.layers import timestep_embedding


@BACKBONES.register_class()
class TinyMixer(BaseModel):
    """Patches that are mixed over space, then over channels, and shifted by time and prompt (after Tolstikhin et al. 2021).

    x [B, C, H, W], t [B], cond [B, L, D]  ->  [B, C, H, W]
    """

    CHANNELS: int = param(4, 'Channels of x.', least=1)
    SIZE: int = param(8, 'Side of x.', least=1)
    WIDTH: int = param(192, 'Channels inside.', least=1)
    DEPTH: int = param(4, 'Blocks.', least=1)
    CONTEXT_DIM: int = param(128, 'Width of the text context.', least=1)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.patches = nn.Conv2d(self.CHANNELS, self.WIDTH, 1)
        self.place = nn.Parameter(torch.zeros(self.SIZE ** 2, self.WIDTH))
        self.time = nn.Sequential(nn.Linear(self.WIDTH, self.WIDTH), nn.SiLU(), nn.Linear(self.WIDTH, self.WIDTH))
        self.text = nn.Linear(self.CONTEXT_DIM, self.WIDTH)
        self.blocks = nn.ModuleList(MixerBlock(self.SIZE ** 2, self.WIDTH) for _ in range(self.DEPTH))
        self.out = nn.Linear(self.WIDTH, self.CHANNELS)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place                     # [B, H*W, D]
        shift = self.time(timestep_embedding(t, self.WIDTH).to(x.dtype)) + self.text(cond.to(x.dtype)).mean(1)
        for block in self.blocks:
            tokens = block(tokens, shift[:, None])
        return self.out(tokens).transpose(1, 2).unflatten(2, (height, width))


class MixerBlock(nn.Module):
    """[B, N, D] -> [B, N, D]"""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.over_space = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.over_channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        x = x + self.over_space(self.norms[0](x + shift).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norms[1](x + shift))
