"""Tiny published folders of NOVA, made as their own libraries make them: Phi by transformers, the autoencoder by diffusers."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

import scepter.components  # noqa: F401
from scepter.core.config import Config
from scepter.core.registry import BACKBONES, MODELS

WORDS = ['<pad>', 'a', 'red', 'blue', 'fox', 'bird', 'in', 'the', 'snow', 'blurry', 'photo', 'of']
PHI = {'WIDTH': 24, 'DEPTH': 2, 'HEADS': 2, 'MLP_WIDTH': 48, 'VOCABULARY': 16, 'ROTARY_SHARE': 0.5}
NETWORK = {'image_dim': 4, 'image_size': [64, 64], 'image_stride': 8, 'image_base_size': [4, 4], 'video_base_size': [1, 2, 2],
           'video_mixer_rank': None, 'rotary_pos_embed': False, 'arch': ['vit_d2w32h2', 'vit_d2w32h2', 'mlp_d1w16']}
TEXT = {**NETWORK, 'text_token_dim': 24, 'text_token_len': 6}
CLIP = {**TEXT, 'video_base_size': [4, 2, 2], 'video_mixer_rank': 3}
FLOW = {'_class_name': 'FlowMatchEulerDiscreteScheduler', 'num_train_timesteps': 1000, 'shift': 1.0}
DDPM = {'_class_name': 'DDPMScheduler', 'num_train_timesteps': 1000, 'beta_schedule': 'squaredcos_cap_v2', 'steps_offset': 1,
        'clip_sample': False}


def write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding='utf-8')


def tokenizer(folder: Path) -> Path:
    """A tokenizer of WORDS, each a token, without begin and end, as CodeGen's has none."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token='<pad>'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>').save_pretrained(folder)
    return folder


def phi(folder: Path) -> PhiForCausalLM:
    """A language model as published: beside the text encoder it has a last layer, lm_head."""
    torch.manual_seed(3)
    model = PhiForCausalLM(PhiConfig(vocab_size=16, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                                     partial_rotary_factor=0.5)).eval()
    model.save_pretrained(folder)
    return model


def network(values: dict[str, Any]) -> nn.Module:
    return BACKBONES.build(Config({'NAME': 'NovaTransformer', **{key.upper(): value for key, value in values.items()}}))


def folder(root: Path, values: dict[str, Any], scheduler: dict[str, Any]) -> Path:
    """A folder of NOVA: of images, of clips where video_base_size says so, told a class where no text_token_dim is."""
    import diffusers
    torch.manual_seed(1)
    is_clip, is_text = values['video_base_size'][0] > 1, 'text_token_dim' in values
    write(root / 'model_index.json', {'_class_name': 'NOVAPipeline' if is_text else 'NOVAC2IPipeline', '_diffusers_version': '0.31.0'})
    write(root / 'transformer' / 'config.json', {'_class_name': 'NOVATransformer3DModel', **values})
    save_file(network(values).state_dict(), root / 'transformer' / 'diffusion_pytorch_model.safetensors')
    write(root / 'scheduler' / 'scheduler_config.json', scheduler)
    if is_clip:
        sizes = {'latent_channels': 4, 'block_out_channels': [32] * 4, 'layers_per_block': 1}
        vae = MODELS.build(Config({'NAME': 'VideoAutoencoderKL', **{key.upper(): value for key, value in sizes.items()}}))
        write(root / 'vae' / 'config.json', {'_class_name': 'AutoencoderKLOpenSora', 'scaling_factor': 0.5, **sizes})
        save_file(vae.state_dict(), root / 'vae' / 'diffusion_pytorch_model.safetensors')
    else:
        diffusers.AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=('DownEncoderBlock2D',) * 4, latent_channels=4,
                                up_block_types=('UpDecoderBlock2D',) * 4, scaling_factor=0.5).save_pretrained(root / 'vae')
    if is_text:
        phi(root / 'text_encoder')
        tokenizer(root / 'tokenizer')
    return root
