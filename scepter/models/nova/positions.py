"""Where a token is: sines added to it (absolute), or rotations of queries and keys (rotary). Nothing here has parameters.

Places are integers (frame, row, column); `rotations` is RoPE (Su et al. 2021, arXiv 2104.09864) over the three.
"""
from __future__ import annotations

import torch
from torch import Tensor

from scepter.models.layers import timestep_embedding

Size = tuple[int, int]
FEATURES = 256    # sines and cosines of one number


def sines(value: Tensor, width: int = FEATURES) -> Tensor:
    """Sines, then cosines, of a number at frequencies that fall from 1 to 1/10000.    [...] -> [..., width], float32"""
    return timestep_embedding(value, width).roll(width // 2, -1)


def grid_sines(grid: Size, width: int, device: torch.device | None = None) -> Tensor:
    """A vector for each place of a grid, row by row: sines of its column, then of its row.    [rows * columns, width], float32"""
    rows, columns = (torch.arange(n, device=device) for n in grid)
    y, x = torch.meshgrid(rows, columns, indexing='ij')
    return torch.cat([sines(x.flatten(), width // 2), sines(y.flatten(), width // 2)], -1)


def places(frames: Tensor, grid: Size) -> Tensor:
    """(frame, row, column) of every token of these frames.    frames [T] -> [T * rows * columns, 3] int64"""
    rows, columns = (torch.arange(n, device=frames.device) for n in grid)
    return torch.cartesian_prod(frames, rows, columns)


def rotations(places: Tensor, head_width: int, prefix: int = 0) -> Tensor:
    """The turns of RoPE at these places, behind a prefix that is not turned.    [..., N, 3] -> [..., prefix + N, head_width / 2, 2]

    An eighth of a head turns with the frame, the rest half and half with row and column; the last axis is (cosine, sine).
    """
    angles = [places[..., i:i + 1] * 10000.0 ** -(torch.arange(0, width, 2, device=places.device) / width)
              for i, width in enumerate(rotary_widths(head_width))]
    turned = torch.cat(angles, -1)
    turned = torch.cat([turned.new_zeros(*turned.shape[:-2], prefix, turned.shape[-1]), turned], -2)
    return torch.stack([turned.cos(), turned.sin()], -1)


def rotary_widths(head_width: int) -> tuple[int, int, int]:
    """How many numbers of a head turn with frame, row and column."""
    return head_width // 8, (head_width - head_width // 8) // 2, (head_width - head_width // 8) // 2


def can_rotate(head_width: int) -> bool:
    """Whether each share of a head is made of pairs, and they make up the whole: 32, 64, 96 and 128 are, 16 and 48 are not."""
    widths = rotary_widths(head_width)
    return sum(widths) == head_width and all(width and width % 2 == 0 for width in widths)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Neighbouring pairs of x [B, N, H, d], turned by rotations [B or 1, N, d / 2, 2]; in float32, given back in the type of x."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotations.unsqueeze(-3).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
