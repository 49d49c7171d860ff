"""Every kind of dataset that examples/data shows trains, from its images and from latents that are computed once."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scepter import run_train

EXAMPLES = Path(__file__).resolve().parents[1] / 'examples' / 'data'
KINDS = sorted(path.stem for path in EXAMPLES.glob('*.yaml') if path.stem != 'base')


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the example was made."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import make
    finally:
        sys.path.remove(str(EXAMPLES))
    folder = tmp_path_factory.mktemp('examples')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make.main([])
    return folder


def losses(kind: str, name: str, *words: str) -> list[float]:
    """What training said of its first steps, one micro-batch of two each."""
    out = Path('outputs') / 'data' / name
    code = run_train.main(['--cfg', str(EXAMPLES / f'{kind}.yaml'), '--max_steps', '3', f'SOLVER.WORK_DIR={out}', 'SOLVER.DTYPE=float32',
                           'SOLVER.TRAIN_DATA.BATCH_SIZE=2', 'SOLVER.TRAIN_HOOKS=[{NAME: LogHook, LOG_INTERVAL: 1}]', *words])
    assert code == 0
    rows = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    found = [row['train/loss'] for row in rows if 'train/loss' in row]
    assert len(found) == 3
    return found


@pytest.mark.parametrize('kind', KINDS)
def test_each_kind_trains_from_its_images(made, kind, monkeypatch):
    monkeypatch.chdir(made)
    assert all(0 < loss < 10 for loss in losses(kind, kind))


@pytest.mark.parametrize('kind', [pytest.param(kind, marks=() if kind in ('parquet', 'list') else pytest.mark.slow)
                                  for kind in KINDS if kind != 'masks'])
def test_each_kind_trains_alike_from_latents_that_are_computed_once(made, kind, monkeypatch):
    monkeypatch.chdir(made)
    images, cached = losses(kind, f'{kind}-1'), losses(kind, f'{kind}-2', f'SOLVER.CACHE.FOLDER=outputs/cache/{kind}')
    assert cached == pytest.approx(images, rel=1e-5)


def test_a_cache_refuses_what_it_would_not_keep_alike(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    code = run_train.main(['--cfg', str(EXAMPLES / 'masks.yaml'), '--max_steps', '1', 'SOLVER.WORK_DIR=outputs/m',
                           'SOLVER.CACHE.FOLDER=outputs/cache/masks'])
    assert code == 2 and 'CACHE keeps the image of a sample, and not its mask' in capsys.readouterr().err


def test_the_page_of_the_example_names_every_config():
    page = (EXAMPLES / 'README.md').read_text(encoding='utf-8')
    assert KINDS and [kind for kind in KINDS if f'`{kind}.yaml`' not in page] == []
