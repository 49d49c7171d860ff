"""A single file read as a config of ours: sizes by the shapes of its tensors, the rest by its markers, else by what its kind is known for.

Markers are the keys v_pred and ztsnr, the buffers betas and scale_factor, and the ModelSpec entries of a safetensors header. Shapes do not
show heads: Stable Diffusion 1 (1x1 convolutions around its transformers) has 8 on every level, 2 and XL (linear layers) have heads of 64
channels, and so have the text towers. What follows from the kind alone is marked as a convention.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from scepter.core.errors import CheckpointError
from scepter.core.registry import SCHEDULES
from scepter.weights.configs import Node, Said, conditioner
from scepter.weights.files import Weights, carried_config
from scepter.weights.foreign import foreign_kind, lone_parts
from scepter.weights.layouts import TEXT, UNET, VAE, whole_model

TOWERS = {(1024, 23): 'ViT-H-14', (1024, 24): 'ViT-H-14', (1280, 32): 'ViT-bigG-14'}    # (width, blocks in the file) of OpenCLIP's
BLOCK = 'transformer_blocks.0'


def describe_single(weights: Weights, name: str) -> Node:
    """The node of a single file. Raises CheckpointError for what is no whole model, and for what no network of ours can be."""
    if carried_config(weights.settings.get('metadata', {})) is not None:
        raise CheckpointError(f'{name} carries a config of its own, which says what it is')
    whole = whole_model(weights)
    if sentence := foreign_kind(weights) or lone_parts(whole):
        raise CheckpointError(f'{name} {sentence}')
    missing = [prefix for prefix in (UNET, VAE, TEXT) if not any(n.startswith(prefix) for n in whole)]
    if missing:
        raise CheckpointError(f'{name}: its names, e.g. {next(iter(weights), "none")}, are of no model that opens here')
    unet = Part(whole.section(UNET), name).unet()
    text = Part(whole.section(TEXT), name).text(unet)
    is_xl = 'EMBEDDERS' in text
    model: Node = {'NAME': 'LatentDiffusion', **process(weights), 'DIFFUSION_MODEL': unet,
                   'FIRST_STAGE_MODEL': Part(whole.section(VAE), name).autoencoder(), 'COND_STAGE_MODEL': text}
    kind = 'Stable Diffusion XL' if is_xl else 'Stable Diffusion 2' if 'ARCH' in text else 'Stable Diffusion 1'
    is_v = kind == 'Stable Diffusion 2' and unet['IN_CHANNELS'].value == unet['OUT_CHANNELS'].value
    also = ': published at 768 pixels it predicts v, at 512 eps (PARAMETERIZATION: eps and IMAGE_SIZE: 512, if the picture is noise)'
    convention = Said('v' if is_v else 'eps', f'no marker in the file; the convention of {kind}{also if is_v else ""}', True)
    model.setdefault('PARAMETERIZATION', convention)
    model.setdefault('SCALE_FACTOR', Said(0.13025 if is_xl else 0.18215, f'the convention of {kind}', True))
    model['SIZE_FACTOR'] = Said(2 ** (len(model['FIRST_STAGE_MODEL']['ENCODER']['CH_MULT'].value) - 1), 'the levels of its autoencoder')
    model['IMAGE_SIZE'] = _image_size(weights, kind, model['PARAMETERIZATION'].value)
    return {'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MODEL': model, 'SAMPLE_ARGS': {'IMAGE_SIZE': model['IMAGE_SIZE']}}}


# ---------------------------------------------------------------- markers
def process(weights: Weights) -> Node:
    """What the markers of a single file say of its process; nothing where they are absent."""
    node: Node = {}
    meta = weights.settings.get('metadata', {})
    predicts, architecture = meta.get('modelspec.prediction_type', ''), meta.get('modelspec.architecture', '')
    spoken = {'v': 'v', 'v_prediction': 'v', 'epsilon': 'eps', 'eps': 'eps', 'sample': 'x0', 'flow': 'flow'}.get(predicts)
    if 'v_pred' in weights:
        node['PARAMETERIZATION'] = Said('v', 'the key v_pred')
    elif spoken is not None:
        node['PARAMETERIZATION'] = Said(spoken, 'modelspec.prediction_type')
    elif architecture.endswith('768-v'):
        node['PARAMETERIZATION'] = Said('v', 'modelspec.architecture')
    if 'ztsnr' in weights:
        node['ZERO_TERMINAL_SNR'] = Said(True, 'the key ztsnr')
    if (betas := _numbers(weights, 'betas')) is not None and len(betas) > 1 and bool(((betas > 0) & (betas < 1)).all()):
        node |= _schedule(betas)
    scale = _numbers(weights, 'scale_factor')
    if scale is not None and len(scale) == 1 and scale.isfinite().all() and scale > 0:
        node['SCALE_FACTOR'] = Said(float(f'{scale.item():.6g}'), 'the buffer scale_factor')
    return node


def _numbers(weights: Weights, name: str) -> torch.Tensor | None:
    return weights[name].double().flatten() if name in weights and 1 <= torch.Size(weights.shape(name)).numel() <= 10_000 else None


def _schedule(betas: torch.Tensor) -> Node:
    """The schedule whose betas these are; nothing where it is none of ours."""
    for name in ('scaled_linear', 'linear'):
        ends = {'BETA_MIN': float(f'{betas[0]:.6g}'), 'BETA_MAX': float(f'{betas[-1]:.6g}')}
        alphas, _ = SCHEDULES.build({'NAME': name, **ends}, n=len(betas))
        if torch.allclose(alphas ** 2, torch.cumprod(1 - betas, 0), rtol=1e-3):
            said = {key: Said(value, 'the buffer betas') for key, value in {'NAME': name, **ends}.items()}
            return {'SCHEDULE_ARGS': said, 'TIMESTEPS': Said(len(betas), 'the buffer betas')}
    return {}


def _image_size(weights: Weights, kind: str, prediction: str) -> Said:
    spoken = re.fullmatch(r'(\d{2,5})x(\d{2,5})', weights.settings.get('metadata', {}).get('modelspec.resolution', ''))
    if spoken:
        width, height = int(spoken[1]), int(spoken[2])
        return Said(width if width == height else [height, width], 'modelspec.resolution')
    size = 1024 if kind == 'Stable Diffusion XL' else 768 if kind == 'Stable Diffusion 2' and prediction == 'v' else 512
    return Said(size, f'the convention of {kind}', True)


# ---------------------------------------------------------------- shapes
class Part:
    """The tensors of one part of a model under our names, as something that shapes can be asked of."""

    def __init__(self, weights: Weights, file: str):
        self.weights, self.file = weights, file

    def size(self, name: str, side: int) -> Said:
        """One side of a tensor. Raises CheckpointError where it is not there."""
        if name not in self.weights or len(self.weights.shape(name)) <= side:
            raise self.refusal(name, 'is absent or flat, so its part is none that opens here')
        return Said(self.weights.shape(name)[side], f'the shape of {name}')

    def refusal(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f'{self.file}: {name} {problem}')

    def count(self, prefix: str) -> int:
        """How many numbered children a name has; they count from 0."""
        return len({n[len(prefix) + 1:].split('.')[0] for n in self.weights if n.startswith(f'{prefix}.')})

    def below(self, prefix: str) -> Iterator[str]:
        return (n for n in self.weights if n.startswith(f'{prefix}.'))

    def multiples(self, channels: list[int], first: Said, what: str) -> list[int]:
        """Channels of each level in multiples of the first. Raises CheckpointError where they are none."""
        if any(c % first.value for c in channels) or first.value % 32:
            raise self.refusal(what, f'have {channels} channels; CHANNEL_MULT knows whole multiples of the first, {first.value}, only, '
                                     'which is one of 32')
        return [c // first.value for c in channels]

    # ------------------------------------------------------------ UNet
    def unet(self) -> Node:
        """A DiffusionUNet."""
        first = self.size('input_blocks.0.0.weight', 0)
        levels: list[list[tuple[int, int]]] = [[]]    # (channels, transformer blocks) of each residual block
        for n in range(1, self.count('input_blocks')):
            if f'input_blocks.{n}.0.op.weight' in self.weights:
                levels.append([])
            else:
                channels = self.size(f'input_blocks.{n}.0.out_layers.3.weight', 0).value
                levels[-1].append((channels, self.count(f'input_blocks.{n}.1.transformer_blocks')))
        ups = [n for n in self.weights if re.fullmatch(r'output_blocks\.\d+\.[12]\.conv\.weight', n)]
        if not all(level and len(set(level)) == 1 for level in levels) or len(ups) != len(levels) - 1:
            raise self.refusal('input_blocks', 'are no levels of equal blocks between convolutions that halve and double the size')
        channels, depths = [level[0][0] for level in levels], [level[0][1] for level in levels]
        middle = self.count('middle_block.1.transformer_blocks')
        source, blocks = 'the names of input_blocks', [len(level) for level in levels]
        has = [2 ** i for i, depth in enumerate(depths) if depth]
        node = {'NAME': 'DiffusionUNet', 'IN_CHANNELS': self.size('input_blocks.0.0.weight', 1),
                'OUT_CHANNELS': self.size('out.2.weight', 0), 'MODEL_CHANNELS': first,
                'CHANNEL_MULT': Said(self.multiples(channels, first, 'input_blocks'), 'the shapes of input_blocks'),
                'NUM_RES_BLOCKS': Said(blocks[0] if len(set(blocks)) == 1 else blocks, source),
                'ATTENTION_RESOLUTIONS': Said(has, source),
                'TRANSFORMER_DEPTH': Said(middle if set(depths) <= {0, middle} else depths, source),
                'TRANSFORMER_DEPTH_MIDDLE': Said(middle, 'the names of middle_block.1')}
        return {**node, **self._transformers(middle), **self._label()}

    def _transformers(self, middle: int) -> Node:
        """What the transformers of the UNet are like, by the one in the middle."""
        if not middle:
            raise self.refusal('middle_block', 'has no transformer: a network without prompts needs a YAML')
        inside = f'middle_block.1.{BLOCK}'
        width, context = self.size('middle_block.1.proj_in.weight', 0).value, self.size(f'{inside}.attn2.to_k.weight', 1)
        if self.size(f'{inside}.attn1.to_k.weight', 1).value != width:
            raise self.refusal(f'{inside}.attn1', 'reads the context; give a YAML with DISABLE_SELF_ATTENTIONS')
        if self.size(f'{inside}.ff.net.0.proj.weight', 0).value != 8 * width:
            raise self.refusal(f'{inside}.ff', 'is not 4 times as wide as its transformer, as ours is')
        is_linear = len(self.weights.shape('middle_block.1.proj_in.weight')) == 2
        key, value = ('NUM_HEADS_CHANNELS', 64) if is_linear else ('NUM_HEADS', 8)
        if width % value:
            raise self.refusal('middle_block.1', f'has {width} channels, so its heads are not the usual ones ({key} {value}): give a YAML')
        kind = 'Stable Diffusion 2 and XL' if is_linear else 'Stable Diffusion 1'
        return {key: Said(value, f'the convention of {kind}', True), 'CONTEXT_DIM': context,
                'USE_LINEAR_IN_TRANSFORMER': Said(is_linear, 'the shape of middle_block.1.proj_in.weight')}

    def _label(self) -> Node:
        time, out = self.size('middle_block.0.emb_layers.1.weight', 0), self.size('middle_block.0.out_layers.3.weight', 0)
        node: Node = {'USE_SCALE_SHIFT_NORM': Said(True, time.source)} if time.value == 2 * out.value else {}
        if 'label_emb.0.0.weight' in self.weights:
            node |= {'NUM_CLASSES': Said('sequential', 'the names of label_emb'), 'ADM_IN_CHANNELS': self.size('label_emb.0.0.weight', 1)}
        elif any(True for _ in self.below('label_emb')):
            raise self.refusal('label_emb', 'is a table of classes: such a network needs a YAML')
        return node

    # ------------------------------------------------------------ autoencoder
    def autoencoder(self) -> Node:
        """An AutoencoderKL."""
        z, is_conv = self.size('decoder.conv_in.weight', 1), 'post_quant_conv.weight' in self.weights
        embed = self.size('post_quant_conv.weight', 1) if is_conv else z
        return {'NAME': 'AutoencoderKL', 'EMBED_DIM': embed, 'USE_CONV': Said(is_conv, 'whether there is a post_quant_conv'),
                'ENCODER': {'NAME': 'Encoder', **self._half('encoder.down', 0, z), 'IN_CHANNELS': self.size('encoder.conv_in.weight', 1)},
                'DECODER': {'NAME': 'Decoder', **self._half('decoder.up', 1, z), 'OUT_CH': self.size('decoder.conv_out.weight', 0)}}

    def _half(self, side: str, extra: int, z: Said) -> Node:
        levels = self.count(side)
        blocks = {self.count(f'{side}.{i}.block') - extra for i in range(levels)}
        channels = [self.size(f'{side}.{i}.block.0.conv2.weight', 0) for i in range(levels)]
        if len(blocks) != 1:
            raise self.refusal(side, 'is no list of levels with equally many blocks')
        attends = [2 ** i for i in range(levels) if self.count(f'{side}.{i}.attn')]
        return {'CH': channels[0], 'CH_MULT': Said(self.multiples([c.value for c in channels], channels[0], side), f'the shapes of {side}'),
                'NUM_RES_BLOCKS': Said(blocks.pop(), f'the names of {side}'), 'Z_CHANNELS': z,
                **({'ATTN_RESOLUTIONS': Said(attends, f'the names of {side}')} if attends else {})}

    # ------------------------------------------------------------ text towers
    def text(self, unet: Node) -> Node:
        """An embedder: one tower, or SDXL's side by side."""
        count = self.count('embedders')
        if not count:
            return self.tower('', 'alone')
        towers = [self.tower(f'embedders.{i}.', 'last' if i == count - 1 else 'beside') for i in range(count)]
        if 'ADM_IN_CHANNELS' not in unet:
            raise self.refusal('embedders', 'give a vector, but the UNet has no label_emb that takes it')
        is_base = count > 1
        zero_empty = Said(is_base, f"the convention of Stable Diffusion XL's {'base' if is_base else 'refiner'}", True)
        projection = f'embedders.{count - 1}.model.text_projection'
        pooled = self.size(projection, 1).value
        if pooled != self.size(projection, 0).value:
            raise self.refusal(projection, f'is not square, {self.weights.shape(projection)}, as those of the towers here are')
        size_dim = Said(256, 'the convention of Stable Diffusion XL', True)
        return conditioner(towers, pooled, unet['ADM_IN_CHANNELS'], size_dim, zero_empty, self.file)

    def tower(self, prefix: str, role: str) -> Node:
        """A text tower. role: as in configs.text_tower."""
        clip, opened = f'{prefix}transformer.text_model.', f'{prefix}model.'
        is_open = f'{opened}token_embedding.weight' in self.weights
        embedding = f'{opened if is_open else f"{clip}embeddings."}token_embedding.weight'
        positions = f'{opened}positional_embedding' if is_open else f'{clip}embeddings.position_embedding.weight'
        blocks = f'{opened}transformer.resblocks' if is_open else f'{clip}encoder.layers'
        width, depth = self.size(embedding, 1), self.count(blocks)
        if self.size(f'{blocks}.0.mlp.{"c_fc" if is_open else "fc1"}.weight', 0).value != 4 * width.value:
            raise self.refusal(f'{blocks}.0.mlp', f'is not 4 times as wide as its tower, {width.value}, as those of a text tower here are')
        if self.size(embedding, 0).value != 49408:
            raise self.refusal(embedding, f'has {self.size(embedding, 0).value} words, but a text tower here knows the usual 49408')
        if width.value % 64:
            raise self.refusal(embedding, f'is {width.value} wide, so its heads are not the usual ones of 64 channels: give a YAML')
        kind: dict[str, Any] = {'NAME': Said('FrozenOpenCLIPEmbedder' if is_open else 'FrozenCLIPEmbedder', f'the names of {blocks}')}
        length = {'MAX_LENGTH': self.size(positions, 0)}
        sizes = {'WIDTH': width, 'DEPTH': Said(depth, f'the names of {blocks}'),
                 'HEADS': Said(width.value // 64, 'heads of 64 channels', True)}

        def taken(value: Any) -> Said:
            return Said(value, f'the convention of Stable Diffusion{" XL" if prefix else ""}', True)

        if not is_open:
            layer = {'LAYER': taken('last')} if role == 'alone' else {'LAYER': taken('hidden'), 'LAYER_IDX': taken(-2)}
            return {**kind, **sizes, **length, **layer}
        if role == 'alone' and f'{opened}text_projection' not in self.weights:    # a part of the tower: its last block is left out
            sizes['DEPTH'] = Said(depth + 1, f'the names of {blocks}, where the last block is left out')
        if (width.value, depth) in TOWERS:
            sizes = {'ARCH': Said(TOWERS[width.value, depth], width.source)}
        else:
            sizes = {'ARCH': Said('custom', width.source), **sizes}
        pooled = {} if role == 'alone' else {'RETURN_POOLED': taken(role == 'last')}
        return {**kind, **sizes, **length, 'LAYER': taken('penultimate'), 'USE_FINAL_LAYER_NORM': taken(role == 'alone'), **pooled}
