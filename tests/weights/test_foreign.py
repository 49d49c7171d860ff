"""Files that are often given for a model: each is called by its name, with what to do, and no advice fills a network with noise."""
from __future__ import annotations

import pytest
import torch

import scepter.components  # noqa: F401  (registers)
from scepter.core.disk.tensors import write_tensors
from scepter.core.errors import CheckpointError
from scepter.core.registry import MODELS
from scepter.weights import Weights, export_diffusers, load_pretrained, read_weights
from scepter.weights.families.autoencoder import VAE
from scepter.weights.families.unet import UNET
from tests.weights.test_weights import build, compvis

KOHYA = 'lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q'
SGM = 'lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q'
PEFT = 'unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q'
TOWER = 'lora_te_text_model_encoder_layers_0_self_attn_q_proj'
PAIR, VECTORS = ((4, 32), (32, 4)), (2, 768)


def pair(module, down, up):
    return {f'{module}.{down}': PAIR[0], f'{module}.{up}': PAIR[1]}


# what it is -> (names and shapes, words of the message)
FILES = {
    "kohya's LoRA": ({**pair(KOHYA, 'lora_down.weight', 'lora_up.weight'), f'{KOHYA}.alpha': ()}, ['a LoRA', 'Merge it']),
    "kohya's LoRA for SDXL": (pair(SGM, 'lora_down.weight', 'lora_up.weight'), ['a LoRA', 'kohya']),
    "kohya's LoRA of a text tower alone": (pair(TOWER, 'lora_down.weight', 'lora_up.weight'), ['a LoRA', 'kohya']),
    'LoRA of PEFT': (pair(PEFT, 'lora_A.weight', 'lora_B.weight'), ['a LoRA', 'PEFT', 'Merge it']),
    "LoRA of diffusers' scripts": (pair(PEFT, 'lora.down.weight', 'lora.up.weight'), ['a LoRA', 'diffusers']),
    'LoRA of old diffusers': (pair('unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor', 'to_q_lora.down.weight',
                                   'to_q_lora.up.weight'), ['a LoRA', 'diffusers']),
    'generic LoRA': (pair('diffusion_model.input_blocks.1.1.proj_in', 'lora_A.weight', 'lora_B.weight'), ['a LoRA']),
    'LoHa': (pair(KOHYA, 'hada_w1_a', 'hada_w1_b'), ['a LoHa (LyCORIS)', 'Merge it']),
    'LoKr': (pair(KOHYA, 'lokr_w1', 'lokr_w2'), ['a LoKr (LyCORIS)', 'Merge it']),
    "kohya's textual inversion": ({'emb_params': VECTORS}, ['a textual inversion', 'new word']),
    "diffusers' textual inversion": ({'<cat-toy>': (1, 1024)}, ['a textual inversion']),
    'textual inversion of SDXL': ({'clip_l': VECTORS, 'clip_g': (2, 1280)}, ['a textual inversion']),
    'ControlNet of CompVis': ({'control_model.input_blocks.0.0.weight': (4,)}, ['a ControlNet']),
    'ControlNet of diffusers': ({'controlnet_cond_embedding.conv_in.weight': (4,), 'down_blocks.0.attentions.0.norm.weight': (4,)},
                                ['a ControlNet', 'give the model itself']),
    'IP-Adapter': ({'image_proj.proj.weight': (4,), 'ip_adapter.1.to_k_ip.weight': (4,)}, ['an IP-Adapter']),
    'T2I-Adapter': ({'adapter.body.0.resnets.0.block1.weight': (4,)}, ['a T2I-Adapter']),
    'AnimateDiff': ({'down_blocks.0.motion_modules.0.temporal_transformer.norm.bias': (4,)}, ['AnimateDiff']),
    'FLUX': ({'model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale': (4,)}, ['FLUX', 'No network here']),
    'FLUX alone': ({'single_blocks.0.linear1.weight': (4,)}, ['FLUX']),
    'Stable Diffusion 3': ({'model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight': (4,)}, ['Stable Diffusion 3']),
    'Playground': ({'edm_mean': (1,), 'model.diffusion_model.out.2.bias': (4,)}, ['EDM']),
    'T5': ({'encoder.block.0.layer.0.SelfAttention.q.weight': (4,)}, ['T5'])}


@pytest.fixture(scope='module')
def model():
    return build('sd15')


def refusal(model, path):
    with pytest.raises(CheckpointError) as error:
        load_pretrained(model, path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('what', FILES)
def test_a_file_that_is_no_model_is_called_by_its_name(model, what, tmp_path):
    shapes, words = FILES[what]
    write_tensors(tmp_path / 'given.safetensors', {name: torch.zeros(shape) for name, shape in shapes.items()})
    for network in (model, model.first_stage_model):
        said = refusal(network, tmp_path / 'given.safetensors')
        assert all(word in said for word in words) and 'IGNORE_KEYS' not in said


def test_a_textual_inversion_of_a1111_is_called_by_its_name(tmp_path):
    torch.save({'string_to_token': {'*': 265}, 'string_to_param': {'*': torch.zeros(2, 768)}, 'name': 'style'}, tmp_path / 'a.pt')
    with pytest.raises(CheckpointError, match='a textual inversion'):
        read_weights(tmp_path / 'a.pt')


def test_an_ip_adapter_of_a_pickle_is_called_by_its_name(tmp_path):
    torch.save({'image_proj': {'a': torch.zeros(1)}, 'ip_adapter': {'b': torch.zeros(1)}}, tmp_path / 'a.bin')
    with pytest.raises(CheckpointError, match='an IP-Adapter'):
        read_weights(tmp_path / 'a.bin')


def section(model, prefix):
    return {name: value for name, value in compvis(model).items() if name.startswith(prefix)}


def unet_of_diffusers(model):
    return dict(UNET.to_theirs(Weights.of(model.model.state_dict())))


PARTS = {
    "a UNet with CompVis' names": (lambda m: section(m, 'model.'), ['a UNet alone, without autoencoder and text tower', 'DIFFUSION_MODEL']),
    'a UNet under bare names': (lambda m: m.model.state_dict(), ['a UNet alone']),
    "a UNet with diffusers' names": (unet_of_diffusers, ['a UNet alone', 'DIFFUSION_MODEL.PRETRAINED_MODEL']),
    "an autoencoder with CompVis' names": (lambda m: section(m, 'first_stage_model.'), ['an autoencoder alone', 'FIRST_STAGE_MODEL']),
    'an autoencoder under bare names': (lambda m: m.first_stage_model.state_dict(),
                                        ['an autoencoder alone', 'without UNet and text tower']),
    "an autoencoder with diffusers' names": (lambda m: dict(VAE.to_theirs(read(m.first_stage_model))), ['an autoencoder alone']),
    'a text tower': (lambda m: {f'text_model.{n}': t for n, t in m.cond_stage_model.tower.state_dict().items()},
                     ['a text tower alone', 'COND_STAGE_MODEL.PRETRAINED_MODEL']),
    'a model without its text tower': (lambda m: section(m, ('model.', 'first_stage_model.')),
                                       ['a UNet and autoencoder alone, without text tower', 'FIRST_STAGE_MODEL'])}


def read(module):
    from scepter.weights import Weights
    return Weights.of(module.state_dict())


@pytest.mark.parametrize('what', PARTS)
def test_a_part_alone_is_called_by_its_name_and_told_where_it_belongs(model, what, tmp_path):
    tensors, words = PARTS[what]
    write_tensors(tmp_path / 'part.safetensors', tensors(model))
    said = refusal(model, tmp_path / 'part.safetensors')
    assert all(word in said for word in words) and 'IGNORE_KEYS' not in said


def test_a_part_that_may_stay_as_it_is_may_be_absent(model, tmp_path):
    write_tensors(tmp_path / 'part.safetensors', section(model, ('model.', 'first_stage_model.')))
    load_pretrained(model, tmp_path / 'part.safetensors', ['cond_stage_model.*'])


def test_a_few_names_that_are_missing_are_listed_as_before(model, tmp_path):
    write_tensors(tmp_path / 'm.safetensors', {n: t for n, t in compvis(model).items() if n != 'model.diffusion_model.out.2.bias'})
    assert '1 missing' in (said := refusal(model, tmp_path / 'm.safetensors')) and 'IGNORE_KEYS' in said


def test_a_folder_of_one_part_is_named_too(model, tmp_path):
    export_diffusers(model, tmp_path / 'whole')
    assert 'an autoencoder alone' in refusal(model, tmp_path / 'whole' / 'vae')


def test_a_network_without_prompts_needs_no_text_tower(model, tmp_path):
    from tests.weights.test_weights import SHAPES, VAE
    unet = {**SHAPES['sd15'][0], 'CONTEXT_DIM': None}
    plain = MODELS.build({'NAME': 'LatentDiffusion', 'DIFFUSION_MODEL': unet, 'FIRST_STAGE_MODEL': VAE, 'SIZE_FACTOR': 2})
    write_tensors(tmp_path / 'm.safetensors', compvis(plain))
    load_pretrained(plain, tmp_path / 'm.safetensors')
