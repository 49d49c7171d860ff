"""How much a clip moves, as NOVA's data says it: the mean way of its corners from a frame to the next, in pixels.

Corners by Shi & Tomasi 1994 ("Good features to track"), followed by Lucas & Kanade's method on a pyramid (Bouguet 2000), with the
settings of the published clips.
"""
from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

CORNERS, QUALITY, DISTANCE, BLOCK = 100, 0.1, 7, 7    # at most so many, of so much of the best, so far apart, over so many pixels
WINDOW, LEVELS, ITERATIONS = 15, 2, 30                # pixels that a corner is known by, times the picture is halved, steps at most
CLOSE, FLAT = 0.01, 0.1                               # a step that ends the search; mean square slope below which nothing is followed
LUMA = (0.299, 0.587, 0.114)


def motion_score(frames: Tensor) -> float:
    """Mean over the pairs of neighbouring frames of the mean displacement in pixels of what can be followed; 0 where nothing can.

    frames: [T, H, W, 3] uint8.
    """
    gray = frames.float() @ torch.tensor(LUMA)
    pyramids = [_pyramid(frame) for frame in gray]
    ways = [displacements(before, after) for before, after in pairwise(pyramids)]
    means = [float(way.norm(dim=1).mean()) for way in ways if len(way)]
    return sum(means) / len(means) if means else 0.0


def displacements(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """How far each corner of one frame has gone in the next: [N, 2], x and y. Both are pyramids, the whole frame first."""
    points = corners(before[0])
    way = torch.zeros_like(points)
    is_found = torch.ones(len(points), dtype=torch.bool)
    for level in reversed(range(len(before))):
        way, is_textured = _follow(before[level], after[level], points / 2 ** level, way * (2 if level + 1 < len(before) else 1))
        is_found = is_textured if level == 0 else is_found
    end, (height, width) = points + way, before[0].shape
    is_inside = (end >= 0).all(1) & (end[:, 0] <= width - 1) & (end[:, 1] <= height - 1)
    return way[is_found & is_inside]


def corners(gray: Tensor) -> Tensor:
    """Where a picture [H, W] has texture in two directions: [N, 2], x and y, the best first."""
    dx, dy = _slopes(gray, (1.0, 2.0, 1.0))
    xx, xy, yy = (_box(product, BLOCK) for product in (dx * dx, dx * dy, dy * dy))
    strength = 0.5 * (xx + yy) - (0.25 * (xx - yy).square() + xy.square()).sqrt()    # the smaller eigenvalue
    is_peak = strength == F.max_pool2d(strength[None, None], 3, 1, 1)[0, 0]
    is_peak &= (strength > QUALITY * strength.max()) & (strength > 0)
    is_peak[[0, -1]] = is_peak[:, [0, -1]] = False
    y, x = is_peak.nonzero(as_tuple=True)
    found = torch.stack([x, y], 1)[strength[y, x].argsort(descending=True, stable=True)].float()
    kept: list[int] = []
    for i, point in enumerate(found):
        if len(kept) == CORNERS:
            break
        if not kept or (found[kept] - point).square().sum(1).min() >= DISTANCE ** 2:
            kept.append(i)
    return found[kept]


def _follow(before: Tensor, after: Tensor, points: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
    """Better displacements of points [N, 2] on one level of the pyramid, and which of them have texture to be followed by."""
    reach = torch.arange(WINDOW, dtype=torch.float32) - WINDOW // 2
    window = torch.stack(torch.meshgrid(reach, reach, indexing='xy'), -1).reshape(-1, 2)    # [W*W, 2]
    places = points[:, None] + window
    dx, dy = (slope / 32 for slope in _slopes(before, (3.0, 10.0, 3.0)))
    template, slopes = _at(before, places), torch.stack([_at(dx, places), _at(dy, places)], -1)    # [N, W*W], [N, W*W, 2]
    normal = slopes.transpose(1, 2) @ slopes    # [N, 2, 2]
    smaller = 0.5 * (normal[:, 0, 0] + normal[:, 1, 1]) - (
        0.25 * (normal[:, 0, 0] - normal[:, 1, 1]).square() + normal[:, 0, 1].square()).sqrt()
    is_textured = smaller / WINDOW ** 2 > FLAT
    pull = torch.linalg.pinv(normal) @ slopes.transpose(1, 2)    # [N, 2, W*W]: from errors to a step
    moving, way = is_textured.nonzero()[:, 0], way.clone()
    for _ in range(ITERATIONS):
        error = template[moving] - _at(after, places[moving] + way[moving, None])
        step = (pull[moving] @ error[..., None])[..., 0]
        way[moving] += step
        moving = moving[step.norm(dim=1) > CLOSE]
    return way, is_textured


def _at(image: Tensor, places: Tensor) -> Tensor:
    """Values of an image [H, W] between its pixels, at places [..., 2] of x and y; beyond its edges those of the edge."""
    height, width = image.shape
    x, y = places[..., 0].clamp(0, width - 1), places[..., 1].clamp(0, height - 1)
    left, top = x.floor().clamp(max=max(0, width - 2)).long(), y.floor().clamp(max=max(0, height - 2)).long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    a, b = x - left, y - top
    return (image[top, left] * (1 - a) + image[top, right] * a) * (1 - b) + (image[bottom, left] * (1 - a) + image[bottom, right] * a) * b


def _pyramid(gray: Tensor) -> list[Tensor]:
    """A picture [H, W], and halved LEVELS times, while more than a window is left of it."""
    levels = [gray]
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    for _ in range(LEVELS):
        if min(levels[-1].shape) <= WINDOW:
            break
        levels.append(_filtered(levels[-1], kernel, kernel)[::2, ::2])
    return levels


def _slopes(gray: Tensor, smooth: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    across, along = torch.tensor(smooth), torch.tensor([-1.0, 0.0, 1.0])
    return _filtered(gray, along, across), _filtered(gray, across, along)


def _box(x: Tensor, side: int) -> Tensor:
    return _filtered(x, torch.ones(side), torch.ones(side))


def _filtered(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """x [H, W] filtered along its rows and its columns, mirrored at its edges where it is wide enough."""
    half = len(row) // 2
    padded = F.pad(x[None, None], (half,) * 4, 'reflect' if min(x.shape) > half else 'replicate')
    return F.conv2d(F.conv2d(padded, row.view(1, 1, 1, -1)), column.view(1, 1, -1, 1))[0, 0]
