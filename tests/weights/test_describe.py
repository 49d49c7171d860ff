"""A stranger's model without YAML: opened, it draws what diffusers' own pipeline draws, and what it cannot be is named."""
from __future__ import annotations

import itertools
import math
import shutil

import diffusers
import pytest
import torch

import scepter.components  # noqa: F401  (registers)
from scepter.core import streams
from scepter.core.config import Config
from scepter.core.errors import CheckpointError
from scepter.core.registry import BACKBONES, EMBEDDERS, MODELS, SCHEDULES
from scepter.run_inference import main as run_inference
from scepter.run_train import main as run_train
from scepter.solvers.diffusion import SampleArgs
from scepter.weights import describe, export_diffusers, load_pretrained
from scepter.weights.families.process import sampling
from scepter.weights.families.sd import StableDiffusion1
from scepter.weights.family import parts
from scepter.weights.files import read_configs
from scepter.weights.said import values_of
from tests.twins import three_images
from tests.weights.strangers import pipeline, rewrite

PROMPTS = ['a red fox in the snow', '']


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """kind -> (its pipeline, the folder that save_pretrained wrote); made when first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            made[kind] = pipeline(kind, root), root / 'model'
            made[kind][0].save_pretrained(made[kind][1])
        return made[kind]
    return get


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the Stable Diffusion 1.5, whose configs may be changed."""
    return shutil.copytree(folders('sd15')[1], tmp_path / 'copy')


def start(count, pixels=16):
    return streams.normal_rows(streams.row_seeds(7, count), 'start', (4, pixels // 2, pixels // 2), torch.device('cpu'))


@pytest.mark.parametrize('kind', ['sd15', 'sd21', 'sdxl'])
def test_a_folder_opens_without_yaml_and_draws_what_its_pipeline_draws(folders, kind):
    pipe, path = folders(kind)
    config = describe(path).config
    model = MODELS.build(config.SOLVER.MODEL).eval()
    how = SampleArgs(config.SOLVER.SAMPLE_ARGS).given() | {'sample_steps': 4}
    ours = torch.stack([r['image'] for r in model.forward_test(prompt=PROMPTS, n_prompt='blurry', seed=7, **how)])
    zero_snr = {'guidance_rescale': 0.7} if kind == 'sd21' else {}
    pipe.scheduler.set_timesteps(4)
    sigma = float(pipe.scheduler.init_noise_sigma)    # Euler's begins with sigma times the noise, ours with its hypotenuse to 1
    unit = sigma / math.hypot(sigma, 1) if kind == 'sdxl' else 1
    theirs = pipe(PROMPTS, negative_prompt=['blurry'] * 2, num_inference_steps=4, latents=start(2) / unit, output_type='pt',
                  **zero_snr).images
    if kind == 'sdxl':    # zeros for an empty prompt are for the negative one there; ours are for any
        ours, theirs = ours[:1], theirs[:1]
    assert theirs.std() > 0.05
    assert (ours - theirs).abs().max() < 1e-3


def test_the_refiner_opens_without_yaml(folders):
    _, path = folders('refiner')
    model = MODELS.build(describe(path).config.SOLVER.MODEL).eval()
    assert model.cond_stage_model.SIZES == ['original_size', 'crop_top_left', 'aesthetic_score']
    assert not model.cond_stage_model.ZERO_EMPTY and model.cond_stage_model.vector_width == 48 + 5 * 16


def test_each_value_says_where_it_was_taken_from(folders):
    taken = {row.key: row for row in describe(folders('sd21')[1]).taken}
    row = taken['SOLVER.MODEL.PARAMETERIZATION']
    assert (row.value, row.source, row.is_convention) == ('v', 'scheduler/scheduler_config.json: prediction_type', False)
    assert taken['SOLVER.MODEL.SCALE_FACTOR'].value == 0.5
    assert taken['SOLVER.MODEL.DIFFUSION_MODEL.NUM_HEADS_CHANNELS'].source == 'unet/config.json: attention_head_dim'
    assert 'vae/config.json: scaling_factor' in str(taken['SOLVER.MODEL.SCALE_FACTOR'])
    assert taken['SOLVER.SAMPLE_ARGS.GUIDE_SCALE'].is_convention and 'assumed: ' in str(taken['SOLVER.SAMPLE_ARGS.GUIDE_SCALE'])


def test_the_config_can_be_saved_and_loaded(folders, tmp_path):
    config = describe(folders('sdxl')[1]).config
    (tmp_path / 'saved.yaml').write_text(str(config))
    assert Config.load(tmp_path / 'saved.yaml') == config


# ---------------------------------------------------------------- beside a config
def load(folder, **changes):
    config = describe(folder).config.SOLVER.MODEL
    for key, value in changes.items():
        *path, last = key.split('__')
        node = config
        for name in path:
            node = node[int(name)] if name.isdigit() else node[name]
        node[last] = value
    return MODELS.build(config)


CONTRADICTIONS = {    # kind, the key that is said otherwise, its value, both values in the message
    'prediction': ('sd21', 'PARAMETERIZATION', 'x0', "'x0'", "prediction_type says 'v'"),
    'scale': ('sd15', 'SCALE_FACTOR', 0.18215, '0.18215', 'scaling_factor says 0.5'),
    'heads': ('sd15', 'DIFFUSION_MODEL__NUM_HEADS', 4, '4, 4 heads', 'attention_head_dim says 8, 8 heads'),
    'levels': ('sd15', 'TIMESTEPS', 500, '500', 'num_train_timesteps says 1000'),
    'betas': ('sd15', 'SCHEDULE_ARGS', {'NAME': 'linear'}, 'linear', 'beta_schedule says {"NAME": "scaled_linear"'),
    'zero SNR': ('sd21', 'ZERO_TERMINAL_SNR', False, 'False', 'rescale_betas_zero_snr says True'),
    'heads of a tower': ('sd15', 'COND_STAGE_MODEL__HEADS', 2, '2 heads', 'num_attention_heads says 4 heads'),
    'layer of a tower': ('sdxl', 'COND_STAGE_MODEL__EMBEDDERS__0__LAYER_IDX', -1, 'after 3 blocks', 'after 2 blocks'),
    'norm of a tower': ('sdxl', 'COND_STAGE_MODEL__EMBEDDERS__1__USE_FINAL_LAYER_NORM', True, 'normed', 'not normed'),
    'empty prompts': ('sdxl', 'COND_STAGE_MODEL__ZERO_EMPTY', False, 'False', 'force_zeros_for_empty_prompt says True')}


@pytest.mark.parametrize('case', CONTRADICTIONS)
def test_a_config_that_says_otherwise_than_the_folder_is_an_error_with_both_values(folders, case):
    kind, key, value, ours, theirs = CONTRADICTIONS[case]
    with pytest.raises(CheckpointError) as error:
        load(folders(kind)[1], **{key: value})
    assert ours in str(error.value) and theirs in str(error.value)
    assert error.value.exit_code == 4


def test_training_and_drawing_both_end_with_4(folders, tmp_path, capsys):
    path = folders('sd15')[1]
    config = describe(path).config
    config.SOLVER |= {'WORK_DIR': str(tmp_path / 'work'), 'MAX_STEPS': 1, 'OPTIMIZER': {'NAME': 'SGD', 'LEARNING_RATE': 1e-3},
                      'TRAIN_DATA': {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(three_images(tmp_path / 'images'))}}
    config.SOLVER.MODEL.SCALE_FACTOR = 0.18215
    (tmp_path / 'train.yaml').write_text(str(config))
    assert run_train(['--cfg', str(tmp_path / 'train.yaml')]) == 4
    words = ['--prompt', 'x', '--pretrained_model', str(path), '--save_folder', str(tmp_path / 'out')]
    assert run_inference([*words, 'SOLVER.MODEL.PARAMETERIZATION=v']) == 4
    told = capsys.readouterr().err
    assert '0.18215, but vae/config.json: scaling_factor says 0.5' in told and "'v', but scheduler" in told and 'Traceback' not in told


def test_what_ignore_keys_names_may_differ_from_the_folder(folders):
    path = folders('sd15')[1]
    with pytest.raises(CheckpointError, match=r'IGNORE_KEYS: \[PARAMETERIZATION, ZERO_TERMINAL_SNR\]'):
        load(path, PARAMETERIZATION='v', ZERO_TERMINAL_SNR=True)
    model = load(path, PARAMETERIZATION='v', ZERO_TERMINAL_SNR=True, IGNORE_KEYS=['PARAMETERIZATION', 'ZERO_*'])
    assert model.PARAMETERIZATION == 'v'


def test_the_same_network_said_in_other_words_is_no_contradiction(folders):
    load(folders('sd21')[1], COND_STAGE_MODEL__LAYER='penultimate', COND_STAGE_MODEL__DEPTH=4, COND_STAGE_MODEL__USE_FINAL_LAYER_NORM=True)
    load(folders('sdxl')[1], SCHEDULE_ARGS={'NAME': 'quadratic'}, DIFFUSION_MODEL__TRANSFORMER_DEPTH=[0, 2])


def test_a_part_is_held_against_its_own_config_too(folders, folder):
    node = describe(folder).config.SOLVER.MODEL.DIFFUSION_MODEL
    for source in (folder, folder / 'unet'):
        with pytest.raises(CheckpointError, match=r'4, 4 heads.*8, 8 heads'):
            BACKBONES.build({**node, 'NUM_HEADS': 4, 'PRETRAINED_MODEL': str(source)})
    rewrite(folder / 'vae' / 'config.json', norm_num_groups=16)
    with pytest.raises(CheckpointError, match=r'ENCODER.NORM_GROUPS: the config has 32, but .*config.json.* says 16'):
        load_pretrained(MODELS.build(describe(folders('sd15')[1]).config.SOLVER.MODEL.FIRST_STAGE_MODEL), folder / 'vae')


def test_a_section_or_the_process_may_be_left_out_of_the_comparison(folders, folder):
    config = describe(folders('sd15')[1]).config.SOLVER.MODEL
    rewrite(folder / 'model_index.json', _class_name='SomebodysPipeline')    # with a config, only its parts matter
    rewrite(folder / 'scheduler' / 'scheduler_config.json', _class_name='FlowMatchEulerDiscreteScheduler')
    rewrite(folder / 'text_encoder' / 'config.json', num_attention_heads=2)
    for keys in ([], ['SCHEDULE_ARGS'], ['COND_STAGE_MODEL']):
        with pytest.raises(CheckpointError, match=r'num_attention_heads|FlowMatch'):
            MODELS.build({**config, 'PRETRAINED_MODEL': str(folder), 'IGNORE_KEYS': keys})
    MODELS.build({**config, 'PRETRAINED_MODEL': str(folder), 'IGNORE_KEYS': ['SCHEDULE_ARGS', 'COND_STAGE_MODEL']})


def test_a_network_without_prompts_is_not_held_against_a_folders_tower(folders):
    config = describe(folders('sd15')[1]).config.SOLVER.MODEL
    with pytest.raises(CheckpointError, match='unexpected'):    # by names, not by what its tower is like
        MODELS.build({**config, 'COND_STAGE_MODEL': None, 'DIFFUSION_MODEL': {**config.DIFFUSION_MODEL, 'CONTEXT_DIM': None}})


def test_an_autoencoder_of_its_own_brings_its_scale(folders, folder):
    rewrite(folder / 'vae' / 'config.json', scaling_factor=0.25)
    vae = str(folder / 'vae')
    with pytest.raises(CheckpointError, match=r'scaling_factor 0.25.*SCALE_FACTOR.* 0.5'):
        load(folders('sd15')[1], FIRST_STAGE_MODEL__PRETRAINED_MODEL=vae)
    load(folders('sd15')[1], FIRST_STAGE_MODEL__PRETRAINED_MODEL=vae, SCALE_FACTOR=0.25)    # the folder's own VAE is not used
    load(folders('sd15')[1], FIRST_STAGE_MODEL__PRETRAINED_MODEL=vae, IGNORE_KEYS=['SCALE_FACTOR'])


@torch.no_grad()
def test_other_groups_of_the_normalisation_come_and_go(folder, tmp_path):
    rewrite(folder / 'vae' / 'config.json', norm_num_groups=8)
    model = MODELS.build(describe(folder).config.SOLVER.MODEL).eval()
    assert model.FIRST_STAGE_MODEL.ENCODER.NORM_GROUPS == model.FIRST_STAGE_MODEL.DECODER.NORM_GROUPS == 8
    export_diffusers(model, tmp_path / 'exported')
    for vae in (folder / 'vae', tmp_path / 'exported' / 'vae'):
        theirs, z = diffusers.AutoencoderKL.from_pretrained(vae), torch.randn(1, 4, 8, 8)
        torch.testing.assert_close(model.decode_first_stage(z), theirs.decode(z / model.SCALE_FACTOR).sample, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_shifted_latent_is_that_of_diffusers(folder, tmp_path):
    rewrite(folder / 'vae' / 'config.json', shift_factor=0.25)
    told = describe(folder)
    model = MODELS.build(told.config.SOLVER.MODEL).eval()
    assert model.SHIFT_FACTOR == 0.25 and 'vae/config.json: shift_factor' in [taken.source for taken in told.taken]
    vae, z = diffusers.AutoencoderKL.from_pretrained(folder / 'vae'), torch.randn(1, 4, 8, 8)
    theirs = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample
    near = {'rtol': 1e-4, 'atol': 1e-4}
    torch.testing.assert_close(model.decode_first_stage(z), theirs, **near)
    moments = vae.encode(theirs).latent_dist.mean
    torch.testing.assert_close(model.encode_first_stage(theirs, is_drawn=False), (moments - 0.25) * vae.config.scaling_factor, **near)

    export_diffusers(model, tmp_path / 'exported')
    assert diffusers.AutoencoderKL.from_pretrained(tmp_path / 'exported' / 'vae').config.shift_factor == 0.25
    with pytest.raises(CheckpointError, match=r'shift_factor.*0.25'):
        load(folder, SHIFT_FACTOR=0.0)


def test_a_tower_of_another_activation_is_not_taken_for_openclips(folders):
    clip = {'NAME': 'FrozenOpenCLIPEmbedder', 'ARCH': 'custom', 'WIDTH': 32, 'DEPTH': 3, 'HEADS': 4, 'LAYER': 'last'}
    with pytest.raises(CheckpointError, match='hidden_act says FrozenCLIPEmbedder'):
        EMBEDDERS.build({**clip, 'PRETRAINED_MODEL': str(folders('sd15')[1] / 'text_encoder')})


# ---------------------------------------------------------------- what cannot be
UNET, VAE, TEXT, SCHEDULER = 'unet/config.json', 'vae/config.json', 'text_encoder/config.json', 'scheduler/scheduler_config.json'
REFUSED = {
    'norm groups of the UNet': (UNET, {'norm_num_groups': 16}), 'norm groups of the VAE': (VAE, {'norm_num_groups': 0}),
    'fractions of channels': (UNET, {'block_out_channels': [64, 96]}), 'odd channels': (VAE, {'block_out_channels': [48, 96]}),
    'text MLP': (TEXT, {'intermediate_size': 96}), 'vocabulary': (TEXT, {'vocab_size': 49409}),
    'activation': (TEXT, {'hidden_act': 'relu'}),
    'heads of each level': (UNET, {'attention_head_dim': [2, 2]}), 'nested depths': (UNET, {'transformer_layers_per_block': [[1], [2]]}),
    'another block': (UNET, {'down_block_types': ['AttnDownBlock2D', 'DownBlock2D']}), 'no middle': (UNET, {'mid_block_type': None}),
    'another time': (UNET, {'time_cond_proj_dim': 256}), 'instruct': (UNET, {'in_channels': 8}),
    'learnt variance': (UNET, {'out_channels': 8}),
    'a shift that is none': (VAE, {'shift_factor': 'x'}), 'quant': (VAE, {'use_quant_conv': False}),
    'a flow': (SCHEDULER, {'_class_name': 'FlowMatchEulerDiscreteScheduler'}), 'EDM': (SCHEDULER, {'_class_name': 'EDMEulerScheduler'}),
    'unknown betas': (SCHEDULER, {'beta_schedule': 'laplace'}), 'unknown prediction': (SCHEDULER, {'prediction_type': 'flow_prediction'}),
    'other pipelines': ('model_index.json', {'_class_name': 'FluxPipeline'}), 'a wrong type': (UNET, {'block_out_channels': 'wide'}),
    'no norm': (UNET, {'norm_num_groups': None}), 'a depth that fills the memory': (TEXT, {'num_hidden_layers': 10 ** 9}),
    'a wrong number': (UNET, {'layers_per_block': 1.5}), 'nothing to read': (VAE, {'scaling_factor': 'x'})}


def test_a_schedule_that_a_folder_lists_is_taken_as_it_stands(folder):
    betas = [1e-4 * (i + 1) for i in range(100)]
    rewrite(folder / SCHEDULER, trained_betas=betas, num_train_timesteps=100)
    model = describe(folder).config.SOLVER.MODEL
    alphas, _ = SCHEDULES.build(model.SCHEDULE_ARGS, n=model.TIMESTEPS)
    theirs = diffusers.DDIMScheduler(num_train_timesteps=100, trained_betas=betas).alphas_cumprod
    assert torch.allclose((alphas ** 2).float(), theirs)


def test_a_tokenizer_of_its_own_comes_along(folder):
    assert 'TOKENIZER_PATH' not in describe(folder).config.SOLVER.MODEL.COND_STAGE_MODEL
    text = (folder / 'tokenizer' / 'tokenizer.json').read_text()
    (folder / 'tokenizer' / 'tokenizer.json').write_text(text.replace('"fox</w>"', '"faux</w>"'))
    assert describe(folder).config.SOLVER.MODEL.COND_STAGE_MODEL.TOKENIZER_PATH == str(folder / 'tokenizer')


def test_an_inpainting_folder_has_nine_channels(folder):
    rewrite(folder / UNET, in_channels=9)
    rewrite(folder / 'model_index.json', _class_name='StableDiffusionInpaintPipeline')
    assert describe(folder).config.SOLVER.MODEL.DIFFUSION_MODEL.IN_CHANNELS == 9


def test_an_offset_of_the_steps_that_is_left_aside_is_said(folder):
    rewrite(folder / SCHEDULER, timestep_spacing='leading', steps_offset=1)
    row = next(row for row in describe(folder).taken if row.key == 'SOLVER.SAMPLE_ARGS.DISCRETIZATION')
    assert row.value == 'leading' and 'steps_offset 1 is left aside' in row.source


@pytest.mark.parametrize(('scheduler', 'sampler', 'is_convention'), [
    ({'_class_name': 'EulerAncestralDiscreteScheduler'}, 'euler_ancestral', False),
    ({'_class_name': 'DPMSolverMultistepScheduler'}, 'dpmpp_2m', False),
    ({'_class_name': 'DPMSolverMultistepScheduler', 'algorithm_type': 'sde-dpmsolver++'}, 'dpmpp_2m_sde', False),
    ({'_class_name': 'DPMSolverMultistepScheduler', 'solver_order': 3}, 'ddim', True),
    ({'_class_name': 'PNDMScheduler'}, 'ddim', True)])
def test_the_sampler_is_the_schedulers_or_said_to_be_another(folder, scheduler, sampler, is_convention):
    rewrite(folder / SCHEDULER, **scheduler)
    row = next(row for row in describe(folder).taken if row.key == 'SOLVER.SAMPLE_ARGS.SAMPLER')
    assert (row.value, row.is_convention) == (sampler, is_convention)
    assert scheduler['_class_name'] in row.source or '_class_name' in row.source


STRANGE = [None, -1, 'x', [], {}, [None], [[1]], 1e308, True, ['a', 'b'], [1, 2, 3, 4, 5, 6], 10 ** 9, float('nan')]


def test_whatever_stands_in_a_config_is_described_or_refused(folder):
    whole, refused = read_configs(folder, [part.folder for part in parts()]), 0
    for part, values in whole.items():
        for key, value in itertools.product(values, STRANGE):
            settings = {**whole, part: {**values, key: value}}
            try:
                assert values_of([StableDiffusion1().said(settings, 'FOLDER'), sampling(settings['scheduler'], 'FOLDER')])
            except CheckpointError as error:
                refused += 1
                assert 'FOLDER' in str(error)
    assert refused > 300


@pytest.mark.parametrize('case', REFUSED)
def test_what_no_network_of_ours_can_be_is_refused_by_its_key(folder, case):
    file, change = REFUSED[case]
    if case == 'heads of each level':    # told apart only where both levels have attention
        rewrite(folder / UNET, down_block_types=['CrossAttnDownBlock2D'] * 2, up_block_types=['CrossAttnUpBlock2D'] * 2)
        change = {'attention_head_dim': [2, 8]}
    rewrite(folder / file, **change)
    with pytest.raises(CheckpointError) as error:
        describe(folder)
    said = str(error.value)
    key, value = next(iter(change.items()))
    assert str(folder) in said
    assert (key in said and file in said) or str(value) in said
