"""What the loader passes over (QUARANTINE), and what it holds the bytes of a picture against (CHECKSUMS)."""
from __future__ import annotations

import json
import logging
import os
import re

from scepter.core.errors import DataError
from scepter.core.stores import FS
from scepter.data.datasets import BaseDataset
from scepter.data.images import UnreadableError


class Guard:
    """Of one dataset: the indices that are passed over, and the checksums of its files. Raises DataError where a list cannot be read."""

    def __init__(self, dataset: BaseDataset):
        self.dataset = dataset
        self.passed_over, self.unknown = frozenset[int](), list[str]()
        self.sums = sums_of(dataset.CHECKSUMS) if dataset.CHECKSUMS is not None else {}
        if dataset.QUARANTINE is None:
            return
        names = names_of(dataset.QUARANTINE)
        found = {index: name for index in range(len(dataset)) if (name := dataset.name_of(index)) in names}
        self.passed_over, self.unknown = frozenset(found), sorted(names - set(found.values()))
        if len(found) == len(dataset):
            raise DataError(f'QUARANTINE {dataset.QUARANTINE} names every sample: nothing is left')

    def tell(self, logger: logging.Logger) -> None:
        """Say in a line what is passed over, and in another what could not be."""
        place = self.dataset.QUARANTINE
        if place is not None:
            logger.info(f'QUARANTINE {place}: {len(self.passed_over):,} of {len(self.dataset):,} samples are passed over')
        if self.unknown:
            logger.warning(f'QUARANTINE {place}: {len(self.unknown):,} of its names are of no sample, e.g. {self.unknown[0]}')

    def check(self, index: int) -> None:
        """Raises UnreadableError where the file of a sample has another checksum than it is to have."""
        if not self.sums or (source := self.dataset.source_of(index)) is None or not source.is_file:
            return
        if (expected := self.sums.get(os.path.abspath(source.path))) is None:
            return
        try:
            found = source.digest()
        except OSError as error:
            raise UnreadableError(f'{type(error).__name__}: {error}') from error
        if found != expected:
            raise UnreadableError(f'checksum: sha256 {expected} expected, {found} found')


def names_of(address: str) -> set[str]:
    """The names in a list: a line is a name, or an object with one under "name", as the doctor writes it."""
    names = set()
    for number, line in enumerate(_lines(address), 1):
        try:
            names.add(str(json.loads(line)['name']) if line.startswith('{') else line)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{address}, line {number}: expected a name, or {{"name": ...}}, got {line:.60}') from error
    return names


def sums_of(address: str) -> dict[str, str]:
    """Absolute path -> sha256, of a file that sha256sum wrote; its paths are relative to the folder that it lies in."""
    found, folder = {}, os.path.dirname(os.path.abspath(address)) if '://' not in address else ''
    for number, line in enumerate(_lines(address), 1):
        if (parts := re.fullmatch(r'([0-9a-fA-F]{64}) [ *](.+)', line)) is None:
            raise DataError(f'{address}, line {number}: expected "<sha256>  <path>", as sha256sum writes it, got {line:.60}')
        found[os.path.normpath(os.path.join(folder, parts[2]))] = parts[1].lower()
    return found


def _lines(address: str) -> list[str]:
    try:
        with FS.get_from(address) as path, open(path, encoding='utf-8') as file:
            return [line for line in map(str.strip, file) if line]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{address} cannot be read: {error}') from error
