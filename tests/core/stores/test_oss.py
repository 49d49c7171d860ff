"""oss:// through oss2, against a server on loopback that checks signatures; the same tests run on a real bucket where OSS_TEST_* is set."""
from __future__ import annotations

import hashlib
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from scepter.core.errors import DataError
from scepter.core.stores.front import FileSystem
from tests.servers import faults
from tests.servers.watch import Watcher
from tests.servers.web import BODY, SHA

oss = pytest.importorskip('tests.servers.oss')    # needs oss2
QUICK = {'NAME': 'AliyunOssFs', 'TIMEOUT': 0.4, 'RETRY_DELAY': 0.01, 'RETRY_TIMES': 3, 'PART_SIZE': 200_000}
REAL = [os.environ.get(f'OSS_TEST_{name}') for name in ('ENDPOINT', 'BUCKET', 'ACCESS_KEY_ID', 'ACCESS_KEY_SECRET')]


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[oss.OssServer]:
    running = oss.OssServer()
    monkeypatch.setenv('HOME', str(tmp_path))
    running.enter(monkeypatch)
    yield running
    running.close()


@pytest.fixture
def fs(tmp_path, monkeypatch, server) -> FileSystem:
    monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'cache'))
    system = FileSystem()
    system.init_fs_client(QUICK)
    return system


@pytest.fixture(params=['on loopback', pytest.param('real', marks=pytest.mark.skipif(None in REAL, reason='OSS_TEST_* names no bucket'))])
def place(request, tmp_path, monkeypatch) -> Iterator[tuple[FileSystem, str]]:
    """A front, and a folder of a bucket to work in: the same tests hold for the server of the tests and for the real store."""
    monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'cache'))
    system = FileSystem()
    if request.param == 'real':
        endpoint, bucket, key, secret = REAL
        system.init_fs_client({'NAME': 'AliyunOssFs', 'ENDPOINT': endpoint, 'OSS_AK': key, 'OSS_SK': secret, 'PART_SIZE': 200_000})
        root = f'oss://{bucket}/scepter-tests-{uuid.uuid4().hex}'
        yield system, root
        for address in list(system.walk_dir(root)) if system.exists(root) else []:
            system.delete_object(address)
    else:
        server = request.getfixturevalue('server')
        system.init_fs_client(QUICK)
        server.page = 2
        yield system, 'oss://bucket/root'


# -------------------------------------------------------------------- what a bucket does
@pytest.mark.parametrize('size', [0, 1, 1000, len(BODY)], ids=['empty', 'a byte', 'whole', 'in parts'])
def test_what_is_put_comes_back(place, size):
    fs, root = place

    fs.put_object(BODY[:size], f'{root}/a b/é+%.bin')

    assert fs.get_object(f'{root}/a b/é+%.bin') == BODY[:size] and fs.size(f'{root}/a b/é+%.bin') == size


def test_folders_go_there_and_back(place, tmp_path):
    fs, root = place
    for name in ('a.txt', 'sub/b.txt', 'sub/deep/c.txt'):
        (tmp_path / 'from' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'from' / name).write_text(name)

    fs.put_dir_from_local_dir(tmp_path / 'from', root)

    assert fs.list(root) == ['a.txt', 'sub/b.txt', 'sub/deep/c.txt']
    assert list(fs.walk_dir(root, recurse=False)) == [f'{root}/a.txt']
    assert [fs.isfile(f'{root}/{name}') for name in ('a.txt', 'sub', 'none')] == [True, False, False]
    assert [fs.isdir(f'{root}/{name}') for name in ('a.txt', 'sub', 'su')] == [False, True, False]
    with fs.get_dir_to_local_dir(f'{root}/sub', tmp_path / 'to', wait_finish=True) as local:
        assert (Path(local) / 'deep' / 'c.txt').read_text() == 'sub/deep/c.txt'
    fs.delete_object(f'{root}/a.txt')
    assert not fs.exists(f'{root}/a.txt')
    with pytest.raises(DataError, match='none: does not exist'):
        fs.list(f'{root}/none')


def test_parts_of_a_file_are_read_alone(place):
    fs, root = place
    fs.put_object(BODY, f'{root}/x')

    assert fs.get_object(f'{root}/x', start=1000, size=500) == BODY[1000:1500]
    assert fs.get_object(f'{root}/x', start=len(BODY) - 3, size=500) == BODY[-3:]
    assert fs.get_object(f'{root}/x', start=len(BODY), size=5) == b''


def test_a_signed_address_reads_without_keys_and_another_does_not(place):
    fs, root = place
    fs.put_object(BODY, f'{root}/x y')
    url = fs.get_url(f'{root}/x y', seconds=60)

    with urllib.request.urlopen(url) as answer:
        assert answer.read() == BODY
    with pytest.raises(urllib.error.HTTPError, match='403'):
        urllib.request.urlopen(url.replace('Signature=', 'Signature=x'))


def test_a_file_that_was_replaced_is_fetched_anew_by_who_replaced_it_and_by_the_next_process(place):
    fs, root = place
    for content in (b'one', b'two'):
        fs.put_object(content, f'{root}/x')
        assert fs.get_object(f'{root}/x') == content and Path(fs.get_dir_to_local_dir(root), 'x').read_bytes() == content

    client = fs.get_fs_client(f'{root}/x')
    later = FileSystem()
    later.init_fs_client({'NAME': 'AliyunOssFs', **client.cfg})
    assert later.get_object(f'{root}/x') == b'two'


def test_wrong_keys_are_told_without_them(place, monkeypatch):
    _, root = place
    fs = FileSystem()
    endpoint = REAL[0] if 'scepter-tests' in root else os.environ['OSS_ENDPOINT']
    fs.init_fs_client({**QUICK, 'ENDPOINT': endpoint, 'OSS_AK': 'LTAI5tWrongWrongWrong', 'OSS_SK': 'wrong-secret-wrong-secret'})

    with pytest.raises(DataError, match='does not take the keys from FILE_SYSTEM: InvalidAccessKeyId') as error:
        fs.get_object(f'{root}/x')

    assert 'WrongWrong' not in str(error.value) and 'wrong-secret' not in str(error.value)


def test_a_file_that_grows_is_sent_by_its_new_bytes_and_made_anew_where_what_is_there_is_another(place, tmp_path):
    fs, root = place
    log = tmp_path / 'log.txt'
    for text in ('one\n', 'one\ntwo\n', 'one\ntwo\n', 'another\n', ''):
        log.write_text(text)
        fs.extend_object_from_local_file(log, f'{root}/log.txt')
        assert fs.get_object(f'{root}/log.txt') == text.encode()

    fs.put_object(b'no log', f'{root}/log.txt')
    log.write_text('no log at all')
    fs.extend_object_from_local_file(log, f'{root}/log.txt')
    assert fs.get_object(f'{root}/log.txt') == b'no log at all'


# -------------------------------------------------------------------- faults
@pytest.mark.parametrize('fault', [*faults.PASSING, 'no_length_cut'])    # what is cut without a word is found by its crc
def test_a_passing_fault_is_overcome_and_no_wrong_byte_is_ever_seen(fs, server, fault):
    server.objects['m/x.bin'], server.fault = oss.Object(BODY), fault

    with Watcher(fs.cache / 'files', SHA) as watcher:
        assert fs.get_object('oss://bucket/m/x.bin') == BODY

    assert not watcher.wrong


@pytest.mark.parametrize('fault, words', [
    ('always_500', 'gave up after 4 tries: 500'), ('missing', 'does not exist'), ('forbidden', '403'),
    ('stall', 'gave up after 4 tries: no answer in time'), ('drip', 'gave up after 4 tries: (stalled|no answer)'),
    ('cut_always_from_the_start', 'gave up after 4 tries'),
    *((fault, 'redirects, which is not followed') for fault in ('loop', 'to_file', 'to_private')),
    ('always_flipped', 'gave up after 4 tries: crc64 [0-9]+ expected'), ('gzipped', 'gave up after 4 tries: 768000 bytes expected'),
    ('empty', 'gave up after 4 tries: 768000 bytes expected, 0 received')])
def test_a_lasting_fault_is_told_soon_and_leaves_nothing(fs, server, fault, words):
    server.objects['m/x.bin'], server.fault = oss.Object(BODY), fault
    begin = time.monotonic()

    with Watcher(fs.cache / 'files', SHA) as watcher:
        with pytest.raises(DataError, match=words) as error:
            fs.get_object('oss://bucket/m/x.bin')

    assert oss.SECRET not in str(error.value) and oss.ID not in str(error.value)
    assert not watcher.wrong and time.monotonic() - begin < 20


@pytest.mark.parametrize('size', [1000, len(BODY)], ids=['whole', 'in parts'])
@pytest.mark.parametrize('fault', ['flaky', 'flipped', 'answer_lost'])
def test_what_breaks_on_the_way_there_is_sent_again(fs, server, fault, size):
    server.put_fault = fault

    fs.put_object(BODY[:size], 'oss://bucket/x')

    assert server.objects['x'].body == BODY[:size] and not server.uploads


def test_what_never_arrives_whole_is_told_and_an_upload_in_parts_is_given_up(fs, server):
    server.put_fault = 'always_500'
    with pytest.raises(DataError, match='oss://bucket/x: gave up after 4 tries: 500 InternalError'):
        fs.put_object(BODY, 'oss://bucket/x')
    assert not server.objects and not server.uploads

    server.put_fault = 'always_flipped'
    with pytest.raises(DataError, match=r'gave up after 4 tries: 10 bytes of crc64 [0-9]+ were sent, the store has 10 of [0-9]+'):
        fs.put_object(BODY[:10], 'oss://bucket/x')


def test_an_append_whose_answer_was_lost_is_not_made_twice_and_only_new_bytes_are_sent(fs, server, tmp_path):
    (tmp_path / 'log').write_bytes(BODY)
    server.put_fault = 'answer_lost'
    fs.extend_object_from_local_file(tmp_path / 'log', 'oss://bucket/log')
    (tmp_path / 'log').write_bytes(BODY + b'more')
    fs.extend_object_from_local_file(tmp_path / 'log', 'oss://bucket/log')

    assert server.objects['log'].body == BODY + b'more' and server.received['log'] == len(BODY) + 4


def test_an_append_goes_on_where_the_store_is_though_another_has_written_meanwhile(fs, server, tmp_path):
    (tmp_path / 'log').write_bytes(b'0123456789')
    server.objects['log'] = oss.Object(b'0123', can_grow=True)
    server.overtaken = b'012345'        # what is there when the append arrives

    fs.extend_object_from_local_file(tmp_path / 'log', 'oss://bucket/log')

    assert server.objects['log'].body == b'0123456789' and not server.overtaken


# -------------------------------------------------------------------- keys, tokens, clocks
def test_a_clock_that_is_wrong_is_told_with_how_much(fs, server):
    server.objects['x'], server.skew = oss.Object(b'x'), 4000

    with pytest.raises(DataError, match=r'the clock of this machine is (4,00\d|3,99\d) s earlier than that of the store'):
        fs.get_object('oss://bucket/x')


def test_a_token_that_has_passed_is_looked_for_anew(fs, server, monkeypatch):
    server.objects['x'] = server.objects['y'] = oss.Object(b'x')
    server.token = 'token-one-of-the-tests'
    monkeypatch.setenv('OSS_SESSION_TOKEN', server.token)
    assert fs.get_object('oss://bucket/x') == b'x'

    server.expired, server.token = {'token-one-of-the-tests'}, 'token-two-of-the-tests'
    with pytest.raises(DataError, match='y: the security token has passed: put a new one where it came from, the environment') as error:
        fs.get_object('oss://bucket/y')
    monkeypatch.setenv('OSS_SESSION_TOKEN', server.token)

    assert fs.get_object('oss://bucket/y') == b'x' and 'token-one' not in str(error.value)


def test_a_token_that_passes_during_a_run_is_taken_anew_without_a_word(fs, server, monkeypatch):
    server.objects['x'] = server.objects['y'] = oss.Object(b'x')
    server.token = 'token-one-of-the-tests'
    monkeypatch.setenv('OSS_SESSION_TOKEN', server.token)
    fs.get_object('oss://bucket/x')

    server.expired, server.token = {'token-one-of-the-tests'}, 'token-two-of-the-tests'
    monkeypatch.setenv('OSS_SESSION_TOKEN', server.token)

    assert fs.get_object('oss://bucket/y') == b'x'


def test_keys_are_found_in_the_file_of_ossutil(server, tmp_path, monkeypatch):
    for name in ('ENDPOINT', 'ACCESS_KEY_ID', 'ACCESS_KEY_SECRET'):
        monkeypatch.delenv(f'OSS_{name}')
    (tmp_path / '.ossutilconfig').write_text(f'[Credentials]\nlanguage=EN\nendpoint={server.url}\naccessKeyID={oss.ID}\n'
                                             f'accessKeySecret={oss.SECRET}\n')
    monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'cache'))
    server.objects['x'] = oss.Object(b'x')

    assert FileSystem().get_object('oss://bucket/x') == b'x'


def test_without_an_endpoint_it_is_said_how_to_give_one(fs, monkeypatch):
    monkeypatch.delenv('OSS_ENDPOINT')

    with pytest.raises(DataError, match='Set OSS_ENDPOINT, or FILE_SYSTEM'):
        fs.get_object('oss://bucket/x')


def test_each_bucket_may_have_a_client_of_its_own(fs, server):
    server.objects['x'] = server.objects['only/x'] = oss.Object(b'x')
    fs.init_fs_client({**QUICK, 'BUCKET': 'bucket', 'PREFIX': 'only', 'WRITABLE': False})

    fs.put_object(b'y', 'oss://bucket/y')
    with pytest.raises(DataError, match='this client is not WRITABLE'):
        fs.put_object(b'y', 'oss://bucket/only/y')
    assert fs.get_object('oss://bucket/only/x') == b'x'


@pytest.mark.parametrize('path', ['oss://', 'oss:///key', 'oss://bucket/..', 'oss://bucket/a/../b', 'oss://me:pw@bucket/x'])
def test_addresses_that_could_mean_another_place_are_refused(fs, path):
    with pytest.raises(DataError, match='expected oss://bucket/key'):
        fs.get_object(path)


def test_a_missing_bucket_is_called_so(fs):
    with pytest.raises(DataError, match=r'there is no such bucket|does not exist'):
        fs.get_object('oss://another/x')
    with pytest.raises(DataError, match='there is no such bucket'):
        fs.list('oss://another/x')


def test_a_read_goes_on_where_it_broke(fs, server):
    server.objects['x'], server.fault = oss.Object(BODY), 'cut'

    assert hashlib.sha256(fs.get_object('oss://bucket/x')).hexdigest() == SHA
    assert [span for _, span in server.gets] == [None, f'bytes={len(BODY) // 3}-', f'bytes={len(BODY) // 3 * 2}-']
