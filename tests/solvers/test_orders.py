"""Runs on buckets, mixtures and tar shards go on as they would have: stopped and begun again, cut otherwise, on other processes."""
from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pairs import Crash, Stop, differences, outcome, train
from scepter.core import streams
from scepter.core.config import Config
from scepter.core.env import we
from scepter.core.launch import launch
from scepter.core.registry import HOOKS, MODELS
from scepter.hooks.base import Hook
from scepter.models.base import TrainModule
from tests.twins import three_images, twin

SHAPES = [(32, 32)] * 5 + [(48, 24)] * 6 + [(24, 60)] * 5    # height, width


@MODELS.register_class()
class Repainter(TrainModule):
    """Learns to give back pictures of any size, from noise of its own."""

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward_train(self, image: Tensor, **batch: Any) -> dict[str, Any]:
        return {'loss': (self.net(image + streams.normal('noise', image)) - image).square().mean()}

    def forward_test(self, image: Tensor, prompt: list[str], **batch: Any) -> list[dict[str, Any]]:
        return [{'prompt': p} for p in prompt]

    def compile_network(self) -> None:
        self.compile(backend='eager')


@HOOKS.register_class()
class NoteBatches(Hook):
    """Writes down which samples of what size each step had."""

    def after_iter(self, solver: Any) -> None:
        with open(solver.work_dir / f'seen-{we.rank}.jsonl', 'a') as file:
            for batch, n in solver.batches:
                for number, prompt in zip(n.tolist(), batch['prompt']):
                    file.write(json.dumps([solver.step, number, prompt, list(batch['image'].shape[-2:])]) + '\n')


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three shapes in a folder and in a tar, one of them damaged; and a folder with a single one."""
    root = tmp_path_factory.mktemp('data')
    for folder in ('many', 'one'):
        (root / folder).mkdir()
    with tarfile.open(root / 'many.tar', 'w') as tar:
        for i, (height, width) in enumerate(SHAPES):
            file = io.BytesIO()
            Image.new('RGB', (width, height), (15 * i, 255 - 15 * i, 90)).save(file, 'PNG')
            picture = file.getvalue() if i != 7 else file.getvalue()[:60]
            for name, content in ((f'{i:02d}.png', picture), (f'{i:02d}.txt', f'number {i}'.encode())):
                (root / 'many' / name).write_bytes(content)
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    Image.new('RGB', (32, 32), 'red').save(root / 'one' / 'red.png')
    (root / 'one' / 'red.txt').write_text('the only one')
    return root


CROP = [{'NAME': 'RecordedCrop', 'RANDOM': True, 'FLIP': 0.5}]
SQUARE = [{**CROP[0], 'SIZE': 32}]


def dataset(root: Path, kind: str, **more: Any) -> dict[str, Any]:
    buckets = {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(root / 'many'), 'BUCKETS': 32, 'BUCKET_STEP': 8, 'TRANSFORMS': CROP}
    tar = {'NAME': 'ImageTextTarDataset', 'SHARDS': [str(root / 'many.tar')]}
    one = {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(root / 'one'), 'TRANSFORMS': SQUARE}
    return {'buckets': buckets, 'tar': {**tar, 'TRANSFORMS': SQUARE},
            'buckets in a tar': {**tar, 'BUCKETS': 32, 'BUCKET_STEP': 8, 'TRANSFORMS': CROP},
            'mixture': {'NAME': 'MixtureDataset', 'PARTS': {'tar': {**tar, 'TRANSFORMS': SQUARE, 'REPEATS': 3, 'WEIGHT': 3}, 'one': one}},
            'mixture of buckets': {'NAME': 'MixtureDataset', 'PARTS': {'many': {**buckets, 'WEIGHT': 0.7}, 'one': {**one, 'WEIGHT': 0.3}}},
            }[kind] | {'BATCH_SIZE': 4, 'MAX_BAD_FRACTION': 0.5, **more}


def config(work_dir: Path, data: dict[str, Any], steps: int = 10, interval: int = 5, **solver: Any) -> Config:
    hooks = [{'NAME': 'NoteBatches'}, {'NAME': 'LogHook', 'LOG_INTERVAL': 3, 'PROGRESS': False}, {'NAME': 'ModelEmaHook', 'BETA': 0.9},
             {'NAME': 'CheckpointHook', 'INTERVAL': interval}]
    return Config({'SOLVER': {'NAME': 'BaseSolver', 'WORK_DIR': str(work_dir), 'RESUME_FROM': 'auto', 'MAX_STEPS': steps,
                              'MODEL': {'NAME': 'Repainter'}, 'OPTIMIZER': {'NAME': 'AdamW', 'LEARNING_RATE': 1e-2},
                              'TRAIN_DATA': data, 'TRAIN_HOOKS': hooks, **solver}})


def seen(work_dir: Path, first_step: int = 0) -> dict[int, tuple[int, str, tuple[int, int]]]:
    """number of a sample -> (step, prompt, size of its picture), of all processes; of a step that ran twice, the later run."""
    rows = [json.loads(line) for file in work_dir.glob('seen-*.jsonl') for line in file.read_text().splitlines()]
    return {n: (step, prompt, tuple(size)) for step, n, prompt, size in sorted(rows, key=lambda row: row[1]) if step > first_step}


def has_one_size_in_each_step(found: dict[int, tuple]) -> bool:
    sizes: dict[int, set] = {}
    for step, _, size in found.values():
        sizes.setdefault(step, set()).add(size)
    return all(len(size) == 1 for size in sizes.values()) and len(set.union(*sizes.values())) > 1


def run_halves(folder: Path, make: Any) -> None:
    """Into folder/whole and folder/halves: the same run, undisturbed, and stopped at step 7 and begun again from step 5."""
    train(make(folder / 'whole'))
    with pytest.raises(Crash):
        train(make(folder / 'halves'), Stop({}))
    train(make(folder / 'halves'))


ROWS = [('buckets', {}, {}), ('buckets', {'NUM_WORKERS': 2}, {'ACCU_STEP': 2, 'CHANNELS_LAST': True, 'DTYPE': 'bfloat16'}),
        ('buckets', {'BATCH_SIZE': 2, 'REPEATS': 2}, {'GLOBAL_BATCH_SIZE': 6, 'COMPILE': True}), ('tar', {'NUM_WORKERS': 2}, {}),
        ('buckets in a tar', {'NUM_WORKERS': 1}, {}), ('mixture', {}, {'ACCU_STEP': 2}), ('mixture', {'NUM_WORKERS': 2}, {}),
        ('mixture of buckets', {}, {'MAX_STEPS': None, 'MAX_EPOCHS': 40 / 17})]


@pytest.mark.parametrize(('kind', 'more', 'solver'), [pytest.param(*row, marks=[pytest.mark.slow] if 'COMPILE' in row[2] else [])
                                                      for row in ROWS])
def test_a_run_that_is_stopped_goes_on_to_the_bit(tmp_path, data, kind, more, solver):
    evaluation = {'EVAL_DATA': dataset(data, kind), 'EVAL_INTERVAL': 3}
    run_halves(tmp_path, lambda work_dir: config(work_dir, dataset(data, kind, **more), **{**evaluation, **solver}))
    found = differences(outcome(tmp_path / 'whole'), outcome(tmp_path / 'halves'))
    assert not found, found
    assert seen(tmp_path / 'whole') == seen(tmp_path / 'halves')
    assert 'buckets' not in kind or has_one_size_in_each_step(seen(tmp_path / 'whole'))
    assert 'number 7' not in {prompt for _, prompt, _ in seen(tmp_path / 'whole').values()}     # the damaged one


def go_on(cfg: Config) -> None:
    train(cfg)


@pytest.mark.parametrize('kind', ['buckets', pytest.param('mixture of buckets', marks=pytest.mark.slow)])
def test_two_processes_go_on_with_the_samples_that_one_would_have_had(tmp_path, data, kind):
    """Two micro-batches of one process become one of each of two."""
    how = {'BATCH_SIZE': 2}
    whole = train(config(tmp_path / 'whole', dataset(data, kind, **how), ACCU_STEP=2))
    train(config(tmp_path / 'parts', dataset(data, kind, **how), 5, ACCU_STEP=2))
    cfg = config(tmp_path / 'parts', dataset(data, kind, **how, NUM_WORKERS=1))
    launch(Config({**cfg, 'ENV': {'NPROC': 2, 'DEVICE': 'cpu', 'THREADS': 1}}), go_on)
    assert seen(tmp_path / 'parts') == seen(tmp_path / 'whole') and has_one_size_in_each_step(seen(tmp_path / 'whole'))
    weights = outcome(tmp_path / 'parts')['model']
    assert all(torch.allclose(value, weights[name], atol=1e-5) for name, value in whole.model.state_dict().items())


@pytest.mark.parametrize('size', [6, 8])
def test_a_run_goes_on_in_steps_of_another_size_and_can_be_stopped_again(tmp_path, data, size):
    """From sample 20 on in steps of 6 or 8, neither of which divides 20."""
    def make(work_dir: Path) -> Config:
        return config(work_dir, dataset(data, 'buckets', BATCH_SIZE=2), 12, interval=1, GLOBAL_BATCH_SIZE=size, ACCU_STEP=1)

    for name in ('whole', 'halves'):
        train(config(tmp_path / name, dataset(data, 'buckets'), 5))
    train(make(tmp_path / 'whole'))
    with pytest.raises(Crash):
        train(make(tmp_path / 'halves'), Stop({}))
    train(make(tmp_path / 'halves'))
    found = seen(tmp_path / 'whole', first_step=5)
    assert found == seen(tmp_path / 'halves', first_step=5) and list(found) == list(range(20, 20 + 7 * size))
    assert has_one_size_in_each_step(found)
    assert not differences(outcome(tmp_path / 'whole', 12)['model'], outcome(tmp_path / 'halves', 12)['model'])


# ------------------------------------------------------------------------------------------------ the shipped recipe
def recipe(work: Path, images: Path) -> Config:
    work.mkdir(exist_ok=True)
    hooks = [{'NAME': 'NoteBatches'}, {'NAME': 'LogHook', 'LOG_INTERVAL': 3, 'PROGRESS': False}, {'NAME': 'CheckpointHook', 'INTERVAL': 5}]
    return twin('sd15/sd15_buckets', work / 'tiny.yaml', images=images, MAX_STEPS=10, WARMUP_STEPS=2, TRAIN_HOOKS=hooks)


def recipe_halves(cfg: Config) -> None:
    folder = Path(cfg.FOLDER)
    run_halves(folder, lambda work: recipe(work, folder / 'images'))


@pytest.mark.parametrize('processes', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_bucketed_recipe_goes_on_to_the_bit(tmp_path, processes):
    three_images(tmp_path / 'images')
    cfg = Config({'FOLDER': str(tmp_path), 'ENV': {'NPROC': processes, 'DEVICE': 'cpu', 'THREADS': 1}})
    launch(cfg, recipe_halves)
    found = differences(outcome(tmp_path / 'whole' / 'work'), outcome(tmp_path / 'halves' / 'work'))
    assert not found and has_one_size_in_each_step(seen(tmp_path / 'whole' / 'work'))
