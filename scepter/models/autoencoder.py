"""The autoencoder of latent diffusion: images to latents a few times smaller, and back. Trainable, under the published names.

Rombach et al. 2022 (arXiv 2112.10752), section 3.1. At the size of Stable Diffusion: 248 tensors, 83,653,863 parameters.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import scepter.models.coders
import scepter.models.losses  # noqa: F401  what an autoencoder is built of
from scepter.core import streams
from scepter.core.config import Config
from scepter.core.faults import Fault
from scepter.core.registry import BACKBONES, LOSSES, MODELS
from scepter.core.schema import param, part
from scepter.models.base import BaseModel, TrainModule
from scepter.models.layers import GROUPS, GroupNorm32
from scepter.weights import local_copy, read_json
from scepter.weights.families import autoencoder
from scepter.weights.said import values_of


@MODELS.register_class()
class AutoencoderKL(TrainModule):
    """Images to the distribution of their latents, and latents to images.    [B, 3, H, W] in -1..1  <->  [B, EMBED_DIM, h, w]"""

    ENCODER: dict = part(BACKBONES, 'The network from image to moments.')
    DECODER: dict = part(BACKBONES, 'The network from latent to image.')
    EMBED_DIM: int = param(4, 'Channels of the latent.', least=1)
    USE_CONV: bool = param(True, 'A 1x1 convolution between each network and the latent (Stable Diffusion); false: none.')
    REC_LOSS: dict = part(LOSSES, 'Error of the reconstruction.', default={'NAME': 'ReconstructLoss', 'LOSS_TYPE': 'l1'})
    KL_WEIGHT: float = param(
        1e-6, 'Weight of the KL divergence to the standard normal, a mean over latent values as that is over pixels.', least=0)
    DISCRIMINATOR: dict | None = part(BACKBONES, 'A network that tells images from reconstructions, trained by an optimizer of its own '
                                                 'that owns discriminator.* and follows disc_loss.', default=None)
    DISC_WEIGHT: float = param(
        0.5, "Weight of the discriminator's verdict, relative to the reconstruction's pull on the last layer.", least=0)
    DISC_START: int = param(0, 'Training batches that pass before the discriminator learns and is heard.', least=0)
    BATCH_SIZE: int | None = param(16, 'Images that are encoded or decoded at once where no gradient is needed; null: all.', least=1)
    TILE_SIZE: int | None = param(
        None, 'Larger images are encoded and decoded in overlapping tiles of so many pixels; null: never.', least=1)
    PRETRAINED_MODEL: str | None = param(None, 'Weights to start from.')
    IGNORE_KEYS: list[str] = param([], 'Names or globs of weights that may be missing, left over or of another shape.')

    forward_methods = ('encode', 'decode')
    disc_batches: Tensor    # training batches so far; there is one only with a discriminator

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if (cfg.ENCODER.NAME, cfg.DECODER.NAME) != ('Encoder', 'Decoder'):
            return    # what another network needs is its own affair
        encoder, decoder = BACKBONES.filled(cfg.ENCODER), BACKBONES.filled(cfg.DECODER)
        if len(encoder.CH_MULT) != len(decoder.CH_MULT):
            yield Fault('DECODER.CH_MULT', f'has {len(decoder.CH_MULT)} levels, but the encoder has {len(encoder.CH_MULT)}: '
                                           'the image would come back in another size')
        if encoder.Z_CHANNELS != decoder.Z_CHANNELS:
            yield Fault('DECODER.Z_CHANNELS', f'is {decoder.Z_CHANNELS}, but that of the encoder is {encoder.Z_CHANNELS}')
        elif not cfg.USE_CONV and cfg.EMBED_DIM != decoder.Z_CHANNELS:
            yield Fault('EMBED_DIM', f'without USE_CONV the latent has Z_CHANNELS ({decoder.Z_CHANNELS}) channels, '
                                     f'but EMBED_DIM is {cfg.EMBED_DIM}')
        if not encoder.DOUBLE_Z:
            yield Fault('ENCODER.DOUBLE_Z', 'a distribution has means and log-variances: set it to true')
        factor = 2 ** (len(encoder.CH_MULT) - 1)
        if cfg.TILE_SIZE is not None and (cfg.TILE_SIZE % factor or cfg.TILE_SIZE < 4 * factor):
            yield Fault('TILE_SIZE', f'TILE_SIZE is {cfg.TILE_SIZE}: use a multiple of {factor}, from {4 * factor} on')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.encoder = BACKBONES.build(self.ENCODER, logger=logger)
        self.decoder = BACKBONES.build(self.DECODER, logger=logger)
        self.rec_loss = LOSSES.build(self.REC_LOSS, logger=logger)
        if self.DISCRIMINATOR:
            self.discriminator = BACKBONES.build(self.DISCRIMINATOR, logger=logger)
            self.register_buffer('disc_batches', torch.zeros((), dtype=torch.int64))    # saved: a resume goes on counting
        z_channels = self.decoder.Z_CHANNELS
        if self.USE_CONV:
            self.quant_conv = nn.Conv2d(2 * z_channels, 2 * self.EMBED_DIM, 1)
            self.post_quant_conv = nn.Conv2d(self.EMBED_DIM, z_channels, 1)
        if self.PRETRAINED_MODEL:
            self.load_pretrained(self.PRETRAINED_MODEL, self.IGNORE_KEYS)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> AutoencoderKL:
        """That of a folder of diffusers (config.json beside the weights), local or in any store.

        Raises CheckpointError for what no autoencoder of ours can be, and for weights that do not fit.
        """
        with local_copy(path) as folder:
            node = values_of(autoencoder.read_config(read_json(folder / 'config.json'), str(path), 'config.json'))
        return cls({**node, 'PRETRAINED_MODEL': str(path)})

    def forward_train(self, image: Tensor, **batch: Any) -> dict[str, Any]:
        """image [B, 3, H, W] in -1..1  ->  loss, and its parts: rec_loss per pixel, kl_loss per latent value.

        With a discriminator also disc_loss, which is its own, and gen_loss, its verdict on the reconstructions, which is in `loss`.
        """
        posterior = self.encode(image).latent_dist
        out = self.decode(posterior.sample())
        rec_loss = self.rec_loss(out, image).mean()
        kl_loss = posterior.kl().mean() / posterior.mean[0].numel()
        outputs = {'loss': rec_loss + self.KL_WEIGHT * kl_loss, 'rec_loss': rec_loss.detach(), 'kl_loss': kl_loss.detach(),
                   'probe_data': {'image': to_pixels(image), 'reconstruction': to_pixels(out)}}
        if self.DISCRIMINATOR:
            self._add_adversary(outputs, image, out, rec_loss)
        return outputs

    def _add_adversary(self, outputs: dict[str, Any], image: Tensor, out: Tensor, rec_loss: Tensor) -> None:
        """Hinge losses, weighed as in VQGAN (Esser et al. 2021, arXiv 2012.09841, equation 7)."""
        has_begun = self.disc_batches.ge(self.DISC_START).float()
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}    # the verdict must not teach the judge
        gen_loss = -functional_call(self.discriminator, fixed, (out,)).mean()
        outputs['loss'] = outputs['loss'] + has_begun * self.DISC_WEIGHT * self._balance(rec_loss, gen_loss) * gen_loss
        outputs['gen_loss'] = gen_loss.detach()
        real, fake = self.discriminator(image.to(out.dtype)), self.discriminator(out.detach())
        outputs['disc_loss'] = has_begun * 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        if self.training and torch.is_grad_enabled():
            self.disc_batches.add_(1)

    def _balance(self, rec_loss: Tensor, gen_loss: Tensor) -> Tensor | float:
        """How much harder the reconstruction pulls on the last layer than the discriminator does; 1 where nothing is learnt."""
        last = self.decoder.conv_out.weight
        if not (torch.is_grad_enabled() and last.requires_grad):
            return 1.0
        rec_pull, gen_pull = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (rec_loss, gen_loss))
        return (rec_pull / (gen_pull + 1e-4)).clamp(max=1e4).detach()

    @torch.no_grad()
    def forward_test(self, image: Tensor, **batch: Any) -> list[dict[str, Any]]:
        """image [B, 3, H, W] in -1..1  ->  per sample its reconstruction from the mode, image [3, H, W] in 0..1, and the target."""
        out = self.decode(self.encode(image).latent_dist.mode())
        return [{'image': o, 'target': i} for o, i in zip(to_pixels(out), to_pixels(image))]

    def encode(self, x: Tensor) -> EncoderOutput:
        """The posterior of the latents of x [B, 3, H, W] in -1..1.    .latent_dist.parameters [B, 2 * EMBED_DIM, h, w]

        Where half precision overflows it is done again in float32, as in `decode`.
        Raises ValueError where a side is not a multiple of `size_factor`.
        """
        factor, (h, w) = self.size_factor, x.shape[2:]
        if h % factor or w % factor:
            near = 'x'.join(str(max(factor, round(side / factor) * factor)) for side in (h, w))
            raise ValueError(f'image is {h}x{w}, but the autoencoder makes it {factor} times smaller: '
                             f'use multiples of {factor}, e.g. {near}')
        x = x.to(self.dtype)
        return EncoderOutput(DiagonalGaussian(self._in_chunks(self._encode_one, x, 1 / factor)))

    def decode(self, z: Tensor) -> Tensor:
        """The image of latents.    z [B, EMBED_DIM, h, w]  ->  [B, 3, H, W], about -1..1

        Where half precision overflows it is done again in float32 (SDXL's autoencoder does so in float16); not while training.
        """
        return self._in_chunks(self._decode_one, z.to(self.dtype), self.size_factor)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, in which it computes."""
        return self.decoder.conv_out.weight.dtype

    @cached_property
    def size_factor(self) -> int:
        """How many times smaller than the image the latent is, e.g. 8."""
        return 2 ** (len(self.decoder.CH_MULT) - 1)

    @classmethod
    def size_factor_of(cls, cfg: Config) -> int | None:
        """The same, where its config alone tells."""
        levels = BACKBONES.filled(cfg.ENCODER).get('CH_MULT')
        return 2 ** (len(levels) - 1) if levels else None

    def _encode_one(self, x: Tensor) -> Tensor:
        return _finite([self.encoder, self.quant_conv] if self.USE_CONV else [self.encoder], x)

    def _decode_one(self, z: Tensor) -> Tensor:
        return _finite([self.post_quant_conv, self.decoder] if self.USE_CONV else [self.decoder], z)

    def _in_chunks(self, convert: Callable[[Tensor], Tensor], x: Tensor, scale: float) -> Tensor:
        """convert(x), a few rows at a time, and in tiles where that is configured. scale: of the result's sides to those of x."""
        def one(rows: Tensor) -> Tensor:
            return convert(rows) if self.TILE_SIZE is None else in_tiles(convert, rows, self.TILE_SIZE // self.size_factor, scale)

        if torch.is_grad_enabled() or self.BATCH_SIZE is None or len(x) <= self.BATCH_SIZE:
            return one(x)
        return torch.cat([one(rows) for rows in x.split(self.BATCH_SIZE)])


@dataclass
class EncoderOutput:
    """What `encode` returns."""
    latent_dist: DiagonalGaussian


class DiagonalGaussian:
    """Independent normals, one per latent value.    parameters [B, 2C, ...]: means, then log-variances, clamped to -30..20

    [B, C + 1, ...] with C even: the last channel is the log-variance of all.
    """

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        channels = parameters.shape[1]
        self.mean, logvar = parameters.split([channels - 1, 1] if channels % 2 else channels // 2, dim=1)
        self.logvar = logvar.expand_as(self.mean).clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviations [B, C, h, w]."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """One draw [B, C, h, w], keyed by the batch's samples unless the noise is given."""
        return self.mean + self.std * (streams.normal('posterior', self.mean) if noise is None else noise)

    def mode(self) -> Tensor:
        """The most likely latent, which is the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """[B], the KL divergence to the standard normal in nats, summed over the latent values; in float32."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


@BACKBONES.register_class()
class PatchDiscriminator(BaseModel):
    """Whether each patch is of a real image: positive yes, negative no (Isola et al. 2017, arXiv 1611.07004).    -> [B, 1, h, w]"""

    IN_CHANNELS: int = param(3, 'Channels of the image.', least=1)
    CH: int = param(64, 'Channels of the first layer, doubled by each up to 8 times.', least=GROUPS // 2, multiple=GROUPS // 2)
    NUM_LAYERS: int = param(3, 'Layers that halve the size; 3 judge patches of 70x70.', least=1)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        widths = [self.CH * min(2 ** i, 8) for i in range(self.NUM_LAYERS + 1)]
        layers: list[nn.Module] = [nn.Conv2d(self.IN_CHANNELS, self.CH, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths)):
            # a norm within the sample: batch statistics would differ between one process and two
            layers += [nn.Conv2d(before, after, 4, stride=1 if i == self.NUM_LAYERS - 1 else 2, padding=1, bias=False),
                       GroupNorm32(after), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def _finite(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The layers one after another; in float32 where half precision overflows and nothing is being trained."""
    out = x
    for layer in layers:
        out = layer(out)
    if out.dtype == torch.float32 or torch.is_grad_enabled() or out.isfinite().all():
        return out
    with torch.autocast(x.device.type, enabled=False):
        out = x.float()
        for layer in layers:
            out = functional_call(layer, {name: p.float() for name, p in layer.named_parameters()}, (out,))
    return out


def in_tiles(convert: Callable[[Tensor], Tensor], x: Tensor, tile: int, scale: float) -> Tensor:
    """convert(x) from overlapping tiles, blended linearly over a quarter of a tile.    [B, C, H, W] -> [B, D, H * scale, W * scale]

    tile: side of a tile in latents; scale: size_factor for decoding, its inverse for encoding. It is not quite convert(x): norms and
    attention see one tile at a time.
    """
    factor_in, factor_out = max(1, round(1 / scale)), max(1, round(scale))    # pixels per latent before and after
    h, w = x.shape[2] // factor_in, x.shape[3] // factor_in
    if max(h, w) <= tile:
        return convert(x)
    out = total = torch.zeros(())
    for top, bottom in _spans(h, tile):
        for left, right in _spans(w, tile):
            piece = convert(x[:, :, top * factor_in:bottom * factor_in, left * factor_in:right * factor_in])
            if out.dim() == 0:
                out = piece.new_zeros((*piece.shape[:2], h * factor_out, w * factor_out), dtype=torch.float32)
                total = torch.zeros_like(out[0, 0])
            rows, columns = (_ramp(side, tile * factor_out / 4) for side in piece.shape[2:])
            weight = rows.outer(columns).to(piece.device)
            place = (..., slice(top * factor_out, bottom * factor_out), slice(left * factor_out, right * factor_out))
            out[place] += piece * weight
            total[place] += weight
    return (out / total).to(piece.dtype)


def _spans(size: int, tile: int) -> list[tuple[int, int]]:
    """Spans of length `tile`, or `size`, that cover 0 .. size and overlap by a quarter or more."""
    if size <= tile:
        return [(0, size)]
    count = math.ceil((size - tile) / (tile * 3 // 4)) + 1
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def _ramp(size: int, length: float) -> Tensor:
    """[size], rising from just above 0 to 1 over `length` pixels, and falling likewise."""
    i = torch.arange(size, dtype=torch.float32) + 0.5
    return torch.minimum(i, size - i).div(length).clamp(max=1.0)


def to_pixels(x: Tensor) -> Tensor:
    """-1..1 to 0..1, clipped."""
    return x.detach().float().add(1).div(2).clamp(0, 1)
