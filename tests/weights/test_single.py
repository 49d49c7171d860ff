"""A single file without YAML: the network that its shapes and markers tell is the one that it was written from."""
from __future__ import annotations

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from scepter.core.config import Config
from scepter.core.errors import CheckpointError
from scepter.core.registry import MODELS
from scepter.weights import Weights, describe, load_pretrained
from scepter.weights.compare import facts
from scepter.weights.describe import describe_single
from scepter.weights.said import values_of
from tests.models.oracles import randomize
from tests.twins import publish
from tiny import autoencoder, unet

VAE, UNET = autoencoder(1, 2), unet(1, 2)
CLIP, OPENCLIP = {**tiny.CLIP, 'WIDTH': 64, 'HEADS': 1}, {**tiny.OPENCLIP, 'WIDTH': 128, 'HEADS': 2}    # heads of 64, as published
XL = {'MODEL_CHANNELS': 64, 'NUM_HEADS_CHANNELS': 64, 'USE_LINEAR_IN_TRANSFORMER': True, 'ATTENTION_RESOLUTIONS': [2],
      'TRANSFORMER_DEPTH': [0, 2], 'NUM_CLASSES': 'sequential'}
BESIDE = {**OPENCLIP, 'USE_FINAL_LAYER_NORM': False, 'RETURN_POOLED': True}
# kind -> (UNet, text, what it predicts, factor of its latents)
KINDS = {
    'sd15': ({**UNET, 'MODEL_CHANNELS': 32, 'NUM_HEADS': 8, 'ATTENTION_RESOLUTIONS': [1], 'CONTEXT_DIM': 64}, CLIP, 'eps', 0.18215),
    'sd21': ({**UNET, 'MODEL_CHANNELS': 64, 'NUM_HEADS_CHANNELS': 64, 'ATTENTION_RESOLUTIONS': [1, 2], 'CONTEXT_DIM': 128,
              'USE_LINEAR_IN_TRANSFORMER': True, 'NUM_RES_BLOCKS': [1, 2]}, OPENCLIP, 'v', 0.18215),
    'sdxl': ({**UNET, **XL, 'CONTEXT_DIM': 192, 'ADM_IN_CHANNELS': 128 + 6 * 256},
             {'NAME': 'GeneralConditioner', 'EMBEDDERS': [{**CLIP, 'LAYER': 'hidden', 'LAYER_IDX': -2}, BESIDE], 'ZERO_EMPTY': True},
             'eps', 0.13025),
    'refiner': ({**UNET, **XL, 'CONTEXT_DIM': 128, 'ADM_IN_CHANNELS': 128 + 5 * 256},
                {'NAME': 'GeneralConditioner', 'EMBEDDERS': [BESIDE], 'SIZES': ['original_size', 'crop_top_left', 'aesthetic_score']},
                'eps', 0.13025)}


def network(kind, **unet):
    sizes, text, prediction, scale = KINDS[kind]
    return randomize(MODELS.build({
        'NAME': 'LatentDiffusion', 'DIFFUSION_MODEL': {**sizes, **unet}, 'FIRST_STAGE_MODEL': VAE, 'COND_STAGE_MODEL': text,
        'PARAMETERIZATION': prediction, 'SCALE_FACTOR': scale, 'SIZE_FACTOR': 2}))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """kind -> (its network, the file that its makers would publish)."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = network(kind), tmp_path_factory.mktemp(kind) / 'model.safetensors'
            publish(*made[kind])
        return made[kind]
    return get


@pytest.fixture
def marked(files, tmp_path):
    """The file of a kind with more tensors or metadata."""
    def write(kind, metadata=None, **tensors):
        path = tmp_path / 'marked.safetensors'
        save_file({**load_file(files(kind)[1]), **tensors}, path, metadata)
        return path
    return write


def taken(path, key):
    return next(row for row in describe(path).taken if row.key == f'SOLVER.MODEL.{key}')


@pytest.mark.parametrize('kind', KINDS)
def test_a_file_opens_as_the_network_that_it_was_written_from(files, kind):
    model, path = files(kind)
    found = MODELS.build(describe(path).config.SOLVER.MODEL).eval()
    ours, theirs = found.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    prompts = {'prompt': ['a red fox', ''], 'sample_steps': 2, 'image_size': 16}
    for a, b in zip(found.forward_test(**prompts), model.forward_test(**prompts)):
        assert torch.equal(a['image'], b['image'])


def test_what_no_shape_and_no_marker_tells_is_a_convention_and_says_so(files):
    row = taken(files('sd21')[1], 'PARAMETERIZATION')
    assert (row.value, row.is_convention) == ('v', True) and 'PARAMETERIZATION: eps' in row.source
    assert taken(files('sd15')[1], 'DIFFUSION_MODEL.NUM_HEADS').is_convention
    assert not taken(files('sd15')[1], 'DIFFUSION_MODEL.CONTEXT_DIM').is_convention


def test_markers_say_what_a_file_predicts(files, marked):
    path = marked('sdxl', v_pred=torch.zeros(1), ztsnr=torch.zeros(1))
    assert (taken(path, 'PARAMETERIZATION').value, taken(path, 'PARAMETERIZATION').source) == ('v', 'the key v_pred')
    assert taken(path, 'ZERO_TERMINAL_SNR').value is True
    model = MODELS.build(describe(path).config.SOLVER.MODEL)    # the markers are no weights that are left over
    assert model.diffusion.alphas[-1] == 0
    for said, value in (('epsilon', 'eps'), ('v', 'v')):
        row = taken(marked('sd21', {'modelspec.prediction_type': said}), 'PARAMETERIZATION')
        assert row[1:] == (value, 'modelspec.prediction_type', False)
    assert taken(marked('sd21', {'modelspec.architecture': 'stable-diffusion-v2-768-v'}), 'PARAMETERIZATION').source.startswith('modelspec')
    assert taken(marked('sd15', {'modelspec.resolution': '640x384'}), 'IMAGE_SIZE').value == [384, 640]


def test_buffers_say_how_a_file_was_trained(files, marked):
    betas = diffusers.DDPMScheduler(1000, beta_schedule='linear', beta_start=0.0015, beta_end=0.0195).betas
    model = describe(marked('sd15', betas=betas, scale_factor=torch.tensor(0.22765929))).config.SOLVER.MODEL
    assert model.SCHEDULE_ARGS == {'NAME': 'linear', 'BETA_MIN': 0.0015, 'BETA_MAX': 0.0195} and model.SCALE_FACTOR == 0.227659


def test_a_marker_that_the_config_contradicts_is_an_error_with_both_values(files, marked):
    path = marked('sd21', {'modelspec.prediction_type': 'epsilon'})
    with pytest.raises(CheckpointError, match=r"PARAMETERIZATION: the config has 'v', but modelspec.prediction_type says 'eps'"):
        load_pretrained(files('sd21')[0], path)
    load_pretrained(files('sd21')[0], path, ['PARAMETERIZATION'])
    load_pretrained(files('sd21')[0], files('sd21')[1])    # a convention contradicts nothing


def test_an_inpainting_file_has_nine_channels(tmp_path):
    publish(network('sd15', IN_CHANNELS=9), tmp_path / 'm.safetensors')
    assert describe(tmp_path / 'm.safetensors').config.SOLVER.MODEL.DIFFUSION_MODEL.IN_CHANNELS == 9
    publish(network('sd21', IN_CHANNELS=9), tmp_path / 'm.safetensors')
    assert describe(tmp_path / 'm.safetensors').config.SOLVER.MODEL.PARAMETERIZATION == 'eps'    # published so, unlike its sister


def test_a_pickled_file_opens_too(files, tmp_path):
    torch.save({'state_dict': load_file(files('sd15')[1])}, tmp_path / 'm.ckpt')
    assert describe(tmp_path / 'm.ckpt').config.SOLVER.MODEL.COND_STAGE_MODEL.WIDTH == 64


D, T = 'model.diffusion_model.', 'cond_stage_model.transformer.text_model.'
CHANGED = {    # what is strange -> (name, its shape, words of the message)
    'a text MLP': (f'{T}encoder.layers.0.mlp.fc1.weight', (96, 64), 'mlp is not 4 times as wide'),
    'a vocabulary': (f'{T}embeddings.token_embedding.weight', (50000, 64), '50000 words'),
    'fractions of channels': (f'{D}input_blocks.3.0.out_layers.3.weight', (48, 32, 3, 3), 'CHANNEL_MULT'),
    'InstructPix2Pix': (f'{D}input_blocks.0.0.weight', (32, 8, 3, 3), 'InstructPix2Pix'),
    'a feed-forward': (f'{D}middle_block.1.transformer_blocks.0.ff.net.0.proj.weight', (256, 64), 'ff is not 4 times'),
    'another autoencoder': ('first_stage_model.decoder.up.0.block.0.conv2.weight', (40, 32, 3, 3), 'decoder.up have'),
    'a table of classes': (f'{D}label_emb.weight', (10, 128), 'table of classes')}


@pytest.mark.parametrize('case', CHANGED)
def test_what_no_network_of_ours_can_be_is_refused_by_its_name(marked, case):
    name, shape, words = CHANGED[case]
    with pytest.raises(CheckpointError, match=words):
        describe(marked('sd15', **{name: torch.zeros(shape)}))


@pytest.mark.parametrize(('name', 'words'), [('lora_unet_mid.lora_down.weight', 'is a LoRA'), ('emb_params', 'is a textual inversion'),
                                             ('first_stage_model.decoder.conv_in.weight', 'is an autoencoder alone'),
                                             ('a.weight', 'of no model that opens here')])
def test_what_is_no_model_is_named_by_describe_too(tmp_path, name, words):
    save_file({name: torch.zeros(1, 768)}, tmp_path / 'a.safetensors')
    with pytest.raises(CheckpointError, match=words):
        describe(tmp_path / 'a.safetensors')


@pytest.mark.parametrize('recipe', ['sd15/sd15_512_full', 'sd21/sd21_768_v', 'sdxl/sdxl_1024', 'sdxl/sdxl_refiner'])
def test_at_published_size_a_file_is_told_as_its_recipe_has_it(recipe):
    cfg = {**Config.load(f'{recipe}.yaml').SOLVER.MODEL, 'PRETRAINED_MODEL': None}
    with torch.device('meta'):
        recipe_model = MODELS.build(cfg)
        whole = Weights.of({compvis(n, 'sdxl' in recipe): t for n, t in recipe_model.state_dict().items()})
        node = describe_single(whole, recipe)['SOLVER']['MODEL']
        told_model = MODELS.build(values_of(node))
    shapes, told = ({n: t.shape for n, t in m.state_dict().items()} for m in (recipe_model, told_model))
    assert told == shapes
    said, recipes = facts(values_of(node)), facts(recipe_model.cfg)
    assert len(said) > 5 and all(fact.equals(recipes[key]) for key, fact in said.items())    # the conventions too
    assert told_model.IMAGE_SIZE == recipe_model.IMAGE_SIZE and told_model.SIZE_FACTOR == 8


def compvis(name, is_xl):
    """Our name in the layout that is published."""
    part, _, rest = name.partition('.')
    return {'model': 'model.diffusion_model', 'cond_stage_model': 'conditioner' if is_xl else part}.get(part, part) + f'.{rest}'
