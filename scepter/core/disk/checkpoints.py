"""Checkpoints: the only writer and reader of WORK_DIR/checkpoints (docs/design.md, section 7).

    step-00000100/
        model.safetensors  ema.safetensors  optimizer.safetensors  state.json  config.yaml  MANIFEST.json

A folder is a checkpoint when its MANIFEST.json, which tells the length and sha256 of every other file, holds true. All is written to a
hidden folder beside it, each file fsynced, the manifest last, then renamed: a reader sees a whole checkpoint or none. Damage is always
a CheckpointError that names the file, what was expected and what was found; nothing in a checkpoint is ever executed.

In a run on several processes the main one alone calls `preflight`, `resolve`, `latest` and `prune`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scepter.core.disk import atomic, manifests
from scepter.core.disk.atomic import NO_SPACE, Digest
from scepter.core.disk.manifests import FORMAT, MANIFEST, step_of
from scepter.core.disk.tensors import TensorFile, is_finite, nbytes, write_tensors
from scepter.core.errors import CheckpointError
from scepter.core.faults import did_you_mean
from scepter.core.logger import get_logger

__all__ = ['Checkpoint', 'is_checkpoint', 'latest', 'load', 'preflight', 'prune', 'resolve', 'save']



# -------------------------------------------------------------------- writing
def save(root: Path | str, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], config: str,
         keep: int | None = None, pinned: Collection[int] = (), every: int | None = None,
         whole: Callable[[Tensor], Tensor] | None = None) -> Path:
    """Write root/step-<step> and return it; once this returns, the checkpoint survives a power cut.

    groups: name -> tensors, e.g. {'model': ..., 'ema': ..., 'optimizer': ...}, each of any device and layout. state: plain JSON values.
    config: the run's YAML. keep, pinned, every: what `prune` leaves. whole: what puts a tensor together of which this process holds a
    share; the other processes `take_part` meanwhile, and all have looked for what is not finite in their shares before.
    Raises CheckpointError, with nothing of the new checkpoint left behind and every older one untouched, where a tensor is not finite,
    the state is not JSON, or the disk refuses.
    """
    root = Path(root)
    if whole is None:
        refuse(non_finite(groups))
    target = folder_of(root, step)
    needed = sum(map(nbytes, groups.values()))
    with _explained(target, needed):
        recover(root)
        with _temporary(target) as folder:
            files = {f'{name}.safetensors': write_tensors(folder / f'{name}.safetensors', tensors, whole=whole)
                     for name, tensors in groups.items()}
            files['state.json'] = atomic.write_file(folder / 'state.json', [_json(state, 'the state').encode()])
            files['config.yaml'] = atomic.write_file(folder / 'config.yaml', [config.encode()])
            _commit(folder, target, step, files, {name: [f'{name}.safetensors'] for name in groups})
    prune(root, keep, pinned, every, verified=target)
    return target


def non_finite(groups: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """The tensors that hold NaN or infinity."""
    return [f'{group}: {name}' for group, tensors in groups.items() for name, tensor in tensors.items() if not is_finite(tensor)]


def refuse(bad: Sequence[str]) -> None:
    """Raises CheckpointError naming tensors that hold NaN or infinity: such a checkpoint can only spread the damage."""
    if bad:
        more = f' and {len(bad) - 5} more' if len(bad) > 5 else ''
        raise CheckpointError(f'not saved, since these tensors hold NaN or infinity: {", ".join(bad[:5])}{more}')


def preflight(root: Path | str) -> None:
    """Prove, before the first step is spent, that a checkpoint could be written here; also put leftovers of a crash in order.

    Raises CheckpointError.
    """
    root = Path(root)
    probe = atomic.beside(root / 'probe', 'tmp')
    with _explained(probe, 1024):
        atomic.make_folder(root)
        recover(root)
        landed = probe.with_name(probe.name + '-renamed')
        try:
            written = atomic.write_file(probe, [os.urandom(1024)])
            atomic.publish(probe, landed)
            if atomic.digest(landed) != written:
                raise CheckpointError(f'{root} does not give back what was written to it: it cannot hold checkpoints')
        finally:
            probe.unlink(missing_ok=True)
            landed.unlink(missing_ok=True)


def prune(root: Path | str, keep: int | None, pinned: Collection[int] = (), every: int | None = None,
          verified: Path | None = None, dry: bool = False) -> list[Path]:
    """Remove all but the newest `keep` checkpoints, the pinned steps and the multiples of `every`; keep None keeps all.

    Steps are compared as numbers. A damaged folder does not count as kept. At least one checkpoint that verifies always stays;
    `verified` is one known to, since it was written just now. A folder that cannot be removed is left with a warning.
    Answers what was removed, or with `dry` what would be.
    """
    if keep is None:
        return []
    if keep < 1:
        raise ValueError(f'keep is {keep}: at least 1 checkpoint must stay')
    found = folders(root)
    whole = [f for f in found if is_sound(f, 'size')]
    oldest = whole[keep - 1] if len(whole) >= keep else found[-1] if found else None
    stays = {step for step in map(step_of, found) if step in pinned or (every and step % every == 0)}
    doomed = [f for f in found if oldest is not None and step_of(f) < step_of(oldest) and step_of(f) not in stays]
    kept = [f for f in found if f not in doomed]
    if doomed and verified not in kept and not any(is_sound(f) for f in kept):
        spared = next((f for f in doomed if is_sound(f)), None)
        doomed = [f for f in doomed if f != spared] if spared else []
    removed = []
    for folder in [] if dry else doomed:
        try:
            atomic.trash(folder)
            removed.append(folder)
        except OSError as error:
            get_logger().warning(f'{folder} is no longer needed, but cannot be removed: {error.strerror}')
    return doomed if dry else removed


def recover(root: Path) -> None:
    """Put in order what a killed writer left in root: its hidden folders go, and a checkpoint it was about to replace comes back.

    For the one process that writes here. A folder that a living writer holds is left alone.
    """
    if not root.is_dir():
        return
    for left in sorted(root.glob('.*')):
        if re.match(r'\.tmp-\d+-\w+-', left.name) and left.is_file():       # of preflight
            left.unlink(missing_ok=True)
        if not left.is_dir() or not (match := re.fullmatch(r'\.(tmp|trash)-\d+-\w+-(step-\d{8,})', left.name)):
            continue
        with _held(left) as is_ours:
            target = root / match[2]
            if is_ours and match[1] == 'trash' and not target.exists() and is_sound(left):
                get_logger().warning(f'{target} was taken away but never replaced: put back')
                atomic.publish(left, target)
            elif is_ours:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A hidden folder beside target, held by this process; gone when the block fails."""
    atomic.make_folder(target.parent)
    folder = atomic.beside(target, 'tmp')
    os.mkdir(folder)
    try:
        with _held(folder):
            yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _commit(folder: Path, target: Path, step: int, files: Mapping[str, Digest], groups: Mapping[str, list[str]]) -> None:
    """Seal a folder that holds all files, and let it appear at target. Everything before this is invisible to readers."""
    manifest = {'format': FORMAT, 'step': step, 'torch': torch.__version__, 'groups': dict(groups),
                'files': {name: file._asdict() for name, file in files.items()}}
    atomic.write_file(folder / MANIFEST, [manifests.sealed(manifest)])
    atomic.sync(folder)
    replaced = None
    if target.exists():     # a run that went back comes by its old steps again
        replaced = atomic.beside(target, 'trash')
        os.rename(target, replaced)
    atomic.publish(folder, target)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a lock on a folder, so that another process's `recover` leaves it alone; yields whether nobody else holds it."""
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(file)


@contextmanager
def _explained(target: Path, needed: int) -> Iterator[None]:
    """Turn what the operating system refuses into a CheckpointError."""
    try:
        yield
    except OSError as error:
        where = error.filename or target
        if error.errno in NO_SPACE:
            raise CheckpointError(f'no space for {target}: {needed:,} bytes of tensors needed, {atomic.space(target):,} free '
                                  f'({error.strerror}). Nothing of it was left behind; earlier checkpoints are intact') from error
        raise CheckpointError(f'{target} cannot be written: {error.strerror}: {where}') from error


# -------------------------------------------------------------------- reading
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

    def tensors(self, group: str) -> Mapping[str, Tensor]:
        """The tensors of a group, each read when it is asked for; names and shapes cost nothing.

        Raises CheckpointError where the checkpoint has no such group.
        """
        if group not in self.manifest['groups']:
            raise CheckpointError(f'{self.path} holds no {group}: it has {", ".join(self.groups) or "no tensors"}')
        files = [TensorFile(self.path / name) for name in self.manifest['groups'][group]]
        return files[0] if len(files) == 1 else _Union(files)

    def group(self, group: str, device: torch.device | str = 'cpu') -> dict[str, Tensor]:
        """All tensors of a group, on a device. Raises CheckpointError where the checkpoint has no such group."""
        return {name: tensor.to(device) for name, tensor in self.tensors(group).items()}

    def _text(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding='utf-8')
        except OSError as error:
            raise CheckpointError(f'{self.path / name}: cannot be read: {error.strerror}') from error


class _Union(Mapping[str, Tensor]):
    """The tensors of a group that lies in several files."""

    def __init__(self, files: Iterable[TensorFile]):
        self.places = {name: file for file in files for name in file}

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


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


def resolve(work_dir: Path | str, resume_from: str | None) -> Checkpoint | None:
    """The checkpoint that RESUME_FROM means, or None for a fresh run, which is never chosen silently.

        absent     a fresh run; refused where WORK_DIR already holds checkpoints
        auto       the newest, else a fresh run
        latest     the newest; it must exist
        a path     exactly that one: no falling back; of a run's folder the newest

    Raises CheckpointError.
    """
    root = Path(work_dir) / 'checkpoints'
    if resume_from not in (None, 'auto', 'latest'):
        return load(resume_from)
    with _explained(root, 0):
        recover(root)
    if resume_from is None:
        if found := folders(root):
            raise CheckpointError(f'{work_dir} already holds a run, up to {found[0].name}. Set SOLVER.RESUME_FROM: auto to continue it, '
                                  'or give another WORK_DIR to start afresh')
        return None
    checkpoint = latest(root)
    if checkpoint is None and resume_from == 'latest':
        raise CheckpointError(f'RESUME_FROM is latest, but {root} holds no checkpoint. '
                              'Set RESUME_FROM: auto to start afresh where there is none')
    return checkpoint


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


def _json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f'{what} is not plain JSON ({error}): pass tensors in a group') from error
