"""What CPUs compute faster in another way than PyTorch's own: attention over blocks of the scores, and enlarging before a convolution.

models/layers.py asks here first. Each way gives what the plain one gives, to rounding; what was measured stands beside it.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 2 ** 21     # scores that are held at once: 4 MB of bfloat16, which stay in the cache


def blocks_are_faster(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
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


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over blocks of the scores.    q [B, N, H, d], k and v [B, M, H, d]  ->  [B, N, H, d]"""
    is_opaque = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    return _opaque_attention(q, k, v) if is_opaque else _attention_in_blocks(q, k, v)


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


def is_upsampled_at_once(x: Tensor, conv: nn.Module) -> bool:
    """Whether `upsample_conv` is faster for x [B, C, H, W]: for few pixels its sums cost more than they save."""
    return x.device.type == 'cpu' and type(conv) is nn.Conv2d and len(x) * x.shape[2] * x.shape[3] >= 1024


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same as one transposed convolution of stride 2, with 16 products per pixel of x in place of 36.

    Each of the four pixels that a pixel becomes sees only 2x2 different ones, so the taps of weight [D, C, 3, 3] that fall on the same
    pixel are added: row a of the 4x4 kernel holds taps a-1 and a, turned round as a transposed convolution wants it. Measured in bfloat16:
    640 channels 32x32, batch 2: 281 -> 158 ms; 512 channels 64x64: 736 -> 359, with backward 2829 -> 1434. For few pixels the sums cost
    more than they save.
    """
    taps = x.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=weight.dtype)
    kernel = torch.einsum('ay,oiyx,bx->ioab', taps, weight, taps)    # [C, D, 4, 4]
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)
