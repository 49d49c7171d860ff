"""A value of a config against an annotation: whether it fits, the value in its type, the type in words, the bounds of a number."""
from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from scepter.core.config import Config, masked, plain
from scepter.core.faults import Fault
from scepter.core.secrets import FromEnv
from scepter.core.yaml import read_scalar


@dataclass(frozen=True)
class Bounds:
    """Which numbers a key takes: least and most may be reached, above and below may not; none is infinite or nan.

    In a class body `param(..., least=1)` says so, in a signature `Annotated[float, Bounds(above=0)]`. Of a list, or a map, each
    number is meant.
    """
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    multiple: int | None = None

    def __str__(self) -> str:
        said = (('at least', self.least), ('above', self.above), ('at most', self.most), ('below', self.below),
                ('a multiple of', self.multiple))
        return ', '.join(f'{words} {bound}' for words, bound in said if bound is not None)

    def admits(self, number: float) -> bool:
        """Whether a number is within these bounds."""
        return (_is_finite(number) and (self.least is None or number >= self.least) and (self.most is None or number <= self.most)
                and (self.above is None or number > self.above) and (self.below is None or number < self.below)
                and (self.multiple is None or number % self.multiple == 0))

    def faults(self, value: Any, path: str, origin: Any) -> Iterator[Fault]:
        """Every number in the value that is out of these bounds."""
        if isinstance(value, (list, tuple, dict)):
            for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
                yield from self.faults(entry, f'{path}.{key}' if isinstance(value, dict) else f'{path}[{key}]', origin)
            return
        number = read_scalar(str(value)) if isinstance(value, FromEnv) else value
        if self != NO_BOUNDS and isinstance(number, (int, float)) and not isinstance(number, bool) and not self.admits(number):
            finite = '' if _is_finite(number) else 'a finite number, '
            yield Fault(path, f'expected {finite}{self}, got {shown(value, path)}', origin)


NO_BOUNDS = Bounds()


def _is_finite(number: float) -> bool:
    return abs(number) <= sys.float_info.max    # also of an int that is too large for a float


_WORDS = {'on': True, 'yes': True, 'off': False, 'no': False}


def converted(value: Any, type_: Any) -> Any:
    """A value that fits an annotation, in its own type: 3 -> 3.0 for a float, 'on' -> True for a bool, '${N}' -> a number."""
    choices = get_args(type_) if get_origin(type_) in (Union, types.UnionType) else (type_,)
    if isinstance(value, FromEnv) and str not in choices:
        value = _from_environment(value, choices)
    if isinstance(value, str) and bool in choices and str not in choices:
        return _WORDS.get(value.lower(), value)
    if isinstance(value, int) and not isinstance(value, bool) and float in choices and int not in choices:
        return float(value)
    if isinstance(value, dict):
        inner = next((get_args(choice)[1] for choice in choices if get_origin(choice) is dict and fits(value, choice)), Any)
        twin = Config.of(value).copy()
        for key, entry in value.items():
            dict.__setitem__(twin, key, converted(entry, inner))
        return twin
    if isinstance(value, list):
        for choice in choices:
            inner = get_args(choice)
            if get_origin(choice) in (list, tuple) and inner and fits(value, choice):
                kinds = inner if get_origin(choice) is tuple and Ellipsis not in inner else (inner[0],) * len(value)
                return [converted(v, kind) for v, kind in zip(value, kinds)]
    return value


def _from_environment(value: FromEnv, choices: Iterable[Any]) -> Any:
    read = read_scalar(str(value))
    return read if any(_fits_one(read, choice) for choice in choices) else value


def fits(value: Any, type_: Any) -> bool:
    """Whether a value of a config fits an annotation. An int is a float; a bool is no int; unknown annotations take all."""
    if isinstance(value, FromEnv) and type_ is not Any:
        choices = get_args(type_) if get_origin(type_) in (Union, types.UnionType) else (type_,)
        return any(_fits_one(str(value), c) for c in choices) or not isinstance(_from_environment(value, choices), FromEnv)
    return _fits_one(value, type_)


def _fits_one(value: Any, type_: Any) -> bool:
    origin, args = get_origin(type_), get_args(type_)
    if type_ is Any or isinstance(type_, str):
        return True
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (Union, types.UnionType):
        return any(fits(value, a) for a in [a for a in args if not is_foreign(a)] or args)
    if origin in (list, tuple) or type_ in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        if not args:
            return True
        if origin is tuple and Ellipsis not in args:
            return len(value) == len(args) and all(fits(v, a) for v, a in zip(value, args))
        return all(fits(v, args[0]) for v in value)
    if origin is dict or type_ is dict:
        return isinstance(value, dict) and (len(args) < 2 or all(fits(v, args[1]) for v in value.values()))
    if type_ is float:
        return (isinstance(value, float) and not math.isnan(value)) or (_fits_one(value, int) and _is_finite(value))
    if type_ is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if type_ is bool:
        return isinstance(value, bool) or (isinstance(value, str) and value.lower() in _WORDS)
    if type_ is types.NoneType or type_ is None:
        return value is None
    if type_ is str:
        return isinstance(value, str)
    if isinstance(type_, type) and hasattr(type_, 'para_dict'):    # a section of keys
        return isinstance(value, dict)
    # a foreign class's own types (torch.Tensor, Callable, an enum): no YAML value is one, so a scalar may stand for it
    return True


def is_foreign(type_: Any) -> bool:
    """Whether this is a third party's own type, which no YAML value has: beside plain types it says nothing about a config."""
    return get_origin(type_) is None and isinstance(type_, type) and type_.__module__ != 'builtins' and not hasattr(type_, 'para_dict')


def spell(type_: Any) -> str:
    """An annotation in plain words."""
    origin, args = get_origin(type_), get_args(type_)
    if type_ is Any:
        return 'anything'
    if type_ is types.NoneType or type_ is None:
        return 'null'
    if origin is Literal:
        return 'one of ' + ', '.join('null' if a is None else str(a) or "''" for a in args)
    if origin in (Union, types.UnionType):
        return ' or '.join(spell(a) for a in [a for a in args if not is_foreign(a) or a is types.NoneType] or args)
    if origin is list and args:
        return f'list of {spell(args[0])}'
    if origin is tuple and args:
        return f'list of {spell(args[0])}' if Ellipsis in args else f'[{", ".join(spell(a) for a in args)}]'
    return getattr(type_, '__name__', str(type_).replace('typing.', ''))


def shown(value: Any, path: str = '') -> str:
    """A value as a message shows it: short, and without what is secret."""
    text = repr(plain(masked(value, path.rpartition('.')[2])))
    return text if len(text) <= 60 else text[:57] + '...'
