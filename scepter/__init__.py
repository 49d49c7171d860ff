"""scepter: train and sample diffusion models that a YAML file describes.

The public names, each imported when it is first used: `import scepter` alone costs nothing. Whoever asks for a registry finds
all shipped components in it.
"""
from __future__ import annotations

import importlib
from typing import Any

__version__ = '0.1.0'

_REGISTRIES = ('MODELS', 'BACKBONES', 'EMBEDDERS', 'LOSSES', 'SOLVERS', 'HOOKS', 'DATASETS', 'TRANSFORMS', 'METRICS', 'OPTIMIZERS',
               'LR_SCHEDULERS', 'FILE_SYSTEMS', 'SCHEDULES', 'LEVELS', 'SAMPLERS')
_HOMES = {
    'core.registry': (*_REGISTRIES, 'Registry', 'need'),
    'core.schema': ('Component', 'param', 'part', 'parts', 'REQUIRED', 'default'),
    'core.values': ('Bounds',),
    'core.yaml': ('dict_to_yaml',),
    'core.config': ('Config',),
    'core.faults': ('ConfigError', 'Fault'),
    'core.errors': ('ScepterError', 'DataError', 'CheckpointError', 'PeerError', 'NonFiniteError'),
    'core.env': ('we',),
    'core.launch': ('launch',),
    'core.stores': ('FS',),
    'core.logger': ('get_logger',),
    'diffusion': ('Diffusion',),
    'drawing': ('load',),
    'models.base': ('BaseModel', 'TrainModule'),
    'models.embedders.base': ('BaseEmbedder',),
    'solvers.base': ('BaseSolver',),
    'solvers.metrics': ('Metric',),
    'hooks.base': ('Hook',),
}
_HOME_OF = {name: f'scepter.{module}' for module, names in _HOMES.items() for name in names}
__all__ = ['__version__', *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f'module scepter has no attribute {name}')
    if name in _REGISTRIES:
        importlib.import_module('scepter.components')
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
