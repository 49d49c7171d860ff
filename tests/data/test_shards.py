"""Rows of a shard: whatever damages a file or its index is noticed, and costs the rows that it hit and no other."""
from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from scepter.data.shards import KEY_BYTES, Row, Shards, index_of, key_of, name_of, restore_index, write_shard

KEYS = [key_of('row', i) for i in range(12)]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Twelve rows of two tensors."""
    return write_shard(tmp_path, KEYS, rows())


def rows() -> Row:
    torch.manual_seed(0)
    return {'moments': torch.randn(12, 4, 3, 3, dtype=torch.float16), 'size': torch.randint(0, 99, (12, 2))}


def as_keys(keys: list[bytes]) -> np.ndarray:
    return np.frombuffer(b''.join(keys), np.uint8).reshape(-1, KEY_BYTES)


def row_of(shards: Shards, number: int) -> Row | ValueError | OSError:
    found, = shards.rows(np.array([number]))
    return {name: column[found[1]] for name, column in found[0].items()} if isinstance(found, tuple) else found


def read(folder: Path) -> dict[int, bool]:
    """Of each row that can be found, whether it is given; one that is given is what was written."""
    shards, written, found = Shards(folder), rows(), {}
    for i, number in enumerate(shards.find(as_keys(KEYS)).tolist()):
        if number < 0:
            continue
        row = row_of(shards, number)
        found[i] = not isinstance(row, ValueError)
        if not isinstance(row, ValueError):
            assert row.keys() == written.keys() and all(torch.equal(value, written[name][i]) for name, value in row.items()), i
    return found


def test_rows_come_back_under_their_keys_and_others_do_not(shard):
    more = write_shard(shard.parent, [key_of('more')], {'moments': torch.ones(1, 2)})
    shards = copy.deepcopy(Shards(shard.parent))    # as a worker gets it

    assert read(shard.parent) == dict.fromkeys(range(12), True) and len(shards) == 13 and not shards.verify()
    assert torch.equal(row_of(shards, shards.find(as_keys([key_of('more')]))[0])['moments'], torch.ones(2)) and more != shard
    assert shards.find(as_keys([key_of('row', 12), KEYS[0][:8] + bytes(8)])).tolist() == [-1, -1]
    with safe_open(shard, 'pt') as file:    # any reader of safetensors opens it
        assert torch.equal(file.get_tensor('moments'), rows()['moments'])


def test_a_shard_has_the_same_bytes_whoever_writes_it(shard, tmp_path_factory):
    other = write_shard(tmp_path_factory.mktemp('other'), KEYS, rows())

    assert other.name == shard.name == f'{name_of(KEYS)}.safetensors'
    assert other.read_bytes() == shard.read_bytes() and index_of(other).read_bytes() == index_of(shard).read_bytes()


def test_a_shard_never_appears_before_its_index(tmp_path):
    keys = [key_of('a')]
    in_the_way = tmp_path / f'{name_of(keys)}.safetensors'
    in_the_way.mkdir()

    with pytest.raises(OSError, match='directory'):
        write_shard(tmp_path, keys, {'x': torch.zeros(1, 2)})    # ends where it would appear, as by a kill
    assert index_of(in_the_way).is_file()
    in_the_way.rmdir()
    assert not Shards(tmp_path).shards and write_shard(tmp_path, keys, {'x': torch.zeros(1, 2)}) == in_the_way
    assert Shards(tmp_path).shards[0].has_index


def test_every_one_of_500_flipped_bytes_is_found_and_costs_one_row_at_most(shard):
    data, draw = shard.read_bytes(), random.Random(0)
    for _ in range(500):
        place = draw.randrange(len(data))
        shard.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1:])
        faults, given = Shards(shard.parent).verify(), read(shard.parent)
        assert faults and len(given) == 12 and list(given.values()).count(False) == sum(fault.rows for fault in faults) <= 1, place


def test_a_shard_cut_off_anywhere_gives_all_rows_that_it_still_has(shard):
    data, whole = shard.read_bytes(), rows()
    starts = json.loads(index_of(shard).read_text())['fields']
    for cut in random.Random(0).sample(range(len(data)), 64):
        shard.write_bytes(data[:cut])
        shards = Shards(shard.parent)
        ends = [max(starts[name]['start'] + (i + 1) * value[0].nbytes for name, value in whole.items()) for i in range(12)]
        assert shards.verify() and shards.faults and read(shard.parent) == {i: True for i in range(12) if ends[i] <= cut}


@pytest.mark.parametrize('damage', [None, b'', b'{"format": "1"}', b'\x00' * 80])
def test_without_its_index_a_shard_is_read_by_its_own(shard, damage):
    index, text = index_of(shard), index_of(shard).read_bytes()
    index.unlink() if damage is None else index.write_bytes(damage)
    shards = Shards(shard.parent)

    assert [fault.file for fault in shards.verify()] == [index] and read(shard.parent) == dict.fromkeys(range(12), True)
    restore_index(shards.shards[0])
    assert index.read_bytes() == text and not Shards(shard.parent).verify()


def test_without_both_nothing_of_it_is_believed(shard):
    index_of(shard).unlink()
    shard.write_bytes(b'\xff' * 8 + shard.read_bytes()[8:])
    shards = Shards(shard.parent)

    assert len(shards) == 0 and [fault.file for fault in shards.verify()] == [shard] and 'can be read' in shards.faults[0].what


def test_an_index_whose_byte_was_changed_is_not_believed(shard):
    index = index_of(shard)
    text = index.read_text()
    place = text.index('"start": ') + 9
    index.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1:])

    assert read(shard.parent) == dict.fromkeys(range(12), True) and len(Shards(shard.parent).verify()) == 1


def test_a_shard_of_another_format_is_refused_and_its_rows_are_missing(shard, monkeypatch):
    monkeypatch.setattr('scepter.data.shards.FORMAT', 2)
    shards = Shards(shard.parent)

    assert len(shards) == 0 and 'format 1, this version of scepter reads format 2' in shards.faults[0].what
