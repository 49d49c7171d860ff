"""The two halves of the autoencoder: convolutions from an image to the moments of its latent, and from a latent to an image.

Esser et al. 2021 (arXiv 2012.09841) and Rombach et al. 2022 (2112.10752); the names are those of the published weights.
"""
from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scepter.core.config import Config
from scepter.core.faults import Fault
from scepter.core.registry import BACKBONES
from scepter.core.schema import param
from scepter.models.base import BaseModel
from scepter.models.layers import GROUPS, GroupNorm32, SiLU, attention, checkpoint, to_image, to_tokens, upsample_conv


class Coder(BaseModel):
    """What both halves declare: levels of residual blocks, each level of half the size of the one before it."""

    CH: int = param(128, 'Channels of the first level, that of the image; a multiple of NORM_GROUPS.', least=1)
    CH_MULT: list[int] = param([1, 2, 4, 4], 'Channels of each level, in multiples of CH, that of the image first.', least=1)
    NUM_RES_BLOCKS: int = param(2, 'Residual blocks of each level; a decoder has one more.', least=0)
    ATTN_RESOLUTIONS: list[int] = param([], 'Downsampling factors (1, 2, 4, ...) whose levels have attention.', least=1)
    Z_CHANNELS: int = param(4, 'Channels of the latent.', least=1)
    DROPOUT: float = param(0.0, 'Share of activations dropped before the second convolution of residual blocks.', least=0, below=1)
    RESAMP_WITH_CONV: bool = param(True, 'Change the size with a convolution; false: by means, or repeating.')
    NORM_GROUPS: int = param(GROUPS, 'Groups of the normalisation. Where each is one channel, a small network forgets flat colours.',
                             least=1)
    CHECKPOINTING: int = param(0, 'From 3 on, residual blocks are recomputed in the backward pass, to save memory.', least=0)

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if not cfg.CH_MULT:
            yield Fault('CH_MULT', 'expected one entry per level, and at least one')
        if cfg.CH % cfg.NORM_GROUPS:
            yield Fault('CH', f'{cfg.CH} channels cannot be normalised in {cfg.NORM_GROUPS} groups (NORM_GROUPS): expected a multiple '
                              'of it')


@BACKBONES.register_class()
class Encoder(Coder):
    """Image to the moments of its latent.    [B, IN_CHANNELS, H, W]  ->  [B, 2 * Z_CHANNELS, h, w]"""

    IN_CHANNELS: int = param(3, 'Channels of the image.', least=1)
    DOUBLE_Z: bool = param(True, 'Give means and log-variances; false: one value per latent.')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        channels = self.CH
        self.conv_in = nn.Conv2d(self.IN_CHANNELS, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, mult in enumerate(self.CH_MULT):
            has_attention, last = 2 ** level in self.ATTN_RESOLUTIONS, level == len(self.CH_MULT) - 1
            widths = [channels] + [mult * self.CH] * self.NUM_RES_BLOCKS
            channels = widths[-1]
            self.down.append(Level(widths, has_attention, self.DROPOUT, self.NORM_GROUPS, 'downsample',
                                   None if last else Downsample(channels, self.RESAMP_WITH_CONV)))
        self.mid = Middle(channels, self.DROPOUT, self.NORM_GROUPS)
        self.norm_out = GroupNorm32(channels, eps=1e-6, groups=self.NORM_GROUPS)
        self.act_out = SiLU()
        self.conv_out = nn.Conv2d(channels, (1 + self.DOUBLE_Z) * self.Z_CHANNELS, 3, padding=1)
        set_checkpointing(self, self.CHECKPOINTING >= 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.act_out(self.norm_out(self.mid(x))))


@BACKBONES.register_class()
class Decoder(Coder):
    """Latent to image.    [B, Z_CHANNELS, h, w]  ->  [B, OUT_CH, H, W]"""

    OUT_CH: int = param(3, 'Channels of the image.', least=1)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        channels = self.CH * self.CH_MULT[-1]
        self.conv_in = nn.Conv2d(self.Z_CHANNELS, channels, 3, padding=1)
        self.mid = Middle(channels, self.DROPOUT, self.NORM_GROUPS)
        up = []
        for level, mult in reversed(list(enumerate(self.CH_MULT))):
            widths = [channels] + [mult * self.CH] * (self.NUM_RES_BLOCKS + 1)
            channels = widths[-1]
            up.append(Level(widths, 2 ** level in self.ATTN_RESOLUTIONS, self.DROPOUT, self.NORM_GROUPS, 'upsample',
                            Upsample(channels, self.RESAMP_WITH_CONV) if level else None))
        self.up = nn.ModuleList(reversed(up))    # up.0 is the largest image, as published
        self.norm_out = GroupNorm32(channels, eps=1e-6, groups=self.NORM_GROUPS)
        self.act_out = SiLU()
        self.conv_out = nn.Conv2d(channels, self.OUT_CH, 3, padding=1)
        set_checkpointing(self, self.CHECKPOINTING >= 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.act_out(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks of one size, each with attention or not, then a change of size.    [B, C, H, W] -> [B, D, H', W']"""

    def __init__(self, widths: list[int], has_attention: bool, dropout: float, groups: int, name: str, resample: nn.Module | None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(i, o, dropout, groups) for i, o in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(width, groups) for width in widths[1:]) if has_attention else nn.ModuleList()
        self.resample = name if resample is not None else None
        if resample is not None:
            self.add_module(name, resample)    # `downsample` or `upsample`, as published

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x if self.resample is None else getattr(self, self.resample)(x)


class Middle(nn.Module):
    """Residual block, attention, residual block.    [B, C, H, W] -> [B, C, H, W]"""

    def __init__(self, channels: int, dropout: float, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, dropout, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResnetBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))).    [B, C, H, W] -> [B, D, H, W]"""
    is_checkpointed = False

    def __init__(self, in_channels: int, out_channels: int, dropout: float, groups: int):
        super().__init__()
        self.norm1 = GroupNorm32(in_channels, eps=1e-6, groups=groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm32(out_channels, eps=1e-6, groups=groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.act, self.dropout = SiLU(), nn.Dropout(dropout)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, x) if self.is_checkpointed else self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(self.dropout(self.act(self.norm2(h))))
        return h.add_(self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """x + attention of its pixels to each other, with one head.    [B, C, H, W] -> [B, C, H, W]"""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm32(channels, eps=1e-6, groups=groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (to_tokens(conv(h)).unsqueeze(2) for conv in (self.q, self.k, self.v))    # [B, H*W, 1, C]
        h = attention(q, k, v).squeeze(2)
        return self.proj_out(to_image(h, x)).add_(x)


class Downsample(nn.Module):
    """Half the size.    [B, C, H, W] -> [B, C, H/2, W/2]"""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if use_conv else nn.AvgPool2d(2)
        self.use_conv = use_conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.use_conv else x)    # padded at the right and below alone, as published


class Upsample(nn.Module):
    """Twice the size by nearest neighbour, then a convolution.    [B, C, H, W] -> [B, C, 2H, 2W]"""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode='nearest') if self.conv is None else upsample_conv(x, self.conv)


def set_checkpointing(network: nn.Module, is_checkpointed: bool) -> None:
    """Have the residual blocks of a network computed again in the backward pass, or not."""
    for module in network.modules():
        if isinstance(module, ResnetBlock):
            module.is_checkpointed = is_checkpointed
