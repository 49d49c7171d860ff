"""Buckets: pictures of many shapes, each cut to the nearest of a few sizes that cost about the same."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Size = tuple[int, int]    # (height, width)


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
    return np.abs(np.log(heights / widths)[:, None] - ratios).argmin(1)
