"""A whole experiment: the sections of a config file, and the user's own files that it brings in."""
from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from scepter.core.config import Config
from scepter.core.env import Env
from scepter.core.faults import Fault, check
from scepter.core.logger import get_logger
from scepter.core.registry import SOLVERS
from scepter.core.schema import Component, param, part, schema_of
from scepter.core.stores import FS


class Experiment(Component):
    """The top of a config file: these sections and nothing else."""

    ENV: Env = param({}, 'What differs between machines: the seed, the device, the number of processes.')
    SOLVER: dict = part(SOLVERS, 'What runs: the solver, and below it the network, the data and the hooks.')
    IMPORTS: list[str] = param([], 'Your own components: .py files, found from the file that names them, or dotted modules.')


def load_config(word: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """The config that a word means: a file, a shipped example, or an address, whose IMPORTS and FILE_SYSTEM are then not carried out.

    Raises ConfigError and DataError.
    """
    if '://' not in str(word):
        return Config.load(word, overrides)
    return Config.load(FS.get_from(word), overrides, is_foreign=True)


def check_experiment(cfg: Config, imports: Sequence[str] = ()) -> list[str]:
    """Carry out the imports, then check the whole tree. Answers what was imported, for other processes to import as well.

    imports: further files or modules. Raises ConfigError with all faults.
    """
    words, faults = carry_out_imports(cfg, imports)
    faults += schema_of(Experiment).faults(cfg, '')
    check([*faults, *(not_carried_out(cfg, words) if faults else [])], cfg.file or 'the config')
    return words


def carry_out_imports(cfg: Config, imports: Sequence[str] = ()) -> tuple[list[str], list[Fault]]:
    """Import the config's IMPORTS, and further ones: (absolute files and dotted modules, what went wrong)."""
    words, faults = [*(_absolute(word, Path()) for word in imports), *_own_imports(cfg)], []
    for word in words:
        try:
            import_user_code(word)
            get_logger().info(f'imported {word}')
        except Exception as error:    # whatever a user's file does wrong is a fault of the config that names it
            faults.append(Fault('IMPORTS', f'{word}: {type(error).__name__}: {error}{_last_line(error, word)}', cfg.origin('IMPORTS')))
    return words, faults


def not_carried_out(cfg: Config, words: Sequence[str]) -> list[Fault]:
    """What to add to the faults of a config whose own IMPORTS were left alone."""
    if not cfg.get('IMPORTS') or words:
        return []
    message = 'not carried out, since they stand in a checkpoint or came from an address: name the files with --imports'
    return [Fault('IMPORTS', message, cfg.origin('IMPORTS'))]


def import_user_code(word: str) -> None:
    """Import a dotted module, or an absolute .py file as the module of its plain name, with its folder on the path.

    So the name is the same in every process, and what is defined there can be pickled. Raises ImportError where the name means
    something else already, and whatever the file itself raises.
    """
    if not word.endswith('.py'):
        importlib.import_module(word)
        return
    file = Path(word)
    if not file.is_file():
        raise ImportError(f'there is no file {file}')
    if not file.stem.isidentifier():
        raise ImportError(f'{file.name} is no module name: use letters, digits and _')
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    taken = getattr(sys.modules.get(file.stem), '__file__', '') if file.stem in sys.modules else _found(file.stem)
    if taken is None or Path(taken) != file:
        raise ImportError(f'the name {file.stem} is taken by {taken or "Python"}: rename {file.name}')
    importlib.import_module(file.stem)


def _found(name: str) -> str | None:
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(name)
    return spec.origin if spec else None


def _own_imports(cfg: Config) -> list[str]:
    """The config's own IMPORTS; none where they stand in a checkpoint or a store, or in a base of such: they may come from anybody."""
    words = cfg.get('IMPORTS')
    if not isinstance(words, list) or cfg.origin('IMPORTS').is_foreign:
        return []
    named_by = Path(cfg.origin('IMPORTS').file)
    folder = named_by.parent if named_by.is_file() else Path()
    return [_absolute(word, folder) for word in words if isinstance(word, str)]


def _absolute(word: str, folder: Path) -> str:
    return str((folder / Path(word).expanduser()).resolve()) if word.endswith('.py') else word


def _last_line(error: Exception, word: str) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == word]
    return f' (line {lines[-1]})' if lines else ''
