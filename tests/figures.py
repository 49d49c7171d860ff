"""The table of docs/reliability.md, which a slow run of the tests writes itself: what they counted and measured, when, and where."""
from __future__ import annotations

import datetime
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'reliability.md'
HEAD = '| promise | to reach | found | when | on |\n|---|---|---|---|---|\n'

# What is shown, in this order: a promise, the figure to reach, and its unit; without one, cases are counted
ROWS = {
    'kills in the midst of saving after which every acknowledged step is there': ('all of 200', ''),
    'states of the disk after a power cut that recover': ('all', ''),
    'flipped bits of a checkpoint that are found': ('all of 1,000', ''),
    'resumes, twice in a row, equal to the bit': ('all', ''),
    'restored things whose loss is seen': ('5 of 5', ''),
    'changes of launcher in the midst of a run, equal to the bit': ('all', ''),
    'losses on two processes against one, largest relative difference': ('1e-5', '1'),
    'stop signals after which the running step was saved, equal to the bit': ('all', ''),
    'a stop signal until all have ended': ('a step and a save', 's'),
    'a second stop signal until all ranks have ended': ('2 s', 's'),
    'ranks that end and end the others, by spawn': ('all', ''),
    'a rank that ends until all have ended, by spawn': ('5 s', 's'),
    'ranks that end and end the others, by torchrun': ('all', ''),
    'a rank that ends until all have ended, by torchrun': ('10 s', 's'),
    'stuck ranks that were named': ('all', ''),
    'a stuck rank until all have ended, beyond its limit': ('12 s', 's'),
    'a launcher that is killed until all others are gone': ('5 s', 's'),
    'memory that 1,000 steps more take': ('1 MiB', 'MiB'),
}


class Figure(NamedTuple):
    """What a test found: so many cases of so many, or the worst of several measurements."""
    name: str
    value: float
    of: int = 0


def cells(figures: Iterable[Figure], name: str) -> str:
    """What was found of one promise."""
    own, unit = [f for f in figures if f.name == name], ROWS[name][1]
    if unit:
        return f'{max(f.value for f in own):.2g} {unit.replace("1", "")}'.strip()
    return f'{round(sum(f.value for f in own)):,} of {sum(f.of for f in own):,}'


def write(figures: list[Figure], page: Path = PAGE) -> None:
    """Put what was found into the page's table; rows of which nothing was found now stay as they were, with their own date."""
    before, _, rest = page.read_text(encoding='utf-8').partition(HEAD)
    lines = rest.splitlines(keepends=True)
    end = next((i for i, line in enumerate(lines) if not line.startswith('|')), len(lines))
    rows = {line.split('|')[1].strip(): line for line in lines[:end]}
    for name in {f.name for f in figures}:
        rows[name] = f'| {name} | {ROWS[name][0]} | {cells(figures, name)} | {datetime.date.today()} | {machine()} |\n'
    page.write_text(before + HEAD + ''.join(rows[name] for name in ROWS if name in rows) + ''.join(lines[end:]), encoding='utf-8')


def machine() -> str:
    """The processor, and what matters of the software."""
    info = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    name = next((line.split(':')[1].strip() for line in info.splitlines() if line.startswith('model name')), platform.processor())
    return f'{name}, Python {platform.python_version()}, torch {torch.__version__.partition("+")[0]}'
