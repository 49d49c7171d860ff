"""Several processes, one gradient."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scepter.core.env import we

BUCKET = 25 * 2 ** 20     # bytes; large enough for a network's full speed, small enough not to double the gradients' memory


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each gradient by its mean over all processes, in buckets of one type.

    One that only some processes have counts as zero in the others; one that none has stays absent, or an optimizer would let such
    weights decay on several processes and not on one. Called once per optimizer step, after the last of ACCU_STEP backward passes:
    nothing is sent for the others.
    """
    if not we.is_distributed or not parameters:
        return
    has_grad = we.all_reduce(torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=we.device), 'max').tolist()
    for parameter, is_there in zip(parameters, has_grad):
        if is_there and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    _in_buckets([p.grad for p in parameters if p.grad is not None], lambda flat: we.all_reduce(flat, 'mean'))


def share_buffers(buffers: Sequence[Tensor]) -> None:
    """Give all processes the main one's buffers. Each has counted its own samples' statistics, as batch normalisation does; a checkpoint
    holds one set of them, so a resumed run would go on with others than an undisturbed one."""
    if we.is_distributed:
        import torch.distributed as dist
        _in_buckets(buffers, lambda flat: dist.broadcast(flat, src=0))


def _in_buckets(tensors: Sequence[Tensor], exchange: Callable[[Tensor], Any]) -> None:
    """Call exchange, which works in place, on all values, few large tensors of one type in the place of many small ones."""
    bucket: list[Tensor] = []
    held = 0
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        held += tensor.nbytes
        following = tensors[i + 1] if i + 1 < len(tensors) else None
        if following is None or following.dtype != tensor.dtype or held > BUCKET:
            flat = torch.cat([t.flatten() for t in bucket])
            exchange(flat)
            for t, values in zip(bucket, flat.split([t.numel() for t in bucket])):
                t.copy_(values.view_as(t))
            bucket, held = [], 0
