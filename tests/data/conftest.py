"""Folders of small pictures, and a dataset of numbers."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import scepter.components  # noqa: F401  (registers)
from scepter.core.logger import get_logger


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six 12x10 pictures, each of one gray of its own, with captions beside them."""
    for i in range(6):
        Image.fromarray(np.full((10, 12, 3), 40 * i, np.uint8)).save(tmp_path / f'{i}.png')
        (tmp_path / f'{i}.txt').write_text(f'gray {i}\n')
    return tmp_path


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the framework's logger says; it does not propagate to the root, where caplog listens."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = get_logger()
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)
