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
    order = ratios.argsort(kind='stable')
    return order[np.searchsorted((ratios[order][1:] + ratios[order][:-1]) / 2, np.log(heights / widths))]


class Occupancy:
    """Counts what becomes of pictures, a block of them after the other."""

    def __init__(self, sizes: Sequence[Size]):
        self.sizes, self.counts = np.array(sizes), np.zeros(len(sizes), np.int64)
        self.kept, self.enlarged, self.most = 0.0, 0, 1.0    # shares of the pixels, summed; how many; by how much

    def add(self, bucket_of: np.ndarray, shapes: np.ndarray) -> None:
        """bucket_of: [N].  shapes: [N, 2], height and width"""
        # by columns: a reduction over an axis of two costs ten times as much
        high, wide = (self.sizes[:, side][bucket_of] / shapes[:, side] for side in range(2))    # how far each side is scaled
        scale = np.maximum(high, wide)    # until the size is just covered
        self.counts += np.bincount(bucket_of, minlength=len(self.sizes))
        self.kept += float((high * wide / (scale * scale)).sum())
        self.enlarged, self.most = self.enlarged + int(np.count_nonzero(scale > 1)), max(self.most, float(scale.max(initial=1.0)))

    def __str__(self) -> str:
        filled = ', '.join(f'{height}x{width} ({count})' for (height, width), count in zip(self.sizes.tolist(), self.counts) if count)
        by = f' by up to {self.most:.2g} times' if self.enlarged else ''
        return (f'images by height x width of their bucket: {filled}. {1 - self.kept / max(1, self.counts.sum()):.1%} of the pixels are '
                f'cut off, {self.enlarged} images are enlarged{by}, none is left out')
