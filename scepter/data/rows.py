"""Tables, row by row: CSV, TSV, JSON lines, lists with a delimiter, Parquet; and the names of many of them in one word.

    for where, row in rows('cats/metadata.csv'): ...        row: {column: value}; a picture's bytes stay where they are, as a Place
"""
from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from scepter.core.errors import DataError
from scepter.core.registry import need
from scepter.data.sources import Source

LIST_FIELDS = ('img_path', 'width', 'height', 'prompt')    # of a list without a heading, as the public project writes it
LIST_DELIMITER = '#;#'
SUFFIXES = ('.csv', '.tsv', '.jsonl', '.ndjson', '.json', '.txt', '.parquet')
STORES = ('http', 'https', 'hf', 'ms', 'oss', 's3', 'gs', 'gcs', 'az', 'abfs')    # whose addresses a cell may hold

GROUPS_KEPT = 4    # of one process

Row = dict[str, Any]


class Place(NamedTuple):
    """Where the bytes of a cell are in one of several Parquet files: in which, its group of rows, and the row in that."""
    file: int
    group: int
    row: int


def rows(path: str, shown: str = '', fields: Sequence[str] | None = None, delimiter: str | None = None,
         number: int = 0) -> Iterator[tuple[str, Row]]:
    """(where it is, the row) for each row of a table, by the file's suffix.

    shown: what messages call it.  fields: names of the columns of a list, which has no heading.  delimiter: of a list.
    number: of the file among several, for its Places.
    Raises DataError with the line where it is broken.
    """
    shown = shown or path
    suffix = os.path.splitext(path)[1].lower()
    if fields or delimiter or suffix == '.txt':
        return _list_rows(path, shown, fields or LIST_FIELDS, delimiter or LIST_DELIMITER)
    if suffix in ('.csv', '.tsv'):
        return _csv_rows(path, shown, ',' if suffix == '.csv' else '\t')
    if suffix in ('.jsonl', '.ndjson'):
        return ((where, object_of(where, line)) for number, line in lines(path) if line.strip() for where in [f'{shown}, line {number}'])
    if suffix == '.json':
        return _json_rows(path, shown)
    if suffix == '.parquet':
        return _parquet_rows(path, shown, number)
    raise DataError(f'{shown}: no table that is known by its name; known are {" ".join(SUFFIXES)}')


def addresses(word: str, key: str) -> list[str]:
    """The files that one word names: {000..012} counts, and a local name may hold * and ?. Raises DataError where it is none."""
    if (counted := re.search(r'\{(\d+)\.\.(\d+)\}', word)) is not None:
        first, last = counted.groups()
        if int(last) < int(first):
            raise DataError(f'{key}: {word} counts from {first} down to {last}')
        numbers = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
        return [address for i in numbers for address in addresses(word[:counted.start()] + i + word[counted.end():], key)]
    if '://' in word or not re.search(r'[*?]', word):
        return [word]
    found = sorted(glob.glob(os.path.expanduser(word), recursive=True))
    if not found:
        raise DataError(f'{key}: no file is called {word}')
    return found


def joined(root: str, name: str) -> str:
    """The path or address of a name that stands in a table, below root. Raises ValueError where it leads elsewhere."""
    scheme, is_address, _ = name.partition('://')
    if is_address:
        if scheme.lower() not in STORES:
            raise ValueError(f'{name!r} is an address that no table may name; it may be one of {", ".join(f"{s}://" for s in STORES)}')
        return name
    parts = name.replace('\\', '/').split('/')
    if os.path.isabs(name) and '..' not in parts and '\0' not in name and '://' not in root:
        if os.path.commonpath([root, name]) == root:
            return name
    elif '..' not in parts and parts[0] != '' and ':' not in parts[0] and '\0' not in name:
        return f'{root}{name}' if root.endswith(('/', '@')) else f'{root}/{name}'
    raise ValueError(f'{name!r} leads out of {root}')


def lines(path: str) -> Iterator[tuple[int, str]]:
    """(number, text) of each line. Raises DataError."""
    try:
        with open(path, encoding='utf-8-sig') as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError as error:
        raise DataError(f'{path} is not UTF-8: {error}') from error
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}') from error


def object_of(where: str, text: str) -> Row:
    """The object that is all there is in a text. Raises DataError."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{where}: not JSON ({error})') from error
    if not isinstance(row, dict):
        raise DataError(f'{where}: expected an object, got {text[:60]}')
    return row


def parquet(path: str, shown: str = '') -> Any:
    """An open Parquet file. Raises DataError where it is none."""
    library = need('pyarrow.parquet', 'data')
    try:
        return library.ParquetFile(path, memory_map=True)
    except (OSError, ValueError) as error:    # ArrowInvalid is a ValueError
        raise DataError(f'{shown or path} is no Parquet file that can be read ({error})') from error


class ParquetCells:
    """Cells of Parquet files in any order: a group of rows of a column is read at once, and the last GROUPS_KEPT of them are kept."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths
        self._files: dict[int, Any] = {}
        self._groups: dict[tuple[int, int, str], Any] = {}
        self._are_bytes: dict[tuple[int, int, str], bool] = {}

    def __call__(self, column: str, file: int, group: int, row: int) -> Any:
        key = (file, group, column)
        if key not in self._groups:
            if len(self._groups) == GROUPS_KEPT:
                self._groups.pop(next(iter(self._groups)))
            self._groups[key] = self._file(file).read_row_group(group, [column], use_threads=False).column(0)
        return self._groups[key][row].as_py()

    def source(self, column: str, file: int, group: int, row: int) -> Source | None:
        """A cell as a source, without reading it; None where the file does not say that each cell of its group holds bytes."""
        if (group_of := (file, group, column)) not in self._are_bytes:
            self._are_bytes[group_of] = self._holds_bytes(column, file, group)
        return Source(self.paths[file], cell=f'{column}/{group}/{row}') if self._are_bytes[group_of] else None

    def _holds_bytes(self, column: str, file: int, group: int) -> bool:
        told = self._file(file).metadata.row_group(group)
        leaves = [told.column(i) for i in range(told.num_columns)]
        found = [leaf.statistics for leaf in leaves if leaf.path_in_schema in (column, f'{column}.bytes')]
        return bool(found) and all(s is not None and s.has_null_count and not s.null_count for s in found)

    def _file(self, file: int) -> Any:
        if file not in self._files:
            self._files[file] = parquet(self.paths[file])
        return self._files[file]

    def __reduce__(self) -> Any:
        return ParquetCells, (self.paths,)    # open files stay in their process


def _csv_rows(path: str, shown: str, delimiter: str) -> Iterator[tuple[str, Row]]:
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            reader = csv.DictReader(file, strict=True, delimiter=delimiter)
            for row in reader:
                where = f'{shown}, line {reader.line_num}'
                if None in row:
                    raise DataError(f'{where}: more fields than headings; a text that holds a {"comma" if delimiter == "," else "tab"} '
                                    'needs quotes')
                yield where, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f'{shown}: not CSV ({error})') from error
    except OSError as error:
        raise DataError(f'{shown} cannot be read: {error.strerror}') from error


def _list_rows(path: str, shown: str, fields: Sequence[str], delimiter: str) -> Iterator[tuple[str, Row]]:
    """Without quotes: the last field takes what is left of the line, the delimiter included."""
    for number, line in lines(path):
        values = line.strip().split(delimiter, len(fields) - 1)
        if line.strip() and len(values) != len(fields):
            raise DataError(f'{shown}, line {number}: expected {delimiter.join(fields)}, got {line.strip():.80}')
        if line.strip():
            yield f'{shown}, line {number}', dict(zip(fields, values))


def _json_rows(path: str, shown: str) -> Iterator[tuple[str, Row]]:
    try:
        with open(path, encoding='utf-8-sig') as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f'{shown}: not JSON ({error})') from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(f'{shown}: expected a list of objects; one object a line is .jsonl')
    yield from ((f'{shown}, row {i}', row) for i, row in enumerate(found, 1))


def _parquet_rows(path: str, shown: str, file_number: int) -> Iterator[tuple[str, Row]]:
    """Columns of bytes, as they are or as {bytes, path}, are not read: their cells say where they are."""
    with parquet(path, shown) as file:
        schema = file.schema_arrow
        far = [field.name for field in schema if holds_bytes(field.type)]
        near = [name for name in schema.names if name not in far]
        number = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            table = file.read_row_group(group, near, use_threads=False).to_pylist() if near else [{}] * count
            for i, row in enumerate(table):
                number += 1
                yield f'{shown}, row {number}', {**row, **dict.fromkeys(far, Place(file_number, group, i))}


def write_parquet(path: str | os.PathLike[str], found: Iterable[Row], schema: Any = None, group: int = 100) -> None:
    """Write rows with pictures in groups so small that one picture can be read without many others.    schema: Arrow's, if it is known"""
    arrow, library = need('pyarrow', 'data'), need('pyarrow.parquet', 'data')
    left = iter(found)
    first = list(islice(left, group))
    if not first:
        raise DataError(f'nothing was given to write into {path}')
    table = arrow.Table.from_pylist(first, schema)
    with library.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        while more := list(islice(left, group)):
            writer.write_table(arrow.Table.from_pylist(more, table.schema))


def holds_bytes(kind: Any) -> bool:
    """Whether a column of this Arrow type has pictures themselves."""
    types = need('pyarrow', 'data').types
    inner = [kind.field(i).type for i in range(kind.num_fields)] if types.is_struct(kind) else [kind]
    return any(types.is_binary(k) or types.is_large_binary(k) for k in inner)
