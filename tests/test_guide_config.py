"""The config object of the training guide: its text is that of NOVA's own program, comes back as it was, and refuses what is wrong."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from scepter.config import NovaConfig, Section, knows, read
from scepter.core.faults import ConfigError

SEED = Path(__file__).parent / 'fixtures' / 'nova' / 'misc' / 'seed_cfg.yml'


@pytest.fixture
def cfg() -> Section:
    return Section(NovaConfig)


def filled(cfg: Section) -> Section:
    """As the guide fills it."""
    guide = (Path(__file__).parents[1] / 'docs' / 'training_guide.md').read_text(encoding='utf-8')
    lines = re.findall(r'^cfg\..*$', guide, re.MULTILINE)
    assert len(lines) == 15
    exec('\n'.join(lines), {'cfg': cfg})  # noqa: S102  the guide's own lines
    return cfg


def test_the_guides_assignments_give_the_published_text_to_the_byte_and_come_back(cfg: Section):
    assert str(filled(cfg)) == SEED.read_text(encoding='utf-8')
    assert read(SEED) == cfg


@pytest.mark.parametrize('path, value', [
    ('SOLVER.BASE_LR', 1e-5), ('SOLVER.BASE_LR', 1), ('SOLVER.LR_POLICY', ''), ('SOLVER.DECAY_STEPS', [10, 20]),
    ('SOLVER.DECAY_STEPS', (3,)), ('TRAIN.DATASET', 'on'), ('TRAIN.DATASET', '1e-05'), ('TRAIN.DATASET', '/a b: c #d'),
    ('TRAIN.DATASET', ' '), ('TRAIN.DATASET', 'ü\n🐦'), ('TRAIN.DATASET', 'long ' * 60),
    ('MODEL.CONFIG', {'arch': ['a', 'b', 'c'], 'rank': None, 'deep': {'empty': '', 'x': -1e-30}}),
    ('PIPELINE.MODULES', {'vae': '', 'text_encoder': '/here'})])
def test_whatever_is_set_comes_back_with_its_type(cfg: Section, path: str, value: Any, tmp_path: Path):
    section, key = path.split('.')
    setattr(cfg[section], key, value)

    (tmp_path / 'x.yml').write_text(str(cfg), encoding='utf-8')
    back = read(tmp_path / 'x.yml')

    assert back == cfg and type(back[section][key]) is type(cfg[section][key])


@pytest.mark.parametrize('line, expected', [
    ('cfg.SOLVER.BASE_RL = 1', 'SOLVER.BASE_RL: no such parameter; did you mean BASE_LR?'),
    ('cfg.NUM_GPU = 1', 'did you mean NUM_GPUS?'),
    ('cfg.NUM_GPUS = "two"', "NUM_GPUS: expected int, at least 1, got 'two'"), ('cfg.TRAIN.CHECKPOINTING = 4', 'at most 3, got 4'),
    ('cfg.SOLVER = {"MAX_STEP": 3}', 'did you mean MAX_STEPS?'), ('cfg.MODEL = 3', 'MODEL: expected'),
    ('cfg.MODEL.PRECISION = "bf16"', 'bfloat16'),
    ('cfg.TRAIN.DATASET = None', "TRAIN.DATASET: expected str"), ('del cfg.TRAIN.DATASET', 'stays')])
def test_what_is_wrong_is_refused_where_it_is_set_and_nothing_changes(cfg: Section, line: str, expected: str):
    before = str(cfg)

    with pytest.raises(ConfigError, match=re.escape(expected)):
        exec(line, {'cfg': cfg})  # noqa: S102

    assert str(cfg) == before


def test_a_key_that_is_only_read_is_named_too(cfg: Section):
    with pytest.raises(AttributeError, match='did you mean DATASET'):
        cfg.TRAIN.DATASETS  # noqa: B018


def test_all_faults_of_a_file_are_told_with_their_lines(tmp_path: Path):
    text = SEED.read_text(encoding='utf-8').replace('BASE_LR: 0.0001', 'BASE_LR: fast').replace('LOADER', 'LODER')
    (tmp_path / 'x.yml').write_text(text, encoding='utf-8')

    with pytest.raises(ConfigError) as error:
        read(tmp_path / 'x.yml')

    assert '2 faults' in str(error.value) and 'line 15' in str(error.value) and 'did you mean LOADER?' in str(error.value)


def test_a_path_is_told_from_those_of_our_own_configs():
    assert knows('SOLVER.MAX_STEPS') and knows('NUM_GPUS') and knows('TRAIN.DATASET')
    assert not any(map(knows, ('SOLVER.WORK_DIR', 'SOLVER.OPTIMIZER.LR', 'ENV.SEED', 'SOLVER', '')))
