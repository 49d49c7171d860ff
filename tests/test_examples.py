"""Every shipped example runs: two steps, shrunken; the classifier as it stands, to the accuracy that its README promises."""
from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import scepter
from scepter import run_inference, run_train

ROOT = Path(__file__).resolve().parents[1]
TINY_CODER = ['ENCODER.CH_MULT=[1,1,1]', 'DECODER.CH_MULT=[1,1,1]']


def train(cfg: str, *words: str) -> None:
    assert run_train.main(['--cfg', str(ROOT / 'examples' / cfg), 'SOLVER.DTYPE=float32', *words]) == 0


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    """Both stages of the digits example after two steps each."""
    out = tmp_path_factory.mktemp('digits')
    train('digits/autoencoder.yaml', '--max_steps', '2', f'SOLVER.WORK_DIR={out}/autoencoder', 'SOLVER.TRAIN_DATA.BATCH_SIZE=4',
          *(f'SOLVER.MODEL.{word}' for word in TINY_CODER))
    train('digits/diffusion.yaml', *stage2(out, 'diffusion'), 'SOLVER.MODEL.DIFFUSION_MODEL.MODEL_CHANNELS=32')
    return out


def stage2(out: Path, name: str) -> list[str]:
    return ['--max_steps', '2', f'SOLVER.WORK_DIR={out}/{name}', 'SOLVER.TRAIN_DATA.BATCH_SIZE=4', f'SOLVER.CACHE.FOLDER={out}/cache',
            f'SOLVER.MODEL.FIRST_STAGE_MODEL.PRETRAINED_MODEL={out}/autoencoder/checkpoints/step-00000002',
            *(f'SOLVER.MODEL.FIRST_STAGE_MODEL.{word}' for word in TINY_CODER)]


def test_the_digits_are_trained_and_drawn(digits, tmp_path):
    code = run_inference.main(['--prompt', 'the number three', '--num_samples', '2', '--save_folder', str(tmp_path), '--grid',
                               '--pretrained_model', str(digits / 'diffusion' / 'checkpoints' / 'step-00000002')])
    assert code == 0
    assert len(list(tmp_path.glob('0000*.png'))) == 2 and (tmp_path / 'grid.png').exists()


def test_flow_matching_is_trained_and_drawn_over_the_same_recipe(digits, tmp_path):
    train('digits/flow.yaml', *stage2(digits, 'flow'), 'SOLVER.MODEL.DIFFUSION_MODEL.MODEL_CHANNELS=32')
    pipe = scepter.load(digits / 'flow')
    assert pipe.model.diffusion.times[-1] == 1000 and pipe.model.PARAMETERIZATION == 'flow'
    drawn = pipe(['the number three'], seed=1)
    assert drawn.images[0].size == (32, 32) and drawn.results[0]['image'].isfinite().all()


def test_no_wording_loses_its_digit_to_the_length_of_the_prompt():
    sys.path.insert(0, str(ROOT / 'examples' / 'digits'))
    from digits_data import WORDINGS, WORDS

    from scepter import EMBEDDERS, Config
    embedder = EMBEDDERS.build(Config.load('digits/diffusion.yaml').SOLVER.MODEL.COND_STAGE_MODEL)
    prompts = [wording.format(word) for wording in WORDINGS for word in WORDS]
    tokens = embedder.tokenize(prompts)
    assert len(set(map(tuple, tokens.tolist()))) == len(prompts)
    assert not embedder.has_warned_of_cut


def test_a_frozen_part_that_is_gone_is_named(digits, tmp_path, capsys):
    copy = shutil.copytree(digits / 'diffusion', tmp_path / 'copy')    # alone: a project that moved whole is found again
    away = digits / 'autoencoder' / 'checkpoints' / 'step-00000002'
    away.rename(away.with_name('moved'))
    try:
        code = run_inference.main(['--prompt', 'x', '--pretrained_model', str(copy / 'checkpoints' / 'step-00000002')])
    finally:
        away.with_name('moved').rename(away)
    said = capsys.readouterr().err
    assert code == 4 and str(away) in said and 'Traceback' not in said


def test_my_backbone_replaces_the_unet(digits):
    train('my_backbone/train.yaml', *stage2(digits, 'my_backbone'))
    assert (digits / 'my_backbone' / 'checkpoints' / 'step-00000002' / 'MANIFEST.json').exists()


def test_the_classifier_reads_held_out_digits(tmp_path):
    train('classifier/classifier.yaml', f'SOLVER.WORK_DIR={tmp_path}')
    rows = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert max(row['val/full/accuracy'] for row in rows if 'val/full/accuracy' in row) >= 0.97
    quick, full = ([row['step'] for row in rows if f'val/{name}/accuracy' in row] for name in ('quick', 'full'))
    assert quick == list(range(25, rows[-1]['step'] + 1, 25)) and full == quick[3::4] and len(full) > 1


def test_the_demos_judge_tells_good_pictures_from_bad(tmp_path):
    sys.path.insert(0, str(ROOT / 'examples' / 'digits'))
    from demo import judge
    from digits_data import WORDINGS, WORDS, load_digits

    from scepter.core.images import save_png
    images, labels = load_digits('test')
    for i, (image, label) in enumerate(zip(images, labels.tolist())):
        settings = {'prompt': WORDINGS[i % 4].format(WORDS[label])}
        save_png(image / 2 + 0.5, tmp_path / 'real' / f'{i}.png', settings)
        save_png(images[0] / 2 + 0.5, tmp_path / 'same' / f'{i}.png', settings)
    real, same = judge(tmp_path / 'real'), judge(tmp_path / 'same')
    assert real['prompt_accuracy'] > 0.95 and real['reader_accuracy'] > 0.95 and 0.8 < real['diversity'] < 1.2
    assert same['prompt_accuracy'] < 0.2 and same['diversity'] == 0
