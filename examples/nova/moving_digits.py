"""Clips of two handwritten digits that move one way, made as they are read; and a figure for whether a drawn clip moves as it was told."""
from __future__ import annotations

from typing import Any, Literal

import torch
from digits_data import WORDS, load_digits  # named under IMPORTS before this file
from torch import Tensor

from scepter.core.registry import DATASETS, METRICS
from scepter.core.schema import param
from scepter.data.datasets import BaseDataset
from scepter.solvers.metrics import Metric

WAYS = {'left': (0, -1), 'right': (0, 1), 'up': (-1, 0), 'down': (1, 0)}    # rows, columns
PROMPT = '{} and {} move {}'
SIDE, DIGIT = 64, 24    # pixels of a frame, and of a digit in it
STEP = 4                # pixels from frame to frame
STILL = 2               # a clip whose light travels fewer pixels than this moves no way


@DATASETS.register_class()
class MovingDigitsDataset(BaseDataset):
    """Two digits on their way.    video [3, FRAMES, 64, 64] in -1..1, or of one frame image [3, 64, 64]; prompt

    Digits, places and the way are drawn anew each time a sample is read, keyed by its draw: no clip comes twice in training.
    """

    SPLIT: Literal['train', 'test', 'all'] = param('train', 'Whose digits: train leaves out every fifth, test is those.')
    FRAMES: int = param(5, 'Frames of a clip; 1: a picture.', least=1, most=9)
    COUNT: int = param(1000, 'Clips of an epoch.', least=1)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        images, self.labels = load_digits(self.SPLIT, DIGIT)
        self.light = images[:, 0] / 2 + 0.5    # [N, 24, 24] in 0..1

    def __len__(self) -> int:
        return self.COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        first, second = torch.randint(len(self.labels), (2,)).tolist()    # torch's generator is keyed by the sample while it is read
        way = [*WAYS][int(torch.randint(len(WAYS), ()))]
        video = torch.zeros(self.FRAMES, SIDE, SIDE)
        for lane, digit in enumerate((first, second)):
            for frame, (row, column) in zip(video, path(way, lane, self.FRAMES)):
                frame[row:row + DIGIT, column:column + DIGIT] = self.light[digit]
        video = (2 * video - 1).expand(3, -1, -1, -1)
        words = PROMPT.format(WORDS[self.labels[first]], WORDS[self.labels[second]], way)
        return {**({'video': video} if self.FRAMES > 1 else {'image': video[:, 0]}), 'prompt': words}


def path(way: str, lane: int, frames: int) -> list[tuple[int, int]]:
    """Row and column of a digit's corner in each frame: in its half of the picture across the way, anywhere along it that leaves room."""
    free, travel = SIDE - DIGIT, STEP * (frames - 1)
    along = int(torch.randint(free - travel + 1, ()))
    across = lane * SIDE // 2 + int(torch.randint(SIDE // 2 - DIGIT + 1, ()))
    rows, columns = WAYS[way]
    places = [along + STEP * number for number in range(frames)]
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
