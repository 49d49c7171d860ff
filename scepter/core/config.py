"""Config: a dict whose keys are also attributes, that knows where each of its values came from.

YAML is read with rules that do not surprise: `1e-4` is a float, `on`, `off`, `yes`, `no`, `010` and `1:30` are strings, a key that
stands twice is an error. `_BASE_: file` is merged underneath, `${NAME}` comes from the environment, `KEY.PATH=VALUE` overrides.
`str(cfg)` is YAML again, and loads to an equal Config.
"""
from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scepter.core.errors import ScepterError
from scepter.core.secrets import FromEnv, hide_in_urls, is_secret, note_secrets

MAX_BYTES, MAX_DEPTH, MAX_NODES = 1_000_000, 64, 100_000

# the folder of shipped examples: inside the package when installed, beside it in a checkout
EXAMPLES = next((p for p in (Path(__file__).resolve().parents[1] / 'examples', Path(__file__).resolve().parents[2] / 'examples')
                 if p.is_dir()), Path('examples'))


class Origin(NamedTuple):
    """Where a value came from: a file and a line, or the words that stand in for a file."""
    file: str
    line: int = 0
    is_foreign: bool = False    # the file lies in a checkpoint, which may come from anybody, or was named by one that does

    def __str__(self) -> str:
        return f'{self.file}, line {self.line}' if self.line else self.file


NOWHERE = Origin('the program')


class Fault(NamedTuple):
    """One thing that is wrong with a config."""
    path: str
    message: str
    origin: Origin = NOWHERE


class ConfigError(ScepterError):
    """Everything that is wrong with a config, all at once."""
    exit_code = 2

    def __init__(self, faults: str | Iterable[Fault], title: str = 'the config'):
        self.faults = [Fault('', faults)] if isinstance(faults, str) else sorted(faults, key=lambda f: (f.origin.file != title, f.origin))
        self.title = title
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.faults) == 1 and not self.faults[0].path:
            fault = self.faults[0]
            return fault.message if fault.origin == NOWHERE else f'{fault.origin}: {fault.message}'
        rows = []
        for path, message, origin in self.faults:
            place = f'line {origin.line}' if origin.file == self.title and origin.line else str(origin)
            rows.append((place if origin != NOWHERE else '', f'{path}: {message}' if path else message))
        width = max(len(place) for place, _ in rows) + 2
        count = f'{len(rows)} fault{"s" if len(rows) > 1 else ""}'
        return '\n'.join([f'{count} in {self.title}', *(f'  {place:<{width if width > 2 else 0}}{text}' for place, text in rows)])


class Config(dict):
    """A dict whose keys are also attributes: cfg.SOLVER.MAX_STEPS is cfg['SOLVER']['MAX_STEPS'].

    `origins` says for each key where its value came from; it takes no part in comparing.
    """
    __slots__ = ('file', 'origins')

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        object.__setattr__(self, 'origins', {})
        object.__setattr__(self, 'file', None)
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    # ---------------------------------------------------------------- reading
    @classmethod
    def of(cls, value: Any) -> Any:
        """A dict as a Config; a Config, and all that is no dict, as it is."""
        return cls(value) if isinstance(value, dict) and not isinstance(value, cls) else value

    @classmethod
    def load(cls, path: str | os.PathLike, overrides: Sequence[str] = (), environment: bool = True) -> Config:
        """The config of a YAML file (or of a shipped example), with its bases below it and the overrides on top.

        `environment=False` leaves ${NAME} as it is: for a config that is only looked at. Raises ConfigError.
        """
        file = find_config(path)
        cfg = _load_file(file, (), environment)
        object.__setattr__(cfg, 'file', str(file))
        cfg.override(overrides, environment)
        return cfg

    def override(self, words: Sequence[str], environment: bool = True) -> None:
        """Carry out KEY.PATH=VALUE words, in place. Raises ConfigError."""
        faults = list(_apply_overrides(self, words, environment))
        if faults:
            raise ConfigError(faults, self.file or 'the config')

    @classmethod
    def parse(cls, text: str, name: str = 'the config', environment: bool = True, is_foreign: bool = False) -> Config:
        """The config that stands in a text. `_BASE_` is not honoured here. Raises ConfigError.

        is_foreign: it may come from anybody, so that its IMPORTS are not carried out.
        """
        return _parse(text, name, environment, is_foreign)

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f'no {key} in this config{did_you_mean(key, self)}') from None

    def have(self, key: str) -> bool:
        return key in self

    def origin(self, key: str) -> Origin:
        return self.origins.get(key, NOWHERE)

    # ---------------------------------------------------------------- writing
    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _wrap(value))
        self.origins.pop(key, None)

    __setattr__ = __setitem__

    def __delattr__(self, key: str) -> None:
        del self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def put(self, key: str, value: Any, origin: Origin) -> None:
        """Set a key and remember where its value came from."""
        self[key] = value
        self.origins[key] = origin

    def copy(self) -> Config:
        """A deep copy: components may keep theirs without seeing later changes."""
        twin = Config()
        for key, value in self.items():
            dict.__setitem__(twin, key, _copy(value))
        twin.origins.update(self.origins)
        object.__setattr__(twin, 'file', self.file)
        return twin

    def __copy__(self) -> Config:
        return self.copy()

    def __deepcopy__(self, memo: dict) -> Config:
        return self.copy()

    def __reduce__(self) -> tuple:
        return _restore, (dict(self), self.origins, self.file)

    # ---------------------------------------------------------------- writing it down
    def __str__(self) -> str:
        """YAML that loads to an equal Config; ${NAME} stands as it was written."""
        return dump(self)

    def __repr__(self) -> str:
        return f'Config({plain(masked(self))!r})'

    def dump(self, is_secure: bool = False) -> str:
        """YAML; with is_secure, a literal under a secret key is masked."""
        return dump(masked(self) if is_secure else self)


def _restore(values: dict, origins: dict, file: str | None) -> Config:
    cfg = Config(values)
    cfg.origins.update(origins)
    object.__setattr__(cfg, 'file', file)
    return cfg


def _wrap(value: Any) -> Any:
    if isinstance(value, dict) and not isinstance(value, Config):
        return Config(value)
    if isinstance(value, (list, tuple)):
        return [_wrap(v) for v in value]
    return value


def _copy(value: Any) -> Any:
    if isinstance(value, Config):
        return value.copy()
    return [_copy(v) for v in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """The same value made of plain dicts, lists and scalars."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, FromEnv) else value


def did_you_mean(word: Any, words: Iterable[Any]) -> str:
    """'; did you mean X?' where X is the nearest of words, else ''."""
    known = {str(w).casefold(): str(w) for w in words}
    close = difflib.get_close_matches(str(word).casefold(), known, n=1, cutoff=0.6)
    return f'; did you mean {known[close[0]]}?' if close else ''


def masked(value: Any, key: str = '') -> Any:
    """A copy in which nothing secret stands: '***' for a literal under a secret key, ${NAME} as it is written, URLs without keys."""
    if isinstance(value, dict):
        return Config({k: masked(v, k) for k, v in value.items()})
    if isinstance(value, list):
        return [masked(v, key) for v in value]
    if isinstance(value, FromEnv):
        return value.written
    if not isinstance(value, str):
        return value
    return '***' if is_secret(key) and value else hide_in_urls(value)


# ------------------------------------------------------------------------------------------------ YAML in
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
    """SafeLoader without its surprises: scalars by read_scalar, duplicate keys refused, lines kept. Builds Config and list."""

    def __init__(self, text: str, name: str, environment: bool, is_foreign: bool):
        super().__init__(text)
        self.file, self.environment, self.is_foreign, self.count = name, environment, is_foreign, 0
        self.faults: list[Fault] = []

    def fetch_flow_collection_start(self, token: type) -> None:
        self._check_depth(self.flow_level)    # the scanner's own work grows with the square of the depth
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        self._check_depth(len(self.indents))
        return super().add_indent(column)

    def _check_depth(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ConfigError([Fault('', f'more than {MAX_DEPTH} levels deep', Origin(self.file, self.line + 1))], self.file)

    def fault(self, node: yaml.Node, message: str, path: str = '') -> None:
        self.faults.append(Fault(path, message, Origin(self.file, node.start_mark.line + 1)))

    def build(self, node: yaml.Node, path: str = '', above: tuple = ()) -> Any:
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

    def mapping(self, node: yaml.MappingNode, path: str, above: tuple) -> Config:
        cfg = Config()
        lines: dict[str, int] = {}
        merged: list[Config] = []
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str) or key == '':
                self.fault(key_node, 'a key must be a word', path)
                continue
            if key == '<<' and key_node.style is None:
                below = self.build(value_node, path, above)
                below = below if isinstance(below, list) else [below]
                if not all(isinstance(b, Config) for b in below):
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
                cfg.put(key, _copy(below[key]), below.origin(key))
        return cfg

    def scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        text = node.value
        if _ENV.search(text) and self.environment:
            for name in _ENV.findall(text):
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


def _parse(text: str, name: str, environment: bool, is_foreign: bool = False) -> Config:
    if len(text) > MAX_BYTES:
        raise ConfigError(f'{name} has {len(text):,} characters; a config has at most {MAX_BYTES:,}')
    try:
        loader = Loader(text, name, environment, is_foreign)
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


def find_config(path: str | os.PathLike) -> Path:
    """The file that a --cfg word means: a path, or a shipped example under any of its spellings. Raises ConfigError."""
    asked = Path(os.path.expanduser(path))
    if asked.is_file():
        return asked
    if asked.is_dir():
        raise ConfigError(f'{asked} is a folder; --cfg takes a YAML file')
    short = re.sub(r'^(\./)?(scepter/)?(modules/)?(examples/)?', '', asked.as_posix())
    candidates = [EXAMPLES / short, *(sorted(EXAMPLES.glob(f'*/{short}')) if short and '..' not in short and '/' not in short else [])]
    for candidate in candidates if not asked.is_absolute() else []:
        if candidate.is_file():
            return candidate
    near = [p.name for p in asked.parent.glob('*.y*ml')] if asked.parent.is_dir() else []
    shipped = [p.relative_to(EXAMPLES).as_posix() for p in EXAMPLES.glob('*/*.yaml')]
    raise ConfigError(f'there is no config {asked}{did_you_mean(asked.name, near) or did_you_mean(short, shipped)}')


def _load_file(file: Path, above: tuple[Path, ...], environment: bool, is_foreign: bool = False) -> Config:
    resolved = file.resolve()
    is_foreign = is_foreign or _lies_in_a_checkpoint(file)
    if resolved in above:
        raise ConfigError(f'_BASE_ goes in a circle: {" -> ".join(str(p) for p in (*above, resolved))}')
    try:
        raw = resolved.read_bytes()
        text = raw.decode('utf-8-sig')
    except OSError as error:
        raise ConfigError(f'{file} cannot be read: {error.strerror}') from None
    except UnicodeDecodeError as error:
        raise ConfigError(f'{file} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}') from None
    cfg = _parse(text, str(file), environment, is_foreign)
    if '_BASE_' not in cfg:
        return cfg
    origin, bases = cfg.origin('_BASE_'), cfg.pop('_BASE_')
    merged = Config()
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base:
            raise ConfigError([Fault('_BASE_', f'expected a file or a list of files, got {base!r}', origin)], str(file))
        path = Path(os.path.expanduser(base))
        path = path if path.is_absolute() else Path(os.path.normpath(file.parent / path))
        if not path.is_file():
            raise ConfigError([Fault('_BASE_', f'there is no file {path}', origin)], str(file))
        merge(merged, _load_file(path, (*above, resolved), environment, is_foreign))
    merge(merged, cfg)
    return merged


def _lies_in_a_checkpoint(file: Path) -> bool:
    """By its own path or by that of what a link leads to."""
    return any((folder / 'MANIFEST.json').exists() for path in (file.absolute(), file.resolve()) for folder in path.parents)


def merge(below: Config, above: Config) -> None:
    """Lay one config over another, in place: mappings are merged key by key, all else is replaced.

    A component of another NAME replaces the one below it whole, since its parameters are others.
    """
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, Config) and isinstance(value, Config) and value.get('NAME', old.get('NAME')) == old.get('NAME'):
            merge(old, value)
            below.origins[key] = above.origin(key)
        else:
            below.put(key, _copy(value), above.origin(key))


_STEP = re.compile(r'([^.\[\]]+)|\[(\d+)\]')


def split_path(path: str) -> list[str]:
    """'TRAIN_HOOKS[0].INTERVAL' or 'TRAIN_HOOKS.0.INTERVAL' -> its steps."""
    return [name or index for name, index in _STEP.findall(path)]


def _apply_overrides(cfg: Config, overrides: Sequence[str], environment: bool) -> Iterator[Fault]:
    for word in overrides:
        path, equals, text = word.partition('=')
        origin = Origin(f'the command line ({word})')
        steps = split_path(path)
        if not equals or not steps:
            yield Fault('', 'expected KEY.PATH=VALUE', origin)
            continue
        try:
            value = _parse(f'V: {_without_comments(text)}\n', f'the command line ({word})', environment).get('V')
        except ConfigError as error:
            yield Fault(path, error.faults[0].message, origin)
            continue
        node: Any = cfg
        for i, step in enumerate(steps[:-1]):
            if isinstance(node, list) and step.isdigit() and int(step) < len(node):
                node = node[int(step)]
            elif isinstance(node, Config):
                if node.get(step) is None:
                    node.put(step, {}, origin)
                node = node[step]
            else:
                node = None
            if not isinstance(node, (Config, list)):
                yield Fault('.'.join(steps[:i + 1]), f'has nothing below it to set {steps[-1]} in', origin)
                break
        else:
            last = steps[-1]
            if isinstance(node, Config):
                node.put(last, value, origin)
            elif last.isdigit() and int(last) < len(node):
                node[int(last)] = _wrap(value)
            else:
                yield Fault(path, f'the list has {len(node)} entries', origin)
    note_secrets(cfg)


def _without_comments(text: str) -> str:
    """A word of the command line holds no comment: where YAML would see one, '#1' or 'a #1', the whole is a string."""
    try:
        end = yaml.compose(f'V: {text}', Loader=yaml.SafeLoader).value[0][1].end_mark.index - len('V: ')
    except (yaml.YAMLError, RecursionError):    # said in full where it is parsed
        return text
    return text if '#' not in text[max(end, 0):] else "'" + text.replace("'", "''") + "'"


# ------------------------------------------------------------------------------------------------ YAML out
class Dumper(yaml.SafeDumper):
    """Writes strings so that Loader reads them back as the same strings."""

    def ignore_aliases(self, data: Any) -> bool:
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
