"""Checkpoints survive kills, power cuts, full disks and flipped bits, and say what is wrong with a damaged one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scepter.core.disk import atomic, checkpoints, manifests, reading, writing
from scepter.core.disk.checkpoints import FORMAT, MANIFEST, is_sound, latest, load, preflight, prune, resolve, save
from scepter.core.disk.tensors import HEADER_LIMIT, TENSOR_LIMIT, TensorFile, write_tensors
from scepter.core.errors import CheckpointError
from scepter.core.lock import WorkDirLock


def write(root: Path, step: int, value: int | None = None, size: int = 100, keep: int | None = None) -> Path:
    """A checkpoint in which every file tells `value`, so that a mixture of two would show."""
    value = step if value is None else value
    groups = {'model': {'w': torch.full((size,), float(value))}, 'ema': {'w': torch.full((size,), value + 0.5)}}
    return save(root, step, groups, {'value': value}, f'VALUE: {value}\n', keep=keep)


def read(checkpoint: checkpoints.Checkpoint) -> int:
    """The value that `write` wrote; fails where the files disagree."""
    value = checkpoint.state['value']
    assert (checkpoint.group('model')['w'] == value).all() and (checkpoint.group('ema')['w'] == value + 0.5).all()
    assert checkpoint.config == f'VALUE: {value}\n'
    return value


# -------------------------------------------------------------------- round trips
def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path, 7, {'model': {'a': torch.arange(6.).view(2, 3)}, 'ema': {}}, {'loss': [1.5, None]}, 'A: 1\n')

    checkpoint = load(path)

    assert checkpoint.step == 7 and checkpoint.groups == ('ema', 'model') and checkpoint.path == tmp_path / 'step-00000007'
    assert checkpoint.state == {'loss': [1.5, None]} and checkpoint.config == 'A: 1\n' and checkpoint.group('ema') == {}
    assert torch.equal(checkpoint.group('model')['a'], torch.arange(6.).view(2, 3))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64,
                                   torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_every_type_and_layout_round_trips_to_the_bit(tmp_path, dtype):
    whole = torch.randint(0, 2, (4, 6)).to(dtype)
    tensors = {'whole': whole, 'turned': whole.T, 'strided': whole[::2, 1::2], 'scalar': whole[0, 0], 'none': whole[:0]}

    write_tensors(tmp_path / 'x.safetensors', tensors)

    for name, tensor in TensorFile(tmp_path / 'x.safetensors').items():
        assert tensor.dtype == dtype and tensor.shape == tensors[name].shape
        assert torch.equal(tensor.contiguous().view(-1).view(torch.uint8), tensors[name].contiguous().view(-1).view(torch.uint8)), name


def test_the_safetensors_library_reads_our_files_and_we_read_its(tmp_path):
    library = pytest.importorskip('safetensors.torch')
    tensors = {'a': torch.randn(3, 5), 'b': torch.arange(4), 'c': torch.randn(7).bfloat16(), 'd': torch.tensor(True)}

    write_tensors(tmp_path / 'ours', tensors, {'by': 'us'})
    library.save_file(tensors, tmp_path / 'theirs')

    theirs, ours = library.load_file(tmp_path / 'ours'), TensorFile(tmp_path / 'theirs')
    assert all(torch.equal(theirs[name], tensors[name]) and torch.equal(ours[name], tensors[name]) for name in tensors)
    assert TensorFile(tmp_path / 'ours').metadata == {'by': 'us'}


def test_tied_weights_come_back_under_both_names(tmp_path):
    tied = torch.randn(3)

    path = save(tmp_path, 1, {'model': {'in': tied, 'out': tied}}, {}, '')

    group = load(path).group('model')
    assert torch.equal(group['in'], tied) and torch.equal(group['out'], tied)


def test_names_and_shapes_are_known_without_reading_a_tensor(tmp_path):
    tensors = load(write(tmp_path, 1)).tensors('model')

    assert tensors.slots['w'].shape == (100,) and tensors.slots['w'].dtype == torch.float32


def test_a_missing_group_is_named(tmp_path):
    with pytest.raises(CheckpointError, match='holds no optimizer: it has ema, model'):
        load(write(tmp_path, 1)).group('optimizer')


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.complex64, torch.float8_e5m2], ids=str)
def test_a_tensor_that_is_not_finite_is_refused_by_name(tmp_path, bad, dtype):
    weights = torch.ones(3, 40).to(dtype)
    weights[1, 7] = torch.tensor(bad).to(dtype)

    with pytest.raises(CheckpointError, match=r'NaN or infinity: model: conv\.weight'):
        save(tmp_path, 1, {'model': {'fine': torch.ones(2), 'conv.weight': weights}}, {}, '')

    assert list(tmp_path.iterdir()) == []


def test_state_that_is_not_json_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match='not plain JSON'):
        save(tmp_path, 1, {}, {'hook': torch.ones(2)}, '')

    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------- damage
@pytest.fixture(scope='module')
def pair(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('pair')
    write(root, 1)
    write(root, 2)
    return root


@pytest.mark.parametrize('flips', [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_detected_and_the_step_before_is_taken(pair, flips, caplog, record_figure):
    chance = random.Random(0)
    folder = pair / 'step-00000002'
    for flip in range(flips):
        path = sorted(folder.iterdir())[flip % 5]
        sound = path.read_bytes()
        place = chance.randrange(len(sound))
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << chance.randrange(8)]) + sound[place + 1:])

        with pytest.raises(CheckpointError, match=str(path)):
            load(folder)
        if flip % 20 == 0:
            assert read(latest(pair)) == 1
        path.write_bytes(sound)
    assert read(latest(pair)) == 2
    record_figure('flipped bits of a checkpoint that are found', flips, of=flips)


def damages() -> Iterator[Any]:
    def cut(length: int) -> Callable[[Path], object]:
        return lambda folder: os.truncate(folder / 'model.safetensors', length)

    for n in (0, 1, 7, 8, 60, 300, 471):
        yield pytest.param(cut(n), r'model.safetensors: \d+ bytes expected, \d+ found', id=f'cut-{n}')
    yield pytest.param(lambda f: (f / 'ema.safetensors').unlink(), r'ema.safetensors: missing; \d+ bytes expected', id='missing')
    yield pytest.param(lambda f: (f / 'state.json').unlink(), 'state.json: missing', id='no-state')
    yield pytest.param(lambda f: (f / MANIFEST).unlink(), 'is no checkpoint of ours: it has no MANIFEST.json', id='no-manifest')
    yield pytest.param(lambda f: (f / MANIFEST).write_text(''), 'damaged: 0 bytes that are not a manifest', id='empty-manifest')
    yield pytest.param(lambda f: (f / MANIFEST).write_text('[' * 100_000), 'damaged: 100000 bytes', id='deep-manifest')
    yield pytest.param(lambda f: (f / 'optimizer.safetensors').write_text('x'), 'optimizer.safetensors: not a file of this', id='extra')
    yield pytest.param(lambda f: shutil.copy(f.parent / 'step-00000001' / 'model.safetensors', f), 'damaged: sha256 .* found', id='swapped')
    yield pytest.param(lambda f: shutil.copy(f.parent / 'step-00000001' / MANIFEST, f), 'manifest is of step 1', id='other-manifest')
    yield pytest.param(lambda f: ((f / 'ema.safetensors').unlink(), (f / 'ema.safetensors').symlink_to(f / 'model.safetensors')),
                       'a plain file expected, a link', id='link')


@pytest.mark.parametrize('damage, words', damages())
def test_a_damaged_checkpoint_is_refused_by_file_and_passed_over(tmp_path, damage, words):
    write(tmp_path, 1)
    damage(write(tmp_path, 2))

    with pytest.raises(CheckpointError, match=words) as error:
        load(tmp_path / 'step-00000002')

    assert str(tmp_path / 'step-00000002') in str(error.value) and error.value.exit_code == 4
    assert read(latest(tmp_path)) == 1


def test_falling_back_is_loud(tmp_path, caplog):
    write(tmp_path, 1)
    (write(tmp_path, 2) / 'state.json').write_text('{}')
    reading.get_logger().propagate = True

    latest(tmp_path)

    reading.get_logger().propagate = False
    assert 'DAMAGED CHECKPOINT' in caplog.text and 'state.json' in caplog.text


def test_size_alone_is_verified_on_request(tmp_path):
    path = write(tmp_path, 1) / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-1] + b'x')

    assert load(tmp_path / 'step-00000001', verify='size').step == 1
    with pytest.raises(CheckpointError):
        load(tmp_path / 'step-00000001')


def reseal(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop('sha256')
    (folder / MANIFEST).write_bytes(manifests.sealed({**manifest, **changes}))


TRAVERSALS = ['../secret', '/etc/passwd', 'a/../../secret', '..', '.', '', './x', 'x/', 'x//y', 'a\0b', '~', '~/x', 'C:x', 'C:\\x',
              '\\\\host\\x', 'a\\..\\b', 'x' * 300, 'sub/file', '.hidden', 'a\nb', '\u202egpj', MANIFEST]


@pytest.mark.parametrize('name', TRAVERSALS, ids=[repr(name)[:20] for name in TRAVERSALS])
def test_a_forged_manifest_cannot_lead_out_of_its_folder(tmp_path, name):
    (tmp_path / 'secret').write_text('x')
    folder = write(tmp_path / 'root', 1)
    files = json.loads((folder / MANIFEST).read_text())['files']
    reseal(folder, files={**files, name: {'size': 1, 'sha256': '0'}}, groups={'model': [name]})

    with pytest.raises(CheckpointError, match='refused'):
        load(folder)


@pytest.mark.parametrize('changes', [{'step': -1}, {'step': '1'}, {'groups': {'model': ['elsewhere']}}, {'files': {}}, {'files': []},
                                     {'files': {'model.safetensors': 3}}, {'groups': None}], ids=str)
def test_a_forged_manifest_of_the_wrong_shape_is_refused(tmp_path, changes):
    folder = write(tmp_path, 1).rename(tmp_path / 'mine')
    reseal(folder, **changes)

    with pytest.raises(CheckpointError):
        load(folder)


@pytest.mark.parametrize(('number', 'advice'), [(FORMAT + 1, 'upgrade it'), (FORMAT - 1, 'take the version that wrote it')])
def test_another_format_says_so(tmp_path, number, advice):
    reseal(write(tmp_path, 1), format=number)

    with pytest.raises(CheckpointError, match=f'format {number}, but this version of scepter reads format {FORMAT}: {advice}'):
        load(tmp_path / 'step-00000001')


# -------------------------------------------------------------------- hostile tensor files
@pytest.mark.parametrize('count', [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_mutated_header_is_refused_or_claims_no_more_than_the_file_holds(tmp_path, count):
    path, chance = tmp_path / 'x.safetensors', random.Random(1)
    write_tensors(path, {'a': torch.ones(4, 5), 'b': torch.ones(3).half(), 'c': torch.ones(0), 'd': torch.tensor(1)}, {'k': 'v'})
    sound = path.read_bytes()
    header = int.from_bytes(sound[:8], 'little') + 8
    refused = 0
    for _ in range(count):
        data = bytearray(sound)
        for _ in range(chance.choice((1, 1, 1, 4))):
            place = chance.randrange(header)
            data[place] = chance.choice((data[place] ^ 1 << chance.randrange(8), *b'019{}[]",:-e'))
        path.write_bytes(data)
        try:
            file = TensorFile(path)
            assert sum(tensor.nbytes for tensor in file.values()) <= len(sound)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > count / 2


def test_a_header_of_very_many_tensors_is_refused_before_it_is_parsed(tmp_path):
    header = {f'{i}': {'dtype': 'U8', 'shape': [0], 'data_offsets': [0, 0]} for i in range(TENSOR_LIMIT + 1)}
    (tmp_path / 'x.safetensors').write_bytes(hostile(header))

    with pytest.raises(CheckpointError, match=f'lists {TENSOR_LIMIT + 1} tensors; the limit is {TENSOR_LIMIT}'):
        TensorFile(tmp_path / 'x.safetensors')
    with pytest.raises(CheckpointError, match='the limits are'):
        write_tensors(tmp_path / 'y.safetensors', dict.fromkeys(header, torch.empty(0)))


def hostile(header: Any, data: bytes = b'', claim: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claim is None else claim).to_bytes(8, 'little') + text + data


def one(**changes: Any) -> dict:
    return {'w': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8], **changes}}


@pytest.mark.parametrize('data', [
    b'', b'\0' * 7, hostile({}, claim=10**18), hostile({}, claim=HEADER_LIMIT + 1), hostile(b'[' * 50_000), hostile([]),
    hostile(b'\xff\xfe'), hostile(one(shape=[1 << 40])), hostile(one(shape=[-2]), b'\0' * 8), hostile(one(shape=[2.0]), b'\0' * 8),
    hostile(one(shape=[True, 2]), b'\0' * 8),
    hostile(one(data_offsets=[0, 16]), b'\0' * 16), hostile(one(data_offsets=[8, 0]), b'\0' * 8), hostile(one(data_offsets=[0]), b'\0' * 8),
    hostile(one(dtype='F33'), b'\0' * 8), hostile(one(dtype=['F32']), b'\0' * 8), hostile(one(), b'\0' * 9), hostile(one(), b'\0' * 7),
    hostile(one(shape=[1] * 100 + [2]), b'\0' * 8), hostile(one(shape=[0, 1 << 62, 1 << 62], data_offsets=[0, 0])), hostile({'w': None}),
    hostile({**one(), 'v': one()['w']}, b'\0' * 8), hostile({**one(), 'v': one()['w']}, b'\0' * 16),
    hostile({'__metadata__': {'a': 1}}), hostile({'__metadata__': []}),
    hostile(b'{"w":{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}}', b'\0' * 8)], ids=range(26))
def test_a_hostile_tensor_file_is_a_checkpoint_error(tmp_path, data):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(data)

    with pytest.raises(CheckpointError, match=str(path)):
        dict(TensorFile(path))


@pytest.mark.parametrize('data, words', [(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n', 'Git LFS pointer'),
                                         (b'PK\x03\x04' + b'\0' * 99, 'zip archive'), (b'\x80\x02}q\0.' * 9, 'Python pickle'),
                                         (b'<!DOCTYPE html><html></html>' * 9, 'web page')])
def test_what_is_often_taken_for_safetensors_is_called_by_its_name(tmp_path, data, words):
    (tmp_path / 'x.safetensors').write_bytes(data)

    with pytest.raises(CheckpointError, match=words):
        TensorFile(tmp_path / 'x.safetensors')


# -------------------------------------------------------------------- kills
class TappedOs:
    """The os module, with a look at each call that changes the disk."""

    CHANGES = ('mkdir', 'write', 'fsync', 'rename')

    def __init__(self, before: Callable[[str], None]):
        self.before = before

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        if name not in self.CHANGES:
            return call

        def tapped(*args: Any) -> Any:
            self.before(name)
            return call(*args)
        return tapped


def in_child(work: Callable[[Callable[[int], None]], None], delay: float | None = None) -> int:
    """Run work(acknowledge) in a forked process, kill it after `delay` seconds; the last number it acknowledged, or 0."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(source)
            work(lambda number: os.write(sink, number.to_bytes(8, 'little')))
        finally:
            os._exit(0)
    os.close(sink)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    with open(source, 'rb') as pipe:
        acknowledged = pipe.read()
    os.waitpid(child, 0)
    return int.from_bytes(acknowledged[-8:], 'little')


def recovered(work_dir: Path) -> int:
    preflight(work_dir / 'checkpoints')
    assert not [p.name for p in (work_dir / 'checkpoints').iterdir() if p.name.startswith('.')]
    checkpoint = resolve(work_dir, 'auto')
    return read(checkpoint) if checkpoint else 0


@pytest.mark.parametrize('kills', [25, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_loses_no_acknowledged_step(tmp_path, kills, record_figure):
    chance, done, begin = random.Random(2), 0, time.monotonic()
    write(tmp_path / 'first', 1, size=200_000)
    took = time.monotonic() - begin
    for _ in range(kills):
        def endless(acknowledge: Callable[[int], None], first: int = done + 1) -> None:
            for step in range(first, first + 10_000):
                write(tmp_path / 'checkpoints', step, size=200_000, keep=2)
                acknowledge(step)

        acknowledged = max(done, in_child(endless, delay=chance.uniform(0, 3 * took)))
        done = recovered(tmp_path)
        assert done >= acknowledged
    assert done > 0
    record_figure('kills in the midst of saving after which every acknowledged step is there', kills, of=kills)


@pytest.mark.parametrize('again', [False, True], ids=['a new step', 'the same step again'])
def test_a_kill_before_each_single_disk_operation_loses_nothing(tmp_path, again):
    for kill_at in range(1, 100):
        work_dir = tmp_path / str(kill_at)
        write(work_dir / 'checkpoints', 1, value=1)

        def save_again(acknowledge: Callable[[int], None], root: Path = work_dir / 'checkpoints', kill_at: int = kill_at) -> None:
            count = iter(range(1, 1000))
            tapped = TappedOs(lambda name: os.kill(os.getpid(), signal.SIGKILL) if next(count) == kill_at else None)
            atomic.os = writing.os = tapped
            write(root, 1 if again else 2, value=2, keep=1)
            acknowledge(2)

        acknowledged = in_child(save_again)
        assert recovered(work_dir) >= max(1, acknowledged)
        if acknowledged:
            break
    assert 15 < kill_at < 60


# -------------------------------------------------------------------- power cuts
class RecordingOs(TappedOs):
    """The os module, writing down what reaches the disk and what is only promised. `forget` names a kind of fsync to lose."""

    def __init__(self, forget: str = ''):
        self.operations: list[tuple] = []
        self.open_files: dict[int, Any] = {}
        self.forget, self.count = forget, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        file = os.open(path, flags, mode)
        if flags & os.O_CREAT:
            self.count += 1
            self.operations.append(('create', str(path), self.count))
            self.open_files[file] = self.count
        else:
            self.open_files[file] = str(path)
        return file

    def write(self, file: int, data: memoryview) -> int:
        self.operations.append(('write', self.open_files[file], bytes(data)))
        return os.write(file, data)

    def fsync(self, file: int) -> None:
        kind = 'folder' if stat.S_ISDIR(os.fstat(file).st_mode) else 'data'
        if kind != self.forget:
            self.operations.append((f'fsync {kind}', self.open_files[file]))

    def mkdir(self, path: Path) -> None:
        self.operations.append(('mkdir', str(path)))
        os.mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        self.operations.append(('rename', str(source), str(target)))
        os.rename(source, target)


def crash_states(operations: list[tuple], root: str) -> Iterator[dict[str, bytes | None]]:
    """Every tree (path -> content, None for a folder) that a power cut after these operations may leave.

    Entries of a folder that was not fsynced appear up to any point; data that was not fsynced is there, half there, zero or gone.
    """
    entries = [op for op in operations if op[0] in ('create', 'mkdir', 'rename')]
    touched = [{os.path.dirname(p) for p in entry[1:] if isinstance(p, str)} for entry in entries]
    durable: set[int] = set()
    for i, op in enumerate(operations):
        if op[0] == 'fsync folder':
            durable |= {k for k, entry in enumerate(entries) if entry in operations[:i] and op[1] in touched[k]}
    synced = {op[1] for op in operations if op[0] == 'fsync data'}
    data: dict[int, bytes] = {}
    for op in operations:
        if op[0] == 'write':
            data[op[1]] = data.get(op[1], b'') + op[2]
    pending = [k for k in range(len(entries)) if k not in durable]
    for prefix in range(len(pending) + 1):
        tree: dict[str, int | None] = {root: None}
        for k, op in enumerate(entries):
            landing = op[2] if op[0] == 'rename' else op[1]
            if (k not in durable and k not in pending[:prefix]) or os.path.dirname(landing) not in tree:
                continue
            if op[0] == 'rename':
                moved = [p for p in tree if p == op[1] or p.startswith(op[1] + '/')]
                tree.update({op[2] + p[len(op[1]):]: tree.pop(p) for p in moved})
            else:
                tree[op[1]] = op[2] if op[0] == 'create' else None
        for lose in (lambda d: b'', lambda d: d[:len(d) // 2], lambda d: bytes(len(d)), lambda d: d):
            yield {p: None if f is None else data.get(f, b'') if f in synced else lose(data.get(f, b'')) for p, f in tree.items()}


def power_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: str = '') -> tuple[int, int]:
    """Save three times, the last over the second; (states a power cut may leave, those that lose an acknowledged save or worse)."""
    tapped = RecordingOs(forget)
    monkeypatch.setattr(atomic, 'os', tapped)
    monkeypatch.setattr(writing, 'os', tapped)
    run, acknowledged = tmp_path / 'run', {0: 0}
    run.mkdir()
    for value, step in ((1, 100), (2, 200), (3, 200)):
        write(run / 'checkpoints', step, value, size=3, keep=1)
        acknowledged[len(tapped.operations)] = value
    monkeypatch.undo()

    seen, lost = set(), 0
    for cut in range(len(tapped.operations) + 1):
        promised = max(value for after, value in acknowledged.items() if after <= cut)
        for tree in crash_states(tapped.operations[:cut], str(run)):
            key = (promised, *sorted(tree.items()))
            if key in seen:
                continue
            seen.add(key)
            shutil.rmtree(run)
            for path, content in sorted(tree.items()):
                Path(path).mkdir() if content is None else Path(path).write_bytes(content)
            try:
                checkpoint = resolve(run, 'auto')
                lost += (read(checkpoint) if checkpoint else 0) < promised
            except CheckpointError:
                lost += 1 if promised else 0
    return len(seen), lost


def test_no_power_cut_loses_an_acknowledged_checkpoint(tmp_path, monkeypatch, record_figure):
    states, lost = power_cuts(tmp_path, monkeypatch)

    assert states > 60 and lost == 0
    record_figure('states of the disk after a power cut that recover', states - lost, of=states)


@pytest.mark.parametrize('forget', ['data', 'folder'])
def test_the_power_cuts_would_notice_a_forgotten_fsync(tmp_path, monkeypatch, forget):
    assert power_cuts(tmp_path, monkeypatch, forget)[1] > 0


# -------------------------------------------------------------------- full disk, bad disk
@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('size', [0, 1, 7, 8, 100, 4096, 65536, 399_999])
def test_a_full_disk_leaves_the_previous_checkpoint_and_says_what_is_missing(tmp_path, size):
    write(tmp_path, 1)

    words = r'no space for .*step-00000002: 800,000 bytes of tensors needed, [\d,]+ free'
    with pytest.raises(CheckpointError, match=words), largest_file(size):
        write(tmp_path, 2, size=100_000)

    assert read(latest(tmp_path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001']


def test_preflight_refuses_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')

    with pytest.raises(CheckpointError, match='cannot be written: Not a directory'):
        preflight(tmp_path / 'file' / 'checkpoints')
    with pytest.raises(CheckpointError, match='no space'), largest_file(100):
        preflight(tmp_path / 'checkpoints')


def test_preflight_leaves_nothing(tmp_path):
    preflight(tmp_path / 'deep' / 'checkpoints')

    assert list((tmp_path / 'deep' / 'checkpoints').iterdir()) == []


def test_the_temporary_folder_lies_beside_its_target(tmp_path, monkeypatch):
    seen = []
    tapped = TappedOs(lambda name: seen.extend(p for p in tmp_path.iterdir() if p.name.startswith('.tmp-')))
    monkeypatch.setattr(atomic, 'os', tapped)

    write(tmp_path, 1)

    assert seen and all(p.parent == tmp_path for p in seen)


def test_what_a_living_writer_holds_is_not_collected(tmp_path):
    with writing.temporary(tmp_path / 'step-00000001') as folder:
        in_child(lambda acknowledge: checkpoints.recover(tmp_path))
        assert folder.exists()

    checkpoints.recover(tmp_path)
    assert not folder.exists()


# -------------------------------------------------------------------- retention
@pytest.mark.parametrize('examples', [25, pytest.param(500, marks=pytest.mark.slow)])
def test_retention_never_removes_the_last_sound_checkpoint_nor_a_newer_one_than_it_keeps(examples):
    settings(max_examples=examples, deadline=None)(retention)()


@given(keep=st.integers(1, 3), pinned=st.sets(st.integers(1, 12), max_size=2), every=st.sampled_from([None, 1, 3, 10]),
       steps=st.lists(st.sampled_from([1, 2, 9, 10, 99, 1234567, 10**9]), max_size=8),
       actions=st.lists(st.tuples(st.sampled_from(['save', 'save', 'fail', 'kill', 'flip', 'cut', 'prune']), st.integers(0, 9)),
                        max_size=10))
def retention(keep, pinned, every, steps, actions):
    def stays(folder: Path) -> bool:
        step = checkpoints.step_of(folder)
        return step in pinned or (every is not None and step % every == 0)

    two = {'model': {'v': torch.ones(3), 'w': torch.ones(3)}}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        steps = sorted({*steps})
        for action, number in actions:
            found = checkpoints.folders(root)
            sound = [f for f in found if is_sound(f)]
            if action == 'save' and steps:
                step = steps.pop(0)
                save(root, step, two, {}, '', keep=keep, pinned=pinned, every=every, limit=number)
                sound.append(root / f'step-{step:08d}')
            elif action == 'fail':    # at a disk that is full, before the next step that is saved
                with pytest.raises(CheckpointError, match='no space'), largest_file(number):
                    save(root, 10**9 + 1, two, {}, '', keep=keep, pinned=pinned, every=every, limit=number)
            elif action == 'kill':
                (root / f'.tmp-1-{number}-step-00000007').mkdir(parents=True, exist_ok=True)
            elif action == 'prune':
                removed = prune(root, keep, pinned, every)
                assert {*removed} == {*found} - {*checkpoints.folders(root)}
            elif found and action in ('flip', 'cut'):
                victim = sorted(found[number % len(found)].glob('*.safetensors'))[0]
                victim.write_bytes(victim.read_bytes()[:-1] + (b'x' if action == 'flip' else b''))
                continue

            left = checkpoints.folders(root)
            assert any(is_sound(f) for f in left) or not sound
            assert {f for f in sound if stays(f)} <= {*left}
            newest = sorted(sound, key=checkpoints.step_of)[-keep:]
            assert {*newest} <= {*left}
            if len(sound) == len({*found} | {*sound}):     # with nothing damaged, exactly these stay
                assert {*left} == {*newest} | {f for f in sound if stays(f)}


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        write(tmp_path, step)

    assert [checkpoints.step_of(f) for f in checkpoints.folders(tmp_path)] == [100_000_000, 99_999_999, 5]


def test_a_folder_that_cannot_be_removed_does_not_fail_the_save(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(atomic, 'trash', lambda path: (_ for _ in ()).throw(PermissionError(13, 'Permission denied')))

    write(tmp_path, 2, keep=1)

    assert read(latest(tmp_path)) == 2


# -------------------------------------------------------------------- RESUME_FROM
def test_resume_in_an_empty_work_dir(tmp_path):
    assert resolve(tmp_path, None) is None and resolve(tmp_path, 'auto') is None
    with pytest.raises(CheckpointError, match=r'RESUME_FROM is latest, but .* holds no checkpoint'):
        resolve(tmp_path, 'latest')


def test_resume_where_there_are_checkpoints(tmp_path):
    write(tmp_path / 'checkpoints', 1)
    write(tmp_path / 'checkpoints', 2)

    assert resolve(tmp_path, 'auto').step == 2 and resolve(tmp_path, 'latest').step == 2
    assert resolve(tmp_path, str(tmp_path / 'checkpoints' / 'step-00000001')).step == 1
    with pytest.raises(CheckpointError, match=r'already holds a run, up to step-00000002.*RESUME_FROM: auto'):
        resolve(tmp_path, None)


def test_a_named_checkpoint_never_falls_back(tmp_path):
    write(tmp_path / 'checkpoints', 1)
    broken = write(tmp_path / 'checkpoints', 2)
    (broken / 'state.json').write_text('{}')

    assert resolve(tmp_path, 'auto').step == 1
    with pytest.raises(CheckpointError, match=r'state\.json'):
        resolve(tmp_path, str(broken))


@pytest.mark.parametrize('resume_from', ['auto', 'latest'])
def test_a_work_dir_with_damaged_checkpoints_only_is_never_a_fresh_start(tmp_path, resume_from):
    (write(tmp_path / 'checkpoints', 1) / 'state.json').write_text('{}')

    with pytest.raises(CheckpointError, match='1 checkpoints, and all are damaged'):
        resolve(tmp_path, resume_from)


def test_a_path_that_is_not_there_names_its_nearest(tmp_path):
    write(tmp_path / 'checkpoints', 100)

    with pytest.raises(CheckpointError, match=r'does not exist .*did you mean step-00000100'):
        resolve(tmp_path, str(tmp_path / 'checkpoints' / 'step-0000010'))


@pytest.mark.parametrize('place', ['', 'checkpoints'])
def test_the_folder_of_a_run_stands_for_its_newest_sound_checkpoint(tmp_path, place, caplog):
    for step in (1, 2, 3):
        write(tmp_path / 'run' / 'checkpoints', step)
    (tmp_path / 'run' / 'checkpoints' / 'step-00000003' / 'state.json').write_text('{}')
    path = tmp_path / 'run' / place

    assert checkpoints.is_checkpoint(path) and not checkpoints.is_checkpoint(tmp_path)
    assert read(resolve(tmp_path / 'other', str(path))) == 2
    with pytest.raises(CheckpointError, match='step-00000003'):
        load(tmp_path / 'run' / 'checkpoints' / 'step-00000003')


# -------------------------------------------------------------------- tools/checkpoint.py
TOOL = Path(__file__).parents[3] / 'tools' / 'checkpoint.py'


@pytest.fixture(scope='module')
def tool() -> Callable[..., int]:
    spec = importlib.util.spec_from_file_location('checkpoint_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: module.main([str(word) for word in words])


@pytest.fixture(params=[1e9, 10], ids=['one file', 'several'])
def limit(request) -> float:
    """How many bytes a file of a checkpoint may have."""
    return request.param


def test_the_tool_lists_and_verifies(tmp_path, tool, limit, capsys):
    for step in (1, 2):
        save(tmp_path / 'checkpoints', step, {'model': {'a': torch.ones(3), 'b': torch.ones(4)}}, {'value': 1}, '', limit=limit)

    assert tool('ls', tmp_path) == 0 and tool('verify', tmp_path) == 0
    assert [line.split()[1:3] for line in capsys.readouterr().out.splitlines()] == [['step', '2'], ['step', '1'], ['ok'], ['ok']]
    (tmp_path / 'checkpoints' / 'step-00000001' / 'state.json').write_text('{}')
    assert tool('verify', tmp_path) == 4 and tool('verify', tmp_path / 'checkpoints' / 'step-00000002') == 0
    assert tool('verify', tmp_path / 'nothing') == 4


def test_the_tool_prunes_what_an_ended_run_needs_no_more(tmp_path, tool, capsys):
    for step in (1, 2, 3, 4, 5, 6):
        save(tmp_path / 'checkpoints', step, {'model': {'w': torch.ones(3)}}, {'hooks': {'CheckpointHook': {'best_step': 2}}}, '')

    def steps() -> list[int]:
        return sorted(map(checkpoints.step_of, checkpoints.folders(tmp_path / 'checkpoints')))

    assert tool('prune', tmp_path, '--keep', 1, '--every', 3, '--dry-run') == 0 and steps() == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out.count('would go') == 3
    assert tool('prune', tmp_path, '--keep', 1, '--every', 3) == 0 and steps() == [2, 3, 6]
    assert tool('prune', tmp_path / 'checkpoints', '--keep', 1) == 4    # no folder of a run

    with contextlib.closing(WorkDirLock(tmp_path)) as lock:    # of a run that lives
        lock.take()
        words = [sys.executable, TOOL, 'prune', tmp_path, '--keep', '1']
        assert subprocess.run(words, capture_output=True).returncode == 4 and steps() == [2, 3, 6]


@pytest.fixture(scope='module')
def one_layer():
    """The config of a network of one layer."""
    from scepter.core.registry import MODELS
    from scepter.models.base import TrainModule

    @MODELS.register_class()
    class OneLayer(TrainModule):
        def __init__(self, cfg, logger=None):
            super().__init__(cfg, logger=logger)
            self.layer = torch.nn.Linear(2, 3)
            self.register_buffer('count', torch.zeros((), dtype=torch.int64))

    return 'SOLVER: {MODEL: {NAME: OneLayer}}\n'


def layer(**more):
    return {'layer.weight': torch.randn(3, 2), 'layer.bias': torch.randn(3), 'count': torch.tensor(4), **more}


def test_the_tool_averages_checkpoints_of_one_network_alone(tmp_path, tool, one_layer, limit):
    a, b, other = layer(), layer(count=torch.tensor(9)), layer(**{'layer.bias': torch.randn(4)})
    paths = [save(tmp_path, i, {'model': weights}, {'left_out': []}, one_layer, limit=limit) for i, weights in enumerate((a, b, other))]

    assert tool('average', tmp_path / 'mean.safetensors', *paths[:2]) == 0
    mean = TensorFile(tmp_path / 'mean.safetensors')
    torch.testing.assert_close(mean['layer.weight'], (a['layer.weight'] + b['layer.weight']) / 2)
    assert mean['count'] == 4
    assert tool('average', tmp_path / 'none.safetensors', *paths) == 4 and not (tmp_path / 'none.safetensors').exists()


def test_the_tool_writes_the_whole_network_to_one_file(tmp_path, tool, one_layer, limit):
    weights = layer()
    averaged = {name: value + 1 for name, value in weights.items()}
    path = save(tmp_path, 5, {'model': weights, 'ema': averaged}, {'left_out': []}, one_layer, limit=limit)

    assert tool('to-single', path, tmp_path / 'x.safetensors') == 0
    assert tool('to-single', path, tmp_path / 'y.safetensors', '--ema', 'off') == 0

    single = TensorFile(tmp_path / 'x.safetensors')
    assert single.metadata['step'] == '5' and 'OneLayer' in single.metadata['config']
    for name, value in weights.items():
        assert torch.equal(single[name], averaged[name]) and torch.equal(TensorFile(tmp_path / 'y.safetensors')[name], value)
