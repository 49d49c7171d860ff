"""NOVA (Deng et al. 2024, arXiv 2412.14169): folders of its network, an autoencoder of images or of clips, and Phi, or classes.

The network's config is transformer/config.json, never a recipe: a mixer that it names must be among the weights.
"""
from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from scepter.core.config import plain
from scepter.core.errors import CheckpointError
from scepter.weights.families import autoencoder
from scepter.weights.families.sd import write_json
from scepter.weights.family import Family, Part, register
from scepter.weights.files import Configs
from scepter.weights.said import Node, Said, Settings
from scepter.weights.tables import Row

NETWORK_CLASS, CLIP_CLASS, TEXT_CLASS = 'NOVATransformer3DModel', 'AutoencoderKLOpenSora', 'PhiEncoderModel'
NETWORK, SCHEDULER, TEXT = 'transformer/config.json', 'scheduler/scheduler_config.json', 'text_encoder/config.json'
KEYS = ('image_dim', 'image_size', 'image_stride', 'text_token_dim', 'text_token_len', 'image_base_size', 'video_base_size',
        'video_mixer_rank', 'rotary_pos_embed', 'arch', 'num_classes')
CLIP_KEYS = ('latent_channels', 'block_out_channels', 'layers_per_block', 'down_block_types')
CLIP_FRAMES = 33    # of the published clips

# ---------------------------------------------------------------- names
MODULES = ('video_encoder', 'image_encoder', 'image_decoder', 'mask_embed', 'text_embed', 'label_embed', 'video_pos_embed', 'motion_embed')
TRANSFORMER = Part('transformer', 'model.', tuple(Row(name, name) for name in MODULES), 'network of NOVA')
CLIP_VAE = Part('vae', 'first_stage_model.',
                tuple(Row(name, name) for name in ('encoder', 'decoder', 'quant_conv', 'post_quant_conv')), 'autoencoder of clips')
# as a language model has them, or by themselves; the last layer of a language model is no part of it
PHI = Part('text_encoder', 'cond_stage_model.', tuple(Row(f'transformer.{name}', f'{prefix}{name}') for prefix in ('model.', '')
                                                      for name in ('embed_tokens', 'layers', 'final_layernorm')),
           'text encoder of NOVA', spare=('lm_head.',), stem='model')


class Nova(Family):
    """What NOVA of images and NOVA of clips share."""

    pipelines = tuple(f'NOVA{kind}Pipeline' for kind in ('', 'C2I', 'TrainT2I', 'TrainT2V', 'TrainC2I'))
    autoencoder_class = ''

    def accepts(self, settings: Configs) -> bool:
        pipeline = settings.get('model_index', {}).get('_class_name')
        is_nova = pipeline in self.pipelines or (pipeline is None and settings.get('transformer', {}).get('_class_name') == NETWORK_CLASS)
        return is_nova and settings.get('vae', {}).get('_class_name', 'AutoencoderKL') == self.autoencoder_class

    # ---------------------------------------------------------------- theirs as ours
    def read_folder(self, settings: Configs, folder: Path, name: str) -> Node:
        lacking = [file for file in ('transformer', 'vae', 'scheduler') if file not in settings]
        if lacking:
            raise CheckpointError(f'{name}: no config in {lacking[0]}/; a folder of NOVA that opens without YAML has transformer, vae and '
                                  'scheduler')
        model = self.said(settings, name)
        if 'COND_STAGE_MODEL' in model:
            if not (folder / 'tokenizer').is_dir():
                raise CheckpointError(f'{name}: has a text_encoder, but no tokenizer')
            model['COND_STAGE_MODEL']['TOKENIZER_PATH'] = Said(beside(name, 'tokenizer'), 'the folder tokenizer')
        pipeline = f"the default of {settings.get('model_index', {}).get('_class_name', self.pipelines[0])}"
        how = {'SETS': Said(64, pipeline, True), 'SAMPLE_STEPS': Said(25, pipeline, True), 'GUIDE_SCALE': Said(5.0, pipeline, True)}
        return {'SOLVER': {'NAME': self.solver, 'MODEL': model, 'SAMPLE_ARGS': {**how, **self._length(settings)}}}

    def _length(self, settings: Configs) -> Node:
        return {}

    def said(self, settings: Configs, name: str, left_out: Collection[str] = ()) -> Node:
        model: Node = {'NAME': 'NovaModel'}
        if 'transformer' in settings and 'NETWORK' not in left_out:
            model['NETWORK'] = read_network(settings['transformer'], name)
        if 'scheduler' in settings and 'SCHEDULE_ARGS' not in left_out:
            model |= read_scheduler(settings['scheduler'], name)
        if 'vae' in settings and 'FIRST_STAGE_MODEL' not in left_out:
            model |= autoencoder.latent(settings['vae'], name)
            model['FIRST_STAGE_MODEL'] = self._autoencoder(settings['vae'], name)
        if 'text_encoder' in settings and 'COND_STAGE_MODEL' not in left_out:
            limit = settings.get('transformer', {}).get('text_token_len')
            model['COND_STAGE_MODEL'] = {**read_text(settings['text_encoder'], name),
                                         **({'MAX_LENGTH': Said(limit, f'{NETWORK}: text_token_len')} if limit else {})}
        return model

    def _autoencoder(self, values: Mapping[str, Any], name: str) -> Node:
        return autoencoder.read_config(values, name)

    # ---------------------------------------------------------------- ours as theirs
    def write_configs(self, model: nn.Module, folder: Path) -> None:
        if model.first_stage_model is None:
            raise ValueError('FIRST_STAGE_MODEL is null, but a folder of NOVA has an autoencoder: name the one that gave the latents')
        network, words = model.model, model.cond_stage_model
        index: dict[str, Any] = {'_class_name': 'NOVAC2IPipeline' if network.is_told_class else 'NOVAPipeline',
                                 'transformer': ['diffnext', NETWORK_CLASS], 'vae': ['diffnext', self.autoencoder_class]}
        scheduler = write_scheduler(model)
        index['scheduler'] = ['diffnext', scheduler['_class_name']]
        if words is not None:
            write_json(folder / TEXT, write_text(words))
            words.tokenizer.save_pretrained(folder / 'tokenizer')
            index |= {'text_encoder': ['diffnext', TEXT_CLASS], 'tokenizer': ['transformers', type(words.tokenizer).__name__]}
        write_json(folder / NETWORK, write_network(network))
        write_json(folder / 'vae' / 'config.json', self._write_autoencoder(model))
        write_json(folder / SCHEDULER, scheduler)
        write_json(folder / 'model_index.json', index)

    def _write_autoencoder(self, model: nn.Module) -> dict[str, Any]:
        return autoencoder.write_config(model, model.model.IMAGE_SIZE, model.model.IMAGE_STRIDE)

    def modelspec(self, model: nn.Module) -> dict[str, str]:
        size = model.model.IMAGE_SIZE if isinstance(model.model.IMAGE_SIZE, list) else [model.model.IMAGE_SIZE] * 2
        return {'architecture': 'nova', 'implementation': 'https://github.com/baaivision/NOVA', 'resolution': f'{size[1]}x{size[0]}',
                'prediction_type': THEIR_PREDICTIONS.get(model.PARAMETERIZATION, model.PARAMETERIZATION)}


@register
class OfImages(Nova):
    """With the autoencoder of Stable Diffusion; it is told texts or classes."""

    name = 'NOVA'
    tells = ('model.mask_embed.bos_token', 'model.image_decoder.head.weight', 'first_stage_model.decoder.mid.block_1.conv1.weight')
    parts = (TRANSFORMER, autoencoder.VAE, PHI)
    autoencoder_class = 'AutoencoderKL'


@register
class OfClips(Nova):
    """With the causal autoencoder of Open-Sora-Plan."""

    name = 'NOVA for clips'
    tells = ('model.mask_embed.bos_token', 'model.image_decoder.head.weight',
             'first_stage_model.decoder.mid_block.resnets.0.conv1.weight')
    parts = (TRANSFORMER, CLIP_VAE, PHI)
    autoencoder_class = CLIP_CLASS

    def _autoencoder(self, values: Mapping[str, Any], name: str) -> Node:
        s = Settings(values, 'vae/config.json', name)
        with s.reading():
            return {'NAME': s.said('VideoAutoencoderKL', '_class_name'),
                    **{key.upper(): s.said(values[key], key) for key in CLIP_KEYS if key in values}}

    def _length(self, settings: Configs) -> Node:
        base = settings['transformer'].get('video_base_size') or [1]
        return {'NUM_FRAMES': Said(CLIP_FRAMES, 'the convention of the published clips', True)} if base[0] > CLIP_FRAMES // 4 else {}

    def _write_autoencoder(self, model: nn.Module) -> dict[str, Any]:
        cfg = model.first_stage_model.cfg
        return {'_class_name': CLIP_CLASS, **{key: plain(cfg[key.upper()]) for key in CLIP_KEYS},
                'up_block_types': ['UpDecoderBlock3D'] * len(cfg.BLOCK_OUT_CHANNELS),
                'scaling_factor': model.SCALE_FACTOR, 'shift_factor': model.SHIFT_FACTOR or None}


def beside(folder: str, name: str) -> str:
    """The address of a folder within a folder, in whatever store."""
    return f'{folder}@{name}' if folder.startswith(('hf://', 'ms://')) else f'{folder}/{name}'


# ---------------------------------------------------------------- the network
def read_network(values: Mapping[str, Any], folder: str, file: str = NETWORK) -> Node:
    """The config of a NovaTransformer. Raises CheckpointError for one of another class, and for keys that no network of NOVA has."""
    s = Settings(values, file, folder)
    s.expect_class(NETWORK_CLASS)
    unknown = sorted(key for key in values if key not in KEYS and not key.startswith('_'))
    if unknown:
        raise CheckpointError(f'{folder}: {file} has {", ".join(unknown)}, which no {NETWORK_CLASS} is known to have: expected '
                              f'{", ".join(KEYS)}')
    told = [key for key in KEYS if values.get(key) is False or values.get(key)]    # a width of 0 is none
    told = told if 'text_token_dim' in told else [key for key in told if key != 'text_token_len']
    return {'NAME': s.said('NovaTransformer', '_class_name'), **{key.upper(): s.said(values[key], key) for key in told}}


def write_network(network: nn.Module) -> dict[str, Any]:
    """The transformer/config.json of a NovaTransformer. num_classes stands in it only where it is not the published number."""
    is_usual = not network.is_told_class or network.NUM_CLASSES == 1000
    return {'_class_name': NETWORK_CLASS, **{key: plain(network.cfg[key.upper()]) for key in (KEYS[:-1] if is_usual else KEYS)}}


# ---------------------------------------------------------------- the text encoder
PHI_SIZES = {'WIDTH': 'hidden_size', 'DEPTH': 'num_hidden_layers', 'HEADS': 'num_attention_heads', 'MLP_WIDTH': 'intermediate_size',
             'VOCABULARY': 'vocab_size'}
PHI_ONLY: dict[str, tuple[Any, ...]] = {
    'model_type': ('phi',), 'hidden_act': ('gelu_new',), 'qk_layernorm': (False,), 'layer_norm_eps': (1e-5,), 'rope_theta': (1e4,),
    'rope_type': ('default',), 'rope_scaling': ()}


def read_text(values: Mapping[str, Any], folder: str) -> Node:
    """A Phi of transformers as a FrozenPhiEmbedder. Raises CheckpointError for another kind of model."""
    turns = values.get('rope_parameters')    # transformers 5
    s = Settings({**values, **(turns if isinstance(turns, dict) else {})}, TEXT, folder, {'partial_rotary_factor': 0.5})
    s.only(PHI_ONLY, 'the text encoder of NOVA')
    with s.reading():
        if s.get('num_key_value_heads', s['num_attention_heads']) != s['num_attention_heads']:
            raise s.refusal('num_key_value_heads', f'a Phi has as many as heads, {s["num_attention_heads"]}')
        return {'NAME': s.said('FrozenPhiEmbedder', 'model_type'), **{ours: s.said(s.number(key), key) for ours, key in PHI_SIZES.items()},
                'ROTARY_SHARE': s.said(float(s['partial_rotary_factor']), 'partial_rotary_factor')}


def write_text(embedder: nn.Module) -> dict[str, Any]:
    """The config of a FrozenPhiEmbedder. Raises ValueError for another embedder."""
    if not PHI_SIZES.keys() <= embedder.cfg.keys():
        raise ValueError(f'a folder of NOVA has no text encoder like {type(embedder).__name__}; export to one file instead')
    return {'architectures': [TEXT_CLASS], 'model_type': 'phi', **{key: embedder.cfg[ours] for ours, key in PHI_SIZES.items()},
            'partial_rotary_factor': embedder.ROTARY_SHARE, 'hidden_act': 'gelu_new', 'layer_norm_eps': 1e-5}


# ---------------------------------------------------------------- the scheduler
SCHEDULERS = {'FlowMatchEulerDiscreteScheduler': {'num_train_timesteps', 'shift'},
              'DDPMScheduler': {'num_train_timesteps', 'beta_schedule', 'beta_start', 'beta_end', 'trained_betas', 'prediction_type',
                                'timestep_spacing', 'steps_offset', 'rescale_betas_zero_snr', 'clip_sample'}}
# what their configs say of what they leave undone, and what only has a meaning beside it
SCHEDULER_ONLY: dict[str, tuple[Any, ...]] = {
    'use_dynamic_shifting': (False,), 'variance_type': ('fixed_small',), 'thresholding': (False,), 'use_karras_sigmas': (False,),
    'use_exponential_sigmas': (False,), 'use_beta_sigmas': (False,), 'invert_sigmas': (False,), 'shift_terminal': (),
    'stochastic_sampling': (False,)}
IDLE = {'base_shift', 'max_shift', 'base_image_seq_len', 'max_image_seq_len', 'time_shift_type', 'clip_sample_range', 'sample_max_value',
        'dynamic_thresholding_ratio'}
BETAS = {'squaredcos_cap_v2': 'cosine', 'linear': 'linear', 'scaled_linear': 'scaled_linear', 'sigmoid': 'sigmoid'}
PREDICTIONS = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v'}
THEIR_PREDICTIONS = {ours: theirs for theirs, ours in PREDICTIONS.items()}
DDPM_DEFAULTS = {'num_train_timesteps': 1000, 'beta_start': 1e-4, 'beta_end': 0.02, 'beta_schedule': 'linear',
                 'prediction_type': 'epsilon', 'timestep_spacing': 'leading', 'steps_offset': 0, 'rescale_betas_zero_snr': False}


def read_scheduler(values: Mapping[str, Any], folder: str = 'the scheduler') -> Node:
    """What a published scheduler says, as keys of a NovaModel.

    Raises CheckpointError for another scheduler, and for what it would do otherwise than we do. Its clip_sample is accepted and does
    nothing, as in the published code.
    """
    s = Settings(values, SCHEDULER, folder, {**DDPM_DEFAULTS, 'shift': 1.0})
    name = s.get('_class_name')
    if name not in SCHEDULERS:
        raise s.refusal('_class_name', f'expected {" or ".join(SCHEDULERS)}')
    unknown = sorted(key for key in values.keys() - SCHEDULERS[name] - SCHEDULER_ONLY.keys() - IDLE if not key.startswith('_'))
    if unknown:
        raise CheckpointError(f'{folder}: {SCHEDULER} says {", ".join(unknown)}, which we do not do')
    s.only(SCHEDULER_ONLY, 'a process of ours')
    with s.reading():
        levels = {'TIMESTEPS': s.said(s.number('num_train_timesteps'), 'num_train_timesteps')}
        if name == 'FlowMatchEulerDiscreteScheduler':
            flow = {key: s.said(value, '_class_name') for key, value in
                    (('PARAMETERIZATION', 'flow'), ('SPACING', 'flow'), ('TIMESTEP_DENSITY', {'NAME': 'logit_normal'}))}
            return {**levels, **flow, 'SCHEDULE_ARGS': {'NAME': s.said('flow', '_class_name'), 'SHIFT': s.said(float(s['shift']), 'shift')}}
        if s['prediction_type'] not in PREDICTIONS:
            raise s.refusal('prediction_type', f'expected {", ".join(PREDICTIONS)}')
        return {**levels, 'PARAMETERIZATION': s.said(PREDICTIONS[s['prediction_type']], 'prediction_type'),
                'TIMESTEP_DENSITY': s.said({'NAME': 'uniform'}, '_class_name'), 'SCHEDULE_ARGS': _betas(s),
                'ZERO_TERMINAL_SNR': s.said(s.flag('rescale_betas_zero_snr'), 'rescale_betas_zero_snr'),
                'SPACING': s.said(s['timestep_spacing'], 'timestep_spacing'), 'STEPS_OFFSET': s.said(s['steps_offset'], 'steps_offset')}


def _betas(s: Settings) -> Node:
    if s.get('trained_betas') is not None:
        return {'NAME': s.said('listed', 'trained_betas'), 'BETAS': s.said(list(s['trained_betas']), 'trained_betas')}
    name = BETAS.get(s['beta_schedule'])
    if name is None:
        raise s.refusal('beta_schedule', f'expected {", ".join(BETAS)}')
    ends = {} if name == 'cosine' else {'BETA_MIN': s.said(s['beta_start'], 'beta_start'), 'BETA_MAX': s.said(s['beta_end'], 'beta_end')}
    return {'NAME': s.said(name, 'beta_schedule'), **ends}


def write_scheduler(model: nn.Module) -> dict[str, Any]:
    """The scheduler of a NovaModel. Raises ValueError for a process that the published ones are not."""
    schedule, steps = {key.upper(): value for key, value in model.SCHEDULE_ARGS.items()}, {'num_train_timesteps': model.TIMESTEPS}
    if schedule['NAME'] == 'flow' and model.PARAMETERIZATION == 'flow':
        return {'_class_name': 'FlowMatchEulerDiscreteScheduler', **steps, 'shift': schedule.get('SHIFT', 1.0),
                'use_dynamic_shifting': False}
    names = {ours: theirs for theirs, ours in BETAS.items()}
    own = schedule.keys() - {'NAME', 'BETA_MIN', 'BETA_MAX', 'BETAS'} or (schedule['NAME'] == 'cosine' and 'BETA_MAX' in schedule)
    if schedule['NAME'] not in (*names, 'listed') or own or model.PARAMETERIZATION not in THEIR_PREDICTIONS:
        raise ValueError(f'the schedulers of NOVA have no {model.PARAMETERIZATION} on {schedule["NAME"]}; export to one file instead')
    if schedule['NAME'] == 'listed':
        betas: dict[str, Any] = {'trained_betas': list(schedule['BETAS'])}
    else:
        usual = {'scaled_linear': (0.00085, 0.012)}.get(schedule['NAME'], (1e-4, 0.02))    # ours, where nothing is said
        betas = {'beta_schedule': names[schedule['NAME']], 'beta_start': schedule.get('BETA_MIN', usual[0]),
                 'beta_end': schedule.get('BETA_MAX', usual[1])}
    return {'_class_name': 'DDPMScheduler', **steps, **betas, 'prediction_type': THEIR_PREDICTIONS[model.PARAMETERIZATION],
            'rescale_betas_zero_snr': model.ZERO_TERMINAL_SNR, 'timestep_spacing': model.SPACING, 'steps_offset': model.STEPS_OFFSET,
            'clip_sample': False, 'variance_type': 'fixed_small'}
