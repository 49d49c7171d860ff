"""Loading into networks, from what a config names (`load_pretrained`) and from a checkpoint and its sources (`fill`)."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch import nn

from scepter.core.disk.checkpoints import Checkpoint
from scepter.core.errors import CheckpointError
from scepter.core.logger import get_logger
from scepter.core.shards import fill_from, is_share
from scepter.core.stores import FS
from scepter.core.stores.client import shown
from scepter.weights.compare import latent_beside, refuse_contradictions
from scepter.weights.family import weights_for
from scepter.weights.files import local_copy
from scepter.weights.hugging_face import in_layout_of
from scepter.weights.loading import load_into, put
from scepter.weights.marks import Loaded, Mark, mark, marks_of, parts_with_a_file, word_of
from scepter.weights.records import Record, read_weights, weights_of


def load_pretrained(model: nn.Module, path: str | Path, ignore_keys: Sequence[str] = (), use_ema: bool = False) -> None:
    """Load a whole model or any part of one from any place that FS knows, whatever names the file uses.

    A part whose own config names a PRETRAINED_MODEL keeps what that gave it.
    Missing, unexpected and mis-shaped keys are a CheckpointError unless ignore_keys (exact names or globs) names them; so is what a file
    says otherwise than the model's config (compare.py).
    """
    model.__dict__['filled_from'] = path
    if _is_deferred.get():
        return
    owned = parts_with_a_file(model)
    kept = set().union(*owned.values())
    reason = f'{shown(str(path))} says that it left out what is there, and that may be anybody\'s word: name a copy of yours as the ' \
             'PRETRAINED_MODEL of the part'
    with local_copy(path) as local, FS.without_requests(reason):
        found = read_weights(local, use_ema)
        refuse_contradictions(model, found, ignore_keys, source=str(path))
        weights = weights_for(model, found)
        for part, names in owned.items():
            if not names.isdisjoint(weights):
                get_logger().info(f'{part} keeps the weights of {shown(str(word_of(model.get_submodule(part))))}, which its config names; '
                                  f'those in {shown(str(path))} are left aside')
        loaded = Loaded(path, local, weights.entries.values())
        taken = load_into(model, weights, [*ignore_keys, *kept], source=str(path), kept=kept)
        loaded.keep(taken.values())
        # averages, and what load_into had to rename, could not be found under these names again: a checkpoint holds them
        mark(model, {name: entry if name in weights else None for name, entry in taken.items()}, None if use_ema else loaded)
        model.__dict__['published_latent'] = latent_beside(found)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, load_pretrained leaves networks as they were built: for one whose weights all come from its checkpoint."""
    token = _is_deferred.set(True)
    try:
        yield
    finally:
        _is_deferred.reset(token)


_is_deferred: ContextVar[bool] = ContextVar('is_deferred', default=False)


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
        fill_from(targets[name], entry.read, entry.rows) if is_share(targets[name]) else put(model, name, targets[name], entry.read())
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
