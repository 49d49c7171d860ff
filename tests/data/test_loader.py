from __future__ import annotations

import json
import os
import random
import signal
import time
from itertools import chain, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scepter.core.errors import DataError
from scepter.core.schema import param
from scepter.data.datasets import BaseDataset, UnreadableError
from scepter.data.loader import Loader, OrderedLoader
from scepter.data.order import Sequential


class Numbers(BaseDataset):
    """index -> the index, and a draw of each of the three global generators; those in BAD cannot be read."""

    SIZE: int = param(10)
    BAD: list[int] = param([])
    POISON: int | None = param(None, 'Reading this one ends the process.')

    def __len__(self) -> int:
        return self.SIZE

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.BAD:
            raise UnreadableError('damaged')
        if index == self.POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        draws = torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()])
        return {'index': index, 'draws': draws, 'prompt': f'number {index}'}


def stream(dataset: BaseDataset, batches: int, **options: Any) -> list[tuple[dict, torch.Tensor]]:
    loader = Loader(dataset, **{'seed': 7, **options})
    try:
        return list(islice(loader, batches))
    finally:
        loader.close()


def indices(batches: list[tuple[dict, torch.Tensor]]) -> list[int]:
    return [i for batch, _ in batches for i in batch['index'].tolist()]


def assert_equal(a: list, b: list) -> None:
    for (batch, n), (other, m) in zip(a, b, strict=True):
        assert n.tolist() == m.tolist()
        assert batch['index'].tolist() == other['index'].tolist()
        assert torch.equal(batch['draws'], other['draws'])
        assert batch['prompt'] == other['prompt']


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 9), world=st.integers(1, 4), accu=st.integers(1, 3), seed=st.integers(0, 2 ** 40))
def test_every_epoch_holds_each_sample_once(size, batch, world, accu, seed):
    dataset, group = Numbers({'SIZE': size}), batch * world * accu
    steps = -(-2 * size // group)
    ranks = [stream(dataset, steps * accu, batch_size=batch, seed=seed, rank=r, world_size=world) for r in range(world)]
    index_of = {int(n): i for batches in ranks for b, ns in batches for n, i in zip(ns, b['index'].tolist())}
    assert sorted(index_of) == list(range(steps * group))
    for epoch in range(2):
        assert sorted(index_of[n] for n in range(epoch * size, (epoch + 1) * size)) == list(range(size))


def test_two_epochs_and_two_seeds_have_other_orders():
    dataset = Numbers({'SIZE': 50})
    first, second = indices(stream(dataset, 20, batch_size=5))[:50], indices(stream(dataset, 20, batch_size=5))[50:]
    assert first != second
    assert first != indices(stream(dataset, 10, batch_size=5, seed=8))


def test_a_loader_takes_another_order_than_the_datasets_own():
    assert indices(stream(Numbers({'SIZE': 3}), 2, batch_size=3, order=Sequential(3))) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize('world', [1, 2, 4])
@pytest.mark.parametrize('accu', [1, 2])
def test_any_number_of_processes_sees_the_same_samples_in_each_step(world, accu):
    dataset, batch = Numbers({'SIZE': 11}), 16 // world // accu
    ranks = [stream(dataset, 3 * accu, batch_size=batch, rank=r, world_size=world) for r in range(world)]
    alone = stream(dataset, 3, batch_size=16)
    for step, (expected, n) in enumerate(alone):
        rows = {}
        for batches in ranks:
            for b, ns in batches[step * accu:(step + 1) * accu]:
                rows.update(zip(ns.tolist(), b['draws']))
        assert sorted(rows) == n.tolist()
        assert torch.equal(torch.stack([rows[i] for i in sorted(rows)]), expected['draws'])


@pytest.mark.parametrize('workers', [0, 2])
def test_to_begin_at_a_number_is_to_have_run_to_it(workers):
    dataset = Numbers({'SIZE': 10})
    run = stream(dataset, 12, batch_size=4)
    assert_equal(run[6:], stream(dataset, 6, batch_size=4, first=24, num_workers=workers))


@pytest.mark.parametrize('workers', [1, 2, 3])
def test_batches_of_workers_are_those_of_the_main_process(workers):
    dataset = Numbers({'SIZE': 10, 'BAD': [3], 'PREFETCH': 3})
    assert_equal(stream(dataset, 9, batch_size=3), stream(dataset, 9, batch_size=3, num_workers=workers))


def test_reading_leaves_the_global_generators_as_they_were():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    stream(Numbers({}), 3)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    assert states[2] == random.getstate()


# ------------------------------------------------------------------------------------ unreadable files
def test_an_unreadable_sample_is_replaced_in_its_slot_and_nowhere_else():
    whole, holed = stream(Numbers({'SIZE': 20}), 8), stream(Numbers({'SIZE': 20, 'BAD': [5]}), 8)
    pairs = list(zip(indices(whole), indices(holed)))
    assert [b for a, b in pairs if a != 5] == [a for a, _ in pairs if a != 5]
    assert 5 not in indices(holed)


def test_the_replacement_is_the_same_after_a_resume():
    dataset = Numbers({'SIZE': 6, 'BAD': [1, 4]})
    assert_equal(stream(dataset, 9)[5:], stream(dataset, 4, first=5 * dataset.BATCH_SIZE))


@pytest.mark.parametrize('workers', [0, 2])
def test_an_unreadable_file_is_named_once(workers, tmp_path, said):
    file = tmp_path / 'run' / 'skipped.jsonl'
    stream(Numbers({'SIZE': 6, 'BAD': [2]}), 12, num_workers=workers, skipped_file=file)
    stream(Numbers({'SIZE': 6, 'BAD': [2]}), 12, num_workers=workers, skipped_file=file, first=48)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{'path': 'sample 2', 'reason': 'damaged'}]
    assert sum('sample 2' in m for m in said) == 2    # once by each of the two runs


@pytest.mark.parametrize(('bad', 'fraction', 'allowed'), [(2, 0.01, True), (3, 0.01, False), (3, 0.03, True), (1, 0.0, False)])
def test_the_budget_is_a_share_of_the_files_and_at_least_two(bad, fraction, allowed):
    dataset = Numbers({'SIZE': 100, 'BAD': list(range(bad)), 'MAX_BAD_FRACTION': fraction})
    if allowed:
        stream(dataset, 30)
    else:
        with pytest.raises(DataError, match='sample 0: damaged') as error:
            stream(dataset, 30)
        assert error.value.exit_code == 3


def test_a_dataset_without_one_readable_file_is_an_error_not_a_hang():
    with pytest.raises(DataError, match=r'sample [01] cannot be read, and neither can any that may take its place'):
        stream(Numbers({'SIZE': 2, 'BAD': [0, 1]}), 1)


def test_an_empty_dataset_is_an_error():
    with pytest.raises(DataError, match='holds no sample'):
        Loader(Numbers({'SIZE': 0}), seed=1)


# -------------------------------------------------------------------------------------------- workers
def pids(loader: Loader) -> list[int]:
    return [process.pid for process, _ in loader._batches.reads.workers]


def test_killed_workers_are_replaced_at_the_same_place(said):
    dataset = Numbers({'SIZE': 10})
    expected, found = stream(dataset, 24), []
    loader = Loader(dataset, seed=7, num_workers=2)
    for i in range(24):
        if i in (2, 9, 16):    # further apart than is read ahead: the one before has been missed by then
            os.kill(pids(loader)[i % 2], signal.SIGKILL)
        found.append(next(loader))
    loader.close()
    assert_equal(expected, found)
    deaths = [m for m in said if 'SIGKILL' in m]
    assert len(deaths) == 3
    assert all('memory (RAM)' in m and 'OOM' in m for m in deaths)


def test_deaths_of_more_than_an_hour_ago_do_not_count(said, monkeypatch):
    monkeypatch.setattr('scepter.data.workers.PERIOD', 0.0)     # an hour passes at once
    dataset = Numbers({'SIZE': 10})
    loader, found = Loader(dataset, seed=7, num_workers=1), []
    for i in range(30):
        if i % 6 == 2:
            os.kill(pids(loader)[0], signal.SIGKILL)
        found.append(next(loader))
    loader.close()
    assert_equal(stream(dataset, 30), found)
    assert len([m for m in said if 'SIGKILL' in m and '1 of 3 in' in m]) == 5


def test_a_sample_that_kills_its_worker_each_time_ends_the_run():
    began = time.monotonic()
    with pytest.raises(DataError, match=r'SIGKILL while it read range\(.*4th time'):
        stream(Numbers({'SIZE': 4, 'POISON': 2}), 4, num_workers=1)
    assert time.monotonic() - began < 20


def test_a_worker_that_is_stopped_counts_as_stuck():
    dataset = Numbers({'SIZE': 10, 'TIMEOUT': 1.0})
    loader = Loader(dataset, seed=7, num_workers=1)
    found = [next(loader)]
    os.kill(pids(loader)[0], signal.SIGSTOP)
    found += islice(loader, 5)
    loader.close()
    assert_equal(stream(dataset, 6), found)


def test_workers_ignore_sigterm_from_their_first_instruction():
    for _ in range(10):
        loader = Loader(Numbers({}), seed=7, num_workers=2)
        before = pids(loader)
        for pid in before:
            os.kill(pid, signal.SIGTERM)    # they have hardly begun
        list(islice(loader, 6))
        for pid in before:
            os.kill(pid, signal.SIGTERM)
        list(islice(loader, 6))
        assert pids(loader) == before
        loader.close()


def test_a_closed_or_dropped_loader_leaves_no_process():
    loaders = [Loader(Numbers({}), seed=7, num_workers=2) for _ in range(2)]
    found = [pid for loader in loaders for pid in pids(loader)]
    loaders[0].close()
    loaders.clear()
    for pid in found:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def train_and_end(pipe: Connection, is_killed: bool) -> None:
    loader = Loader(Numbers({}), seed=7, num_workers=2)
    next(loader)
    pipe.send(pids(loader))
    if is_killed:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('is_killed', [False, True])
def test_no_worker_outlives_its_trainer(is_killed):
    ours, theirs = get_context('fork').Pipe()
    trainer = get_context('fork').Process(target=train_and_end, args=(theirs, is_killed))
    trainer.start()
    found = ours.recv()
    trainer.join(10)
    assert trainer.exitcode == (-signal.SIGKILL if is_killed else 0)
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in found)


def is_running(pid: int) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'    # an orphan may wait for an init that does not reap
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_error_in_a_worker_keeps_its_kind_and_its_traceback():
    class Broken(Numbers):
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise KeyError('a defect of the dataset')

    with pytest.raises(KeyError, match='a defect') as error:
        stream(Broken({}), 1, num_workers=1)
    assert '__getitem__' in str(error.value.__cause__)


# ----------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize('world', [1, 2, 3])
@pytest.mark.parametrize('workers', [0, 2])
def test_an_ordered_loader_gives_every_sample_once_in_order(world, workers):
    loaders = [OrderedLoader(Numbers({'SIZE': 11}), 2, rank=r, world_size=world, num_workers=workers) for r in range(world)]
    seen = [[n.tolist() for _, n in loader] for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(batches) for batches in seen]
    assert sorted(chain(*seen)) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]


def test_each_pass_of_an_ordered_loader_is_the_same():
    loader = OrderedLoader(Numbers({'SIZE': 5}), 2)
    assert_equal(list(loader), list(loader))


def test_an_ordered_loader_leaves_out_what_cannot_be_read():
    loader = OrderedLoader(Numbers({'SIZE': 5, 'BAD': [2, 3]}), 2)
    assert [n.tolist() for _, n in loader] == [[0, 1], [4]]


# -------------------------------------------------------------------------------------------- batches
def collate(*samples: dict[str, Any]) -> dict[str, Any]:
    return Numbers({}).collate(list(samples), ['a.png', 'b.png'])


def test_a_batch_stacks_numbers_and_lists_words():
    batch = collate(*({'image': torch.zeros(3, 2, 2), 'label': i, 'target_size': (4, 8), 'prompt': 'a', 'more': {}} for i in range(2)))
    assert batch['image'].shape == (2, 3, 2, 2)
    assert batch['label'].tolist() == [0, 1] and batch['label'].dtype == torch.int64
    assert batch['target_size'].tolist() == [[4, 8], [4, 8]]
    assert batch['prompt'] == ['a', 'a'] and batch['more'] == [{}, {}]


def test_images_of_two_shapes_are_an_error_that_names_both():
    with pytest.raises(DataError, match=r'image has shape \[3, 2, 2\] in a\.png, but \[3, 2, 4\] in b\.png'):
        collate({'image': torch.zeros(3, 2, 2)}, {'image': torch.zeros(3, 2, 4)})


def test_samples_of_other_keys_are_an_error_that_names_both():
    with pytest.raises(DataError, match=r'a\.png has label; b\.png has label, prompt'):
        collate({'label': 1}, {'label': 1, 'prompt': ''})
