"""A table in which every two settings of a run meet, and the run that each row describes: whole, or stopped halfway and begun again."""
from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scepter.core import streams
from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.env import seed_everything, we
from scepter.core.registry import DATASETS, MODELS, SOLVERS
from scepter.core.schema import param
from scepter.data.datasets import BaseDataset
from scepter.diffusion.process import Diffusion
from scepter.diffusion.schedules import cosine
from scepter.hooks.base import Hook
from scepter.models.base import TrainModule
from scepter.models.layers import checkpoint
from tiny import groups

STEPS, SAVED, STOPPED = 10, 5, 7     # a run; its checkpoint; how far it came beyond it before it was stopped
ADAM, MOMENTUM = {'NAME': 'AdamW', 'LEARNING_RATE': 1e-2}, {'NAME': 'SGD', 'LEARNING_RATE': 1e-2, 'MOMENTUM': 0.9, 'NESTEROV': True}
EMA = {'NAME': 'ModelEmaHook', 'BETA': 0.9}

# what a row of the table sets -> the values that each meet every value of every other
FACTORS: dict[str, list[Any]] = {
    'OPTIMIZER': [ADAM, {**ADAM, 'EVERY': 2}, {**ADAM, 'FOREACH': True}, MOMENTUM,
                  {'first': {**ADAM, 'PARAMS': ['first.*', 'norm.*']}, 'rest': {**MOMENTUM, 'LOSS': 'other', 'EVERY': 3}}],
    'DTYPE': ['float32', 'bfloat16', 'float16'],
    'EMA': [[], [EMA], [EMA, {**EMA, 'BETA': 0.5, 'EVERY': 2}]],
    'PARAM_DTYPE': ['float32', 'bfloat16'],
    'CHANNELS_LAST': [False, True],
    'COMPILE': [False, True],
    'ACCU_STEP': [1, 2],
    'GRADIENT_CLIP': [None, 0.05],
    'LENGTH': ['MAX_STEPS', 'MAX_EPOCHS'],
    'EVAL_INTERVAL': [0, 3],
    'EVALS': [{}, {'often': {'INTERVAL': 2, 'DATA': {'NAME': 'Waves', 'BATCH_SIZE': 4, 'COUNT': 7}, 'METRICS': [{'NAME': 'MeanValue'}]},
                   'seldom': {'INTERVAL': 5, 'DATA': {'NAME': 'Waves', 'BATCH_SIZE': 5}}}],
    'CHECKPOINTING': [False, True],
    'REPEATS': [1, 3],
    'NUM_WORKERS': [0, 2],
    'PROCESSES': [1, 2],
    'PARALLEL': ['ddp', 'fsdp'],
    'SHARD_SIZE': [2.0, 1e-6],      # one file, or several
    'ASYNC_SAVE': [False, True],
}
# pairs by their places in FACTORS: what no run may have, or what means nothing, and what takes so long that one row has to do
REFUSED = {frozenset(pair) for pair in ([('DTYPE', 2), ('PARAM_DTYPE', 1)], [('OPTIMIZER', 4), ('PARALLEL', 1)],
                                        [('PROCESSES', 0), ('PARALLEL', 1)])}
SLOW = frozenset([('COMPILE', 1), ('PROCESSES', 1)])
Row = dict[str, Any]


def table() -> list[Row]:
    """A covering array of strength two, built greedily: each row begins with a pair that has not met yet, and each further factor takes
    the value that brings the most new pairs."""
    def gain(row: dict[str, int], name: str, i: int) -> int:
        pairs = [frozenset(((name, i), met)) for met in row.items()]
        return -1 if REFUSED & {*pairs} or (SLOW in pairs and SLOW not in left) else sum(pair in left for pair in pairs)

    levels = {name: range(len(values)) for name, values in FACTORS.items()}
    left = {frozenset(((a, i), (b, j))) for a, b in itertools.combinations(FACTORS, 2) for i in levels[a] for j in levels[b]} - REFUSED
    rows = []
    while left:
        row = dict(min(left, key=lambda pair: sorted(map(str, pair))))
        for name in FACTORS:
            if name not in row:
                row[name] = max(levels[name], key=lambda i: gain(row, name, i))
        left -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({name: FACTORS[name][row[name]] for name in FACTORS})
    return rows


@DATASETS.register_class()
class Waves(BaseDataset):
    """Small pictures that differ, each with noise that its transform draws.    image [1, 8, 8], number"""

    COUNT: int = param(24)

    def __len__(self) -> int:
        return self.COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        angle = torch.arange(8) * (index + 1) / 4
        return {'image': (angle.sin()[:, None] * angle.cos() + 0.1 * torch.randn(8, 8))[None], 'number': index}


@MODELS.register_class()
class Painter(TrainModule):
    """A small network with all that can go wrong when a run is interrupted: draws of its own and torch's, several of them for a sample,
    statistics that are counted, weights of every rank, a part that never has a gradient, and two losses."""

    CHECKPOINTING: bool = param(False, 'Compute the middle twice instead of keeping it.')
    REPEATS: int = param(1, 'Levels and noises for each sample.')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.first, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.SiLU(), nn.Dropout(0.2), nn.Conv2d(6, 6, 1))
        self.mix, self.last = nn.Linear(6, 6), nn.Conv2d(6, 1, 3, padding=1)
        self.scale, self.idle = nn.Parameter(torch.ones(())), nn.Linear(2, 2)
        self.diffusion = Diffusion(*cosine(100), prediction='v')

    def main_blocks(self) -> list[nn.Module]:
        return [self.middle]

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.norm(self.first(x + (t / 100).to(x)[:, None, None, None]))
        x = x + (checkpoint(self.blurred, x) if self.CHECKPOINTING else self.blurred(x))
        return self.last(self.mix(x.movedim(1, 3)).movedim(3, 1) * self.scale)

    def blurred(self, x: Tensor) -> Tensor:
        return self.middle(x + 0.1 * streams.normal('blur', x))

    def forward_train(self, image: Tensor, number: Tensor, **batch: Any) -> dict[str, Any]:
        losses = []
        for i in range(self.REPEATS):
            t, noise = streams.integers(f'timestep/{i}', 100, len(image)), streams.normal(f'noise/{i}', image)
            losses.append(self.diffusion.loss(image, t.to(image.device), self.network, noise=noise))
        losses = torch.stack(losses)
        return {'loss': losses.mean(), 'other': losses.float().square().mean(), 'probe_data': {'number': number}}

    def forward_test(self, image: Tensor, number: Tensor, **batch: Any) -> list[dict[str, Any]]:
        return [{'prompt': f'wave {n}', 'value': n} for n in number.tolist()]

    def compile_network(self) -> None:
        # all of torch.compile but the C++ compiler, which takes a minute; on two processes at once even that takes too long
        self.compile(backend='eager' if we.is_distributed else 'aot_eager')


class Stop(Hook):
    """Ends the run in the midst of it, as a crash would."""

    def after_iter(self, solver: Any) -> None:
        if solver.step == STOPPED:
            raise Crash


class Crash(BaseException):
    pass


def config(work_dir: Path, row: Row, steps: int = STEPS) -> Config:
    micro = 4 // row['PROCESSES']
    size = micro * row['PROCESSES'] * row['ACCU_STEP']
    hooks = [{'NAME': 'LogHook', 'LOG_INTERVAL': 3, 'PROGRESS': False}, {'NAME': 'CheckpointHook', 'INTERVAL': SAVED}, *row['EMA']]
    same_name = {name: row[name] for name in ('DTYPE', 'PARAM_DTYPE', 'CHANNELS_LAST', 'COMPILE', 'ACCU_STEP', 'GRADIENT_CLIP',
                                              'EVAL_INTERVAL', 'EVALS', 'OPTIMIZER', 'PARALLEL', 'SHARD_SIZE', 'ASYNC_SAVE')}
    length = {'MAX_STEPS': steps} if row['LENGTH'] == 'MAX_STEPS' else {'MAX_EPOCHS': steps * size / 24}
    return Config({'SOLVER': {
        'NAME': 'BaseSolver', 'WORK_DIR': str(work_dir), 'RESUME_FROM': 'auto', **length, **same_name,
        'LR_SCHEDULER': {'NAME': 'Cosine', 'FINAL': 0.1}, 'WARMUP_STEPS': 3,
        'MODEL': {'NAME': 'Painter', 'CHECKPOINTING': row['CHECKPOINTING'], 'REPEATS': row['REPEATS']},
        'TRAIN_DATA': {'NAME': 'Waves', 'BATCH_SIZE': micro, 'NUM_WORKERS': row['NUM_WORKERS']},
        'EVAL_DATA': {'NAME': 'Waves', 'BATCH_SIZE': 5}, 'TRAIN_HOOKS': hooks}})


def train(cfg: Config, *hooks: Hook, seed: int = 7) -> Any:
    """The solver after its run, in this process."""
    torch._dynamo.reset()     # a new run compiles anew
    we.seed, we.stop_signal = seed, 0
    seed_everything(seed, 'start')
    solver = SOLVERS.build(cfg.SOLVER)
    solver.experiment = cfg
    solver.hooks['train'].extend(hooks)
    solver.set_up()
    solver.solve()
    return solver


def whole_and_halves(folder: Path, row: Row) -> None:
    """Into folder/whole and folder/halves: the same run, undisturbed, and stopped at step 7 and begun again from its checkpoint."""
    train(config(folder / 'whole', row))
    try:
        train(config(folder / 'halves', row), Stop({}))
    except Crash:
        pass
    train(config(folder / 'halves', row))


def all_rows(cfg: Config) -> None:
    """What each process of a run of several does: the rows in cfg.ROWS, of cfg.FOLDER."""
    rows = table()
    for i in cfg.ROWS:
        whole_and_halves(Path(cfg.FOLDER) / str(i), rows[i])


def outcome(work_dir: Path, step: int = STEPS) -> dict[str, Any]:
    """All that a run leaves: every tensor and number of its last checkpoint, and the figures of its log.

    Figures that tell the speed are left out, for they differ from run to run.
    """
    state = checkpoints.load(checkpoints.folder_of(work_dir / 'checkpoints', step)).state
    rows = [json.loads(line) for line in (work_dir / 'log.jsonl').read_text().splitlines()]
    log = [{key: value for key, value in row.items() if key != 'time' and not key.startswith('perf/')} for row in rows]
    return {**groups(work_dir, step), 'state': dict(state), 'log': log}


def differences(a: Any, b: Any, path: str = '') -> list[str]:
    """Where two outcomes differ, to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [found for key in a.keys() | b.keys() for found in differences(a.get(key), b.get(key), f'{path}/{key}')]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b)) for found in differences(x, y, f'{path}/{i}')]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [f'{path}: another tensor']
    return [] if a == b else [f'{path}: {a!r:.200} and {b!r:.200}']


