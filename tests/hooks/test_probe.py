"""Looking in: pictures of a training, of an evaluation and of a test run."""
from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / 'solvers'))
from tiny import LATENT_DIFFUSION

from scepter import SOLVERS, Config
from scepter.core.env import we
from scepter.core.images import read_settings


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
    for folder in ('eval_images/step-00000002', 'test_results'):
        files = sorted((tmp_path / 'work' / folder).iterdir())
        assert [read_settings(f)['prompt'] for f in files] == ['a red wall', 'a/../b: ünsafe']
        assert all(set(f.stem) <= set('abcdefghijklmnopqrstuvwxyz0123456789-') for f in files)
