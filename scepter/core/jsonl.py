"""Files of one JSON object a line: what a run tells. A line is whole or it is dropped, and a number that is not finite is null."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def line(values: Mapping[str, Any]) -> str:
    """One object as strict JSON; NaN and the infinities, which JSON has no word for, are null."""
    return json.dumps(_strict(values), default=str, allow_nan=False, ensure_ascii=False)


def append(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add lines in one write, so that a process that is killed leaves at most its last one torn."""
    text = ''.join(f'{line(row)}\n' for row in rows)
    if text:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'ab', buffering=0) as file:
            file.write(text.encode('utf-8', 'surrogatepass'))


def keep_while(path: str | Path, is_kept: Callable[[dict[str, Any]], bool]) -> int:
    """Cut the file before the first line that is_kept refuses or that was torn; answers how many bytes went."""
    path, kept = Path(path), 0
    if not path.is_file():
        return 0
    with open(path, 'r+b') as file:
        for text in file:
            try:
                row = json.loads(text)
            except ValueError:
                break
            if not text.endswith(b'\n') or not isinstance(row, dict) or not is_kept(row):
                break
            kept += len(text)
        size = file.seek(0, 2)
        file.truncate(kept)
    return size - kept


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(v) for key, v in value.items()}
    return [_strict(v) for v in value] if isinstance(value, (list, tuple)) else value
