"""Our networks as files that other programs open: the other library's folder, or one file with the names that were published."""
from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scepter.core.config import Config
from scepter.core.disk import atomic
from scepter.core.disk.tensors import write_tensors
from scepter.weights.family import Family, family_of_network
from scepter.weights.files import Weights

UNMEASURED = 'not measured'.ljust(80)    # the place in a file's metadata where `note_parity` writes


def export_single(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a network as one .safetensors with the names of its family; one of no family keeps its own. Raises OSError."""
    weights = Weights.of(model.state_dict())
    family = family_of_network(weights)
    # shapes do not show heads, schedules and much else: with its config, the file opens here as what it is
    solver = {'NAME': (family or Family).solver, 'MODEL': without_sources(model.cfg)}
    meta = {**metadata(model), 'config': Config({'SOLVER': solver}).dump(is_secure=True)}
    write_whole(Path(path), family.table.to_theirs(weights) if family is not None else weights, meta, dtype)


def export_diffusers(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a network as a folder that the other library opens, e.g. StableDiffusionPipeline. Raises ValueError where it has no such."""
    folder, weights = Path(folder), Weights.of(model.state_dict())
    family = family_of_network(weights)
    if family is None:
        raise ValueError(f'diffusers has no {type(model).__name__}; export to one file instead')
    parts, stems = family.to_folder(family.read_there(model, weights)), {part.folder: part.stem for part in family.parts}
    family.write_configs(model, folder)
    meta = {**metadata(model), 'modelspec.implementation': 'diffusers'}
    for part, inner in parts.items():
        write_whole(folder / part / f'{stems[part]}.safetensors', inner, meta, dtype)


def without_sources(node: Any) -> Any:
    """A config that does not say where weights came from."""
    if isinstance(node, list):
        return [without_sources(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    return {key: without_sources(value) for key, value in node.items() if key not in ('PRETRAINED_MODEL', 'IGNORE_KEYS')}


def write_whole(path: Path, tensors: Mapping[str, Tensor], meta: dict[str, str], dtype: torch.dtype | None) -> None:
    """A safetensors file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = atomic.beside(path, 'tmp')
    try:
        write_tensors(temporary, Cast(tensors, dtype) if dtype is not None else tensors, meta)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Cast(Mapping[str, Tensor]):
    """Tensors in another floating-point type, each cast when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype):
        self.tensors, self.dtype = tensors, dtype

    def __getitem__(self, name: str) -> Tensor:
        value = self.tensors[name]
        return value.to(self.dtype) if value.is_floating_point() else value

    def __iter__(self) -> Any:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def metadata(model: nn.Module) -> dict[str, str]:
    """The ModelSpec keys of a file (github.com/Stability-AI/ModelSpec), and a place for the parity figure."""
    family = family_of_network(model.state_dict())
    spec = family.modelspec(model) if family is not None else {'architecture': type(model).__name__}
    return {'format': 'pt', 'modelspec.sai_model_spec': '1.0.1', 'modelspec.title': model.cfg.get('TITLE') or type(model).__name__,
            'modelspec.date': datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            **{f'modelspec.{key}': value for key, value in spec.items()}, 'scepter.parity': UNMEASURED}


def note_parity(path: str | Path, figure: str) -> None:
    """Write into a file that `metadata` gave a place for it how near the other library came to us. Raises ValueError without that place."""
    text = json.dumps(figure.ljust(len(UNMEASURED))[:len(UNMEASURED)])[1:-1].encode()
    with open(path, 'r+b') as file:
        header = file.read(8 + int.from_bytes(file.read(8), 'little'))
        place = header.find(UNMEASURED.encode())
        if place < 0 or len(text) != len(UNMEASURED):
            raise ValueError(f'{path} has no place for a parity figure of {len(figure)} characters')
        file.seek(8 + place)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
