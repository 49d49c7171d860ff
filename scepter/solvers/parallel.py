"""Several processes, one gradient."""
from __future__ import annotations

from collections.abc import Sequence

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
    bucket: list[Tensor] = []
    held = 0
    for parameter, is_there in zip(parameters, has_grad):
        if not is_there:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (bucket[0].dtype != parameter.grad.dtype or held > BUCKET):
            _average(bucket)
            bucket, held = [], 0
        bucket.append(parameter.grad)
        held += parameter.grad.nbytes
    if bucket:
        _average(bucket)


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    we.all_reduce(flat, 'mean')
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))
