"""Captions and prompts, and the sheets and lists that hold them."""
from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scepter.core.errors import DataError
from scepter.core.stores import FS
from scepter.data.images import IMAGE_SUFFIXES

CAPTION_SUFFIXES = ('.txt', '.caption')
METADATA_FILES = ('metadata.jsonl', 'metadata.csv')
MAX_CAPTION_BYTES = 65_536   # the longest real captions are a few kB

Record = tuple[str, str | Path | None]    # path of an image below the folder; its caption, or the file that holds it


def clean_caption(text: str) -> str:
    """One line without space at its ends. Raises ValueError for what cannot be a caption."""
    if len(text) > MAX_CAPTION_BYTES:
        raise ValueError(f'longer than {MAX_CAPTION_BYTES} bytes')
    return re.sub(r'\s+', ' ', text).strip()


def find_records(folder: str, shown: str) -> list[Record]:
    """The images of a folder with their captions: those that its sheet lists, else all of them down to its bottom, sorted.

    shown: what messages call the folder. Raises DataError.
    """
    sheets = [name for name in METADATA_FILES if os.path.isfile(os.path.join(folder, name))]
    if len(sheets) > 1:
        raise DataError(f'{shown} holds {" and ".join(sheets)}: keep the one that is meant')
    if sheets:
        records = _records_of_sheet(os.path.join(folder, sheets[0]))
        if not records:
            raise DataError(f'{shown}/{sheets[0]} lists no image')
        return records
    names = sorted(_walk(folder))
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        found = f'{len(names)} other files, e.g. {names[0]}' if names else 'nothing'
        raise DataError(f'no images in {shown}: looked for {", ".join(METADATA_FILES)} and for files that end in '
                        f'{" ".join(IMAGE_SUFFIXES)}, found {found}')
    texts = set(names)
    sidecars = ([os.path.splitext(image)[0] + suffix for suffix in CAPTION_SUFFIXES] for image in images)
    return [(image, next((Path(t) for t in beside if t in texts), None)) for image, beside in zip(images, sidecars)]


def _walk(folder: str) -> Iterator[str]:
    """Files below the folder, as paths with forward slashes, hidden ones left out."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(('.', '__MACOSX'))]
        yield from (os.path.relpath(os.path.join(root, f), folder).replace(os.sep, '/') for f in files if not f.startswith('.'))


def _records_of_sheet(path: str) -> list[Record]:
    rows = _csv_rows(path) if path.endswith('.csv') else ((n, _row(path, n, line)) for n, line in _lines(path) if line.strip())
    records: list[Record] = []
    columns: dict[str, None] = {}
    for number, row in rows:
        where = f'{path}, line {number}'
        columns.update(dict.fromkeys(row))
        name, text = row.get('file_name'), row.get('text')
        if not isinstance(name, str) or not name:
            raise DataError(f'{where}: expected a file_name, got the keys {", ".join(map(str, row)) or "(none)"}')
        if text is not None and not isinstance(text, str):
            raise DataError(f'{where}: text is a string, got {text!r:.60}')
        parts = name.replace('\\', '/').split('/')
        if '..' in parts or parts[0] == '' or ':' in parts[0] or '\0' in name:
            raise DataError(f'{where}: {name!r} leads out of the folder; file_name is a path below it')
        try:
            records.append((name, None if text is None else clean_caption(text)))
        except ValueError as error:
            raise DataError(f'{where}: the text is {error}') from error
    if records and 'text' not in columns:
        raise DataError(f'{path} has no text for any image, only {", ".join(columns)}: name the captions "text"')
    return records


def prompts_of_file(address: str) -> list[dict[str, Any]]:
    """A prompt for each line, or, of a .jsonl file, the object in it. Raises DataError."""
    with FS.get_from(address) as path:
        lines = [(number, line.strip()) for number, line in _lines(path) if line.strip()]
    if not lines:
        raise DataError(f'PROMPT_FILE: {address} holds no prompt')
    if not address.endswith('.jsonl'):
        return [{'prompt': line} for _, line in lines]
    rows = [_row(address, number, line) for number, line in lines]
    for (number, _), row in zip(lines, rows):
        if not isinstance(row.get('prompt'), str):
            raise DataError(f'{address}, line {number}: expected a "prompt", got the keys {", ".join(row) or "(none)"}')
    return rows


def _lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding='utf-8-sig') as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError as error:
        raise DataError(f'{path} is not UTF-8: {error}') from error
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}') from error


def _row(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path}, line {number}: not JSON ({error})') from error
    if not isinstance(row, dict):
        raise DataError(f'{path}, line {number}: expected an object, got {line[:60]}')
    return row


def _csv_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row:
                    raise DataError(f'{path}, line {reader.line_num}: more fields than headings; a text that holds a comma needs quotes')
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f'{path}: not CSV ({error})') from error
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}') from error
