"""Transforms: a sample (a dict) goes in, a sample comes out.

All of torchvision.transforms.v2 is here by its own names and arguments ({NAME: ColorJitter, BRIGHTNESS: 0.1}); it takes a whole
sample too, and changes what is an image in it. Ours is what it lacks. Randomness comes from the global generators, which the loader
seeds for each sample: a transform needs no seed, and is the same in every worker.
"""
from __future__ import annotations

import copy
import random
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from scepter.core.errors import DataError
from scepter.core.registry import TRANSFORMS, need
from scepter.core.schema import Component, param


@TRANSFORMS.register_class()
class RecordedCrop(Component):
    """Scale until the size is just covered, cut the rest off, and record what was done, as SDXL is told it (2307.01952, section 2.2).

    image, and whatever else is a picture (mask)  ->  SIZE, with the same cut and flip; adds original_size, the [h, w] of the file before
    any transform, crop_top_left, the [top, left] of the cut in the scaled image, and target_size [h, w]. Needs no torchvision.
    """

    SIZE: int | tuple[int, int] | None = param(
        None, "Pixels of the result: one number, or [height, width]; null: the sample's target_size, that of its bucket.", least=1)
    RANDOM: bool = param(False, 'Cut at a random place instead of the middle.')
    FLIP: float = param(0.0, 'Probability of a mirrored image.', least=0, most=1)
    INTERPOLATION: Literal['bilinear', 'bicubic', 'lanczos'] = param('bicubic', 'How the image is scaled; a mask takes the nearest pixel.')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.resample = Image.Resampling[self.INTERPOLATION.upper()]
        self.flip = self.FLIP

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image, mask = sample['image'], sample.get('mask')
        if not isinstance(image, Image.Image):
            raise DataError(f'RecordedCrop cuts PIL images, got a {type(image).__name__}: put it before what makes tensors')
        size = self.size_of(sample)
        height, width = size
        full = image.info['original_size'] if 'shrunk' in image.info else (image.height, image.width)
        scale = max(height / full[0], width / full[1])
        h, w = max(height, round(full[0] * scale)), max(width, round(full[1] * scale))
        top, left = h - height, w - width    # how far the cut may go
        top, left = (random.randint(0, top), random.randint(0, left)) if self.RANDOM else (top // 2, left // 2)
        cut = _Cut((h, w), (top, left), size, self.draws_mirror())
        sample = {**sample, 'original_size': image.info.get('original_size', full), 'crop_top_left': (top, left), 'target_size': size}
        for key, picture in sample.items():
            if isinstance(picture, Image.Image):
                sample[key] = cut.of_image(picture, Image.Resampling.NEAREST if key == 'mask' else self.resample)
        if isinstance(mask, Tensor):
            sample['mask'] = cut.of_mask(mask)
        return sample

    def draws_mirror(self) -> bool:
        """Whether this image is mirrored; drawn last of all that a transform of this kind draws."""
        return random.random() < self.flip

    def unmirrored(self) -> RecordedCrop:
        """The same cut, never mirrored, for a cache of both."""
        still = copy.copy(self)
        still.flip = 0.0
        return still

    def size_of(self, sample: dict[str, Any]) -> tuple[int, int]:
        """(height, width) of what becomes of this sample. Raises DataError where nothing says it."""
        if isinstance(self.SIZE, int):
            return self.SIZE, self.SIZE
        if (size := self.SIZE or sample.get('target_size')) is None:
            raise DataError('RecordedCrop has no SIZE, and the sample has no target_size: give SIZE, or sort the pictures into BUCKETS')
        return size[0], size[1]


class _Cut(NamedTuple):
    """What is done to every picture of a sample alike."""
    scaled: tuple[int, int]      # (height, width)
    corner: tuple[int, int]      # (top, left) of the cut in the scaled picture
    size: tuple[int, int]
    flip: bool

    def of_image(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        (h, w), (top, left), (height, width) = self.scaled, self.corner, self.size
        image = image.resize((w, h), resample, box=image.info.get('shrunk'))
        image = image.crop((left, top, left + width, top + height))
        image.info = {key: value for key, value in image.info.items() if key != 'shrunk'}
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image

    def of_mask(self, mask: Tensor) -> Tensor:
        (h, w), (top, left), (height, width) = self.scaled, self.corner, self.size
        rows, columns = _nearest(h, mask.shape[-2])[top:top + height], _nearest(w, mask.shape[-1])[left:left + width]
        return mask[..., rows[:, None], columns.flip(0) if self.flip else columns]


def _nearest(size: int, source: int) -> Tensor:
    """[size] The pixel of the source row that lies under the middle of each of the new row's."""
    return ((torch.arange(size) + 0.5) * source / size).long()


def torchvision_transforms() -> dict[str, Any]:
    """Every transform of torchvision.transforms.v2, by name; imported when a name is asked for that we do not have."""
    v2 = need('torchvision.transforms.v2', 'vision')
    return {name: kind for name, kind in vars(v2).items() if isinstance(kind, type) and issubclass(kind, v2.Transform)}


TRANSFORMS.add_library(torchvision_transforms)
