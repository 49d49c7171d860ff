"""Several processes, one gradient."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from scepter.core.env import we

BUCKET = 25 * 2 ** 20     # bytes; large enough for a network's full speed, small enough not to double the gradients' memory


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over all processes, in buckets of one type; a missing one counts as zero.

    Called once per optimizer step, after the last of ACCU_STEP backward passes: nothing is sent for the others.
    """
    if not we.is_distributed:
        return
    bucket: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:    # another rank may have one
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (bucket[0].dtype != parameter.grad.dtype or sum(g.nbytes for g in bucket) > BUCKET):
            _average(bucket)
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        _average(bucket)


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    we.all_reduce(flat, 'mean')
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))
