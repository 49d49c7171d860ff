"""Tar shards: indexed once, read by seek in any order; what is damaged or malicious is named, or harmless."""
from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scepter.core.errors import DataError
from scepter.core.registry import DATASETS
from scepter.data.images import UnreadableError
from scepter.data.loader import Loader, OrderedLoader
from scepter.data.tars import ImageTextTarDataset


def picture(gray: int, size: tuple[int, int] = (12, 10), kind: str = 'PNG') -> bytes:
    file = io.BytesIO()
    Image.new('RGB', size, (gray,) * 3).save(file, kind)
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = (), format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, 'w', format=format) as tar:
        for info in extra:
            tar.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of three samples, their captions in each of the ways."""
    for s in range(2):
        members = {}
        for i in range(3 * s, 3 * s + 3):
            members[f'part/{i:04d}.png'] = picture(40 * i)
            text = f'gray {i}'
            members |= [{f'part/{i:04d}.txt': f' {text}\n'.encode(), f'part/{i:04d}.json': b'{"caption": "another"}'},
                        {f'part/{i:04d}.json': json.dumps({'text': text, 'width': 12}).encode()},
                        {f'part/{i:04d}.json': json.dumps({'caption': text}).encode(), f'part/{i:04d}.npy': bytes(700)}][i % 3]
        shard(tmp_path / f'{s:03d}.tar', members)
    return tmp_path


def build(*words: object, **options: Any) -> ImageTextTarDataset:
    return DATASETS.build({'NAME': 'ImageTextTarDataset', 'SHARDS': list(map(str, words)), **options})


@pytest.mark.parametrize('words', [['*.tar'], ['{000..001}.tar'], ['000.tar', '001.tar']])
def test_samples_come_out_of_all_shards_with_their_captions(shards, words):
    dataset = build(*(shards / word for word in words), PROMPT_PREFIX='a ')
    assert [dataset[i]['prompt'] for i in range(len(dataset))] == [f'a gray {i}' for i in range(6)]
    assert torch.allclose(dataset[4]['image'], torch.full((3, 10, 12), 160 / 127.5 - 1))
    assert dataset.name_of(4) == f'{shards}/001.tar/part/0004.png'


def test_a_tar_is_the_folder_that_was_packed_into_it(shards, tmp_path):
    """The same samples with the same crops: order and draws know nothing of where samples lie."""
    (tmp_path / 'folder').mkdir()
    for i in range(6):
        (tmp_path / 'folder' / f'{i}.png').write_bytes(picture(40 * i))
        (tmp_path / 'folder' / f'{i}.txt').write_text(f'gray {i}')
    options = {'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': 8, 'RANDOM': True}], 'REPEATS': 2, 'BATCH_SIZE': 5}
    folder = DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(tmp_path / 'folder'), **options})
    packed = build(shards / '*.tar', **options)
    for first, workers in ((0, 0), (0, 2), (35, 0)):
        loaders = [Loader(dataset, seed=7, first=first, num_workers=workers) for dataset in (folder, packed)]
        for _ in range(4):
            (batch, n), (other, m) = (next(loader) for loader in loaders)
            assert torch.equal(n, m) and torch.equal(batch['image'], other['image']) and batch['prompt'] == other['prompt']
            assert torch.equal(batch['crop_top_left'], other['crop_top_left'])
        for loader in loaders:
            loader.close()


def test_buckets_are_sorted_by_headers_inside_of_the_tar(tmp_path):
    shapes = [(64, 64), (128, 32), (60, 60)]
    shard(tmp_path / 'x.tar', {f'{i}.jpg': picture(9, (w, h), 'JPEG') for i, (h, w) in enumerate(shapes)})
    dataset = build(tmp_path / 'x.tar', BUCKETS=64, BUCKET_STEP=16, TRANSFORMS=[{'NAME': 'RecordedCrop'}])
    assert [dataset[i]['target_size'] for i in range(3)] == [(64, 64), (128, 32), (64, 64)]


def test_a_long_name_of_either_format_is_read(tmp_path):
    name = 'a' * 90 + '/' + 'b' * 120
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        dataset = build(shard(tmp_path / 'x.tar', {f'{name}.png': picture(50), f'{name}.txt': b'long'}, format=format))
        assert dataset[0]['prompt'] == 'long' and dataset.name_of(0).endswith(f'{name}.png')


def test_members_that_lead_elsewhere_are_names_and_nothing_more(tmp_path):
    (tmp_path / 'secret.png').write_bytes(picture(250))
    links = []
    for name, kind in (('link', tarfile.SYMTYPE), ('hard', tarfile.LNKTYPE), ('dir', tarfile.DIRTYPE), ('dev', tarfile.CHRTYPE)):
        info = tarfile.TarInfo(f'{name}.png')
        info.type, info.linkname = kind, str(tmp_path / 'secret.png')
        links.append(info)
    members = {'../../up.png': picture(10), '/etc/passwd.png': picture(20), '._mac.png': b'resource fork'}
    dataset = build(shard(tmp_path / 'x.tar', members, tuple(links)))
    before = sorted(tmp_path.rglob('*'))
    assert [dataset.name_of(i).removeprefix(f'{tmp_path}/x.tar/') for i in range(len(dataset))] == ['../../up.png', '/etc/passwd.png']
    assert [int(np.round((float(dataset[i]['image'].max()) + 1) * 127.5)) for i in range(2)] == [10, 20]
    assert sorted(tmp_path.rglob('*')) == before


# ------------------------------------------------------------------------------------------------ what is damaged
def test_a_shard_cut_off_at_any_byte_is_named(shards):
    whole = (shards / '001.tar').read_bytes()
    end = len(whole.rstrip(b'\0'))
    for length in [0, 100, 512, 700, *range(512, end, 512), end - 1]:
        (shards / '001.tar').write_bytes(whole[:length])
        with pytest.raises(DataError, match=r'001\.tar') as error:
            build(shards / '000.tar', shards / '001.tar')
        assert error.value.exit_code == 3


@pytest.mark.parametrize(('make', 'message'), [
    (lambda whole: gzip.compress(whole), r'not a tar file that can be read by seek .*compressed'),
    (lambda whole: whole + whole, 'has data after its end'),
    (lambda whole: b'x' * 4096, 'not a tar file'),
    (lambda whole: whole[:1024] + b'x' * 512 + whole[1536:], 'cut off or damaged at byte'),
])
def test_what_is_no_plain_tar_is_an_error_that_says_why(shards, make, message):
    (shards / '000.tar').write_bytes(make((shards / '000.tar').read_bytes()))
    with pytest.raises(DataError, match=message):
        build(shards / '000.tar')


@pytest.mark.parametrize(('members', 'message'), [
    ({'a.txt': b'x', 'b.npy': b'y'}, r'holds no image.*it holds a, b'),
    ({'a.png': b'x', 'A/../a.png': b'', 'a.PNG': b'y'}, 'holds a.PNG twice'),
])
def test_a_shard_that_makes_no_sense_is_an_error(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        build(shard(tmp_path / 'x.tar', members))


@pytest.mark.parametrize(('word', 'message'), [
    ('*.tgz', 'no file is called'), ('{3..1}.tar', 'counts from 3 down to 1'), ('gone.tar', 'gone.tar')])
def test_shards_that_are_not_there_are_named(shards, word, message):
    with pytest.raises(DataError, match=message):
        build(shards / word)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_damaged_member_is_replaced_and_named_once(tmp_path, workers, said):
    members = {f'{i}.png': picture(30 * i) for i in range(8)}
    members['2.png'] = members['2.png'][:40]
    dataset = build(shard(tmp_path / 'x.tar', {**members, '5.json': b'{"text": 3}', '6.txt': b'\xff\xfe'}), MAX_BAD_FRACTION=0.5)
    loader = Loader(dataset, seed=7, num_workers=workers, skipped_file=tmp_path / 'skipped.jsonl')
    for _ in range(8):
        assert next(loader)[0]['image'].shape == (4, 3, 10, 12)
    loader.close()
    skipped = {Path(row['path']).name: row['reason'] for row in map(json.loads, (tmp_path / 'skipped.jsonl').read_text().splitlines())}
    assert sorted(skipped) == ['2.png', '5.png', '6.png'] and 'a caption is a string, got 3' in skipped['5.png']
    assert 'object at' not in skipped['2.png']
    assert len([n for _, n in OrderedLoader(dataset, 1)]) == 5


def test_a_shard_that_shrinks_while_it_is_used_is_an_unreadable_sample(tmp_path):
    path = shard(tmp_path / 'x.tar', {f'{i}.png': picture(i) for i in range(3)})
    dataset = build(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UnreadableError):
        dataset[2]
