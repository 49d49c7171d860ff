"""Values that were found out, each with where: in the other library's configs (`Settings`), or in the shapes of a file (`Shapes`)."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from scepter.core.errors import CheckpointError
from scepter.weights.files import Weights


class Said(NamedTuple):
    """A value, and where it was taken from. is_convention: the file does not say it, published models of its kind are so."""
    value: Any
    source: str
    is_convention: bool = False


Node = dict[str, Any]    # key -> Said, or the Node of another component, or a list of them


class Settings:
    """One JSON file of a folder: what stands in it, else what the library that wrote it takes for an absent key."""

    def __init__(self, values: Mapping[str, Any], file: str, folder: str, defaults: Mapping[str, Any] = {}):
        self.values, self.file, self.folder, self.defaults = values, file, folder, defaults

    def __getitem__(self, key: str) -> Any:
        return self.values[key] if key in self.values else self.defaults[key]

    def get(self, key: str, default: Any = None) -> Any:
        """A value that may be absent; null is absent too."""
        value = self.values.get(key, self.defaults.get(key))
        return default if value is None else value

    def said(self, value: Any, *keys: str) -> Said:
        """A value of ours that was read from these keys."""
        words = ', '.join(key if key in self.values else f'no {key}, so the default' for key in keys)
        return Said(value, f'{self.file}: {words}')

    def refusal(self, key: str, expected: str) -> CheckpointError:
        """The error for a key whose value a network of ours cannot have."""
        return CheckpointError(f'{self.folder}: {self.file} has {key} {self.get(key)!r}, but {expected}')

    def only(self, known: Mapping[str, tuple[Any, ...]], what: str) -> None:
        """Refuse every key whose value a network of ours cannot have; absent is plain, and so is null where nothing or False is."""
        for key, values in known.items():
            if key not in self.values:
                continue
            value, plain = self.values[key], values or (None,)
            if (isinstance(value, list) and value and all(v in plain for v in value)) or (value is None and False in plain):
                continue
            if value not in plain:
                raise self.refusal(key, f'{what} has {" or ".join(repr(v) for v in plain)} only')

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, a value of a wrong type is a fault of the file."""
        try:
            yield
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            raise CheckpointError(f'{self.folder}: {self.file} cannot be read as the config of such a part '
                                  f'({type(error).__name__}: {error})') from error

    def numbers(self, key: str) -> list[int]:
        """A list of sizes. Raises CheckpointError for anything else."""
        found = self[key]
        if not isinstance(found, list | tuple) or not 0 < len(found) <= 16 or not all(type(n) is int and 0 < n <= 100_000 for n in found):
            raise self.refusal(key, 'expected up to 16 numbers above 0')
        return list(found)

    def number(self, key: str, most: int = 100_000) -> int:
        """A size. Raises CheckpointError for anything else, also for one that nobody could mean."""
        found = self[key]
        if type(found) is not int or not 0 < found <= most:
            raise self.refusal(key, f'expected a number in 1..{most}')
        return found

    def flag(self, key: str) -> bool:
        """A yes or no; null is no. Raises CheckpointError for anything else."""
        found = self[key]
        if found is not None and not isinstance(found, bool):
            raise self.refusal(key, 'expected true or false')
        return bool(found)

    def multiples(self, key: str) -> tuple[int, list[int]]:
        """(channels of the first level, those of all in multiples of it)"""
        channels = self.numbers(key)
        if any(c % channels[0] for c in channels):
            raise self.refusal(key, f'CHANNEL_MULT knows whole multiples of the first, {channels[0]}, only')
        if channels[0] % 32:
            raise self.refusal(key, 'channels are normalised in groups of 32, so expected multiples of it')
        return channels[0], [c // channels[0] for c in channels]

    def expect_class(self, name: str) -> None:
        """Refuse the config of another class; one that names none passes."""
        found = self.values.get('_class_name', name)
        if found != name:
            raise self.refusal('_class_name', f'a {name} is what can be read here')


class Taken(NamedTuple):
    """One value of a description. is_convention: no file says it; published models of this kind are so."""
    key: str    # e.g. SOLVER.MODEL.SCALE_FACTOR
    value: Any
    source: str
    is_convention: bool = False

    def __str__(self) -> str:
        return f'{self.key} = {short(self.value)}    {"assumed: " if self.is_convention else ""}{self.source}'


class Shapes:
    """The tensors of one part of a model under our names, as something that shapes can be asked of."""

    def __init__(self, weights: Weights, file: str):
        self.weights, self.file = weights, file

    def size(self, name: str, side: int) -> Said:
        """One side of a tensor. Raises CheckpointError where it is not there."""
        if name not in self.weights or len(self.weights.shape(name)) <= side:
            raise self.refusal(name, 'is absent or flat, so its part is none that opens here')
        return Said(self.weights.shape(name)[side], f'the shape of {name}')

    def refusal(self, name: str, problem: str) -> CheckpointError:
        """The error for a tensor whose shape a network of ours cannot have."""
        return CheckpointError(f'{self.file}: {name} {problem}')

    def count(self, prefix: str) -> int:
        """How many numbered children a name has; they count from 0."""
        return len({n[len(prefix) + 1:].split('.')[0] for n in self.weights if n.startswith(f'{prefix}.')})

    def below(self, prefix: str) -> Iterator[str]:
        """The names below a prefix."""
        return (n for n in self.weights if n.startswith(f'{prefix}.'))

    def multiples(self, channels: list[int], first: Said, what: str) -> list[int]:
        """Channels of each level in multiples of the first. Raises CheckpointError where they are none."""
        if any(c % first.value for c in channels) or first.value % 32:
            raise self.refusal(what, f'have {channels} channels; CHANNEL_MULT knows whole multiples of the first, {first.value}, only, '
                                     'which is one of 32')
        return [c // first.value for c in channels]


def values_of(node: Any) -> Any:
    """A node without its sources."""
    if isinstance(node, Said):
        return node.value
    if isinstance(node, dict):
        return {key: values_of(value) for key, value in node.items()}
    return [values_of(value) for value in node] if isinstance(node, list) else node


def taken_of(node: Any, key: str = '') -> Iterator[Taken]:
    """The rows of a node, in its order."""
    if isinstance(node, Said):
        yield Taken(key, *node)
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from taken_of(value, f'{key}.{name}' if key else name)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from taken_of(value, f'{key}[{i}]')


def short(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) < 80 else f'{text[:60]} ...'
