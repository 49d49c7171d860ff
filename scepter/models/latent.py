"""LatentSpace: where a network diffuses. `FirstStage` is what an autoencoder of one's own must have.

Rombach et al. 2022 (arXiv 2112.10752), section 3.3, for the scale; Esser et al. 2024 (2403.03206) for the shift.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from scepter.core.config import Config
from scepter.core.faults import ConfigError, Fault
from scepter.core.registry import MODELS
from scepter.models.autoencoder import DiagonalGaussian


@dataclass(frozen=True)
class LatentSpace:
    """The latents (z - shift) * scale of an autoencoder, of variance about 1; pictures themselves where there is none.

    image [B, 3, H, W] in -1..1  <->  [B, C, H/f, W/f];    clip [B, 3, T, H, W]  <->  [B, C, T', H/f, W/f], a still being T = 1
    It holds no weights and belongs to no network: it is made where it is asked for, of the autoencoder that is there then.
    """
    autoencoder: Any = None          # a FirstStage, or None
    scale: float = 1.0
    shift: float = 0.0
    size_factor: int = 1             # f
    channels: int = 3                # C
    time_factor: int | None = None   # None: the autoencoder makes pictures, not clips
    is_causal: bool = False          # the first frame is a latent of its own: T = 1 + (T' - 1) * time_factor

    @classmethod
    def of(cls, autoencoder: Any, scale: float, shift: float, size_factor: int, channels: int) -> LatentSpace:
        """That of an autoencoder which says itself what it makes of time. channels: where it does not say them."""
        return cls(autoencoder, scale, shift, size_factor, getattr(autoencoder, 'EMBED_DIM', channels),
                   getattr(autoencoder, 'time_factor', None), getattr(autoencoder, 'is_causal', False))

    def misfit(self, may_differ: Sequence[str] = ()) -> str:
        """What the autoencoder, or the file that it came from, says otherwise; empty where nothing is. may_differ: keys that may."""
        factor = getattr(self.autoencoder, 'size_factor', None)
        if factor not in (None, self.size_factor):
            return f'the autoencoder makes pictures {factor} times smaller, but SIZE_FACTOR is {self.size_factor}: pictures would come ' \
                   'out in another size than is asked for'
        said = getattr(self.autoencoder, 'published_latent', None) or {}
        for key, ours, name in (('SCALE_FACTOR', self.scale, 'scaling_factor'), ('SHIFT_FACTOR', self.shift, 'shift_factor')):
            if key not in may_differ and said.get(key, ours) != ours:
                return f'its config says {name} {said[key]}, but {key} of the config is {ours}; where that is meant, name {key} in ' \
                       'IGNORE_KEYS'
        return ''

    # ---------------------------------------------------------------- pictures and clips -> latents
    def encode(self, x: Tensor, is_drawn: bool = True) -> Tensor:
        """[B, 3, (T,) H, W] in -1..1 -> latents, a draw from the posterior, or its mean. Raises ValueError for a clip it cannot take."""
        if self.autoencoder is None:
            return self._normed(x)
        posterior = self._posterior(x)
        return self._normed(posterior.sample() if is_drawn else posterior.mode())

    def moments(self, x: Tensor) -> Tensor:
        """[B, 3, (T,) H, W] in -1..1 -> what `draw` takes, [B, 2C, ...]. Raises ConfigError where the autoencoder does not tell it."""
        posterior = self._posterior(x)
        if (parameters := getattr(posterior, 'parameters', None)) is None:
            raise ConfigError(f'{type(self.autoencoder).__name__}.encode gives a {type(posterior).__name__} without `parameters`, so its '
                              'moments cannot be kept: leave CACHE out')
        return parameters

    def _posterior(self, x: Tensor) -> Any:
        x = self.with_time(x)
        if x.ndim == 5 and self.time_factor is None:
            raise ValueError(f'{type(self.autoencoder).__name__} takes pictures [B, 3, H, W], but got a clip {list(x.shape)}: one of clips '
                             'says its time_factor')
        return self.autoencoder.encode(x).latent_dist

    def draw(self, moments: Tensor) -> Tensor:
        """Moments [B, 2C, ...] that the autoencoder gave earlier -> latents drawn from them. Raises ValueError for other channels."""
        if self.autoencoder is not None and moments.shape[1] != 2 * self.channels:
            raise ValueError(f'the moments have {moments.shape[1]} channels, expected {2 * self.channels}, twice those of a latent of '
                             f'{type(self.autoencoder).__name__}: were they cached with another autoencoder?')
        return self._normed(DiagonalGaussian(self.with_time(moments)).sample())

    def with_time(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] as a clip of one frame, where the autoencoder makes clips."""
        return x[:, :, None] if x.ndim == 4 and self.time_factor is not None else x

    def _normed(self, z: Tensor) -> Tensor:
        return (z - self.shift) * self.scale

    # ---------------------------------------------------------------- latents -> pictures and clips
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pictures or clips in about -1..1. Raises ValueError where the autoencoder makes another size of them than it says."""
        z = latents / self.scale + self.shift
        if self.autoencoder is None:
            return z
        pictures = self.autoencoder.decode(z)
        size = [side * self.size_factor for side in z.shape[-2:]]
        expected = size if z.ndim == 4 else [self.frames(z.shape[2]), *size]
        if [*pictures.shape[2:]] != expected:
            told = f'SIZE_FACTOR {self.size_factor}: set SIZE_FACTOR to {pictures.shape[-1] / z.shape[-1]:g}' \
                if [*pictures.shape[-2:]] != size else f'time_factor {self.time_factor}, is_causal {self.is_causal}: correct them'
            raise ValueError(f'{type(self.autoencoder).__name__} decodes to {_by(pictures.shape[2:])}, but {_by(expected)} was expected of '
                             f'a latent of {_by(z.shape[2:])} and {told}')
        return pictures

    # ---------------------------------------------------------------- sizes
    def shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """Of the latent of a picture, or of a clip of so many frames: (C, h, w) or (C, t, h, w).

        Raises ValueError, with the nearest that can be, for a size that the autoencoder cannot make.
        """
        f = self.size_factor
        if height < f or width < f or height % f or width % f:
            near = [max(1, round(side / f)) * f for side in (height, width)]
            raise ValueError(f'an image of {height}x{width} cannot be made: sides are multiples of {f}, e.g. {near[0]}x{near[1]}')
        return self.channels, *self._latent_frames(frames), height // f, width // f

    def _latent_frames(self, frames: int | None) -> list[int]:
        if self.autoencoder is None:
            return [] if frames is None else [frames]
        if self.time_factor is None:
            if frames is not None:
                raise ValueError(f'{type(self.autoencoder).__name__} makes pictures, but a clip of {frames} frames was asked for')
            return []
        frames, first = 1 if frames is None else frames, int(self.is_causal)
        count = first + max(1 - first, round((frames - first) / self.time_factor))
        if self.frames(count) != frames:
            rule = f'1 more than a multiple of {self.time_factor}' if self.is_causal else f'a multiple of {self.time_factor}'
            raise ValueError(f'a clip of {frames} frames cannot be made: their number is {rule}, e.g. {self.frames(count)}')
        return [count]

    def frames(self, latent_frames: int) -> int:
        """How many frames are decoded of so many latent ones."""
        factor = self.time_factor or 1
        return 1 + (latent_frames - 1) * factor if self.is_causal else latent_frames * factor


class FirstStage(Protocol):
    """What LatentDiffusion asks of its FIRST_STAGE_MODEL, a TrainModule. It is frozen, and sees only `encode` and `decode`.

    `size_factor` may be missing: SIZE_FACTOR of the config is then taken at its word, and held against the first picture. Beside it a class
    may have `size_factor_of(cfg)`, a classmethod by which its config alone tells. Of clips [B, 3, T, H, W] the autoencoder says
    `time_factor`, how many times fewer frames a latent has, and `is_causal`, where the first frame is a latent of its own.
    """
    EMBED_DIM: int      # C, the channels of a latent
    size_factor: int    # f, how many times smaller than the image a latent is, per side

    def encode(self, x: Tensor) -> Any:
        """image [B, 3, H, W] in -1..1 -> an object whose latent_dist has sample() and mode(), each [B, EMBED_DIM, H/f, W/f].

        sample() draws by streams.normal, so that it is keyed; an autoencoder without a distribution gives the same from both.
        """

    def decode(self, z: Tensor) -> Tensor:
        """latent [B, EMBED_DIM, h, w] -> image [B, 3, f*h, f*w], about -1..1."""


# ------------------------------------------------------------------------------------------------ what a config tells
def size_factor_of(autoencoder: Any, said: int | None) -> int:
    """f, as the autoencoder or SIZE_FACTOR says it. Raises ConfigError where neither does; `misfit` tells where they contradict."""
    factor = 1 if autoencoder is None else getattr(autoencoder, 'size_factor', None)
    if said is None and factor is None:
        raise ConfigError(f'{type(autoencoder).__name__} does not say how many times smaller than a picture its latents are: give it a '
                          'size_factor, or set SIZE_FACTOR')
    return factor if said is None else said


def size_factor_told(cfg: Config) -> int | None:
    """How many times smaller than the image a latent is, where FIRST_STAGE_MODEL of a LatentDiffusion's config alone tells."""
    if cfg.FIRST_STAGE_MODEL is None:
        return 1
    autoencoder = MODELS.get(cfg.FIRST_STAGE_MODEL.NAME)
    if (tell := getattr(autoencoder, 'size_factor_of', None)) is not None:
        return tell(MODELS.filled(cfg.FIRST_STAGE_MODEL))
    factor = getattr(autoencoder, 'size_factor', None)
    return factor if isinstance(factor, int) else None


def size_faults(cfg: Config) -> Iterator[Fault]:
    """SIZE_FACTOR against the autoencoder, where its config alone tells, and IMAGE_SIZE against both."""
    pixels = {'SIZE_FACTOR': 1, 'SCALE_FACTOR': 1, 'SHIFT_FACTOR': 0}
    for key, plain in pixels.items() if cfg.FIRST_STAGE_MODEL is None else ():
        if cfg[key] not in (plain, None):
            yield Fault(key, f'is {cfg[key]}, but without FIRST_STAGE_MODEL the network draws pixels: set it to {plain}, or name an '
                             'autoencoder')
    told = size_factor_told(cfg)
    if cfg.FIRST_STAGE_MODEL is not None and None not in (told, cfg.SIZE_FACTOR) and told != cfg.SIZE_FACTOR:
        yield Fault('SIZE_FACTOR', f'is {cfg.SIZE_FACTOR}, but the autoencoder makes pictures {told} times smaller: leave SIZE_FACTOR out')
    factor = cfg.SIZE_FACTOR if told is None else told
    if factor is not None and any(side % factor for side in _sides(cfg.IMAGE_SIZE)):
        yield Fault('IMAGE_SIZE', f'is {cfg.IMAGE_SIZE}: sides are multiples of {factor}, by which the autoencoder makes pictures smaller')


def _sides(size: int | Sequence[int]) -> Sequence[int]:
    return [size] if isinstance(size, int) else size


def _by(sides: Sequence[int]) -> str:
    return 'x'.join(map(str, sides))
