"""YAML in and out, without its surprises.

`1e-4` is a float; `on`, `off`, `yes`, `no`, `010` and `1:30` are strings; a key that stands twice is an error; ${NAME} comes from the
environment. What `dump` writes, `parse` reads back equal.
"""
from __future__ import annotations

import os
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import yaml

from scepter.core.faults import ConfigError, Fault, Origin
from scepter.core.logger import get_logger
from scepter.core.secrets import FromEnv, is_secret, note_secrets

MAX_BYTES, MAX_DEPTH, MAX_NODES = 1_000_000, 64, 100_000

_SCALARS = [
    (re.compile(r'(~|null|Null|NULL|)$'), lambda s: None),
    (re.compile(r'(true|True|TRUE)$'), lambda s: True),
    (re.compile(r'(false|False|FALSE)$'), lambda s: False),
    (re.compile(r'[-+]?(0|[1-9][0-9_]*)$'), lambda s: int(s)),
    (re.compile(r'0x[0-9a-fA-F]{1,64}$'), lambda s: int(s, 16)),
    (re.compile(r'[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$'), lambda s: float(s)),
    (re.compile(r'[-+]?\.(inf|Inf|INF)$'), lambda s: float(s.replace('.', ''))),
    (re.compile(r'\.(nan|NaN|NAN)$'), lambda s: float('nan')),
]
_LEADING_ZERO = re.compile(r'[-+]?0[0-9_]+$')


def read_scalar(text: str) -> Any:
    """What a plain YAML word means: null, a bool, an int, a float, or else the string itself."""
    if len(text) > 400 or _LEADING_ZERO.match(text):
        return text
    for pattern, convert in _SCALARS:
        if pattern.match(text):
            try:
                return convert(text)
            except ValueError:   # 1_ and its like
                return text
    return text


_ENV = re.compile(r'\$\{(\w+)\}')
_TAGS = {f'tag:yaml.org,2002:{kind}' for kind in ('map', 'seq', 'str', 'int', 'float', 'bool', 'null', 'timestamp', 'merge', 'value')}


class Loader(yaml.SafeLoader):
    """SafeLoader without its surprises: scalars by read_scalar, duplicate keys refused, lines kept.

    Builds lists, and for each mapping what `new` gives: a dict with `put(key, value, origin)` and `origin(key)`, which Config is.
    """

    def __init__(self, text: str, name: str, new: Callable[[], Any], environment: bool, is_foreign: bool):
        super().__init__(text)
        self.file, self.new, self.environment, self.is_foreign, self.count = name, new, environment, is_foreign, 0
        self.faults: list[Fault] = []

    def fetch_flow_collection_start(self, token: type) -> None:
        """As in PyYAML, but not deeper than MAX_DEPTH."""
        self._check_depth(self.flow_level)    # the scanner's own work grows with the square of the depth
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        """As in PyYAML, but not deeper than MAX_DEPTH."""
        self._check_depth(len(self.indents))
        return super().add_indent(column)

    def _check_depth(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ConfigError([Fault('', f'more than {MAX_DEPTH} levels deep', Origin(self.file, self.line + 1))], self.file)

    def fault(self, node: yaml.Node, message: str, path: str = '') -> None:
        """Note what is wrong at a node; all faults are told together."""
        self.faults.append(Fault(path, message, Origin(self.file, node.start_mark.line + 1)))

    def build(self, node: yaml.Node, path: str = '', above: tuple = ()) -> Any:
        """The value of a node, at this path, below these nodes. Raises ConfigError where it grows without end."""
        self.count += 1
        if node in above:
            return self.fault(node, 'this alias holds itself', path)
        if self.count > MAX_NODES or len(above) > MAX_DEPTH:    # aliases multiply
            message = f'more than {MAX_DEPTH} levels deep or {MAX_NODES:,} values in all'
            raise ConfigError([Fault(path[:80], message, self._origin(node))], self.file)
        if node.tag not in _TAGS:
            return self.fault(node, f'the tag {node.tag} is not taken', path)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, (*above, node))
        if isinstance(node, yaml.SequenceNode):
            return [self.build(v, f'{path}[{i}]', (*above, node)) for i, v in enumerate(node.value)]
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: str, above: tuple) -> Any:
        """The mapping of a node, `<<` merged underneath."""
        cfg = self.new()
        lines: dict[str, int] = {}
        merged: list[Any] = []
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str) or key == '':
                self.fault(key_node, 'a key must be a word', path)
                continue
            if key == '<<' and key_node.style is None:
                below = self.build(value_node, path, above)
                below = below if isinstance(below, list) else [below]
                if not all(isinstance(b, dict) for b in below):
                    self.fault(key_node, '<< takes a mapping, or a list of them', path)
                    continue
                merged += below
                continue
            where = f'{path}.{key}' if path else key
            if key in lines:
                self.fault(key_node, f'stands twice, on line {lines[key]} and line {key_node.start_mark.line + 1}', where)
                continue
            lines[key] = key_node.start_mark.line + 1
            cfg.put(key, self.build(value_node, where, above), self._origin(key_node))
        for below in merged:
            for key in below.keys() - cfg.keys():
                cfg.put(key, deepcopy(below[key]), below.origin(key))
        return cfg

    def scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        """The value of a word, ${NAME} filled in."""
        text = node.value
        if _ENV.search(text) and self.environment:
            for name in _ENV.findall(text):
                if self.is_foreign and is_secret(name):     # else its author could have it sent to an address of theirs
                    get_logger().warning(f'{self.file}: ${{{name}}} is left as it is, since this config came from elsewhere')
                    return text
                if name not in os.environ:
                    return self.fault(node, f'the environment has no {name}: set it, or write the value', path)
            return FromEnv(_ENV.sub(lambda m: os.environ[m[1]], text), text)
        if node.style is not None:
            return text
        if node.tag != self.resolve(yaml.ScalarNode, text, (True, False)):   # written out: !!str 5, !!float 5
            return float(text) if node.tag.endswith(':float') and isinstance(read_scalar(text), (int, float)) else text
        return read_scalar(text)

    def _origin(self, node: yaml.Node) -> Origin:
        return Origin(self.file, node.start_mark.line + 1, self.is_foreign)


def parse(text: str, name: str, new: Callable[[], Any], environment: bool = True, is_foreign: bool = False) -> Any:
    """The mapping that stands in a text, made of what `new` gives. Raises ConfigError with every fault and its line."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f'{name} has {len(text):,} characters; a config has at most {MAX_BYTES:,}')
    try:
        loader = Loader(text, name, new, environment, is_foreign)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f'{name} is empty: a config is a YAML mapping, e.g. "SOLVER: {{NAME: LatentDiffusionSolver, ...}}"')
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError([Fault('', 'a config is a mapping of keys to values, this is a '
                                     + ('list' if isinstance(node, yaml.SequenceNode) else 'single value'), loader._origin(node))], name)
        cfg = loader.build(node)
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        words = ' '.join(filter(None, (getattr(error, 'context', None), getattr(error, 'problem', None)))) or str(error).splitlines()[0]
        raise ConfigError([Fault('', f'not YAML: {words}', Origin(name, mark.line + 1) if mark else Origin(name))], name) from None
    if loader.faults:
        raise ConfigError(loader.faults, name)
    note_secrets(cfg)
    return cfg


def without_comments(text: str) -> str:
    """A word of the command line holds no comment: where YAML would see one, '#1' or 'a #1', the whole is a string."""
    try:
        end = yaml.compose(f'V: {text}', Loader=yaml.SafeLoader).value[0][1].end_mark.index - len('V: ')
    except (yaml.YAMLError, RecursionError):    # said in full where it is parsed
        return text
    return text if '#' not in text[max(end, 0):] else "'" + text.replace("'", "''") + "'"


class Dumper(yaml.SafeDumper):
    """Writes strings so that Loader reads them back as the same strings."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that stands twice twice: configs have no references."""
        return True

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        """A plain scalar's tag, by our rules of reading; so 1e-08 needs no tag, and the text '1e-08' is quoted."""
        if kind is yaml.ScalarNode and implicit[0]:
            read = read_scalar(value)
            return f'tag:yaml.org,2002:{"null" if read is None else type(read).__name__}'
        return super().resolve(kind, value, implicit)


_BREAKS = re.compile('[\r\x85\u2028\u2029]')


def _write_string(dumper: Dumper, text: str) -> yaml.Node:
    word = text.written if isinstance(text, FromEnv) else str(text)
    style: str | None
    if _BREAKS.search(word):    # what YAML takes for the end of a line, it folds into a space unless it is escaped
        style = '"'
    else:
        style = "'" if word.startswith(('=', '<<')) else '|' if '\n' in word and _ENV.search(word) is None else None
    return dumper.represent_scalar('tag:yaml.org,2002:str', word, style=style)


def _write_float(dumper: Dumper, value: float) -> yaml.Node:
    if value != value or value in (float('inf'), float('-inf')):
        return dumper.represent_float(value)
    return dumper.represent_scalar('tag:yaml.org,2002:float', repr(value))


Dumper.add_multi_representer(str, _write_string)
Dumper.add_representer(str, _write_string)
Dumper.add_representer(float, _write_float)
Dumper.add_multi_representer(dict, lambda dumper, data: dumper.represent_mapping('tag:yaml.org,2002:map', data.items(), flow_style=False))


def dump(value: Any, flow: bool | None = False) -> str:
    """YAML of plain values; short lists of scalars stand on one line."""
    return yaml.dump(_flat_lists(value), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=flow)


class _Flat(list):
    """A list of scalars, written on one line."""


Dumper.add_representer(_Flat, lambda dumper, data: dumper.represent_sequence('tag:yaml.org,2002:seq', data, flow_style=True))


def _flat_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _flat_lists(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        scalars = not any(isinstance(v, (dict, list, tuple)) for v in value)
        return (_Flat if scalars else list)(_flat_lists(v) for v in value)
    return value


def dict_to_yaml(module_name: str, name: str, para_dict: dict, set_name: bool = False) -> str:
    """A commented YAML block, ready to paste, that loads. A required key stands without a value."""
    lines = [f'{module_name}:'] + ([f'  NAME: {name}'] if set_name else [])
    for key, entry in para_dict.items():
        kind = entry.get('type', type(entry['value']).__name__)
        comment = f'{entry.get("description", "")} ({kind}{", required" if entry.get("required") else ""})'
        lines.append(f'  # {" ".join(comment.split())}')
        value = '' if entry.get('required') else dump({'V': entry['value']}, flow=True).strip()[4:-1].replace('\n', ' ')
        lines.append(f'  {key}: {value}'.rstrip())
    return '\n'.join(lines) + '\n'
