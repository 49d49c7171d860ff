"""Tiny models as strangers publish them: built by diffusers and transformers, saved by their own save_pretrained."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from scepter.weights.vocabulary import Vocabulary
from tests.models.oracles import randomize

BETAS = {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012, 'timestep_spacing': 'trailing', 'clip_sample': False}
UNET = {'block_out_channels': (32, 64), 'layers_per_block': 1, 'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D'),
        'up_block_types': ('UpBlock2D', 'CrossAttnUpBlock2D'), 'sample_size': 8}
XL = {'block_out_channels': (32, 64), 'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D'), 'attention_head_dim': (2, 4),
      'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'), 'transformer_layers_per_block': (1, 2), 'use_linear_projection': True,
      'addition_embed_type': 'text_time', 'addition_time_embed_dim': 16}
SMALL = {'hidden_size': 32, 'intermediate_size': 128, 'num_hidden_layers': 3, 'num_attention_heads': 4, 'projection_dim': 32,
         'bos_token_id': 49406, 'eos_token_id': 49407}
WIDE = {**SMALL, 'hidden_size': 48, 'intermediate_size': 192, 'num_attention_heads': 3, 'projection_dim': 48, 'hidden_act': 'gelu'}

# kind -> (UNet, the sizes of its text towers, scheduler, its settings)
KINDS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str, dict[str, Any]]] = {
    'sd15': ({**UNET, 'cross_attention_dim': 32, 'attention_head_dim': 8}, [SMALL], 'DDIMScheduler', BETAS),
    'sd21': ({**UNET, 'cross_attention_dim': 48, 'attention_head_dim': (2, 4), 'use_linear_projection': True}, [WIDE], 'DDIMScheduler',
             {**BETAS, 'prediction_type': 'v_prediction', 'rescale_betas_zero_snr': True}),
    'sdxl': ({**UNET, **XL, 'cross_attention_dim': 80, 'projection_class_embeddings_input_dim': 48 + 6 * 16}, [SMALL, WIDE],
             'EulerDiscreteScheduler', {k: v for k, v in BETAS.items() if k != 'clip_sample'}),
    'refiner': ({**UNET, **XL, 'cross_attention_dim': 48, 'projection_class_embeddings_input_dim': 48 + 5 * 16}, [WIDE],
                'EulerDiscreteScheduler', {k: v for k, v in BETAS.items() if k != 'clip_sample'})}
VAE = {'block_out_channels': (32, 32), 'down_block_types': ('DownEncoderBlock2D',) * 2, 'up_block_types': ('UpDecoderBlock2D',) * 2,
       'layers_per_block': 1, 'latent_channels': 4, 'sample_size': 16}


def pipeline(kind: str, folder: Path, **changes: dict[str, Any]) -> Any:
    """A pipeline of diffusers with random weights. changes: further settings of its unet, vae, text or scheduler."""
    unet, towers, scheduler, settings = KINDS[kind]
    torch.manual_seed(0)
    text = [{**tower, **changes.get('text', {})} for tower in towers]
    parts: dict[str, Any] = {
        'unet': randomize(diffusers.UNet2DConditionModel(**{**unet, **changes.get('unet', {})})),
        'vae': randomize(diffusers.AutoencoderKL(**{**VAE, 'scaling_factor': 0.5, **changes.get('vae', {})})),
        'scheduler': getattr(diffusers, scheduler)(**{**settings, **changes.get('scheduler', {})})}
    is_xl = kind in ('sdxl', 'refiner')
    names = ['text_encoder', 'text_encoder_2'] if len(text) == 2 else ['text_encoder_2' if is_xl else 'text_encoder']
    for name, sizes in zip(names, text):
        tower = transformers.CLIPTextModelWithProjection if name == 'text_encoder_2' else transformers.CLIPTextModel
        parts[name] = randomize(tower(transformers.CLIPTextConfig(**sizes)))
        parts[name.replace('text_encoder', 'tokenizer')] = tokenizer(folder / name, pad=0 if sizes.get('hidden_act') == 'gelu' else None)
    if kind == 'refiner':
        parts |= {'text_encoder': None, 'tokenizer': None, 'requires_aesthetics_score': True, 'force_zeros_for_empty_prompt': False}
        pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts)
    elif is_xl:
        pipe = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        pipe = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer(folder: Path, pad: int | None) -> Any:
    Vocabulary.shipped(pad=pad).save(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def rewrite(file: Path, **changes: Any) -> None:
    """Change some keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
