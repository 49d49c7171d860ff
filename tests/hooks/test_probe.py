"""Looking in: pictures of a training, of an evaluation and of a test run."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
from scepter import SOLVERS, Config
from scepter.core.env import we
from scepter.core.faults import ConfigError
from scepter.core.images import read_settings, sheet
from tiny import LATENT_DIFFUSION


def run(work_dir: Path, images: Path, **settings) -> dict[str, torch.Tensor]:
    """The trained weights after two steps."""
    torch.manual_seed(0)
    we.seed = 3
    solver = SOLVERS.build(Config({
        'NAME': 'LatentDiffusionSolver', 'WORK_DIR': str(work_dir), 'MAX_STEPS': 2, 'MODEL': LATENT_DIFFUSION,
        'OPTIMIZER': {'NAME': 'AdamW', 'LEARNING_RATE': 1e-3}, 'SAMPLE_ARGS': {'SAMPLE_STEPS': 2},
        'TRAIN_DATA': {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(images), 'BATCH_SIZE': 2}, **settings}))
    solver.set_up()
    solver.solve()
    return {k: v.clone() for k, v in solver.model.model.state_dict().items()}


def folder_of_images(folder: Path) -> Path:
    from PIL import Image
    folder.mkdir()
    for name in ('red', 'blue'):
        Image.new('RGB', (16, 16), name).save(folder / f'{name}.png')
        (folder / f'{name}.txt').write_text(f'a {name} wall')
    return folder


def test_pictures_are_drawn_while_it_trains_and_change_nothing(tmp_path):
    images = folder_of_images(tmp_path / 'images')
    plain = run(tmp_path / 'plain', images)
    hooks = [{'NAME': 'ModelEmaHook'}, {'NAME': 'ProbeDataHook', 'INTERVAL': 1, 'PROMPTS': ['a red wall', 'a blue wall'], 'COLUMNS': 2}]
    probed = run(tmp_path / 'probed', images, TRAIN_HOOKS=hooks)
    assert all(torch.equal(plain[k], probed[k]) for k in plain)
    probe = tmp_path / 'probed' / 'probes' / 'step-00000002'
    assert read_settings(probe / 'samples.png')['prompts'] == ['a red wall', 'a blue wall']
    assert 'wall' in (probe / 'probe.json').read_text()


def test_an_evaluation_and_a_test_run_draw_their_prompts_into_files(tmp_path):
    prompts = {'NAME': 'PromptListDataset', 'PROMPTS': ['a red wall', 'a/../b: ünsafe'], 'BATCH_SIZE': 2}
    run(tmp_path / 'work', folder_of_images(tmp_path / 'images'), EVAL_INTERVAL=2, EVAL_LOSS=False, EVAL_DATA=prompts,
        EVAL_HOOKS=[{'NAME': 'ProbeDataHook'}], TEST_DATA=prompts)
    files = sorted((tmp_path / 'work' / 'test_results').iterdir())
    assert [read_settings(f)['prompt'] for f in files] == ['a red wall', 'a/../b: ünsafe']
    assert all(set(f.stem) <= set('abcdefghijklmnopqrstuvwxyz0123456789-') for f in files)
    sheets = list((tmp_path / 'work' / 'eval_images').iterdir())
    assert [f.name for f in sheets] == ['step-00000002.png'] and read_settings(sheets[0])['prompts'] == ['a red wall', 'a/../b: ünsafe']


def test_a_network_without_prompts_and_pictures_is_probed_too(tmp_path):
    tiny.run(tiny.config(tmp_path, steps=2, MODEL={'NAME': 'TinyPainter'}, EVAL_INTERVAL=2, EVAL_DATA={'NAME': 'TinyPoints'},
                         EVAL_HOOKS=[{'NAME': 'ProbeDataHook', 'PICTURES': 5}],
                         TRAIN_HOOKS=[{'NAME': 'ProbeDataHook', 'INTERVAL': 2, 'ARGUMENTS': {'number': [3, 4, 5]}}]))
    assert read_settings(tmp_path / 'probes' / 'step-00000002' / 'samples.png')['prompts'] == ['a point'] * 3
    assert read_settings(tmp_path / 'eval_images' / 'step-00000002.png')['prompts'] == ['a point'] * 5
    tiny.run(tiny.config(tmp_path / 'words', steps=2, EVAL_INTERVAL=2, EVAL_DATA={'NAME': 'TinyPoints'},
                         EVAL_HOOKS=[{'NAME': 'ProbeDataHook'}]))
    rows = [json.loads(line) for line in (tmp_path / 'words' / 'eval_images' / 'step-00000002.jsonl').read_text().splitlines()]
    assert [r['prompt'] for r in rows] == [f'point {n}' for n in range(16)]


def test_a_probe_that_the_network_cannot_take_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match=r'has PROMPTS, but TinyDenoiser.forward_test takes no prompt; it takes image, number'):
        tiny.run(tiny.config(tmp_path, TRAIN_HOOKS=[{'NAME': 'ProbeDataHook', 'PROMPTS': ['a point']}]))


def test_a_sheet_shows_small_pictures_large_enough_and_writes_under_each():
    images = [torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.rand(3, 1200, 600)]
    plain, told = sheet(images[:2], 8), sheet(images[:2], 8, ['a black square of no great interest to anybody at all', ''])
    assert plain.shape == (100, 200, 3) and (plain[2:98, 2:98] == 0).all()
    assert told.shape == (126, 200, 3) and (told[:100] == plain).all()
    assert (told[100:, :100] < 128).any() and (told[100:, 102:] == 255).all()
    assert sheet(images, 2).shape == (2 * 516, 2 * 260, 3)
