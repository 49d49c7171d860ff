"""What goes wrong by the user's hand ends with the promised exit code, a message, and no traceback."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scepter.core.config import Config

ROOT = Path(__file__).resolve().parents[1]
CODER = {'CH': 32, 'CH_MULT': [1, 1], 'NUM_RES_BLOCKS': 1, 'Z_CHANNELS': 4}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / 'images').mkdir()
    for i in range(8):
        Image.new('RGB', (16, 16), (30 * i, 0, 0)).save(tmp_path / 'images' / f'{i}.png')
        (tmp_path / 'images' / f'{i}.txt').write_text(f'red {i}')
    return tmp_path


def train(folder: Path, *words: str) -> subprocess.CompletedProcess:
    (folder / 'a.yaml').write_text(str(Config({'SOLVER': {
        'NAME': 'BaseSolver', 'WORK_DIR': str(folder / 'work'), 'MAX_STEPS': 4, 'OPTIMIZER': {'NAME': 'AdamW', 'LEARNING_RATE': 1e-3},
        'MODEL': {'NAME': 'AutoencoderKL', 'ENCODER': {'NAME': 'Encoder', **CODER}, 'DECODER': {'NAME': 'Decoder', **CODER}},
        'TRAIN_DATA': {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(folder / 'images'), 'BATCH_SIZE': 2},
        'TRAIN_HOOKS': [{'NAME': 'CheckpointHook'}]}})))
    done = subprocess.run([sys.executable, 'scepter/run_train.py', '--cfg', str(folder / 'a.yaml'), *words], cwd=ROOT, capture_output=True,
                          text=True, timeout=200)
    assert 'Traceback' not in done.stderr, done.stderr
    return done


def test_a_missing_data_folder_is_3(folder):
    done = train(folder, f'SOLVER.TRAIN_DATA.DATA_FOLDER={folder}/imagse')
    assert done.returncode == 3 and 'did you mean' in done.stderr


def test_too_many_unreadable_images_are_3_and_named_and_few_are_replaced(folder):
    for i in range(2):
        (folder / 'images' / f'{i}.png').write_bytes(b'no picture')
    assert train(folder).returncode == 0
    assert (folder / 'work' / 'skipped.jsonl').read_text().count('"path"') == 2
    (folder / 'images' / '2.png').write_bytes(b'no picture')
    done = train(folder, f'SOLVER.WORK_DIR={folder}/second')
    assert done.returncode == 3 and '2.png' in done.stderr


def test_a_fresh_run_over_an_old_one_is_4_and_nothing_is_lost(folder):
    assert train(folder).returncode == 0
    before = (folder / 'work' / 'checkpoints' / 'step-00000004' / 'MANIFEST.json').read_bytes()
    done = train(folder)
    assert done.returncode == 4 and 'RESUME_FROM: auto' in done.stderr
    assert (folder / 'work' / 'checkpoints' / 'step-00000004' / 'MANIFEST.json').read_bytes() == before
    assert 'Traceback' in (folder / 'work' / 'log.txt').read_text()      # the whole story is in the file


@pytest.mark.parametrize('resume', ['latest', '/nowhere/step-00000001'])
def test_a_checkpoint_that_is_not_there_is_4(folder, resume):
    assert train(folder, f'SOLVER.RESUME_FROM={resume}').returncode == 4


def test_a_loss_that_is_not_a_number_is_6(folder):
    done = train(folder, 'SOLVER.OPTIMIZER.LEARNING_RATE=1e30', 'SOLVER.MAX_STEPS=9')
    assert done.returncode == 6 and 'in a row were not finite' in done.stderr


def test_a_stop_signal_saves_and_ends_with_143(folder):
    train(folder, 'SOLVER.MAX_STEPS=1')       # writes the config
    process = subprocess.Popen([sys.executable, 'scepter/run_train.py', '--cfg', str(folder / 'a.yaml'), 'SOLVER.MAX_STEPS=100000',
                                f'SOLVER.WORK_DIR={folder}/long', 'SOLVER.TRAIN_HOOKS=[{NAME: LogHook, LOG_INTERVAL: 1}]',
                                'SOLVER.TRAIN_DATA.NUM_WORKERS=1'], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if 'step 2/' in line:
            process.terminate()
            break
    rest = process.stderr.read()
    assert process.wait(60) == 143, rest
    assert list((folder / 'long' / 'checkpoints').glob('step-*')) and 'asked to stop' in rest
