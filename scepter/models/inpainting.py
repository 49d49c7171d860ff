"""What a drawing begins with where a picture or clip is given: image to image, and filling in what a mask leaves open."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scepter.models.latent import LatentSpace


class Given(NamedTuple):
    """What a drawing is given to begin with, and a mask that is 1 where it is made anew and 0 where it stays.

    image [B, 3, (T,) H, W] in -1..1, mask [B, 1, (T,) H, W]
    """
    image: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, image: Tensor | None, mask: Tensor | None, space: LatentSpace, device: torch.device) -> Given:
        """The same on the device and with a time axis where the space has one; a mask of one picture holds for all frames of a clip."""
        if image is not None:
            image = space.with_time(image.to(device))
        if mask is not None:
            mask = mask.to(device).float()
            if image is not None and mask.ndim < image.ndim:
                mask = mask[:, :, None].expand(-1, -1, image.shape[2], -1, -1)
        return cls(image, mask)

    @property
    def size(self) -> list[int] | None:
        """[H, W]"""
        return None if self.image is None else [*self.image.shape[-2:]]

    @property
    def frames(self) -> int | None:
        """T, of a clip of more than one frame."""
        return None if self.image is None or self.image.ndim < 5 or self.image.shape[2] == 1 else self.image.shape[2]

    def start(self, space: LatentSpace, shape: tuple[int, ...], denoising_strength: float | None) -> dict[str, Any]:
        """What `Diffusion.sample` begins with, and keeps where the mask is 0. Raises ValueError where latents of `shape` cannot."""
        if denoising_strength is None and self.mask is None:
            return {}
        if self.image is None:
            raise ValueError('denoising_strength and mask need an image to begin with')
        x = space.encode(self.image, is_drawn=False)    # a draw here would obey no seed
        if x.shape[1:] != shape:    # one frame would be broadcast to a clip
            raise ValueError(f'latents of {list(shape)} are to be drawn, but that of the given image is {list(x.shape[1:])}: give one '
                             'of the size, and of the frames, that are drawn')
        begin = {'x': x, 'denoising_strength': 1.0 if denoising_strength is None else denoising_strength}
        return begin if self.mask is None else {**begin, 'mask': F.interpolate(self.mask, x.shape[2:], mode='area')}

    def around_the_hole(self, space: LatentSpace) -> Tensor:
        """What a network that fills in reads beside the latent: the mask, and the latent of what it leaves.    [B, 1 + C, (t,) h, w]"""
        assert self.image is not None and self.mask is not None
        hole = (self.mask >= 0.5).float()
        known = space.encode(self.image * (1 - hole), is_drawn=False)
        return torch.cat([F.interpolate(hole, known.shape[2:]), known.float()], 1)

    def kept_in(self, pictures: Tensor) -> Tensor:
        """Pictures in 0..1 with the image itself where the mask is 0, which the autoencoder would blur."""
        if self.mask is None or self.image is None:
            return pictures
        return torch.lerp((self.image.to(pictures) + 1) / 2, pictures, self.mask.to(pictures))
