"""docs/training_guide.md runs as it is written, from a picture to cached latents, a config, a trained network and a drawn picture.

Three things are replaced, and nothing else: import lines and the path of the script, as the guide's own promise says; paths of files
that only its authors have; and the device "cuda", since the test runs anywhere.
"""
from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny
from scepter.commands import tool
from scepter.config import NovaConfig, as_ours, read
from scepter.core.disk import checkpoints
from scepter.core.errors import CheckpointError
from scepter.core.experiment import check_experiment
from scepter.core.faults import ConfigError
from scepter.core.schema import schema_of
from scepter.data.records import RecordReader
from scepter.run_inference import main as draw
from scepter.run_train import main as train
from tests.models.nova_folders import CLIP, DDPM, FLOW, NETWORK, TEXT, folder

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / 'docs' / 'training_guide.md').read_text(encoding='utf-8')
MISC = ROOT / 'tests' / 'fixtures' / 'nova' / 'misc'
IMPORTS = {'from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL': 'from scepter.models.autoencoder import AutoencoderKL',
           'import os, codewithgpu, torch,': 'import os, scepter.data.records as codewithgpu, torch,',
           'from diffnext.config import cfg': 'from scepter.config import cfg'}
PATHS = {'/path/to/nova-d48w1024-sdxl1024': 'nova', 'scripts/train.py': str(ROOT / 'scepter' / 'run_train.py')}
DEVICE = {'torch.device("cuda")': 'torch.device("cpu")'}


def blocks(language: str) -> list[str]:
    """The guide's own blocks, with those three things replaced."""
    found = re.findall(rf'^```{language}\n(.*?)^```', GUIDE, re.MULTILINE | re.DOTALL)
    for old, new in {**IMPORTS, **PATHS, **DEVICE}.items():
        assert old in GUIDE, old
        found = [text.replace(old, new) for text in found]
    return found


@pytest.fixture(scope='module')
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the guide is followed: a published folder of the smallest network, and the picture that the guide begins with."""
    root = tmp_path_factory.mktemp('guide')
    folder(root / 'nova', TEXT, FLOW)
    (root / 'assets').mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / 'assets' / 'sample_image.jpg')
    return root


@pytest.fixture(scope='module')
def followed(place: Path) -> dict[str, Any]:
    """The guide, block by block, in one folder; what the last command said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for text in blocks('python'):
            exec(compile(text, 'training_guide.md', 'exec'), {})  # noqa: S102  the guide's own code
    (line,) = blocks('bash')
    words = [sys.executable if word == 'python' else word for word in shlex.split(line)]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True)
    return {'code': done.returncode, 'said': done.stdout + done.stderr, 'run': place / 'outputs' / 'nova_d48w1024_1024px'}


def test_the_cached_record_is_what_the_snippet_puts_into_it(followed: dict[str, Any], place: Path):
    (record,) = RecordReader(place / 'img_dataset')

    moments = np.frombuffer(record['moments'], np.float16).reshape(record['shape'])

    assert record['shape'] == [8, 8, 8] and np.isfinite(moments).all() and moments.std() > 0
    assert (record['caption'], record['text']) == ('long caption', 'short text')


def test_the_config_is_the_published_one_but_for_the_path(followed: dict[str, Any], place: Path):
    expected = (MISC / 'seed_cfg.yml').read_text(encoding='utf-8').replace('/path/to/nova-d48w1024-sdxl1024', 'nova')

    assert (place / 'nova_d48w1024_1024px.yml').read_text(encoding='utf-8') == expected


def test_the_command_says_what_every_key_became(followed: dict[str, Any]):
    assert followed['code'] == 0, followed['said']
    for path in every_key():
        assert re.search(rf'^ *{re.escape(path)} .* -> ', followed['said'], re.MULTILINE), path


def test_it_trains_a_hundred_steps_at_the_published_rates_and_keeps_the_average(followed: dict[str, Any]):
    rows = [json.loads(line) for line in (followed['run'] / 'log.jsonl').read_text().splitlines()]
    rates = json.loads((MISC / 'lr.json').read_text())['seed_doc_first_100']['lr']
    checkpoint = checkpoints.load(followed['run'])

    assert [row['step'] for row in rows] == [20, 40, 60, 80, 100] and all(0 < row['train/loss'] < 10 for row in rows)
    assert [row['train/lr'] for row in rows] == pytest.approx([rates[row['step'] - 1] for row in rows])
    assert checkpoint.step == 100 and {'model', 'ema', 'optimizer'} <= set(checkpoint.groups)


def test_a_picture_is_drawn_from_what_was_trained(followed: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)

    code = draw(['--pretrained_model', str(followed['run']), '--prompt', 'a red fox', '--num_samples', '1', '--sets', '4',
                 '--sample_steps', '2', '--dtype', 'float32', '--save_folder', str(place / 'drawn')])

    (picture,) = (place / 'drawn').glob('*.png')
    assert code == 0 and Image.open(picture).size == (64, 64)


@pytest.mark.parametrize('words', [[], ['--pretrained_model', 'outputs/nova_d48w1024_1024px']], ids=['as published', 'as trained'])
def test_the_guides_own_file_draws_too(followed: dict[str, Any], place: Path, words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    drawn = place / f'by_its_file_{len(words)}'

    code = draw(['--cfg', 'nova_d48w1024_1024px.yml', *words, '--prompt', 'a red fox', '--num_samples', '1', '--sets', '2',
                 '--sample_steps', '2', '--save_folder', str(drawn)])

    assert code == 0 and len(list(drawn.glob('*.png'))) == 1


# ---------------------------------------------------------------- what becomes of a config
def every_key() -> list[str]:
    whole = schema_of(NovaConfig)
    return [f'{section}.{key}' if nested else section for section, declared in whole.items()
            for nested in (declared.nested or {},) for key in (nested or [section])]


def written(place: Path, **changes: Any) -> Path:
    """The guide's config with other values, by PATH__KEY."""
    cfg = read(MISC / 'seed_cfg.yml')
    cfg.MODEL.WEIGHTS, cfg.TRAIN.DATASET = str(place / 'nova'), str(place / 'img_dataset')
    for path, value in changes.items():
        section, _, key = path.rpartition('__')
        (cfg[section] if section else cfg)[key] = value
    file = place / 'changed.yml'
    file.write_text(cfg.dump(), encoding='utf-8')
    return file


CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {'ENV.SEED': 3, 'ENV.NPROC': 1, 'SOLVER.WARMUP_STEPS': 250, 'SOLVER.WARMUP_FACTOR': 0.001, 'SOLVER.DTYPE': 'bfloat16',
          'SOLVER.PARAM_DTYPE': 'float32', 'SOLVER.OPTIMIZER.BETAS': [0.9, 0.95], 'SOLVER.OPTIMIZER.WEIGHT_DECAY': 0.02,
          'SOLVER.MODEL.LOSS_REPEAT': 4, 'SOLVER.MODEL.NETWORK.CHECKPOINTING': 3, 'SOLVER.MODEL.SCALE_FACTOR': 0.5,
          'SOLVER.RESUME_FROM': 'auto', 'SOLVER.TRAIN_DATA.BATCH_SIZE': 1}),
    ({'SOLVER__LR_POLICY': 'cosine_decay', 'SOLVER__MIN_LR': 1e-5, 'SOLVER__DECAY_STEPS': [5]},
     {'SOLVER.LR_SCHEDULER': {'NAME': 'CosineAfter', 'BEGIN': 250, 'FINAL': 0.1, 'EVERY': 5}}),
    ({'SOLVER__LR_POLICY': 'steps_with_decay', 'SOLVER__DECAY_STEPS': [10, 400]},
     {'SOLVER.LR_SCHEDULER': {'NAME': 'Step', 'FINAL': 0.0, 'MILESTONES': [250, 400], 'GAMMA': 0.5}}),
    ({'TRAIN__MODEL_EMA': 0.0}, {'SOLVER.TRAIN_HOOKS': [{'NAME': 'LogHook', 'LOG_INTERVAL': 20},
                                                        {'NAME': 'CheckpointHook', 'INTERVAL': 100}]}),
    ({'NUM_GPUS': 2, 'SOLVER__ACCUM_STEPS': 3}, {'ENV.NPROC': 2, 'SOLVER.ACCU_STEP': 3}),
    ({'SOLVER__OPTIMIZER': 'SGD'}, {'SOLVER.OPTIMIZER': {'NAME': 'SGD', 'LEARNING_RATE': 1e-4, 'WEIGHT_DECAY': 0.02}})]


@pytest.mark.parametrize('changes, expected', CHANGES, ids=lambda c: ','.join(c)[:40])
def test_a_key_becomes_what_it_means(place: Path, changes: dict[str, Any], expected: dict[str, Any]):
    ours, rows = as_ours(written(place, **changes))

    check_experiment(ours)
    assert [row.key for row in rows] and sorted(row.key for row in rows) == sorted(every_key())
    assert {path: at(ours, path) for path in expected} == expected


def at(cfg: Any, path: str) -> Any:
    for key in path.split('.'):
        cfg = cfg[key]
    return cfg


def test_words_of_the_command_line_may_name_keys_of_either_kind(place: Path):
    words = ['SOLVER.MAX_STEPS=7', 'TRAIN.BATCH_SIZE=2', 'SOLVER.WORK_DIR=here', 'SOLVER.TRAIN_DATA.NUM_WORKERS=0']

    solver = as_ours(written(place), words)[0].SOLVER

    assert (solver.MAX_STEPS, solver.TRAIN_DATA.BATCH_SIZE, solver.WORK_DIR, solver.TRAIN_DATA.NUM_WORKERS) == (7, 2, 'here', 0)


def test_parts_may_lie_in_other_folders_and_the_network_may_have_another_config(place: Path, tmp_path: Path):
    (tmp_path / 'snapshot').mkdir()
    (place / 'nova' / 'transformer').rename(tmp_path / 'snapshot' / 'transformer')
    modules = {part: str(place / 'nova' / part) for part in ('vae', 'scheduler', 'tokenizer')}
    try:
        file = written(place, MODEL__WEIGHTS=str(tmp_path / 'snapshot'), PIPELINE__MODULES={**modules, 'text_encoder': ''},
                       MODEL__CONFIG={**TEXT, 'image_size': [64, 64], '_class_name': 'NOVATransformer3DModel'})
        ours, _ = as_ours(file)
        check_experiment(ours)
    finally:
        (tmp_path / 'snapshot' / 'transformer').rename(place / 'nova' / 'transformer')

    model = ours.SOLVER.MODEL
    assert model.NETWORK.PRETRAINED_MODEL == str(tmp_path / 'snapshot' / 'transformer') and 'COND_STAGE_MODEL' not in model
    assert model.FIRST_STAGE_MODEL.PRETRAINED_MODEL == str(place / 'nova' / 'vae') and model.PARAMETERIZATION == 'flow'


@pytest.mark.parametrize('values, kind, freeze', [(CLIP, 'nova_train_t2v', None), (CLIP, 'nova_train_t2i', 'model.video_pos_embed.*'),
                                                  (NETWORK, 'nova_train_c2i', None)])
def test_clips_and_classes_are_trained_too_and_what_is_frozen_is_what_is_trained_for(tmp_path: Path, values: dict, kind: str,
                                                                                     freeze: str | None):
    folder(tmp_path / 'nova', values, DDPM)

    ours, _ = as_ours(written(tmp_path, PIPELINE__TYPE=kind))

    check_experiment(ours)
    assert ours.SOLVER.MODEL.PARAMETERIZATION == 'eps' and ('FREEZE' in ours.SOLVER.MODEL) == (freeze is not None)
    assert freeze is None or freeze in ours.SOLVER.MODEL.FREEZE


@pytest.mark.parametrize('changes, error, expected', [
    ({'PIPELINE__TYPE': 'nova_train_t2v'}, ConfigError, 'is nova_train_t2v, but the network in .* is for images'),
    ({'PIPELINE__TYPE': 'nova_train_c2i'}, ConfigError, 'told a text'), ({'PIPELINE__TYPE': 'nova'}, ConfigError, 'run_inference.py'),
    ({'MODEL__WEIGHTS': ''}, ConfigError, 'MODEL.WEIGHTS: is needed'), ({'MODEL__WEIGHTS': 'nowhere'}, CheckpointError, 'nowhere'),
    ({'TRAIN__DATASET': ''}, ConfigError, 'TRAIN.DATASET: is needed'),
    ({'PIPELINE__MODULES': {'vae': ''}}, ConfigError, 'MODULES.vae: is taken away, but training needs it'),
    ({'PIPELINE__MODULES': {'vea': '/x'}}, ConfigError, 'MODULES.vea: no such part; did you mean vae?'),
    ({'PIPELINE__MODULES': {'vae': 'nowhere'}}, CheckpointError, 'nowhere')])
def test_what_cannot_be_trained_is_said(place: Path, changes: dict[str, Any], error: type[Exception], expected: str):
    with pytest.raises(error, match=expected):
        as_ours(written(place, **changes))


def test_the_converted_file_is_the_same_run(followed: dict[str, Any], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    file, target = written(place), tmp_path / 'train.yaml'

    assert tool('convert_config').main([str(file), str(target), 'SOLVER.MAX_STEPS=2', 'TRAIN.NUM_THREADS=0']) == 0
    assert 'SOLVER.MAX_STEPS 2  ->  SOLVER.MAX_STEPS 2' in capsys.readouterr().err
    ends = []
    for source, words in ((target, []), (file, ['SOLVER.MAX_STEPS=2', 'TRAIN.NUM_THREADS=0'])):
        run = tmp_path / source.stem
        assert train(['--cfg', str(source), *words, f'SOLVER.WORK_DIR={run}', 'ENV.DEVICE=cpu']) == 0
        ends.append(tiny.groups(run, 2))

    assert tiny.same(*ends)


def test_clips_are_cached_and_trained_with_their_motion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, count in (('a', 6), ('b', 9)):    # 2 and 3 latent frames
        frames = tmp_path / 'films' / name
        frames.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (70, 64, 3), dtype=np.uint8)).save(frames / f'{i}.png')
        frames.with_suffix('.txt').write_text('a red fox in the snow')
    folder(tmp_path / 'nova', CLIP, DDPM)
    monkeypatch.chdir(tmp_path)

    words = ['films', 'img_dataset', '--vae', 'nova/vae', '--size', '64', '--clips', '--device', 'cpu']
    assert tool('cache_latents').main(words) == 0
    file = written(tmp_path, PIPELINE__TYPE='nova_train_t2v', SOLVER__MAX_STEPS=3, SOLVER__DISPLAY=1, TRAIN__NUM_THREADS=0)
    assert train(['--cfg', str(file), 'SOLVER.WORK_DIR=run', 'ENV.DEVICE=cpu']) == 0

    rows = [json.loads(line) for line in Path('run/log.jsonl').read_text().splitlines()]
    assert [record['shape'] for record in RecordReader('img_dataset')] == [[8, 2, 8, 8], [8, 3, 8, 8]]
    assert all(row['train/loss_t2i'] > 0 < row['train/loss_i2i'] for row in rows) and len(rows) == 3


@pytest.mark.slow
def test_one_example_trains_two_processes(followed: dict[str, Any], place: Path, tmp_path: Path):
    file = written(place, NUM_GPUS=2, SOLVER__MAX_STEPS=2, TRAIN__NUM_THREADS=0)

    code = subprocess.run([sys.executable, 'scepter/run_train.py', '--cfg', str(file), f'SOLVER.WORK_DIR={tmp_path / "run"}',
                           'ENV.DEVICE=cpu'], cwd=ROOT).returncode

    assert code == 0 and checkpoints.load(tmp_path / 'run').state['samples'] == 4


@pytest.mark.parametrize('right, wrong, words', [('LOSS_REPEAT', 'LOSS_REPAET', 'did you mean LOSS_REPEAT?'),
                                                 ('AdamW', 'AdamV', 'OPTIMIZERS has no AdamV; did you mean Adam')])
def test_a_file_with_a_typo_is_refused_with_its_line(place: Path, right: str, wrong: str, words: str, capsys: pytest.CaptureFixture):
    file = written(place)
    text = file.read_text().replace(right, wrong)
    file.write_text(text, encoding='utf-8')
    line = next(i for i, row in enumerate(text.splitlines(), 1) if wrong in row)

    assert train(['--cfg', str(file), '--check']) == 2
    said = capsys.readouterr().err
    assert words in said and f'line {line} ' in said
