"""How a network was noised and what it predicts: diffusers' schedulers, and the markers of a single file.

Markers are the keys v_pred and ztsnr, the buffers betas and scale_factor, and the ModelSpec entries of a safetensors header.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from scepter.core.errors import CheckpointError
from scepter.core.registry import SCHEDULES
from scepter.weights.files import Weights
from scepter.weights.said import Node, Said, Settings

PREDICTIONS = {'epsilon': 'eps', 'v_prediction': 'v', 'sample': 'x0'}
THEIR_PREDICTIONS = {ours: theirs for theirs, ours in PREDICTIONS.items()}
# scheduler of diffusers -> (sampler of ours, how it spreads steps where nothing is said, its own betas where nothing is said)
OLD_BETAS, NEW_BETAS = (1e-4, 0.02), (0.00085, 0.012)
SCHEDULERS: dict[str, tuple[str | None, str, tuple[float, float]]] = {
    'DDIMScheduler': ('ddim', 'leading', OLD_BETAS), 'DDPMScheduler': ('ddpm', 'leading', OLD_BETAS),
    'PNDMScheduler': (None, 'leading', OLD_BETAS), 'LCMScheduler': ('lcm', 'leading', NEW_BETAS),
    'EulerDiscreteScheduler': ('euler', 'linspace', OLD_BETAS), 'LMSDiscreteScheduler': ('lms', 'linspace', OLD_BETAS),
    'EulerAncestralDiscreteScheduler': ('euler_ancestral', 'linspace', OLD_BETAS), 'HeunDiscreteScheduler': ('heun', 'linspace', NEW_BETAS),
    'KDPM2DiscreteScheduler': ('dpm2', 'linspace', NEW_BETAS), 'KDPM2AncestralDiscreteScheduler': ('dpm2_ancestral', 'linspace', NEW_BETAS),
    'DPMSolverMultistepScheduler': ('dpmpp_2m', 'linspace', OLD_BETAS), 'UniPCMultistepScheduler': ('unipc', 'linspace', OLD_BETAS),
    'DPMSolverSDEScheduler': ('dpmpp_sde', 'linspace', NEW_BETAS), 'DPMSolverSinglestepScheduler': (None, 'linspace', OLD_BETAS),
    'DEISMultistepScheduler': (None, 'linspace', OLD_BETAS)}
BETAS = {'scaled_linear': 'scaled_linear', 'linear': 'linear', 'sigmoid': 'sigmoid', 'squaredcos_cap_v2': 'cosine'}
SCHEDULER_ONLY: dict[str, tuple[Any, ...]] = {'use_flow_sigmas': (False,), 'thresholding': (False,), 'interpolation_type': ('linear',),
                                              'timestep_type': ('discrete',)}
SCHEDULER = 'scheduler/scheduler_config.json'


def read_config(values: Mapping[str, Any], folder: str) -> Node:
    """What a scheduler says about the network: how it was noised, and what it predicts."""
    s = _scheduler(values, folder)
    with s.reading():
        prediction = PREDICTIONS.get(s['prediction_type'])
        if prediction is None:
            raise s.refusal('prediction_type', f'expected one of {", ".join(PREDICTIONS)}')
        return {'PARAMETERIZATION': s.said(prediction, 'prediction_type'),
                'TIMESTEPS': s.said(s.number('num_train_timesteps'), 'num_train_timesteps'),
                'SCHEDULE_ARGS': _betas(s),
                'ZERO_TERMINAL_SNR': s.said(s.flag('rescale_betas_zero_snr'), 'rescale_betas_zero_snr')}


def sampling(values: Mapping[str, Any], folder: str) -> Node:
    """SAMPLE_ARGS that draw as this scheduler does."""
    s = _scheduler(values, folder)
    with s.reading():
        sampler, spacing = _sampler(s), s['timestep_spacing']
        if spacing not in ('leading', 'trailing', 'linspace'):
            raise s.refusal('timestep_spacing', 'expected leading, trailing or linspace')
        said = s.said(spacing, 'timestep_spacing')
        if spacing == 'leading' and s['steps_offset']:
            said = Said(spacing, f'{said.source}; its steps_offset {s["steps_offset"]} is left aside, so each step is that much cleaner')
        node = {'SAMPLER': sampler, 'DISCRETIZATION': said}
        if s.get('use_karras_sigmas', False):
            node['DISCRETIZATION'] = s.said('karras', 'use_karras_sigmas')
        return node


def _scheduler(values: Mapping[str, Any], folder: str) -> Settings:
    name = values.get('_class_name')
    if name not in [*SCHEDULERS]:
        raise CheckpointError(f'{folder}: {SCHEDULER} has _class_name {name!r}, whose process is none of ours; known are '
                              f'{", ".join(SCHEDULERS)}')
    betas = SCHEDULERS[name][2]
    s = Settings(values, SCHEDULER, folder, {
        'num_train_timesteps': 1000, 'beta_start': betas[0], 'beta_end': betas[1], 'prediction_type': 'epsilon',
        'beta_schedule': 'scaled_linear' if name == 'LCMScheduler' else 'linear', 'timestep_spacing': SCHEDULERS[name][1],
        'rescale_betas_zero_snr': False, 'steps_offset': 0})
    s.only(SCHEDULER_ONLY, 'a sampler of ours')
    return s


def _sampler(s: Settings) -> Said:
    """The sampler that steps as this class does; ddim where there is none."""
    name = s['_class_name']
    sampler = SCHEDULERS[name][0]
    if name == 'DPMSolverMultistepScheduler':
        kind = (s.get('algorithm_type', 'dpmsolver++'), s.get('solver_order', 2), s.get('solver_type', 'midpoint'))
        sampler = {('dpmsolver++', 2, 'midpoint'): 'dpmpp_2m', ('sde-dpmsolver++', 2, 'midpoint'): 'dpmpp_2m_sde'}.get(kind)
    if sampler is None or s.get('use_exponential_sigmas', False) or s.get('use_beta_sigmas', False):
        return Said('ddim', f'{s.file} names {name}, which no sampler of ours equals with these settings: ddim in its place', True)
    return s.said(sampler, '_class_name')


def _betas(s: Settings) -> Node:
    if s.get('trained_betas') is not None:
        betas = [float(beta) for beta in s['trained_betas']]
        if len(betas) != s.number('num_train_timesteps') or not all(0 < beta < 1 for beta in betas):
            raise s.refusal('num_train_timesteps', f'trained_betas lists {len(betas)}: expected one of 0..1 for each level')
        return {'NAME': s.said('listed', 'trained_betas'), 'BETAS': s.said(betas, 'trained_betas')}
    name = BETAS.get(s['beta_schedule'])
    if name is None:
        raise s.refusal('beta_schedule', f'expected one of {", ".join(BETAS)}')
    node = {'NAME': s.said(name, 'beta_schedule')}
    if name != 'cosine':
        for ours, theirs in (('BETA_MIN', 'beta_start'), ('BETA_MAX', 'beta_end')):
            if not 0 < float(s[theirs]) < 1:
                raise s.refusal(theirs, 'expected a number in 0..1')
            node[ours] = s.said(float(s[theirs]), theirs)
    return node


# ---------------------------------------------------------------- markers
def read_markers(weights: Weights) -> Node:
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


# ---------------------------------------------------------------- ours as theirs
def write_config(model: nn.Module) -> dict[str, Any]:
    """DDIM on our levels, spaced as our own sampling spaces them. Raises ValueError for a process or prediction it does not know."""
    if model.PARAMETERIZATION not in THEIR_PREDICTIONS:
        raise ValueError(f'the pipelines of Stable Diffusion cannot sample a network that predicts {model.PARAMETERIZATION}')
    schedule = {key.upper(): value for key, value in model.SCHEDULE_ARGS.items()}
    config = {'_class_name': 'DDIMScheduler', 'num_train_timesteps': model.TIMESTEPS,
              'prediction_type': THEIR_PREDICTIONS[model.PARAMETERIZATION], 'rescale_betas_zero_snr': model.ZERO_TERMINAL_SNR,
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
