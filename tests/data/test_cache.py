"""A cache's rows: whose they are, who writes them, and what a kill leaves behind."""
from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

import scepter.data.folders
import scepter.data.mixture
import scepter.data.tables
import scepter.data.tars  # noqa: F401  (both register)
from scepter.core.errors import DataError
from scepter.core.registry import DATASETS
from scepter.data.cache import CachedDataset, Pictures
from scepter.data.loader import Loader
from scepter.data.sources import Source, SourceBook
from scepter.data.texts import Texts

FORKED = multiprocessing.get_context('fork')
CROP = {'NAME': 'RecordedCrop', 'SIZE': 8, 'FLIP': 0.5}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty pictures of noise."""
    rng = np.random.default_rng(0)
    (tmp_path / 'photos').mkdir()
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(tmp_path / f'photos/{i:02}.png')
    return tmp_path / 'photos'


def dataset(photos: Path, **more: Any) -> Any:
    return DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(photos), 'TRANSFORMS': [CROP], 'BATCH_SIZE': 4, **more})


def encode(x: Tensor) -> Tensor:
    """A picture, four times smaller."""
    return avg_pool2d(x, 4)


def pictures(data: Any, folder: Path, **more: Any) -> Pictures:
    return Pictures(data, folder, encoder='mean of 4x4', rows=4, **more)


def slowly(photos: Path, folder: Path) -> None:
    def encode_slowly(x: Tensor) -> Tensor:
        time.sleep(0.01)
        return encode(x)

    torch.set_num_threads(1)
    pictures(dataset(photos), folder).fill(encode_slowly, 2)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / 'pictures').iterdir() if not path.name.startswith('.')}


def test_a_builder_that_is_killed_again_and_again_leaves_the_bytes_of_an_undisturbed_one(tmp_path, photos):
    slowly(photos, tmp_path / 'whole')
    draw, interrupted = random.Random(1), 0
    for _ in range(12):
        builder = FORKED.Process(target=slowly, args=(photos, tmp_path / 'killed'))
        builder.start()
        time.sleep(draw.uniform(0.02, 0.12))
        builder.kill()
        builder.join()
        interrupted += builder.exitcode != 0
    slowly(photos, tmp_path / 'killed')

    assert interrupted >= 3 and files(tmp_path / 'killed') == files(tmp_path / 'whole')
    assert len(files(tmp_path / 'whole')) == 20 and not pictures(dataset(photos), tmp_path / 'killed').missing()


def test_two_builders_of_one_folder_leave_the_same_bytes(tmp_path, photos):
    slowly(photos, tmp_path / 'whole')
    builders = [FORKED.Process(target=slowly, args=(photos, tmp_path / 'both')) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()

    assert [builder.exitcode for builder in builders] == [0, 0] and files(tmp_path / 'both') == files(tmp_path / 'whole')


def tar_of(photos: Path, file: Path) -> Path:
    with tarfile.open(file, 'w') as tar:
        for path in sorted(photos.iterdir())[:10]:
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            tar.addfile(member, io.BytesIO(path.read_bytes()))
    return file


def test_samples_of_a_mixture_come_out_of_the_cache_as_they_are_read(tmp_path, photos):
    parts = {'folder': {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(photos), 'TRANSFORMS': [CROP], 'REPEATS': 2},
             'tar': {'NAME': 'ImageTextTarDataset', 'SHARDS': [str(tar_of(photos, tmp_path / 'a.tar'))], 'WEIGHT': 3,
                     'TRANSFORMS': [{**CROP, 'FLIP': 0.0}]}}
    data = DATASETS.build({'NAME': 'MixtureDataset', 'PARTS': parts, 'BATCH_SIZE': 5})
    table = pictures(data, tmp_path / 'cache')
    table.fill(encode, 3)
    table.look()
    read, kept = (Loader(d, seed=3, num_workers=workers) for d, workers in ((data, 0), (CachedDataset(data, table), 2)))

    assert len(table.shards) == 40 + 10 and (table.numbers >= 0).all()
    for _ in range(12):
        (a, n), (b, m) = next(read), next(kept)
        assert torch.equal(n, m) and torch.allclose(encode(a.pop('image')), b.pop('moments')) and a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) if isinstance(a[key], Tensor) else a[key] == b[key] for key in a)
    kept.close()


def test_a_damaged_row_gives_way_to_another_sample_and_is_named(tmp_path, photos, said):
    table = pictures(dataset(photos), tmp_path / 'cache')
    table.fill(encode, 4)
    table.look()
    shard = table.shards.shards[0]
    with open(shard.path, 'r+b') as file:
        file.seek(shard.fields['moments'].start + 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    loader = Loader(CachedDataset(dataset(photos), table), seed=0)
    seen = [int(n) for _ in range(10) for n in next(loader)[1]]

    assert len(seen) == 40 and len(loader.skipped) == 1 and any('row 0 is damaged' in line for line in said)


def test_a_file_with_another_content_is_read_again_whatever_its_dates_say(tmp_path):
    file, book = tmp_path / 'a.png', SourceBook(tmp_path / 'book.jsonl')
    bytes_of = dict[int, bytes]().__getitem__    # no source is a cell
    file.write_bytes(b'one')
    source, before = Source(str(file)), file.stat()
    first = book.digests({source: 0}, bytes_of)[source]
    time.sleep(0.02)
    file.write_bytes(b'two')
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    again = SourceBook(tmp_path / 'book.jsonl')
    assert again.known[source].sha256 == first and again.digests({source: 0}, bytes_of)[source] != first
    with open(tmp_path / 'book.jsonl', 'a') as lines:
        lines.write('{"path": "torn')
    assert SourceBook(tmp_path / 'book.jsonl').digests({source: 0}, bytes_of, anew=True)[source] == again.known[source].sha256
    assert json.loads((tmp_path / 'book.jsonl').read_text().splitlines()[1])['sha256'] == again.known[source].sha256


def table_of(kind: str, cells: list[dict[str, Any]], folder: Path) -> Any:
    """A dataset of pictures that are within a table."""
    if kind == 'parquet':
        pq.write_table(pa.table({'image': cells}), folder / 'all.parquet', row_group_size=16)
        node = {'NAME': 'ImageTextTableDataset', 'TABLE': str(folder / 'all.parquet')}
    else:
        shutil.rmtree(folder / 'saved', ignore_errors=True)
        datasets.Dataset.from_dict({'image': cells}).save_to_disk(str(folder / 'saved'), num_shards=2)
        node = {'NAME': 'ImageTextHubDataset', 'DATASET': str(folder / 'saved')}
    return DATASETS.build({**node, 'ROOT': str(folder), 'TRANSFORMS': [CROP]})


@pytest.mark.parametrize('kind', ['parquet', 'saved'])
def test_pictures_within_a_table_are_read_again_only_where_its_file_has_changed(tmp_path, photos, kind):
    cells: list[dict[str, Any]] = [{'bytes': path.read_bytes(), 'path': path.name} for path in sorted(photos.iterdir())]
    first = table_of(kind, cells, tmp_path)
    pictures(first, tmp_path / 'cache').fill(encode, 4)
    book = tmp_path / 'cache' / 'sources.jsonl'
    lines = [json.loads(line) for line in book.read_text().splitlines()]

    assert len(lines) == 40 and all(line['cell'].startswith('image/') for line in lines)
    assert not pictures(first, tmp_path / 'cache').missing()
    lines[7]['sha256'] = '0' * 64    # what stands there is believed, so nothing was read
    book.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
    assert pictures(first, tmp_path / 'cache').missing() == [[7]]

    cells[9] = {'bytes': (photos / '00.png').read_bytes() + b' ', 'path': '09.png'}
    assert pictures(table_of(kind, cells, tmp_path), tmp_path / 'cache').missing() == [[9]]


@pytest.mark.parametrize('kind', ['parquet', 'saved'])
def test_a_table_that_leads_to_files_is_held_against_the_files(tmp_path, photos, kind):
    names = sorted(path.name for path in photos.iterdir())
    cells = [{'bytes': None if i % 3 else (photos / name).read_bytes(), 'path': f'photos/{name}'} for i, name in enumerate(names)]
    data = table_of(kind, cells, tmp_path)
    pictures(data, tmp_path / 'cache').fill(encode, 4)

    assert not pictures(data, tmp_path / 'cache').missing()
    (photos / '04.png').write_bytes((photos / '01.png').read_bytes())
    found = pictures(data, tmp_path / 'cache')
    assert not found.missing() and found.numbers[4] == found.numbers[1]    # the row of the picture that it is now
    with Image.open(photos / '00.png') as image:
        image.rotate(90).save(photos / '05.png')
    assert pictures(data, tmp_path / 'cache').missing() == [[5]]


def test_moments_that_are_not_finite_are_refused_and_named(tmp_path, photos):
    with pytest.raises(DataError, match=r'00\.png: its moments are not finite in float16'):
        pictures(dataset(photos), tmp_path / 'cache', dtype=torch.float16).fill(lambda x: encode(x).abs() * 1e6 + 1e6, 4)


def test_an_unreadable_picture_costs_no_other_its_row(tmp_path, photos):
    (photos / '05.png').write_bytes(b'no picture')
    table = pictures(dataset(photos), tmp_path / 'cache')
    table.fill(encode, 4)
    table.look()

    assert [i for i in range(40) if table.numbers[i] < 0] == [5] and table.missing() == [[5]]


def test_what_is_quarantined_is_not_encoded(tmp_path, photos):
    (tmp_path / 'list').write_text(f'{photos}/07.png\n')
    table = pictures(dataset(photos, QUARANTINE=str(tmp_path / 'list')), tmp_path / 'cache')
    table.fill(encode, 4)
    table.look()

    assert len(table.shards) == 39 and table.numbers[7] == -1 and not table.missing()


def test_features_of_prompts_belong_to_their_text_encoder(tmp_path):
    def features(prompts: list[str]) -> dict[str, Tensor]:
        return {'context': torch.tensor([[len(p), ord(p[0])] for p in prompts]).float(), 'mask': torch.ones(len(prompts), 2) > 0}

    table = Texts(['a', 'bb', 'ccc', 'dddd', 'eeeee'], tmp_path, 'one tower', rows=2)
    assert table.missing() == [[0, 1], [2, 3], [4]]
    table.fill(features, 1)
    table.look()
    row = table.of('ccc')

    assert row['context'].tolist() == [3, 99] and row['mask'].tolist() == [True, True] and not table.missing()
    assert len(Texts(['a', 'new'], tmp_path, 'one tower').missing()[0]) == 1
    assert len(Texts(['a', 'bb'], tmp_path, 'another tower').missing()[0]) == 2
    assert len(Texts(['a', 'bb'], tmp_path, 'one tower', torch.float16).missing()[0]) == 2
    with pytest.raises(DataError, match="'f' was no prompt of TRAIN_DATA"):
        table.of('f')
