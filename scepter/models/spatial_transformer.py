"""The transformer that the UNet has after its residual blocks: pixels are tokens, which look at each other and at the context.

Rombach et al. 2022 (arXiv 2112.10752), appendix E.2.1; the names are those of the published weights.
"""
from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from scepter.models.layers import GroupNorm32, attention, checkpoint, to_image, to_tokens


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels as tokens, added to x; nothing at first.    x [B, C, H, W], context  ->  [B, C, H, W]"""

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int | None, linear: bool, dropout: float, cross_only: bool):
        super().__init__()
        self.norm = GroupNorm32(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim, dropout, cross_only) for _ in range(depth))
        # not zero at first: from zero, a short run learns pictures long before it learns to read (docs/benchmarks.md)
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Context | None) -> Tensor:
        linear = isinstance(self.proj_in, nn.Linear)
        h = self.norm(x)
        tokens = self.proj_in(to_tokens(h)) if linear else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        h = to_image(self.proj_out(tokens), x) if linear else self.proj_out(to_image(tokens, x))
        return h.add_(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross attention (where there is a context), feed-forward, each after a norm.    x [B, N, C] -> [B, N, C]"""
    is_checkpointed = False

    def __init__(self, channels: int, heads: int, context_dim: int | None, dropout: float, cross_only: bool):
        super().__init__()
        self.attn1 = Attention(channels, heads, context_dim if cross_only else None, dropout)
        self.norm1 = nn.LayerNorm(channels)
        self.attn2 = None
        if context_dim is not None:
            self.attn2 = Attention(channels, heads, context_dim, dropout)
            self.norm2 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, dropout)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Context | None) -> Tensor:
        return checkpoint(self._forward, x, context) if self.is_checkpointed else self._forward(x, context)

    def _forward(self, x: Tensor, context: Context | None) -> Tensor:
        x = self.attn1(self.norm1(x), context).add_(x)
        if self.attn2 is not None:
            x = self.attn2(self.norm2(x), context).add_(x)
        return self.ff(self.norm3(x)).add_(x)


class Attention(nn.Module):
    """Attention of tokens to each other (context_dim None) or to a context.    x [B, N, C], context [B, L, D]  ->  [B, N, C]"""
    place: tuple[int, int]    # of this layer's keys and values in KeysValues

    def __init__(self, channels: int, heads: int, context_dim: int | None, dropout: float):
        super().__init__()
        self.channels, self.heads, self.reads_context = channels, heads, context_dim is not None
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        known, mask = context if self.reads_context else Context(x)
        if isinstance(known, KeysValues):
            k, v = known.of_all_layers[..., slice(*self.place)].chunk(2, dim=-1)
        else:
            k, v = self.to_k(known), self.to_v(known)
        heads = (self.heads, -1)
        h = attention(self.to_q(x).unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads), mask)
        return self.to_out(h.flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a gate of GELU between (GEGLU, Shazeer 2020), 4 times as wide inside.    [B, N, C] -> [B, N, C]"""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(dropout), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GEGLU(nn.Module):
    """a * gelu(b) for two projections a, b of x.    [..., C] -> [..., D]"""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class Context(NamedTuple):
    """What cross attention reads."""
    known: Tensor | KeysValues     # tokens [B, L, D], or their keys and values
    mask: Tensor | None = None     # bool [B, 1, 1, L], True where they may be seen


class KeysValues(NamedTuple):
    """A context of which only keys and values are left, those of all layers side by side."""
    of_all_layers: Tensor    # [B, L, K]
