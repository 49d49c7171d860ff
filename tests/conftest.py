"""Puts this folder on the path: tiny.py is imported by its plain name, as IMPORTS of the configs of tests does in other processes."""
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Downloads and indices of a test run go where it ends with it, in its own processes and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, 'SCEPTER_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield
