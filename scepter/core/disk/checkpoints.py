"""The checkpoints of a run: the only writer and reader of WORK_DIR/checkpoints (docs/design.md, section 7).

    step-00000100/
        model.safetensors  ema.safetensors  optimizer.safetensors  state.json  config.yaml  MANIFEST.json

How one is written, by one process or by many, stands in writing.py, and how one is read in reading.py; here is which of them there are,
which stay, and which one a run goes on from. In a run on several processes the main one alone calls `preflight`, `resolve`, `latest`
and `prune`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from scepter.core.disk import atomic
from scepter.core.disk.manifests import FORMAT, MANIFEST, step_of
from scepter.core.disk.reading import Checkpoint, folder_of, folders, is_checkpoint, is_sound, latest, load, newest_of
from scepter.core.disk.writing import LIMIT, Kept, Save, as_json, explained, recover
from scepter.core.env import we
from scepter.core.errors import CheckpointError
from scepter.core.logger import get_logger

__all__ = ['FORMAT', 'MANIFEST', 'Checkpoint', 'folder_of', 'folders', 'is_checkpoint', 'is_sound', 'latest', 'load', 'newest_of',
           'preflight', 'prune', 'recover', 'resolve', 'save', 'step_of', 'write']


def save(root: Path | str, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], config: str,
         keep: int | None = None, pinned: Collection[int] = (), every: int | None = None, limit: float = LIMIT) -> Path:
    """Write root/step-<step> from this process and return it; once this returns, the checkpoint survives a power cut.

    groups: name -> tensors, e.g. {'model': ..., 'ema': ..., 'optimizer': ...}, each of any device and layout. state: plain JSON values.
    config: the run's YAML. keep, pinned, every: what `prune` leaves. limit: bytes of a file, beyond which a group is cut into several.
    Raises CheckpointError, with nothing of the new checkpoint left behind and every older one untouched, where a tensor is not finite,
    the state is not JSON, or the disk refuses.
    """
    def contents() -> tuple[Mapping[str, Mapping[str, Tensor]], dict[str, str]]:
        return groups, {'state.json': as_json(state, 'the state'), 'config.yaml': config}

    return write(Save.of(root, step, contents, limit, Kept(keep, tuple(pinned), every)))


def write(save: Save) -> Path:
    """Write what is to be saved, and remove what is kept no longer. Every process calls it, each with its own part of it.

    Raises CheckpointError, in all processes where one of them fails.
    """
    target = save.write()
    if we.is_main:
        prune(save.root, *save.kept, verified=target)
    return target


def preflight(root: Path | str) -> None:
    """Prove, before the first step is spent, that a checkpoint could be written here; also put leftovers of a crash in order.

    Raises CheckpointError.
    """
    root = Path(root)
    probe = atomic.beside(root / 'probe', 'tmp')
    with explained(probe, 1024):
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
    with explained(root, 0):
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
