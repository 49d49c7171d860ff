"""What is wrong with a config, and where: a file and a line for each fault, all of them told at once."""
from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

from scepter.core.errors import ScepterError


class Origin(NamedTuple):
    """Where a value came from: a file and a line, or the words that stand in for a file."""
    file: str
    line: int = 0
    is_foreign: bool = False    # the file lies in a checkpoint or a store, and may come from anybody, or was named by such a one

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


def did_you_mean(word: Any, words: Iterable[Any]) -> str:
    """'; did you mean X?' where X is the nearest of words, else ''."""
    known = {str(w).casefold(): str(w) for w in words}
    close = difflib.get_close_matches(str(word).casefold(), known, n=1, cutoff=0.6)
    return f'; did you mean {known[close[0]]}?' if close else ''


def check(faults: Iterable[Fault], title: str = 'the config') -> None:
    """Raise one ConfigError with all of the faults, if there are any."""
    found = list(faults)
    if found:
        raise ConfigError(found, title)
