"""Tables of images, of every kind and from everywhere, give the samples that the same pictures in a folder give."""
from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from scepter.core.errors import DataError
from scepter.core.faults import ConfigError
from scepter.core.registry import DATASETS
from scepter.data.images import UnreadableError
from scepter.data.loader import Loader

SHAPES = [(10, 12), (12, 10), (10, 12), (24, 8), (10, 12), (12, 10)]
TEXTS = [f'gray {i}, of "{30 * i}"' for i in range(6)]


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((*SHAPES[i], 3), 30 * i, np.uint8)).save(file, 'PNG')
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six pictures of one gray each in a folder below, without captions."""
    monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'hf'))
    (tmp_path / 'data' / 'img').mkdir(parents=True)
    for i in range(6):
        (tmp_path / 'data' / 'img' / f'{i}.png').write_bytes(png(i))
    return tmp_path / 'data'


def write_csv(file: Path, names: list[str], delimiter: str = ',') -> None:
    with open(file, 'w', newline='') as out:
        writer = csv.writer(out, delimiter=delimiter)
        writer.writerows([names, *((f'img/{i}.png', TEXTS[i]) for i in range(6))])


def table(folder: Path, kind: str) -> dict[str, Any]:
    """The node of a dataset of all six pictures, its table written beside them."""
    file = folder / f'list.{kind.partition(" ")[0]}'
    paths = [f'img/{i}.png' for i in range(6)]
    node = {'NAME': 'ImageTextTableDataset', 'TABLE': str(file)}
    if kind in ('csv', 'tsv'):
        write_csv(file, ['Target:FILE', 'Prompt'], ',' if kind == 'csv' else '\t')
    elif kind == 'jsonl':
        file.write_text('\n'.join(json.dumps({'file_name': p, 'text': t}) for p, t in zip(paths, TEXTS)))
    elif kind == 'json':
        file.write_text(json.dumps([{'image_path': p, 'caption': t} for p, t in zip(paths, TEXTS)]))
    elif kind == 'txt':
        file.write_text(''.join(f'{p}#;#{w}#;#{h}#;#{t}\n' for p, (h, w), t in zip(paths, SHAPES, TEXTS)))
    elif kind == 'parquet paths':
        pq.write_table(pa.table({'path': paths, 'text': TEXTS}), file)
    elif kind == 'parquet bytes':
        pq.write_table(pa.table({'image': [png(i) for i in range(6)], 'text': TEXTS}), file, row_group_size=4)
    elif kind == 'parquet structs':
        cells = [{'bytes': png(i), 'path': 'x.png'} if i % 2 else {'bytes': None, 'path': p} for i, p in enumerate(paths)]
        pq.write_table(pa.table({'image': cells, 'text': TEXTS}), file, row_group_size=2)
    else:
        node = hub(folder, kind)
    return node


def hub(folder: Path, kind: str) -> dict[str, Any]:
    """The same through the library `datasets`."""
    whole = datasets.Dataset.from_dict({'image': [str(folder / 'img' / f'{i}.png') for i in range(6)], 'text': TEXTS})
    whole = whole.cast_column('image', datasets.Image())
    node = {'NAME': 'ImageTextHubDataset'}
    if kind == 'saved':
        whole.save_to_disk(str(folder / 'saved'))
        return {**node, 'DATASET': str(folder / 'saved')}
    if kind == 'saved splits':
        datasets.DatasetDict({'train': whole, 'test': whole.select([0])}).save_to_disk(str(folder / 'splits'))
        return {**node, 'DATASET': str(folder / 'splits')}
    if 'imagefolder' in kind:
        write_csv(folder / 'metadata.csv', ['file_name', 'text'])
        return {**node, 'DATASET': 'imagefolder', 'DATA_DIR': str(folder), 'STREAM': 'streamed' in kind}
    whole.to_parquet(str(folder / 'all.parquet'))
    return {**node, 'DATASET': 'parquet', 'DATA_FILES': str(folder / 'all.parquet'), 'ROOT': str(folder), 'STREAM': 'streamed' in kind}


TABLES = ['csv', 'tsv', 'jsonl', 'json', 'txt', 'parquet paths', 'parquet bytes', 'parquet structs']
HUB = ['saved', 'saved splits', 'parquet', 'imagefolder', 'streamed parquet', 'streamed imagefolder']


@pytest.mark.parametrize('kind', TABLES + [f'hub {kind}' for kind in HUB])
def test_every_kind_gives_the_same_samples_in_the_same_order(pictures, kind):
    dataset = DATASETS.build(hub(pictures, kind[4:]) if kind.startswith('hub ') else table(pictures, kind))
    samples = [dataset[i] for i in range(len(dataset))]
    assert [sample['prompt'] for sample in samples] == TEXTS
    for i, sample in enumerate(samples):
        assert torch.equal(sample['image'], torch.full((3, *SHAPES[i]), 30 * i / 127.5).sub(1))


@pytest.mark.parametrize('kind', ['csv', 'parquet bytes', 'hub parquet'])
@pytest.mark.parametrize('workers', [0, 2])
def test_buckets_workers_and_the_place_to_begin_are_those_of_every_dataset(pictures, kind, workers):
    node = hub(pictures, kind[4:]) if kind.startswith('hub ') else table(pictures, kind)
    dataset = DATASETS.build({**node, 'BUCKETS': 16, 'BUCKET_STEP': 4, 'TRANSFORMS': [{'NAME': 'RecordedCrop', 'RANDOM': True}]})

    def draws(first: int, count: int) -> list[Any]:
        loader = Loader(dataset, 2, seed=3, first=first, num_workers=workers)
        found = [(batch['prompt'], batch['image'].sum().item(), n.tolist()) for batch, n in (next(loader) for _ in range(count))]
        loader.close()
        return found

    assert draws(0, 8)[4:] == draws(8, 4)


def test_columns_are_found_by_their_usual_names_and_named_where_they_have_others(pictures):
    (pictures / 'a.jsonl').write_text(json.dumps({'photo': 'img/1.png', 'long': 'a long one', 'short': ['s', 't'], 'class': 3}))
    node = {'NAME': 'ImageTextTableDataset', 'TABLE': str(pictures / 'a.jsonl'), 'IMAGE': 'photo'}
    assert DATASETS.build(node)[0]['prompt'] == ''
    assert DATASETS.build({**node, 'CAPTION': 'long', 'LABEL': 'class'})[0]['label'] == 3
    drawn = DATASETS.build({**node, 'CAPTION': {'long': 2, 'short': 1}})
    found = [p for batch, _ in (next(loader) for loader in [Loader(drawn, 50, seed=1)] for _ in range(6)) for p in batch['prompt']]
    assert abs(found.count('a long one') / 300 - 2 / 3) < 0.1 and abs(found.count('s') / 300 - 1 / 6) < 0.08 and set(found) == {
        'a long one', 's', 't'}


def test_a_mask_beside_is_cut_and_mirrored_as_its_image_is(pictures):
    ramp = np.arange(40 * 30, dtype=np.uint16).reshape(40, 30) % 251
    Image.fromarray(np.repeat(ramp[..., None], 3, 2).astype(np.uint8)).save(pictures / 'a.png')
    Image.fromarray(ramp.astype(np.uint8)).save(pictures / 'm.png')
    (pictures / 'a.csv').write_text('image,mask_file,source\na.png,m.png,a.png\n')
    dataset = DATASETS.build({'NAME': 'ImageTextTableDataset', 'TABLE': str(pictures / 'a.csv'), 'BATCH_SIZE': 16,
                              'BESIDE': {'mask': 'mask_file', 'other': 'source'},
                              'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': [20, 30], 'RANDOM': True, 'FLIP': 0.5}]})
    batch, _ = next(Loader(dataset, seed=5))
    assert torch.equal(batch['image'], batch['other'])
    assert torch.allclose(batch['image'][:, :1] / 2 + 0.5, batch['mask'], atol=1e-6)
    assert len({row.numpy().tobytes() for row in batch['mask']}) > 8
    Image.new('L', (9, 9)).save(pictures / 'm.png')
    with pytest.raises(UnreadableError, match=r'its mask is 9x9 pixels, the image 30x40'):
        dataset[0]


# ------------------------------------------------------------------------------------------- what is wrong with it
@pytest.mark.parametrize(('text', 'options', 'message'), [
    ('image,text\n../x.png,a', {}, r"line 2: '../x.png' leads out of .*; paths are below ROOT"),
    ('image,text\n/etc/x.png,a', {}, "leads out of"),
    ('image,text\na/../../x.png,a', {}, "leads out of"),
    ('image,text\nC:/x.png,a', {}, "leads out of"),
    ('image,text\nfile:///etc/x.png,a', {}, 'an address that no table may name'),
    ('image,text\nsimplecache::file:///x.png,a', {}, 'an address that no table may name'),
    ('image,text\n,a', {}, 'line 2: image is the path of a picture, got '),
    ('image,text\nimg/0.png,a, b', {}, 'line 2: more fields than headings'),
    ('image,text\nimg/0.png,"a', {}, 'not CSV'),
    ('image,text\n', {}, 'has no row'),
    ('picture,text\nx.png,a', {}, 'none of the columns picture, text is called as one of images is: name it by IMAGE'),
    ('image,text\nimg/0.png,a', {'CAPTION': 'txt'}, 'no column txt; did you mean text.*it has image, text'),
    ('image,text\nimg/0.png,a', {'IMAGE': 'imgae'}, 'did you mean image'),
    ('image,text\nimg/0.png,a', {'BESIDE': {'mask': 'mask'}}, 'no column mask'),
    ('image,text,n\nimg/0.png,a,one', {'LABEL': 'n'}, "n is a whole number, got 'one'"),
    ('image,text\nimg/0.png,' + 'x' * 70_000, {}, 'longer than 65536'),
])
def test_a_broken_table_is_an_error_that_says_where_and_what_to_do(pictures, text, options, message):
    (pictures / 'a.csv').write_text(text)
    with pytest.raises(DataError, match=message) as error:
        DATASETS.build({'NAME': 'ImageTextTableDataset', 'TABLE': str(pictures / 'a.csv'), **options})
    assert error.value.exit_code == 3


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('a.xls', b'', r'no table that is known by its name; known are \.csv'), ('a.parquet', b'PAR1 and no more', 'is no Parquet file'),
    ('a.txt', b'img/0.png#;#5', r'line 1: expected img_path#;#width#;#height#;#prompt, got'),
    ('a.json', b'{}', 'expected a list of objects'),
    ('a.jsonl', b'\xff\xfe', 'not UTF-8'),
])
def test_what_is_no_table_is_refused_by_name(pictures, name, content, message):
    (pictures / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        DATASETS.build({'NAME': 'ImageTextTableDataset', 'TABLE': str(pictures / name)})


def test_rows_whose_picture_is_missing_or_none_are_replaced_and_too_many_are_an_end(pictures, tmp_path):
    write_csv(pictures / 'a.csv', ['image', 'text'])
    (pictures / 'img' / '1.png').unlink()
    (pictures / 'img' / '4.png').write_bytes(b'no picture')
    node = {'NAME': 'ImageTextTableDataset', 'TABLE': str(pictures / 'a.csv'), 'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': 8}]}
    loader = Loader(DATASETS.build(node), 3, seed=1, skipped_file=tmp_path / 'skipped.jsonl')
    seen = {p for batch, _ in (next(loader) for _ in range(6)) for p in batch['prompt']}
    assert seen == {TEXTS[i] for i in (0, 2, 3, 5)}
    assert {Path(json.loads(line)['path']).name for line in (tmp_path / 'skipped.jsonl').read_text().splitlines()} == {'1.png', '4.png'}
    (pictures / 'img' / '5.png').unlink()
    with pytest.raises(DataError, match=r'3 of 6 files are unreadable'):
        loader = Loader(DATASETS.build(node), 3, seed=1)
        for _ in range(6):
            next(loader)


def test_bytes_in_a_table_that_are_no_picture_make_their_row_unreadable(pictures):
    pq.write_table(pa.table({'image': [png(0), b'no picture', None], 'text': ['a', 'b', 'c']}), pictures / 'a.parquet')
    dataset = DATASETS.build({'NAME': 'ImageTextTableDataset', 'TABLE': str(pictures / 'a.parquet')})
    assert dataset[0]['prompt'] == 'a'
    for i, reason in ((1, 'cannot identify image'), (2, 'the cell is empty')):
        with pytest.raises(UnreadableError, match=reason):
            dataset[i]
        assert dataset.name_of(i).endswith(f'a.parquet, row {i + 1}')


def test_an_absolute_path_may_lie_below_a_root_that_is_given(pictures, tmp_path):
    (tmp_path / 'a.csv').write_text(f'image,text\n{pictures}/img/0.png,a\n')
    node = {'NAME': 'ImageTextTableDataset', 'TABLE': str(tmp_path / 'a.csv')}
    assert DATASETS.build(node)[0]['prompt'] == 'a'
    assert DATASETS.build({**node, 'ROOT': '/'})[0]['prompt'] == 'a'
    with pytest.raises(DataError, match='leads out of'):
        DATASETS.build({**node, 'ROOT': str(tmp_path / 'elsewhere')})


def test_many_files_are_one_table_in_their_order(pictures):
    for i in range(3):
        pq.write_table(pa.table({'image': [png(i)], 'text': [TEXTS[i]]}), pictures / f'{i:03d}.parquet')
    for word in (f'{pictures}/{{000..002}}.parquet', f'{pictures}/*.parquet'):
        dataset = DATASETS.build({'NAME': 'ImageTextTableDataset', 'TABLE': word})
        assert [dataset[i]['prompt'] for i in range(3)] == TEXTS[:3]
        assert dataset[2]['image'].unique().item() == pytest.approx(60 / 127.5 - 1)


def test_a_table_in_a_store_has_its_pictures_there(pictures):
    import fsspec
    store = fsspec.filesystem('memory')
    store.pipe({f'/set/img/{i}.png': png(i) for i in range(2)} | {'/set/a.csv': b'image,text\nimg/0.png,a\nimg/1.png,b\n'})
    dataset = DATASETS.build({'NAME': 'ImageTextTableDataset', 'TABLE': 'memory://set/a.csv'})
    assert [dataset[i]['prompt'] for i in range(2)] == ['a', 'b'] and dataset[1]['image'].shape == (3, 12, 10)


def test_a_stream_is_read_once_and_only_as_far_as_was_asked(pictures, said):
    node = {**hub(pictures, 'streamed parquet'), 'COUNT': 4}
    assert len(DATASETS.build(node)) == 4
    (pictures / 'all.parquet').unlink()
    dataset = DATASETS.build(node)
    assert len(dataset) == 4 and dataset[3]['prompt'] == TEXTS[3]
    assert [m for m in said if 'delete it to read the stream again' in m]


@pytest.mark.parametrize(('options', 'message'), [
    ({'DATASET': 'parquet', 'DATA_FILES': '/nowhere/x.parquet'}, 'cannot be loaded by the library datasets: .*nowhere'),
    ({'DATASET': 'SPLITS', 'SPLIT': 'trian'}, 'has no split trian; did you mean train'),
])
def test_what_the_library_cannot_load_is_3(pictures, options, message):
    hub(pictures, 'saved splits')
    options = {key: value.replace('SPLITS', str(pictures / 'splits')) for key, value in options.items()}
    with pytest.raises(DataError, match=message):
        DATASETS.build({'NAME': 'ImageTextHubDataset', **options})


@pytest.mark.parametrize(('options', 'message'), [
    ({'CAPTION': {'a': 0}}, 'every weight is 0'), ({'BESIDE': {'image': 'b'}}, 'image is a key that a sample has already'),
    ({'CAPTIONS': {'TEMPLATES': ['a photo']}}, r"'a photo' has \{\} 0 times"), ({'CAPTIONS': {'SHUFLE': True}}, 'did you mean SHUFFLE'),
    ({'CAPTIONS': {'SEPARATOR': ' '}}, 'SEPARATOR: is empty')])
def test_the_check_finds_what_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        DATASETS.build({'NAME': 'ImageTextTableDataset', 'TABLE': 'x.csv', **options})
