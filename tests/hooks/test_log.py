"""What a run says: in log.jsonl, on the console, in TensorBoard, and what hooks add to it."""
from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scepter import run_inference, run_train
from scepter.core.config import Config
from scepter.core.experiment import import_user_code
from scepter.core.registry import HOOKS
from scepter.hooks.base import Hook
from tiny import LATENT_DIFFUSION, config, run

POINTS = {'NAME': 'TinyPoints', 'BATCH_SIZE': 16}


def rows_of(work_dir: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f'{word} is no JSON')
    return [json.loads(line, parse_constant=refuse) for line in (work_dir / 'log.jsonl').read_text(encoding='utf-8').splitlines()]


def test_a_resumed_log_is_that_of_a_run_that_was_never_cut(tmp_path):
    def go(name: str, steps: int, **more: Any) -> list[dict[str, Any]]:
        hooks = [{'NAME': 'LogHook', 'LOG_INTERVAL': 3}, {'NAME': 'CheckpointHook', 'INTERVAL': 4, 'SAVE_LAST': False}]
        run(config(tmp_path / name, steps=steps, TRAIN_HOOKS=hooks, LR_SCHEDULER=None, EVAL_INTERVAL=5, EVAL_DATA=POINTS, **more))
        return [{k: v for k, v in row.items() if k != 'time' and not k.startswith('perf/')} for row in rows_of(tmp_path / name)]

    whole = go('whole', 12)
    go('cut', 7)     # killed after step 7, three steps behind the checkpoint and amid a line
    with open(tmp_path / 'cut' / 'log.jsonl', 'a') as file:
        file.write('{"step": 7, "tra')
    assert go('cut', 12, RESUME_FROM='latest') == whole
    assert [row['step'] for row in whole] == [3, 5, 6, 9, 10, 12]


def test_a_figure_that_is_not_finite_is_null(tmp_path):
    run(config(tmp_path, steps=3, MODEL={'NAME': 'TinyDenoiser', 'NAN_AT': [1]}, TRAIN_HOOKS=[{'NAME': 'LogHook', 'LOG_INTERVAL': 1}]))
    losses = [row['train/loss'] for row in rows_of(tmp_path)]
    assert losses[1] is None and isinstance(losses[2], float)


@HOOKS.register_class()
class WeightNorm(Hook):
    """Logs a tensor, a name of its own, a picture, and in evaluations a number."""

    def after_iter(self, solver):
        solver.log('weight_norm', solver.model.net[0].weight.norm())
        solver.log('mine/step', solver.step)
        solver.log('look', torch.full((3, 4, 4), 0.5))

    def after_eval(self, solver):
        solver.log('twice', 2 * solver.eval_outputs['loss'])


@pytest.mark.parametrize('order', [[0, 1, 2], [2, 1, 0]])
def test_what_any_hook_logs_is_written_wherever_it_stands_in_the_list(tmp_path, order):
    hooks = [{'NAME': 'LogHook', 'LOG_INTERVAL': 2}, {'NAME': 'TensorboardLogHook', 'LOG_INTERVAL': 2}, {'NAME': 'WeightNorm'}]
    solver = run(config(tmp_path, steps=4, TRAIN_HOOKS=[hooks[i] for i in order], EVAL_INTERVAL=4, EVAL_DATA=POINTS))
    step, last, evaluation = rows_of(tmp_path)
    assert step['mine/step'] == 1.5 and last['mine/step'] == 3.5      # means since the line before
    assert last['train/weight_norm'] == pytest.approx(float(solver.model.net[0].weight.detach().norm()), rel=0.05)
    assert evaluation['val/twice'] == 2 * evaluation['val/loss']
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    assert [e.step for e in events.Scalars('train/weight_norm')] == [2, 4]
    assert [e.step for e in events.Scalars('val/twice')] == [4]
    assert 'train/look' in events.Tags()['images']


def test_what_is_no_figure_and_no_picture_is_refused_by_its_shape(tmp_path):
    solver = run(config(tmp_path, steps=1))
    with pytest.raises(TypeError, match=r"log\('norms', ...\): Tensor\[4, 2\] is neither a figure"):
        solver.log('norms', torch.zeros(4, 2))


@HOOKS.register_class()
class StopAt3(Hook):
    def after_iter(self, solver):
        if solver.step == 3:
            solver.max_steps = solver.step


def test_the_console_tells_where_it_begins_how_long_it_takes_and_how_long_it_took(tmp_path, capsys):
    solver = run(config(tmp_path, steps=6, TRAIN_HOOKS=[{'NAME': 'LogHook', 'LOG_INTERVAL': 2}, {'NAME': 'StopAt3'}]))
    lines = [line.split(' I ')[-1] for line in capsys.readouterr().err.splitlines()]
    assert solver.step == 3
    assert lines[0].startswith(f'WORK_DIR {tmp_path}; train on 16 samples; 1 x cpu with ')
    assert lines[1] == 'TinyDenoiser: 98 parameters, 98 trained, in float32; 6 steps of 6 samples, 2.25 epochs'
    assert lines[2].startswith('step 2/6  eta 0:0') and ' samples/s  waited for data ' in lines[2] and '%' in lines[2]
    assert lines[-1] == 'done in 0:00'


MINE = '''
from scepter import MODELS
from scepter.models.latent_diffusion import LatentDiffusion

@MODELS.register_class()
class OfMine(LatentDiffusion):
    pass
'''


def test_the_last_line_is_a_command_that_draws(tmp_path, monkeypatch, capsys):
    (tmp_path / 'images').mkdir()
    Image.new('RGB', (16, 16), 'red').save(tmp_path / 'images' / 'red.png')
    (tmp_path / 'images' / 'red.txt').write_text("a 'red' wall")
    (tmp_path / 'of_mine.py').write_text(MINE)
    (tmp_path / 'my.yaml').write_text(str(Config({'IMPORTS': ['of_mine.py'], 'ENV': {'DEVICE': 'cpu'}, 'SOLVER': {
        'NAME': 'LatentDiffusionSolver', 'WORK_DIR': 'work', 'MAX_STEPS': 1, 'MODEL': {**LATENT_DIFFUSION, 'NAME': 'OfMine'},
        'OPTIMIZER': {'NAME': 'SGD', 'LR': 0.0}, 'SAMPLE_ARGS': {'SAMPLE_STEPS': 2}, 'TRAIN_HOOKS': [{'NAME': 'CheckpointHook'}],
        'TRAIN_DATA': {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': 'images', 'BATCH_SIZE': 1}}})))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [str(Path(run_train.__file__)), '--cfg', 'my.yaml'])
    assert run_train.main() == 0
    lines = capsys.readouterr().err.splitlines()
    python, script, *words = shlex.split(lines[-1])
    assert lines[-2].endswith('draw with:') and python == 'python' and Path(script) == Path(run_inference.__file__)
    assert run_inference.main([*words, '--num_samples', '1', '--save_folder', 'drawn']) == 0
    assert len(list((tmp_path / 'drawn').glob('*-a-red-wall-*.png'))) == 1


def test_the_hooks_of_docs_extend_log_and_write(tmp_path):
    page = (Path(run_train.__file__).parents[1] / 'docs' / 'extend.md').read_text(encoding='utf-8')
    block = next(b for b in re.findall(r'^```python\n(.*?)^```', page, re.MULTILINE | re.DOTALL) if 'class WeightNorm' in b)
    block = block.replace('class WeightNorm', 'class PageNorm').replace('(WeightNorm', '(PageNorm')
    (tmp_path / 'hooks_of_a_page.py').write_text('import torch\nfrom scepter import HOOKS, Hook, param\n' + block)
    import_user_code(str(tmp_path / 'hooks_of_a_page.py'))
    hooks = [{'NAME': 'LogHook', 'LOG_INTERVAL': 2}, {'NAME': 'CsvHook'}, {'NAME': 'PageNorm', 'EVERY': 2}]
    run(config(tmp_path, steps=4, TRAIN_HOOKS=hooks))
    rows = rows_of(tmp_path)
    assert all(row['train/weight_norm'] > 0 for row in rows)
    losses = [line.split(',') for line in (tmp_path / 'losses.csv').read_text().splitlines()]
    assert [(int(step), name) for step, name, _ in losses] == [(step, 'train/loss') for step in (1, 2, 3, 4)]
    assert rows[0]['train/loss'] == pytest.approx(sum(float(loss) for *_, loss in losses[:2]) / 2, abs=1e-5)
