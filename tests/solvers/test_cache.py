"""SOLVER.CACHE: training from what was encoded once is training from the pictures themselves."""
from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import shares
import tiny
from scepter.commands import tool
from scepter.core.config import Config
from scepter.core.faults import ConfigError
from scepter.core.launch import launch
from scepter.core.logger import get_logger
from scepter.core.registry import DATASETS, MODELS, SOLVERS
from scepter.core.schema import param
from scepter.data.datasets import BaseDataset
from scepter.drawing import load
from tests.models.nova_runs import NETWORK
from tests.models.oracles import randomize
from tests.twins import network, publish, three_images, twin

AUTOENCODER = tiny.autoencoder(1, 1)
WITH_TEXT = tiny.LATENT_DIFFUSION
WITHOUT_TEXT = {**WITH_TEXT, 'COND_STAGE_MODEL': None, 'DIFFUSION_MODEL': {**WITH_TEXT['DIFFUSION_MODEL'], 'CONTEXT_DIM': None}}
CROP = {'NAME': 'RecordedCrop', 'SIZE': 16, 'FLIP': 0.5}


@DATASETS.register_class()
class TinyWordings(BaseDataset):
    """Eight pictures that no file holds, or clips, each with words that are drawn, and a label."""

    SIDE: int = param(16)
    FRAMES: int | None = param(None)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        words = f'{random.choice(["a", "one"])} gray {index}'
        picture = torch.full((3, *([self.FRAMES] if self.FRAMES else []), self.SIDE, self.SIDE), index / 4 - 1)
        return {'video' if self.FRAMES else 'image': picture, 'prompt': words, 'label': index}


@pytest.fixture(scope='module')
def vae(tmp_path_factory) -> Path:
    """The weights of an autoencoder, in a file, so that checkpoints leave them out."""
    return weights(tmp_path_factory.mktemp('vae') / 'vae.safetensors', 0)


def weights(file: Path, seed: int) -> Path:
    save_file({name: value + seed / 100 for name, value in randomize(MODELS.build(AUTOENCODER)).state_dict().items()}, file)
    return file


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten pictures, some upright and some lying, with captions."""
    folder = tmp_path / 'photos'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        shape = (24, 16, 3) if i % 2 else (18, 30, 3)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f'{i}.png')
        (folder / f'{i}.txt').write_text(f'picture {i}')
    return folder


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the framework's logger says."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    get_logger().addHandler(handler)
    yield said
    get_logger().removeHandler(handler)


def config(work_dir: Path, photos: Path, vae: Path | None, steps: int = 4, cache: Path | None = None, text: bool = False,
           **solver: Any) -> Config:
    model = {**(WITH_TEXT if text else WITHOUT_TEXT), 'FIRST_STAGE_MODEL': {**AUTOENCODER, 'PRETRAINED_MODEL': vae and str(vae)}}
    return Config({'SOLVER': {
        'NAME': 'LatentDiffusionSolver', 'WORK_DIR': str(work_dir), 'RESUME_FROM': 'auto', 'MAX_STEPS': steps, 'MODEL': model,
        'OPTIMIZER': {'NAME': 'SGD', 'LEARNING_RATE': 0.05, 'MOMENTUM': 0.9},
        'TRAIN_DATA': {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(photos), 'BATCH_SIZE': 3, 'TRANSFORMS': [CROP]},
        'SAMPLE_ARGS': {'SAMPLE_STEPS': 2},
        'TRAIN_HOOKS': [{'NAME': 'ModelEmaHook', 'BETA': 0.9}, {'NAME': 'CheckpointHook', 'INTERVAL': 0}],
        'CACHE': {'FOLDER': cache and str(cache), 'ROWS': 4}, **solver}})


def far(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> list[str]:
    """The tensors of two checkpoints that differ by more than rounding."""
    assert {group: a[group].keys() for group in a} == {group: b[group].keys() for group in b}
    return [f'{group}/{name} {(value - b[group][name]).abs().max()}' for group in a for name, value in a[group].items()
            if not torch.allclose(value.float(), b[group][name].float(), rtol=1e-4, atol=1e-5)]


@pytest.mark.parametrize('arithmetic', [{}, {'DTYPE': 'bfloat16', 'PARAM_DTYPE': 'bfloat16'}], ids=['float32', 'bfloat16'])
def test_training_from_the_cache_is_training_from_the_pictures(tmp_path, photos, vae, arithmetic):
    tiny.run(config(tmp_path / 'pictures', photos, vae, **arithmetic))
    solver = tiny.run(config(tmp_path / 'cached', photos, vae, cache=tmp_path / 'cache', **arithmetic))

    assert 'image' not in solver.batches[0][0]
    assert not far(tiny.groups(tmp_path / 'pictures', 4), tiny.groups(tmp_path / 'cached', 4))


def test_the_autoencoder_is_in_memory_only_while_it_draws(tmp_path, photos, vae):
    solver = tiny.run(config(tmp_path / 'run', photos, vae, cache=tmp_path / 'cache'))
    held = list(solver.model.first_stage_model.parameters())
    drawn = next(iter(load(tmp_path / 'run').draw(['picture 3'], sample_steps=2, seed=5)))
    with solver.ema_weights(), torch.no_grad():
        own = solver.model('test', prompt=['picture 3'], **solver.test_arguments(), seed=5)[0]

    assert held and all(p.is_meta for p in held) and all(p.is_meta for p in solver.model.first_stage_model.parameters())
    assert torch.allclose(own['image'], drawn['image'], atol=1e-5)


def encoded(said: list[str]) -> int:
    """How many pictures the last run has encoded."""
    return int(next(line for line in reversed(said) if 'pictures to encode' in line).split()[-4].replace(',', ''))


def test_only_what_has_changed_is_encoded_again(tmp_path, photos, vae, said):
    """Row D5 of the reliability matrix: each of these would train on something else without a word, were it not in the key."""
    def cost(name: str, vae: Path = vae, **change: Any) -> int:
        solver = SOLVERS.build(config(tmp_path / name, photos, vae, cache=tmp_path / 'cache', **change).SOLVER)
        solver.set_up()
        solver.lock.close()
        return encoded(said)

    data = config(tmp_path, photos, vae).SOLVER.TRAIN_DATA
    model = config(tmp_path, photos, vae).SOLVER.MODEL
    assert (cost('first'), cost('again')) == (10, 0)
    Image.new('RGB', (20, 20), 'red').save(photos / '3.png')
    assert cost('an edited picture') == 1
    assert cost('other weights', weights(tmp_path / 'other.safetensors', 1)) == 10
    assert cost('another size', TRAIN_DATA={**data, 'TRANSFORMS': [{**CROP, 'SIZE': 8}]}) == 10
    assert cost('no flip', TRAIN_DATA={**data, 'TRANSFORMS': [{**CROP, 'FLIP': 0.0}]}) == 10
    assert cost('buckets', TRAIN_DATA={**data, 'TRANSFORMS': [{'NAME': 'RecordedCrop'}], 'BUCKETS': 16, 'BUCKET_STEP': 4}) == 10
    assert cost('another type', CACHE={'FOLDER': str(tmp_path / 'cache'), 'DTYPE': 'float16'}) == 10
    assert cost('another arithmetic', DTYPE='bfloat16') == 10
    assert cost('another scale', MODEL={**model, 'SCALE_FACTOR': 0.5, 'SHIFT_FACTOR': 0.1}) == 0    # moments are before both
    assert cost('as at first') == 0


def test_a_run_from_the_cache_goes_on_exactly_and_workers_change_nothing(tmp_path, photos, vae):
    buckets = {'BUCKETS': 16, 'BUCKET_STEP': 4, 'TRANSFORMS': [{'NAME': 'RecordedCrop', 'FLIP': 0.5}]}
    data = {**config(tmp_path, photos, vae).SOLVER.TRAIN_DATA, **buckets}

    def run(name: str, steps: int, **more: Any) -> None:
        tiny.run(config(tmp_path / name, photos, vae, steps, tmp_path / 'cache', TRAIN_DATA={**data, **more}, MAX_STEPS=steps))

    run('whole', 6)
    run('halves', 3)
    run('halves', 6, NUM_WORKERS=2)
    assert tiny.same(tiny.groups(tmp_path / 'whole', 6), tiny.groups(tmp_path / 'halves', 6))


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_processes_share_the_work_and_train_as_one_does(tmp_path, photos, vae, parallel):
    more = {'GLOBAL_BATCH_SIZE': 4, 'MAX_STEPS': 2, 'EVAL_INTERVAL': 2, 'EVAL_HOOKS': [{'NAME': 'ProbeDataHook'}]}
    data = config(tmp_path, photos, vae).SOLVER.TRAIN_DATA
    one, two = (config(tmp_path / name, photos, vae, cache=tmp_path / f'cache of {name}', EVAL_DATA={**data, 'BATCH_SIZE': 2}, **more)
                for name in ('one', 'two'))
    two.SOLVER.PARALLEL = parallel
    tiny.run(one, seed=7)
    launch(Config({'RUNS': [two.SOLVER], 'ENV': {'NPROC': 2, 'DEVICE': 'cpu', 'THREADS': 1}}), shares.runs)

    assert not far(tiny.groups(tmp_path / 'one', 2), tiny.groups(tmp_path / 'two', 2))
    alone, shared = ({path.name: path.read_bytes() for path in (tmp_path / f'cache of {name}/pictures').iterdir()}
                     for name in ('one', 'two'))
    assert alone == shared and len(alone) == 6


def test_features_of_prompts_are_kept_too_and_the_text_encoder_rests(tmp_path, photos, vae, said):
    tiny.run(config(tmp_path / 'whole', photos, vae, steps=1, text=True))
    more = {'text': True, 'P_ZERO': 0.5, 'TRAIN_N_PROMPT': 'nothing at all', 'PRETRAINED_MODEL': str(tmp_path / 'whole')}

    def run(name: str, cache: Path | None = None, **solver: Any) -> Any:
        cfg = config(tmp_path / name, photos, None, 3, cache, **{'text': True, **solver})
        cfg.SOLVER.MODEL |= {key: value for key, value in more.items() if key.isupper()}
        return tiny.run(cfg)

    run('pictures')
    solver = run('cached', tmp_path / 'cache')
    assert not far(tiny.groups(tmp_path / 'pictures', 3), tiny.groups(tmp_path / 'cached', 3))
    assert all(p.is_meta for p in solver.model.cond_stage_model.parameters()) and solver.batches[0][0]['text_context'].shape == (3, 8, 32)
    assert set(solver.outputs['probe_data']['prompt']) & {'nothing at all'}
    drawn = next(iter(load(tmp_path / 'cached').draw(['picture 3'], sample_steps=1)))
    assert drawn['image'].isfinite().all()

    (photos / '3.txt').write_text('another caption')
    run('edited', tmp_path / 'cache')
    assert '9 of 10 prompts are there, 1 prompts to encode' in next(line for line in reversed(said) if 'prompts to encode' in line)


@pytest.mark.slow
def test_sizes_that_sdxl_is_told_stay_those_of_each_sample(tmp_path):
    images, weights = three_images(tmp_path / 'images'), tmp_path / 'sdxl.safetensors'
    publish(network(twin('sdxl/sdxl_1024', tmp_path / 'none.yaml')), weights)
    for name, folder in (('pictures', None), ('cached', str(tmp_path / 'cache'))):
        cfg = twin('sdxl/sdxl_1024', tmp_path / f'{name}.yaml', weights, images, MAX_STEPS=2, TRAIN_HOOKS=[{'NAME': 'CheckpointHook'}],
                   CACHE={'FOLDER': folder}, WORK_DIR=str(tmp_path / name), OPTIMIZER={'NAME': 'SGD', 'LEARNING_RATE': 0.01})
        cfg.SOLVER.MODEL['P_ZERO'] = 0.4
        solver = tiny.run(cfg)

    assert all(p.is_meta for p in solver.model.cond_stage_model.parameters()) and 'text_vector' in solver.batches[0][0]
    assert solver.batches[0][0]['original_size'].shape == (2, 2)
    assert not far(tiny.groups(tmp_path / 'pictures', 2), tiny.groups(tmp_path / 'cached', 2))


def test_words_that_are_drawn_are_read_by_the_text_encoder_itself(tmp_path, vae, said):
    cfg = config(tmp_path / 'run', tmp_path, vae, 2, tmp_path / 'cache', text=True, TRAIN_DATA={'NAME': 'TinyWordings', 'BATCH_SIZE': 3})
    solver = tiny.run(cfg)

    assert any('differ from draw to draw' in line for line in said) and 'moments' in solver.batches[0][0]
    assert not any(p.is_meta for p in solver.model.cond_stage_model.parameters())


@pytest.mark.parametrize(('network', 'frames'), [(NETWORK, None), ({**NETWORK, 'VIDEO_BASE_SIZE': [3, 2, 2]}, 3)],
                         ids=['pictures', 'clips'])
def test_nova_trains_from_it_too(tmp_path, network, frames):
    coder = tiny.autoencoder(1, 1, 1, 1, channels=2)
    save_file(randomize(MODELS.build(coder)).state_dict(), tmp_path / 'vae.safetensors')
    model = {'NAME': 'NovaModel', 'NETWORK': network, 'FIRST_STAGE_MODEL': {**coder, 'PRETRAINED_MODEL': str(tmp_path / 'vae.safetensors')}}
    for name in ('pictures', 'cached'):
        cfg = config(tmp_path / name, tmp_path, None, 2, tmp_path / 'cache' if name == 'cached' else None, MODEL=model, NAME='BaseSolver',
                     TRAIN_DATA={'NAME': 'TinyWordings', 'SIDE': 64, 'FRAMES': frames, 'BATCH_SIZE': 2})
        cfg.SOLVER.pop('SAMPLE_ARGS')
        solver = tiny.run(cfg)

    assert 'moments' in solver.batches[0][0] and all(p.is_meta for p in solver.model.first_stage_model.parameters())
    assert not far(tiny.groups(tmp_path / 'pictures', 2), tiny.groups(tmp_path / 'cached', 2))


def test_evaluations_draw_and_encode_in_the_middle_of_it(tmp_path, photos, vae):
    data = config(tmp_path, photos, vae).SOLVER.TRAIN_DATA
    more = {'EVAL_DATA': {**data, 'TRANSFORMS': [{**CROP, 'FLIP': 0}]}, 'EVAL_INTERVAL': 2, 'EVAL_HOOKS': [{'NAME': 'ProbeDataHook'}]}
    tiny.run(config(tmp_path / 'pictures', photos, vae, CHANNELS_LAST=True, **more))
    solver = tiny.run(config(tmp_path / 'cached', photos, vae, cache=tmp_path / 'cache', CHANNELS_LAST=True, **more))

    assert not far(tiny.groups(tmp_path / 'pictures', 4), tiny.groups(tmp_path / 'cached', 4))
    with solver.ema_weights():
        weight = solver.model.first_stage_model.encoder.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) and weight.requires_grad is False
    assert solver.eval_outputs['loss'] > 0 and (tmp_path / 'cached/eval_images/step-00000004.png').is_file()


def test_an_autoencoder_of_no_file_stays_in_memory_and_in_the_checkpoint(tmp_path, photos, said):
    solver = tiny.run(config(tmp_path / 'run', photos, None, cache=tmp_path / 'cache'))

    assert not any(p.is_meta for p in solver.model.parameters()) and any('came from no file' in line for line in said)
    assert next(iter(load(tmp_path / 'run').draw(['a picture'], sample_steps=1)))['image'].shape == (3, 16, 16)


@pytest.mark.parametrize(('change', 'words'), [
    ({'TRAIN_DATA': {'TRANSFORMS': [{**CROP, 'RANDOM': True}]}}, 'differs from draw to draw'),
    ({'TRAIN_DATA': {'TRANSFORMS': [CROP, {'NAME': 'ColorJitter', 'BRIGHTNESS': 0.5}]}}, 'differs from draw to draw'),
    ({'MODEL': {'FIRST_STAGE_MODEL': None, 'SIZE_FACTOR': 1, 'SCALE_FACTOR': 1.0,
                'DIFFUSION_MODEL': {'IN_CHANNELS': 3, 'OUT_CHANNELS': 3}}}, 'no autoencoder')])
def test_what_a_cache_cannot_keep_is_refused(tmp_path, photos, vae, change, words):
    cfg = config(tmp_path / 'run', photos, vae, cache=tmp_path / 'cache')
    for section, keys in change.items():
        for key, value in keys.items():
            cfg.SOLVER[section][key] = {**cfg.SOLVER[section][key], **value} if isinstance(value, dict) else value

    with pytest.raises(ConfigError, match=words):
        tiny.run(cfg)
    assert not list((tmp_path / 'cache').rglob('*.safetensors'))


def latents(command: str, *words: str) -> int:
    return tool('latents').main([command, *words])


def test_the_tool_fills_checks_and_thins_out_a_cache(tmp_path, photos, vae, capsys):
    cfg = tmp_path / 'train.yaml'
    cfg.write_text(str(config(tmp_path / 'run', photos, vae, cache=tmp_path / 'cache')))
    words = ['--cfg', str(cfg)]
    assert latents('info', '--folder', str(tmp_path / 'cache')) == 3
    assert latents('build', *words) == 0 and latents('verify', *words) == 0
    assert 'pictures: 10 rows in 3 files, sound' in capsys.readouterr().out and not (tmp_path / 'run').exists()

    Image.new('RGB', (20, 20), 'red').save(photos / '3.png')
    shard = sorted((tmp_path / 'cache/pictures').glob('*.safetensors'))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert latents('verify', *words) == 3
    found = capsys.readouterr()
    assert 'pictures: 1 of 10 are to be computed' in found.out and f'{shard}: 1 of' in found.err

    left = shard.with_name('.tmp-1-aa-left.safetensors')    # by a kill
    left.write_bytes(b'')
    assert latents('prune', *words) == 0 and not shard.exists() and left.exists()    # somebody may be writing it
    os.utime(left, (0, 0))
    assert latents('prune', *words) == 0 and not left.exists()
    assert latents('build', *words) == 0 and latents('verify', *words) == 0
    assert latents('prune', *words, '--unused', 'SOLVER.DTYPE=bfloat16') == 0
    assert not list((tmp_path / 'cache/pictures').iterdir())
    assert latents('info', *words) == 0 and 'needs 10, of which 10 are to be computed' in capsys.readouterr().out
