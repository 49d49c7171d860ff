"""No name out of a manifest, an index, an archive, a listing or a table leads out of its folder."""
from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from scepter.core.disk import atomic, checkpoints, manifests
from scepter.core.errors import DataError, ScepterError
from scepter.core.registry import DATASETS
from scepter.core.stores import hub
from scepter.core.stores.front import FileSystem
from scepter.data.rows import joined
from scepter.weights.files import read_shards

SECRET = b'what lies outside'
CUT = {'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': 8}]}
# {outside}: the file beside the root that must be neither read nor written
VECTORS = ['../outside', 'a/../../outside', '{outside}', 'file://{outside}', '/etc/passwd', '..', '.', '', '~/outside', 'C:\\outside',
           '\\\\host\\outside', '..\\outside', '%2e%2e/outside', '‥/outside', '．．/outside', 'a\0b', 'x' * 300, 'a//outside', './outside',
           '/dev/stdin', 'link', 'linked/outside', 'a\nb', '\u202eoutside']
NEVER = VECTORS[:12] + VECTORS[15:19]      # what leads, or could lead, elsewhere; the others are odd names of files within


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder beside which a secret lies, with a link to it and one to the folder above."""
    (tmp_path / 'outside').write_bytes(SECRET)
    (tmp_path / 'root').mkdir()
    return tmp_path / 'root'


def plant_links(root: Path) -> None:
    (root / 'link').symlink_to(root.parent / 'outside')
    (root / 'linked').symlink_to(root.parent)


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file() and not p.is_symlink()}


def each(root: Path) -> list[str]:
    return [vector.replace('{outside}', str(root.parent / 'outside')) for vector in VECTORS]


def survey(root: Path, open_it: Callable[[str], bytes | None], refuses_all: bool = False) -> list[str]:
    """Try every vector; answers those that were refused. Nothing outside is read or changed, and nothing appears there."""
    before, refused = {p: body for p, body in files(root.parent).items() if root not in p.parents}, []
    for vector, name in zip(VECTORS, each(root)):
        try:
            found = open_it(name)
            assert found is None or SECRET not in found, vector
        except (ScepterError, ValueError) as error:
            assert not isinstance(error, UnicodeError), vector
            refused.append(vector)
    assert {p: body for p, body in files(root.parent).items() if root not in p.parents} == before
    assert len(refused) == len(VECTORS) or not refuses_all, set(VECTORS) - set(refused)
    return refused


def test_joining_refuses_whatever_is_no_plain_name(root):
    plant_links(root)

    def read(name: str) -> bytes | None:
        path = atomic.safe_join(root, name)
        return path.read_bytes() if path.is_file() else None

    refused = survey(root, read)

    assert set(VECTORS) - set(refused) == {'%2e%2e/outside', '‥/outside', '．．/outside'}      # which are names like any other


def test_the_manifest_of_a_checkpoint(root):
    folder = checkpoints.save(root, 1, {'model': {'w': torch.ones(2)}}, {}, 'A: 1\n')
    manifest = json.loads((folder / 'MANIFEST.json').read_text())
    manifest.pop('sha256')
    plant_links(folder)

    def load(name: str) -> bytes:
        forged = {**manifest, 'files': {**manifest['files'], name: {'size': len(SECRET), 'sha256': hashlib.sha256(SECRET).hexdigest()}}}
        (folder / 'MANIFEST.json').write_bytes(manifests.sealed(forged))
        return checkpoints.load(folder).config.encode()

    survey(root, load, refuses_all=True)


def test_the_index_of_shards(root):
    plant_links(root)

    def read(name: str) -> bytes:
        (root / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'w': name}}))
        return bytes(read_shards(root / 'model.safetensors.index.json')['w'].read().numpy().tobytes())

    survey(root, read, refuses_all=True)


@pytest.mark.parametrize('kind', [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE],
                         ids=['file', 'symlink', 'link', 'device'])
def test_members_of_archives(root, kind):
    picture = io.BytesIO()
    Image.new('RGB', (8, 8), 'red').save(picture, 'png')

    def read(name: str) -> bytes:
        with tarfile.open(root / 'x.tar', 'w', format=tarfile.PAX_FORMAT) as tar:
            for member, of_kind in ((f'{name}/evil.png', kind), ('good.png', tarfile.REGTYPE)):
                info = tarfile.TarInfo(member)
                info.type, info.size, info.linkname = of_kind, len(picture.getvalue()) if of_kind == tarfile.REGTYPE else 0, name
                tar.addfile(info, io.BytesIO(picture.getvalue()) if info.size else None)
        dataset = DATASETS.build({'NAME': 'ImageTextTarDataset', 'SHARDS': [str(root / 'x.tar')], **CUT})
        assert 1 <= len(dataset) <= 2
        return b''.join(dataset[i]['image'].numpy().tobytes() for i in range(len(dataset)))

    survey(root, read)


@pytest.mark.parametrize('scheme', ['hf', 'ms'])
def test_files_of_repositories(root, scheme):
    def parse(name: str) -> bytes | None:
        place = root / hub.parse(f'{scheme}://org/model@{name}').file
        return place.read_bytes() if place.is_file() else None

    refused = survey(root, parse)

    assert set(NEVER) <= {*refused, ''}     # after @ nothing: no file is named


def test_keys_of_buckets(root, monkeypatch):
    oss = pytest.importorskip('tests.servers.oss')
    server = oss.OssServer()
    server.enter(monkeypatch)
    monkeypatch.setenv('SCEPTER_CACHE', str(root / 'cache'))

    def fetch(name: str) -> bytes:
        server.objects = {f'run/{name}': oss.Object(b'evil'), 'run/fine': oss.Object(b'fine')}
        folder = Path(FileSystem().get_dir_to_local_dir('oss://bucket/run', root / f'to-{hashlib.md5(name.encode()).hexdigest()}'))
        return b''.join(files(folder).values())

    try:
        refused = survey(root, fetch)
    finally:
        server.close()
    assert {'../outside', 'a/../../outside', '{outside}', '/etc/passwd', '..', '~/outside', '..\\outside', 'x' * 300} <= set(refused)


def test_rows_of_tables(root):
    def read(name: str) -> bytes | None:
        path = joined(str(root), name)
        assert '://' in path or Path(path).resolve().is_relative_to(root.resolve())
        return None

    refused = survey(root, read)

    assert {'../outside', 'a/../../outside', '{outside}', 'file://{outside}', '/etc/passwd', '..', '..\\outside', '/dev/stdin'} \
        <= set(refused)


def test_a_sheet_of_pictures_reads_none_outside(root):
    Image.new('RGB', (8, 8)).save(root / 'fine.png')

    def read(name: str) -> bytes:
        (root / 'metadata.jsonl').write_text(json.dumps({'file_name': name, 'text': 'x'}) + '\n')
        data = DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(root), **CUT})
        try:
            return data[0]['image'].numpy().tobytes()
        except Exception as error:      # what the loader reports of a sample
            raise DataError(str(error)) from error

    survey(root, read)
