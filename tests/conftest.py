"""Puts this folder on the path: tiny.py is imported by its plain name, as IMPORTS of the configs of tests does in other processes.

And collects what tests measure: with --record, docs/reliability.md tells it afterwards (tests/figures.py).
"""
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import figures

_found, _failed = pytest.StashKey[dict[str, list[figures.Figure]]](), pytest.StashKey[list[str]]()     # by the names of tests; names


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--record', action='store_true', help='write what tests measure into docs/reliability.md')


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_found], config.stash[_failed] = {}, []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if 'record_figure' in getattr(item, 'fixturenames', ()):
            item.add_marker('figure')      # so that `make test-slow` has all of them


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    if call.when == 'call' and call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        item.config.stash[_failed].append(item.name.partition('[')[0])


def pytest_sessionfinish(session: pytest.Session) -> None:
    found, failed = session.config.stash[_found], session.config.stash[_failed]
    # a case that failed told nothing, and counts in all that its test tells when it does not
    missed = [figures.Figure(promise, 0, 1) for name in failed for promise in {f.name for f in found.get(name, ())}
              if not figures.ROWS[promise][1]]
    all_found = [figure for of_test in found.values() for figure in of_test] + missed
    if session.config.getoption('--record') and all_found:
        figures.write(all_found)


@pytest.fixture(scope='session')
def demo_of() -> Callable[[str], ModuleType]:
    """The demo.py of an example; several have a file of that name."""
    def load(example: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f'{example}_demo', Path(__file__).parents[1] / 'examples' / example / 'demo.py')
        assert spec is not None and spec.loader is not None
        module, before = importlib.util.module_from_spec(spec), [*sys.path]
        spec.loader.exec_module(module)
        sys.path[:] = before
        return module

    return load


@pytest.fixture
def record_figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Note what was found of a promise in tests/figures.py: a measurement, or so many good cases `of` so many; by default this one."""
    def record(promise: str, value: float = 1, of: int = 1) -> None:
        assert promise in figures.ROWS, f'{promise!r} is no row of tests/figures.py'
        request.config.stash[_found].setdefault(request.node.name.partition('[')[0], []).append(figures.Figure(promise, value, of))

    return record
