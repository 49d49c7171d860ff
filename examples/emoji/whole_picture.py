"""A network for pictures that are few and small: it sees a whole latent at once, as one vector, and words as their sum.

A convolution or a token applies each weight at many places, which is how one learns from many pictures what pictures have in common. Here
three thousand of them are to be known by heart: a weight that is used once per picture remembers as much for a hundredth of the time.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scepter.core.registry import BACKBONES
from scepter.core.schema import param
from scepter.models.base import BaseModel
from scepter.models.condition import Condition, Widths
from scepter.models.layers import timestep_embedding


@BACKBONES.register_class()
class WholePicture(BaseModel):
    """A residual MLP over all numbers of a latent, steered by its time and its words.    x [B, C, S, S], t [B], cond -> [B, C, S, S]"""

    CHANNELS: int = param(doc='Channels of x.', least=1)
    SIZE: int = param(8, 'Side of x.', least=1)
    WIDTH: int = param(768, 'Channels inside.', least=2, multiple=2)
    DEPTH: int = param(3, 'Blocks.', least=1)
    CONTEXT_DIM: int = param(doc='Width of the text context.', least=1)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        numbers, width = self.CHANNELS * self.SIZE ** 2, self.WIDTH
        self.enter = nn.Linear(numbers, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.words = nn.Sequential(nn.Linear(self.CONTEXT_DIM, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(self.DEPTH))
        self.leave = nn.Linear(width, numbers)
        self.gain = nn.Linear(width, self.CHANNELS)    # how much of x is in the prediction as it is, which the time alone tells

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | Condition) -> Tensor:
        cond = Condition.of(cond)
        seen = cond.context if cond.mask is None else cond.context * cond.mask[..., None]
        count = cond.context.shape[1] if cond.mask is None else cond.mask.sum(1, keepdim=True)
        words = seen.sum(1) / torch.as_tensor(count).sqrt()    # [B, D] of about the same size however many words there are
        time = self.time(timestep_embedding(t, self.WIDTH).to(x.dtype))
        told = time + self.words(words.to(x.dtype))
        h = self.enter(x.flatten(1)) + told
        for block in self.blocks:
            h = block(h, told)
        return self.leave(h).view_as(x) + self.gain(time)[..., None, None] * x

    @property
    def takes(self) -> Widths:
        """What it is told, and what x is."""
        return Widths(context=self.CONTEXT_DIM, mask=True, channels=self.CHANNELS)


class Block(nn.Module):
    """x + gate * mlp(scale * norm(x) + shift), where time and words tell gate, scale and shift.    [B, D], told [B, D] -> [B, D]"""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.steer = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift, gate = self.steer(told).chunk(3, -1)
        return x + (1 + gate) * self.mlp(self.norm(x) * (1 + scale) + shift)
