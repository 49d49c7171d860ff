"""transformer/config.json of a published NOVA folder: read into the config of a NovaTransformer, and written from one."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scepter.core.config import plain
from scepter.core.errors import CheckpointError
from scepter.models.nova.transformer import NovaTransformer

CLASS = 'NOVATransformer3DModel'
KEYS = ('image_dim', 'image_size', 'image_stride', 'text_token_dim', 'text_token_len', 'image_base_size', 'video_base_size',
        'video_mixer_rank', 'rotary_pos_embed', 'arch')


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of the network of a config.json, or of the folder that holds it.

    Raises CheckpointError where there is none, it is of another class, or has keys that no NOVA network has.
    """
    file = Path(path) / 'config.json' if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{file}: {error}') from error
    if not isinstance(values, dict) or values.get('_class_name', CLASS) != CLASS:
        found = values.get('_class_name') if isinstance(values, dict) else values
        raise CheckpointError(f'{file} is of {found!r}, expected the config of a {CLASS}')
    unknown = sorted(key for key in values if key not in KEYS and not key.startswith('_'))
    if unknown:
        raise CheckpointError(f'{file} has {", ".join(unknown)}, which no {CLASS} is known to have: expected {", ".join(KEYS)}')
    return {'NAME': NovaTransformer.__name__, **{key.upper(): values[key] for key in KEYS if values.get(key) is not None}}


def write_config(network: NovaTransformer, folder: str | Path) -> None:
    """config.json of this network in a folder that is there, as `read_config` and the published code read it."""
    values = {'_class_name': CLASS, **{key: plain(network.cfg[key.upper()]) for key in KEYS}}
    (Path(folder) / 'config.json').write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')


SCHEDULERS = {'FlowMatchEulerDiscreteScheduler': ('num_train_timesteps', 'shift', 'use_dynamic_shifting'),
              'DDPMScheduler': ('num_train_timesteps', 'beta_schedule', 'beta_start', 'beta_end', 'trained_betas', 'prediction_type',
                                'timestep_spacing', 'steps_offset', 'rescale_betas_zero_snr', 'clip_sample', 'variance_type')}
BETAS = ('linear', 'scaled_linear', 'sigmoid')    # which have the same names here
PREDICTIONS = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v'}


def read_scheduler(values: dict[str, Any], file: str = 'scheduler_config.json') -> dict[str, Any]:
    """What a published scheduler says, as keys of a NovaModel.

    Raises CheckpointError for another scheduler, and for what it would do otherwise than we do. Its clip_sample is accepted and does
    nothing, as in the published code.
    """
    name = values.get('_class_name', values.get('class'))
    if name not in SCHEDULERS:
        raise CheckpointError(f'{file} is of {name!r}, expected {" or ".join(SCHEDULERS)}')
    unknown = sorted(key for key in values if key not in SCHEDULERS[name] and key != 'class' and not key.startswith('_'))
    if unknown or values.get('use_dynamic_shifting') or values.get('variance_type', 'fixed_small') != 'fixed_small':
        raise CheckpointError(f'{file} says {", ".join(unknown) or "use_dynamic_shifting or variance_type"}, which we do not do')
    levels = {'TIMESTEPS': values.get('num_train_timesteps', 1000)}
    if name == 'FlowMatchEulerDiscreteScheduler':
        return {**levels, 'PARAMETERIZATION': 'flow', 'SPACING': 'flow', 'TIMESTEP_DENSITY': {'NAME': 'logit_normal'},
                'SCHEDULE_ARGS': {'NAME': 'flow', 'SHIFT': float(values.get('shift', 1.0))}}
    betas = {'BETA_MIN': values.get('beta_start', 0.0001), 'BETA_MAX': values.get('beta_end', 0.02)}
    kind = values.get('beta_schedule', 'linear')
    if values.get('trained_betas') is not None:
        schedule = {'NAME': 'listed', 'BETAS': list(values['trained_betas'])}
    elif kind == 'squaredcos_cap_v2':
        schedule = {'NAME': 'cosine'}
    elif kind in BETAS:
        schedule = {'NAME': kind, **betas}
    else:
        raise CheckpointError(f'{file}: beta_schedule is {kind!r}, expected squaredcos_cap_v2, {", ".join(BETAS)}')
    prediction = values.get('prediction_type', 'epsilon')
    if prediction not in PREDICTIONS:
        raise CheckpointError(f'{file}: prediction_type is {prediction!r}, expected {", ".join(PREDICTIONS)}')
    return {**levels, 'PARAMETERIZATION': PREDICTIONS[prediction], 'TIMESTEP_DENSITY': {'NAME': 'uniform'}, 'SCHEDULE_ARGS': schedule,
            'ZERO_TERMINAL_SNR': values.get('rescale_betas_zero_snr', False), 'SPACING': values.get('timestep_spacing', 'leading'),
            'STEPS_OFFSET': values.get('steps_offset', 0)}
