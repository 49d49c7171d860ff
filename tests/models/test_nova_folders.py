"""Published folders of NOVA, in and out: opened without YAML, every weight in its place, and what they cannot be is named."""
from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import PhiModel

import scepter
from pairs import train
from scepter.commands import tool
from scepter.core.clips import read_mp4
from scepter.core.config import Config
from scepter.core.errors import CheckpointError
from scepter.core.images import read_settings
from scepter.core.launch import launch
from scepter.core.registry import BACKBONES, MODELS
from scepter.data.records import RecordWriter
from scepter.run_inference import main as run_inference
from scepter.weights import describe
from tests.models import nova_runs
from tests.models.nova_folders import CLIP, DDPM, FLOW, NETWORK, TEXT, folder, write
from tests.servers.hub import HubServer

SHORT = {'sets': 3, 'sample_steps': 2, 'seed': 5}
KINDS = {'text': (TEXT, FLOW), 'clip': (CLIP, DDPM), 'class': (NETWORK, DDPM)}
ASKED: dict[str, dict[str, Any]] = {'text': {'prompts': ['a red fox', '']}, 'clip': {'prompts': ['a red fox'], 'num_frames': 5},
                                    'class': {'label': 3, 'num_samples': 2}}


@pytest.fixture(scope='module')
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: folder(tmp_path_factory.mktemp(kind) / 'nova', *values) for kind, values in KINDS.items()}


@pytest.mark.parametrize('kind', KINDS)
def test_a_folder_opens_without_a_word_about_keys_and_goes_out_as_it_came(folders, tmp_path: Path, kind: str, caplog):
    pipe = scepter.load(folders[kind])
    drawn = pipe(**ASKED[kind], **SHORT)
    assert tool('export').main([str(folders[kind]), str(tmp_path / 'out')]) == 0
    again = scepter.load(tmp_path / 'out')

    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert pipe.model.model.cfg == again.model.model.cfg and describe(folders[kind]).config.SOLVER.keys() == again.cfg.SOLVER.keys()
    for one, other in zip(drawn.results, again(**ASKED[kind], **SHORT).results):
        shown = 'video' if kind == 'clip' else 'image'
        assert one[shown].isfinite().all() and torch.equal(one[shown], other[shown])
    for part in ('transformer', 'vae'):
        theirs, ours = (load_file(root / part / 'diffusion_pytorch_model.safetensors') for root in (folders[kind], tmp_path / 'out'))
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name].reshape(theirs[name].shape)) for name in theirs)


def test_a_folder_becomes_a_checkpoint_to_start_from(folders, tmp_path: Path):
    assert tool('convert_weights').main([str(folders['clip']), str(tmp_path / 'run'), '--to', 'scepter']) == 0

    theirs, ours = (scepter.load(path).model.state_dict() for path in (folders['clip'], tmp_path / 'run'))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_transformers_opens_the_text_encoder_that_we_wrote(folders, tmp_path: Path):
    pipe = scepter.load(folders['text'])
    tool('export').main([str(folders['text']), str(tmp_path / 'out')])

    theirs = PhiModel.from_pretrained(tmp_path / 'out' / 'text_encoder').eval()

    tokens = torch.tensor([[1, 2, 4]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=tokens).last_hidden_state, pipe.model.cond_stage_model.encode_text(tokens).context)


@pytest.mark.parametrize('mixer', [None, 3], ids=['config names one', 'weights have one'])
def test_a_mixer_that_config_or_weights_lack_is_refused(folders, tmp_path: Path, mixer: int | None):
    """Published code builds by a recipe's config, and would leave the mixer's weights out without a word."""
    torch.manual_seed(1)
    root = folder(tmp_path / 'nova', {**CLIP, 'video_mixer_rank': mixer}, DDPM)
    write(root / 'transformer' / 'config.json', {'_class_name': 'NOVATransformer3DModel', **CLIP, 'video_mixer_rank': None if mixer else 3})

    with pytest.raises(CheckpointError, match=f'{"unexpected" if mixer else "missing"}:(?s:.*)video_encoder.mixer'):
        scepter.load(root)


@pytest.mark.parametrize('file, values, words', [
    ('transformer/config.json', {**TEXT, 'depth': 3}, 'has depth, which no NOVATransformer3DModel is known to have'),
    ('text_encoder/config.json', {'model_type': 'llama'}, "model_type 'llama', but the text encoder of NOVA has 'phi'"),
    ('text_encoder/config.json', {'model_type': 'phi', 'num_attention_heads': 2, 'num_key_value_heads': 1}, 'as many as heads, 2'),
    ('scheduler/scheduler_config.json', {'_class_name': 'PNDMScheduler'}, 'expected FlowMatchEulerDiscreteScheduler or DDPMScheduler'),
    ('vae/config.json', {'_class_name': 'AutoencoderKLWan'}, 'no family that opens here')])
def test_what_cannot_be_opened_says_why(folders, tmp_path: Path, file: str, values: dict, words: str):
    root = shutil.copytree(folders['text'], tmp_path / 'nova')
    write(root / 'model_index.json', {'_class_name': 'NOVAPipeline'})
    write(root / file, values)

    with pytest.raises(CheckpointError, match=words):
        scepter.load(root)


def test_a_yaml_beside_a_folder_is_held_against_what_it_says(folders):
    config = describe(folders['text']).config
    config.SOLVER.MODEL.SCALE_FACTOR = 0.25
    config.SOLVER.MODEL.SCHEDULE_ARGS.SHIFT = 3.0

    with pytest.raises(CheckpointError, match=r'SCALE_FACTOR: the config has 0.25, but vae/config.json(?s:.*)SCHEDULE_ARGS: the config'):
        MODELS.build(config.SOLVER.MODEL)


def test_a_part_alone_opens_from_the_whole(folders):
    network = BACKBONES.build(Config({'NAME': 'NovaTransformer', **{key.upper(): value for key, value in TEXT.items()},
                                      'PRETRAINED_MODEL': str(folders['text'])}))

    theirs = load_file(folders['text'] / 'transformer' / 'diffusion_pytorch_model.safetensors')
    assert all(torch.equal(network.state_dict()[name], value) for name, value in theirs.items())


def test_a_network_that_no_published_folder_holds_is_not_written(folders, tmp_path: Path):
    from scepter.weights import export_diffusers
    model = scepter.load(folders['class']).model
    model.first_stage_model = None

    with pytest.raises(ValueError, match='a folder of NOVA has an autoencoder'):
        export_diffusers(model, tmp_path)


# ------------------------------------------------------------------------------------------------ trained from
def training(source: Path, work_dir: Path, frames: int = 0, **solver: Any) -> Config:
    """Four steps from a published folder, on latents with words."""
    data = work_dir.parent / 'data'
    data.mkdir(exist_ok=True)
    if not (data / 'METADATA').is_file():
        with RecordWriter(data, {'moments': 'bytes', 'shape': ['int64'], 'caption': 'string', 'flow': 'float64'}) as writer:
            for i in range(8):
                x = np.random.default_rng(i).normal(size=(8, *([frames] if frames else []), 8, 8)).astype(np.float16)
                writer.write({'moments': x.tobytes(), 'shape': x.shape, 'caption': 'a red fox. in snow', 'flow': float(i)})
    config = describe(source).config
    config.SOLVER.update({
        'WORK_DIR': str(work_dir), 'MAX_STEPS': 4, 'RESUME_FROM': 'auto', 'GLOBAL_BATCH_SIZE': 4, 'OPTIMIZER': {'NAME': 'AdamW'},
        'TRAIN_DATA': {'NAME': 'LatentRecordDataset', 'DATA_FOLDER': str(data), 'BATCH_SIZE': 2},
        'TRAIN_HOOKS': [{'NAME': 'LogHook', 'LOG_INTERVAL': 1, 'PROGRESS': False}, {'NAME': 'ModelEmaHook', 'BETA': 0.9},
                        {'NAME': 'CheckpointHook', 'INTERVAL': 0}], **solver})
    return config


def test_a_run_from_a_folder_leaves_its_frozen_parts_there(folders, tmp_path: Path):
    source = shutil.copytree(folders['text'], tmp_path / 'nova')
    train(training(source, tmp_path / 'run', DTYPE='bfloat16'))
    held = load_file(tmp_path / 'run' / 'checkpoints' / 'step-00000004' / 'model.safetensors')
    drawn = scepter.load(tmp_path / 'run')('a red fox', **SHORT).results[0]['image']

    assert not any(name.startswith(('cond_stage_model.', 'first_stage_model.')) for name in held)
    assert tool('checkpoint').main(['to-single', str(tmp_path / 'run'), str(tmp_path / 'one.safetensors')]) == 0
    assert tool('export').main([str(tmp_path / 'run'), str(tmp_path / 'out')]) == 0
    for path in ('one.safetensors', 'out'):
        assert torch.equal(scepter.load(tmp_path / path)('a red fox', **SHORT).results[0]['image'], drawn)
    source.rename(tmp_path / 'elsewhere')
    with pytest.raises(CheckpointError, match='nova/tokenizer: gone'):
        scepter.load(tmp_path / 'run')


@pytest.mark.slow
def test_two_processes_in_shares_train_clips_from_a_folder_as_one_does(folders, tmp_path: Path):
    train(training(folders['clip'], tmp_path / 'one', 3))
    shares = training(folders['clip'], tmp_path / 'two', 3, PARALLEL='fsdp')
    launch(Config({**shares, 'ENV': {'NPROC': 2, 'DEVICE': 'cpu', 'THREADS': 1}}), nova_runs.run)

    one, two = ([row['train/loss_i2i'] for row in map(json.loads, (tmp_path / name / 'log.jsonl').read_text().splitlines())
                 if 'train/loss_i2i' in row] for name in ('one', 'two'))
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-4)


# ------------------------------------------------------------------------------------------------ the command
def draw(folder: Path, out: Path, *words: str) -> int:
    return run_inference(['--pretrained_model', str(folder), '--save_folder', str(out), '--sets', '3', '--sample_steps', '2',
                          '--num_samples', '1', *words])


def test_the_command_draws_clips_as_mp4_with_their_settings(folders, tmp_path: Path):
    words = ('--prompt', 'a red fox', '--num_frames', '5', '--motion_flow', '2', '--seed', '3')
    assert draw(folders['clip'], tmp_path / 'png', *words) == 0
    assert draw(folders['clip'], tmp_path / 'mp4', *words, '--clips', 'mp4') == 0

    png, mp4 = next((tmp_path / 'png').iterdir()), next((tmp_path / 'mp4').iterdir())
    told = read_settings(mp4)
    assert told == read_settings(png) and (told['prompt'], told['num_frames'], told['motion_flow']) == ('a red fox', 5, 2.0)
    frames = read_mp4(mp4).astype(int)
    with Image.open(png) as image:
        for i in range(5):
            image.seek(i)
            assert abs(frames[i] - torch.tensor(list(image.convert('RGB').getdata())).reshape(64, 64, 3).numpy()).mean() < 12


@pytest.mark.slow
def test_the_command_draws_from_the_hub(folders, tmp_path: Path):
    server = HubServer()
    files = {str(file.relative_to(folders['text'])): file.read_bytes() for file in folders['text'].rglob('*') if file.is_file()}
    server.repos['org/nova'] = {'main': files}
    unset = ('HF_HUB_CACHE', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HTTP_PROXY', 'http_proxy')
    env = {**{key: value for key, value in os.environ.items() if key not in unset}, 'HF_ENDPOINT': server.url, 'HF_TOKEN': '',
           'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1', 'SCEPTER_CACHE': str(tmp_path / 'cache')}
    words = ['--pretrained_model', 'hf://org/nova', '--save_folder', str(tmp_path / 'out'), '--sets', '2', '--sample_steps', '2',
             '--num_samples', '1', '--prompt', 'a red fox']
    try:
        done = subprocess.run([sys.executable, '-m', 'scepter.run_inference', *words], env=env, capture_output=True, text=True, timeout=200)
    finally:
        server.close()

    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / 'out').iterdir())) == 1


def test_the_command_begins_a_clip_with_a_picture_of_any_size(folders, tmp_path: Path):
    Image.new('RGB', (50, 80), (200, 30, 30)).save(tmp_path / 'red.png')

    words = ('--prompt', 'a bird', '--num_frames', '5', '--first_frame', str(tmp_path / 'red.png'))
    assert draw(folders['clip'], tmp_path / 'out', *words) == 0
    assert read_settings(next((tmp_path / 'out').iterdir()))['first_frame'] == str(tmp_path / 'red.png')


def test_the_command_draws_classes(folders, tmp_path: Path):
    assert draw(folders['class'], tmp_path, '--label', '7,3', '--num_samples', '2', '--min_guide_scale', '1.5') == 0

    assert [read_settings(file)['label'] for file in sorted(tmp_path.iterdir())] == [7, 7, 3, 3]


@pytest.mark.parametrize('kind, words, told', [
    ('class', ['--prompt', 'a fox'], 'told a class, not a prompt: give a label, 0 to 999'),
    ('class', ['--label', '1000'], '1000 is no class: expected 0 to 999'),
    ('text', ['--label', '1'], 'told a text, not a class: give prompts'),
    ('text', ['--prompt', 'a', '--num_frames', '5'], 'AutoencoderKL makes pictures|made for images'),
    ('clip', ['--prompt', 'a', '--num_frames', '6'], 'e.g. 5'),
    ('clip', ['--prompt', 'a', '--num_frames', '17'], 'up to 4 of latents, 13 of the clip'),
    ('clip', ['--prompt', 'a', '--image_size', '64,96'], 'positions of this network fit 64x64 alone'),
    ('clip', ['--prompt', 'a', '--first_frame', 'PICTURE'], 'ask for a clip by num_frames, e.g. 5')])
def test_what_a_network_was_not_made_for_is_refused_with_what_would_fit(folders, tmp_path: Path, capsys, kind: str, words: list, told: str):
    Image.new('RGB', (64, 64)).save(tmp_path / 'a.png')

    code = draw(folders[kind], tmp_path / 'out', *[str(tmp_path / 'a.png') if word == 'PICTURE' else word for word in words])

    said = capsys.readouterr().err
    assert code == 2 and any(part in said for part in told.split('|')), said
    assert not (tmp_path / 'out').exists()
