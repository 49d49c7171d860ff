"""Ours and diffusers' networks with the same random weights. The map of names is written independently of scepter.weights."""
from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

import scepter.models.autoencoder
import scepter.models.coders
import scepter.models.losses
import scepter.models.unet  # noqa: F401  (these register)
from scepter.core.registry import BACKBONES, MODELS

SD15: dict[str, Any] = {'NAME': 'DiffusionUNet', 'IN_CHANNELS': 4, 'OUT_CHANNELS': 4, 'MODEL_CHANNELS': 320, 'NUM_RES_BLOCKS': 2,
                        'ATTENTION_RESOLUTIONS': [4, 2, 1], 'CHANNEL_MULT': [1, 2, 4, 4], 'NUM_HEADS': 8, 'CONTEXT_DIM': 768}
SD21: dict[str, Any] = {**SD15, 'NUM_HEADS': None, 'NUM_HEADS_CHANNELS': 64, 'CONTEXT_DIM': 1024, 'USE_LINEAR_IN_TRANSFORMER': True}
SDXL: dict[str, Any] = {**SD21, 'ATTENTION_RESOLUTIONS': [4, 2], 'CHANNEL_MULT': [1, 2, 4], 'TRANSFORMER_DEPTH': [0, 2, 10],
                        'CONTEXT_DIM': 2048, 'NUM_CLASSES': 'sequential', 'ADM_IN_CHANNELS': 2816}
REFINER: dict[str, Any] = {**SDXL, 'MODEL_CHANNELS': 384, 'CHANNEL_MULT': [1, 2, 4, 4], 'TRANSFORMER_DEPTH': 4, 'CONTEXT_DIM': 1280,
                           'ADM_IN_CHANNELS': 2560}
KL_F8: dict[str, Any] = {'NAME': 'AutoencoderKL', 'ENCODER': {'NAME': 'Encoder', 'CH': 128}, 'DECODER': {'NAME': 'Decoder', 'CH': 128}}


def tiny(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A published architecture with 32 channels, narrow heads and a narrow context."""
    small = {'MODEL_CHANNELS': 32, 'CONTEXT_DIM': 24, 'ADM_IN_CHANNELS': 40}
    heads = {'NUM_HEADS_CHANNELS': 16} if config['NUM_HEADS'] is None else {'NUM_HEADS': 2}
    depth = {'TRANSFORMER_DEPTH': [0, 1, 2]} if isinstance(config.get('TRANSFORMER_DEPTH'), list) else {}
    return {**config, **small, **heads, **depth, **changes}


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of the size that keeps activations near 1, also where training starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            fan_in = p[0].numel() if p.dim() > 1 else 1
            p.normal_(0, 0.1 if p.dim() == 1 else fan_in ** -0.5, generator=generator)
            if p.dim() == 1 and name.endswith('weight'):    # of a norm
                p.add_(1.0)
    return network.eval()


def unet(config: dict[str, Any]) -> nn.Module:
    return randomize(BACKBONES.build(config))


def autoencoder(**changes: Any) -> nn.Module:
    net = {'CH': 32, 'CH_MULT': [1, 2, 2], 'NUM_RES_BLOCKS': 1, **changes}
    return randomize(MODELS.build({'NAME': 'AutoencoderKL', 'ENCODER': {**net, 'NAME': 'Encoder'}, 'DECODER': {**net, 'NAME': 'Decoder'}}))


def diffusers_unet(ours: nn.Module, **options: Any) -> nn.Module:
    """diffusers' UNet2DConditionModel of the same architecture, on the very memory of our weights: two of SDXL's would not fit."""
    from diffusers import UNet2DConditionModel
    levels = len(ours.CHANNEL_MULT)
    widths = [ours.MODEL_CHANNELS * m for m in ours.CHANNEL_MULT]
    attends = [2 ** i in ours.ATTENTION_RESOLUTIONS for i in range(levels)]
    depth = ours.TRANSFORMER_DEPTH if isinstance(ours.TRANSFORMER_DEPTH, list) else [ours.TRANSFORMER_DEPTH] * levels
    with torch.device('meta'):
        theirs = UNet2DConditionModel(
            in_channels=ours.IN_CHANNELS, out_channels=ours.OUT_CHANNELS, block_out_channels=widths, layers_per_block=ours.NUM_RES_BLOCKS,
            down_block_types=['CrossAttnDownBlock2D' if a else 'DownBlock2D' for a in attends],
            up_block_types=['CrossAttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(attends)],
            transformer_layers_per_block=[max(1, d) for d in depth], cross_attention_dim=ours.CONTEXT_DIM,
            # diffusers calls the number of heads attention_head_dim
            attention_head_dim=ours.NUM_HEADS or [w // ours.NUM_HEADS_CHANNELS for w in widths],
            use_linear_projection=ours.USE_LINEAR_IN_TRANSFORMER,
            class_embed_type='projection' if ours.NUM_CLASSES == 'sequential' else None,
            num_class_embeds=ours.NUM_CLASSES if isinstance(ours.NUM_CLASSES, int) else None,
            projection_class_embeddings_input_dim=ours.ADM_IN_CHANNELS if ours.NUM_CLASSES == 'sequential' else None, **options)
    renamed = {unet_name(name, ours.NUM_RES_BLOCKS): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(renamed, assign=True)
    return theirs.eval()


def diffusers_autoencoder(ours: nn.Module) -> nn.Module:
    """diffusers' AutoencoderKL of the same architecture, with our weights."""
    from diffusers import AutoencoderKL
    net = ours.encoder
    levels = len(net.CH_MULT)
    theirs = AutoencoderKL(
        in_channels=net.IN_CHANNELS, out_channels=ours.decoder.OUT_CH, latent_channels=ours.EMBED_DIM, layers_per_block=net.NUM_RES_BLOCKS,
        block_out_channels=[net.CH * m for m in net.CH_MULT], down_block_types=['DownEncoderBlock2D'] * levels,
        up_block_types=['UpDecoderBlock2D'] * levels, use_quant_conv=ours.USE_CONV, use_post_quant_conv=ours.USE_CONV)
    theirs.load_state_dict({autoencoder_name(name, levels): as_linear(name, value) for name, value in ours.state_dict().items()})
    return theirs.eval()


RES_BLOCK = {'in_layers.0': 'norm1', 'in_layers.2': 'conv1', 'emb_layers.1': 'time_emb_proj', 'out_layers.0': 'norm2',
             'out_layers.3': 'conv2', 'skip_connection': 'conv_shortcut'}


def unet_name(name: str, res_blocks: int) -> str:
    """The diffusers name of one of our UNet's weights."""
    name = re.sub(r'^time_embed\.(0|2)', lambda m: f'time_embedding.linear_{int(m[1]) // 2 + 1}', name)
    name = re.sub(r'^label_emb\.0\.(0|2)', lambda m: f'class_embedding.linear_{int(m[1]) // 2 + 1}', name)
    name = re.sub(r'^label_emb\.', 'class_embedding.', name)
    name = name.replace('input_blocks.0.0.', 'conv_in.') if name.startswith('input_blocks.0.') else name
    name = re.sub(r'^out\.0', 'conv_norm_out', name)
    name = re.sub(r'^out\.2', 'conv_out', name)
    for ours, theirs in RES_BLOCK.items():
        name = re.sub(rf'^((?:in|out)put_blocks\.\d+\.\d|middle_block\.\d)\.{ours}\.', rf'\1.{theirs}.', name)
    name = re.sub(r'^middle_block\.(\d)', lambda m: f'mid_block.{["resnets.0", "attentions.0", "resnets.1"][int(m[1])]}', name)

    def down(m: re.Match[str]) -> str:
        level, i = divmod(int(m[1]) - 1, res_blocks + 1)
        return f'down_blocks.{level}.' + ('downsamplers.0.conv' if m[3] else f'{["resnets", "attentions"][int(m[2])]}.{i}')

    def up(m: re.Match[str]) -> str:
        level, i = divmod(int(m[1]), res_blocks + 1)
        return f'up_blocks.{level}.' + ('upsamplers.0.conv' if m[3] else f'{["resnets", "attentions"][int(m[2])]}.{i}')

    name = re.sub(r'^input_blocks\.(\d+)\.(\d)(\.op)?', down, name)
    return re.sub(r'^output_blocks\.(\d+)\.(\d)(\.conv(?=\.))?', up, name)


def autoencoder_name(name: str, levels: int) -> str:
    """The diffusers name of one of our autoencoder's weights."""
    name = re.sub(r'\.down\.(\d)\.', r'.down_blocks.\1.', name)
    name = re.sub(r'\.up\.(\d)\.', lambda m: f'.up_blocks.{levels - 1 - int(m[1])}.', name)
    for ours, theirs in {'.block.': '.resnets.', '.downsample.': '.downsamplers.0.', '.upsample.': '.upsamplers.0.',
                         '.mid.block_1.': '.mid_block.resnets.0.', '.mid.block_2.': '.mid_block.resnets.1.',
                         '.nin_shortcut.': '.conv_shortcut.', '.norm_out.': '.conv_norm_out.'}.items():
        name = name.replace(ours, theirs)
    if '.mid.attn_1.' in name:
        for ours, theirs in {'.norm.': '.group_norm.', '.q.': '.to_q.', '.k.': '.to_k.', '.v.': '.to_v.',
                             '.proj_out.': '.to_out.0.'}.items():
            name = name.replace(ours, theirs)
        name = name.replace('.mid.attn_1.', '.mid_block.attentions.0.')
    return name


def as_linear(name: str, value: Tensor) -> Tensor:
    """diffusers writes the 1x1 convolutions of the autoencoder's attention as linear layers."""
    return value.flatten(1) if '.attn_1.' in name and value.dim() == 4 else value


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, in the Euclidean norm."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
