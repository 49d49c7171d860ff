"""What NOVA's encoders and its decoder are made of: sizes, patches, the transformer block, modulation by a condition."""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scepter.models.layers import attention, checkpoint
from scepter.models.nova.positions import rotate

LARGE_PART = 128    # tokens of a part from which on parts are attended to one by one
HEADS = {768: 12, 1024: 16, 1536: 16}    # of the published widths; others have heads of 64


class Size(NamedTuple):
    """What a name says: vit_d16w1024, mlp_d6w1024, or vit_d4w192h6 where the number of heads is one's own."""
    depth: int
    width: int
    heads: int

    @classmethod
    def of(cls, name: str, kind: str) -> Size:
        """Raises ValueError for a name that is none, and where the width has no such heads."""
        found = re.fullmatch(rf'{kind}_d([1-9]\d*)w([1-9]\d*)(?:h([1-9]\d*))?', name)
        if not found or (kind == 'mlp' and found[3]):
            raise ValueError(f'{name!r} is no size: expected {kind}_d<depth>w<width>, e.g. {kind}_d6w1024'
                             + (', with h<heads> behind it for other heads than those of 64' if kind == 'vit' else ''))
        depth, width, heads = int(found[1]), int(found[2]), int(found[3] or HEADS.get(int(found[2]), max(1, int(found[2]) // 64)))
        if width % heads:
            raise ValueError(f'{name!r}: a width of {width} has no {heads} heads; add one that divides it, e.g. {kind}_d{depth}w{width}h1')
        return cls(depth, width, heads)


class PatchEmbed(nn.Module):
    """Pictures to tokens, row by row.    [B, C, H, W] -> [B, N, D];  frames [B, C, T, H, W] -> [B, T, N, D]"""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 5:
            return self(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[2]))
        return self.proj(x).flatten(2).transpose(1, 2)

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """The same of pictures that `patchify` has cut.    [B, N, p*p*C] -> [B, N, D]"""
        return F.linear(tokens, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, p*p*C]: tokens row by row, and in a token row, column, channel."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """[B, N, p*p*C] -> [B, C, H, W], the inverse of `patchify`."""
    x = tokens.reshape(len(tokens), *grid, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class KeyValues:
    """Keys and values of one layer for the tokens so far, in memory that is there from the first token on.

    capacity: of tokens.  The memory is made when the first ones come, which know the batch, heads and types.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.memory: Tensor | None = None    # [2, B, capacity, H, d]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v [B, N, H, d], and give back those of all tokens so far."""
        if self.memory is None:
            self.memory = k.new_empty(2, k.shape[0], self.capacity, *k.shape[2:])
        first, self.length = self.length, self.length + k.shape[1]
        self.memory[0, :, first:self.length], self.memory[1, :, first:self.length] = k, v
        keys, values = self.memory[:, :, :self.length]
        return keys, values


class SelfAttention(nn.Module):
    """Attention of tokens to one another.    [B, N, D] -> [B, N, D]"""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotations: Tensor | None = None, ends: Sequence[int] | None = None,
                cache: KeyValues | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)    # [B, N, H, d]
        if rotations is not None:
            q, k = rotate(q, rotations), rotate(k, rotations)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.proj((attention(q, k, v) if ends is None else causal_by_parts(q, k, v, ends)).flatten(2))


def causal_by_parts(q: Tensor, k: Tensor, v: Tensor, ends: Sequence[int]) -> Tensor:
    """Attention of each part of the tokens to those up to its own end.    [B, N, H, d] each -> [B, N, H, d];  the last end is N

    Large parts one by one, without a mask, which the fastest kernels do not take, and without the half that none may see: 5 frames of 360
    tokens take 0.72 of the time on a CPU. Of small ones the mask costs less than the calls: 4 frames of 16 tokens take half of it.
    """
    starts = [0, *ends[:-1]]
    if ends[-1] - starts[-1] >= LARGE_PART:
        return torch.cat([attention(q[:, start:end], k[:, :end], v[:, :end]) for start, end in zip(starts, ends)], 1)
    return attention(q, k, v, may_see(ends, q.device))


def may_see(ends: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Which token (column) each token (row) may see, whose parts end here.    [N, N] bool"""
    part = torch.bucketize(torch.arange(ends[-1], device=device), torch.tensor(ends, device=device), right=True)
    return part[:, None] >= part


class FeedForward(nn.Module):
    """Linear, activation, linear.    [..., D] -> [..., E]"""

    def __init__(self, width: int, hidden: int, out: int, activation: nn.Module):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """A transformer block that normalises what it adds: x + norm(attention(x)), then x + norm(mlp(x)).    [B, N, D] -> [B, N, D]"""
    is_checkpointed = False

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.mlp = FeedForward(width, 4 * width, width, nn.GELU())

    def forward(self, x: Tensor, rotations: Tensor | None = None, ends: Sequence[int] | None = None,
                cache: KeyValues | None = None) -> Tensor:
        x = x + self.norm1(self.attn(x, rotations, ends, cache))
        return checkpoint(self._feed_forward, x) if self.is_checkpointed else self._feed_forward(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.mlp(x))


class Modulation(nn.Module):
    """norm(x) * (1 + scale) + shift, and a gate where there is one, all read from a condition (Peebles & Xie 2022, arXiv 2212.09748).

    x [..., D], z [..., Z]  ->  ([..., D], gate [..., D] or None).  rank: of the map from z; 0: full.
    """

    def __init__(self, width: int, condition: int, has_gate: bool, has_norm: bool = True, rank: int = 0):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) if has_norm else nn.Identity()
        self.lora = nn.Linear(condition, rank, bias=False) if rank else nn.Identity()
        self.proj = nn.Linear(rank or condition, (3 if has_gate else 2) * width)
        self.has_gate = has_gate

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, shift, *gate = self.proj(self.lora(F.silu(z))).chunk(3 if self.has_gate else 2, dim=-1)
        return torch.addcmul(shift, self.norm(x), 1 + scale), gate[0] if gate else None
