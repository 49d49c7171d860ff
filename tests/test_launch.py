"""One process or many: the same samples, the same noise, the same weights, and a checkpoint of one goes on in the other."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from scepter import run_train
from scepter.core.disk import checkpoints

TINY = Path(__file__).parent / 'solvers' / 'tiny.py'
sys.path.insert(0, str(TINY.parent))
from tiny import config, groups, same  # noqa: E402


def train(work_dir: Path, processes: int, *words: str) -> None:
    """Eight steps of twelve samples each, on so many processes."""
    file = work_dir.with_suffix('.yaml')
    cfg = config(work_dir, steps=8, GLOBAL_BATCH_SIZE=12)
    cfg.update(IMPORTS=[str(TINY)], ENV={'NPROC': processes, 'DEVICE': 'cpu', 'SEED': 5, 'THREADS': 1})
    file.write_text(str(cfg), encoding='utf-8')
    assert run_train.main(['--cfg', str(file), *words]) == 0


@pytest.fixture(scope='module')
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('one') / 'work'
    train(folder, 1)
    return folder


def test_two_processes_learn_what_one_learns(one, tmp_path):
    train(tmp_path / 'two', 2)
    alone, together = groups(one, 8)['model'], groups(tmp_path / 'two', 8)['model']
    assert all(torch.allclose(alone[k], together[k], rtol=1e-4, atol=1e-6) for k in alone if k != 'seen')
    assert checkpoints.load(tmp_path / 'two' / 'checkpoints' / 'step-00000008').state['world_size'] == 2


def test_a_checkpoint_of_two_processes_goes_on_in_one_and_repeats_itself_to_the_bit(one, tmp_path):
    train(tmp_path / 'a', 2, 'SOLVER.MAX_STEPS=4', 'SOLVER.LR_SCHEDULER=null')
    train(tmp_path / 'b', 2, 'SOLVER.MAX_STEPS=4', 'SOLVER.LR_SCHEDULER=null')
    assert same(groups(tmp_path / 'a', 4), groups(tmp_path / 'b', 4))
    train(tmp_path / 'a', 1, 'SOLVER.LR_SCHEDULER=null', 'SOLVER.RESUME_FROM=latest')
    train(tmp_path / 'c', 1, 'SOLVER.LR_SCHEDULER=null')
    moved, alone = groups(tmp_path / 'a', 8)['model'], groups(tmp_path / 'c', 8)['model']
    assert all(torch.allclose(moved[k], alone[k], rtol=1e-4, atol=1e-6) for k in alone if k != 'seen')
