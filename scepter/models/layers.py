"""What two networks or more are made of: the one attention, the timestep embedding, norms, resampling."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from scepter.core import flops, streams
from scepter.models import cpu


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, for every head.    q [B, N, H, d], k and v [B, M, H, d]  ->  [B, N, H, d]

    mask: bool (True may be seen) or added to the scores, broadcast to [B, H, N, M].
    """
    if cpu.blocks_are_faster(q, k, mask):
        return cpu.attention(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def checkpoint(compute: Callable[..., Tensor], *args: Any) -> Tensor:
    """compute(*args), whose activations are not kept: the backward pass computes them again, from the same random numbers.

    Dropout repeats itself because torch puts its generators back, and autocast likewise; keyed draws because their keys are brought back
    here: the backward pass runs outside of their context, on a GPU in another thread.
    """
    if not torch.is_grad_enabled():
        return compute(*args)
    if torch.compiler.is_compiling():
        return torch_checkpoint(compute, *args, use_reentrant=False)
    more: dict[str, Any] = {'context_fn': flops.contexts} if flops.is_counting() else {}
    keys = streams.captured()

    def with_keys(*args: Any) -> Tensor:
        with streams.restored(keys):
            return compute(*args)
    return torch_checkpoint(with_keys, *args, use_reentrant=False, **more)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of t at frequencies that fall from 1 to 1 / max_period.    t [...]  ->  [..., dim], float32

    The order (cos, sin) and the exponent i / (dim / 2) are those of the published Stable Diffusion weights.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[..., None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


GROUPS = 32    # of the group normalisation


class GroupNorm32(nn.GroupNorm):
    """Group normalisation whose statistics are float32 and whose result has the type of its input.    [B, C, H, W] -> [B, C, H, W]

    PyTorch's kernels already add up half-precision input in float32; autocast would also make the result float32 on CUDA, and the next
    convolution would have to cast it back.
    """

    def __init__(self, channels: int, eps: float = 1e-5, groups: int = GROUPS):
        if channels % groups:
            raise ValueError(f'{channels} channels cannot be normalised in {groups} groups: use multiples of {groups}')
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class SiLU(nn.Module):
    """x * sigmoid(x), in place where no gradient needs x. Only for input that nobody else reads, as a norm's output.

    [...] -> [...]
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H*W, C]; a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, H*W, C] -> [B, C, H, W] with the height, width and memory layout of `like`; a view where that is channels-last.

    The layout is kept, or a network fed with contiguous images would be channels-last from its first attention on, where PyTorch's group
    normalisation is slow on the CPU: [32, 32, 32, 32] in bfloat16, forward and backward, takes 0.7 ms contiguous and 13 ms channels-last.
    """
    image = tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
    return image.contiguous() if like.is_contiguous() else image


def pointwise(layer: nn.Conv2d | nn.Linear, tokens: Tensor) -> Tensor:
    """A linear layer, or a 1x1 convolution, on tokens.    [B, N, C] -> [B, N, D]"""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


def upsample_conv(x: Tensor, conv: nn.Conv2d, size: tuple[int, int] | None = None) -> Tensor:
    """Enlarge by nearest neighbour, then convolve 3x3.    [B, C, H, W] -> [B, D, 2H, 2W], or of the given size"""
    h, w = x.shape[2:]
    if size is not None and size != (2 * h, 2 * w):
        return conv(F.interpolate(x, size=size, mode='nearest'))
    if cpu.is_upsampled_at_once(x, conv):
        return cpu.upsample_conv(x, conv.weight, conv.bias)
    return conv(F.interpolate(x, scale_factor=2.0, mode='nearest'))
