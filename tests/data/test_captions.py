"""From what is written of an image to the prompt of one draw."""
from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scepter.core.registry import DATASETS
from scepter.data.captions import Captions
from scepter.data.loader import Loader


def drawn(caption: str, count: int = 400, **options: Any) -> Counter[str]:
    random.seed(3)
    captions = Captions(options)
    return Counter(captions.prompt([[caption]], [1]) for _ in range(count))


def test_a_caption_stays_as_it_is_and_draws_nothing_unless_something_is_asked():
    random.seed(1)
    before = random.getstate()
    assert Captions({}).prompt([['a cat,  sitting', ]], [1]) == 'a cat,  sitting'
    assert random.getstate() == before    # or the crops of older runs would be others


def test_kept_tags_stay_first_and_the_others_come_in_every_order():
    found = drawn('sks, a, b, c', SHUFFLE=True, KEEP=1)
    assert len(found) == 6 and all(prompt.startswith('sks, ') and set(prompt.split(', ')) == {'sks', 'a', 'b', 'c'} for prompt in found)
    assert min(found.values()) > 40


def test_each_tag_behind_the_kept_ones_is_dropped_as_often_as_is_said():
    found = drawn('sks; a; b', 1000, DROPOUT=0.25, KEEP=1, SEPARATOR=';')
    assert all(prompt.startswith('sks') for prompt in found)
    assert sum(n for prompt, n in found.items() if 'a' in prompt) / 1000 == pytest.approx(0.75, abs=0.05)
    assert set(found) == {'sks; a; b', 'sks; a', 'sks; b', 'sks'}


def test_a_template_takes_the_caption_where_its_braces_are():
    assert set(drawn('cat', TEMPLATES=['a photo of a {}', '{}, painted'])) == {'a photo of a cat', 'cat, painted'}


def test_kinds_of_text_come_by_weight_and_an_empty_one_is_left_out():
    random.seed(2)
    captions = Captions({})
    found = Counter(captions.prompt([['long'], ['s', 't'], []], [3, 1, 5]) for _ in range(1000))
    assert found['long'] / 1000 == pytest.approx(0.75, abs=0.05) and found['s'] / 1000 == pytest.approx(0.125, abs=0.04)
    assert captions.prompt([[], []], [1, 1]) == '' and captions.prompt([['a'], ['b']], [0, 1]) == 'b'


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    for i in range(4):
        Image.new('RGB', (8, 8)).save(tmp_path / f'{i}.png')
        (tmp_path / f'{i}.txt').write_text(f'n{i}, red, round\nthe number {i}\n\n')
    return tmp_path


def prompts(folder: Path, first: int, count: int, workers: int = 0, **captions: Any) -> list[str]:
    dataset = DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(folder), 'PROMPT_PREFIX': 'sks, ', 'CAPTIONS': captions})
    loader = Loader(dataset, 4, seed=5, first=first, num_workers=workers)
    found = [prompt for _ in range(count) for prompt in next(loader)[0]['prompt']]
    loader.close()
    return found


def test_each_line_of_a_caption_file_may_be_one_of_several(tagged):
    assert set(prompts(tagged, 0, 1)) == {f'sks, n{i}, red, round the number {i}' for i in range(4)}
    assert set(prompts(tagged, 0, 16, ONE_PER_LINE=True)) == {f'sks, {text}' for i in range(4) for text in (f'n{i}, red, round',
                                                                                                       f'the number {i}')}


@pytest.mark.parametrize('workers', [0, 2])
def test_what_is_drawn_is_keyed_by_the_number_of_the_sample_alone(tagged, workers):
    options = {'SHUFFLE': True, 'DROPOUT': 0.3, 'KEEP': 1, 'ONE_PER_LINE': True}
    whole = prompts(tagged, 0, 6, **options)
    assert prompts(tagged, 8, 4, workers, **options) == whole[8:] and len(set(whole)) > 8
