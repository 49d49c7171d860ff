"""Buckets: pictures of many shapes, each cut to the nearest of a few sizes that cost about the same."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Size = tuple[int, int]    # (height, width)
BLOCK = 1 << 18           # pictures that are looked at at once


def bucket_sizes(side: int, step: int, shortest: int, longest: int) -> list[Size]:
    """Sizes of at most side * side pixels, in multiples of `step`, whose sides are from shortest to longest; widest first.

    The square, and for every width the largest height, each upright and lying: 17 sizes for (512, 64, 256, 1024).
    """
    square = side // step * step
    found = {(square, square)}
    for width in range(-(-shortest // step) * step, longest + 1, step):
        height = min(longest // step, side * side // width // step) * step
        if height >= shortest:
            found |= {(height, width), (width, height)}
    return sorted(found)


def nearest(sizes: Sequence[Size], heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """int64 [N]: for each picture the size whose ratio of sides is nearest in its logarithm, so that turning a picture turns its size."""
    ratios = np.array([math.log(height / width) for height, width in sizes])
    asked = np.log(heights / widths)
    parts = [np.abs(asked[i:i + BLOCK, None] - ratios).argmin(1) for i in range(0, len(asked), BLOCK)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def occupancy(sizes: Sequence[Size], bucket_of: np.ndarray, shapes: np.ndarray) -> str:
    """What becomes of the pictures, in words.    bucket_of: [N].  shapes: [N, 2], height and width"""
    counts = np.bincount(bucket_of, minlength=len(sizes))
    filled = ', '.join(f'{height}x{width} ({count})' for (height, width), count in zip(sizes, counts) if count)
    target = np.array(sizes)[bucket_of]
    scale = (target / shapes).max(1)    # until the size is just covered
    cut = 1 - float((target.prod(1) / (shapes.prod(1, dtype=np.float64) * scale ** 2)).mean())
    enlarged = int((scale > 1).sum())
    by = f' by up to {scale.max():.2g} times' if enlarged else ''
    return (f'images by height x width of their bucket: {filled}. {cut:.1%} of the pixels are cut off, {enlarged} images are enlarged{by}, '
            'none is left out')
