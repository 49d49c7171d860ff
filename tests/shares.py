"""What each of two processes does in the tests of shares: runs of a tiny Stable Diffusion, and looks at what each process holds."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.disk.tensors import write_tensors
from scepter.core.env import Stopped, seed_everything, we
from scepter.core.errors import CheckpointError
from scepter.core.faults import ConfigError
from scepter.core.registry import DATASETS, SOLVERS
from scepter.core.schema import param
from scepter.core.shards import is_share, local
from scepter.data.datasets import BaseDataset
from scepter.solvers.state import to_save
from tiny import LATENT_DIFFUSION

COLOURS = ('red', 'green', 'blue', 'white', 'black')
TRAINED_TEXT = {'NAME': 'FrozenCLIPEmbedder', 'WIDTH': 32, 'DEPTH': 2, 'HEADS': 2, 'MAX_LENGTH': 8, 'FREEZE': False, 'USE_GRAD': True}
SGD = {'NAME': 'SGD', 'LEARNING_RATE': 0.05, 'MOMENTUM': 0.9}


@DATASETS.register_class()
class Walls(BaseDataset):
    """Pictures of one colour each.    image [3, 16, 16], prompt"""

    COUNT: int = param(12)

    def __len__(self) -> int:
        return self.COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        colour = torch.tensor([index % 2, index // 2 % 2, index // 4 % 2]) * 2.0 - 1
        return {'image': colour[:, None, None].expand(3, 16, 16).clone(), 'prompt': f'a {COLOURS[index % 5]} wall'}


def config(work_dir: Path, steps: int = 4, vae: Path | None = None, average_on: str = 'model', **solver: Any) -> Config:
    """Four samples a step, whatever the number of processes; five to evaluate on, which two processes cannot share evenly."""
    model = {**LATENT_DIFFUSION, 'FIRST_STAGE_MODEL': {**LATENT_DIFFUSION['FIRST_STAGE_MODEL'], 'PRETRAINED_MODEL': vae and str(vae)}}
    hooks = [{'NAME': 'ModelEmaHook', 'BETA': 0.5, 'DEVICE': average_on}, {'NAME': 'CheckpointHook', 'INTERVAL': 2},
             {'NAME': 'LogHook', 'LOG_INTERVAL': 1, 'PROGRESS': False},
             {'NAME': 'ProbeDataHook', 'INTERVAL': 2, 'PROMPTS': ['a red wall', 'a blue wall', 'a wall']}]
    return Config({'SOLVER': {
        'NAME': 'LatentDiffusionSolver', 'WORK_DIR': str(work_dir), 'RESUME_FROM': 'auto', 'MAX_STEPS': steps, 'GLOBAL_BATCH_SIZE': 4,
        'MODEL': model, 'OPTIMIZER': SGD, 'GRADIENT_CLIP': 0.5, 'SHARD_SIZE': 1e-4,     # several files for each group
        'TRAIN_DATA': {'NAME': 'Walls', 'BATCH_SIZE': 4, 'NUM_WORKERS': 0},
        'EVAL_DATA': {'NAME': 'Walls', 'BATCH_SIZE': 1, 'COUNT': 5}, 'EVAL_INTERVAL': 2, 'EVAL_HOOKS': [{'NAME': 'ProbeDataHook'}],
        'SAMPLE_ARGS': {'SAMPLE_STEPS': 2, 'GUIDE_SCALE': 2.0}, 'TRAIN_HOOKS': hooks, **solver}})


def train(cfg: Config) -> Any:
    """The solver after its run, in this process; of several, each has come to hold no more than its share."""
    we.seed, we.stop_signal = 7, 0
    seed_everything(7, 'start')
    solver = SOLVERS.build(cfg.SOLVER)
    solver.experiment = Config({'SOLVER': cfg.SOLVER})
    solver.set_up()
    solver.solve()
    if cfg.SOLVER.get('PARALLEL') == 'fsdp' and we.is_distributed:
        parameters = [p for p in solver.model.parameters() if not p.is_meta]    # of a part that rests nobody holds any
        held, total = sum(local(p).numel() for p in parameters), sum(p.numel() for p in parameters)
        assert total / 2 <= held < 0.52 * total or we.rank, (held, total)
        moments = [value for o in solver.optimizers for value in o.state_tensors().values() if value.ndim]
        assert moments and all(map(is_share, moments))
    return solver


def runs(cfg: Config) -> None:
    """What each process of two does: the runs in cfg.RUNS, one after the other."""
    for run in cfg.RUNS:
        train(Config({'SOLVER': run}))


def trials(cfg: Config) -> None:
    """What each process of two finds: refusals, a refused step, a stop signal, and shares that hold what they must not."""
    folder = Path(cfg.FOLDER)
    for kind in ({'NAME': 'Adafactor'}, {'NAME': 'Rprop'}, {'NAME': 'SGD', 'FUSED': True}):
        with pytest.raises(ConfigError, match=rf'PARALLEL is fsdp, but .*{kind["NAME"]}'):
            train(tiny.config(folder / kind['NAME'], steps=1, PARALLEL='fsdp', OPTIMIZER=kind))
    solver = train(tiny.config(folder / 'run', steps=2, PARALLEL='fsdp', GLOBAL_BATCH_SIZE=4, DTYPE='float16'))
    _one_process_alone_has_a_loss_that_is_not_finite(solver)
    with pytest.raises(CheckpointError, match='holds a share of it only'):
        write_tensors(folder / f'{we.rank}.safetensors', solver.model.state_dict())
    assert not list(folder.glob('*.safetensors'))
    if we.rank == 1:
        local(next(solver.model.parameters())).view(-1)[0] = float('nan')
    with pytest.raises(CheckpointError, match=r'not saved.* hold NaN or infinity: model: net\.0\.weight'):
        checkpoints.write(to_save(solver, folder / 'damaged'))
    with pytest.raises(Stopped):
        train(tiny.config(folder / 'stopped', steps=9, PARALLEL='fsdp', GLOBAL_BATCH_SIZE=4,
                          TRAIN_HOOKS=[{'NAME': 'StopAfter', 'BATCHES': 3, 'RANK': 1}]))
    assert checkpoints.load(folder / 'stopped').step == 3


def _one_process_alone_has_a_loss_that_is_not_finite(solver: Any) -> None:
    before = [local(p).clone() for p in solver.model.parameters()]
    solver.train_mode()
    image = torch.full((2, 2), float('inf') if we.rank == 1 else 0.5)
    solver.run_step_train([({'image': image, 'number': torch.arange(2)}, torch.arange(2))])
    assert not solver.is_last_step_finite and solver.train_step.scale.value == 2.0 ** 15
    assert all(torch.equal(b, local(p)) for b, p in zip(before, solver.model.parameters()))


def read(work_dir: Path, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Every tensor, and the state, of a checkpoint."""
    loaded = checkpoints.load(checkpoints.folder_of(work_dir / 'checkpoints', step))
    return {name: loaded.group(name) for name in loaded.groups}, loaded.state


def figures(work_dir: Path, name: str) -> list[float]:
    """A column of the log."""
    rows = map(json.loads, (work_dir / 'log.jsonl').read_text().splitlines())
    return [row[name] for row in rows if name in row]


def differences(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]], rtol: float, atol: float) -> list[str]:
    """What two checkpoints do not have in common."""
    names = [{f'{group}/{name}' for group, below in x.items() for name in below} for x in (a, b)]
    return sorted(names[0] ^ names[1]) + [f'{group}/{name}' for group, below in a.items() for name, value in below.items()
                                          if name in b.get(group, {}) and not torch.allclose(value, b[group][name], rtol=rtol, atol=atol)]
