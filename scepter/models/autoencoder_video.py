"""The causal video autoencoder of Open-Sora-Plan, as published NOVA folders hold it: clips to latents 4 times shorter and 8 times smaller.

Lin et al. 2024 (arXiv 2412.00131), section 2.1, under the names of diffusers. A frame is made of itself and those before it but for
the norms, which see all frames; so the first frame is a latent of its own, and an image is a clip of one frame.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scepter.core.config import Config
from scepter.core.faults import Fault, check
from scepter.core.registry import MODELS
from scepter.core.schema import param, schema_of
from scepter.models.autoencoder import DiagonalGaussian, EncoderOutput
from scepter.models.base import TrainModule
from scepter.models.layers import GROUPS, GroupNorm32, attention, to_image, to_tokens
from scepter.weights import local_copy, read_json

TILE = 17    # frames that are encoded at once; of longer clips neighbouring tiles share one


@MODELS.register_class()
class VideoAutoencoderKL(TrainModule):
    """Clips to the distribution of their latents, and back.    [B, 3, T, H, W] or [B, 3, H, W] in -1..1  <->  [B, C, (T - 1) / 4 + 1, h, w]

    Its keys are those of a published vae/config.json, in capitals. It is used frozen, as a FIRST_STAGE_MODEL.
    """

    LATENT_CHANNELS: int = param(4, 'Channels of the latent.', least=1)
    BLOCK_OUT_CHANNELS: list[int] = param([128, 256, 512, 512], 'Channels of each level; each but the last halves the size.',
                                          least=GROUPS, multiple=GROUPS)
    LAYERS_PER_BLOCK: int = param(2, 'Residual blocks per level of the encoder; in the decoder there is one more.', least=1)
    DOWN_BLOCK_TYPES: list[Literal['DownEncoderBlock2D', 'DownEncoderBlock3D']] = param(
        ['DownEncoderBlock2D', 'DownEncoderBlock2D', 'DownEncoderBlock3D', 'DownEncoderBlock3D'],
        'Whether each level sees frames one by one (2D) or together (3D). The way down into a 3D level halves the time too.')
    PRETRAINED_MODEL: str | None = param(None, 'Weights to start from: a folder of diffusers, or a file.')
    IGNORE_KEYS: list[str] = param([], 'Names or globs of weights that may be missing, left over or of another shape.')

    is_causal = True
    forward_methods = ('encode', 'decode')

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        widths, kinds = cfg.BLOCK_OUT_CHANNELS, [kind.endswith('3D') for kind in cfg.DOWN_BLOCK_TYPES]
        if len(kinds) != len(widths) or not widths:
            yield Fault('DOWN_BLOCK_TYPES', f'has {len(kinds)} entries, BLOCK_OUT_CHANNELS {len(widths)}: one per level, and at least one')
        elif kinds != sorted(kinds):
            yield Fault('DOWN_BLOCK_TYPES', 'has a 2D level behind a 3D one: frames that were joined are not parted again')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        kinds = [kind.endswith('3D') for kind in self.DOWN_BLOCK_TYPES]
        self.size_factor, self.time_factor = 2 ** (len(kinds) - 1), 2 ** sum(kinds[1:])
        self.encoder = Encoder(self.BLOCK_OUT_CHANNELS, kinds, self.LAYERS_PER_BLOCK, 2 * self.LATENT_CHANNELS)
        self.decoder = Decoder(self.BLOCK_OUT_CHANNELS[::-1], sum(kinds[1:]), self.LAYERS_PER_BLOCK + 1, self.LATENT_CHANNELS)
        self.quant_conv = nn.Conv3d(2 * self.LATENT_CHANNELS, 2 * self.LATENT_CHANNELS, 1)
        self.post_quant_conv = nn.Conv3d(self.LATENT_CHANNELS, self.LATENT_CHANNELS, 1)
        if self.PRETRAINED_MODEL is not None:
            self.load_pretrained(self.PRETRAINED_MODEL, self.IGNORE_KEYS)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> VideoAutoencoderKL:
        """That of a published folder (config.json beside the weights), local or in any store. Raises CheckpointError."""
        with local_copy(path) as folder:
            values = read_json(folder / 'config.json')
        keys = {key: values[key.lower()] for key in schema_of(cls) if key.lower() in values}
        check(schema_of(cls).faults(Config(keys), ''), f'{path}/config.json')
        return cls({**keys, 'PRETRAINED_MODEL': str(path)})

    @property
    def EMBED_DIM(self) -> int:
        """Channels of the latent, as LatentSpace asks for them."""
        return self.LATENT_CHANNELS

    def encode(self, x: Tensor) -> EncoderOutput:
        """The posterior of the latents of clips or images in -1..1.    .latent_dist.parameters [B, 2C, (T - 1) / time_factor + 1, h, w]

        Longer clips are encoded in tiles of 17 frames. Raises ValueError for a size or a number of frames that it cannot make.
        """
        if x.ndim == 4:
            return EncoderOutput(DiagonalGaussian(self.encode(x.unsqueeze(2)).latent_dist.parameters.squeeze(2)))
        frames, (height, width) = x.shape[2], x.shape[3:]
        if (frames - 1) % self.time_factor or height % self.size_factor or width % self.size_factor:
            near = 1 + max(0, round((frames - 1) / self.time_factor)) * self.time_factor
            raise ValueError(f'a clip of {frames} frames of {height}x{width} cannot be encoded: frames are 1 more than a multiple of '
                             f'{self.time_factor}, e.g. {near}, and sides multiples of {self.size_factor}')
        x = x.to(self.quant_conv.weight.dtype)
        return EncoderOutput(DiagonalGaussian(in_tiles(lambda part: self.quant_conv(self.encoder(part)), x, self._tile)))

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, t, h, w] -> clips [B, 3, (t - 1) * time_factor + 1, H, W], about -1..1; [B, C, h, w] -> images."""
        if z.ndim == 4:
            return self.decode(z.unsqueeze(2)).squeeze(2)
        z = z.to(self.quant_conv.weight.dtype)
        return in_tiles(lambda part: self.decoder(self.post_quant_conv(part)), z, (self._tile - 1) // self.time_factor + 1)

    @property
    def _tile(self) -> int:
        """Frames of a tile: such a number as makes whole latents."""
        return 1 + max(1, (TILE - 1) // self.time_factor) * self.time_factor


def in_tiles(convert: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
    """convert(x) of `tile` frames at a time; what the frame that two tiles share became is taken from the first.    [B, C, T, ...]"""
    first, *later = (convert(x[:, :, start:start + tile]) for start in range(0, max(1, x.shape[2] - 1), tile - 1))
    return torch.cat([first, *(part[:, :, 1:] for part in later)], 2) if later else first


class Encoder(nn.Module):
    """Clips to moments.    [B, 3, T, H, W] -> [B, out, t, h, w]"""

    def __init__(self, widths: list[int], kinds: list[bool], layers: int, out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        entering, ways = [widths[0], *widths], [Downsample(width, kind) for width, kind in zip(widths, kinds[1:])]
        self.down_blocks = nn.ModuleList(Level([before, *[width] * layers], kind, 'downsamplers', way)
                                         for before, width, kind, way in zip(entering, widths, kinds, [*ways, None]))
        self.mid_block = Middle(widths[-1])
        self.conv_norm_out = GroupNorm32(widths[-1], eps=1e-6)
        self.conv_out = CausalConv3d(widths[-1], out, 3)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[2]
        h = self.conv_in(x.transpose(1, 2).flatten(0, 1))    # [B*T, C, H, W], until a level sees frames together
        for block in self.down_blocks:
            h = block(h, frames)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(together(h, frames)))))


class Decoder(nn.Module):
    """Latents to clips.    [B, C, t, h, w] -> [B, 3, T, H, W].  doublings: how many of the ways up double the time, the first ones"""

    def __init__(self, widths: list[int], doublings: int, layers: int, channels: int):
        super().__init__()
        self.conv_in = CausalConv3d(channels, widths[0], 3)
        self.mid_block = Middle(widths[0])
        entering, ways = [widths[0], *widths], [Upsample(width, i < doublings) for i, width in enumerate(widths[:-1])]
        self.up_blocks = nn.ModuleList(Level([before, *[width] * layers], True, 'upsamplers', way)
                                       for before, width, way in zip(entering, widths, [*ways, None]))
        self.conv_norm_out = GroupNorm32(widths[-1], eps=1e-6)
        self.conv_out = CausalConv3d(widths[-1], 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h, z.shape[2])
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def together(x: Tensor, frames: int) -> Tensor:
    """Frames [B*T, C, H, W] as clips [B, C, T, H, W]; clips stay."""
    return x if x.ndim == 5 else x.unflatten(0, (-1, frames)).transpose(1, 2)


class CausalConv3d(nn.Conv3d):
    """A convolution that sees no later frame: before the first one stand copies of it.    [B, C, T, H, W] -> [B, D, T', H', W']

    With a stride, a row and a column of zeros at the bottom and the right are its only padding in space, as published.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, time: int | None = None):
        time = kernel if time is None else time
        super().__init__(channels, out, (time, kernel, kernel), stride, padding=(0, kernel // 2, kernel // 2) if stride == 1 else 0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, :1].expand(-1, -1, self.kernel_size[0] - 1, -1, -1), x], 2)
        return super().forward(x if self.stride[1] == 1 else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks of one size, then a change of size. Frames one by one, [B*T, C, H, W] -> [B*T, D, H', W'], or together, with T."""

    def __init__(self, widths: list[int], is_together: bool, name: str, resample: nn.Module | None):
        super().__init__()
        self.is_together, self.name = is_together, name
        self.resnets = nn.ModuleList(ResnetBlock(i, o, is_together) for i, o in pairwise(widths))
        if resample is not None:
            self.add_module(name, nn.ModuleList([resample]))    # `downsamplers` or `upsamplers`, as published

    def forward(self, x: Tensor, frames: int) -> Tensor:
        x = together(x, frames) if self.is_together else x
        for block in self.resnets:
            x = block(x)
        for resample in getattr(self, self.name, ()):
            x = resample(together(x, frames) if resample.is_together else x)
        return x


class Middle(nn.Module):
    """Residual block, attention within each frame, residual block.    [B, C, T, H, W] -> the same"""

    def __init__(self, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, True) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class ResnetBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), frames one by one or together.    [B, C, ..., H, W] -> [B, D, ..., H, W]"""

    def __init__(self, channels: int, out: int, is_together: bool):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm32(channels, eps=1e-6), GroupNorm32(out, eps=1e-6)
        if is_together:
            self.conv1, self.conv2 = CausalConv3d(channels, out, 3), CausalConv3d(out, out, 3)
        else:
            self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.conv_shortcut = nn.Conv3d(channels, out, 1) if is_together else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.conv_shortcut(x) if hasattr(self, 'conv_shortcut') else x)


class FrameAttention(nn.Module):
    """x + attention of the pixels of a frame to each other, with one head; the norm is of all frames.    [B, C, T, H, W] -> the same"""

    def __init__(self, channels: int):
        super().__init__()
        self.group_norm = GroupNorm32(channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        frames = self.group_norm(x).transpose(1, 2).flatten(0, 1)    # [B*T, C, H, W]
        h = to_tokens(frames)
        q, k, v = (linear(h).unsqueeze(2) for linear in (self.to_q, self.to_k, self.to_v))    # [B*T, H*W, 1, C]
        h = self.to_out[0](attention(q, k, v).squeeze(2))
        return x + together(to_image(h, frames), x.shape[2])


class Downsample(nn.Module):
    """Half the size, and half the time where frames are together.    [B*T, C, H, W] -> [B*T, C, H/2, W/2], or with T"""

    def __init__(self, channels: int, is_together: bool):
        super().__init__()
        self.is_together = is_together
        self.conv = CausalConv3d(channels, channels, 3, stride=2) if is_together else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.is_together else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size, and of all frames but the first twice the time; or the size alone.    [B, C, T, H, W] -> [B, C, 2T-1, 2H, 2W]"""
    is_together = True

    def __init__(self, channels: int, doubles_time: bool):
        super().__init__()
        self.doubles_time = doubles_time
        self.conv = CausalConv3d(channels, channels, 3, time=None if doubles_time else 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.doubles_time:
            return self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode='nearest'))
        first = F.interpolate(x[:, :, :1], scale_factor=(1.0, 2.0, 2.0), mode='trilinear')
        later = F.interpolate(x[:, :, 1:], scale_factor=2.0, mode='trilinear') if x.shape[2] > 1 else first[:, :, :0]
        return self.conv(torch.cat([first, later], 2))
