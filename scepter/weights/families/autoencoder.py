"""The autoencoder of Stable Diffusion: its names, its config and its shapes, as ours and as diffusers' AutoencoderKL."""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from scepter.weights.family import Part
from scepter.weights.said import Node, Said, Settings, Shapes
from scepter.weights.tables import Row

ATTENTION = {'q': 'to_q', 'k': 'to_k', 'v': 'to_v', 'proj_out': 'to_out.0'}
OLD_ATTENTION = {'q': 'query', 'k': 'key', 'v': 'value', 'proj_out': 'proj_attn'}    # diffusers before 0.18


# ---------------------------------------------------------------- names
def rows(names: Collection[str]) -> Iterator[Row]:
    """CompVis counts the decoder's levels from the picture, diffusers from the latent."""
    for side, ours, theirs, sampler in (('encoder', 'down', 'down_blocks', 'downsample'), ('decoder', 'up', 'up_blocks', 'upsample')):
        levels = len({name.split('.')[2] for name in names if name.startswith((f'{side}.{ours}.', f'{side}.{theirs}.'))})
        for level in range(levels):
            a, b = f'{side}.{ours}.{level}', f'{side}.{theirs}.{level if side == "encoder" else levels - 1 - level}'
            yield Row(f'{a}.block.{{n}}', f'{b}.resnets.{{n}}')
            yield Row(f'{a}.block.{{n}}.nin_shortcut', f'{b}.resnets.{{n}}.conv_shortcut')
            yield from _attention(f'{a}.attn.{{n}}', f'{b}.attentions.{{n}}')
            yield Row(f'{a}.{sampler}.conv', f'{b}.{sampler}rs.0.conv')
        yield from (Row(f'{side}.mid.block_{n + 1}', f'{side}.mid_block.resnets.{n}') for n in range(2))
        yield from _attention(f'{side}.mid.attn_1', f'{side}.mid_block.attentions.0')
        yield from (Row(f'{side}.{end}', f'{side}.{end}') for end in ('conv_in', 'conv_out'))
        yield Row(f'{side}.norm_out', f'{side}.conv_norm_out')
    yield from (Row(end, end) for end in ('quant_conv', 'post_quant_conv'))


def _attention(ours: str, theirs: str) -> Iterator[Row]:
    """Its 1x1 convolutions are linear layers there."""
    yield Row(f'{ours}.norm', f'{theirs}.group_norm')
    yield from (Row(f'{ours}.{a}', f'{theirs}.{b}', 'conv') for table in (ATTENTION, OLD_ATTENTION) for a, b in table.items())


VAE = Part('vae', 'first_stage_model.', rows, 'autoencoder', 'FIRST_STAGE_MODEL',
           r'^(vae\.|first_stage_model\.)?((encoder|decoder)\.(conv_in|mid|down|up)|(post_)?quant_conv)')


# ---------------------------------------------------------------- theirs as ours
VAE_DEFAULTS = {'in_channels': 3, 'out_channels': 3, 'block_out_channels': (64,), 'layers_per_block': 1, 'latent_channels': 4,
                'norm_num_groups': 32, 'scaling_factor': 0.18215, 'shift_factor': None, 'use_quant_conv': True, 'use_post_quant_conv': True}
VAE_ONLY: dict[str, tuple[Any, ...]] = {
    'act_fn': ('silu', 'swish'), 'down_block_types': ('DownEncoderBlock2D',),
    'up_block_types': ('UpDecoderBlock2D',), 'mid_block_add_attention': (True,), 'latents_mean': (), 'latents_std': ()}


def read_config(values: Mapping[str, Any], folder: str, file: str = 'vae/config.json') -> Node:
    """diffusers' AutoencoderKL as ours."""
    s = Settings(values, file, folder, VAE_DEFAULTS)
    with s.reading():
        s.expect_class('AutoencoderKL')
        s.only(VAE_ONLY, 'an AutoencoderKL')
        if s.flag('use_quant_conv') != s.flag('use_post_quant_conv'):
            raise s.refusal('use_quant_conv', 'USE_CONV is one for both: expected it to be as use_post_quant_conv')
        width, mult = s.multiples('block_out_channels')
        latent = s.said(s.number('latent_channels'), 'latent_channels')
        half = {'CH': s.said(width, 'block_out_channels'), 'CH_MULT': s.said(mult, 'block_out_channels'),
                'NUM_RES_BLOCKS': s.said(s.number('layers_per_block', most=100), 'layers_per_block'), 'Z_CHANNELS': latent,
                'NORM_GROUPS': s.said(s.number('norm_num_groups'), 'norm_num_groups')}
        return {'NAME': 'AutoencoderKL', 'EMBED_DIM': latent, 'USE_CONV': s.said(s.flag('use_quant_conv'), 'use_quant_conv'),
                'ENCODER': {'NAME': 'Encoder', **half, 'IN_CHANNELS': s.said(s.number('in_channels'), 'in_channels')},
                'DECODER': {'NAME': 'Decoder', **half, 'OUT_CH': s.said(s.number('out_channels'), 'out_channels')}}


def latent(values: Mapping[str, Any], folder: str, file: str = 'vae/config.json') -> dict[str, Said]:
    """SCALE_FACTOR and SHIFT_FACTOR."""
    s = Settings(values, file, folder, VAE_DEFAULTS)
    with s.reading():
        scale = float(s['scaling_factor'])
        if not 0 < scale < float('inf'):
            raise s.refusal('scaling_factor', 'expected a number above 0')
        shift = float(s['shift_factor'] or 0)
        if not abs(shift) < float('inf'):
            raise s.refusal('shift_factor', 'expected a number')
        return {'SCALE_FACTOR': s.said(scale, 'scaling_factor'), 'SHIFT_FACTOR': s.said(shift, 'shift_factor')}


# ---------------------------------------------------------------- shapes as ours
def read_shapes(shapes: Shapes) -> Node:
    """An AutoencoderKL."""
    z, is_conv = shapes.size('decoder.conv_in.weight', 1), 'post_quant_conv.weight' in shapes.weights
    embed = shapes.size('post_quant_conv.weight', 1) if is_conv else z
    return {'NAME': 'AutoencoderKL', 'EMBED_DIM': embed, 'USE_CONV': Said(is_conv, 'whether there is a post_quant_conv'),
            'ENCODER': {'NAME': 'Encoder', **_half(shapes, 'encoder.down', 0, z), 'IN_CHANNELS': shapes.size('encoder.conv_in.weight', 1)},
            'DECODER': {'NAME': 'Decoder', **_half(shapes, 'decoder.up', 1, z), 'OUT_CH': shapes.size('decoder.conv_out.weight', 0)}}


def _half(shapes: Shapes, side: str, extra: int, z: Said) -> Node:
    levels = shapes.count(side)
    blocks = {shapes.count(f'{side}.{i}.block') - extra for i in range(levels)}
    channels = [shapes.size(f'{side}.{i}.block.0.conv2.weight', 0) for i in range(levels)]
    if len(blocks) != 1:
        raise shapes.refusal(side, 'is no list of levels with equally many blocks')
    attends = [2 ** i for i in range(levels) if shapes.count(f'{side}.{i}.attn')]
    return {'CH': channels[0], 'CH_MULT': Said(shapes.multiples([c.value for c in channels], channels[0], side), f'the shapes of {side}'),
            'NUM_RES_BLOCKS': Said(blocks.pop(), f'the names of {side}'), 'Z_CHANNELS': z,
            **({'ATTN_RESOLUTIONS': Said(attends, f'the names of {side}')} if attends else {})}


# ---------------------------------------------------------------- ours as theirs
def write_config(model: nn.Module, image_size: int | Sequence[int], size_factor: int) -> dict[str, Any]:
    """The config of diffusers' AutoencoderKL, of a network that draws pictures of this size. Raises ValueError for what it cannot be."""
    vae = model.first_stage_model
    encoder, decoder = vae.encoder, vae.decoder
    if encoder.ATTN_RESOLUTIONS or decoder.ATTN_RESOLUTIONS or not encoder.RESAMP_WITH_CONV or vae.EMBED_DIM != encoder.Z_CHANNELS \
            or any(getattr(encoder, key) != getattr(decoder, key) for key in ('CH', 'CH_MULT', 'NUM_RES_BLOCKS', 'NORM_GROUPS')):
        raise ValueError('diffusers has no such autoencoder (attention outside the middle, other resampling, or two unlike halves)')
    levels, size = len(encoder.CH_MULT), image_size if isinstance(image_size, int) else max(image_size)
    return {'_class_name': 'AutoencoderKL', 'in_channels': encoder.IN_CHANNELS, 'out_channels': decoder.OUT_CH,
            'down_block_types': ['DownEncoderBlock2D'] * levels, 'up_block_types': ['UpDecoderBlock2D'] * levels,
            'block_out_channels': [m * encoder.CH for m in encoder.CH_MULT], 'layers_per_block': encoder.NUM_RES_BLOCKS,
            'norm_num_groups': encoder.NORM_GROUPS,
            'latent_channels': vae.EMBED_DIM, 'sample_size': size // size_factor * size_factor,
            'scaling_factor': model.SCALE_FACTOR, 'shift_factor': model.SHIFT_FACTOR or None, 'use_quant_conv': vae.USE_CONV,
            'use_post_quant_conv': vae.USE_CONV}
