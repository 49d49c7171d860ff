"""How many floating point operations a pass of a network takes, and how many a device can do in a second.

    with counting() as count:
        loss(network).backward()
    count()                  # multiplications and additions of matrix products, convolutions and attention, each one operation
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

# Teraflops that the maker states for dense matrix products: float16 and bfloat16, TF32, float32. A name is looked for in this order
PEAKS = {
    'B200': (2250.0, 1125.0, 75.0), 'H200': (989.4, 494.7, 66.9), 'H100 PCIe': (756.0, 378.0, 51.0), 'H100 NVL': (835.5, 417.5, 60.0),
    'H100': (989.4, 494.7, 66.9), 'H800': (989.4, 494.7, 66.9), 'H20': (148.0, 74.0, 44.0), 'A100': (312.0, 156.0, 19.5),
    'A800': (312.0, 156.0, 19.5), 'L40S': (362.0, 183.0, 91.6), 'L40': (181.0, 90.5, 90.5), 'L4': (121.0, 60.0, 30.3),
    'A40': (149.7, 74.8, 37.4), 'A30': (165.0, 82.0, 10.3), 'A10': (125.0, 62.5, 31.2), 'V100': (125.0, 15.7, 15.7), 'T4': (65.0, 8.1, 8.1),
    'RTX 4090': (165.2, 82.6, 82.6), 'RTX 3090': (71.0, 35.6, 35.6),
}
_recomputed: list[int] | None = None      # while somebody counts: what was computed a second time


def peak_of(device_name: str, dtype: torch.dtype, allows_tf32: bool) -> float | None:
    """Operations a second that a device can do in a type; None where that is not known."""
    words = device_name.replace('-', ' ').split()
    for name, (half, tf32, single) in PEAKS.items():
        if set(name.split()) <= set(words):
            return 1e12 * (half if dtype.itemsize == 2 else tf32 if allows_tf32 else single)
    return None


@contextlib.contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Inside, operations are counted, but not those of activations that the backward pass computes again: they are no progress."""
    global _recomputed
    from torch.utils.flop_counter import FlopCounterMode
    recomputed: list[int] = []
    _recomputed = recomputed
    try:
        with FlopCounterMode(display=False) as counter:
            yield lambda: counter.get_total_flops() - sum(recomputed)
    finally:
        _recomputed = None


def is_counting() -> bool:
    """Whether somebody counts at this moment."""
    return _recomputed is not None


def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Of a checkpointed block: the contexts of its forward pass, and of computing it again (context_fn of torch.utils.checkpoint)."""
    return contextlib.nullcontext(), contextlib.nullcontext() if _recomputed is None else _again(_recomputed)


@contextlib.contextmanager
def _again(recomputed: list[int]) -> Iterator[None]:
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        try:
            yield
        finally:
            recomputed.append(counter.get_total_flops())
