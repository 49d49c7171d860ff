"""Looks at the final paths of a cache all the time, for a file that is not whole."""
from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any


class Watcher:
    """`wrong` holds what was ever seen below root, outside of hidden folders, that had not this sha256."""

    def __init__(self, root: Path, sha256: str):
        self.root, self.sha256 = root, sha256
        self.wrong: list[Path] = []
        self.looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._look()

    def _look(self) -> None:
        self.looks += 1
        for folder, below, names in os.walk(self.root):
            below[:] = [name for name in below if not name.startswith('.')]
            for file in (Path(folder, name) for name in names):
                if hashlib.sha256(file.read_bytes()).hexdigest() != self.sha256:
                    self.wrong.append(file)
