"""No key, token or password in whatever is printed, logged, saved or sent: runs that hold twelve of them, with every logger loud."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from scepter.core.config import Config
from scepter.core.stores.front import FileSystem
from tests.servers.web import WebServer

oss = pytest.importorskip('tests.servers.oss')
ROOT = Path(__file__).resolve().parents[1]
# where each secret comes from -> the secret; none is part of another
CANARIES = {name: f'canary{i:02}secret{i:02}x' for i, name in enumerate((
    'OSS_ACCESS_KEY_ID', 'OSS_ACCESS_KEY_SECRET', 'OSS_SESSION_TOKEN', 'HF_TOKEN', 'MODELSCOPE_API_TOKEN', 'MY_PASSWORD',
    'OSS_AK in the config', 'OSS_SK in the config', 'OSS_TOKEN in the config', 'password in an address', 'signature in an address',
    'token in an address'))}
LOUD = 'import logging\nlogging.basicConfig(level=logging.DEBUG)\n'


class Place:
    """Two servers, and a config that holds every secret."""

    def __init__(self, folder: Path):
        self.folder, self.bucket, self.web = folder, oss.OssServer(), WebServer()
        for name, variable in {'id': 'ACCESS_KEY_ID', 'secret': 'ACCESS_KEY_SECRET', 'token': 'SESSION_TOKEN'}.items():
            setattr(self.bucket, name, CANARIES[f'OSS_{variable}'])
        (folder / 'in').mkdir()
        (folder / 'in' / 'loud.py').write_text(LOUD)

    def address(self, fault: str) -> str:
        host = self.web.url.removeprefix('http://')
        return f'http://me:{CANARIES["password in an address"]}@{host}/{fault}/model.safetensors?Signature=' \
               f'{CANARIES["signature in an address"]}&token={CANARIES["token in an address"]}'

    def config(self, work_dir: str, **solver: Any) -> Path:
        keys = {name: CANARIES[f'{name} in the config'] for name in ('OSS_AK', 'OSS_SK', 'OSS_TOKEN')}
        stores = [{'NAME': 'AliyunOssFs', 'RETRY_TIMES': 0}, {'NAME': 'AliyunOssFs', 'BUCKET': 'another', **keys},
                  {'NAME': 'HttpFs', 'RETRY_TIMES': 1}]
        cfg = tiny.config(work_dir, 2, FILE_SYSTEM=stores, **solver)
        cfg.SOLVER.TRAIN_HOOKS.append(Config({'NAME': 'LogHook'}))
        file = self.folder / 'in' / 'train.yaml'
        file.write_text(str(Config({**cfg, 'ENV': {'DEVICE': 'cpu', 'THREADS': 1},
                                    'IMPORTS': [str(ROOT / 'tests/tiny.py'), str(self.folder / 'in' / 'loud.py')]})))
        return file

    def run(self, file: Path, *words: str, **env: str) -> tuple[int, str]:
        given = {name: secret for name, secret in CANARIES.items() if ' ' not in name}
        places = {'OSS_ENDPOINT': self.bucket.url, 'SCEPTER_CACHE': str(self.folder / 'out'), 'PYTHONPATH': str(ROOT / 'tests')}
        command = [sys.executable, 'scepter/run_train.py', '--cfg', str(file), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **given, **places, **env})
        return done.returncode, done.stdout + done.stderr

    def leaks(self, said: str) -> dict[str, str]:
        """Which secret is where: in what was said, in a file that was written, in the bucket."""
        written = [p for p in self.folder.rglob('*') if p.is_file() and p.parent.name != 'in']
        found = {'said': said.encode(), **{str(p): p.read_bytes() for p in written},
                 **{f'oss://{key}': kept.body for key, kept in self.bucket.objects.items()}}
        return {name: place for name, secret in CANARIES.items() for place, body in found.items() if secret.encode() in body}


@pytest.fixture
def place(tmp_path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.bucket.close()
    made.web.close()


def test_a_run_in_a_bucket_leaves_no_secret_anywhere(place):
    code, said = place.run(place.config('oss://bucket/run'), '--debug')

    assert code == 0, said
    assert {'run/log.txt', 'run/checkpoints/step-00000002/config.yaml'} <= set(place.bucket.objects) and 'DEBUG:urllib3' in said
    assert place.leaks(said) == {}


@pytest.mark.parametrize('fault, words', [('missing', '404'), pytest.param('to_signed', 'redirects', marks=pytest.mark.slow),
                                          pytest.param('fine', 'safetensors', marks=pytest.mark.slow)])
def test_an_error_about_an_address_holds_no_secret(place, fault, words):
    hook = {'NAME': 'PretrainedHook', 'PRETRAINED_MODEL': place.address(fault).replace('me:', 'me:${MY_PASSWORD}')}
    file = place.config(str(place.folder / 'out' / 'run'), TRAIN_HOOKS=[hook])

    code, said = place.run(file, '--debug')

    assert code in (3, 4) and words in said and 'Traceback' in said
    assert place.leaks(said) == {}


def test_a_store_that_says_the_keys_back_is_not_quoted(place):
    code, said = place.run(place.config('oss://bucket/run'), '--debug', OSS_ACCESS_KEY_SECRET='canary99secret99x')

    assert code == 4 and 'does not take the keys from the environment: SignatureDoesNotMatch' in said
    assert place.leaks(said) == {} and 'canary99' not in said


def test_nothing_that_holds_keys_shows_them(place, monkeypatch):
    for name, secret in CANARIES.items():
        if ' ' not in name:
            monkeypatch.setenv(name, secret)
    cfg = Config.load(place.config('oss://bucket/run'))
    client = FileSystem().init_fs_client(cfg.SOLVER.FILE_SYSTEM[1])

    shown = [repr(cfg), cfg.dump(is_secure=True), repr(client), repr(client.keys()), repr(client.cfg),
             repr(FileSystem().init_fs_client({'NAME': 'AliyunOssFs'}).keys())]

    assert place.leaks('\n'.join(shown)) == {} and 'Keys(from FILE_SYSTEM)' in shown


def test_the_canaries_sing_when_there_is_something_to_see(place):
    (place.folder / 'out').mkdir()
    (place.folder / 'out' / 'x').write_text(CANARIES['HF_TOKEN'])

    assert place.leaks(CANARIES['MY_PASSWORD']) == {'HF_TOKEN': str(place.folder / 'out' / 'x'), 'MY_PASSWORD': 'said'}
