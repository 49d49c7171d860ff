"""The data doctor: what it finds, what it writes, and that a training passes over what it lists."""
from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from scepter.commands import tool
from scepter.core.config import Config
from scepter.core.errors import DataError
from scepter.core.faults import ConfigError
from scepter.core.registry import DATASETS
from scepter.core.schema import param
from scepter.data.datasets import BaseDataset
from scepter.data.doctor import examine, page
from scepter.data.images import UnreadableError
from scepter.data.loader import Loader, OrderedLoader


def noise(seed: int, height: int = 40, width: int = 50) -> Image.Image:
    """Soft noise, as no two pictures have it."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def clinic(tmp_path: Path) -> Path:
    """Nine good pictures, and one of each that the doctor knows."""
    folder = tmp_path / 'clinic'
    folder.mkdir()
    for i in range(9):
        noise(i).save(folder / f'good{i}.png')
        (folder / f'good{i}.txt').write_text(f'picture {i}')
    (folder / 'torn.png').write_bytes((folder / 'good1.png').read_bytes()[:-200])
    (folder / 'twin.png').write_bytes((folder / 'good2.png').read_bytes())
    noise(3).save(folder / 'vnear.jpg', quality=60)
    noise(20, 6, 7).save(folder / 'xsmall.png')
    noise(21).save(folder / '<script>alert(1)<.png')
    for name in ('torn', 'twin', 'vnear', 'xsmall'):
        (folder / f'{name}.txt').write_text(name)
    (folder / 'good8.txt').write_text('a very long caption of very many words that no tower of eight tokens reads whole')
    (folder / '<script>alert(1)<.txt').write_text(' \n')
    sums = ''.join(f'{hashlib.sha256(path.read_bytes()).hexdigest()}  clinic/{path.name}\n' for path in sorted(folder.glob('good*.png')))
    (tmp_path / 'SHA256SUMS').write_text(sums)
    data = bytearray((folder / 'good5.png').read_bytes())
    data[-20] ^= 1
    (folder / 'good5.png').write_bytes(data)
    return folder


def data(clinic: Path, **more: Any) -> dict[str, Any]:
    return {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(clinic), 'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': 16, 'FLIP': 0.5}],
            'BATCH_SIZE': 2, 'CHECKSUMS': str(clinic.parent / 'SHA256SUMS'), **more}


def experiment(clinic: Path, **more: Any) -> Path:
    cfg = tiny.config(clinic.parent / 'run', MODEL=tiny.LATENT_DIFFUSION, TRAIN_DATA=data(clinic, **more))
    (clinic.parent / 'train.yaml').write_text(str(Config(cfg)))
    return clinic.parent / 'train.yaml'


def test_each_complaint_is_found_told_and_listed(clinic, tmp_path, capsys):
    out = tmp_path / 'checkup'
    assert tool('data_doctor').main(['--cfg', str(experiment(clinic, NUM_WORKERS=2)), '--out', str(out)]) == 0

    told = json.loads((out / 'report.json').read_text())
    found = {kind: [Path(c['name']).stem for c in complaints] for kind, complaints in told['complaints'].items()}
    assert told['samples'] == 14
    assert found == {'unreadable': ['torn'], 'checksum': ['good5'], 'duplicate': ['twin'], 'near duplicate': ['vnear'], 'tiny': ['xsmall'],
                     'empty caption': ['<script>alert(1)<'], 'cut caption': ['good8']}
    assert told['complaints']['cut caption'][0]['reason'].endswith('that no tower of eight tokens reads whole"')
    listed = [json.loads(line) for line in (out / 'quarantine.jsonl').read_text().splitlines()]
    assert {Path(row['name']).stem: row['reason'].partition(':')[0] for row in listed} == {
        'torn': 'unreadable', 'good5': 'checksum', 'twin': 'duplicate'}
    sheet = (out / 'report.html').read_text()
    assert '<script' not in sheet and '&lt;script&gt;alert(1)' in sheet and not re.search(r'src="(?!data:)|href=', sheet)
    thumbs = re.findall(r'data:image/jpeg;base64,([^"]+)', sheet)
    assert len(thumbs) == 5 and len(sheet) < 40_000      # two of seven have no picture to show
    assert 'near duplicate' in capsys.readouterr().out


def test_training_passes_over_what_is_listed_in_the_order_that_it_has(clinic, tmp_path, said):
    names = ['torn', 'twin', 'good5', 'gone']
    rows = [json.dumps({'name': f'{clinic}/{name}.png'}) for name in names[1:]]
    (tmp_path / 'list').write_text('\n'.join([f'{clinic}/torn.png', *rows]))
    dataset = DATASETS.build(data(clinic, QUARANTINE=str(tmp_path / 'list'), CHECKSUMS=None))
    loader, order = Loader(dataset, seed=4), dataset.order(4, 2)
    drawn = [prompt for _ in range(14) for prompt in next(loader)[0]['prompt']]
    meant = [dataset.beside(i)['prompt'] for i in order.indices(np.arange(28)).tolist()]

    assert any('3 of 14 samples are passed over' in line for line in said)
    assert any('1 of its names are of no sample' in line for line in said)
    assert not {'torn', 'twin', 'picture 5'} & set(drawn) and loader.skipped == {}
    assert [a for a, b in zip(meant, drawn) if a != b] == [a for a in meant if a in ('torn', 'twin', 'picture 5')] != []
    assert sum(len(n) for _, n in OrderedLoader(dataset)) == 11


@pytest.mark.parametrize(('text', 'words'), [('{"nom": 1}', r'line 1: expected a name'), ('{torn', 'line 1: expected a name')])
def test_a_list_that_is_none_is_refused(clinic, tmp_path, text, words):
    (tmp_path / 'list').write_text(text)
    with pytest.raises(DataError, match=words):
        Loader(DATASETS.build(data(clinic, QUARANTINE=str(tmp_path / 'list'))), seed=0)
    (tmp_path / 'list').write_text(''.join(f'{path}\n' for path in clinic.iterdir()))
    with pytest.raises(DataError, match='nothing is left'):
        Loader(DATASETS.build(data(clinic, QUARANTINE=str(tmp_path / 'list'))), seed=0)
    (tmp_path / 'sums').write_text('abc  a.png\n')
    with pytest.raises(DataError, match='as sha256sum writes it'):
        Loader(DATASETS.build(data(clinic, CHECKSUMS=str(tmp_path / 'sums'))), seed=0)


def test_checksums_find_every_changed_picture(tmp_path):
    """Row D2 of the reliability matrix: decoding alone finds about two of three."""
    draw, folder = random.Random(0), tmp_path / 'photos'
    folder.mkdir()
    for i in range(60):
        noise(i).save(folder / f'{i:02}.jpg', quality=80)
    (tmp_path / 'sums').write_text(''.join(f'{hashlib.sha256(p.read_bytes()).hexdigest()} *photos/{p.name}\n' for p in folder.iterdir()))
    for i in range(0, 60, 2):
        data = bytearray((folder / f'{i:02}.jpg').read_bytes())
        for place in draw.sample(range(len(data)), draw.choice([1, 4, 32])):
            data[place] ^= 1 << draw.randrange(8)
        (folder / f'{i:02}.jpg').write_bytes(data)

    def found(**more: Any) -> set[int]:
        loader = OrderedLoader(DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(folder), 'BATCH_SIZE': 1,
                                               'MAX_BAD_FRACTION': 0.9, **more}))
        return set(range(60)) - {int(n) for _, numbers in loader for n in numbers}

    assert found(CHECKSUMS=str(tmp_path / 'sums')) == set(range(0, 60, 2)) > found()


class Changing(BaseDataset):
    """Of a user's own: no file, no caption, and one sample that raises what training would not survive."""

    COUNT: int = param(6)

    def __len__(self) -> int:
        return self.COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 2:
            raise ZeroDivisionError('of its own')
        if index == 3:
            raise UnreadableError('not today')
        return {'image': torch.full((3, 8, 8), 0.1 * min(index, 4)), 'number': index}


def test_any_dataset_can_be_looked_at_and_what_raises_is_told():
    found = examine(Changing({}), step=2)

    assert {kind: [c.number for c in complaints] for kind, complaints in found.complaints.items()} == {
        'unreadable': [3], 'failing': [2], 'duplicate': [5]}
    assert found.complaints['failing'][0].reason == 'ZeroDivisionError: of its own'
    assert page(found, Changing({})).count('no picture') == 2


def test_a_bucket_that_cannot_fill_a_step_is_named(clinic, tmp_path):
    noise(30, 60, 20).save(clinic / 'tall.png')
    dataset = DATASETS.build(data(clinic, TRANSFORMS=[{'NAME': 'RecordedCrop'}], BUCKETS=32, BUCKET_STEP=16))

    assert [(Path(c.name).stem, c.reason) for c in examine(dataset, step=4).complaints['small bucket']] == [
        ('tall', '1 samples, of which a step takes 4')]
    assert 'small bucket' not in examine(dataset, step=1).complaints


def test_a_complaint_that_there_is_none_of_is_no_complaint(clinic, capsys):
    assert tool('data_doctor').main(['--cfg', str(experiment(clinic)), '--quarantine', 'dupliate']) == ConfigError.exit_code
    assert 'did you mean duplicate?' in capsys.readouterr().err
