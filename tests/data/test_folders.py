"""What the folders that images lie in say: classes, repeats; and Hugging Face's sheet of Parquet."""
from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scepter.core.errors import DataError
from scepter.core.registry import DATASETS
from scepter.data.loader import Loader


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Three folders of one, two and three pictures of other shapes; one picture has a caption."""
    for i, name in enumerate(('2_black cat', '10_dog', '1_hairy_fish')):
        (tmp_path / name / 'deeper').mkdir(parents=True)
        for k in range(i + 1):
            Image.new('RGB', (16, 8) if k else (8, 16), (10 * i + k,) * 3).save(tmp_path / name / ('deeper' if k else '') / f'{k}.png')
    (tmp_path / '10_dog' / '0.txt').write_text('a good dog')
    return tmp_path


def build(folder: Path, **options: Any) -> Any:
    return DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(folder), **options})


def test_a_folder_is_a_class_with_its_number_and_its_name(pets, said):
    for old, new in (('2_black cat', 'black_cat'), ('10_dog', 'dog'), ('1_hairy_fish', 'hairy_fish')):
        (pets / old).rename(pets / new)
    dataset = build(pets, FOLDERS='classes', CAPTIONS={'TEMPLATES': ['a photo of a {}']})
    found = {(sample['label'], sample['prompt']) for sample in (dataset[i] for i in range(len(dataset)))}
    assert found == {(0, 'a photo of a black cat'), (1, 'a photo of a a good dog'), (1, 'a photo of a dog'), (2, 'a photo of a hairy fish')}
    assert [m for m in said if 'classes by label: 0 black_cat, 1 dog, 2 hairy_fish' in m]
    assert build(pets)[0].keys() == {'image', 'prompt'} and build(pets).missing_captions == 5


@pytest.mark.parametrize('options', [{}, {'BUCKETS': 8, 'BUCKET_STEP': 4, 'TRANSFORMS': [{'NAME': 'RecordedCrop'}]}])
def test_a_folder_with_a_number_comes_so_often_in_an_epoch(pets, options):
    dataset = build(pets, FOLDERS='repeats', **{'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': 8}], **options})
    assert (len(dataset), dataset.file_count) == (2 * 1 + 10 * 2 + 1 * 3, 6)
    loader = Loader(dataset, 1, seed=4)
    found = Counter(next(loader)[0]['prompt'][0] for _ in range(25))
    assert found == {'black cat': 2, 'a good dog': 10, 'dog': 10, 'hairy fish': 3}
    assert {dataset.name_of(i) for i in range(25)} == {str(p) for p in pets.rglob('*.png')}


def test_repeats_of_folders_and_of_the_dataset_multiply(pets):
    assert len(build(pets, FOLDERS='repeats', REPEATS=3)) == 75


@pytest.mark.parametrize(('name', 'mode', 'message'), [
    ('9.png', 'classes', '9.png is in no folder, but FOLDERS: classes'), ('9.png', 'repeats', 'in no folder'),
    ('other/9.png', 'repeats', 'expected a folder called like 10_other'), ('0_other/9.png', 'repeats', 'expected a folder called like'),
])
def test_what_is_in_no_such_folder_is_named(pets, name, mode, message):
    (pets / name).parent.mkdir(exist_ok=True)
    Image.new('RGB', (8, 8)).save(pets / name)
    with pytest.raises(DataError, match=message):
        build(pets, FOLDERS=mode)


def test_the_sheet_may_be_parquet_and_its_captions_lists(pets):
    names = ['10_dog/0.png', '10_dog/deeper/1.png']
    pq.write_table(pa.table({'file_name': names, 'text': [['one', 'two'], None]}), pets / 'metadata.parquet')
    dataset = build(pets)
    assert [dataset[0]['prompt'] in ('one', 'two'), dataset[1]['prompt']] == [True, ''] and len(dataset) == 2
    with pytest.raises(DataError, match=r'says what there is, so FOLDERS: repeats has no effect'):
        build(pets, FOLDERS='repeats')
