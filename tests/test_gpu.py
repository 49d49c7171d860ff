"""What only a GPU can show: the same promises on CUDA, over NCCL where there are two, in float16 and compiled."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from pairs import FACTORS, Row, config, differences, outcome, train, whole_and_halves
from scepter.core import flops
from scepter.core.config import Config
from scepter.core.env import we
from scepter.core.launch import launch

pytestmark = pytest.mark.gpu
DEVICE, STEPS = 'cuda', 10
PROCESSES = min(2, max(1, torch.cuda.device_count()))     # one for each GPU: NCCL refuses two on one
ROW: Row = {name: values[-1] for name, values in FACTORS.items()} | {
    'OPTIMIZER': FACTORS['OPTIMIZER'][0], 'DTYPE': 'float32', 'PARAM_DTYPE': 'float32', 'COMPILE': False, 'ACCU_STEP': 1, 'REPEATS': 1,
    'CHANNELS_LAST': False, 'CHECKPOINTING': False, 'LENGTH': 'MAX_STEPS', 'EVAL_INTERVAL': 4, 'PROCESSES': 1, 'NUM_WORKERS': 2}


def on_gpu(task: Any, folder: Path, processes: int = 1, **more: Any) -> None:
    """task(cfg) in each of so many processes."""
    env = {'DEVICE': DEVICE, 'NPROC': processes, 'DETERMINISTIC': True, 'ALLOW_TF32': False, 'SEED': 7}
    launch(Config({'FOLDER': str(folder), 'ENV': env, **more}), task)


def row_of(cfg: Config) -> Row:
    return {**ROW, 'PROCESSES': we.world_size, **cfg.get('ROW', {})}


def resumed(cfg: Config) -> None:
    """A run, undisturbed, and one that is stopped in its midst and begun again."""
    whole_and_halves(Path(cfg.FOLDER), row_of(cfg))


def losses(work_dir: Path) -> list[float]:
    return [row['train/loss'] for line in (work_dir / 'log.jsonl').read_text().splitlines() if 'train/loss' in (row := json.loads(line))]


@pytest.mark.parametrize('row', [{}, {'DTYPE': 'bfloat16'}, {'DTYPE': 'float16'}, {'CHANNELS_LAST': True, 'CHECKPOINTING': True}], ids=str)
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_a_resumed_run_is_the_whole_run_to_the_bit(tmp_path, row, parallel):
    on_gpu(resumed, tmp_path, PROCESSES, ROW={**row, 'PARALLEL': parallel})

    assert not differences(outcome(tmp_path / 'whole'), outcome(tmp_path / 'halves'))


def one_curve(cfg: Config) -> None:
    hooks = [{'NAME': 'ModelEmaHook', 'BETA': 0.9}, {'NAME': 'LogHook', 'LOG_INTERVAL': 1, 'PROGRESS': False}]
    tiny.run(tiny.config(Path(cfg.FOLDER) / str(we.world_size), 50, GLOBAL_BATCH_SIZE=12, PARALLEL=cfg.PARALLEL, TRAIN_HOOKS=hooks))


@pytest.mark.skipif(PROCESSES == 1, reason='one GPU')
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_processes_over_nccl_have_the_losses_of_one(tmp_path, parallel):
    for processes in (1, 2):
        on_gpu(one_curve, tmp_path, processes, PARALLEL=parallel)

    assert losses(tmp_path / '2') == pytest.approx(losses(tmp_path / '1'), rel=1e-5, abs=0)


def overflows(cfg: Config) -> None:
    """A gradient that float16 cannot hold, on one process alone."""
    solver = train(config(Path(cfg.FOLDER) / 'run', {**row_of(cfg), 'DTYPE': 'float16'}, 2))
    solver.train_mode()
    before, scale = [p.detach().clone() for p in solver.model.parameters()], solver.train_step.scale.value
    image = torch.full((2, 1, 8, 8), 6e4 if we.rank == 0 else 0.5)
    solver.run_step_train([({'image': image, 'number': torch.arange(2)}, torch.arange(2))])
    assert not solver.is_last_step_finite and solver.train_step.scale.value == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(before, solver.model.parameters()))


def test_what_overflows_in_float16_changes_nothing_and_halves_the_scale(tmp_path):
    on_gpu(overflows, tmp_path, PROCESSES)


def in_bfloat16(cfg: Config) -> None:
    train(config(Path(cfg.FOLDER) / 'run', {**row_of(cfg), 'DTYPE': 'bfloat16'}, STEPS))


def compiled_and_not(cfg: Config) -> None:
    for compiles in (False, True):
        train(config(Path(cfg.FOLDER) / str(compiles), {**row_of(cfg), 'COMPILE': compiles}, STEPS))


def test_a_compiled_network_has_the_losses_of_one_that_is_not(tmp_path):
    on_gpu(compiled_and_not, tmp_path)

    assert losses(tmp_path / 'True') == pytest.approx(losses(tmp_path / 'False'), rel=1e-3)


def test_figures_of_a_gpu_are_there(tmp_path):
    on_gpu(in_bfloat16, tmp_path)
    last = [json.loads(line) for line in (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()][-1]

    is_known = flops.peak_of(torch.cuda.get_device_name(), torch.bfloat16, True) is not None
    assert 0 < last['perf/memory'] < 8 and last['perf/throughput'] > 0 and ('perf/mfu' in last) == is_known
