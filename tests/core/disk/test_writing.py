"""A checkpoint that several processes write together: the files of a single process, or nothing at all and an error everywhere."""
from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scepter.core.config import Config
from scepter.core.disk import atomic, checkpoints
from scepter.core.disk.checkpoints import MANIFEST, load, save
from scepter.core.disk.writing import Save, as_json
from scepter.core.env import Exit, we
from scepter.core.errors import CheckpointError, PeerError
from scepter.core.launch import launch
from scepter.core.shards import fill_from
from tiny import memory_for

TWO = {'NPROC': 2, 'DEVICE': 'cpu', 'THREADS': 1}
STATE = {'state.json': json.dumps({'value': 1}, indent=1), 'config.yaml': 'A: 1\n'}
LIMIT = 3000     # bytes of a file
MEGABYTE = 1 << 20


def tensors() -> dict[str, dict[str, Tensor]]:
    """Weights of every kind of length, an average that fits one file, and moments. The groups are cut into three files and more."""
    draw = torch.Generator().manual_seed(0)
    shapes = {'w': (20, 30), 'odd': (7, 11), 'single': (1, 50), 'short.bias': (3,), 'large': (41, 37), 'scale': (), 'none': (0, 4)}
    model = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    model |= {'half': torch.randn(9, 8, generator=draw).bfloat16(), 'count': torch.tensor(3), 'flags': torch.rand(5, generator=draw) > 0.5}
    moments = {f'{name}/exp_avg': torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return {'model': model, 'ema': {'w': torch.randn(20, 30, generator=draw)}, 'optimizer': moments}


def shared(groups: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """This process's shares of all that can be cut, as FSDP2 holds them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    mesh = init_device_mesh('cpu', (we.world_size,))
    return {group: {name: distribute_tensor(value, mesh, [Shard(0)]) if value.ndim and value.is_floating_point() else value
                    for name, value in below.items()} for group, below in groups.items()}


def written(root: Path, contents: Any, texts: Any = STATE, line: Any = None) -> Path:
    return checkpoints.write(Save.of(root, 1, lambda: (contents, texts), LIMIT, line=line))


def everybody_hears(words: str, root: Path, work: Callable[[], object], kind: type[Exception] = CheckpointError) -> None:
    """The error is the same in both processes, comes at once, and nothing of the checkpoint is left."""
    begin = time.monotonic()
    with pytest.raises(kind, match=words):
        work()
    assert time.monotonic() - begin < 5
    we.barrier()     # the main process, too, has left
    assert not root.exists() or list(root.iterdir()) == []


# ------------------------------------------------------------------------------------------------ one process
def test_a_group_is_cut_into_files_of_at_most_so_many_bytes_and_read_as_one(tmp_path):
    groups = tensors()
    path = save(tmp_path, 1, groups, {}, '', limit=LIMIT)

    loaded = load(path)
    names = sorted(p.name for p in path.glob('model*'))
    assert len(names) > 2 and names[0] == 'model-00001.safetensors' and (path / 'ema.safetensors').exists()
    for file, inside in loaded.manifest['index'].items():
        assert len(inside) == 1 or sum(loaded.group(file.split('-')[0])[name].nbytes for name in inside) <= LIMIT
    for group, below in groups.items():
        assert loaded.tensors(group).keys() == below.keys()
        assert all(torch.equal(loaded.tensors(group)[name], value) for name, value in below.items())


def test_one_tensor_of_many_files_is_read_by_opening_one(tmp_path):
    path = save(tmp_path, 1, tensors(), {}, '', limit=LIMIT)
    found = load(path).tensors('model')
    place = next(file for file, names in load(path).manifest['index'].items() if 'w' in names and file.startswith('model'))
    for other in path.glob('model-*'):
        if other.name != place:
            other.unlink()

    assert torch.equal(found['w'], tensors()['model']['w'])
    with pytest.raises(CheckpointError, match='missing'):
        load(path)


@pytest.mark.parametrize('change', [lambda index: {}, lambda index: {file: [*names, 'w'] for file, names in index.items()}, dict.fromkeys],
                         ids=['none', 'twice', 'null'])
def test_an_index_that_does_not_say_where_each_tensor_lies_is_refused(tmp_path, change):
    path = save(tmp_path, 1, tensors(), {}, '', limit=LIMIT)
    reseal(path, change)

    with pytest.raises(CheckpointError, match='refused'):
        load(path)


def test_an_index_that_names_other_tensors_than_a_file_holds_is_refused_when_it_is_opened(tmp_path):
    path = save(tmp_path, 1, tensors(), {}, '', limit=LIMIT)
    reseal(path, lambda index: {file: [f'{name}.x' for name in names] for file, names in index.items()})

    with pytest.raises(CheckpointError, match=rf'model-0000\d.safetensors: holds \d tensors, not the \d that {MANIFEST} says'):
        load(path).group('model')


def reseal(path: Path, change: Callable[[dict], Any]) -> None:
    from scepter.core.disk import manifests
    manifest = json.loads((path / MANIFEST).read_text())
    manifest.pop('sha256')
    (path / MANIFEST).write_bytes(manifests.sealed({**manifest, 'index': change(manifest['index'])}))


# ------------------------------------------------------------------------------------------------ two
def both(cfg: Config) -> None:
    """What each of two processes does."""
    folder, groups = Path(cfg.FOLDER), tensors()
    line = we.new_line()
    written(folder / 'shares', shared(groups), line=line)
    mine = groups if we.is_main else {**groups, 'ema': {}}     # of what fits one file, nobody asks the others
    written(folder / 'whole', mine)
    for name, contents in (('shares', shared(groups)), ('whole', groups)):     # each on a machine of its own, with its own folder
        (folder / f'machine {we.rank}').mkdir(exist_ok=True)
        os.chdir(folder / f'machine {we.rank}')
        written(Path(name), contents)
    everybody_hears(r'no space for .*step-00000001', folder / 'full 1', lambda: full_on_rank_1(folder / 'full 1', shared(groups)))
    everybody_hears(r'no space for .*step-00000001', folder / 'full 2', lambda: full_on_rank_1(folder / 'full 2', groups))
    other = {**groups, 'optimizer': {}} if we.rank == 1 else groups
    everybody_hears(r'optimizer: .* is not the torch.float32 \[.*\] here that the main', folder / 'other',
                    lambda: written(folder / 'other', other))
    everybody_hears('the state is not plain JSON', folder / 'json', lambda: checkpoints.write(Save.of(folder / 'json', 1, with_bad_state)))
    damaged = shared(groups)
    if we.rank == 1:
        damaged['model']['large'].to_local()[3, 4] = float('nan')
    everybody_hears('NaN or infinity: model: large', folder / 'nan', lambda: written(folder / 'nan', damaged))
    if sys.platform == 'linux':
        small_in_memory(folder / 'memory')
        reads_its_rows(folder / 'memory', shared({'model': {str(i): torch.zeros(8, MEGABYTE) for i in range(8)}})['model'])


def with_bad_state() -> Any:
    if not we.is_main:
        return tensors(), {}
    return tensors(), {'state.json': as_json({'hook': torch.ones(2)}, 'the state')}


def full_on_rank_1(root: Path, groups: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if we.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        written(root, groups)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def small_in_memory(root: Path) -> None:
    """No process ever has more than one whole tensor beside its own shares."""
    groups = {'model': {f'{i}': torch.full((8, MEGABYTE), float(i)) for i in range(8)}}     # 32 MB each
    shares = shared(groups)
    del groups
    grown = memory_for(lambda: checkpoints.write(Save.of(root, 1, lambda: (shares, STATE), 60 * MEGABYTE)))
    assert grown < 2.5 * 32 * MEGABYTE, grown / MEGABYTE     # the tensor, and its shares under way


def reads_its_rows(root: Path, shares: dict[str, Tensor]) -> None:
    """Half of 256 MB in each of two processes, and in its place."""
    stored = load(root, 'size').tensors('model')
    before = read_so_far()
    for name, share in shares.items():
        fill_from(share, partial(stored.__getitem__, name), partial(stored.rows, name))
    assert 128 <= (read_so_far() - before) / MEGABYTE < 130
    assert all((share.to_local() == float(name)).all() for name, share in shares.items())


def read_so_far() -> int:
    return int(re.search(r'rchar: (\d+)', Path('/proc/self/io').read_text())[1])


@pytest.mark.parametrize('limit', [1e9, 100], ids=['one file', 'several'])
def test_rows_of_a_stored_tensor_are_read_alone(tmp_path, limit):
    groups = tensors()
    stored = load(save(tmp_path, 1, groups, {}, '', limit=limit)).tensors('model')

    for name, value in groups['model'].items():
        assert (stored.slot(name).shape, stored.slot(name).dtype) == (value.shape, value.dtype)
        for first, last in ((0, 1), (1, 3), (2, 2)) if value.ndim else ():
            if last <= len(value):
                assert torch.equal(stored.rows(name, first, last), value[first:last])


def test_two_processes_write_the_files_of_one_byte_for_byte_or_nothing(tmp_path):
    launch(Config({'FOLDER': str(tmp_path), 'ENV': TWO}), both)
    alone = save(tmp_path / 'alone', 1, tensors(), {'value': 1}, 'A: 1\n', limit=LIMIT)

    assert len(list(alone.iterdir())) == 10
    assert not list((tmp_path / 'machine 1').rglob('*.safetensors'))
    for together in (load(tmp_path / kind / 'step-00000001').path for kind in ('shares', 'whole', 'machine 0/shares', 'machine 0/whole')):
        assert {p.name: p.read_bytes() for p in together.iterdir()} == {p.name: p.read_bytes() for p in alone.iterdir()}


def killed(cfg: Config) -> None:
    """Rank 1 is killed at one of its writes; the other one hears of it at once."""
    groups = shared(tensors())
    written(Path(cfg.FOLDER) / 'checkpoints', groups)
    if we.rank == 1:
        atomic.os = KilledOs(cfg.WRITES)     # type: ignore[assignment]
    (Path(cfg.FOLDER) / 'begun').write_text(f'{time.time()}')
    checkpoints.write(Save.of(Path(cfg.FOLDER) / 'checkpoints', 2, lambda: (groups, STATE), LIMIT))


class KilledOs:
    """The os module, whose write is the end after so many."""

    def __init__(self, left: int):
        self.left = left

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, file: int, data: memoryview) -> int:
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return os.write(file, data)


@pytest.mark.parametrize('writes', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_before_the_commit_leaves_nothing_that_could_be_chosen(tmp_path, writes):
    with pytest.raises(Exit) as end:
        launch(Config({'FOLDER': str(tmp_path), 'WRITES': writes, 'ENV': TWO}), killed)

    assert end.value.code == PeerError.exit_code and time.time() - float((tmp_path / 'begun').read_text()) < 5
    checkpoints.preflight(tmp_path / 'checkpoints')
    assert checkpoints.resolve(tmp_path, 'latest').step == 1
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['step-00000001']


def test_what_all_processes_left_when_they_were_killed_is_gone_at_the_next_start(tmp_path):
    save(tmp_path / 'checkpoints', 1, tensors(), {}, '')
    left = tmp_path / 'checkpoints' / '.tmp-77-0123abcd-step-00000002'
    left.mkdir()
    for name in ('model-00001.safetensors', 'model-00002.safetensors'):
        (left / name).write_text('half of it')

    checkpoints.preflight(tmp_path / 'checkpoints')

    assert checkpoints.resolve(tmp_path, 'auto').step == 1 and not left.exists()
