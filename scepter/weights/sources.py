"""Where each weight came from: what a checkpoint may leave out, what it records of that, and how it is found again.

A parameter that load_pretrained filled remembers its source. `left_out` names those that a checkpoint need not hold; what is saved, what
is recorded beside it (`record`) and what is loaded (`weights_of`) are its three readers. The source of a tensor is the file that holds it,
never a checkpoint that left it out itself, so there are no chains to follow.
"""
from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from scepter.core.disk import atomic, checkpoints
from scepter.core.disk.checkpoints import MANIFEST, Checkpoint
from scepter.core.disk.tensors import TensorFile
from scepter.core.env import we
from scepter.core.errors import CheckpointError, DataError
from scepter.core.logger import get_logger
from scepter.core.stores import FS
from scepter.core.stores.client import shown
from scepter.core.stores.hub import parse
from scepter.core.stores.local import local_path
from scepter.weights.compare import refuse_contradictions, scale_beside
from scepter.weights.files import Entry, Weights, local_copy, read_weights
from scepter.weights.hugging_face import in_layout_of
from scepter.weights.layouts import weights_for
from scepter.weights.loading import load_into, put, some

Stamp = tuple[str, int, int, int]


class Source(NamedTuple):
    """A file or folder that weights came from, as a checkpoint records it."""
    said: str                   # the config's own word
    path: str                   # where it, or its local copy, lay: absolute
    address: str                # in its store, with the revision where there is one; '' for a plain path
    files: tuple[str, ...]      # of a folder: the files that were read, relative to it
    size: int                   # bytes of these files
    sha256: str                 # of the file; of several, of a line "size sha256 name" for each


class Origin(Protocol):
    """Knows the source of some weights; None where it cannot be proven any more."""
    source: Source | None


class Mark(NamedTuple):
    """What a filled parameter remembers."""
    origin: Origin | None
    inner: str          # its name in the module that the source is of
    version: int        # that PyTorch counts up whenever the parameter is written to
    identity: int       # of the parameter: another one in its place comes from elsewhere
    said: str           # the config's word for it, which may be that of a checkpoint that left it out

    @property
    def source(self) -> Source | None:
        """Where it came from; None where that cannot be proven any more."""
        found = self.origin.source if self.origin is not None else None
        return found and found._replace(said=self.said)


# -------------------------------------------------------------------- loading, and what it remembers
def load_pretrained(model: nn.Module, path: str | Path, ignore_keys: Sequence[str] = (), use_ema: bool = False) -> None:
    """Load a whole model or any part of one from any place that FS knows, whatever names the file uses.

    A part whose own config names a PRETRAINED_MODEL keeps what that gave it.
    Missing, unexpected and mis-shaped keys are a CheckpointError unless ignore_keys (exact names or globs) names them; so is what a file
    says otherwise than the model's config (compare.py).
    """
    model.__dict__['filled_from'] = path
    if _is_deferred.get():
        return
    owned = _of_parts_with_a_file(model)
    kept = set().union(*owned.values())
    reason = f'{shown(str(path))} says that it left out what is there, and that may be anybody\'s word: name a copy of yours as the ' \
             'PRETRAINED_MODEL of the part'
    with local_copy(path) as local, FS.without_requests(reason):
        found = read_weights(local, use_ema)
        refuse_contradictions(model, found, ignore_keys, source=str(path))
        weights = weights_for(model, found)
        for part, names in owned.items():
            if not names.isdisjoint(weights):
                get_logger().info(f'{part} keeps the weights of {shown(str(_word_of(model.get_submodule(part))))}, which its config names; '
                                  f'those in {shown(str(path))} are left aside')
        loaded = Loaded(path, local, weights.entries.values())
        taken = load_into(model, weights, [*ignore_keys, *kept], source=str(path), kept=kept)
        loaded.keep(taken.values())
        # averages, and what load_into had to rename, could not be found under these names again: a checkpoint holds them
        mark(model, {name: entry if name in weights else None for name, entry in taken.items()}, None if use_ema else loaded)
        model.__dict__['published_scale'] = scale_beside(found)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, load_pretrained leaves networks as they were built: for one whose weights all come from its checkpoint."""
    token = _is_deferred.set(True)
    try:
        yield
    finally:
        _is_deferred.reset(token)


_is_deferred: ContextVar[bool] = ContextVar('is_deferred', default=False)


def mark(model: nn.Module, entries: Mapping[str, Entry | None], loaded: Loaded | None = None) -> None:
    """Let parameters remember what has just filled them: where an entry comes from by itself, else what was loaded, if it can be told."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, entry in entries.items():
        if name not in parameters:    # a buffer: it may change without a gradient, so a checkpoint always holds it
            continue
        path, _, leaf = name.rpartition('.')
        marks = model.get_submodule(path).__dict__.setdefault('_marks', {})
        own, inner = (None, name) if entry is None else entry.origin or (loaded, name)
        said = loaded.said if loaded is not None else own.source.said if own is not None else ''
        marks[leaf] = Mark(own, inner if f'.{name}'.endswith(f'.{inner}') else name, parameters[name]._version,
                           id(parameters[name]), said)


def marks_of(model: nn.Module) -> dict[str, Mark]:
    """What each parameter remembers that has not been written to since, by its name."""
    return {f'{path}.{leaf}' if path else leaf: m for path, module in model.named_modules(remove_duplicate=False)
            for leaf, m in module.__dict__.get('_marks', {}).items()
            if isinstance(p := module._parameters.get(leaf), Tensor) and (p._version, id(p)) == (m.version, m.identity)}


def left_out(model: nn.Module) -> dict[str, Mark]:
    """What a checkpoint of this network need not hold, by its name in the state dict: a Mark whose origin has a source.

    These are parameters that are not trained, and that a file whose digest is known gave. A parameter that is trained now forgets
    its file for good, so that it is held also when it is frozen later.
    """
    frozen = {}
    for name, found in marks_of(model).items():
        path, _, leaf = name.rpartition('.')
        owner = model.get_submodule(path)
        if owner._parameters[leaf].requires_grad:
            del owner.__dict__['_marks'][leaf]
        elif found.source is not None:
            frozen[name] = found
    return frozen


def refuse_unfilled(model: nn.Module) -> None:
    """Raises CheckpointError where weights of a network that is to draw came from no file: it would draw noise, or nearly."""
    marked = marks_of(model)
    own = [f'{path}.' for path, module in model.named_modules() if _reads_by_itself(module)]
    names = [name for name, _ in model.named_parameters() if name not in marked and not name.startswith(tuple(own))]
    if names:
        raise CheckpointError(f'{len(names)} of the weights of {type(model).__name__} are in no file that was named:{some(names)}\n'
                              'Name one that has them: a checkpoint, or a PRETRAINED_MODEL of the network or of a part')


def _of_parts_with_a_file(model: nn.Module) -> dict[str, set[str]]:
    """part -> the names that its own file gave, for each part below whose config names one."""
    found = {}
    for path, module in model.named_modules():
        if path and _word_of(module) is not None:
            found[path] = {f'{path}.{name}' for name in (module.state_dict() if _reads_by_itself(module) else marks_of(module))}
    return found


def _reads_by_itself(module: nn.Module) -> bool:
    return _word_of(module) is not None and 'filled_from' not in module.__dict__


def as_written(word: str | Path) -> str:
    """A word of the config as it stands there: the value of its ${NAME} may be a secret."""
    return getattr(word, 'written', str(word))


def _word_of(module: nn.Module) -> str | None:
    cfg = module.__dict__.get('cfg')
    return cfg.get('PRETRAINED_MODEL') or None if isinstance(cfg, dict) else None


class Loaded:
    """A file or folder that was read just now. It is hashed when that is asked for, if it is still the one that was read."""

    def __init__(self, given: str | Path, local: Path, entries: Iterable[Entry] = (), also: Iterable[Path] = ()):
        self.given, self.said = str(given), shown(as_written(given))
        self.path = checkpoints.load(local, 'size').path if checkpoints.is_checkpoint(local) else local
        self.also = {self.path / MANIFEST} if (self.path / MANIFEST).is_file() else set(also)    # which tells of all files beside it
        self.stamps = {file: stamp(file) for file in {*self.also, *_files_read(entries)}}

    def keep(self, entries: Iterable[Entry]) -> None:
        """Of the files that were opened, only those that these entries, and `also`, lie in."""
        used = self.also if self.path / MANIFEST in self.also else {*self.also, *_files_read(entries)}
        self.stamps = {file: then for file, then in self.stamps.items() if file in used}

    @cached_property
    def source(self) -> Source | None:
        if not self.stamps or any(then is None or stamp(file) != then for file, then in self.stamps.items()):
            get_logger().warning(f'{shown(self.given)} has changed since it was loaded: checkpoints of this run hold what it gave')
            return None
        files = () if list(self.stamps) == [self.path] else tuple(sorted(os.path.relpath(file, self.path) for file in self.stamps))
        found = digest(self.path, files)
        path = os.path.abspath(self.path)
        return Source(self.said, path, _address(self.given, path), files, found.size, found.sha256)


def _files_read(entries: Iterable[Entry]) -> set[Path]:
    """The files that entries lie in, and the config.json beside them, which says how to read a text tower."""
    files = {file for entry in entries for file in entry.files}
    return files | {config for folder in {file.parent for file in files} if (config := folder / 'config.json').is_file()}


def _address(given: str, local: str) -> str:
    """Where a store has what was given, at the revision that lies at this local path; '' for a plain path."""
    if '://' not in given or given.startswith('file://'):
        return ''
    revision = re.search(r'/snapshots/([0-9a-f]{40})(/|$)', local)
    if not given.startswith('hf://') or not revision:
        return shown(given)
    repo, _, file = parse(given)
    return f'hf://{repo}:{revision[1]}{f"@{file}" if file else ""}'


# -------------------------------------------------------------------- digests
def stamp(file: Path) -> Stamp | None:
    """What tells a file from another one, or from itself after a change, without reading it; None where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return os.path.abspath(file), found.st_size, found.st_mtime_ns, found.st_ino


def digest(path: Path, files: Sequence[str] = ()) -> atomic.Digest:
    """Size and sha256 of a file, or of these files of a folder; each file is hashed once by a process. Raises OSError."""
    found = {name: _hashed(path / name) for name in files or ['.']}
    if not files:
        return found['.']
    lines = ''.join(f'{d.size} {d.sha256} {name}\n' for name, d in sorted(found.items()))
    return atomic.Digest(sum(d.size for d in found.values()), hashlib.sha256(lines.encode()).hexdigest())


def _hashed(file: Path) -> atomic.Digest:
    key = stamp(file)
    if key is None or key not in known_digests:
        known_digests[key] = atomic.digest(file)    # raises where there is no such file
    return known_digests[key]


def agree(model: nn.Module) -> None:
    """Have the main process alone hash what this network was loaded from; the others take its word for files that are the same."""
    if we.world_size == 1:
        return
    if we.is_main:
        for found in marks_of(model).values():
            found.source    # noqa: B018  worked out here, and kept
    known_digests.update(we.broadcast(known_digests if we.is_main else None))


known_digests: dict[Stamp | None, atomic.Digest] = {}


# -------------------------------------------------------------------- what a checkpoint records
def record(model: nn.Module, folder: str | Path) -> list[dict[str, Any]]:
    """The sources of what a checkpoint of this network leaves out, as JSON, and of what its parts are built from.

    folder: the run's, so that a source that is moved along with it is found again.
    """
    state = model.state_dict()
    rows: dict[tuple[Source, str], dict[str, list[int]]] = {}
    needed = set()
    for name, found in left_out(model).items():
        part = name.removesuffix(found.inner).rstrip('.')
        rows.setdefault((found.source, part), {})[name] = list(state[name].shape)
    for path, module in model.named_modules():
        for source in filter(None, [built.source for built in module.__dict__.get('built_from', ())] or [_place_only(module)]):
            needed.add((source, path))
            rows.setdefault((source, path), {})
    return [{**source._asdict(), 'near': os.path.relpath(source.path, os.path.abspath(folder)), 'part': part, 'names': names,
             'is_needed': (source, part) in needed} for (source, part), names in rows.items()]


def _place_only(module: nn.Module) -> Source | None:
    """Where the files of a part lie that reads them by itself: which of them it reads is not known, so they have no digest."""
    word = _word_of(module)
    if word is None or not _reads_by_itself(module) or not os.path.exists(path := local_path(str(word))):
        return None
    return Source(as_written(word), os.path.abspath(path), '', (), 0, '')


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


def fill(model: nn.Module, checkpoint: Checkpoint, use_ema: bool = False) -> None:
    """Take all weights of a checkpoint, but for those that came from the same file already. Raises CheckpointError."""
    weights = weights_of(checkpoint, use_ema)
    entries = in_layout_of(model, weights.entries)
    targets = model.state_dict(keep_vars=True)
    faults = [f'missing: {name} {list(value.shape)}' for name, value in targets.items() if name not in entries]
    faults += [f'unexpected: {name} {list(entry.shape)}' for name, entry in entries.items() if name not in targets]
    faults += [f'{name}: shape {list(targets[name].shape)} expected, {list(entry.shape)} found'
               for name, entry in entries.items() if name in targets and targets[name].shape != entry.shape]
    if faults:
        more = f'\n  and {len(faults) - 10} more' if len(faults) > 10 else ''
        raise CheckpointError(f'{checkpoint.path} is of another network than {type(model).__name__}:\n  '
                              + '\n  '.join(faults[:10]) + more)
    marks = marks_of(model)
    there = {name for name, entry in entries.items() if entry.origin and name in marks and _is_same(name, marks[name], entry.origin[0])}
    taken = {name: entry for name, entry in entries.items() if name not in there}
    for name, entry in taken.items():
        put(model, name, targets[name], entry.read())
    mark(model, taken)


def _is_same(name: str, own: Mark, then: Record) -> bool:
    """Whether the network has from its own file what the checkpoint was trained beside. Raises where the config names another one now."""
    now = own.source
    if now is not None and (now.size, now.sha256) == (then.source.size, then.source.sha256):
        return True
    if now is not None and now.said != then.source.said:
        raise CheckpointError(f'{then.checkpoint.path} was trained beside other weights than the config names now: {name} came from '
                              f'{then.source.said}, sha256 {then.source.sha256}, and comes from {now.said}, sha256 {now.sha256}. '
                              'Name the former again, or begin a new run with this checkpoint as its PRETRAINED_MODEL')
    return False    # the word means another file here: the one that was meant is looked for


def _files_of(checkpoint: Checkpoint, group: str) -> list[TensorFile]:
    return [TensorFile(checkpoint.path / name) for name in checkpoint.manifest['groups'].get(group, ())]
