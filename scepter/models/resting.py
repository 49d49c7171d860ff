"""Parts that are needed now and then: their weights wait in a file, and are in memory only while they are used."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scepter.core.config import plain
from scepter.core.disk import atomic
from scepter.core.disk.tensors import TensorFile, write_tensors
from scepter.core.errors import CheckpointError
from scepter.weights import marks


class Encoder(NamedTuple):
    """What a network computes of an entry of a batch, and training does not change."""
    part: str                          # the name of the module that does it, and can rest when all is computed
    encode: Callable[[Any], Any]       # of a picture: [B, 3, (T,) H, W] -> moments [B, ...]; of prompts: list -> {name: [B, ...]}


class Resting:
    """What a part remembers while its weights are on the disk: where they are, and how it has been moved meanwhile."""

    def __init__(self, file: Path):
        self.file = file
        self.moves: list[Callable[[Tensor], Tensor]] = []    # what nn.Module._apply was called with: device, type, layout
        self.is_awake = False


FREE = {'PRETRAINED_MODEL', 'IGNORE_KEYS', 'TOKENIZER_PATH', 'BATCH_SIZE'}    # keys of a config that change no result by themselves


def fingerprint(module: nn.Module) -> str:
    """sha256 of a module's class and config, and of all weights and buffers: of their names, types, shapes and bytes."""
    told = [type(module).__qualname__, _plain(getattr(module, 'cfg', {}))]
    sha = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        sha.update(f'{name} {value.dtype} {list(value.shape)} '.encode())
        sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _plain(value: Any) -> Any:
    value = plain(value)
    return {key: _plain(v) for key, v in value.items() if key not in FREE} if isinstance(value, dict) else \
        [_plain(v) for v in value] if isinstance(value, list) else value


def can_rest(model: nn.Module, part: nn.Module) -> bool:
    """Whether a checkpoint of the model can do without the weights of a part: all frozen, each from a file that can be proven."""
    names = marks.left_out(model)
    proven = {id(p) for name, p in model.named_parameters() if name in names}
    return all(id(p) in proven for p in part.parameters())


def rest(part: nn.Module, file: Path, is_writer: bool = True) -> None:
    """Put the weights of a part into a file, if they are not there yet, and free their memory. Buffers stay."""
    if is_writer and not _holds(file, part):
        with atomic.replacing(file) as temporary:
            write_tensors(temporary, _parameters(part))
    part.__dict__['_resting'] = Resting(file)
    _put(part, {name: torch.empty_like(p, device='meta') for name, p in _parameters(part).items()})


def _holds(file: Path, part: nn.Module) -> bool:
    try:
        found, expected = TensorFile(file), _parameters(part)
        return found.keys() == expected.keys() and all(torch.equal(found[name], p.detach().cpu()) for name, p in expected.items())
    except CheckpointError:
        return False


@contextmanager
def awake(model: nn.Module) -> Iterator[None]:
    """Inside, parts that rest have their weights, on the device, in the type and layout that the rest of the network has."""
    parts = [m for m in model.modules() if isinstance(found := m.__dict__.get('_resting'), Resting) and not found.is_awake]
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device('cpu'))
    for part in parts:
        _wake(part, device)
    try:
        yield
    finally:
        for part in parts:
            part.__dict__['_resting'].is_awake = False
            _put(part, {name: torch.empty_like(p, device='meta') for name, p in _parameters(part).items()})


def _wake(part: nn.Module, device: torch.device) -> None:
    resting: Resting = part.__dict__['_resting']
    _put(part, {name: value.to(device) for name, value in TensorFile(resting.file).items()})
    resting.is_awake = True
    for move in resting.moves:
        with marks.carried(part):
            part._apply(move)


def _parameters(part: nn.Module) -> dict[str, nn.Parameter]:
    return dict(part.named_parameters(remove_duplicate=False))


def _put(part: nn.Module, values: dict[str, Any]) -> None:
    """Other tensors in the place of a part's parameters; these go on remembering the files that they came from."""
    with marks.carried(part), torch.no_grad():
        for name, value in values.items():
            path, _, leaf = name.rpartition('.')
            owner = part.get_submodule(path)
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
