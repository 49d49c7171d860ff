"""One checkpoint, read: a folder whose MANIFEST.json, which tells the length and sha256 of every other file, holds true.

Damage is always a CheckpointError that names the file, what was expected and what was found; nothing in a checkpoint is ever executed.
"""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scepter.core.disk import manifests
from scepter.core.disk.manifests import MANIFEST, step_of
from scepter.core.disk.tensors import Slot, Stored, TensorFile
from scepter.core.errors import CheckpointError
from scepter.core.faults import did_you_mean
from scepter.core.logger import get_logger


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest has been found true."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps of the optimizer that the weights have seen."""
        return self.manifest['step']

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of its groups of tensors: model, ema, optimizer, ..."""
        return tuple(self.manifest['groups'])

    @property
    def config(self) -> str:
        """The YAML of the run that wrote it. It is data: it must never make us import or execute anything."""
        return self._text('config.yaml')

    @property
    def state(self) -> dict[str, Any]:
        """What `save` was given as state. Raises CheckpointError where it is no JSON object."""
        try:
            state = json.loads(self._text('state.json'))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f'{self.path / "state.json"}: not JSON ({error})') from error
        if not isinstance(state, dict):
            raise CheckpointError(f'{self.path / "state.json"}: an object expected, {type(state).__name__} found')
        return state

    def tensors(self, group: str) -> Stored:
        """The tensors of a group, each read when it is asked for; names and shapes cost nothing.

        Raises CheckpointError where the checkpoint has no such group.
        """
        if group not in self.manifest['groups']:
            raise CheckpointError(f'{self.path} holds no {group}: it has {", ".join(self.groups) or "no tensors"}')
        files = self.manifest['groups'][group]
        return TensorFile(self.path / files[0]) if len(files) == 1 else _Parts(self, files)

    def group(self, group: str, device: torch.device | str = 'cpu') -> dict[str, Tensor]:
        """All tensors of a group, on a device. Raises CheckpointError where the checkpoint has no such group."""
        return {name: tensor.to(device) for name, tensor in self.tensors(group).items()}

    def _text(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding='utf-8')
        except OSError as error:
            raise CheckpointError(f'{self.path / name}: cannot be read: {error.strerror}') from error


class _Parts(Stored):
    """The tensors of a group that lies in several files, each file opened when a tensor of it is asked for."""

    def __init__(self, checkpoint: Checkpoint, files: Sequence[str]):
        self.checkpoint = checkpoint
        self.places = {name: file for file in files for name in checkpoint.manifest['index'][file]}
        self._opened: dict[str, TensorFile] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of(name)[name]

    def slot(self, name: str) -> Slot:
        return self._file_of(name).slot(name)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self._file_of(name).rows(name, first, last)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def _file_of(self, name: str) -> TensorFile:
        file = self.places[name]
        if file not in self._opened:
            opened, index = TensorFile(self.checkpoint.path / file), self.checkpoint.manifest['index'][file]
            if opened.keys() != {*index}:
                raise CheckpointError(f'{opened.path}: holds {len(opened)} tensors, not the {len(index)} that {MANIFEST} says')
            self._opened[file] = opened
        return self._opened[file]


def load(folder: Path | str, verify: Literal['full', 'size'] = 'full') -> Checkpoint:
    """Open exactly this checkpoint, or the newest of a run's folder. 'full' compares every file's sha256, 'size' only its length.

    Raises CheckpointError naming the file, what was expected and what was found.
    """
    folder = Path(folder)
    if run := _folders_of_run(folder):
        return _newest(run, verify)
    if not folder.is_dir():
        raise CheckpointError(_missing(folder))
    manifest = manifests.read(folder)
    manifests.compare(folder, manifest['files'], verify)
    return Checkpoint(folder, manifest)


def latest(root: Path | str) -> Checkpoint | None:
    """The newest checkpoint under root that verifies in full; None where root holds none at all.

    A damaged one is passed over with a warning. Raises CheckpointError where there are some, all damaged.
    """
    found = folders(root)
    return _newest(found) if found else None



def _newest(found: Sequence[Path], verify: Literal['full', 'size'] = 'full') -> Checkpoint:
    for folder in found:
        try:
            return load(folder, verify)
        except CheckpointError as error:
            get_logger().warning(f'DAMAGED CHECKPOINT, falling back to the one before it: {error}')
    raise CheckpointError(f'{found[0].parent} holds {len(found)} checkpoints, and all are damaged; the warnings above say how')


def folder_of(root: Path | str, step: int) -> Path:
    """Where the checkpoint of this step lies."""
    return Path(root) / f'step-{step:08d}'


def folders(root: Path | str) -> list[Path]:
    """All checkpoint folders under root, sound or not, the newest step first."""
    root = Path(root)
    return sorted((f for f in root.iterdir() if step_of(f) >= 0 and f.is_dir()), key=step_of, reverse=True) if root.is_dir() else []


def is_checkpoint(path: Path | str) -> bool:
    """Whether `load` takes this path: a checkpoint, or the folder of a run that holds some."""
    return (Path(path) / MANIFEST).is_file() or bool(_folders_of_run(Path(path)))


def newest_of(path: Path | str) -> Path | None:
    """The checkpoint that a path means: itself, or the newest whole one of a run's folder; None where it is neither."""
    path = Path(path)
    if not is_checkpoint(path):
        return None
    if (path / MANIFEST).is_file():
        return path
    found = load(path).path
    get_logger().info(f'{path}: its newest checkpoint is {found.name}')
    return found


def _folders_of_run(path: Path) -> list[Path]:
    """The checkpoints of a WORK_DIR, or of its folder checkpoints, the newest first; none for a path that is one itself."""
    if step_of(path) >= 0 or (path / MANIFEST).exists():
        return []
    return folders(path / 'checkpoints') or folders(path)


def is_sound(folder: Path, verify: Literal['full', 'size'] = 'full') -> bool:
    """Whether load(folder) would succeed."""
    try:
        load(folder, verify)
    except CheckpointError:
        return False
    return True


def _missing(folder: Path) -> str:
    parent = next((p for p in folder.absolute().parents if p.is_dir()), Path('/'))
    if folder.is_file():
        return f'{folder} is a file; a checkpoint is a folder'
    hint = did_you_mean(folder.name, [p.name for p in parent.iterdir()]) if parent == folder.absolute().parent else ''
    return f'{folder} does not exist (the nearest folder that does is {parent}){hint}'
