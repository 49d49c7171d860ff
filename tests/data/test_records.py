"""Record files against those of the public writer, byte for byte, and what a damaged or unusual folder does."""
from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepter.core.errors import DataError
from scepter.data.records import RecordReader, RecordWriter, _decode_map, _encode_map, join_shards
from tests.models.nova_cases import folders, kind_of

SETS = [folder for root in folders() if kind_of(root) == 'records' for folder in sorted(root.iterdir()) if folder.is_dir()]


@pytest.mark.parametrize('folder', SETS, ids=lambda f: f.name)
def test_the_public_files_say_what_the_public_reader_says(folder: Path):
    reader = RecordReader(folder)

    expected = json.loads(folder.with_name(f'{folder.name}.expected.json').read_text(encoding='utf-8'))

    assert len(reader) == len(expected)
    for ours, theirs in zip(reader, expected):
        assert told(ours, theirs) == theirs


@pytest.mark.parametrize('folder', SETS, ids=lambda f: f.name)
def test_the_public_files_are_written_byte_for_byte(folder: Path, tmp_path: Path):
    reader = RecordReader(folder)

    with RecordWriter(tmp_path, reader.features, max_examples=len(reader.spans[0])) as writer:
        for example in reader:
            writer.write(example)

    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {f.name: f.read_bytes() for f in folder.iterdir()}


def test_the_guides_example_goes_in_and_comes_out(tmp_path: Path):
    features = {'moments': 'bytes', 'caption': 'string', 'text': 'string', 'shape': ['int64']}
    x = np.arange(32, dtype=np.float16).reshape(8, 2, 2)
    writer = RecordWriter(str(tmp_path), features)

    writer.write({'shape': x.shape, 'moments': x.tobytes(), 'caption': 'lång 🐦', 'text': ''}), writer.close()

    assert RecordReader(tmp_path)[0] == {'shape': [8, 2, 2], 'moments': x.tobytes(), 'caption': 'lång 🐦', 'text': ''}
    assert features == {'moments': 'bytes', 'caption': 'string', 'text': 'string', 'shape': ['int64']}


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=4), st.one_of(
    st.binary(max_size=300), st.text(max_size=20), st.integers(-2 ** 63, 2 ** 63 - 1), st.floats(width=32, allow_nan=False),
    st.lists(st.integers(-2 ** 63, 2 ** 63 - 1), max_size=4), st.dictionaries(st.text(max_size=3), st.binary(max_size=9), max_size=3)),
    max_size=5))
def test_whatever_is_written_is_read(example: dict[str, Any]):
    def kind(value: Any) -> Any:
        if isinstance(value, dict):
            return dict.fromkeys(value, 'BYTES')
        return ['INT64'] if isinstance(value, list) else {bytes: 'BYTES', str: 'STRING', int: 'INT64', float: 'FLOAT32'}[type(value)]
    features = {name: kind(value) for name, value in example.items()}

    assert _decode_map(memoryview(_encode_map(example, features, '')), features) == example


def test_shards_hold_as_many_as_are_allowed_and_are_read_as_one(tmp_path: Path):
    write(tmp_path, 7, max_examples=3)

    assert sorted(f.name for f in tmp_path.glob('*.data')) == ['00000.data', '00001.data', '00002.data']
    assert [example['number'] for example in RecordReader(tmp_path)] == list(range(7))


def test_a_folder_that_another_writer_took_away_leaves_no_joined_shard(tmp_path: Path):
    (tmp_path / 'a').mkdir()
    write(tmp_path / 'a', 2)

    with pytest.raises(FileNotFoundError):
        join_shards([tmp_path / 'a', tmp_path / 'b'], tmp_path / 'whole' / '00000')
    assert not list((tmp_path / 'whole').iterdir())


def test_what_an_example_lacks_reads_as_nothing(tmp_path: Path):
    features = {'a': 'bytes', 'b': 'string', 'c': 'int64', 'd': 'float64', 'e': ['string'], 'f': {'g': 'int64'}}
    with RecordWriter(tmp_path, features) as writer:
        writer.write({})

    assert RecordReader(tmp_path)[0] == {'a': b'', 'b': '', 'c': 0, 'd': 0.0, 'e': [], 'f': {'g': 0}}


def test_a_million_examples_open_within_a_second(tmp_path: Path):
    (tmp_path / '00000.data').write_bytes(b'')
    (tmp_path / '00000.index').write_text(''.join(f'{i * 262301} 262301\n' for i in range(1_000_000)), encoding='ascii')
    (tmp_path / 'METADATA').write_text(json.dumps({'entries': 1_000_000, 'features': {'a': 'BYTES'}, 'version': 1}), encoding='utf-8')

    begin = time.perf_counter()
    reader = RecordReader(tmp_path)
    seconds = time.perf_counter() - begin

    assert len(reader) == 1_000_000 and seconds < 1


def test_a_truncated_file_names_the_example_and_leaves_the_others(tmp_path: Path):
    write(tmp_path, 5, max_examples=3)
    data = tmp_path / '00001.data'
    data.write_bytes(data.read_bytes()[:-1])

    reader = RecordReader(tmp_path)

    assert reader[3]['number'] == 3
    with pytest.raises(ValueError, match=r'00001\.data: example 1: the file is truncated: \d+ of \d+ bytes'):
        reader[4]


def test_damaged_bytes_name_the_example(tmp_path: Path):
    write(tmp_path, 1)
    data = tmp_path / '00000.data'
    whole = data.read_bytes()

    for place in range(len(whole)):
        data.write_bytes(whole[:place] + b'\xff' + whole[place + 1:])
        try:
            assert RecordReader(tmp_path)[0].keys() == {'number', 'words'}
        except ValueError as error:
            assert 'example 0: ' in str(error)


@pytest.mark.parametrize('damage, words', [
    (lambda f: (f / 'METADATA').unlink(), 'a writer that was not closed leaves none'),
    (lambda f: (f / 'METADATA').write_text('{"entries": 5}'), "KeyError: 'features'"),
    (lambda f: (f / '00001.index').unlink(), 'counts 5 examples, but the 1 indices 3'),
    (lambda f: (f / '00001.index').write_bytes((f / '00001.index').read_bytes()[:-2]), 'cut off or damaged'),
    (lambda f: (f / '00001.index').write_bytes(b'0 a\n7 4\n'), 'cut off or damaged')])
def test_a_folder_that_is_not_whole_is_refused_when_it_is_opened(tmp_path: Path, damage: Any, words: str):
    write(tmp_path, 5, max_examples=3)
    damage(tmp_path)

    with pytest.raises(DataError, match=words):
        RecordReader(tmp_path)


def test_a_writer_refuses_what_would_not_be_read(tmp_path: Path):
    writer = RecordWriter(tmp_path, {'label': 'int64', 'text': 'string'})

    for example, words in (({'lable': 3}, 'did you mean label'), ({'label': 'three'}, 'expected INT64'), ({'label': 1.5}, 'expected INT64'),
                           ({'text': b'x'}, 'expected STRING'), ({'label': 2 ** 63}, 'more than 64 bits')):
        with pytest.raises(DataError, match=words):
            writer.write(example)
    writer.write({'label': np.int32(3), 'text': 'x'})
    writer.close()
    with pytest.raises(DataError, match='has been closed'):
        writer.write({})
    with pytest.raises(DataError, match='is there already'):
        RecordWriter(tmp_path, {'label': 'int64'}).write({})
    with pytest.raises(DataError, match="type 'int8'"):
        RecordWriter(tmp_path, {'label': 'int8'})
    with pytest.raises(DataError, match='no folder'):
        RecordWriter(tmp_path / 'absent', {})


def test_a_writer_without_an_example_leaves_nothing(tmp_path: Path):
    RecordWriter(tmp_path, {'a': 'bytes'}).close()

    assert list(tmp_path.iterdir()) == []


def write(folder: Path, count: int, **how: Any) -> None:
    with RecordWriter(folder, {'number': 'int64', 'words': ['string']}, **how) as writer:
        for number in range(count):
            writer.write({'number': number, 'words': ['a', str(number)]})


def told(ours: Any, theirs: Any) -> Any:
    """An example in the words of the expectation: bytes in hex, or by their length and what the halves in them say."""
    if isinstance(ours, dict):
        return {name: told(value, theirs[name]) for name, value in ours.items()}
    if not isinstance(ours, bytes):
        return ours
    if '__bytes_hex__' in theirs:
        return {'__bytes_hex__': ours.hex()}
    halves = np.frombuffer(ours, np.float16)
    return {'__bytes_len__': len(ours), '__fp16_head__': halves[:8].astype(float).tolist(),
            '__fp16_sum__': pytest.approx(float(halves.astype(np.float64).sum()), rel=1e-4)}
