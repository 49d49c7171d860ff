"""All weights of a file, a folder or a checkpoint: of the last also those that it left out, found again by what it records of them."""
from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scepter.core.disk import checkpoints
from scepter.core.disk.checkpoints import MANIFEST, Checkpoint
from scepter.core.disk.tensors import TensorFile
from scepter.core.errors import CheckpointError, DataError
from scepter.core.stores.local import local_path
from scepter.weights.family import FAMILIES, parts, weights_for
from scepter.weights.files import (
    Entry,
    Weights,
    local_copy,
    read_configs,
    read_file,
    read_model_folder,
)
from scepter.weights.marks import Source, digest


def read_weights(path: str | Path, use_ema: bool = False) -> Weights:
    """The weights of a local file or folder, under the names that it uses.

    A file is a .safetensors, or a .ckpt, .pth, .pt, .bin of torch.save. A folder is a checkpoint of ours, one model of diffusers or
    transformers (sharded or not, also a .fp16 variant), or a whole pipeline, whose parts come as unet.*, vae.*, text_encoder.*, ...
    use_ema: take averaged weights where there are any. Raises CheckpointError that names the file.
    """
    path = Path(path)
    if path.is_file():
        weights = read_file(path)
        return with_averages(weights) if use_ema else weights
    if not path.is_dir():
        raise CheckpointError(f'{path}: no such file or folder of weights')
    if checkpoints.is_checkpoint(path):
        return weights_of(checkpoints.load(path), use_ema)
    known = dict.fromkeys(part.folder for part in parts())
    folders = [part for part in known if (path / part).is_dir()]
    if not folders:
        return read_model_folder(path)
    entries = {}
    for part in folders:
        folder = path / f'{part}_ema' if use_ema and (path / f'{part}_ema').is_dir() else path / part
        entries |= read_model_folder(folder).under(f'{part}.').entries
    return Weights(entries, str(path), read_configs(path, known))


def with_averages(weights: Weights) -> Weights:
    """Some single files keep averages beside their weights, under names of their own: each in the place of its weight."""
    def best(name: str) -> Entry:
        called = (family.average_of(name) for family in FAMILIES)
        return next((weights.entries[other] for other in called if other in weights), weights.entries[name])
    return weights.with_entries({name: best(name) for name in weights})


def records(checkpoint: Checkpoint) -> list[Record]:
    """What a checkpoint records of its sources. Raises CheckpointError where that is damaged."""
    try:
        return [Record(checkpoint, Source(*map(_text, (row['said'], row['path'], row['address'])), tuple(map(_text, row['files'])),
                                          int(row['size']), _text(row['sha256'])), _text(row['near']), _text(row['part']),
                       {_text(name): tuple(map(int, shape)) for name, shape in row['names'].items()}, row['is_needed'] is True)
                for row in checkpoint.state['left_out']]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f'{checkpoint.path / "state.json"}: its left_out is no list of sources '
                              f'({type(error).__name__}: {error})') from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f'a text expected, {value!r} found')
    return value


@dataclass
class Record:
    """One source of a checkpoint, and what of it was left out there."""
    checkpoint: Checkpoint
    source: Source
    near: str                               # its path from the run's folder
    part: str                               # the module that it is of
    names: dict[str, tuple[int, ...]]       # left out -> shape
    is_needed: bool                         # the part cannot be built without it: its sizes, its vocabulary

    @cached_property
    def place(self) -> Path:
        """Where it lies now: looked for by digest. Raises CheckpointError that tells what is at each place instead."""
        run, rows = self.checkpoint.path.absolute().parent.parent, []
        name = os.path.basename(self.source.path)
        said = [] if '://' in self.source.said or '${' in self.source.said else [local_path(self.source.said)]
        places = [*said, Path(self.source.path),
                  Path(os.path.normpath(run / self.near)), self.checkpoint.path.absolute().parent / name, run / name]
        for path in dict.fromkeys(places):
            if (found := self._look(path)) is None:
                return self._found(path)
            rows.append(f'{path}: {found}')
        if not self.source.sha256:
            return Path(self.source.said)
        if self.source.address:
            try:
                with local_copy(self.source.address) as local:
                    if (found := self._look(local)) is None:
                        return self._found(local)
                    rows.append(f'{self.source.address}: {found}')
            except (CheckpointError, DataError) as error:
                rows.append(str(error))
        what = f'{len(self.names)} weights of {self.part or "the network"}' if self.names else f'what {self.part} is built from'
        told = '\n  '.join(rows)
        raise CheckpointError(
            f'{self.checkpoint.path} leaves out {what}, which came from {self.source.said}:\n  '
            f'sha256 {self.source.sha256} expected\n  {told}\n'
            'Put it back at one of these places. Where everything is still there, '
            f'`python tools/checkpoint.py to-single {self.checkpoint.path} FILE.safetensors` makes one file that needs no other.')

    def _look(self, path: Path) -> str | None:
        """None where what lies there is this source, else what it is."""
        if self.source.files == (MANIFEST,) and checkpoints.is_checkpoint(path):
            path = checkpoints.load(path, 'size').path
        if not path.exists():
            return 'gone'
        if self.source.sha256 and path.is_dir() and not self.source.files:
            return 'a folder'
        if not self.source.sha256:    # only the place is known
            return None
        try:
            found = digest(path, self.source.files)
        except OSError as error:
            return f'lacks {error.filename or ""} ({error.strerror})'
        return None if found == (self.source.size, self.source.sha256) else f'another file, sha256 {found.sha256} found'

    def _found(self, path: Path) -> Path:
        if self.source.files == (MANIFEST,):
            path = checkpoints.load(path, 'size').path
        self.source = self.source._replace(path=os.path.abspath(path))
        return path

    @cached_property
    def weights(self) -> Weights:
        """Those of its part, under the names that the checkpoint's network has inside that part."""
        prefix = f'{self.part}.' if self.part else ''
        own = [name for file in _files_of(self.checkpoint, 'model') for name in file]
        names = {*own, *(name for other in records(self.checkpoint) for name in other.names)}
        return weights_for([n[len(prefix):] for n in names if n.startswith(prefix)], read_weights(self.place))

    def entries(self) -> dict[str, Entry]:
        """An entry for each name that was left out; its file is looked for when the first one is read."""
        prefix = len(self.part) + 1 if self.part else 0
        return {name: Entry(shape, torch.float32, partial(self._read, name[prefix:], shape), origin=(self, name[prefix:]))
                for name, shape in self.names.items()}

    def _read(self, inner: str, shape: tuple[int, ...]) -> Tensor:
        if inner not in self.weights:
            raise CheckpointError(f'{self.place}: has no {inner}, which {self.checkpoint.path} left out')
        files = [os.path.relpath(file, self.place) for file in self.weights.entries[inner].files]
        if self.source.files not in ((), (MANIFEST,)) and not set(files) <= set(self.source.files):
            raise CheckpointError(f'{self.place}: {inner} lies in {", ".join(files)}, but {self.checkpoint.path} was written beside '
                                  f'{", ".join(self.source.files)}')
        return self.weights[inner].reshape(shape)


def weights_of(checkpoint: Checkpoint, use_ema: bool = False) -> Weights:
    """All weights of the network of a checkpoint: its own, and those that it left out. use_ema: averaged ones where there are any."""
    entries: dict[str, Entry] = {}
    for found in records(checkpoint):
        entries |= found.entries()
    for file in _files_of(checkpoint, 'model'):
        entries |= Weights.of(file).entries
    for file in _files_of(checkpoint, 'ema') if use_ema and 'ema' in checkpoint.groups else ():
        entries |= {name: entry for name, entry in Weights.of(file).entries.items() if name in entries}
    return Weights(entries, str(checkpoint.path))


def _files_of(checkpoint: Checkpoint, group: str) -> list[TensorFile]:
    return [TensorFile(checkpoint.path / name) for name in checkpoint.manifest['groups'].get(group, ())]
