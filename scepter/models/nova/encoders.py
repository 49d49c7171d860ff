"""NOVA's two encoders: what the frames before say about a frame, and what that and its visible tokens say about all of its tokens."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scepter.models.nova.blocks import Block, KeyValues, Modulation, PatchEmbed, Size
from scepter.models.nova.embeddings import GridPosEmbed


class VideoEncoder(nn.Module):
    """Frames, in coarse tokens, after a condition.    x [B, L, D], condition [B, K, D]  ->  [B, L, D]

    mixer_rank: of the `mixer`; below 0: full; 0: there is none.
    """

    def __init__(self, channels: int, patch: int, size: Size, mixer_rank: int = 0):
        super().__init__()
        self.patch_embed = PatchEmbed(channels, patch, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.mixer = Mixer(size.width, max(0, mixer_rank)) if mixer_rank else None

    def forward(self, x: Tensor, condition: Tensor | None = None, rotations: Tensor | None = None, ends: Sequence[int] | None = None,
                caches: list[KeyValues] | None = None) -> Tensor:
        """rotations, ends (`ends_of_frames`; None: all see all): of condition and x together.

        caches: one for each block, which then also sees all that was given to it before.
        """
        h = x if condition is None else torch.cat([condition, x], 1)
        for i, block in enumerate(self.blocks):
            h = block(h, rotations, ends, caches[i] if caches is not None else None)
        return self.norm(h[:, -x.shape[1]:])

    def mix(self, first: Tensor, later: Tensor) -> Tensor:
        """What the later frames are told: the first one's tokens, scaled and shifted by their own.    [B, 1, N, D], [B, T, N, D]"""
        return later if self.mixer is None else self.mixer(first, later)


class Mixer(Modulation):
    """first * (1 + scale(later)) + shift(later).    [..., D], [..., D] -> [..., D]"""

    def __init__(self, width: int, rank: int):
        super().__init__(width, width, has_gate=False, has_norm=False, rank=rank)

    def forward(self, first: Tensor, later: Tensor) -> Tensor:
        return super().forward(first, later)[0]


class ImageEncoder(nn.Module):
    """Tokens of one frame, some of which are visible, after what the video encoder says about it (He et al. 2021, arXiv 2111.06377).

    x [B, N, D], where hidden ones are the mask's, condition [B, K, D], visible [B, V] int64: numbers of the visible ones -> [B, N, D].
    The first half of the blocks sees these alone.  grid: of the tokens, where positions are added; None: they turn queries and keys.
    """

    def __init__(self, channels: int, patch: int, size: Size, grid: tuple[int, int] | None):
        super().__init__()
        self.patch_embed = PatchEmbed(channels, patch, size.width)
        self.pos_embed = GridPosEmbed(grid) if grid is not None else nn.Identity()
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, x: Tensor, condition: Tensor, visible: Tensor, rotations: Tensor | None = None) -> Tensor:
        """rotations [1, K + N, ...]: of condition and x together."""
        x, prefix, half = self.pos_embed(x), condition.shape[1], len(self.blocks) // 2
        places = visible[..., None].expand(-1, -1, x.shape[-1])
        h = torch.cat([condition, x.gather(1, places)], 1)
        seen = None if rotations is None else rotations_of(rotations, visible, prefix)
        for block in self.blocks[:half]:
            h = block(h, seen)
        h = torch.cat([h[:, :prefix], x.scatter(1, places, h[:, prefix:].to(x.dtype))], 1)
        for block in self.blocks[half:]:
            h = block(h, rotations)
        return self.norm(h[:, prefix:])


def rotations_of(rotations: Tensor, visible: Tensor, prefix: int) -> Tensor:
    """The rotations of the prefix and of the visible tokens.    [1, K + N, ...], [B, V] -> [B, K + V, ...]"""
    head, tokens = rotations[0, :prefix], rotations[0, prefix:]
    return torch.cat([head.expand(len(visible), *head.shape), tokens[visible]], 1)


def ends_of_frames(frames: int, tokens: int, prefix: int) -> list[int]:
    """How many tokens of [prefix | frames] each frame may see: prefix and first frame all of one another, later ones all before them."""
    return [prefix + (frame + 1) * tokens for frame in range(frames)]
