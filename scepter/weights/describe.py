"""What a stranger's model is, found out without a YAML: the config that builds it, and where each value was taken from.

    describe(path: str | Path) -> Description
        .config   Config {'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MODEL': {...}, 'SAMPLE_ARGS': {...}}}
                  MODEL.PRETRAINED_MODEL is the path, so MODELS.build(config.SOLVER.MODEL) is the network with its weights; the config
                  can be saved, and trained from
        .taken    list of Taken(key, value, source, is_convention); str() of one is the line to print

path: the other library's folder or a single file, or any place of one that FS knows. A checkpoint of ours has a config of its own
(models/restore.py), and so has a single file that tools/checkpoint.py made. What it is is for its family to say (family.py).
Raises CheckpointError: for what is no whole model, with its name and what to do, and for what no network of ours can be, with the key.
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from scepter.core.config import Config
from scepter.core.errors import CheckpointError
from scepter.weights.family import FAMILIES, family_of_folder, parts, told
from scepter.weights.files import Weights, carried_config, local_copy, read_configs, read_file
from scepter.weights.foreign import foreign_kind, lone_parts
from scepter.weights.said import Node, Taken, taken_of, values_of


class Description(NamedTuple):
    """A model that opens without YAML."""
    config: Config
    taken: list[Taken]


def describe(path: str | Path) -> Description:
    """The config of the model at a path, and where each of its values was taken from. Raises CheckpointError; see the top of this file."""
    with local_copy(path) as local:
        node = describe_single(read_file(local), str(path)) if local.is_file() else describe_folder(local, str(path))
    node['SOLVER']['MODEL'] = {'PRETRAINED_MODEL': str(path), **node['SOLVER']['MODEL']}
    return Description(Config(values_of(node)), list(taken_of(node)))


def describe_folder(folder: Path, name: str) -> Node:
    """The node of a folder. name: what to call it in messages."""
    if (folder / 'MANIFEST.json').is_file():
        raise CheckpointError(f'{name} is a checkpoint of ours: its own config.yaml says what it is')
    configs = read_configs(folder, dict.fromkeys(part.folder for part in parts()))
    family = family_of_folder(configs)
    if family is not None:
        return family.read_folder(configs, folder, name)
    pipeline, known = configs.get('model_index', {}).get('_class_name'), [p for family in FAMILIES for p in family.pipelines]
    if pipeline is not None and pipeline not in known:
        raise CheckpointError(f'{name} is a {pipeline} of diffusers; those that open here are {", ".join(dict.fromkeys(known))}')
    wanted = '; '.join(f'{family.name}: {", ".join(part.folder for part in family.parts)}' for family in FAMILIES if family.parts)
    found = ', '.join(sorted(configs)) or 'none'
    raise CheckpointError(f'{name}: the configs in it ({found}) are of no family that opens here without YAML. These have ({wanted}), '
                          'each with its config.json')


def describe_single(weights: Weights, name: str) -> Node:
    """The node of a single file. Raises CheckpointError for what is no whole model, and for what no network of ours can be."""
    if carried_config(weights.settings.get('metadata', {})) is not None:
        raise CheckpointError(f'{name} carries a config of its own, which says what it is')
    if sentence := foreign_kind(weights) or lone_parts(weights):
        raise CheckpointError(f'{name} {sentence}')
    match = told(weights, name)
    return match.family.read_single(weights, match.whole, name)
