"""s3:// through fsspec and s3fs, against moto's server on loopback."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scepter.core.errors import DataError
from scepter.core.stores.front import FileSystem

pytest.importorskip('s3fs')
moto = pytest.importorskip('moto.server')
BODY = bytes(range(256)) * 3000


@pytest.fixture
def fs(tmp_path, monkeypatch) -> Iterator[FileSystem]:
    import s3fs
    server = moto.ThreadedMotoServer(ip_address='127.0.0.1', port=0)
    server.start()
    port = server.get_host_and_port()[1]
    for name, value in {'AWS_ENDPOINT_URL': f'http://127.0.0.1:{port}', 'AWS_ACCESS_KEY_ID': 'id', 'AWS_SECRET_ACCESS_KEY': 'secret',
                        'AWS_DEFAULT_REGION': 'us-east-1', 'SCEPTER_CACHE': str(tmp_path / 'cache')}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs('bucket', exist_ok=True)
    system = FileSystem()
    system.init_fs_client({'NAME': 'FsspecFs', 'SCHEMES': ['s3'], 'RETRY_TIMES': 1, 'RETRY_DELAY': 0.01})
    yield system
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_is_written_asked_and_read(fs, tmp_path):
    for name in ('a.bin', 'sub/b c.bin'):
        fs.put_object(BODY, f's3://bucket/run/{name}')

    assert fs.list('s3://bucket/run') == ['a.bin', 'sub/b c.bin'] and fs.size('s3://bucket/run/a.bin') == len(BODY)
    assert fs.get_object('s3://bucket/run/sub/b c.bin') == BODY and fs.get_object('s3://bucket/run/a.bin', 5, 7) == BODY[5:12]
    assert [fs._kind(f's3://bucket/{name}') for name in ('run', 'run/a.bin', 'none')] == ['folder', 'file', None]
    assert (Path(fs.get_dir_to_local_dir('s3://bucket/run', tmp_path / 'to')) / 'sub' / 'b c.bin').read_bytes() == BODY
    fs.put_object(b'other', 's3://bucket/run/a.bin')
    assert fs.get_object('s3://bucket/run/a.bin') == b'other'
    fs.delete_object('s3://bucket/run/a.bin')
    assert not fs.exists('s3://bucket/run/a.bin') and 'Signature' in fs.get_url('s3://bucket/run/sub/b c.bin')


def test_what_is_missing_or_refused_is_told(fs):
    with pytest.raises(DataError, match='s3://bucket/none: does not exist'):
        fs.get_object('s3://bucket/none')
    with pytest.raises(DataError, match='s3://nobody/a/x: does not exist'):      # and no bucket is made for a typo
        fs.put_object(b'x', 's3://nobody/a/x')
    assert not fs.exists('s3://nobody')


def test_a_server_that_is_gone_is_told(fs):
    options = {'endpoint_url': 'http://127.0.0.1:9'}
    fs.init_fs_client({'NAME': 'FsspecFs', 'SCHEMES': ['s3'], 'RETRY_TIMES': 1, 'RETRY_DELAY': 0.01, 'OPTIONS': options})

    with pytest.raises(DataError, match=r's3://bucket/x: gave up after 2 tries'):
        fs.get_object('s3://bucket/x')
