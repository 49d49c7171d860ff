"""Config: a dict whose keys are also attributes, that knows where each of its values came from.

`_BASE_: file` is merged underneath, `${NAME}` comes from the environment, `KEY.PATH=VALUE` overrides. `str(cfg)` is YAML again, and
loads to an equal Config (core/yaml.py).
"""
from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scepter.core.faults import NOWHERE, ConfigError, Fault, Origin, did_you_mean
from scepter.core.secrets import FromEnv, hide_in_urls, is_secret, note_secrets
from scepter.core.yaml import dump, parse, without_comments

# the folder of shipped examples: inside the package when installed, beside it in a checkout
EXAMPLES = next((p for p in (Path(__file__).resolve().parents[1] / 'examples', Path(__file__).resolve().parents[2] / 'examples')
                 if p.is_dir()), Path('examples'))


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
    def load(cls, path: str | os.PathLike, overrides: Sequence[str] = (), environment: bool = True, is_foreign: bool = False) -> Config:
        """The config of a YAML file (or of a shipped example), with its bases below it and the overrides on top.

        `environment=False` leaves ${NAME} as it is: for a config that is only looked at. is_foreign: as for `parse`. Raises ConfigError.
        """
        file = find_config(path)
        cfg = _load_file(file, (), environment, is_foreign)
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
        return parse(text, name, cls, environment, is_foreign)

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f'no {key} in this config{did_you_mean(key, self)}') from None

    def have(self, key: str) -> bool:
        """Whether the key stands in it, whatever its value."""
        return key in self

    def origin(self, key: str) -> Origin:
        """Where the value of a key came from; NOWHERE where a program set it."""
        return self.origins.get(key, NOWHERE)

    # ---------------------------------------------------------------- writing
    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _wrap(value))
        self.origins.pop(key, None)

    __setattr__ = __setitem__

    def __delattr__(self, key: str) -> None:
        del self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As for a dict; values that the program sets have no origin."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As for a dict."""
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
    cfg = parse(text, str(file), Config, environment, is_foreign)
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
            value = parse(f'V: {without_comments(text)}\n', f'the command line ({word})', Config, environment).get('V')
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
