"""What goes wrong by the user's hand ends with the promised exit code, a message, and no traceback."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scepter import run_train
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


@pytest.fixture
def train(folder, capsys):
    """Run the training command on the folder: (exit code, what it said)."""
    def run(*words: str) -> tuple[int, str]:
        code = run_train.main(['--cfg', str(write_config(folder)), *words])
        said = capsys.readouterr().err
        assert 'Traceback' not in said
        return code, said
    return run


def write_config(folder: Path) -> Path:
    (folder / 'a.yaml').write_text(str(Config({'SOLVER': {
        'NAME': 'BaseSolver', 'WORK_DIR': str(folder / 'work'), 'MAX_STEPS': 4, 'OPTIMIZER': {'NAME': 'AdamW', 'LEARNING_RATE': 1e-3},
        'MODEL': {'NAME': 'AutoencoderKL', 'ENCODER': {'NAME': 'Encoder', **CODER}, 'DECODER': {'NAME': 'Decoder', **CODER}},
        'TRAIN_DATA': {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(folder / 'images'), 'BATCH_SIZE': 2},
        'TRAIN_HOOKS': [{'NAME': 'CheckpointHook'}]}})))
    return folder / 'a.yaml'


def test_a_missing_data_folder_is_3(folder, train):
    code, said = train(f'SOLVER.TRAIN_DATA.DATA_FOLDER={folder}/imagse')
    assert code == 3 and 'did you mean' in said


def test_too_many_unreadable_images_are_3_and_named_and_few_are_replaced(folder, train):
    for i in range(2):
        (folder / 'images' / f'{i}.png').write_bytes(b'no picture')
    assert train()[0] == 0
    assert (folder / 'work' / 'skipped.jsonl').read_text().count('"path"') == 2
    (folder / 'images' / '2.png').write_bytes(b'no picture')
    code, said = train(f'SOLVER.WORK_DIR={folder}/second')
    assert code == 3 and '2.png' in said


def test_a_fresh_run_over_an_old_one_is_4_and_nothing_is_lost(folder, train):
    assert train()[0] == 0
    before = (folder / 'work' / 'checkpoints' / 'step-00000004' / 'MANIFEST.json').read_bytes()
    code, said = train()
    assert code == 4 and 'RESUME_FROM: auto' in said
    assert (folder / 'work' / 'checkpoints' / 'step-00000004' / 'MANIFEST.json').read_bytes() == before
    assert 'Traceback' in (folder / 'work' / 'log.txt').read_text()      # the whole story is in the file


@pytest.mark.parametrize('resume', ['latest', '/nowhere/step-00000001'])
def test_a_checkpoint_that_is_not_there_is_4(train, resume):
    assert train(f'SOLVER.RESUME_FROM={resume}')[0] == 4


def test_a_loss_that_is_not_a_number_is_6(train):
    code, said = train('SOLVER.OPTIMIZER.LEARNING_RATE=1e30', 'SOLVER.MAX_STEPS=9')
    assert code == 6 and 'in a row were not finite' in said


def test_a_stop_signal_saves_and_ends_with_143(folder):
    process = subprocess.Popen([sys.executable, 'scepter/run_train.py', '--cfg', str(write_config(folder)), 'SOLVER.MAX_STEPS=100000',
                                f'SOLVER.WORK_DIR={folder}/long', 'SOLVER.TRAIN_HOOKS=[{NAME: LogHook, LOG_INTERVAL: 1}]',
                                'SOLVER.TRAIN_DATA.NUM_WORKERS=1'], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if 'step 2/' in line:
            process.terminate()
            break
    rest = process.stderr.read()
    assert process.wait(60) == 143, rest
    assert list((folder / 'long' / 'checkpoints').glob('step-*')) and 'asked to stop' in rest
