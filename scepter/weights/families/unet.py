"""The UNet of Stable Diffusion: its names, its config and its shapes, as ours and as diffusers' UNet2DConditionModel."""
from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from scepter.weights.family import Part
from scepter.weights.said import Node, Said, Settings, Shapes
from scepter.weights.tables import Row

RESNET = {'in_layers.0': 'norm1', 'in_layers.2': 'conv1', 'emb_layers.1': 'time_emb_proj', 'out_layers.0': 'norm2', 'out_layers.3': 'conv2',
          'skip_connection': 'conv_shortcut'}
ENDS = (Row('time_embed.0', 'time_embedding.linear_1'), Row('time_embed.2', 'time_embedding.linear_2'),
        Row('label_emb.0.0', 'add_embedding.linear_1'), Row('label_emb.0.2', 'add_embedding.linear_2'),
        Row('input_blocks.0.0', 'conv_in'), Row('out.0', 'conv_norm_out'), Row('out.2', 'conv_out'))


# ---------------------------------------------------------------- names
def rows(names: Collection[str]) -> Iterator[Row]:
    """Walks through the blocks as data meets them, whichever naming the names are of: a level ends where the resolution changes."""
    heads = {'.'.join(words[:cut]) for name in names for words in [name.split('.')] for cut in range(1, len(words) + 1)}

    def has(*modules: str) -> bool:
        return not heads.isdisjoint(modules)

    def resnet(ours: str, theirs: str) -> Iterator[Row]:
        return (Row(f'{ours}.{a}', f'{theirs}.{b}') for a, b in RESNET.items())

    yield from ENDS
    n, level = 1, 0
    while has(f'input_blocks.{n}', f'down_blocks.{level}'):
        place, block = 0, f'down_blocks.{level}'
        while has(f'input_blocks.{n}.0.in_layers', f'{block}.resnets.{place}'):
            yield from resnet(f'input_blocks.{n}.0', f'{block}.resnets.{place}')
            if has(f'input_blocks.{n}.1', f'{block}.attentions.{place}'):
                yield Row(f'input_blocks.{n}.1', f'{block}.attentions.{place}')
            n, place = n + 1, place + 1
        if has(f'input_blocks.{n}.0.op', f'{block}.downsamplers'):
            yield Row(f'input_blocks.{n}.0.op', f'{block}.downsamplers.0.conv')
            n += 1
        elif not place:
            break    # a block of another kind: what stands below has no counterpart
        level += 1
    has_attention = has('middle_block.2', 'mid_block.attentions')
    yield from resnet('middle_block.0', 'mid_block.resnets.0')
    yield from [Row('middle_block.1', 'mid_block.attentions.0')] if has_attention else ()
    yield from resnet(f'middle_block.{2 if has_attention else 1}', 'mid_block.resnets.1')
    yield from _up_rows(has, resnet)


def _up_rows(has: Any, resnet: Any) -> Iterator[Row]:
    n = level = place = 0
    while has(f'output_blocks.{n}', f'up_blocks.{level}.resnets.{place}'):
        block = f'up_blocks.{level}'
        yield from resnet(f'output_blocks.{n}.0', f'{block}.resnets.{place}')
        kid = 1
        if has(f'output_blocks.{n}.1.norm', f'{block}.attentions.{place}'):
            yield Row(f'output_blocks.{n}.1', f'{block}.attentions.{place}')
            kid = 2
        is_last = not has(f'{block}.resnets.{place + 1}')    # of its level, where the names are theirs
        if has(f'output_blocks.{n}.{kid}.conv') or (is_last and has(f'{block}.upsamplers')):
            yield Row(f'output_blocks.{n}.{kid}.conv', f'{block}.upsamplers.0.conv')
            level, place = level + 1, -1
        n, place = n + 1, place + 1


UNET = Part('unet', 'model.', rows, 'UNet', 'DIFFUSION_MODEL',
            r'^(unet\.|model\.(diffusion_model\.)?)?((input|output)_blocks\.\d|middle_block\.|time_embed\.\d'
            r'|(down|up)_blocks\.\d+\.attentions|time_embedding\.linear)')


# ---------------------------------------------------------------- theirs as ours
UNET_DEFAULTS = {
    'in_channels': 4, 'out_channels': 4, 'sample_size': None, 'block_out_channels': (320, 640, 1280, 1280), 'layers_per_block': 2,
    'down_block_types': ('CrossAttnDownBlock2D',) * 3 + ('DownBlock2D',), 'up_block_types': ('UpBlock2D',) + ('CrossAttnUpBlock2D',) * 3,
    'cross_attention_dim': 1280, 'attention_head_dim': 8, 'transformer_layers_per_block': 1, 'use_linear_projection': False}
# what changes the network and has one value with us
UNET_ONLY: dict[str, tuple[Any, ...]] = {
    'norm_num_groups': (32,), 'norm_eps': (1e-5,), 'act_fn': ('silu', 'swish'), 'mid_block_type': ('UNetMidBlock2DCrossAttn',),
    'center_input_sample': (False,), 'flip_sin_to_cos': (True,), 'freq_shift': (0,), 'downsample_padding': (1,),
    'mid_block_scale_factor': (1,), 'only_cross_attention': (False,), 'dual_cross_attention': (False,),
    'mid_block_only_cross_attention': (False,), 'cross_attention_norm': (), 'reverse_transformer_layers_per_block': (),
    'encoder_hid_dim': (), 'encoder_hid_dim_type': (), 'class_embed_type': (), 'num_class_embeds': (), 'class_embeddings_concat': (False,),
    'addition_embed_type': (None, 'text_time'), 'resnet_time_scale_shift': ('default',), 'resnet_skip_time_act': (False,),
    'resnet_out_scale_factor': (1,), 'time_embedding_type': ('positional',), 'time_embedding_dim': (), 'time_embedding_act_fn': (),
    'timestep_post_act': (), 'time_cond_proj_dim': (), 'conv_in_kernel': (3,), 'conv_out_kernel': (3,),
    'attention_type': ('default', 'vanilla')}


def read_config(values: Mapping[str, Any], folder: str, file: str = 'unet/config.json') -> Node:
    """A UNet2DConditionModel as a DiffusionUNet."""
    s = Settings(values, file, folder, UNET_DEFAULTS)
    with s.reading():
        s.expect_class('UNet2DConditionModel')
        s.only(UNET_ONLY, 'a DiffusionUNet')
        if values.get('mid_block_type', '') is None:
            raise s.refusal('mid_block_type', 'a DiffusionUNet has a middle')
        width, mult = s.multiples('block_out_channels')
        has = _levels_with_attention(s, len(mult))
        depths, context = s['transformer_layers_per_block'], s['cross_attention_dim']
        if isinstance(depths, list | tuple) and not all(type(d) is int for d in depths):
            raise s.refusal('transformer_layers_per_block', 'TRANSFORMER_DEPTH knows one number, or one for each level')
        contexts = set(s.numbers('cross_attention_dim') if isinstance(context, list | tuple) else [s.number('cross_attention_dim')])
        if len(contexts) > 1:
            raise s.refusal('cross_attention_dim', 'CONTEXT_DIM is one for all levels')
        node = {
            'NAME': 'DiffusionUNet',
            'IN_CHANNELS': s.said(s.number('in_channels'), 'in_channels'),
            'OUT_CHANNELS': s.said(s.number('out_channels'), 'out_channels'),
            'MODEL_CHANNELS': s.said(width, 'block_out_channels'),
            'CHANNEL_MULT': s.said(mult, 'block_out_channels'),
            'NUM_RES_BLOCKS': s.said(_one_or_list(s, 'layers_per_block', len(mult)), 'layers_per_block'),
            'ATTENTION_RESOLUTIONS': s.said([2 ** level for level, h in enumerate(has) if h], 'down_block_types'),
            'TRANSFORMER_DEPTH': s.said(_one_or_list(s, 'transformer_layers_per_block', len(mult)), 'transformer_layers_per_block'),
            **_heads(s, [width * m for m in mult], has),
            'USE_LINEAR_IN_TRANSFORMER': s.said(s.flag('use_linear_projection'), 'use_linear_projection'),
            'CONTEXT_DIM': s.said(contexts.pop(), 'cross_attention_dim')}
        if s.get('addition_embed_type') is not None:
            node['NUM_CLASSES'] = s.said('sequential', 'addition_embed_type')
            node['ADM_IN_CHANNELS'] = s.said(s.number('projection_class_embeddings_input_dim'), 'projection_class_embeddings_input_dim')
        return node


def _levels_with_attention(s: Settings, levels: int) -> list[bool]:
    down, up = list(s['down_block_types']), list(s['up_block_types'])
    if len(down) != levels or not set(down) <= {'CrossAttnDownBlock2D', 'DownBlock2D'}:
        raise s.refusal('down_block_types', f'expected CrossAttnDownBlock2D or DownBlock2D for each of {levels} levels')
    has = [kind == 'CrossAttnDownBlock2D' for kind in down]
    if up != ['CrossAttnUpBlock2D' if h else 'UpBlock2D' for h in reversed(has)]:
        raise s.refusal('up_block_types', 'expected the levels of down_block_types in reverse')
    return has


def _heads(s: Settings, channels: list[int], has: list[bool]) -> Node:
    """NUM_HEADS or NUM_HEADS_CHANNELS, whichever says it for every level with attention and for the middle."""
    key = 'num_attention_heads' if s.values.get('num_attention_heads') else 'attention_head_dim'    # both count heads
    heads = s.numbers(key) if isinstance(s[key], list | tuple) else [s.number(key)] * len(channels)
    if len(heads) != len(channels):
        raise s.refusal(key, f'expected one for each of {len(channels)} levels')
    used = [(c, h) for c, h, is_used in zip(channels, heads, [*has[:-1], True]) if is_used]
    if any(c % h for c, h in used):
        raise s.refusal(key, f'{channels} channels cannot be shared by so many heads')
    if len({h for _, h in used}) == 1:
        return {'NUM_HEADS': s.said(used[0][1], key)}
    if len({c // h for c, h in used}) == 1:
        return {'NUM_HEADS_CHANNELS': s.said(used[0][0] // used[0][1], key)}
    raise s.refusal(key, 'expected either as many heads or as many channels of a head on every level (NUM_HEADS, NUM_HEADS_CHANNELS)')


def _one_or_list(s: Settings, key: str, levels: int) -> int | list[int]:
    if not isinstance(s[key], list | tuple):
        return s.number(key, most=100)
    found = s.numbers(key)
    if len(found) != levels or max(found) > 100:
        raise s.refusal(key, f'expected one in 1..100 for each of {levels} levels')
    return found[0] if len(set(found)) == 1 else found


# ---------------------------------------------------------------- shapes as ours
BLOCK = 'transformer_blocks.0'


def read_shapes(shapes: Shapes) -> Node:
    """A DiffusionUNet."""
    first = shapes.size('input_blocks.0.0.weight', 0)
    levels: list[list[tuple[int, int]]] = [[]]    # (channels, transformer blocks) of each residual block
    for n in range(1, shapes.count('input_blocks')):
        if f'input_blocks.{n}.0.op.weight' in shapes.weights:
            levels.append([])
        else:
            channels = shapes.size(f'input_blocks.{n}.0.out_layers.3.weight', 0).value
            levels[-1].append((channels, shapes.count(f'input_blocks.{n}.1.transformer_blocks')))
    ups = [n for n in shapes.weights if re.fullmatch(r'output_blocks\.\d+\.[12]\.conv\.weight', n)]
    if not all(level and len(set(level)) == 1 for level in levels) or len(ups) != len(levels) - 1:
        raise shapes.refusal('input_blocks', 'are no levels of equal blocks between convolutions that halve and double the size')
    channels, depths = [level[0][0] for level in levels], [level[0][1] for level in levels]
    middle = shapes.count('middle_block.1.transformer_blocks')
    source, blocks = 'the names of input_blocks', [len(level) for level in levels]
    has = [2 ** i for i, depth in enumerate(depths) if depth]
    node = {'NAME': 'DiffusionUNet', 'IN_CHANNELS': shapes.size('input_blocks.0.0.weight', 1),
            'OUT_CHANNELS': shapes.size('out.2.weight', 0), 'MODEL_CHANNELS': first,
            'CHANNEL_MULT': Said(shapes.multiples(channels, first, 'input_blocks'), 'the shapes of input_blocks'),
            'NUM_RES_BLOCKS': Said(blocks[0] if len(set(blocks)) == 1 else blocks, source),
            'ATTENTION_RESOLUTIONS': Said(has, source),
            'TRANSFORMER_DEPTH': Said(middle if set(depths) <= {0, middle} else depths, source),
            'TRANSFORMER_DEPTH_MIDDLE': Said(middle, 'the names of middle_block.1')}
    return {**node, **_transformers(shapes, middle), **_label(shapes)}


def _transformers(shapes: Shapes, middle: int) -> Node:
    """What the transformers of the UNet are like, by the one in the middle."""
    if not middle:
        raise shapes.refusal('middle_block', 'has no transformer: a network without prompts needs a YAML')
    inside = f'middle_block.1.{BLOCK}'
    width, context = shapes.size('middle_block.1.proj_in.weight', 0).value, shapes.size(f'{inside}.attn2.to_k.weight', 1)
    if shapes.size(f'{inside}.attn1.to_k.weight', 1).value != width:
        raise shapes.refusal(f'{inside}.attn1', 'reads the context; give a YAML with DISABLE_SELF_ATTENTIONS')
    if shapes.size(f'{inside}.ff.net.0.proj.weight', 0).value != 8 * width:
        raise shapes.refusal(f'{inside}.ff', 'is not 4 times as wide as its transformer, as ours is')
    is_linear = len(shapes.weights.shape('middle_block.1.proj_in.weight')) == 2
    key, value = ('NUM_HEADS_CHANNELS', 64) if is_linear else ('NUM_HEADS', 8)
    if width % value:
        raise shapes.refusal('middle_block.1', f'has {width} channels, so its heads are not the usual ones ({key} {value}): give a YAML')
    kind = 'Stable Diffusion 2 and XL' if is_linear else 'Stable Diffusion 1'
    return {key: Said(value, f'the convention of {kind}', True), 'CONTEXT_DIM': context,
            'USE_LINEAR_IN_TRANSFORMER': Said(is_linear, 'the shape of middle_block.1.proj_in.weight')}


def _label(shapes: Shapes) -> Node:
    time, out = shapes.size('middle_block.0.emb_layers.1.weight', 0), shapes.size('middle_block.0.out_layers.3.weight', 0)
    node: Node = {'USE_SCALE_SHIFT_NORM': Said(True, time.source)} if time.value == 2 * out.value else {}
    if 'label_emb.0.0.weight' in shapes.weights:
        node |= {'NUM_CLASSES': Said('sequential', 'the names of label_emb'), 'ADM_IN_CHANNELS': shapes.size('label_emb.0.0.weight', 1)}
    elif any(True for _ in shapes.below('label_emb')):
        raise shapes.refusal('label_emb', 'is a table of classes: such a network needs a YAML')
    return node


# ---------------------------------------------------------------- ours as theirs
def write_config(model: nn.Module) -> dict[str, Any]:
    """The config of a UNet2DConditionModel. Raises ValueError for what it cannot be."""
    unet = model.model
    for key, plain in (('RESBLOCK_UPDOWN', False), ('USE_SCALE_SHIFT_NORM', False), ('CONV_RESAMPLE', True),
                       ('DISABLE_SELF_ATTENTIONS', None), ('DISABLE_MIDDLE_SELF_ATTN', False)):
        if getattr(unet, key) != plain:
            raise ValueError(f'diffusers has no UNet with {key} {getattr(unet, key)}; export to one file instead')
    if unet.NUM_CLASSES not in (None, 'sequential') or unet.CONTEXT_DIM is None:
        raise ValueError(f'diffusers has no UNet with NUM_CLASSES {unet.NUM_CLASSES}, CONTEXT_DIM {unet.CONTEXT_DIM}; export to one file')
    levels = len(unet.CHANNEL_MULT)
    channels = [m * unet.MODEL_CHANNELS for m in unet.CHANNEL_MULT]
    depths = unet.TRANSFORMER_DEPTH if isinstance(unet.TRANSFORMER_DEPTH, list) else [unet.TRANSFORMER_DEPTH] * levels
    middle = depths[-1] if unet.TRANSFORMER_DEPTH_MIDDLE is None else unet.TRANSFORMER_DEPTH_MIDDLE
    has = [2 ** level in unet.ATTENTION_RESOLUTIONS and depths[level] > 0 for level in range(levels)]
    if (has[-1] and middle != depths[-1]) or not middle:
        raise ValueError(f'diffusers has no UNet with {depths[-1]} transformer blocks below and {middle} in the middle; export to one file')
    depths = [*(d if h else 1 for d, h in zip(depths[:-1], has)), middle]
    size = model.IMAGE_SIZE if isinstance(model.IMAGE_SIZE, int) else max(model.IMAGE_SIZE)
    config = {
        '_class_name': 'UNet2DConditionModel', 'sample_size': size // model.size_factor, 'in_channels': unet.IN_CHANNELS,
        'out_channels': unet.OUT_CHANNELS, 'down_block_types': ['CrossAttnDownBlock2D' if h else 'DownBlock2D' for h in has],
        'mid_block_type': 'UNetMidBlock2DCrossAttn', 'up_block_types': ['CrossAttnUpBlock2D' if h else 'UpBlock2D' for h in reversed(has)],
        'block_out_channels': channels, 'layers_per_block': unet.NUM_RES_BLOCKS, 'cross_attention_dim': unet.CONTEXT_DIM,
        'transformer_layers_per_block': depths, 'dropout': unet.DROPOUT, 'use_linear_projection': unet.USE_LINEAR_IN_TRANSFORMER,
        # diffusers means the number of heads
        'attention_head_dim': [unet.NUM_HEADS or c // unet.NUM_HEADS_CHANNELS for c in channels]}
    if unet.NUM_CLASSES == 'sequential':
        config |= {'addition_embed_type': 'text_time', 'addition_time_embed_dim': model.cond_stage_model.SIZE_DIM,
                   'projection_class_embeddings_input_dim': unet.ADM_IN_CHANNELS}
    return config
