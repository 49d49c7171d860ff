"""A checkpoint that an earlier version wrote (commit aff6a90) goes on and draws here as it did there.

fixtures/earlier_run holds it at step 4 of 8, with the config, the file that it left out, the log of the whole run and a picture.
"""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scepter.run_inference import main as run_inference
from scepter.run_train import main as run_train

FIXTURE = Path(__file__).parent / 'fixtures' / 'earlier_run'


@pytest.fixture(scope='module')
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that we are in, with the run as it was when step 4 was saved."""
    folder = tmp_path_factory.mktemp('earlier')
    for name in ('parts.py', 'train.yaml', 'vae.safetensors'):
        shutil.copy(FIXTURE / name, folder)
    shutil.copytree(FIXTURE / 'checkpoints', folder / 'work' / 'checkpoints')
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def figures(file: Path) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in file.read_text('utf-8').splitlines()]
    return {(row['step'], name): value for row in rows for name, value in row.items() if name.startswith(('train/', 'val/'))}


def test_it_goes_on_with_the_same_samples_and_losses(place):
    expected = {key: value for key, value in figures(FIXTURE / 'log.jsonl').items() if key[0] > 4}

    assert run_train(['--cfg', 'train.yaml']) == 0

    ours = figures(place / 'work' / 'log.jsonl')
    assert len(expected) == 17 and ours.keys() == expected.keys()
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, rel=1e-4), key    # to rounding: processors differ


def test_it_draws_the_same_picture(place):
    words = ['--pretrained_model', 'work/checkpoints/step-00000004', '--imports', 'parts.py', '--prompt', 'a red wall', '--seed', '3',
             '--num_samples', '1', '--image_size', '8', '--save_folder', 'drawn']

    assert run_inference(words) == 0

    ours, theirs = (np.asarray(Image.open(file)).astype(int) for file in (*place.glob('drawn/*.png'), FIXTURE / 'a_red_wall.png'))
    assert ours.shape == theirs.shape == (8, 8, 3) and np.ptp(theirs) > 50 and np.abs(ours - theirs).max() <= 1
