"""hf:// through huggingface_hub itself, in a process of its own, against a hub on loopback that HF_ENDPOINT names."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.hub import HubServer, commit, sha256
from tests.servers.web import BODY

pytest.importorskip('huggingface_hub')

# reads each address, and tells its sha256 or the error, and to which machines it spoke
READ = '''
import hashlib, json, sys
called = set()
sys.addaudithook(lambda event, args: called.add(args[1][0]) if event == 'socket.connect' and isinstance(args[1], tuple) else None)
import scepter.core.stores
from scepter.core.errors import DataError
FS, told = scepter.core.stores.FS, {}
for path in sys.argv[1:]:
    try:
        told[path] = hashlib.sha256(FS.get_object(path)).hexdigest() if '@' in path else FS.list(FS.get_dir_to_local_dir(path))
    except DataError as error:
        told[path] = f'{error}'
print(json.dumps({'told': told, 'called': sorted(called)}))
'''


@pytest.fixture
def server() -> Iterator[HubServer]:
    running = HubServer()
    running.repos['org/model'] = {'main': {'vae/x.bin': BODY, 'config.json': b'{}', 'x.onnx': b'not for us'},
                                  'v1': {'vae/x.bin': BODY[::-1], 'config.json': b'{"v": 1}'}}
    yield running
    running.close()


@pytest.fixture
def read(tmp_path, server) -> Any:
    def reader(*paths: str, **more: str) -> tuple[dict[str, Any], list[str]]:
        env = {**os.environ, 'HF_ENDPOINT': server.url, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1', 'HF_TOKEN': '',
               'SCEPTER_CACHE': str(tmp_path / 'cache'), 'HF_HUB_ETAG_TIMEOUT': '3', 'HF_HUB_DOWNLOAD_TIMEOUT': '3', **more}
        for name in ('HF_HUB_CACHE', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HTTP_PROXY', 'http_proxy'):
            if name not in more:
                env.pop(name, None)
        done = subprocess.run([sys.executable, '-c', READ, *paths], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout.splitlines()[-1])
        return answer['told'], answer['called']
    return reader


def test_files_revisions_and_folders_come_into_the_cache_that_other_libraries_share(read, server, tmp_path):
    pinned = f'hf://org/model:{commit(server.repos["org/model"]["v1"])}@vae/x.bin'

    told, called = read('hf://org/model@vae/x.bin', 'hf://org/model:v1@vae/x.bin', pinned, 'hf://org/model', 'hf://org/none@x')

    assert told['hf://org/model@vae/x.bin'] == sha256(BODY)
    assert told['hf://org/model:v1@vae/x.bin'] == told[pinned] == sha256(BODY[::-1])
    assert told['hf://org/model'] == ['config.json', 'vae/x.bin'] and 'org/none' in told['hf://org/none@x'] and called == ['127.0.0.1']
    root = tmp_path / 'home' / 'hub' / 'models--org--model'
    sha = (root / 'refs' / 'main').read_text()
    assert sha == commit(server.repos['org/model']['main'])
    assert (root / 'snapshots' / sha / 'vae' / 'x.bin').resolve() == root / 'blobs' / sha256(BODY)


def test_offline_the_cache_is_read_without_a_socket(read, server):
    read('hf://org/model@vae/x.bin', 'hf://org/model@config.json')
    asked = len(server.requests)

    for word in ('HF_HUB_OFFLINE', 'SCEPTER_OFFLINE'):
        told, called = read('hf://org/model@vae/x.bin', 'hf://org/model', 'hf://org/model:v1@vae/x.bin', **{word: '1'})

        assert told['hf://org/model@vae/x.bin'] == sha256(BODY) and told['hf://org/model'] == ['config.json', 'vae/x.bin']
        assert 'hf://org/model:v1@vae/x.bin' in told['hf://org/model:v1@vae/x.bin'] and called == []
    assert len(server.requests) == asked


def test_a_flipped_bit_is_found_though_the_library_itself_takes_the_file(read, server, tmp_path):
    server.fault = 'always_flipped'

    told, _ = read('hf://org/model@vae/x.bin')

    assert f'damaged: sha256 {sha256(BODY)} expected' in told['hf://org/model@vae/x.bin']
    blob: Path = tmp_path / 'home' / 'hub' / 'models--org--model' / 'blobs' / sha256(BODY)
    assert blob.stat().st_size == len(BODY)      # what huggingface_hub was content with


def test_a_private_repository_takes_the_token_and_no_message_holds_it(read, server):
    server.token = 'hf_token_of_the_tests'

    told, _ = read('hf://org/model@vae/x.bin', HF_TOKEN='hf_token_that_is_wrong')
    assert '401' in told['hf://org/model@vae/x.bin'] and 'hf_token' not in told['hf://org/model@vae/x.bin']
    told, _ = read('hf://org/model@vae/x.bin', HF_TOKEN=server.token)
    assert told['hf://org/model@vae/x.bin'] == sha256(BODY)
