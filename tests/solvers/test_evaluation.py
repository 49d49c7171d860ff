"""Evaluations and test runs: what they draw, what a stop signal leaves, and that processes and batches have no part in it."""
from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from scepter import run_train
from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.env import Stopped, we
from scepter.core.images import read_settings
from scepter.core.registry import MODELS
from tiny import LATENT_DIFFUSION, TinyDenoiser, config, run

POINTS = {'NAME': 'TinyPoints', 'BATCH_SIZE': 4}


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]


# ------------------------------------------------------------------------------------------------ each picture has its own noise
def drawn(work_dir: Path, batch_size: int, prompts: list[str]) -> dict[str, np.ndarray]:
    """Pictures of a network after a step that changes nothing."""
    images = work_dir / 'images'
    images.mkdir(parents=True)
    Image.new('RGB', (16, 16), 'red').save(images / 'red.png')
    (images / 'red.txt').write_text('a wall')
    run(Config({'SOLVER': {
        'NAME': 'LatentDiffusionSolver', 'WORK_DIR': str(work_dir), 'MODEL': LATENT_DIFFUSION,
        'SAMPLE_ARGS': {'SAMPLE_STEPS': 2, 'SEED': 5},
        'MAX_STEPS': 1, 'OPTIMIZER': {'NAME': 'SGD', 'LR': 0.0},
        'TRAIN_DATA': {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(images), 'BATCH_SIZE': 1},
        'TEST_DATA': {'NAME': 'PromptListDataset', 'PROMPTS': prompts, 'BATCH_SIZE': batch_size}}}))
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in sorted((work_dir / 'test_results').glob('*.png'))}


def test_equal_prompts_are_drawn_differently_and_batches_have_no_part_in_it(tmp_path):
    pairs, together = drawn(tmp_path / 'pairs', 2, ['a wall'] * 4), drawn(tmp_path / 'all', 4, ['a wall'] * 4)
    assert len(pairs) == 4 and pairs.keys() == together.keys()
    pictures = list(pairs.values())
    assert all(np.abs(a - b).max() > 8 for i, a in enumerate(pictures) for b in pictures[:i])
    # a batch of another size adds up in another order: to one level of 255
    assert all(np.abs(pairs[name] - together[name]).max() <= 1 for name in pairs)


@MODELS.register_class()
class DocumentPainter(TinyDenoiser):
    """Draws as the documents do, from one seed, and as a network does that knows of none."""

    def forward_test(self, number, seed: int = 3, **batch):
        keyed = torch.randn(len(number), generator=torch.Generator().manual_seed(seed))
        return [{'keyed': float(k), 'free': float(f), 'seed': seed} for k, f in zip(keyed, torch.randn(len(number)))]


def test_a_network_that_takes_one_seed_or_none_has_other_noise_in_each_batch(tmp_path):
    for name in ('once', 'again'):
        run(config(tmp_path / name, steps=1, MODEL={'NAME': 'DocumentPainter'}, TEST_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 2}))
    rows = rows_of(tmp_path / 'once' / 'test_results' / 'results.jsonl')
    assert len({r['keyed'] for r in rows}) == len({r['free'] for r in rows}) == 16
    assert rows[0]['row_seed'] == 3
    assert rows_of(tmp_path / 'again' / 'test_results' / 'results.jsonl') == rows


# ------------------------------------------------------------------------------------------------ a stop signal
def test_a_stop_in_an_evaluation_leaves_no_figure_and_the_resumed_run_makes_it_first(tmp_path):
    hooks = [{'NAME': 'CheckpointHook', 'INTERVAL': 0, 'SAVE_BEST_BY': '-loss'}, {'NAME': 'LogHook', 'LOG_INTERVAL': 1}]
    settings = {'TRAIN_HOOKS': hooks, 'EVAL_INTERVAL': 2, 'EVAL_DATA': POINTS}
    with pytest.raises(Stopped) as stop:
        run(config(tmp_path, steps=4, EVAL_HOOKS=[{'NAME': 'StopAfter', 'BATCHES': 2}], **settings))
    we.stop_signal = 0
    assert stop.value.signal == signal.SIGTERM
    assert not any('val/loss' in row for row in rows_of(tmp_path / 'log.jsonl'))
    assert checkpoints.load(tmp_path / 'checkpoints' / 'step-00000002').state['hooks']['CheckpointHook']['best'] is None
    run(config(tmp_path / 'whole', steps=4, **settings))
    run(config(tmp_path, steps=4, RESUME_FROM='auto', **settings))
    expected, found = ([(r['step'], r['val/loss']) for r in rows_of(folder / 'log.jsonl') if 'val/loss' in r]
                       for folder in (tmp_path / 'whole', tmp_path))
    assert found == expected and [step for step, _ in found] == [2, 4]


def test_a_stop_in_a_test_run_leaves_whole_files_and_the_next_run_does_not_mix_with_them(tmp_path):
    with pytest.raises(Stopped) as stop:
        run(config(tmp_path, steps=1, TEST_DATA=POINTS, TEST_HOOKS=[{'NAME': 'StopAfter', 'BATCHES': 2}]))
    assert stop.value.signal == signal.SIGTERM
    run(config(tmp_path, MODE=['test'], TEST_DATA=POINTS, RESUME_FROM='latest'))
    assert [r['number'] for r in rows_of(tmp_path / 'test_results' / 'results.jsonl')] == list(range(8))
    assert [r['number'] for r in rows_of(tmp_path / 'test_results-2' / 'results.jsonl')] == list(range(16))


# ------------------------------------------------------------------------------------------------ several processes
def test_two_processes_measure_and_draw_what_one_does_and_stop_together(tmp_path):
    def go(name: str, processes: int, **settings: Any) -> int:
        cfg = config(tmp_path / name, steps=1, MODEL={'NAME': 'TinyPainter'}, OPTIMIZER={'NAME': 'SGD', 'LR': 0.0}, GLOBAL_BATCH_SIZE=6,
                     TRAIN_HOOKS=[{'NAME': 'LogHook'}, {'NAME': 'SaveOnMain'}], EVAL_INTERVAL=1,
                     EVAL_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 3}, TEST_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 3}, **settings)
        cfg.update(IMPORTS=[str(Path(tiny.__file__))], ENV={'NPROC': processes, 'DEVICE': 'cpu', 'SEED': 5, 'THREADS': 1})
        (tmp_path / f'{name}.yaml').write_text(str(cfg), encoding='utf-8')
        return run_train.main(['--cfg', str(tmp_path / f'{name}.yaml')])

    assert go('one', 1) == 0
    assert go('two', 2, TEST_HOOKS=[{'NAME': 'StopAfter', 'BATCHES': 2, 'RANK': 1}]) == 143
    alone, shared = ({f.name: f.read_bytes() for f in (tmp_path / name / 'test_results').iterdir()} for name in ('one', 'two'))
    assert len(alone) == 16 and len(shared) == 12      # two rounds of two batches of three, then both stopped
    assert all(alone[name] == picture for name, picture in shared.items())
    assert len(set(alone.values())) == 16
    losses = [[r['val/loss'] for r in rows_of(tmp_path / name / 'log.jsonl') if 'val/loss' in r] for name in ('one', 'two')]
    assert losses[0] == losses[1] and len(losses[0]) == 1
    picture = next(iter(sorted((tmp_path / 'one' / 'test_results').iterdir())))
    assert read_settings(picture).items() >= {'number': 0, 'seed': 5, 'prompt': 'a point'}.items()
