"""Clips of two handwritten digits that move one way, made as they are read; and a figure for whether a drawn clip moves as it was told."""
from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from digits_data import WORDS, load_digits  # named under IMPORTS before this file
from torch import Tensor

from scepter.core.registry import DATASETS, METRICS
from scepter.core.schema import param
from scepter.data.datasets import BaseDataset
from scepter.solvers.metrics import Metric

WAYS = {'left': (0, -1), 'right': (0, 1), 'up': (-1, 0), 'down': (1, 0)}    # rows, columns
PROMPT = '{} and {} move {}'
SIDE, DIGIT = 64, 28    # pixels of a frame, and of a digit in it
MARGIN = 2              # pixels around a digit that stay dark
STEP = 8                # pixels from frame to frame
WHOLE = 5               # frames in which a digit comes from one edge to the other
APART = 3               # numbers so far apart, the second the greater, are never beside each other in training
STILL = 2               # a clip whose light travels fewer pixels than this moves no way


@DATASETS.register_class()
class MovingDigitsDataset(BaseDataset):
    """Two digits that cross the picture.    video [3, FRAMES, 64, 64] in -1..1, or of one frame image [3, 64, 64]; prompt

    A clip follows from its number alone, so that a cache can keep what an autoencoder makes of it.
    """

    SPLIT: Literal['train', 'test', 'all'] = param('train', 'train leaves out every fifth digit and every tenth pair of numbers, whose '
                                                            'second is three more than the first; test is of those alone.')
    FRAMES: int = param(WHOLE, 'Frames of a clip; 1: a picture. In fewer than 5 digits go a part of the way.', least=1, most=WHOLE)
    COUNT: int = param(4000, 'How many clips there are.', least=1)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        images, self.labels = load_digits(self.SPLIT, DIGIT)
        self.light = images[:, 0] / 2 + 0.5    # [N, 28, 28] in 0..1
        apart = (self.labels - torch.arange(len(WORDS))[:, None]) % len(WORDS) == APART    # [10, N]
        may_follow = {'train': ~apart, 'test': apart, 'all': torch.ones_like(apart)}[self.SPLIT]
        self.after = [row.nonzero().flatten() for row in may_follow]    # the digits that may stand beside each number

    def __len__(self) -> int:
        return self.COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        digits, way, starts = self.plan(index)
        video = torch.zeros(self.FRAMES, SIDE, SIDE)
        for lane, (digit, start) in enumerate(zip(digits, starts)):
            for frame, (row, column) in zip(video, path(way, lane, start, self.FRAMES)):
                frame[row:row + DIGIT, column:column + DIGIT] = self.light[digit]
        video = (2 * video - 1).expand(3, -1, -1, -1)
        return {**({'video': video} if self.FRAMES > 1 else {'image': video[:, 0]}), **self.beside(index)}

    def beside(self, index: int) -> dict[str, Any]:
        digits, way, _ = self.plan(index)
        return {'prompt': PROMPT.format(*(WORDS[self.labels[digit]] for digit in digits), way)}

    def plan(self, index: int) -> tuple[list[int], str, list[int]]:
        """Which two digits, which way, and how far from the left or upper edge, but for the margin, each comes at the nearest."""
        rng = np.random.default_rng(index)
        first, room = int(rng.integers(len(self.labels))), SIDE - DIGIT - 2 * MARGIN - STEP * (self.FRAMES - 1)
        after = self.after[self.labels[first]]
        return [first, int(after[rng.integers(len(after))])], [*WAYS][rng.integers(len(WAYS))], rng.integers(room + 1, size=2).tolist()


def path(way: str, lane: int, start: int, frames: int) -> list[tuple[int, int]]:
    """Row and column of a digit's corner in each frame: along the way from `start`, across it in its half of the picture."""
    rows, columns = WAYS[way]
    across = lane * SIDE // 2 + MARGIN
    places = [start + MARGIN + STEP * number for number in range(frames)]
    if rows + columns < 0:
        places.reverse()
    return [(place, across) if rows else (across, place) for place in places]


@METRICS.register_class()
class DirectionAccuracy(Metric):
    """Share of drawn clips whose light moves the way that their prompt says.    results: video, prompt"""

    @classmethod
    def names(cls, cfg: dict) -> set[str]:
        return {'direction'}

    def sums(self, results: list[dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
        return {'right': sum(way_of(r['video']) == r['prompt'].split()[-1] for r in results), 'count': len(results)}

    def figures(self, right: int, count: int) -> dict[str, float]:    # type: ignore[override]
        return {'direction': right / count}


def digits_of(video: Tensor, way: str) -> Tensor:
    """What stands where the two digits of a whole clip should be, in each of its frames.    [3, T, H, W] -> [T, 2, 28, 28], grey"""
    places = zip(*(path(way, lane, 0, video.shape[1]) for lane in range(2)))
    return torch.stack([torch.stack([frame[row:row + DIGIT, column:column + DIGIT] for row, column in both])
                        for frame, both in zip(video.mean(0), places)])


def way_of(video: Tensor) -> str | None:
    """The way that the centroid of the light takes from the first frame to the last; None: it stands still.    [3, T, H, W] in 0..1"""
    centroids = centroids_of(video)
    travel = centroids[-1] - centroids[0]
    if not travel.norm() >= STILL:    # nor where there is no light at all
        return None
    return max(WAYS, key=lambda way: float(travel @ travel.new_tensor(WAYS[way])))


def centroids_of(video: Tensor) -> Tensor:
    """Row and column of the middle of each frame's light, [T, 2].    video [3, T, H, W] in 0..1"""
    light = (video.float().mean(0) - 0.2).clamp(min=0)    # what is darker is no digit, and there is much of it
    rows, columns = (torch.arange(side, dtype=torch.float32, device=light.device) for side in light.shape[1:])
    total = light.sum((1, 2))
    return torch.stack([(light.sum(2) * rows).sum(1), (light.sum(1) * columns).sum(1)], 1) / total[:, None]
