"""Weights, pictures and configs from every kind of store, through servers on loopback."""
from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny
from scepter.core.config import Config
from scepter.core.disk.tensors import write_tensors
from scepter.core.errors import DataError
from scepter.core.experiment import check_experiment, load_config
from scepter.core.faults import ConfigError
from scepter.core.registry import DATASETS, MODELS
from scepter.core.stores import FS
from scepter.run_train import main
from tests.servers.modelscope import ModelscopeServer
from tests.servers.web import WebServer

STORES = ['web', 'oss', 'ms', 'memory']
FOLDERS = STORES[1:]        # a web server lists nothing


class Everywhere:
    """Puts a file into a store, and tells its address and that of its folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.oss = pytest.importorskip('tests.servers.oss').OssServer()
        self.web, self.ms = WebServer(), ModelscopeServer()
        self.oss.enter(monkeypatch)
        monkeypatch.setenv('MODELSCOPE_ENDPOINT', self.ms.url)

    def put(self, store: str, name: str, body: bytes) -> tuple[str, str]:
        if store == 'web':
            self.web.files[f'/fine/{name}'] = body
            return f'{self.web.url}/fine/{name}', ''
        if store == 'ms':
            self.ms.repos.setdefault(('org/name', 'master'), {})[name] = body
            return f'ms://org/name@{name}', f'ms://org/name@{name.rpartition("/")[0]}'
        address = f'{"oss://bucket" if store == "oss" else "memory://place"}/{name}'
        FS.put_object(body, address)
        return address, address.rpartition('/')[0]


@pytest.fixture
def everywhere(tmp_path, monkeypatch) -> Iterator[Everywhere]:
    monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('MODELSCOPE_CACHE', str(tmp_path / 'library'))
    before = dict(FS._clients)
    FS._clients.clear()
    made = Everywhere(monkeypatch)
    yield made
    for server in (made.oss, made.web, made.ms):
        server.close()
    FS._clients = before
    FS._fetched.clear()
    if 'fsspec' in sys.modules:
        sys.modules['fsspec'].filesystem('memory').store.clear()


@pytest.mark.parametrize('store', STORES)
def test_weights_come_from_any_store(everywhere, tmp_path, store):
    config = tiny.autoencoder(1, 1)
    model = MODELS.build(config)
    write_tensors(tmp_path / 'vae.safetensors', model.state_dict())
    address, _ = everywhere.put(store, 'weights/vae.safetensors', (tmp_path / 'vae.safetensors').read_bytes())

    other = MODELS.build({**config, 'PRETRAINED_MODEL': address})

    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize('store', FOLDERS)
def test_pictures_come_from_any_store_that_lists_its_folders(everywhere, store):
    for name, colour in (('a', 'red'), ('b', 'blue')):
        picture = io.BytesIO()
        Image.new('RGB', (8, 8), colour).save(picture, 'png')
        everywhere.put(store, f'photos/deep/{name}.png', picture.getvalue())
        _, folder = everywhere.put(store, f'photos/deep/{name}.txt', f'a {colour} square'.encode())

    data = DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': folder, 'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': 8}]})

    assert [data[i]['prompt'] for i in range(2)] == ['a red square', 'a blue square'] and float(data[0]['image'][0].mean()) == 1.0


@pytest.mark.parametrize('store', STORES)
def test_a_config_comes_from_any_store_and_what_it_would_carry_out_is_left_alone(everywhere, tmp_path, monkeypatch, store):
    evil = tmp_path / f'evil_of_{store}.py'
    evil.write_text(f'open({str(tmp_path / "canary")!r}, "w")')
    monkeypatch.setenv('MY_API_KEY', 'a-key-of-the-user')
    text = Config({**tiny.config(tmp_path / 'run', 2), 'IMPORTS': [str(evil)]})
    text.SOLVER.FILE_SYSTEM = {'NAME': 'AliyunOssFs', 'ENDPOINT': 'http://127.0.0.1:9'}
    text.SOLVER.RESUME_FROM = '/nowhere/${MY_API_KEY}'
    address, _ = everywhere.put(store, 'configs/train.yaml', str(text).encode())
    before = FS._clients.get('oss://')

    assert main(['--cfg', address, '--check']) == 0
    assert main(['--cfg', address, 'SOLVER.RESUME_FROM=null']) == 0

    assert not (tmp_path / 'canary').exists() and (tmp_path / 'run' / 'checkpoints' / 'step-00000002').is_dir()
    assert FS._clients.get('oss://') is before or FS._clients['oss://'].ENDPOINT is None
    assert load_config(address).SOLVER.RESUME_FROM == '/nowhere/${MY_API_KEY}'
    assert main(['--cfg', address, '--imports', str(evil), '--check']) == 0 and (tmp_path / 'canary').exists()     # the user's own word



def test_a_config_that_is_not_there_is_told(everywhere):
    with pytest.raises(DataError, match=f'{everywhere.web.url}/missing/x.yaml: 404'):
        load_config(f'{everywhere.web.url}/missing/x.yaml?token=secret')


@pytest.mark.parametrize('many', [False, True], ids=['one', 'a list'])
def test_file_system_says_how_stores_are_reached(everywhere, tmp_path, monkeypatch, many):
    monkeypatch.delenv('OSS_ENDPOINT')
    node: Any = {'NAME': 'AliyunOssFs', 'ENDPOINT': everywhere.oss.url, 'BUCKET': 'bucket', 'TEMP_DIR': str(tmp_path / 'copies')}
    cfg = tiny.config('oss://bucket/run', 2, FILE_SYSTEM=[{'NAME': 'HttpFs', 'TIMEOUT': 3}, node] if many else node)
    check_experiment(cfg)

    tiny.run(cfg)

    assert 'run/checkpoints/step-00000002/MANIFEST.json' in everywhere.oss.objects
    FS._fetched.clear()
    assert Path(FS.get_from('oss://bucket/run/log.txt')).is_relative_to(tmp_path / 'copies')


def test_a_typo_in_file_system_is_told_at_its_place(tmp_path):
    with pytest.raises(ConfigError, match=r'SOLVER.FILE_SYSTEM\[1\].ENDPONT: no such parameter; did you mean ENDPOINT\?'):
        check_experiment(tiny.config(tmp_path, 2, FILE_SYSTEM=[{'NAME': 'HttpFs'}, {'NAME': 'AliyunOssFs', 'ENDPONT': 'x'}]))
    with pytest.raises(ConfigError, match='FILE_SYSTEMS has no OssFs'):
        check_experiment(tiny.config(tmp_path, 2, FILE_SYSTEM={'NAME': 'OssFs'}))
