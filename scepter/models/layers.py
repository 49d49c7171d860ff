"""What two networks or more are made of: the one attention, the timestep embedding, norms, resampling."""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from scepter.core import streams


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, for every head.    q [B, N, H, d], k and v [B, M, H, d]  ->  [B, N, H, d]

    mask: bool (True may be seen) or added to the scores, broadcast to [B, H, N, M].
    """
    if _blocks_are_faster(q, k, mask):
        is_opaque = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        return _opaque_attention(q, k, v) if is_opaque else _attention_in_blocks(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


BLOCK = 2 ** 21     # scores that are held at once: 4 MB of bfloat16, which stay in the cache


def _blocks_are_faster(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """On the CPU in bfloat16 plain matrix products over blocks of the scores beat the fused kernel, above all backward.

    Measured on 2 cores with AVX512-BF16, fused against blocks, ms: 64 x 4 heads of 32, 64 tokens, forward and backward: 33 against 7.7;
    16 heads of 80, 1024 tokens: forward 45 against 31; 8 of them with backward 65 against 49; 16 heads of 40, 4096 tokens, forward: 453
    against 295; 2 heads of 512, 4096 tokens: 486 against 243. In float32 the fused kernel wins. The scores are rounded to bfloat16, which
    takes the error of a whole UNet from 1.30 % to 1.33 %. A gradient keeps all scores, and compilers unroll all blocks.
    """
    if q.device.type != 'cpu' or q.dtype != torch.bfloat16 or mask is not None:
        return False
    scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    return not torch.is_grad_enabled() or scores <= (BLOCK if torch.compiler.is_compiling() else 128 * BLOCK)


def _attention_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (batch, n, heads, dim), m = q.shape, k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if dim % 16 and not torch.is_grad_enabled():    # a matrix product with 40 columns takes twice as long as one with 48
        v = F.pad(v, (0, -dim % 16))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))    # [B*H, N, d]
    heads_at_once, rows_at_once = max(1, BLOCK // (n * m)), min(n, max(1, BLOCK // m))
    whole = scores = None
    if not torch.is_grad_enabled():    # memory that is new for each block would be mapped page by page, which doubles the time of softmax
        whole, scores = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(min(heads_at_once, len(q)) * rows_at_once * m)

    def pieces(x: Tensor | None, size: int, dim: int) -> Iterable[Tensor | None]:    # the gradient of split is a cat, that of a slice a sum
        return itertools.repeat(None) if x is None else x.split(size, dim)

    nothing, groups = q.new_empty(1, 1, 1), []
    for qs, ks, vs, outs in zip(*(pieces(x, heads_at_once, 0) for x in (q, k.transpose(1, 2), v, whole))):
        rows_out = []
        for rows, out in zip(pieces(qs, rows_at_once, 1), pieces(outs, rows_at_once, 1)):
            block = None if scores is None else scores[:rows.shape[0] * rows.shape[1] * m].view(*rows.shape[:2], m)
            # the scale belongs into the product, whose sum is float32: q * scale would be rounded once more
            block = torch.softmax(torch.baddbmm(nothing, rows, ks, beta=0, alpha=dim ** -0.5, out=block), -1, out=block)
            rows_out.append(torch.bmm(block, vs, out=out))
        groups.append(rows_out[0] if len(rows_out) == 1 or whole is not None else torch.cat(rows_out, dim=1))
    if whole is None:
        whole = groups[0] if len(groups) == 1 else torch.cat(groups)
    return whole[..., :dim].unflatten(0, (batch, heads)).transpose(1, 2).contiguous()    # [B, N, H, d]


@torch.library.custom_op('scepter::attention', mutates_args=())
def _opaque_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, without a gradient, as one operator that compilers call and do not look into."""
    return _attention_in_blocks(q, k, v)


@_opaque_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def checkpoint(compute: Callable[..., Tensor], *args: Any) -> Tensor:
    """compute(*args), whose activations are not kept: the backward pass computes them again, from the same random numbers.

    Dropout repeats itself because torch puts its generators back, and autocast likewise; keyed draws because their keys are brought back
    here: the backward pass runs outside of their context, on a GPU in another thread.
    """
    if not torch.is_grad_enabled():
        return compute(*args)
    if torch.compiler.is_compiling():
        return torch_checkpoint(compute, *args, use_reentrant=False)
    keys = streams.captured()

    def with_keys(*args: Any) -> Tensor:
        with streams.restored(keys):
            return compute(*args)
    return torch_checkpoint(with_keys, *args, use_reentrant=False)


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
    """x * sigmoid(x), in place where no gradient needs x. Only for input that nobody else reads, as a norm's output."""

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
    if x.device.type == 'cpu' and type(conv) is nn.Conv2d and len(x) * h * w >= 1024:
        return _upsample_conv_at_once(x, conv.weight, conv.bias)
    return conv(F.interpolate(x, scale_factor=2.0, mode='nearest'))


def _upsample_conv_at_once(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same as one transposed convolution of stride 2, with 16 products per pixel of x in place of 36.

    Each of the four pixels that a pixel becomes sees only 2x2 different ones, so the taps of weight [D, C, 3, 3] that fall on the same
    pixel are added: row a of the 4x4 kernel holds taps a-1 and a, turned round as a transposed convolution wants it. Measured in bfloat16:
    640 channels 32x32, batch 2: 281 -> 158 ms; 512 channels 64x64: 736 -> 359, with backward 2829 -> 1434. For few pixels the sums cost
    more than they save.
    """
    taps = x.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=weight.dtype)
    kernel = torch.einsum('ay,oiyx,bx->ioab', taps, weight, taps)    # [C, D, 4, 4]
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)
