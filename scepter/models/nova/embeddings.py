"""What NOVA's encoders read beside pictures: text, labels, motion, time, and tokens that stand for what is not there yet."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scepter.models.nova.positions import FEATURES, Size, grid_sines, sines

MAX_TEXT_TOKENS = 512    # rows of the published table of empty text


class TextEmbed(nn.Module):
    """Features of text, over those of an empty one.    list of B tensors [L, F], 0 <= L <= K  ->  [B, K, D]"""

    weight: Tensor    # what stands at each place behind a prompt's end: drawn once, never trained

    def __init__(self, features: int, width: int, length: int):
        super().__init__()
        self.length = length
        self.register_buffer('weight', 0.02 * torch.randn(MAX_TEXT_TOKENS, features))
        self.proj = nn.Linear(features, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        tokens = self.weight[:self.length].repeat(len(features), 1, 1)
        for row, text in zip(tokens, features):
            if len(text):    # an empty one need not have the right width
                row[:len(text)] = text
        return self.norm(self.proj(tokens))

    def nothing(self) -> Tensor:
        """The features of an empty prompt: [0, F]."""
        return self.weight[:0]


class LabelEmbed(nn.Module):
    """One token for the class; behind the last class comes `none`.    [B] int64 -> [B, 1, D]"""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.none = classes
        self.weight = nn.Parameter(0.02 * torch.randn(classes + 1, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, label: Tensor) -> Tensor:
        return self.norm(self.weight[label]).unsqueeze(1)


class MotionEmbed(nn.Module):
    """One token for how much moves, pixels per frame, and one for the frames per second.    [B], [B] -> [B, 2, D]"""

    def __init__(self, width: int):
        super().__init__()
        self.flow_proj, self.fps_proj = _of_number(width), _of_number(width)

    def forward(self, flow: Tensor, fps: Tensor) -> Tensor:
        return torch.stack([project(sines(number).to(project[0].weight.dtype))
                            for project, number in ((self.flow_proj, flow), (self.fps_proj, fps))], 1)


class MaskEmbed(nn.Module):
    """The tokens that stand for what is hidden, and for the frame before the first.

    x [B, N, D], mask [B, N, 1], where 1 hides  ->  [B, N, D]
    """

    def __init__(self, width: int):
        super().__init__()
        self.bos_token = nn.Parameter(0.02 * torch.randn(1, width))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask.bool(), self.mask_token.to(x.dtype), x)


class VideoPosEmbed(nn.Module):
    """Add to tokens where and when they are.    [B, T, N, D] -> [B, T, N, D]

    Frame t of `length` stands at t * base_length / length: clips of every length cover the time of those in training.
    """

    def __init__(self, width: int, base_length: int, grid: Size):
        super().__init__()
        self.base_length, self.grid = base_length, grid
        self.time_proj = _of_number(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, first: int = 0, length: int | None = None) -> Tensor:
        """first: the number of the first of these frames, in a clip of `length`, which is T where nothing is said."""
        frames = first + torch.arange(x.shape[1], device=x.device)
        time = frames.float() * (self.base_length / (length or x.shape[1]))
        time = self.norm(self.time_proj(sines(time).to(self.time_proj[0].weight.dtype)))
        return x + time[:, None].to(x.dtype) + grid_sines(self.grid, x.shape[-1], x.device).to(x.dtype)


class GridPosEmbed(nn.Module):
    """Add to tokens where in the picture they are.    [B, N, D] -> [B, N, D]"""

    def __init__(self, grid: Size):
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return x + grid_sines(self.grid, x.shape[-1], x.device).to(x.dtype)


def _of_number(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, width))
