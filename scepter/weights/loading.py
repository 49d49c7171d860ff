"""Weights into networks: which names a network of ours wants, and an error for each that does not fit."""
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from scepter.core.errors import CheckpointError
from scepter.core.shards import fill
from scepter.weights.family import family_of, matches, nearest
from scepter.weights.files import Entry, Weights
from scepter.weights.foreign import foreign_kind, lone_parts, sections
from scepter.weights.hugging_face import in_layout_of


def load_into(model: nn.Module, weights: Mapping[str, Tensor], ignore_keys: Sequence[str] = (), source: str | None = None,
              kept: Collection[str] = ()) -> dict[str, Entry]:
    """Copy weights into a network, one tensor at a time; nothing changes unless all of them fit. Answers what was taken.

    kept: names that stay as they are.
    Missing, unexpected and mis-shaped keys are a CheckpointError that lists them, unless ignore_keys (exact names or globs) names them.
    A 1x1 convolution and a linear layer are the same. A parameter on the meta device comes to be on the CPU.
    """
    weights = Weights.of(weights)
    source = source or weights.source
    weights = weights.with_entries(in_layout_of(model, weights.entries))
    targets = model.state_dict(keep_vars=True)
    spare = {f'{name}.{key}' if name else key for name, module in model.named_modules() for key in getattr(module, 'spare_weights', ())}

    def is_ignored(name: str) -> bool:
        return any(name == key or fnmatchcase(name, key) for key in ignore_keys)

    missing = [n for n in targets if n not in weights and not is_ignored(n)]
    unexpected = [n for n in weights if n not in targets and n not in spare and not is_ignored(n)]
    shared = [n for n in targets if n in weights]
    misshaped = [n for n in shared if not _same_shape(targets[n].shape, weights.shape(n))]
    refused = [n for n in misshaped if not is_ignored(n)]
    if missing or unexpected or refused:
        shapes = [f'{n}: expected {list(targets[n].shape)}, found {list(weights.shape(n))}' for n in refused]
        raise CheckpointError(f'{source} {_misfit(model, targets, weights, missing, unexpected, shapes)}')
    taken = [name for name in shared if name not in misshaped and name not in kept]
    for name in taken:
        put(model, name, targets[name], weights[name])
    return {name: weights.entries[name] for name in taken}


def _misfit(model: nn.Module, targets: Collection[str], weights: Weights, missing: list[str], unexpected: list[str],
            misshaped: list[str]) -> str:
    """Why weights do not fit a model: what the file is, where it is something else, or names and shapes, and what to do."""
    if kind := foreign_kind(weights):
        return kind
    lost = set(missing)
    owned = {key: names for key, part in sections().items() if (names := {n for n in targets if n.startswith(part.ours)})}
    lacking = [key for key, names in owned.items() if lost.issuperset(names)] if len(owned) > 1 else []
    if lacking and (lone := lone_parts(weights, lacking)):
        return lone
    rows = [f'{len(names)} {kind}:{some(names)}' for kind, names in
            (('missing', missing), ('unexpected', unexpected), ('of another shape', misshaped)) if names]
    if lacking or lost.issuperset(targets):
        near = nearest(matches(weights))
        rows.append('Nothing in it is of this network: give another file.' + (f' What it is nearest to:{near}' if near else ''))
    else:
        rows.append('Name in IGNORE_KEYS what may be left as it is.')
    return (f'does not fit {type(model).__name__}, which has {len(targets)} tensors; the file has {len(weights)}{_kind_of(weights)}\n'
            + '\n'.join(rows))


@torch.no_grad()
def put(model: nn.Module, name: str, target: Tensor, value: Tensor) -> None:
    """Fill one tensor of a network. A parameter on the meta device comes to be on the CPU."""
    if not target.is_meta:
        fill(target, value.reshape(target.shape))
        return
    owner = model.get_submodule(name.rpartition('.')[0])
    value = value.reshape(target.shape).to(target.dtype)
    leaf = name.rpartition('.')[2]
    if isinstance(target, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(value.clone() if value._is_view() else value, requires_grad=target.requires_grad))
    else:
        setattr(owner, leaf, value)


def _kind_of(weights: Weights) -> str:
    kind = family_of(weights)
    return f' and is of {kind}' if kind else ''


def _same_shape(ours: Sequence[int], theirs: Sequence[int]) -> bool:
    def core(shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
    return core(ours) == core(theirs)


def some(names: list[str], limit: int = 12) -> str:
    """Names, each on a line of its own, and how many more there are."""
    return ''.join(f'\n  {n}' for n in names[:limit]) + (f'\n  ... and {len(names) - limit} more' if len(names) > limit else '')
