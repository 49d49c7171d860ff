"""Our networks as files that other programs open: a diffusers folder, or one file with the CompVis and SGM names."""
from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scepter.core.config import Config
from scepter.core.disk import atomic
from scepter.core.disk.tensors import write_tensors
from scepter.core.registry import SCHEDULES
from scepter.weights.files import Weights
from scepter.weights.names import openclip_to_hf, unet_to_diffusers, vae_to_diffusers

UNMEASURED = 'not measured'.ljust(80)    # the place in a file's metadata where `note_parity` writes
PREDICTIONS = {'eps': 'epsilon', 'v': 'v_prediction', 'x0': 'sample'}
UNET, VAE, TEXT = 'model.', 'first_stage_model.', 'cond_stage_model.'


# ---------------------------------------------------------------- one file
def export_single(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a LatentDiffusion as one .safetensors with the names of CompVis (SD1, SD2) or SGM (SDXL). Raises OSError."""
    path = Path(path)
    prefixes = {UNET: 'model.diffusion_model.', TEXT: 'conditioner.' if is_sdxl(model) else TEXT, VAE: VAE}
    tensors = {}
    for name, value in model.state_dict().items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is not None:
            tensors[prefixes[prefix] + name[len(prefix):]] = value
    meta = metadata(model, 'sgm' if is_sdxl(model) else 'compvis')
    # shapes do not show heads, schedules and much else: with its config, the file opens here as what it is
    meta['config'] = Config({'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MODEL': without_sources(model.cfg)}}).dump(is_secure=True)
    write_whole(path, tensors, meta, dtype)


def without_sources(node: Any) -> Any:
    """A config that does not say where weights came from."""
    if isinstance(node, list):
        return [without_sources(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    return {key: without_sources(value) for key, value in node.items() if key not in ('PRETRAINED_MODEL', 'IGNORE_KEYS')}


def write_whole(path: Path, tensors: Mapping[str, Tensor], meta: dict[str, str], dtype: torch.dtype | None) -> None:
    """A safetensors file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = atomic.beside(path, 'tmp')
    try:
        write_tensors(temporary, Cast(tensors, dtype) if dtype is not None else tensors, meta)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Cast(Mapping[str, Tensor]):
    """Tensors in another floating-point type, each cast when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype):
        self.tensors, self.dtype = tensors, dtype

    def __getitem__(self, name: str) -> Tensor:
        value = self.tensors[name]
        return value.to(self.dtype) if value.is_floating_point() else value

    def __iter__(self) -> Any:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def metadata(model: nn.Module, implementation: str) -> dict[str, str]:
    """The ModelSpec keys of a file (github.com/Stability-AI/ModelSpec), and a place for the parity figure."""
    size = model.IMAGE_SIZE if isinstance(model.IMAGE_SIZE, list) else [model.IMAGE_SIZE] * 2
    return {'format': 'pt', 'modelspec.sai_model_spec': '1.0.1', 'modelspec.architecture': architecture(model),
            'modelspec.implementation': {'sgm': 'https://github.com/Stability-AI/generative-models',
                                         'compvis': 'https://github.com/CompVis/stable-diffusion'}.get(implementation, implementation),
            'modelspec.title': model.cfg.get('TITLE') or type(model).__name__, 'modelspec.resolution': f'{size[1]}x{size[0]}',
            'modelspec.prediction_type': PREDICTIONS.get(model.PARAMETERIZATION, model.PARAMETERIZATION).removesuffix('_prediction'),
            'modelspec.date': datetime.datetime.now(datetime.timezone.utc).date().isoformat(), 'scepter.parity': UNMEASURED}


def architecture(model: nn.Module) -> str:
    """ModelSpec's word for what kind of model this is."""
    if is_sdxl(model):
        return 'stable-diffusion-xl-v1-base' if len(model.cond_stage_model.embedders) > 1 else 'stable-diffusion-xl-v1-refiner'
    if model.cond_stage_model is None:
        return 'latent-diffusion'
    if hasattr(model.cond_stage_model, 'transformer'):
        return 'stable-diffusion-v1'
    return 'stable-diffusion-v2-768-v' if model.PARAMETERIZATION == 'v' else 'stable-diffusion-v2-512'


def note_parity(path: str | Path, figure: str) -> None:
    """Write into a file that `metadata` gave a place for it how near the other library came to us. Raises ValueError without that place."""
    text = json.dumps(figure.ljust(len(UNMEASURED))[:len(UNMEASURED)])[1:-1].encode()
    with open(path, 'r+b') as file:
        header = file.read(8 + int.from_bytes(file.read(8), 'little'))
        place = header.find(UNMEASURED.encode())
        if place < 0 or len(text) != len(UNMEASURED):
            raise ValueError(f'{path} has no place for a parity figure of {len(figure)} characters')
        file.seek(8 + place)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------- a diffusers folder
def export_diffusers(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a LatentDiffusion as a folder that StableDiffusionPipeline or StableDiffusionXLPipeline opens.

    Raises ValueError where diffusers has no such network.
    """
    folder, meta = Path(folder), metadata(model, 'diffusers')
    weights = Weights.of(model.state_dict())
    names = unet_to_diffusers(weights.section(UNET))
    lost = [n for n in weights.section(UNET) if n not in names]
    if lost:
        raise ValueError(f'diffusers has no place for {lost[0]} and {len(lost) - 1} more; export to one file instead')
    export_configs(model, folder)
    write_whole(folder / 'unet' / 'diffusion_pytorch_model.safetensors', weights.section(UNET).renamed(names), meta, dtype)
    write_whole(folder / 'vae' / 'diffusion_pytorch_model.safetensors', vae_to_diffusers(weights.section(VAE)), meta, dtype)
    for part, (prefix, embedder) in text_parts(model).items():
        write_whole(folder / part / 'model.safetensors', text_weights(embedder, weights.section(prefix)), meta, dtype)


def export_configs(model: nn.Module, folder: str | Path) -> None:
    """Write all of such a folder but the weights. Raises ValueError where diffusers has no such network."""
    folder, towers = Path(folder), text_parts(model)
    configs = {'unet': unet_config(model), 'vae': vae_config(model), **{part: text_config(e, part) for part, (_, e) in towers.items()}}
    for part, config in configs.items():
        write_json(folder / part / 'config.json', config)
    for part, (_, embedder) in towers.items():
        embedder.tokenizer.vocabulary.save(folder / part.replace('text_encoder', 'tokenizer'), embedder.MAX_LENGTH)
    write_json(folder / 'scheduler' / 'scheduler_config.json', scheduler_config(model))
    write_json(folder / 'model_index.json', model_index(model, list(towers)))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + '\n', 'utf-8')


def is_sdxl(model: nn.Module) -> bool:
    return hasattr(model.cond_stage_model, 'embedders')


def text_parts(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """part of a pipeline -> (prefix of its weights with us, the embedder). Raises ValueError where a tower is not CLIP's or OpenCLIP's."""
    towers = model.cond_stage_model.embedders if is_sdxl(model) else [model.cond_stage_model]
    if not all(hasattr(tower, 'tower') for tower in towers):
        raise ValueError(f'diffusers has no text tower like {", ".join(type(tower).__name__ for tower in towers)}; export to one file')
    if not is_sdxl(model):
        return {'text_encoder': (TEXT, model.cond_stage_model)}
    if len(towers) > 2:
        raise ValueError(f'diffusers has no place for {len(towers)} text towers; export to one file instead')
    named = [(f'{TEXT}embedders.{n}.', embedder) for n, embedder in enumerate(towers)]
    return dict(zip(['text_encoder', 'text_encoder_2'][-len(named):], named))    # the refiner has the second alone


def text_weights(embedder: nn.Module, weights: Weights) -> Weights:
    """A text tower under the names of transformers, without the blocks after the one that diffusers would read."""
    found = openclip_to_hf(weights.section('model.')) if is_openclip(embedder) else weights.section('transformer.')
    layers = hf_depth(embedder)
    late = [n for n in found if '.layers.' in n and int(n.split('.layers.')[1].split('.')[0]) >= layers]
    return found.without(late)


def is_openclip(embedder: nn.Module) -> bool:
    return hasattr(embedder.tower, 'ln_final')


def hf_depth(embedder: nn.Module) -> int:
    """The blocks that a tower must have there. SD reads the last, normed state: an inner, normed one is the last of a shorter tower.

    SDXL reads the last but one, not normed. Raises ValueError for what neither does.
    """
    depth, state, normed = embedder.tower.depth, embedder.taken_state, embedder.USE_FINAL_LAYER_NORM
    if embedder.LAYER == 'last' or (normed and embedder.LAYER != 'pooled'):
        return state
    if not normed and state == depth - 1:
        return depth
    raise ValueError(f'diffusers cannot read the state after block {state} of {depth} {"with" if normed else "without"} the final norm')


def unet_config(model: nn.Module) -> dict[str, Any]:
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


def vae_config(model: nn.Module) -> dict[str, Any]:
    """The config of diffusers' AutoencoderKL. Raises ValueError for what it cannot be."""
    vae = model.first_stage_model
    encoder, decoder = vae.encoder, vae.decoder
    if encoder.ATTN_RESOLUTIONS or decoder.ATTN_RESOLUTIONS or not encoder.RESAMP_WITH_CONV or vae.EMBED_DIM != encoder.Z_CHANNELS \
            or (encoder.CH, encoder.CH_MULT, encoder.NUM_RES_BLOCKS) != (decoder.CH, decoder.CH_MULT, decoder.NUM_RES_BLOCKS):
        raise ValueError('diffusers has no such autoencoder (attention outside the middle, other resampling, or two unlike halves)')
    levels = len(encoder.CH_MULT)
    return {'_class_name': 'AutoencoderKL', 'in_channels': encoder.IN_CHANNELS, 'out_channels': decoder.OUT_CH,
            'down_block_types': ['DownEncoderBlock2D'] * levels, 'up_block_types': ['UpDecoderBlock2D'] * levels,
            'block_out_channels': [m * encoder.CH for m in encoder.CH_MULT], 'layers_per_block': encoder.NUM_RES_BLOCKS,
            'latent_channels': vae.EMBED_DIM, 'sample_size': unet_config(model)['sample_size'] * model.size_factor,
            'scaling_factor': model.SCALE_FACTOR, 'shift_factor': model.SHIFT_FACTOR or None, 'use_quant_conv': vae.USE_CONV,
            'use_post_quant_conv': vae.USE_CONV}


def text_config(embedder: nn.Module, part: str) -> dict[str, Any]:
    """The config of a text tower of transformers."""
    tower, tokenizer, is_open = embedder.tower, embedder.tokenizer, is_openclip(embedder)
    embedding = tower.token_embedding if is_open else tower.embeddings.token_embedding
    blocks = tower.blocks()
    mlp = blocks[0].mlp.c_fc if is_open else blocks[0].mlp.fc1
    projection = getattr(tower, 'text_projection', None)
    kind = 'CLIPTextModelWithProjection' if part == 'text_encoder_2' else 'CLIPTextModel'
    return {'architectures': [kind], 'model_type': 'clip_text_model',
            'hidden_size': tower.width, 'intermediate_size': mlp.out_features, 'num_hidden_layers': hf_depth(embedder),
            'num_attention_heads': tower.heads, 'vocab_size': embedding.num_embeddings, 'layer_norm_eps': tower.norm.eps,
            'max_position_embeddings': tower.positions, 'hidden_act': 'gelu' if is_open else tower.activation,
            'projection_dim': tower.width if projection is None else projection.shape[1],
            'bos_token_id': tokenizer.bos, 'eos_token_id': tokenizer.eos, 'pad_token_id': tokenizer.pad}


def scheduler_config(model: nn.Module) -> dict[str, Any]:
    """DDIM on our levels, spaced as our own sampling spaces them. Raises ValueError for a process or prediction it does not know."""
    if model.PARAMETERIZATION not in PREDICTIONS:
        raise ValueError(f'the pipelines of Stable Diffusion cannot sample a network that predicts {model.PARAMETERIZATION}')
    schedule = {key.upper(): value for key, value in model.SCHEDULE_ARGS.items()}
    config = {'_class_name': 'DDIMScheduler', 'num_train_timesteps': model.TIMESTEPS,
              'prediction_type': PREDICTIONS[model.PARAMETERIZATION], 'rescale_betas_zero_snr': model.ZERO_TERMINAL_SNR,
              'timestep_spacing': 'trailing', 'clip_sample': False, 'set_alpha_to_one': True, 'steps_offset': 1}
    if schedule['NAME'] == 'scaled_linear':
        return {**config, 'beta_schedule': 'scaled_linear', 'beta_start': schedule.get('BETA_MIN', 0.00085),
                'beta_end': schedule.get('BETA_MAX', 0.012)}
    alphas, sigmas, *times = SCHEDULES.build(model.SCHEDULE_ARGS, n=model.TIMESTEPS)
    if times:
        raise ValueError(f'the pipelines of Stable Diffusion tell a network the index of a level, not the times of {schedule["NAME"]}')
    if not torch.allclose(alphas ** 2 + sigmas ** 2, torch.ones_like(alphas)):
        raise ValueError(f'the pipelines of Stable Diffusion cannot sample on {schedule["NAME"]}: alpha^2 + sigma^2 is not 1')
    signal = torch.cat([torch.ones(1, dtype=alphas.dtype), alphas]) ** 2
    return {**config, 'trained_betas': (1 - signal[1:] / signal[:-1]).tolist()}


def model_index(model: nn.Module, towers: list[str]) -> dict[str, Any]:
    """What is in the folder, and which pipeline opens it."""
    found: dict[str, Any] = {'unet': ['diffusers', 'UNet2DConditionModel'], 'vae': ['diffusers', 'AutoencoderKL'],
                             'scheduler': ['diffusers', 'DDIMScheduler'], 'feature_extractor': [None, None], 'image_encoder': [None, None]}
    for part in ('text_encoder', 'text_encoder_2') if is_sdxl(model) else ('text_encoder',):
        kind = 'CLIPTextModelWithProjection' if part == 'text_encoder_2' else 'CLIPTextModel'
        found[part] = ['transformers', kind] if part in towers else [None, None]
        found[part.replace('text_encoder', 'tokenizer')] = ['transformers', 'CLIPTokenizer'] if part in towers else [None, None]
    if not is_sdxl(model):
        return {'_class_name': 'StableDiffusionPipeline', **found, 'safety_checker': [None, None],
                'requires_safety_checker': False}
    if len(towers) == 1:
        del found['feature_extractor'], found['image_encoder']
        return {'_class_name': 'StableDiffusionXLImg2ImgPipeline', **found, 'requires_aesthetics_score': True,
                'force_zeros_for_empty_prompt': False}
    return {'_class_name': 'StableDiffusionXLPipeline', **found, 'force_zeros_for_empty_prompt': model.cond_stage_model.ZERO_EMPTY}
