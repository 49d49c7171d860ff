"""The UNet of latent diffusion: Stable Diffusion 1, 2 and XL are configurations of it, under the names of their published weights.

Rombach et al. 2022 (arXiv 2112.10752), Podell et al. 2023 (2307.01952). Sizes as published:

    SD 1.5      686 tensors     859,520,964 parameters
    SD 2.1      686             865,910,724
    SDXL base   1680            2,567,463,684
    refiner     1220            2,259,526,660
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scepter.core.config import Config
from scepter.core.faults import Fault
from scepter.core.registry import BACKBONES
from scepter.core.schema import param
from scepter.models.base import BaseModel
from scepter.models.condition import Condition, Widths
from scepter.models.layers import GROUPS, GroupNorm32, SiLU, checkpoint, timestep_embedding, upsample_conv
from scepter.models.spatial_transformer import Attention, Context, KeysValues, SpatialTransformer, TransformerBlock


@BACKBONES.register_class()
class DiffusionUNet(BaseModel):
    """What a noisy latent, its time and a condition say about the clean one.    x [B, C, H, W], t [B]  ->  [B, OUT_CHANNELS, H, W]"""

    IN_CHANNELS: int = param(doc='Channels of x, and of what is `beside` it in the condition, together.', least=1)
    OUT_CHANNELS: int = param(doc='Channels of the prediction.', least=1)
    MODEL_CHANNELS: int = param(doc='Channels of the first level.', least=GROUPS, multiple=GROUPS)
    NUM_RES_BLOCKS: int | list[int] = param(doc='Residual blocks per level on the way down; one more on the way up.', least=1)
    ATTENTION_RESOLUTIONS: list[int] = param(doc='Downsampling factors (1, 2, 4, ...) whose levels have transformers.', least=1)
    CONTEXT_DIM: int | None = param(doc='Width of the text context; null for a network without cross attention.', least=1)
    CHANNEL_MULT: list[int] = param([1, 2, 4, 4], 'Channels of each level, in multiples of MODEL_CHANNELS.', least=1)
    NUM_HEADS: int | None = param(None, 'Attention heads of every transformer; give this or NUM_HEADS_CHANNELS.', least=1)
    NUM_HEADS_CHANNELS: int | None = param(None, 'Channels of an attention head.', least=1)
    TRANSFORMER_DEPTH: int | list[int] = param(1, 'Transformer blocks after each residual block; one number, or one per level.', least=0)
    TRANSFORMER_DEPTH_MIDDLE: int | None = param(None, 'Transformer blocks in the middle; null means as in the last level.', least=0)
    USE_LINEAR_IN_TRANSFORMER: bool = param(False, 'Enter and leave transformers by linear layers (SD2, SDXL), not 1x1 convolutions (SD1).')
    DISABLE_SELF_ATTENTIONS: list[bool] | None = param(None, 'One per level: whether its first attention reads the context too.')
    DISABLE_MIDDLE_SELF_ATTN: bool = param(False, 'The same for the middle.')
    NUM_CLASSES: int | Literal['continuous', 'sequential'] | None = param(
        None, 'Told beside the time: null, nothing; a number, the label of so many classes; continuous, a vector [B, 1]; sequential, '
              '[B, ADM_IN_CHANNELS] (SDXL).',
        least=1)
    ADM_IN_CHANNELS: int | None = param(None, 'Width of the vector where NUM_CLASSES is sequential.', least=1)
    DROPOUT: float = param(
        0.0, 'Share of activations dropped before the second convolution of residual blocks and in transformers.', least=0, below=1)
    CONV_RESAMPLE: bool = param(True, 'Change the size by convolutions; false: by mean and nearest neighbour alone.')
    USE_SCALE_SHIFT_NORM: bool = param(False, 'Let the time scale and shift the second norm of residual blocks, instead of being added.')
    RESBLOCK_UPDOWN: bool = param(False, 'Change the size inside residual blocks.')
    CHECKPOINTING: int = param(
        0, 'Recompute in the backward pass, to save memory: 0 nothing, 1 transformer blocks, 2 residual blocks too.', least=0)
    PRETRAINED_MODEL: str | None = param(None, 'Weights to start from.')
    IGNORE_KEYS: list[str] = param([], 'Names or globs of weights that may be missing, left over or of another shape.')

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        levels = len(cfg.CHANNEL_MULT)
        for key in ('CHANNEL_MULT', 'TRANSFORMER_DEPTH', 'NUM_RES_BLOCKS', 'DISABLE_SELF_ATTENTIONS'):
            if isinstance(cfg[key], list) and (len(cfg[key]) != levels or not levels):
                yield Fault(key, f'{key} has {len(cfg[key])} entries, CHANNEL_MULT {levels}: one per level, and at least one')
                return
        if (cfg.NUM_HEADS is None) == (cfg.NUM_HEADS_CHANNELS is None):
            yield Fault('NUM_HEADS', f'give either NUM_HEADS (got {cfg.NUM_HEADS}) or NUM_HEADS_CHANNELS (got {cfg.NUM_HEADS_CHANNELS})')
        else:
            yield from _head_faults(cfg)
        if cfg.CONTEXT_DIM is None and (any(cfg.DISABLE_SELF_ATTENTIONS or []) or cfg.DISABLE_MIDDLE_SELF_ATTN):
            yield Fault('CONTEXT_DIM', 'self-attention is disabled for cross attention, but CONTEXT_DIM is null: give the width '
                                       'of the context')
        if cfg.NUM_CLASSES == 'sequential' and cfg.ADM_IN_CHANNELS is None:
            yield Fault('ADM_IN_CHANNELS', 'NUM_CLASSES is sequential: give the width of the vector as ADM_IN_CHANNELS (2816 for SDXL)')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        levels = len(self.CHANNEL_MULT)
        depths, blocks = per_level(self.TRANSFORMER_DEPTH, levels), per_level(self.NUM_RES_BLOCKS, levels)
        cross_only = per_level(self.DISABLE_SELF_ATTENTIONS or False, levels)

        channels, time_channels = self.MODEL_CHANNELS, 4 * self.MODEL_CHANNELS
        self.time_embed = nn.Sequential(nn.Linear(channels, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels))
        if self.NUM_CLASSES is not None:
            self.label_emb = self._label_embedding(time_channels)

        def res_block(in_channels: int, out_channels: int, resample: Literal['up', 'down'] | None = None) -> ResBlock:
            return ResBlock(in_channels, out_channels, time_channels, self.DROPOUT, self.USE_SCALE_SHIFT_NORM, resample)

        def transformer(channels: int, depth: int, cross_only: bool) -> SpatialTransformer:
            heads = channels // self.NUM_HEADS_CHANNELS if self.NUM_HEADS is None else self.NUM_HEADS
            return SpatialTransformer(channels, heads, depth, self.CONTEXT_DIM, self.USE_LINEAR_IN_TRANSFORMER, self.DROPOUT, cross_only)

        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(self.IN_CHANNELS, channels, 3, padding=1))])
        skips = [channels]
        for level, mult in enumerate(self.CHANNEL_MULT):
            has_attention = 2 ** level in self.ATTENTION_RESOLUTIONS and depths[level] > 0
            for _ in range(blocks[level]):
                stage = [res_block(channels, mult * self.MODEL_CHANNELS)]
                channels = mult * self.MODEL_CHANNELS
                if has_attention:
                    stage.append(transformer(channels, depths[level], cross_only[level]))
                self.input_blocks.append(Stage(*stage))
                skips.append(channels)
            if level < levels - 1:
                down = res_block(channels, channels, 'down') if self.RESBLOCK_UPDOWN else Downsample(channels, self.CONV_RESAMPLE)
                self.input_blocks.append(Stage(down))
                skips.append(channels)

        depth = depths[-1] if self.TRANSFORMER_DEPTH_MIDDLE is None else self.TRANSFORMER_DEPTH_MIDDLE
        attentions = [transformer(channels, depth, self.DISABLE_MIDDLE_SELF_ATTN)] if depth else []
        self.middle_block = Stage(res_block(channels, channels), *attentions, res_block(channels, channels))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(self.CHANNEL_MULT))):
            has_attention = 2 ** level in self.ATTENTION_RESOLUTIONS and depths[level] > 0
            for i in range(blocks[level] + 1):
                stage = [res_block(channels + skips.pop(), mult * self.MODEL_CHANNELS)]
                channels = mult * self.MODEL_CHANNELS
                if has_attention:
                    stage.append(transformer(channels, depths[level], cross_only[level]))
                if level and i == blocks[level]:
                    stage.append(res_block(channels, channels, 'up') if self.RESBLOCK_UPDOWN else Upsample(channels, self.CONV_RESAMPLE))
                self.output_blocks.append(Stage(*stage))

        self.out = nn.Sequential(GroupNorm32(channels), SiLU(), nn.Conv2d(channels, self.OUT_CHANNELS, 3, padding=1))
        self._share_context()
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.is_checkpointed = self.CHECKPOINTING >= 2
            elif isinstance(module, TransformerBlock):
                module.is_checkpointed = self.CHECKPOINTING >= 1
        if self.PRETRAINED_MODEL:
            self.load_pretrained(self.PRETRAINED_MODEL, self.IGNORE_KEYS)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | Condition | None = None) -> Tensor:
        """x [B, C, H, W] of any size, t [B], cond  ->  [B, OUT_CHANNELS, H, W]

        cond: the text context [B, L, CONTEXT_DIM], or a Condition, whose vector or label NUM_CLASSES tells, and whose context may be what
        `precompute` made of it. Raises ValueError where a part of it is missing or too many.
        """
        cond = self._read_condition(cond)
        dtype = x.dtype
        embedding = self.time_embed(timestep_embedding(t, self.MODEL_CHANNELS).to(self.dtype))
        if cond.label is not None:
            embedding = embedding + self.label_emb(cond.label)
        elif cond.vector is not None:
            embedding = embedding + self.label_emb(cond.vector.to(self.dtype))
        context = None
        if cond.context is not None:
            known = cond.context if isinstance(cond.context, KeysValues) else cond.context.to(self.dtype)
            context = Context(known, None if cond.mask is None else cond.mask[:, None, None])    # mask [B, 1, 1, L]
        if cond.beside is not None:
            x = torch.cat([x, cond.beside.to(x.dtype)], dim=1)
        if x.shape[1] != self.IN_CHANNELS:
            raise ValueError(f'x has {x.shape[1]} channels{"" if cond.beside is None else " with what is beside it"}, but IN_CHANNELS is '
                             f'{self.IN_CHANNELS}')

        x, skips = x.to(self.dtype), []
        for stage in self.input_blocks:
            x = stage(x, embedding, context)
            skips.append(x)
        x = self.middle_block(x, embedding, context)
        for stage in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, embedding, context, tuple(skips[-1].shape[2:]) if skips else None)
        return self.out(x).to(dtype)

    @torch.no_grad()
    def precompute(self, cond: Tensor | Condition | None) -> Condition:
        """The condition with the keys and values of its context already computed, for sampling: they are the same at every step.

        The result is a condition like any other, whose context is KeysValues. K is 24,960 for SD1.5.
        """
        cond = self._read_condition(cond)
        if not isinstance(cond.context, Tensor):
            return cond
        context = cond.context.to(self.dtype)
        layers = (layer for attn in self._cross_attentions() for layer in (attn.to_k, attn.to_v))
        return cond._replace(context=KeysValues(torch.cat([layer(context) for layer in layers], dim=-1)))

    def main_blocks(self) -> list[nn.Module]:
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    @property
    def takes(self) -> Widths:
        """What it is told, and what x is."""
        vector = {'sequential': self.ADM_IN_CHANNELS, 'continuous': 1}.get(str(self.NUM_CLASSES))
        return Widths(self.CONTEXT_DIM, vector, self.NUM_CLASSES if isinstance(self.NUM_CLASSES, int) else None, mask=True,
                      channels=self.OUT_CHANNELS, beside=self.IN_CHANNELS - self.OUT_CHANNELS or None)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, in which it computes."""
        return self.out[2].weight.dtype

    def _read_condition(self, cond: Tensor | Condition | None) -> Condition:
        """The condition, whose parts are those that the network takes. Raises ValueError where they are not."""
        cond, takes = Condition.of(cond), self.takes
        has_context = cond.context is not None
        if has_context != (self.CONTEXT_DIM is not None):
            raise ValueError(f'CONTEXT_DIM is {self.CONTEXT_DIM}, so the condition must have {"no" if has_context else "a"} context')
        if isinstance(cond.context, Tensor) and cond.context.shape[-1] != self.CONTEXT_DIM:
            raise ValueError(f'the context is {cond.context.shape[-1]} wide, but CONTEXT_DIM is {self.CONTEXT_DIM}: is it of another text '
                             'encoder?')
        for part, value, taken in (('vector', cond.vector, takes.vector), ('label', cond.label, takes.classes)):
            if (value is not None) != (taken is not None):
                raise ValueError(f'NUM_CLASSES is {self.NUM_CLASSES}, so the condition must have {"a" if value is None else "no"} {part}')
        if cond.mask is not None:
            rows = (cond.context.of_all_layers if isinstance(cond.context, KeysValues) else cond.context).shape[:2]
            if cond.mask.shape != rows or cond.mask.dtype != torch.bool:
                raise ValueError(f'the mask is {cond.mask.dtype} {list(cond.mask.shape)}, expected bool {list(rows)}, as the context has '
                                 'tokens')
        return cond

    def _label_embedding(self, width: int) -> nn.Module:
        if isinstance(self.NUM_CLASSES, int):
            return nn.Embedding(self.NUM_CLASSES, width)
        if self.NUM_CLASSES == 'continuous':
            return nn.Linear(1, width)
        # a Sequential in a Sequential: label_emb.0.0 and label_emb.0.2 are the published names
        return nn.Sequential(nn.Sequential(nn.Linear(self.ADM_IN_CHANNELS, width), nn.SiLU(), nn.Linear(width, width)))

    def _cross_attentions(self) -> Iterator[Attention]:
        return (m for m in self.modules() if isinstance(m, Attention) and m.reads_context)

    def _share_context(self) -> None:
        """Tell every layer where its keys and values stand in what `precompute` makes."""
        start = 0
        for attn in self._cross_attentions():
            attn.place = (start, start + 2 * attn.channels)
            start += 2 * attn.channels


def per_level(value: Any, levels: int) -> list[Any]:
    """A value for each level: the list itself, or one value for all."""
    return value if isinstance(value, list) else [value] * levels


def _head_faults(cfg: Config) -> Iterator[Fault]:
    """The first transformer whose channels its heads cannot share."""
    depths = per_level(cfg.TRANSFORMER_DEPTH, len(cfg.CHANNEL_MULT))
    widths = [mult for level, mult in enumerate(cfg.CHANNEL_MULT) if 2 ** level in cfg.ATTENTION_RESOLUTIONS and depths[level]]
    if depths[-1] if cfg.TRANSFORMER_DEPTH_MIDDLE is None else cfg.TRANSFORMER_DEPTH_MIDDLE:
        widths.append(cfg.CHANNEL_MULT[-1])
    key = 'NUM_HEADS' if cfg.NUM_HEADS_CHANNELS is None else 'NUM_HEADS_CHANNELS'
    for channels in (mult * cfg.MODEL_CHANNELS for mult in widths):
        if channels % cfg[key]:
            shared = f'shared by {cfg[key]} attention heads' if key == 'NUM_HEADS' else f'cut into heads of {cfg[key]}'
            yield Fault(key, f'{channels} channels cannot be {shared}')
            return


class Stage(nn.Sequential):
    """Residual blocks, transformers and changes of size, one after the other."""

    def forward(self, x: Tensor, embedding: Tensor, context: Context | None, size: tuple[int, int] | None = None) -> Tensor:
        """x [B, C, H, W], embedding [B, E], context -> [B, D, H', W']; size: of the next skip, for what enlarges."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding, size)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + time))), zero at first.    x [B, C, H, W], embedding [B, E]  ->  [B, D, H, W]"""
    is_checkpointed = False

    def __init__(self, in_channels: int, out_channels: int, embedding_channels: int, dropout: float,
                 scale_shift: bool = False, resample: Literal['up', 'down'] | None = None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(GroupNorm32(in_channels), SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_channels, 2 * out_channels if scale_shift else out_channels))
        self.out_layers = nn.Sequential(GroupNorm32(out_channels), SiLU(), nn.Dropout(dropout),
                                        nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip_connection = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return checkpoint(self._forward, x, embedding, size) if self.is_checkpointed else self._forward(x, embedding, size)

    def _forward(self, x: Tensor, embedding: Tensor, size: tuple[int, int] | None) -> Tensor:
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.resample == 'up':
            h, x = (F.interpolate(a, size=size, mode='nearest') for a in (h, x))
        elif self.resample == 'down':
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        h = conv(h)

        norm, *rest = self.out_layers
        embedding = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = embedding.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h.add_(embedding))
        for layer in rest:
            h = layer(h)
        return h.add_(self.skip_connection(x))


class Downsample(nn.Module):
    """Half the size, by a convolution of stride 2 or by the mean of 2x2.    [B, C, H, W] -> [B, C, ceil(H/2), ceil(W/2)]"""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Enlarge by nearest neighbour to a given size, then convolve.    [B, C, H, W] -> [B, C, *size]"""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(x, size=size, mode='nearest') if self.conv is None else upsample_conv(x, self.conv, size)
