"""A trained network from its checkpoint folder alone."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from scepter.core import checkpoints
from scepter.core.config import Config
from scepter.core.errors import CheckpointError
from scepter.core.registry import MODELS
from scepter.models.base import TrainModule, source_digest


def config_of(folder: str | Path) -> Config:
    """The config of the run that wrote a checkpoint, with frozen parts pointing at files that are there now.

    Raises CheckpointError, naming them, where such a file is neither where the config says nor at its absolute path of then, or is
    another file now.
    """
    checkpoint = checkpoints.load(folder, verify='size')
    cfg = Config.parse(checkpoint.config, str(checkpoint.path / 'config.yaml'), environment=False, is_foreign=True)
    object.__setattr__(cfg, 'file', str(checkpoint.path / 'config.yaml'))
    sources, faults = checkpoint.state['sources'], []
    for node in _nodes(cfg.SOLVER.MODEL):
        said = node.get('PRETRAINED_MODEL')
        known = next((s for s in sources.values() if s['said'] == said), None)
        if said is None or known is None:
            continue
        found = next((p for p in (said, known['path']) if Path(p).exists()), None)
        if found is None and '://' not in known['path']:
            faults.append(f'{said} (or {known["path"]}) is gone')
        elif found is not None and (now := source_digest(found)) != {k: known[k] for k in now}:
            faults.append(f'{found} has changed: sha256 {known["sha256"]} expected, {now["sha256"]} found')
        elif found is not None:
            node['PRETRAINED_MODEL'] = found
    if faults:
        title = f'{checkpoint.path} keeps only what was trained; its frozen parts come from other files:'
        raise CheckpointError('\n  '.join([title, *faults]))
    return cfg


def restore(folder: str | Path, cfg: Config | None = None, use_ema: bool = True, logger: Any = None) -> TrainModule:
    """The network of a checkpoint, in evaluation mode, with its averaged weights where there are any and use_ema is true.

    cfg: the experiment, default the checkpoint's own. Raises CheckpointError.
    """
    checkpoint = checkpoints.load(folder)
    model = MODELS.build((cfg or config_of(folder)).SOLVER.MODEL, logger=logger)
    tensors = checkpoint.group('model')
    if use_ema and 'ema' in checkpoint.groups:
        tensors |= {name: value.to(tensors[name].dtype) for name, value in checkpoint.tensors('ema').items() if name in tensors}
    model.load_trained_state(tensors, str(checkpoint.path))
    return model.eval()


def _nodes(cfg: Any) -> list[Config]:
    """Every mapping in a config, the outer ones first."""
    if isinstance(cfg, list):
        return [n for v in cfg for n in _nodes(v)]
    return [cfg, *(n for v in cfg.values() for n in _nodes(v))] if isinstance(cfg, Config) else []
