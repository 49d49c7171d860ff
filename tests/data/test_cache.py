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
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import avg_pool2d

import scepter.data.folders
import scepter.data.mixture
import scepter.data.tables
import scepter.data.tars  # noqa: F401  (all register)
from scepter.core.errors import DataError
from scepter.core.registry import DATASETS
from scepter.core.streams import seed_global
from scepter.data.cache import CachedDataset, Pictures
from scepter.data.generators import seed_generators
from scepter.data.loader import Loader
from scepter.data.shards import AGAIN
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


WORDS = {'NAME': 'ImageTextFolderDataset', 'CAPTIONS': {'SHUFFLE': True, 'DROPOUT': 0.3}}
TABLE = {'NAME': 'ImageTextTableDataset', 'CAPTION': {'long': 3, 'short': 1}, 'LABEL': 'label'}
PLAIN = {'NAME': 'ImageTextFolderDataset', 'TRANSFORMS': [{**CROP, 'FLIP': 0}]}


def written(photos: Path, node: dict[str, Any]) -> Any:
    """The pictures as a dataset of this kind, with the words that it takes."""
    for i, path in enumerate(sorted(photos.glob('*.png'))):
        path.with_suffix('.txt').write_text(f'red {i}, green, blue, {i} in all')
    rows = ''.join(f'{i:02}.png,a long caption of {i},short {i},{i % 3}\n' for i in range(40))
    (photos / 'list.csv').write_text('path,long,short,label\n' + rows)
    if node is PLAIN:
        (photos / 'metadata.csv').write_text('file_name,text\n' + ''.join(f'{i:02}.png,picture {i}\n' for i in range(40)))
    place = {'TABLE': str(photos / 'list.csv')} if 'Table' in node['NAME'] else {'DATA_FOLDER': str(photos)}
    return DATASETS.build({'TRANSFORMS': [CROP], 'BATCH_SIZE': 4, 'MAX_BAD_FRACTION': 0.2, **node, **place})


def one_by_one(data: Any, table: Pictures, texts: Texts | None, seed: int, draws: int, bad: Collection[int]) -> Iterator[dict[str, Any]]:
    """What each draw is to be, said plainly: all generators seeded for it, its words, its mirror, its rows as the files have them."""
    order = data.order(seed, data.BATCH_SIZE)
    for n, index in enumerate(order.indices(np.arange(draws)).tolist()):
        index = next(i for i in (index, *order.instead(n, index)) if i not in bad)
        seed_generators(seed_global(seed, 'transform', n))
        sample = data.beside(index)
        is_mirrored = data.draws_mirror(index)
        row = kept(table, table.keys[index])
        moments = row.pop('moments')
        sample['moments'] = (moments[int(is_mirrored)] if data.mirrors else moments).float()
        if texts is not None:
            sample |= {f'text_{name}': value.float() for name, value in kept(texts, texts.keys[texts.place[sample['prompt']]]).items()}
        yield sample | {name.removeprefix('beside.'): value for name, value in row.items()}


def kept(table: Any, key: np.ndarray) -> dict[str, Tensor]:
    """The row of a key, by another reader of its file."""
    shard, place = next((s, i) for s in table.shards.shards for i, other in enumerate(s.keys) if (other == key).all())
    with safe_open(shard.path, 'pt') as file:
        return {name: file.get_tensor(name)[place] for name in file.keys()}


def states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def flip_a_byte(table: Pictures, index: int) -> None:
    number = int(table.numbers[index])
    which = int(np.searchsorted(table.shards.firsts, number, side='right')) - 1
    shard = table.shards.shards[which]
    field = shard.fields['moments']
    with open(shard.path, 'r+b') as file:
        file.seek(field.start + (number - int(table.shards.firsts[which])) * field.size + 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('bad', [(), (3, 17, 18)], ids=['whole', 'damaged'])
@pytest.mark.parametrize(('node', 'dtype'), [(WORDS, None), (TABLE, torch.bfloat16), (PLAIN, torch.float16)])
def test_a_batch_holds_what_its_samples_are_one_by_one(tmp_path, photos, node, dtype, bad, workers):
    data = written(photos, node)
    table = pictures(data, tmp_path / 'cache', dtype=dtype)
    table.fill(encode, 4)
    table.look()
    texts = None
    if node is PLAIN:
        texts = Texts([f'picture {i}' for i in range(40)], tmp_path / 'cache', 'a tower', dtype, rows=4)
        texts.fill(lambda prompts: {'context': torch.tensor([[len(p), ord(p[-1])] for p in prompts]).float()}, 8)
        texts.look()
    expected = list(one_by_one(data, table, texts, 5, 60, bad))
    for index in bad:
        flip_a_byte(table, index)
    loader = Loader(CachedDataset(data, table, texts), seed=5, num_workers=workers)
    before = states()

    for first in range(0, 60, 4):
        batch, n = next(loader)
        whole = data.collate(expected[first:first + 4], [''] * 4)
        assert n.tolist() == list(range(first, first + 4)) and batch.keys() == whole.keys()
        for key, value in batch.items():
            assert torch.equal(value, whole[key]) and value.dtype == whole[key].dtype if isinstance(value, Tensor) else value == whole[key]
    loader.close()
    assert set(loader.skipped) == {data.name_of(index) for index in bad}
    assert states() == before


def test_generators_are_seeded_only_where_something_is_drawn(photos):
    class Own(type(written(photos, PLAIN))):
        """A user's, which may draw from anything."""

    plain, tags, table = (written(photos, node).draws_beside for node in (PLAIN, {**WORDS, 'TRANSFORMS': []}, {**TABLE, 'TRANSFORMS': []}))
    own = Own(written(photos, PLAIN).cfg).draws_beside

    assert (tuple(plain), tags, table, own) == ((), ('python',), ('python',), ('torch', 'numpy', 'python'))


def test_a_row_that_goes_bad_after_it_was_read_is_found_later_and_never_given_again(tmp_path, photos):
    table = pictures(dataset(photos), tmp_path / 'cache')
    table.fill(encode, 4)
    table.look()
    assert isinstance(table.read([7], {'moments': np.array([1])})[0], tuple)
    flip_a_byte(table, 7)
    read = [isinstance(table.read([7, 8], {'moments': np.array([0, 1])})[0], tuple) for _ in range(200)]

    assert not any(read[read.index(False):]) and read.index(False) < 1.5 * AGAIN
    assert all(isinstance(row, tuple) for row in table.read([8, 9], {'moments': np.array([0, 1])}))


def test_forked_processes_share_which_rows_are_known_to_be_sound(tmp_path, photos):
    table = pictures(dataset(photos), tmp_path / 'cache')
    table.fill(encode, 4)
    table.look()
    child = FORKED.Process(target=lambda: table.read([7]))
    child.start()
    child.join()

    assert child.exitcode == 0 and np.flatnonzero(np.frombuffer(table.shards._left, np.uint8)).tolist() == [table.numbers[7]]


def test_a_damaged_row_gives_way_to_another_sample_and_is_named(tmp_path, photos, said):
    table = pictures(dataset(photos), tmp_path / 'cache')
    table.fill(encode, 4)
    table.look()
    flip_a_byte(table, 5)
    loader = Loader(CachedDataset(dataset(photos), table), seed=0)
    seen = [int(n) for _ in range(10) for n in next(loader)[1]]

    assert len(seen) == 40 and len(loader.skipped) == 1 and any('is damaged: checksum' in line for line in said)


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
    (columns, first), (_, second) = table.of(['ccc', 'a'])

    assert columns['context'][[first, second]].tolist() == [[3, 99], [1, 97]] and columns['mask'].all() and not table.missing()
    assert len(Texts(['a', 'new'], tmp_path, 'one tower').missing()[0]) == 1
    assert len(Texts(['a', 'bb'], tmp_path, 'another tower').missing()[0]) == 2
    assert len(Texts(['a', 'bb'], tmp_path, 'one tower', torch.float16).missing()[0]) == 2
    with pytest.raises(DataError, match="'f' was no prompt of TRAIN_DATA"):
        table.of(['a', 'f'])
