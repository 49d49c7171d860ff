"""One checkpoint, written: by one process, or by many together.

All is written to a hidden folder beside its place, each file fsynced, MANIFEST.json last, then renamed: a reader sees a whole checkpoint
or none. A group of tensors that is larger than a file may be is cut into several, model-00001.safetensors and so on, which the processes
write in turn. Each step is taken by all together and ends with a word from each: where one has failed, all raise, and nothing is committed.
"""
from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from scepter.core.disk import atomic, manifests
from scepter.core.disk.atomic import NO_SPACE, Digest
from scepter.core.disk.manifests import FORMAT, MANIFEST
from scepter.core.disk.reading import folder_of, is_sound
from scepter.core.disk.tensors import is_finite, nbytes, write_tensors, writing_order
from scepter.core.env import we, who
from scepter.core.errors import CheckpointError, PeerError
from scepter.core.logger import get_logger
from scepter.core.shards import GivenUp, Rounds, Share, share_of

LIMIT = 2e9     # bytes of a file: large enough to be few, small enough that the files of a large run are shared out evenly
Groups = Mapping[str, Mapping[str, Tensor]]
Key = tuple[str, str]     # group, name
Result = TypeVar('Result')


class Kind(NamedTuple):
    """What all processes must agree on before a tensor is written."""

    dtype: torch.dtype
    shape: torch.Size
    is_shared: bool     # whether each process holds a share of it


class Part(NamedTuple):
    """A file of tensors, and who writes it."""

    file: str
    group: str
    kinds: dict[str, Kind]     # by name, as they stand in the file
    rank: int


class Kept(NamedTuple):
    """Which checkpoints stay once this one is there: the arguments of `prune`."""

    keep: int | None = None
    pinned: tuple[int, ...] = ()
    every: int | None = None


@dataclass
class Save:
    """A checkpoint that is to be written, and what this process gives to it: its shares, and the whole tensors that it writes.

    All processes make one at the same moment (`of`), may copy what it refers to (`hold`), and write it together, in any thread (`write`).
    """

    root: Path
    step: int
    parts: list[Part]
    tensors: dict[Key, Tensor | Share]
    texts: dict[str, str]     # further files, of the main process
    kept: Kept
    line: Any

    @classmethod
    def of(cls, root: Path | str, step: int, contents: Callable[[], tuple[Groups, Mapping[str, str]]], limit: float = LIMIT,
           kept: Kept | None = None, line: Any = None) -> Save:
        """contents: tensors by group, and further files. The main process decides what is saved; the others may give more, or less.

        limit: bytes of a file; no tensor is cut. line: of `we`, for all that is said from here on. Raises CheckpointError.
        """
        given: dict[Key, Tensor] = {}
        texts: dict[str, str] = {}
        writers = who_sees(Path(root), line)

        def parted() -> list[Part]:
            groups, further = contents()
            texts.update(further)
            given.update({(group, name): value for group, below in groups.items() for name, value in below.items()})
            return parts_of(groups, limit, writers) if we.is_main else []

        parts = together(parted, line)[0]
        tensors: dict[Key, Tensor | Share] = {}
        together(lambda: tensors.update(own_share(given, parts)), line)
        return cls(Path(root), step, parts, tensors, texts, kept or Kept(), line)

    def hold(self, room: dict[Key, Tensor]) -> None:
        """Refer to copies on the CPU from here on, which nothing changes. room: theirs, from one save to the next: memory that is new
        takes longer than the copying."""
        for key in room.keys() - self.tensors.keys():
            del room[key]
        for key, value in self.tensors.items():
            live = value.rows if isinstance(value, Share) else value
            if key not in room or (room[key].shape, room[key].dtype) != (live.shape, live.dtype):
                room[key] = torch.empty_like(live, device='cpu', pin_memory=live.is_cuda)
            room[key].copy_(live, non_blocking=True)
            self.tensors[key] = value._replace(rows=room[key]) if isinstance(value, Share) else room[key]
        if we.device.type == 'cuda':
            torch.cuda.synchronize()

    def write(self) -> Path:
        """Write it whole, and answer where it lies; once this returns, it survives a power cut. Every process calls it.

        Raises CheckpointError in all processes, with nothing of it left behind, where one has a tensor that is not finite or its disk
        refuses; PeerError where one is gone.
        """
        target = folder_of(self.root, self.step)
        found = together(lambda: non_finite(self.tensors), self.line)
        refuse(sorted({name for names in found for name in names}))
        with contextlib.ExitStack() as stack:
            def begin() -> Path:
                if we.is_main:
                    recover(self.root)
                    return stack.enter_context(temporary(target))
                return target

            def seal() -> None:
                if we.is_main:
                    for name, text in self.texts.items():
                        digests[name] = atomic.write_file(folder / name, [text.encode()])
                    manifests.compare(folder, {name: file._asdict() for name, file in digests.items()}, 'size')
                    commit(folder, target, manifest_of(self.step, self.parts, digests))

            folder = self._all(begin, target)[0]
            digests = {name: digest for told in self._all(lambda: self._write_files(folder), target) for name, digest in told.items()}
            self._all(seal, target)
        return target

    def _all(self, work: Callable[[], Result], target: Path) -> list[Result]:
        def on_disk() -> Result:
            with explained(target, sum(size_of(part) for part in self.parts)):
                return work()
        return together(on_disk, self.line)

    def _write_files(self, folder: Path) -> dict[str, Digest]:
        """This process's own, each tensor whole; of the others', it gives its shares."""
        shares = {key: value for key, value in self.tensors.items() if isinstance(value, Share)}
        turns = [[key for part in self.parts if part.rank == rank for name, kind in part.kinds.items()
                  if (key := (part.group, name)) in shares and kind.shape.numel()] for rank in range(we.world_size)]
        rounds, digests = Rounds(shares, turns, self.line), {}

        def whole(group: str, name: str) -> Tensor:
            value = self.tensors[group, name]
            return rounds.get() if isinstance(value, Share) else value

        try:
            for part in self.parts:
                if part.rank == we.rank:
                    outlines = {name: torch.empty(kind.shape, dtype=kind.dtype, device='meta') for name, kind in part.kinds.items()}
                    digests[part.file] = write_tensors(folder / part.file, outlines, whole=partial(whole, part.group))
            rounds.finish()
        except GivenUp:
            return {}
        except Exception:
            rounds.fail()
            raise
        return digests


def together(work: Callable[[], Result], line: Any) -> list[Result]:
    """What work gives in each process. Where it fails in one, all raise: that one its own error, the others one that names it."""
    result: Any = None
    error: Exception | None = None
    try:
        result = work()
    except PeerError:     # there is nobody to tell
        raise
    except Exception as caught:
        error = caught
    told = None if error is None else (isinstance(error, CheckpointError), who() + (str(error) or type(error).__name__))
    everybody = we.gather((result, told), line)
    if error is not None:
        raise error
    for _, told in everybody:
        if told is not None:
            raise (CheckpointError if told[0] else PeerError)(told[1])
    return [result for result, _ in everybody]


# ------------------------------------------------------------------------------------------------ what is written, and by whom
def who_sees(root: Path, line: Any) -> list[int]:
    """The processes, by rank, that find in this folder what the main one has put there: on another machine it may be another folder."""
    if not we.is_distributed:
        return [0]
    word = atomic.beside(root / 'seen', 'tmp')

    def put() -> Path:
        if we.is_main:
            with explained(word, 0):
                atomic.make_folder(root)
                word.touch()
        return word

    place = together(put, line)[0]
    try:
        return [rank for rank, sees in enumerate(together(place.exists, line)) if sees]
    finally:
        word.unlink(missing_ok=True)


def parts_of(groups: Groups, limit: float, writers: Sequence[int]) -> list[Part]:
    """A group of at most `limit` bytes is one file, which the main process writes. A larger one is cut into files of at most that many
    bytes, or of one tensor, which the writers take in turn. So files are the same whatever the number of processes."""
    parts: list[Part] = []
    turn = itertools.cycle(writers)
    for group, tensors in groups.items():
        cuts: list[dict[str, Kind]] = [{}]
        held = 0
        for name in writing_order(tensors):
            value = tensors[name]
            held += (size := nbytes({name: value}))
            if cuts[-1] and held > limit:
                cuts.append({})
                held = size
            cuts[-1][name] = Kind(value.dtype, value.shape, isinstance(share_of(value), Share))
        if len(cuts) == 1:
            parts.append(Part(f'{group}.safetensors', group, cuts[0], 0))
        else:
            parts += [Part(f'{group}-{i:05d}.safetensors', group, kinds, next(turn)) for i, kinds in enumerate(cuts, 1)]
    return parts


def own_share(given: Mapping[Key, Tensor], parts: Sequence[Part]) -> dict[Key, Tensor | Share]:
    """Of what this process has, its shares and what it writes. Raises CheckpointError where it lacks something of these."""
    own = {}
    for part in parts:
        for name, kind in part.kinds.items():
            if not kind.is_shared and part.rank != we.rank:
                continue
            value = share_of(given[part.group, name]) if (part.group, name) in given else None
            if value is None or kind != Kind(given[part.group, name].dtype, given[part.group, name].shape, isinstance(value, Share)):
                raise CheckpointError(f'{part.group}: {name} is not the {kind.dtype} {list(kind.shape)} here that the main process has: '
                                      f'what takes more than one file (SOLVER.SHARD_SIZE) must be alike in all processes')
            own[part.group, name] = value
    return own


def size_of(part: Part) -> int:
    """Bytes of its tensors."""
    return sum(kind.shape.numel() * kind.dtype.itemsize for kind in part.kinds.values())


def non_finite(tensors: Mapping[Key, Tensor | Share]) -> list[str]:
    """The tensors that hold NaN or infinity."""
    return [f'{group}: {name}' for (group, name), value in tensors.items()
            if not is_finite(value.rows if isinstance(value, Share) else value)]


def refuse(bad: Sequence[str]) -> None:
    """Raises CheckpointError naming tensors that hold NaN or infinity: such a checkpoint can only spread the damage."""
    if bad:
        more = f' and {len(bad) - 5} more' if len(bad) > 5 else ''
        raise CheckpointError(f'not saved, since these tensors hold NaN or infinity: {", ".join(bad[:5])}{more}')


# ------------------------------------------------------------------------------------------------ the folder
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
def temporary(target: Path) -> Iterator[Path]:
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


def manifest_of(step: int, parts: Sequence[Part], files: Mapping[str, Digest]) -> dict[str, Any]:
    """What MANIFEST.json says. The index tells, of a group that lies in several files, which one holds which tensor."""
    groups: dict[str, list[str]] = {}
    for part in parts:
        groups.setdefault(part.group, []).append(part.file)
    return {'format': FORMAT, 'step': step, 'torch': torch.__version__, 'groups': groups,
            'files': {name: file._asdict() for name, file in files.items()},
            'index': {part.file: list(part.kinds) for part in parts if len(groups[part.group]) > 1}}


def commit(folder: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """Seal a folder that holds all files, and let it appear at target. Everything before this is invisible to readers."""
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
def explained(target: Path, needed: int) -> Iterator[None]:
    """Turn what the operating system refuses into a CheckpointError."""
    try:
        yield
    except OSError as error:
        where = error.filename or target
        if error.errno in NO_SPACE:
            raise CheckpointError(f'no space for {target}: {needed:,} bytes of tensors needed, {atomic.space(target):,} free '
                                  f'({error.strerror}). Nothing of it was left behind; earlier checkpoints are intact') from error
        raise CheckpointError(f'{target} cannot be written: {error.strerror}: {where}') from error


def as_json(value: Any, what: str) -> str:
    """Its text. Raises CheckpointError, which says what it is, where it cannot be told so."""
    try:
        return json.dumps(value, indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f'{what} is not plain JSON ({error}): pass tensors in a group') from error
