"""What a first pass found is kept until its source changes, and is never half there."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import scepter.data.datasets
from scepter.core.errors import DataError
from scepter.core.registry import DATASETS
from scepter.core.stores import FS
from scepter.data import index
from scepter.data.index import Index, Packed


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every index is worth keeping, in a cache of the test's own."""
    monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(index, 'WORTH_KEEPING', -1.0)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for i in range(4):
        Image.new('RGB', (8 + 8 * (i % 2), 8)).save(tmp_path / f'{i}.png')
    (tmp_path / 'a.csv').write_text('image,text\n' + ''.join(f'{i}.png,text {i}\n' for i in range(4)))
    return tmp_path / 'a.csv'


def build(table: Path, **options: Any) -> Any:
    return DATASETS.build({'NAME': 'ImageTextTableDataset', 'TABLE': str(table), **options})


def folders() -> list[Path]:
    return list((FS.cache / 'index').glob('*/*'))


BUCKETS = {'BUCKETS': 16, 'BUCKET_STEP': 8, 'TRANSFORMS': [{'NAME': 'RecordedCrop'}]}


@pytest.mark.parametrize('values', [[], [['a', 1, None], [], {'ü': '\ud800 \u2028'}], [[i] for i in range(1000)]])
def test_packed_values_are_those_that_were_given(values):
    packed = Packed.of(values)
    assert [packed[i] for i in range(len(packed))] == values
    with pytest.raises(IndexError):
        packed[len(values)]


def test_a_table_is_read_once_and_again_when_it_changes(table, said, monkeypatch):
    assert build(table)[3]['prompt'] == 'text 3'
    with monkeypatch.context() as patch:    # the second start does not look into the table
        patch.setattr(scepter.data.tables.ImageTextTableDataset, 'table_rows', lambda self: pytest.fail('read again'))
        assert [build(table)[i]['prompt'] for i in range(4)] == [f'text {i}' for i in range(4)]
    said.clear()
    table.write_text('image,text\n0.png,another\n')
    dataset = build(table)
    assert len(dataset) == 1 and dataset[0]['prompt'] == 'another'
    assert [m for m in said if 'has changed since it was indexed' in m] and len(folders()) == 1


def test_other_keys_make_another_index(table):
    build(table), build(table, CAPTION='image'), build(table, REPEATS=2)
    assert len(folders()) == 2    # how often they come is no matter of the rows
    assert build(table, CAPTION='image')[0]['prompt'] == '0.png'


@pytest.mark.parametrize('name', ['told.json', 'rows.u1', 'starts.i8', 'sizes.i4'])
@pytest.mark.parametrize('how', ['gone', 'cut'])
def test_an_index_that_is_not_whole_is_made_again(table, name, how):
    build(table, **BUCKETS)
    file = next((FS.cache / 'index').rglob(name))
    file.unlink() if how == 'gone' else file.write_bytes(file.read_bytes()[:-3])
    dataset = build(table, **BUCKETS)
    assert [dataset[i]['prompt'] for i in range(4)] == [f'text {i}' for i in range(4)] and dataset[1]['target_size'] == (8, 24)
    assert Index.kept(file.parent) is not None and (file.parent / 'sizes.i4').stat().st_size == 4 * 2 * 4


def test_headers_are_read_once(table, monkeypatch):
    first = build(table, **BUCKETS)
    with monkeypatch.context() as patch:
        patch.setattr(scepter.data.datasets, 'size_of_image', lambda file: pytest.fail('read again'))
        again = build(table, **BUCKETS)
    assert again.bucket_of.tolist() == first.bucket_of.tolist()


def test_of_a_folder_only_the_headers_of_new_and_changed_pictures_are_read(table, monkeypatch):
    node = {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(table.parent), **BUCKETS}
    table.unlink()
    read: list[str] = []
    size_of_image = scepter.data.datasets.size_of_image
    monkeypatch.setattr(scepter.data.datasets, 'size_of_image', lambda file: (read.append(Path(file).name), size_of_image(file))[1])
    DATASETS.build(node)
    assert sorted(read) == ['0.png', '1.png', '2.png', '3.png']
    read.clear()
    DATASETS.build(node)
    assert read == []
    Image.new('RGB', (8, 16)).save(table.parent / '1.png')
    Image.new('RGB', (8, 16)).save(table.parent / '9.png')
    dataset = DATASETS.build(node)
    assert sorted(read) == ['1.png', '9.png'] and [dataset[i]['target_size'] for i in (0, 1, 4)] == [(16, 16), (24, 8), (24, 8)]


def test_a_list_that_tells_its_sizes_needs_no_header(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('x.png#;#30#;#10#;#a, b\ny.png#;#10#;#30#;#c\n')
    monkeypatch.setattr(scepter.data.datasets, 'size_of_image', lambda file: pytest.fail('read'))
    dataset = build(tmp_path / 'a.txt', **BUCKETS)
    assert [dataset.sizes[b] for b in dataset.bucket_of] == [(8, 24), (24, 8)]


def test_where_nothing_can_be_kept_a_line_says_so_and_training_goes_on(table, monkeypatch, tmp_path, said):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'file' / 'cache'))
    assert build(table, **BUCKETS)[0]['prompt'] == 'text 0'
    assert [m for m in said if 'an index cannot be kept in' in m]


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
    source = tmp_path / 'a'
    source.write_text('one')

    def find() -> list[int]:
        source.write_text('three')
        return [1]

    with pytest.raises(DataError, match='changed while it was read'):
        Index.made('a', 'a', [str(source)], find, dict)
    assert not folders()


def test_two_processes_that_make_the_same_index_do_no_harm(table):
    ours = Index(Packed.of([['a'], ['b']]), {}, FS.cache / 'index' / '0' / '1')
    theirs = Index(Packed.of([['a'], ['b']]), {}, ours.place)
    theirs.keep()
    before = os.stat(ours.place / 'rows.u1').st_ino
    ours.keep(np.ones((2, 2), np.int32))
    assert os.stat(ours.place / 'rows.u1').st_ino == before and [p.name for p in ours.place.parent.iterdir()] == ['1']
    assert json.loads((ours.place / 'told.json').read_text())['rows'] == 2


def test_a_version_that_is_in_use_stays_readable_when_the_next_takes_its_place(table):
    old = build(table)
    assert isinstance(build(table).index.rows.data, np.memmap)
    old = build(table)
    table.write_text('image,text\n0.png,another\n')
    assert build(table)[0]['prompt'] == 'another'
    assert old[3]['prompt'] == 'text 3'


def test_what_takes_no_time_is_not_kept(table, monkeypatch):
    monkeypatch.setattr(index, 'WORTH_KEEPING', 60.0)
    build(table, **BUCKETS)
    assert not (FS.cache / 'index').exists()
