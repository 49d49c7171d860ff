"""Where each weight came from: what a filled parameter remembers, and what a checkpoint leaves out and records for it.

`left_out` names the parameters that a checkpoint need not hold; what is saved, what is recorded beside it (`record`) and what is loaded
(records.py) are its three readers. The source of a tensor is the file that holds it, never a checkpoint that left it out itself, so there
are no chains to follow.
"""
from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from scepter.core.disk import atomic, checkpoints
from scepter.core.disk.checkpoints import MANIFEST
from scepter.core.env import we
from scepter.core.errors import CheckpointError
from scepter.core.logger import get_logger
from scepter.core.stores.client import shown
from scepter.core.stores.hub import parse
from scepter.core.stores.local import local_path
from scepter.weights.files import Entry
from scepter.weights.loading import some

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


@contextmanager
def carried(model: nn.Module) -> Iterator[None]:
    """Inside, other parameters may take the place of those of a network, with the same values: what they remember goes over to them."""
    before = marks_of(model)
    yield
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, found in before.items():
        path, _, leaf = name.rpartition('.')
        p = parameters[name]
        model.get_submodule(path).__dict__['_marks'][leaf] = found._replace(version=p._version, identity=id(p))


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


def parts_with_a_file(model: nn.Module) -> dict[str, set[str]]:
    """part -> the names that its own file gave, for each part below whose config names one."""
    found = {}
    for path, module in model.named_modules():
        if path and word_of(module) is not None:
            found[path] = {f'{path}.{name}' for name in (module.state_dict() if _reads_by_itself(module) else marks_of(module))}
    return found


def _reads_by_itself(module: nn.Module) -> bool:
    return word_of(module) is not None and 'filled_from' not in module.__dict__


def as_written(word: str | Path) -> str:
    """A word of the config as it stands there: the value of its ${NAME} may be a secret."""
    return getattr(word, 'written', str(word))


def word_of(module: nn.Module) -> str | None:
    """The PRETRAINED_MODEL of a part, as its config has it."""
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
        """The file and its digest; None, with a warning, where it was changed after it was read."""
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
    word = word_of(module)
    if word is None or not _reads_by_itself(module) or not os.path.exists(path := local_path(str(word))):
        return None
    return Source(as_written(word), os.path.abspath(path), '', (), 0, '')
