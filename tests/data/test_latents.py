"""Cached latents as samples: what a record becomes, which caption is taken, and batches through the loader."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scepter.components  # noqa: F401
from scepter.core.errors import DataError
from scepter.core.registry import DATASETS
from scepter.data.latents import first_sentence
from scepter.data.loader import Loader
from scepter.data.records import RecordReader, RecordWriter
from tests.models.nova_cases import HERE

WORDS = {'moments': 'bytes', 'shape': ['int64'], 'caption': 'string', 'text': 'string'}


def dataset(folder: Path, **keys: Any) -> Any:
    return DATASETS.build({'NAME': 'LatentRecordDataset', 'DATA_FOLDER': str(folder), **keys})


def write(folder: Path, records: list[dict[str, Any]], features: dict[str, Any] = WORDS, shape: tuple[int, ...] = (8, 2, 3)) -> Path:
    folder.mkdir(exist_ok=True)
    with RecordWriter(folder, features, max_examples=2) as writer:
        for i, record in enumerate(records):
            x = np.full(record.pop('of', shape), i, np.float16)
            writer.write({'moments': x.tobytes(), 'shape': x.shape, **record} if 'moments' in features else record)
    return folder


def test_the_public_records_become_samples():
    sharded, clips, labels, cached = (dataset(HERE / 'records' / n) for n in ('img_sharded', 'vid_flow', 'class_label', 'cached_text'))

    assert sharded[4]['moments'].dtype == torch.float16 and list(sharded[4]['moments'].shape) == [8, 4, 6]
    assert clips[0].keys() == {'moments', 'prompt', 'motion_flow'} and clips[0]['motion_flow'] == 5.0 and clips[0]['moments'].ndim == 4
    assert labels[1]['label'] == 333 and 'prompt' not in labels[1]
    assert {tuple(cached[0]['prompt'].shape) for _ in range(30)} == {(4, 6), (2, 6)}
    assert {tuple(cached[1]['prompt'].shape) for _ in range(30)} == {(5, 6)}    # its short text was not cached


def test_the_short_prompt_is_the_text_or_the_first_sentence():
    for caption, sentence in (('A bird. It sings.', 'A bird.'), ('Why? Because', 'Why?'), ('No. 5', 'No.'), ('3.5 m', '3.5 m'), ('', '')):
        assert first_sentence(caption) == sentence


@pytest.mark.parametrize('probability, prompts', [(1.0, {'A b. C d.'}), (0.0, {'short', 'A b.'}), (0.5, {'A b. C d.', 'short', 'A b.'})])
def test_caption_prob_is_how_often_the_long_caption_is_taken(tmp_path: Path, probability: float, prompts: set[str]):
    folder = write(tmp_path, [{'caption': 'A b. C d.', 'text': 'short'}, {'caption': 'A b. C d.', 'text': ''}])
    loader = Loader(dataset(folder, CAPTION_PROB=probability), 50, seed=1)

    batch, _ = next(loader)

    assert set(batch['prompt']) == prompts
    if probability == 0.5:
        assert 12 <= batch['prompt'].count('A b. C d.') <= 38


def test_a_sample_is_a_function_of_its_number_alone(tmp_path: Path):
    data = dataset(write(tmp_path, [{'caption': f'long {i}. More.', 'text': f'short {i}'} for i in range(5)]))

    whole, halves = Loader(data, 4, seed=3), [Loader(data, 2, seed=3, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(4):
        batch, parts = next(whole)[0], [next(half)[0] for half in halves]
        assert batch['prompt'] == parts[0]['prompt'] + parts[1]['prompt']
        assert torch.equal(batch['moments'], torch.cat([part['moments'] for part in parts]))


def test_one_record_fills_the_batches_of_many_ranks(tmp_path: Path):
    data = dataset(write(tmp_path, [{'caption': 'a', 'text': 'b'}]))

    for rank in range(4):
        batch, n = next(Loader(data, 2, seed=3, rank=rank, world_size=4))
        assert list(batch['moments'].shape) == [2, 8, 2, 3] and n.tolist() == [2 * rank, 2 * rank + 1]


def test_every_rank_sees_what_the_public_reader_shares_out_and_none_is_left_without():
    """reader_order.json has what the public one emits: whole epochs, partitions that stay or turn, and an end where a rank gets nothing."""
    public = json.loads((HERE / 'records' / 'reader_order.json').read_text(encoding='utf-8'))
    folder = HERE / 'records' / 'img_sharded'
    names = [record['text'] or record['caption'] for record in RecordReader(folder)]
    data = dataset(folder, CAPTION_PROB=0.0)
    short = {data[i]['prompt']: i for i in range(len(data))}

    assert public['part3of4(5 examples)'] == {'values': [], 'error': 'StopIteration'} and len(names) == len(short) == 5
    for world in (1, 2, 4, 8):
        ranks = [Loader(data, 1, seed=5, rank=rank, world_size=world) for rank in range(world)]
        seen = [[short[next(rank)[0]['prompt'][0]] for _ in range(40 // world)] for rank in ranks]
        stream = [number for step in zip(*seen) for number in step]
        # of each epoch every example once, as the public reader has it with one partition; no rank waits, whatever the number of ranks
        assert [sorted(stream[first:first + 5]) for first in range(0, 40, 5)] == [list(range(5))] * 8
        assert world == 1 or all(len(set(numbers)) > 1 for numbers in seen)    # nobody keeps a partition of its own
    assert sorted(public['no_shuffle'][:5]) == sorted(public['part1of2_unstick'][:5]) and len(set(public['part1of2'])) == 2


def test_a_second_set_goes_over_the_first(tmp_path: Path):
    first = write(tmp_path / 'first', [{'caption': 'a', 'text': ''}, {'caption': 'b', 'text': ''}])
    kind = {'caption': {'data': 'bytes', 'shape': ['int64']}, 'text': {'data': 'bytes', 'shape': ['int64']}}
    cached = {'data': np.ones((3, 4), np.float16).tobytes(), 'shape': [3, 4]}
    second = write(tmp_path / 'second', [{'caption': cached}] * 2, kind)

    data = dataset(first, SECOND_FOLDER=str(second))

    assert torch.equal(data[1]['prompt'], torch.ones(3, 4, dtype=torch.float16)) and data[1]['moments'].unique().item() == 1
    with pytest.raises(DataError, match=r'holds 1 records, but .* 2'):
        dataset(write(tmp_path / 'third', [{}]), SECOND_FOLDER=str(second))


def test_a_truncated_record_is_named_and_replaced(tmp_path: Path):
    folder = write(tmp_path, [{'caption': str(i), 'text': ''} for i in range(5)])
    cut = folder / '00002.data'
    cut.write_bytes(cut.read_bytes()[:-3])
    loader = Loader(dataset(folder), 5, seed=0)

    batch, _ = next(loader)

    assert list(loader.skipped) == [f'{cut}: example 0'] and 'truncated' in next(iter(loader.skipped.values()))
    assert '4' not in batch['prompt'] and len(batch['prompt']) == 5


def test_what_is_not_whole_or_does_not_fit_is_said(tmp_path: Path):
    with pytest.raises(DataError, match='no feature moments and shape'):
        dataset(write(tmp_path / 'a', [{'number': 1}], {'number': 'int64'}))
    wrong = write(tmp_path / 'b', [{'shape': [8, 2, 4]}])
    with pytest.raises(Exception, match=r'96 bytes are not an array of halves of shape \[8, 2, 4\]'):
        dataset(wrong)[0]


@pytest.mark.parametrize('world', [1, 2])
def test_a_step_has_moments_of_one_shape_on_all_ranks(tmp_path: Path, world: int):
    data = dataset(write(tmp_path, [{'of': [(8, 2, 3), (8, 3, 2), (8, 2, 2, 3)][i % 3], 'caption': str(i), 'text': ''} for i in range(15)]))
    loaders = [Loader(data, 4 // world, seed=1, rank=rank, world_size=world) for rank in range(world)]

    seen, shapes = [], set()
    for _ in range(30):
        batches = [next(loader)[0] for loader in loaders]
        assert len({batch['moments'].shape[1:] for batch in batches}) == 1
        shapes.add(batches[0]['moments'].shape[1:])
        seen += [prompt for batch in batches for prompt in batch['prompt']]
    assert len(shapes) == 3 and set(seen) == {str(i) for i in range(15)} and {seen.count(p) for p in seen} == {8}
    assert sorted(i for batch in data.batches(2) for i in batch) == list(range(15))
    assert all(len({data[i]['moments'].shape for i in batch}) == 1 for batch in data.batches(2))


def test_shapes_are_found_wherever_they_stand(tmp_path: Path):
    folder, kinds = tmp_path, {'caption': 'string', 'moments': 'bytes', 'shape': ['int64']}
    with RecordWriter(folder, kinds) as writer:
        for shape in ((8, 2, 3), (8, 300, 2)):
            writer.write({'caption': 'long ' * 40, 'moments': b'', 'shape': shape})    # behind the first bytes
            writer.write({'shape': shape, 'moments': b''})
        writer.write({})
    cut = folder / '00000.data'
    reader = RecordReader(folder)
    assert reader.shapes() == [(8, 2, 3)] * 2 + [(8, 300, 2)] * 2 + [()]

    cut.write_bytes(cut.read_bytes()[:-20])

    assert reader.shapes()[:2] == [(8, 2, 3)] * 2 and None in reader.shapes()[2:]


def test_moments_of_two_shapes_are_not_put_into_one_batch(tmp_path: Path):
    data = dataset(write(tmp_path, [{}, {'of': (8, 3, 2)}]))

    with pytest.raises(DataError, match=r'\[8, 2, 3\] in .*00000.data: example 0 and \[8, 3, 2\] in .*example 1'):
        data.collate([data[0], data[1]], [data.name_of(0), data.name_of(1)])
