"""Figures of speed do not lie: they count all processes, leave out what is no step, and cost nothing to have."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pairs
from scepter.core import flops
from scepter.core.env import we
from scepter.hooks.log import RATES
from tiny import config, groups, run, same
from trouble import Trouble  # noqa: F401  (registers SlowPoints)

LOG = {'NAME': 'LogHook', 'LOG_INTERVAL': 1, 'PROGRESS': False}
ROW = {name: values[-1] for name, values in pairs.FACTORS.items()} | {
    'OPTIMIZER': pairs.FACTORS['OPTIMIZER'][0], 'DTYPE': 'float32', 'PARAM_DTYPE': 'float32', 'COMPILE': False, 'ACCU_STEP': 1,
    'REPEATS': 1, 'LENGTH': 'MAX_STEPS', 'PROCESSES': 1, 'NUM_WORKERS': 0}


@pytest.fixture
def peak(monkeypatch):
    """The device is said to do a teraflop, so operations are counted."""
    monkeypatch.setattr(we, 'peak_tflops', 1.0)


def rows(work_dir: Path) -> list[dict[str, Any]]:
    return [row for line in (work_dir / 'log.jsonl').read_text().splitlines() if 'train/loss' in (row := json.loads(line))]


def test_a_step_has_the_time_it_takes_to_wait_for_data_and_no_evaluation_nor_the_first_step(tmp_path):
    run(config(tmp_path, steps=4, TRAIN_HOOKS=[LOG], TRAIN_DATA={'NAME': 'SlowPoints', 'BATCH_SIZE': 6, 'SECONDS': 0.01}, EVAL_INTERVAL=1,
               EVAL_DATA={'NAME': 'SlowPoints', 'BATCH_SIZE': 1, 'SECONDS': 0.05}))     # 0.06 s a step, and 0.8 an evaluation
    first, *others = rows(tmp_path)

    assert 'perf/throughput' not in first and 'perf/memory' in first
    assert all(20 < row['perf/throughput'] < 100 and row['perf/data_wait'] > 0.3 for row in others), others


def test_a_rate_over_several_steps_is_what_was_done_by_the_time_it_took(tmp_path):
    solver = run(config(tmp_path, steps=3, TRAIN_HOOKS=[{**LOG, 'LOG_INTERVAL': 2}]))
    hook, = solver.hooks['train']
    hook.sums, hook.counts, solver.step = {}, {}, 0
    for step, rate in ((1, 10.0), (2, 30.0)):      # six samples in 0.6 s, then in 0.2 s
        solver.step = step
        hook.read_log(solver, {'train/loss': 1.0, 'perf/throughput': rate})

    assert 'perf/throughput' in RATES and rows(tmp_path)[-1]['perf/throughput'] == pytest.approx(12 / 0.8)


def test_operations_are_those_that_one_counts_by_hand(tmp_path, peak):
    solver = run(config(tmp_path, steps=3, TRAIN_HOOKS=[LOG], GLOBAL_BATCH_SIZE=12))     # two batches of six
    forward, towards_the_input = 2 * (3 * 16 + 16 * 2), 2 * 16 * 2
    counted, = solver.speed._flops.values()
    last = rows(tmp_path)[-1]

    assert counted == 2 * forward + towards_the_input
    assert last['perf/mfu'] == pytest.approx(counted * last['perf/throughput'] / 1e12, rel=1e-3)     # so both batches are in it


def test_what_is_computed_again_is_no_progress_and_not_counted(tmp_path, peak):
    counts = []
    for level in (False, True):
        solver = pairs.train(pairs.config(tmp_path / str(level), {**ROW, 'CHECKPOINTING': level}, 2))
        counts += solver.speed._flops.values()

    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize('compiles', [False, True])
def test_to_count_leaves_no_trace(tmp_path, monkeypatch, compiles):
    for name, teraflops in (('without', None), ('with', 1.0)):
        monkeypatch.setattr(we, 'peak_tflops', teraflops)
        pairs.train(pairs.config(tmp_path / name, {**ROW, 'COMPILE': compiles}, 4))

    assert same(groups(tmp_path / 'without', 4), groups(tmp_path / 'with', 4))
    assert 'perf/mfu' not in rows(tmp_path / 'without')[-1] and rows(tmp_path / 'with')[-1]['perf/mfu'] > 0


def test_the_peak_of_a_gpu_is_known_by_its_name_and_type():
    found = [flops.peak_of(name, dtype, tf32) for name, dtype, tf32 in (
        ('NVIDIA H100 80GB HBM3', torch.bfloat16, True), ('NVIDIA H100 PCIe', torch.bfloat16, True),
        ('NVIDIA A100-SXM4-80GB', torch.float32, True), ('NVIDIA A100-SXM4-80GB', torch.float32, False),
        ('NVIDIA L40S', torch.float16, True), ('Tesla T4', torch.float16, True),
        ('some accelerator', torch.float16, True))]

    assert found == [989.4e12, 756e12, 156e12, 19.5e12, 362e12, 65e12, None]
