"""What goes wrong by the user's hand ends with the promised exit code, a message, and no traceback."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scepter import run_train
from scepter.core.config import Config
from scepter.core.disk import checkpoints

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


@pytest.mark.parametrize('where', ['a_file', 'a_link', '/sys/nowhere', 'x' * 300])
def test_a_work_dir_that_cannot_be_written_is_4_and_named(folder, train, where):
    (folder / 'a_file').touch()
    (folder / 'a_link').symlink_to(folder / 'gone')
    code, said = train(f'SOLVER.WORK_DIR={folder / where}')
    assert code == 4 and where in said


@pytest.mark.parametrize(('file', 'code'), [('log.jsonl', 4), ('log.txt', 0)])
def test_a_disk_that_fills_between_saves_is_4_and_a_full_log_alone_is_no_end(folder, train, file, code):
    (folder / 'work').mkdir()
    (folder / 'work' / file).symlink_to('/dev/full')
    ended, said = train('SOLVER.TRAIN_HOOKS=[{NAME: LogHook, LOG_INTERVAL: 1}]')
    assert ended == code and said.count('No space left on device') == 1 and ('step 4/4' in said) == (code == 0)


def test_a_caption_that_cannot_be_opened_is_a_bad_sample_and_too_many_are_3(folder, train):
    for i in range(3):
        (folder / 'images' / f'{i}.txt').unlink()
        (folder / 'images' / f'{i}.txt').symlink_to('/proc/self/mem')     # opens, and cannot be read
    code, said = train()
    assert code == 3 and 'caption' in said and 'Input/output error' in said
    (folder / 'images' / 'metadata.csv').symlink_to('/proc/self/mem')
    assert train()[0] == 3


@pytest.mark.parametrize(('forged', 'words'), [
    ({'step': 3}, 'its step is 3'), ({'step': 'two'}, "step is 'two'"), ({'global_batch_size': 0}, 'global_batch_size 0'),
    ({'seed': None}, 'seed is None'), ({'hooks': []}, 'hooks is []'), ({'hooks': {'CheckpointHook': 3}}, 'state of CheckpointHook'),
    ({'optimizers': {'optimizer': 1}}, 'optimizers cannot be taken up'), ([1], 'an object expected, list found'),
])
def test_a_sealed_but_forged_state_is_4(folder, train, forged, words):
    assert train('SOLVER.MAX_STEPS=2')[0] == 0
    whole = checkpoints.load(folder / 'work' / 'checkpoints' / 'step-00000002')
    groups = {name: whole.group(name) for name in whole.groups}
    state = {**whole.state, **forged} if isinstance(forged, dict) else forged
    checkpoints.save(folder / 'forged', 2, groups, state, whole.config)
    code, said = train(f'SOLVER.RESUME_FROM={folder}/forged/step-00000002', f'SOLVER.WORK_DIR={folder}/second')
    assert code == 4 and words in said


def test_a_second_run_is_4_and_a_stop_signal_to_the_first_saves_and_ends_with_143(folder, train):
    process = subprocess.Popen([sys.executable, 'scepter/run_train.py', '--cfg', str(write_config(folder)), 'SOLVER.MAX_STEPS=100000',
                                f'SOLVER.WORK_DIR={folder}/long', 'SOLVER.TRAIN_HOOKS=[{NAME: LogHook, LOG_INTERVAL: 1}]',
                                'SOLVER.TRAIN_DATA.NUM_WORKERS=1'], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if 'step 2/' in line:
            code, said = train(f'SOLVER.WORK_DIR={folder}/long', 'SOLVER.RESUME_FROM=auto')
            assert code == 4 and f'pid {process.pid}' in said and os.uname().nodename in said
            process.terminate()
            break
    rest = process.stderr.read()
    assert process.wait(60) == 143, rest
    assert list((folder / 'long' / 'checkpoints').glob('step-*')) and 'asked to stop' in rest
