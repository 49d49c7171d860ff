"""What two networks or more are made of: the one attention, the timestep embedding, norms, resampling."""
from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar('M', bound=nn.Module)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, for every head.    q [B, N, H, d], k and v [B, M, H, d]  ->  [B, N, H, d]

    mask: bool (True may be seen) or added to the scores, broadcast to [B, H, N, M].
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == 'cpu' and mask is None and _plain_is_faster(q, k):
        return _plain_attention(q, k, v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _plain_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether two matrix products beat the fused kernel of the CPU.

    In bfloat16 the fused backward is slow: 2 heads of 32 on 16 tokens, batch 64: 6.8 ms against 1.2; 4 heads, 64 tokens: 41 ms
    against 5.7; 8 heads of 80 on 1024 tokens: 121 ms against 87. In float32 the fused kernel wins. Above 2^24 scores a head's matrix leaves
    the cache, and the fused kernel wins again.
    """
    half = torch.is_autocast_enabled('cpu') or q.dtype == torch.bfloat16
    return half and q.shape[2] * k.shape[2] < 2 ** 21


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)    # [B, H, N, M]
    return scores.softmax(-1) @ v


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of t at frequencies that fall from 1 to 1 / max_period.    t [...]  ->  [..., dim], float32

    The order (cos, sin) and the exponent i / (dim / 2) are those of the published Stable Diffusion weights.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[..., None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


class GroupNorm32(nn.GroupNorm):
    """Group normalisation whose statistics are float32 and whose result has the type of its input.    [B, C, H, W] -> [B, C, H, W]

    PyTorch's kernels already add up half-precision input in float32; autocast would also make the result float32 on CUDA, and the next
    convolution would have to cast it back.
    """

    def __init__(self, channels: int, eps: float = 1e-5, groups: int = 32):
        if channels % groups:
            raise ValueError(f'{channels} channels cannot be normalised in {groups} groups: use multiples of {groups}')
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class SiLU(nn.Module):
    """x * sigmoid(x), in place where no gradient needs x. Only for input that nobody else reads, as a norm's output."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H*W, C]; a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H*W, C] -> [B, C, H, W], channels-last, always a view."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def pointwise(layer: nn.Conv2d | nn.Linear, tokens: Tensor) -> Tensor:
    """A linear layer, or a 1x1 convolution, on tokens.    [B, N, C] -> [B, N, D]"""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


def upsample_conv(x: Tensor, conv: nn.Conv2d, size: tuple[int, int] | None = None) -> Tensor:
    """Enlarge by nearest neighbour, then convolve 3x3.    [B, C, H, W] -> [B, D, 2H, 2W], or of the given size"""
    if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
        return conv(F.interpolate(x, scale_factor=2.0, mode='nearest'))
    return conv(F.interpolate(x, size=size, mode='nearest'))


def zero(module: M) -> M:
    """The module with all its parameters set to zero: a branch that begins as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
