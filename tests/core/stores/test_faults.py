"""No wrong byte at a final path, whatever a server, a kill, a full disk or seven other processes do; and no way into the user's network."""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scepter.core.errors import DataError
from scepter.core.stores import guard
from scepter.core.stores.fetch import Cache
from scepter.core.stores.front import FileSystem
from tests.servers import faults
from tests.servers.watch import Watcher
from tests.servers.web import BODY, SHA, WebServer

QUICK = {'NAME': 'HttpFs', 'TIMEOUT': 0.3, 'RETRY_DELAY': 0.01, 'RETRY_TIMES': 3}


@pytest.fixture
def fs(tmp_path, monkeypatch) -> FileSystem:
    monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'cache'))
    system = FileSystem()
    system.init_fs_client(QUICK)
    return system


@pytest.fixture
def server() -> Iterator[WebServer]:
    running = WebServer()
    yield running
    running.close()


# -------------------------------------------------------------------- faults of servers
@pytest.mark.parametrize('fault', [*faults.PASSING, *faults.LASTING])
def test_through_every_fault_there_is_the_right_file_or_none(fs, server, fault):
    url = f'{server.url}/{fault}/x.bin?token=secret#sha256={SHA}'
    begin = time.monotonic()

    with Watcher(fs.cache / 'files', SHA) as watcher:
        if fault in faults.PASSING or fault == 'no_length_cut':     # known by its sha256, it may come the third time
            assert fs.get_object(url) == BODY
        else:
            with pytest.raises(DataError) as error:
                fs.get_object(url)
            assert 'secret' not in str(error.value) and f'{server.url}/{fault}/x.bin' in str(error.value)

    assert watcher.looks and not watcher.wrong and time.monotonic() - begin < 20


def test_the_watcher_sees_a_wrong_byte(tmp_path):
    with Watcher(tmp_path, SHA) as watcher:
        (tmp_path / 'part').write_bytes(BODY[:1000])
        time.sleep(0.05)
        (tmp_path / 'part').write_bytes(BODY)

    assert watcher.wrong


@pytest.mark.slow
@pytest.mark.parametrize('fault', ['stall', 'drip', 'always_500', 'cut_always_from_the_start'])
def test_with_the_usual_settings_a_lasting_fault_is_told_within_20_seconds(tmp_path, monkeypatch, server, fault):
    monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'cache'))
    server.patience = 30.0
    begin = time.monotonic()

    with pytest.raises(DataError, match='gave up'):
        FileSystem().get_object(f'{server.url}/{fault}/x.bin')

    assert time.monotonic() - begin < 20.5


# -------------------------------------------------------------------- many processes
def _fetch_all(url: str, has_locks: bool, results: Any) -> None:
    if not has_locks:
        fcntl.flock = lambda *args: None
    system = FileSystem()
    system.init_fs_client({**QUICK, 'TIMEOUT': 9.0})
    for k in range(20):
        results.put(hashlib.sha256(system.get_object(f'{url}/cut/{k}')).hexdigest())


@pytest.mark.parametrize('has_locks', [True, False], ids=['with locks', 'locks do nothing'])
def test_eight_processes_fetch_the_same_twenty_files(fs, server, has_locks):
    server.body = BODY[:99_999]
    sha, fork = hashlib.sha256(server.body).hexdigest(), multiprocessing.get_context('fork')
    results = fork.Queue()
    processes = [fork.Process(target=_fetch_all, args=(server.url, has_locks, results)) for _ in range(8)]
    with Watcher(fs.cache / 'files', sha) as watcher:
        for process in processes:
            process.start()
        found = [results.get(timeout=60) for _ in range(160)]
        for process in processes:
            process.join()

    assert found == [sha] * 160 and not watcher.wrong
    assert len(server.gets) == 60 if has_locks else 60 <= len(server.gets) <= 480      # three thirds of each file


# -------------------------------------------------------------------- kills and disks
@pytest.mark.parametrize('kills', [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_download_leaves_nothing_that_looks_whole_and_its_orphans_go(fs, server, kills):
    dice, url = random.Random(0), f'{server.url}/drip/x.bin#sha256={SHA}'
    with Watcher(fs.cache / 'files', SHA) as watcher:
        for kill in range(kills):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    FileSystem().get_object(url if kill % 2 else f'{server.url}/fine/{kill}#sha256={SHA}')
                os._exit(0)
            time.sleep(dice.uniform(0.01, 0.08))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    left = list(fs.cache.glob('files/*/.tmp-*'))
    for folder in left:
        os.utime(folder, (time.time() - 7200,) * 2)
        for file in folder.iterdir():
            os.utime(file, (time.time() - 7200,) * 2)

    assert left and not watcher.wrong
    assert fs.get_object(f'{server.url}/fine/after#sha256={SHA}') == BODY and not list(fs.cache.glob('files/*/.tmp-*'))


def test_a_disk_that_fills_up_meanwhile_is_told_and_leaves_nothing(fs, server, tmp_path):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            fs.get_object(f'{server.url}/fine/x')
        except DataError as error:
            (tmp_path / 'told').write_text(str(error))
        os._exit(0)
    os.waitpid(child, 0)

    assert f'no space for {server.url}/fine/x' in (tmp_path / 'told').read_text()
    assert not [p for p in fs.cache.rglob('*') if p.is_file()]


def test_a_disk_without_room_is_told_before_a_byte_is_asked_for(fs, server):
    with pytest.raises(DataError, match=r'no space for .* bytes needed'):
        fs.get_object(f'{server.url}/huge/x')

    assert len(server.gets) == 1


def test_a_cache_that_cannot_be_written_is_told_and_what_it_holds_is_used(fs, server, tmp_path, monkeypatch):
    url = f'{server.url}/fine/x#sha256={SHA}'
    fs.get_object(url)
    monkeypatch.setenv('SCEPTER_CACHE', '/sys/scepter')      # nobody, root neither, makes folders there

    with pytest.raises(DataError, match=r'the cache /sys/scepter cannot be written: .* SCEPTER_CACHE names another folder'):
        FileSystem().get_object(url)

    if os.path.exists('/usr/bin/unshare'):
        monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'cache'))
        code = f'from scepter.core.stores import FS; print(len(FS.get_object({url!r})))'
        cache = tmp_path / 'cache'
        script = f'mount --bind {cache} {cache} && mount -o remount,bind,ro {cache} && {sys.executable} -c "{code}"'
        done = subprocess.run(['unshare', '-rm', 'sh', '-c', script], capture_output=True, text=True, cwd=Path(__file__).parents[3])
        if 'mount' not in done.stderr and 'unshare' not in done.stderr:     # a machine that lets nobody mount
            assert done.stdout.strip() == str(len(BODY)), done.stderr


# -------------------------------------------------------------------- addresses that a stranger wrote
INSIDE = ['127.0.0.1', '127.1', '0x7f000001', '2130706433', 'localhost', '10.0.0.1', '172.16.0.1', '192.168.1.1', '169.254.169.254',
          '0.0.0.0', '100.64.0.1', '224.0.0.1', '[::1]', '[::ffff:127.0.0.1]', '[fe80::1]', '[fc00::1]', '[64:ff9b::7f00:1]',
          '[2002:7f00:1::]', 'example.org@127.0.0.1']


@pytest.mark.parametrize('host', INSIDE)
def test_an_address_of_a_stranger_reaches_no_machine_inside(fs, monkeypatch, host):
    monkeypatch.setattr(socket, 'create_connection', lambda *args, **kwargs: pytest.fail(f'a connection to {args[0]}'))

    with fs.public_only(), pytest.raises(DataError, match='not of the public network'):
        fs.get_object(f'http://{host}/latest/meta-data')


@pytest.mark.parametrize('path', ['file:///etc/passwd', 'ftp://127.0.0.1/x', 'oss://bucket/x', 'memory://x', 'sftp://host/x', 'gopher://x/y'])
def test_an_address_of_a_stranger_asks_no_other_kind_of_store(fs, path):
    with fs.public_only(), pytest.raises(DataError, match=r'a stranger named it, and may name http://|no client for'):
        fs.get_object(path)


def test_neither_a_redirect_nor_a_second_answer_of_the_name_server_leads_inside(fs, server, monkeypatch):
    """The server of the tests stands for a public one: only the numbers that a name means are turned."""
    real, asked = socket.getaddrinfo, []

    def resolve(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        number = '93.184.216.34' if host == 'public.example' and asked.count(host) == 1 else '127.0.0.1'
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (number, port))]

    dialled: list[Any] = []

    def dial(address: Any, *args: Any, **kwargs: Any) -> socket.socket:
        dialled.append(address)
        sock = socket.socket()
        sock.connect(real('127.0.0.1', server.port)[0][4])
        return sock

    monkeypatch.setattr(socket, 'getaddrinfo', resolve)
    monkeypatch.setattr(socket, 'create_connection', dial)
    fs.init_fs_client({**QUICK, 'RETRY_TIMES': 0})

    with fs.public_only(), pytest.raises(DataError, match=r'leads to 127.0.0.1, which is not of the public network'):
        fs.get_object(f'http://public.example:{server.port}/moved/x')       # its HEAD is answered, its GET redirects to localhost

    assert dialled == [('93.184.216.34', server.port)] and asked[:2] == ['public.example', 'public.example']


def test_what_the_user_names_is_fetched_wherever_it_lies(fs, server):
    url = f'{server.url}/fine/mine'

    with fs.public_only(but=[url]):
        assert fs.get_object(url) == BODY
        with pytest.raises(DataError, match='not of the public network'):
            fs.get_object(f'{server.url}/fine/theirs')
    assert fs.get_object(f'{server.url}/fine/theirs') == BODY


@pytest.mark.parametrize('number', ['93.184.216.34', '8.8.8.8', '2606:2800:220:1:248:1893:25c8:1946', '::ffff:8.8.8.8'])
def test_public_numbers_are_public(number):
    assert guard.is_public(number)


def test_a_file_without_end_is_cut_off(fs, server):
    fs.init_fs_client({**QUICK, 'LARGEST': 100_000})

    for fault in ('fine', 'chunked', 'no_length'):
        with pytest.raises(DataError, match='more than the 100,000 bytes that LARGEST allows'):
            fs.get_object(f'{server.url}/{fault}/x#sha256={SHA}')
    assert not list(Cache(fs.cache).entry(f'{server.url}/fine/x').iterdir())
