"""ms://, against a hub on loopback."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scepter.core.errors import DataError
from scepter.core.stores.front import FileSystem
from tests.servers.modelscope import ModelscopeServer
from tests.servers.web import BODY


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[ModelscopeServer]:
    running = ModelscopeServer()
    running.repos['org/model.v1', 'master'] = {'vae/x.bin': BODY, 'vae/config.json': b'{}', 'a b.txt': b'two words'}
    running.repos['org/model.v1', 'v2'] = {'vae/x.bin': b'other'}
    monkeypatch.setenv('MODELSCOPE_ENDPOINT', running.url)
    monkeypatch.setenv('MODELSCOPE_CACHE', str(tmp_path / 'library'))
    monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('MODELSCOPE_API_TOKEN', raising=False)
    yield running
    running.close()


@pytest.fixture
def fs(server) -> FileSystem:
    system = FileSystem()
    system.init_fs_client({'NAME': 'ModelscopeFs', 'TIMEOUT': 0.4, 'RETRY_DELAY': 0.01, 'RETRY_TIMES': 3})
    return system


def test_files_folders_and_revisions_are_read(fs, server):
    assert fs.get_object('ms://org/model.v1@vae/x.bin') == BODY and fs.get_object('ms://org/model.v1:v2@vae/x.bin') == b'other'
    assert fs.get_object('ms://org/model.v1@a b.txt') == b'two words'
    assert fs.get_object('ms://org/model.v1@vae/x.bin', start=10, size=20) == BODY[10:30]
    with fs.get_dir_to_local_dir('ms://org/model.v1', wait_finish=True) as local:
        assert (Path(local) / 'vae' / 'x.bin').read_bytes() == BODY
    assert fs.list('ms://org/model.v1@vae') == ['config.json', 'x.bin'] and fs.size('ms://org/model.v1@vae/x.bin') == len(BODY)
    assert [fs._kind(f'ms://org/{name}') for name in ('model.v1', 'model.v1@vae', 'model.v1@vae/x.bin', 'model.v1@no', 'none')] == [
        'folder', 'folder', 'file', None, None]


@pytest.mark.parametrize('fault', ['cut', 'flaky', 'flipped', 'wrong_range', 'no_length_cut'])
def test_a_passing_fault_is_overcome(fs, server, fault):
    server.fault = fault

    assert fs.get_object('ms://org/model.v1@vae/x.bin') == BODY


def test_a_flipped_bit_is_found_by_the_sha256_of_the_list(fs, server):
    server.fault = 'always_flipped'

    with pytest.raises(DataError, match=r'ms://org/model.v1@vae/x.bin: gave up after 4 tries: sha256 [0-9a-f]{64} expected'):
        fs.get_object('ms://org/model.v1@vae/x.bin')


def test_what_is_missing_is_told_by_its_address(fs, server):
    for path, words in {'ms://org/none@x': '404', 'ms://org/model.v1@none': 'has no file none', 'ms://org/model.v1@../x': 'refused',
                        'ms://org/model.v1:../../x@y': 'expected ms://org/model', 'ms://org/model.v1': 'name the file as well'}.items():
        with pytest.raises(DataError, match=words):
            fs.get_object(path)


def test_the_token_goes_to_the_hub_and_into_no_message(fs, server, monkeypatch):
    server.token = 'a-token-of-the-tests'
    with pytest.raises(DataError, match='403'):
        fs.get_object('ms://org/model.v1@vae/x.bin')

    monkeypatch.setenv('MODELSCOPE_API_TOKEN', server.token)

    assert fs.get_object('ms://org/model.v1@vae/x.bin') == BODY and server.authorizations[-1] == 'Bearer a-token-of-the-tests'


def test_a_copy_of_the_hubs_own_library_is_taken_where_it_is_the_same_file(fs, server, tmp_path):
    for name, body in {'models/org--model.v1/snapshots/master/vae/x.bin': BODY, 'hub/models/org/model___v1/a b.txt': b'changed'}.items():
        (tmp_path / 'library' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'library' / name).write_bytes(body)

    assert fs.get_object('ms://org/model.v1@vae/x.bin') == BODY and fs.get_object('ms://org/model.v1@a b.txt') == b'two words'

    assert [name for name, _ in server.gets] == ['a b.txt']


def test_offline_the_copies_that_are_here_will_do(fs, server, monkeypatch):
    fs.get_object('ms://org/model.v1@vae/x.bin')
    monkeypatch.setenv('SCEPTER_OFFLINE', '1')
    asked = len(server.authorizations)

    assert FileSystem().get_object('ms://org/model.v1@vae/x.bin') == BODY
    with pytest.raises(DataError, match=r'config.json was not fetched: SCEPTER_OFFLINE is set'):
        fs.get_object('ms://org/model.v1@vae/config.json')
    assert len(server.authorizations) == asked
