"""A trained network from its checkpoint folder, or from one file, alone."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.disk.checkpoints import Checkpoint
from scepter.core.disk.tensors import TensorFile
from scepter.core.errors import CheckpointError
from scepter.core.logger import get_logger
from scepter.core.registry import MODELS
from scepter.core.stores.client import shown
from scepter.models.base import TrainModule
from scepter.models.unfilled import unfilled
from scepter.weights import carried_config, load_into, load_pretrained, read_weights, weights_for
from scepter.weights.marks import as_written
from scepter.weights.records import records
from scepter.weights.sources import deferred

PLACES = ('PRETRAINED_MODEL', 'TOKENIZER_PATH')    # keys of files that a part may be built from


def has_config(path: str | Path) -> bool:
    """Whether this is a checkpoint, the folder of a run, or a single file that carries its config."""
    path = Path(path)
    if path.is_file() and path.suffix == '.safetensors':
        return carried_config(TensorFile(path).metadata) is not None
    return checkpoints.is_checkpoint(path)


def config_of(path: str | Path) -> Config:
    """The config of the run that wrote a checkpoint or single file. Raises CheckpointError where a file carries none."""
    path = Path(path)
    if checkpoints.is_checkpoint(path):
        checkpoint = checkpoints.load(path, verify='size')
        text, name = checkpoint.config, str(checkpoint.path / 'config.yaml')
    else:
        text, name = carried_config(TensorFile(path).metadata), str(path)
    if text is None:
        raise CheckpointError(f'{path} carries no config: it was written by neither tools/checkpoint.py to-single nor tools/export.py')
    cfg = Config.parse(text, name, environment=False, is_foreign=True)
    object.__setattr__(cfg, 'file', name)
    return cfg


def restore(path: str | Path, cfg: Config | None = None, use_ema: bool = True, logger: Any = None) -> TrainModule:
    """The network of a checkpoint or single file, in evaluation mode, with its averaged weights where there are any and use_ema is true.

    cfg: the experiment, default the checkpoint's own; a part for which it names another PRETRAINED_MODEL takes that.
    Raises CheckpointError, also where what the checkpoint left out is gone or another file now.
    """
    own = config_of(path) if cfg is None or has_config(path) else cfg
    node = Config.of((cfg or own).SOLVER.MODEL).copy()
    checkpoint = checkpoints.load(path) if checkpoints.is_checkpoint(path) else None
    if checkpoint is not None:
        put_places(node, checkpoint)
    with deferred(), unfilled({}):
        model = MODELS.build(node, logger=logger)
    if checkpoint is not None:
        model.load_trained_state(checkpoint, use_ema)
    else:
        load_into(model, weights_for(model, read_weights(path)), source=str(path))
    words = {as_written(word) for n in nodes(own.SOLVER.MODEL) if (word := n.get('PRETRAINED_MODEL'))}
    for part in list(model.modules())[1:]:
        word = part.__dict__.get('filled_from')
        if word is not None and as_written(word) not in words:    # asked for in the place of what was trained beside
            (logger or get_logger()).info(f'{type(part).__name__} takes the weights of {shown(str(word))}')
            load_pretrained(part, word, part.cfg.get('IGNORE_KEYS') or ())
    return model.eval()


def put_places(model: Config, checkpoint: Checkpoint) -> None:
    """Let the config of a network name, where a part is built from files, the place where these lie now."""
    built_from = {record.source.said: record for record in records(checkpoint) if record.is_needed}
    for node in nodes(model):
        for key in PLACES:
            if isinstance(word := node.get(key), str) and (record := built_from.get(shown(as_written(word)))) is not None:
                node[key] = str(record.place)


def without_files(cfg: Config, model: TrainModule) -> Config:
    """The config of a restored network that needs no other file, for one file that holds all its weights.

    A part that could not be built without its files (a tower of sizes that no key says, a part that reads them by itself) goes on naming
    them, by their absolute path.
    """
    cfg = cfg.copy()
    for node in nodes(cfg.SOLVER.MODEL):
        for key in PLACES:
            if not isinstance(word := node.get(key), str):
                continue
            parts = [part for part in model.modules() if getattr(part, 'cfg', {}).get(key) == word]
            spelled = [part.sizes_as_config() for part in parts if hasattr(part, 'sizes_as_config')]
            if parts and all('filled_from' in part.__dict__ for part in parts) and key == 'PRETRAINED_MODEL':
                del node[key]
            elif parts and len(spelled) == len(parts) and None not in spelled:
                del node[key]
                node.update(spelled[0])
            elif Path(word).exists():
                node[key] = str(Path(word).absolute())
    return cfg


def without_weights(node: Any) -> Any:
    """A config whose parts load nothing, for a network that gets all of its weights from one file."""
    if isinstance(node, list):
        return [without_weights(v) for v in node]
    if not isinstance(node, dict):
        return node
    return Config({key: without_weights(value) for key, value in node.items() if key != 'PRETRAINED_MODEL'})


def nodes(cfg: Any) -> list[Config]:
    """Every mapping in a config, the outer ones first."""
    if isinstance(cfg, list):
        return [n for v in cfg for n in nodes(v)]
    return [cfg, *(n for v in cfg.values() for n in nodes(v))] if isinstance(cfg, Config) else []
