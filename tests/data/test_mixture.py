"""Several datasets as one: shares, each part's own epochs, and everything that a single dataset can do."""
from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scepter.core.config import Config
from scepter.core.errors import DataError
from scepter.core.registry import DATASETS
from scepter.data.loader import Loader, OrderedLoader
from scepter.data.mixture import MixtureDataset

SIZES = {'red': 9, 'green': 1, 'blue': 6}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for colour, count in SIZES.items():
        (tmp_path / colour).mkdir()
        for i in range(count):
            Image.new('RGB', (20 + 12 * (i % 2), 20), colour).save(tmp_path / colour / f'{i}.png')
            (tmp_path / colour / f'{i}.txt').write_text(f'{colour} {i}')
    return tmp_path


def config(folders: Path, red: Any = 6, green: Any = 1, blue: Any = 3, **options: Any) -> Config:
    crop = [{'NAME': 'RecordedCrop', 'SIZE': 16, 'RANDOM': True}]
    return Config({'NAME': 'MixtureDataset', 'BATCH_SIZE': 4, **options, 'PARTS': {
        name: {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(folders / name), 'TRANSFORMS': crop,
               **(how if isinstance(how, dict) else {'WEIGHT': how})} for name, how in (('red', red), ('green', green), ('blue', blue))}})


def build(folders: Path, *args: Any, **options: Any) -> MixtureDataset:
    return DATASETS.build(config(folders, *args, **options))


def prompts(dataset: MixtureDataset, batches: int, **options: Any) -> list[str]:
    loader = Loader(dataset, seed=7, **options)
    try:
        return [prompt for _ in range(batches) for prompt in next(loader)[0]['prompt']]
    finally:
        loader.close()


def test_every_part_has_its_share_and_each_of_its_samples_equally_often(folders):
    found = prompts(build(folders), 45)      # 180 samples: 108 red, 18 green, 54 blue
    assert Counter(prompt.split()[0] for prompt in found) == pytest.approx({'red': 108, 'green': 18, 'blue': 54}, abs=7)
    for colour, size in SIZES.items():
        own = [prompt for prompt in found if prompt.startswith(colour)]
        counts = Counter(own)
        assert len(counts) == size and max(counts.values()) - min(counts.values()) <= 1
        if size > 1:
            assert own[:size] != own[size:2 * size]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('first', [24, 27])
def test_a_mixture_begins_at_any_number_as_if_it_had_run_to_it(folders, workers, first):
    dataset = build(folders, {'WEIGHT': 2, 'REPEATS': 3})
    assert prompts(dataset, 9, first=first, num_workers=workers) == prompts(dataset, 18)[first:first + 36]


def test_ranks_share_the_samples_of_a_step(folders):
    dataset = build(folders)
    halves = [prompts(dataset, 6, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    together = [prompt for step in range(6) for half in halves for prompt in half[2 * step:2 * step + 2]]
    assert together == prompts(dataset, 6)


def test_an_unreadable_file_gives_way_to_one_of_its_part(folders):
    (folders / 'blue' / '3.png').write_bytes(b'')
    found = prompts(build(folders, 1, 1, 1), 30)
    assert Counter(prompt.split()[0] for prompt in found) == pytest.approx(dict.fromkeys(SIZES, 40), abs=7) and 'blue 3' not in found


def test_the_only_file_of_a_part_cannot_be_replaced(folders):
    (folders / 'green' / '0.png').write_bytes(b'')
    with pytest.raises(DataError, match=r'0\.png cannot be read, and neither can any that may take its place'):
        prompts(build(folders), 30)


def test_parts_with_buckets_keep_a_step_to_one_size(folders):
    how = {'BUCKETS': 16, 'BUCKET_STEP': 4, 'TRANSFORMS': [{'NAME': 'RecordedCrop'}]}
    loader = Loader(build(folders, {**how, 'WEIGHT': 2}, 1, {**how, 'WEIGHT': 1}), seed=7)
    shapes = Counter(tuple(next(loader)[0]['image'].shape) for _ in range(30))
    assert set(shapes) == {(4, 3, 16, 16), (4, 3, 12, 20)}


def test_a_pass_for_evaluation_has_every_sample_once(folders):
    dataset = build(folders, 1, 0, 2)
    seen = [prompt for batch, _ in OrderedLoader(dataset) for prompt in batch['prompt']]
    assert sorted(seen) == [f'{colour} {i}' for colour in ('blue', 'red') for i in range(SIZES[colour])] and len(dataset) == 15


def test_samples_that_do_not_fit_one_batch_name_two_files_of_two_parts(folders):
    with pytest.raises(DataError, match=r'image has shape .*/blue/\d.png, but \[3, 16, 16\] in .*/red/\d.png'):
        prompts(build(folders, 1, 1, {'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': 8}]}), 30)


@pytest.mark.parametrize(('change', 'message'), [
    ({'red': {'BATCH_SIZE': 3}}, 'PARTS.red.BATCH_SIZE: has no effect in a part: say it once, beside PARTS'),
    ({'red': 0, 'green': 0, 'blue': 0}, 'PARTS: every WEIGHT is 0'),
    ({'red': -1}, 'PARTS.red.WEIGHT: '),
    ({'red': {'WEIGTH': 3}}, 'PARTS.red.WEIGTH: no such parameter; did you mean WEIGHT?'),
])
def test_a_mixture_that_cannot_be_is_found_by_the_check(folders, change, message):
    faults = [f'{fault.path}: {fault.message}' for fault in DATASETS.faults(config(folders, **change), 'DATA')]
    assert any(message in fault for fault in faults), faults


def test_one_dataset_without_a_name_of_ones_own_is_no_mixture(folders):
    node = config(folders)
    faults = list(DATASETS.faults(Config({**node, 'PARTS': node.PARTS.red}), 'DATA'))
    assert 'a map of datasets, each under a name of your own' in faults[0].message
