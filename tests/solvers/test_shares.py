"""PARALLEL: fsdp learns, averages, evaluates, saves and draws what a single process does, though no process holds the whole network."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import scepter
import shares
from scepter.core.config import Config
from scepter.core.disk.tensors import write_tensors
from scepter.core.launch import launch
from scepter.core.registry import MODELS
from shares import SGD, TRAINED_TEXT, config, differences, figures, read, train
from tiny import LATENT_DIFFUSION

TWO = {'NPROC': 2, 'DEVICE': 'cpu', 'THREADS': 1}
FSDP = {'PARALLEL': 'fsdp'}
ONE_BY_ONE = {'NAME': 'Walls', 'BATCH_SIZE': 1, 'NUM_WORKERS': 0}
TURNS = {'down': {**SGD, 'PARAMS': ['model.input_blocks.*']}, 'rest': {**SGD, 'EVERY': 2}}
# name -> (what the run sets, what its network sets); those of every day, and the others
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'plain': ({}, {}), 'average on the cpu': ({'average_on': 'cpu'}, {}), 'accumulated': ({'TRAIN_DATA': ONE_BY_ONE}, {}),
    'taking turns': ({'OPTIMIZER': TURNS}, {}), 'text tower too': ({}, {'COND_STAGE_MODEL': TRAINED_TEXT}),
    'recomputed': ({}, {'DIFFUSION_MODEL': {**LATENT_DIFFUSION['DIFFUSION_MODEL'], 'CHECKPOINTING': 2}}),
}

DAILY = ('plain', 'text tower too')


def variant(folder: Path, name: str, **solver: Any) -> Config:
    given, network = VARIANTS[name]
    cfg = config(folder / name, **{'vae': folder.parent / 'vae.safetensors', **given, **solver})
    cfg.SOLVER.MODEL.update(network)
    return cfg


def on_two(*cfgs: Config) -> None:
    launch(Config({'RUNS': [cfg.SOLVER for cfg in cfgs], 'ENV': TWO}), shares.runs)


def alone_and_shared(folder: Path, *names: str) -> Path:
    """alone/NAME and shared/NAME: each variant on one process, and shared out among two. In moved/plain two steps of a longer run."""
    torch.manual_seed(3)
    vae = MODELS.build(LATENT_DIFFUSION['FIRST_STAGE_MODEL'])
    write_tensors(folder / 'vae.safetensors', vae.state_dict())
    for name in names:
        train(variant(folder / 'alone', name))
    on_two(variant(folder / 'moved', 'plain', MAX_STEPS=2, **FSDP), *(variant(folder / 'shared', name, **FSDP) for name in names))
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return alone_and_shared(tmp_path_factory.mktemp('shares'), *DAILY)


@pytest.fixture(scope='module')
def others(tmp_path_factory) -> Path:
    return alone_and_shared(tmp_path_factory.mktemp('others'), *(name for name in VARIANTS if name not in DAILY))


@pytest.mark.parametrize('name', [pytest.param(name, marks=[] if name in DAILY else [pytest.mark.slow]) for name in VARIANTS])
def test_shares_learn_and_save_what_one_process_does(name, request):
    folder = request.getfixturevalue('folder' if name in DAILY else 'others')
    alone, shared = folder / 'alone' / name, folder / 'shared' / name
    assert figures(shared, 'train/loss') == pytest.approx(figures(alone, 'train/loss'), rel=1e-5)
    assert figures(shared, 'val/loss') == pytest.approx(figures(alone, 'val/loss'), rel=1e-5)
    assert figures(shared, 'train/grad_norm') == pytest.approx(figures(alone, 'train/grad_norm'), rel=1e-4)
    (tensors, state), (own, told) = read(alone, 4), read(shared, 4)
    assert len(tensors['model']) > 20 and differences(tensors, own, rtol=1e-4, atol=1e-6) == []
    assert told['left_out'] == state['left_out'] != [] and not any('first_stage' in name for name in own['model'])


@pytest.mark.slow
def test_a_run_goes_from_shares_to_one_process_and_back(others):
    """Two steps in shares, one alone, one in shares again."""
    folder = others
    train(variant(folder / 'alone', 'plain'))
    train(variant(folder / 'moved', 'plain', MAX_STEPS=3))
    on_two(variant(folder / 'moved', 'plain', **FSDP))
    told, (moved, state) = read(folder / 'alone' / 'plain', 4)[0], read(folder / 'moved' / 'plain', 4)
    assert differences(told, moved, rtol=1e-4, atol=1e-6) == []
    assert [read(folder / 'moved' / 'plain', step)[1]['world_size'] for step in (2, 3, 4)] == [2, 1, 2] and state['samples'] == 16


def test_a_checkpoint_of_shares_draws_what_one_of_a_single_process_does(folder):
    alone, shared = (scepter.load(folder / kind / 'plain')('a red wall', sample_steps=2, seed=3).results[0]['image']
                     for kind in ('alone', 'shared'))
    assert torch.allclose(alone, shared, atol=1e-4) and alone.std() > 0.01


def test_probes_of_shares_draw_with_averages_gathered_whole(folder):
    pictures = [sorted(p.name for p in (folder / kind / 'plain').rglob('*.png')) for kind in ('alone', 'shared')]
    assert pictures[0] == pictures[1] != []


def test_a_checkpoint_of_shares_goes_on_in_one_process(folder):
    train(variant(folder / 'moved', 'plain'))
    told, (moved, state) = read(folder / 'alone' / 'plain', 4)[0], read(folder / 'moved' / 'plain', 4)
    assert differences(told, moved, rtol=1e-4, atol=1e-6) == [] and state['world_size'] == 1


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_blocks_travel_in_the_type_of_the_arithmetic_and_text_towers_in_their_own(tmp_path, dtype):
    both = [variant(tmp_path / kind, 'text tower too', vae=None, DTYPE=dtype, **how) for kind, how in (('alone', {}), ('shared', FSDP))]
    train(both[0])
    on_two(both[1])
    alone, shared = (tmp_path / kind / 'text tower too' for kind in ('alone', 'shared'))
    assert figures(shared, 'train/loss') == pytest.approx(figures(alone, 'train/loss'), rel=2e-2)
    assert all(value.dtype == torch.float32 for value in read(shared, 4)[0]['model'].values())


def test_what_cannot_be_done_in_shares_is_refused_and_damage_is_not_saved(tmp_path):
    launch(Config({'FOLDER': str(tmp_path), 'ENV': TWO}), shares.trials)
