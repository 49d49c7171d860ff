"""Files from any store: whole or not at all, once per machine, and clear words when it cannot be."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scepter.core.disk import atomic
from scepter.core.errors import CheckpointError, DataError
from scepter.core.stores import hub
from scepter.core.stores.client import base_name, shown
from scepter.core.stores.fetch import Cache
from scepter.core.stores.front import FileSystem
from scepter.weights import local_copy
from tests.servers.web import BODY, SHA, WebServer


@pytest.fixture
def fs(tmp_path, monkeypatch) -> FileSystem:
    """A front of its own, with its own cache and no patience."""
    monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'cache'))
    system = FileSystem()
    system.init_fs_client({'NAME': 'HttpFs', 'TIMEOUT': 0.3, 'RETRY_DELAY': 0.01, 'RETRY_TIMES': 3})
    return system


# -------------------------------------------------------------------- local
def test_a_local_file_is_given_as_it_is(fs, tmp_path):
    (tmp_path / 'a b.txt').write_text('x')

    for path in (tmp_path / 'a b.txt', f'{tmp_path}/a b.txt', f'file://{tmp_path}/a%20b.txt'):
        with fs.get_from(path) as local:
            assert Path(local) == tmp_path / 'a b.txt'
    with fs.get_dir_to_local_dir(str(tmp_path), wait_finish=True) as local:
        assert local == str(tmp_path)
    assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize('get', ['get_from', 'get_dir_to_local_dir'])
def test_a_missing_local_path_names_its_nearest_relatives_and_is_not_created(fs, tmp_path, get):
    (tmp_path / 'weights').mkdir()

    with pytest.raises(DataError, match=rf'does not exist; the nearest folder that does is {tmp_path}; did you mean weights\?'), \
            getattr(fs, get)(tmp_path / 'weigths' / 'model'):
        pass

    assert not (tmp_path / 'weigths').exists()


def test_a_file_is_no_folder_and_a_folder_no_file(fs, tmp_path):
    (tmp_path / 'f').write_text('')

    with pytest.raises(DataError, match='is a file, a folder is expected'), fs.get_dir_to_local_dir(tmp_path / 'f'):
        pass
    with pytest.raises(DataError, match='is a folder, a file is expected'), fs.get_from(tmp_path):
        pass


def test_what_is_put_appears_whole_with_its_suffix_known_while_writing(fs, tmp_path):
    target = tmp_path / 'new' / 'deep' / 'x.png'

    with fs.put_to(target) as local:
        assert local.endswith('x.png') and Path(local).parent == target.parent
        Path(local).write_bytes(b'abc')
        assert not target.exists()

    assert target.read_bytes() == b'abc' and [p.name for p in target.parent.iterdir()] == ['x.png']


def test_a_failed_put_leaves_the_old_file_and_nothing_else(fs, tmp_path):
    (tmp_path / 'x').write_text('old')

    with pytest.raises(ZeroDivisionError), fs.put_to(tmp_path / 'x') as local:
        Path(local).write_text('half')
        raise ZeroDivisionError
    with pytest.raises(DataError, match=r'expects one file .* nothing was'), fs.put_to(tmp_path / 'x'):
        pass
    with pytest.raises(FileNotFoundError), fs.put_to(tmp_path / 'x'):
        open('/nowhere/at/all')     # the block's own errors stay what they are

    assert (tmp_path / 'x').read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['x']


def test_a_put_to_a_new_folder_is_local_though_it_looks_like_a_hub_id(fs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with fs.put_to('outputs/x.txt') as local:
        Path(local).write_text('x')

    assert Path('outputs/x.txt').read_text() == 'x'


def test_exists_list_and_remove(fs, tmp_path):
    (tmp_path / 'd' / 'e').mkdir(parents=True)
    for name in ('b', 'a', 'e/c'):
        (tmp_path / 'd' / name).write_text('')

    assert fs.list(tmp_path / 'd') == ['a', 'b', 'e/c'] and fs.exists(tmp_path / 'd') and not fs.exists(tmp_path / 'no')
    fs.delete_object(tmp_path / 'd' / 'a')
    assert fs.list(tmp_path / 'd') == ['b', 'e/c']
    with pytest.raises(DataError, match='does not exist'):
        fs.delete_object(tmp_path / 'd' / 'a')


def test_an_unknown_scheme_names_the_known_ones(fs):
    with pytest.raises(DataError, match=r'no client for nope://. There is file://, hf://, http://, https://'), fs.get_from('nope://b/k'):
        pass


# -------------------------------------------------------------------- a faulty web server
@pytest.fixture
def server() -> Iterator[WebServer]:
    running = WebServer()
    yield running
    running.close()


def fetch(fs: FileSystem, url: str) -> bytes:
    with fs.get_from(url) as local:
        return Path(local).read_bytes()


def cached_files(fs: FileSystem) -> list[Path]:
    return [p for p in fs.cache.rglob('*') if p.is_file()]


def test_a_web_file_is_fetched_once_under_its_own_name(fs, server):
    assert fetch(fs, f'{server.url}/fine/model.safetensors') == BODY
    assert fetch(fs, f'{server.url}/fine/model.safetensors') == BODY
    again = FileSystem()
    assert fetch(again, f'{server.url}/fine/model.safetensors') == BODY

    assert len(server.gets) == 1 and [p.name for p in cached_files(fs)] == ['model.safetensors']


def test_without_requests_a_copy_will_do_and_nothing_is_asked_but_what_was_allowed(fs, server):
    fetch(fs, f'{server.url}/fine/x')
    asked = len(server.gets)
    with fs.without_requests('a stranger named it', but=[f'{server.url}/fine/z#sha256={SHA}']):
        assert fetch(fs, f'{server.url}/fine/x') == BODY and len(server.gets) == asked
        for question in (fetch, FileSystem.exists):
            with pytest.raises(DataError, match='fine/y was not fetched: a stranger named it'):
                question(fs, f'{server.url}/fine/y')
        assert len(server.gets) == asked
        assert fetch(fs, f'{server.url}/fine/z') == BODY
    assert fetch(fs, f'{server.url}/fine/y') == BODY


def test_a_file_that_changed_on_the_server_is_fetched_anew_by_the_next_process(fs, server):
    fetch(fs, f'{server.url}/fine/x')
    server.etag, server.body = '"two"', b'new'

    assert fetch(fs, f'{server.url}/fine/x') == BODY        # what a process has seen once does not change under it
    assert fetch(FileSystem(), f'{server.url}/fine/x') == b'new'


def test_without_a_network_the_cached_copy_is_used(fs, server):
    fetch(fs, f'{server.url}/fine/x')
    fetch(fs, f'{server.url}/fine/y#sha256={SHA}')
    server.close()

    assert fetch(FileSystem(), f'{server.url}/fine/x') == BODY
    assert fetch(FileSystem(), f'{server.url}/fine/y#sha256={SHA}') == BODY


@pytest.mark.parametrize('fault, gets', [('cut', 3), ('flaky', 3), ('busy', 2), ('wrong-range', 3), ('range-refused', 3), ('chunked', 1),
                                         ('chunked-cut', 2), ('moved', 2), ('refused', 1), ('gone-away', 1)])
def test_a_passing_fault_is_overcome(fs, server, fault, gets):
    assert fetch(fs, f'{server.url}/{fault}/x.bin') == BODY
    assert len(server.gets) == gets


@pytest.mark.parametrize('fault', ['flipped', 'no-length', 'no-length-cut'])
def test_with_a_sha256_only_the_right_bytes_are_accepted(fs, server, fault):
    assert fetch(fs, f'{server.url}/{fault}/x.bin#sha256={SHA}') == BODY


def test_a_broken_transfer_goes_on_where_it_broke(fs, server):
    fetch(fs, f'{server.url}/cut/x')

    assert [span for _, span, _ in server.gets] == [None, f'bytes={len(BODY) // 3}-', f'bytes={len(BODY) // 3 * 2}-']


def test_the_rest_of_another_file_is_never_joined_to_a_beginning(fs, server):
    assert fetch(fs, f'{server.url}/cut-then-changed/x') == b'other'


@pytest.mark.parametrize('fault, words', [
    ('always-500', 'gave up after 4 tries: 500'), ('missing', '404 Not Found'), ('forbidden', '403 Forbidden'),
    ('stall', 'gave up after 4 tries: no answer in time'), ('drip', 'gave up after 4 tries: stalled'),
    ('cut-always-from-the-start', 'gave up after 4 tries: 768000 bytes expected, 1000 received'),
    ('no-length', 'tells no length.*Add #sha256='), ('no-length-cut', 'tells no length'), ('gzipped', 'gzip-encoded'),

    ('huge', r'no space for .* 1,099,511,627,776 bytes needed'), ('too-large', 'that LARGEST allows'),
    ('loop', '302 redirects without end'),
    ('to-file', 'or to an address that is refused'), ('to-signed', '302 redirects')])
def test_a_lasting_fault_is_told_and_leaves_nothing(fs, server, fault, words):
    with pytest.raises(DataError, match=words) as error:
        fetch(fs, f'{server.url}/{fault}/x.bin?token=secret')

    assert '/x.bin' in str(error.value) and 'secret' not in str(error.value) and error.value.exit_code == 3
    assert cached_files(fs) == []


def test_a_wrong_sha256_is_told_and_leaves_nothing(fs, server):
    with pytest.raises(DataError, match=f'gave up after 4 tries: sha256 {SHA} expected, [0-9a-f]{{64}} found'):
        fetch(fs, f'{server.url}/always-flipped/x#sha256={SHA}')
    with pytest.raises(DataError, match='takes 64 lower-case hex digits'):
        fetch(fs, f'{server.url}/fine/x#sha256=abc')

    assert cached_files(fs) == []


def test_an_empty_file_is_a_file(fs, server):
    assert fetch(fs, f'{server.url}/empty/x') == b''


def test_a_server_that_is_not_there_is_named(fs):
    with pytest.raises(DataError, match=r'http://127.0.0.1:9/x: gave up after 4 tries: .*refused'):
        fetch(fs, 'http://127.0.0.1:9/x')


def test_a_password_goes_to_its_host_alone_and_never_into_a_message(fs, server):
    host = server.url.removeprefix('http://')

    fetch(fs, f'http://me:secret@{host}/moved/x')
    with pytest.raises(DataError) as error:
        fetch(fs, f'http://me:secret@{host}/missing/x')

    assert [authorization for _, _, authorization in server.gets] == ['Basic bWU6c2VjcmV0', None]
    assert 'secret' not in str(error.value) and not [p for p in fs.cache.rglob('*') if 'secret' in str(p)]


def test_exists_is_false_only_where_the_server_says_so(fs, server):
    assert fs.exists(f'{server.url}/fine/x') and not fs.exists(f'{server.url}/missing/x')
    with pytest.raises(DataError, match='gave up'):
        fs.exists(f'{server.url}/gone-away/x')


@pytest.mark.parametrize('ask, words', [('list', 'http:// cannot be listed'), ('delete_object', 'http:// cannot have files removed')])
def test_what_a_store_cannot_do_is_said(fs, server, ask, words):
    with pytest.raises(DataError, match=words):
        getattr(fs, ask)(f'{server.url}/fine/x')
    with pytest.raises(DataError, match='http:// cannot be written'), fs.put_to(f'{server.url}/fine/x') as local:
        Path(local).write_text('')


# -------------------------------------------------------------------- many at once
def _fetch_many(url: str, has_locks: bool, results: Any) -> None:
    if not has_locks:
        fcntl.flock = lambda *args: None
    system = FileSystem()
    for k in range(3):
        with system.get_from(f'{url}/fine/{k}') as local:
            results.put(hashlib.sha256(Path(local).read_bytes()).hexdigest())


@pytest.mark.parametrize('has_locks', [True, False], ids=['with locks', 'locks do nothing'])
def test_four_processes_fetch_the_same_files_and_none_sees_a_part(fs, server, has_locks):
    fork = multiprocessing.get_context('fork')
    results = fork.Queue()
    processes = [fork.Process(target=_fetch_many, args=(server.url, has_locks, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in range(12)]
    for process in processes:
        process.join()

    assert found == [SHA] * 12 and len(cached_files(fs)) == 3
    assert len(server.gets) == 3 if has_locks else 3 <= len(server.gets) <= 12


def test_without_waiting_a_second_process_fetches_for_itself(fs, server):
    entry = Cache(fs.cache).entry(f'{server.url}/fine/x')
    entry.mkdir(parents=True)
    holder = os.open(entry, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)

    with fs.get_from(f'{server.url}/fine/x', wait_finish=False) as local:
        assert Path(local).read_bytes() == BODY
    os.close(holder)


def test_the_orphan_of_a_killed_download_is_collected(fs, server):
    url = f'{server.url}/fine/x'
    entry = Cache(fs.cache).entry(url)
    for name, age in (('.tmp-1-old-v', 7200), ('.tmp-1-young-v', 60)):
        (entry / name).mkdir(parents=True)
        os.utime(entry / name, (time.time() - age,) * 2)

    fetch(fs, url)

    assert [p.name for p in entry.iterdir() if p.name.startswith('.')] == ['.tmp-1-young-v']


# -------------------------------------------------------------------- fsspec
@pytest.fixture
def memory() -> Iterator[Any]:
    fsspec = pytest.importorskip('fsspec')
    store = fsspec.filesystem('memory')
    store.store.clear()
    store.pseudo_dirs[:] = ['']
    yield store
    store.store.clear()


def test_a_store_of_fsspec_is_read_written_listed(fs, memory):
    for name in ('a.txt', 'sub/b.txt'):
        with fs.put_to(f'memory://root/{name}') as local:
            Path(local).write_text(name)

    assert fs.list('memory://root') == ['a.txt', 'sub/b.txt'] and fs.exists('memory://root/a.txt') and not fs.exists('memory://root/c')
    assert fetch(fs, 'memory://root/a.txt') == b'a.txt'
    with fs.get_dir_to_local_dir('memory://root') as local:
        assert sorted(p.relative_to(local).as_posix() for p in Path(local).rglob('*.txt')) == ['a.txt', 'sub/b.txt']
    fs.delete_object('memory://root/a.txt')
    with pytest.raises(DataError, match='does not exist'):
        fs.delete_object('memory://root/a.txt')
    with pytest.raises(DataError, match='does not exist'), fs.get_dir_to_local_dir('memory://nothing'):
        pass


def test_copies_go_where_they_are_asked_for(fs, memory, tmp_path):
    for name in ('a.txt', 'sub/b.txt'):
        fs.put_object(name, f'memory://root/{name}')
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'mine').write_text('stays')

    local = fs.get_from('memory://root/a.txt', tmp_path / 'deep' / 'copy.txt')
    fs.get_dir_to_local_dir('memory://root', tmp_path / 'there')
    fs.get_dir_to_local_dir('memory://root', tmp_path / 'new')
    fs.get_dir_to_local_dir(tmp_path / 'new', tmp_path / 'newer')

    assert local == str(tmp_path / 'deep' / 'copy.txt') and Path(local).read_text() == 'a.txt'
    assert fs.list(tmp_path / 'there') == ['a.txt', 'mine', 'sub/b.txt'] and fs.list(tmp_path / 'newer') == ['a.txt', 'sub/b.txt']
    assert not list(tmp_path.rglob('.tmp-*'))


def test_many_files_come_in_their_order_and_the_first_error_is_told(fs, memory):
    paths = [f'memory://root/{i}' for i in range(40)]
    for i, path in enumerate(paths):
        fs.put_object(str(i), path)

    assert [Path(local).read_text() for local in fs.get_batch_objects_from(paths)] == [str(i) for i in range(40)]
    with fs.without_requests('a stranger named it'), pytest.raises(DataError, match=r'root/none was not fetched: a stranger named it'):
        list(fs.get_batch_objects_from([*paths, 'memory://root/none']))


def test_folders_are_put_and_made(fs, memory, tmp_path):
    (tmp_path / 'from' / 'sub').mkdir(parents=True)
    (tmp_path / 'from' / 'sub' / 'x').write_text('x')

    for target in ('memory://root/put', tmp_path / 'put'):
        fs.put_dir_from_local_dir(tmp_path / 'from', target)
        fs.make_dir(f'{target}/empty')
        assert fs.list(target) == ['sub/x'] and fs.isdir(f'{target}/empty') and fs.size(f'{target}/sub/x') == 1

    assert (tmp_path / 'from' / 'sub' / 'x').exists() and fs.is_local(tmp_path) and not fs.is_local('memory://root')
    assert fs.can_write('memory://root') and not fs.can_write('https://host/x')


def test_a_failed_put_to_a_remote_store_shows_nothing(fs, memory):
    with pytest.raises(ZeroDivisionError), fs.put_to('memory://root/x') as local:
        Path(local).write_text('half')
        raise ZeroDivisionError

    assert not fs.exists('memory://root/x') and cached_files(fs) == []


@pytest.mark.parametrize('name', ['../../escaped', 'a/../../escaped', '/etc/escaped', 'a\\..\\b', '~/x', 'a//b', 'x' * 300, 'a\0b'])
def test_a_hostile_listing_writes_nothing_outside_the_cache(fs, memory, monkeypatch, name):
    client = fs._client('memory://x')
    monkeypatch.setattr(type(client), 'list', lambda self, path: ['fine', name])
    monkeypatch.setattr(type(client), 'stamp', lambda self, path: 'v')
    memory.pipe('/root/fine', b'x')

    with pytest.raises(DataError, match='refused'), fs.get_dir_to_local_dir('memory://root'):
        pass

    assert cached_files(fs) == [] and not list(fs.cache.parent.rglob('escaped'))


# -------------------------------------------------------------------- the hub
def test_hub_addresses():
    assert hub.parse('hf://org/model') == ('org/model', None, '')
    assert hub.parse('hf://org/model:v1.0@vae/model.safetensors') == ('org/model', 'v1.0', 'vae/model.safetensors')
    for bad in ('org/model', 'hf://model', 'hf://a/b/c', 'hf://a/b@../../x', 'hf://a/b@/etc/passwd', 'hf://a/b@'):
        with pytest.raises(DataError):
            hub.parse(bad)


@pytest.mark.parametrize('path', ['outputs/modle', 'openai/clip-vit-large-patch14'])
def test_a_path_without_a_scheme_is_a_path_and_never_a_strangers_repository(fs, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'outputs').mkdir()
    monkeypatch.setattr(hub.HuggingfaceFs, '_hub', lambda self: pytest.fail('the hub was asked'))

    for fails in (lambda: fs.get_dir_to_local_dir(path).__enter__(), lambda: local_copy(path).__enter__()):
        with pytest.raises((DataError, CheckpointError), match=f'{path} does not exist.*the Hugging Face hub is written hf://{path}'):
            fails()


@pytest.fixture
def offline_hub(tmp_path, monkeypatch) -> Path:
    """A hub cache that holds one file of org/model, and no network."""
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.chdir(tmp_path)
    commit, blob = '0' * 40, hashlib.sha256(b'weights').hexdigest()
    root = tmp_path / 'hub' / 'models--org--model'
    for folder in ('refs', 'blobs', f'snapshots/{commit}/vae'):
        (root / folder).mkdir(parents=True)
    (root / 'refs' / 'main').write_text(commit)
    (root / 'blobs' / blob).write_bytes(b'weights')
    (root / 'snapshots' / commit / 'vae' / 'model.bin').symlink_to(f'../../../blobs/{blob}')
    return root


def test_the_hub_is_read_from_its_cache_without_a_network(fs, offline_hub):
    assert fetch(fs, 'hf://org/model@vae/model.bin') == b'weights'
    for path in ('hf://org/model', 'hf://org/model:main'):
        with fs.get_dir_to_local_dir(path) as local:
            assert (Path(local) / 'vae' / 'model.bin').read_bytes() == b'weights'
    with fs.get_dir_to_local_dir('hf://org/model@vae') as local:
        assert (Path(local) / 'model.bin').exists()


def test_a_flipped_file_in_the_hub_cache_is_found(fs, offline_hub):
    blob = next((offline_hub / 'blobs').iterdir())
    fetch(fs, 'hf://org/model@vae/model.bin')
    blob.write_bytes(b'weightz')

    with pytest.raises(DataError, match=f'damaged: sha256 {blob.name} expected'):
        fetch(fs, 'hf://org/model@vae/model.bin')


def test_a_model_that_the_hub_lacks_keeps_the_cause(fs, offline_hub):
    with pytest.raises(DataError, match=r'hf://org/other: the Hugging Face hub: ') as error, \
            fs.get_dir_to_local_dir('hf://org/other'):
        pass
    assert error.value.__cause__ is not None


def test_without_huggingface_hub_the_extra_is_named(fs, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)

    with pytest.raises(DataError, match=r'hf:// needs huggingface_hub: .*clip'), fs.get_dir_to_local_dir('hf://org/model'):
        pass


# -------------------------------------------------------------------- names and imports
@pytest.mark.parametrize('path, expected', [
    ('https://me:pw@host/a/x.bin?sig=1#f', 'https://host/a/x.bin'), ('/plain/a@b', '/plain/a@b'), ('oss://b/k', 'oss://b/k')])
def test_addresses_are_shown_without_secrets(path, expected):
    assert shown(path) == expected


@pytest.mark.parametrize('path, expected', [('https://h/a/model.safetensors?x=1', 'model.safetensors'), ('https://h/', 'h'),
                                            ('https://h/..', 'file'), ('https://h/%2e%2e%2fx', '2e-2e-2fx'),
                                            ('https://h/' + 'a' * 500, 'a' * 100)])
def test_names_in_the_cache_are_harmless(path, expected):
    assert base_name(path) == expected


def test_safe_join_takes_plain_names_and_refuses_links_that_lead_out(tmp_path):
    (tmp_path / 'root').mkdir()
    (tmp_path / 'root' / 'out').symlink_to(tmp_path)

    assert atomic.safe_join(tmp_path / 'root', 'a/b.txt') == tmp_path / 'root' / 'a' / 'b.txt'
    with pytest.raises(ValueError, match='leads out'):
        atomic.safe_join(tmp_path / 'root', 'out/x')


def test_the_front_imports_nothing_heavy():
    code = 'import sys, scepter.core.stores; print(sys.modules.keys() & {"torch", "huggingface_hub", "fsspec", "requests"})'

    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == 'set()'
