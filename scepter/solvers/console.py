"""What a run says before its first step and after its last."""
from __future__ import annotations

import inspect
import os
import shlex
import sys
from pathlib import Path

import torch

from scepter.core.disk import checkpoints
from scepter.core.env import we
from scepter.core.logger import duration
from scepter.solvers.run import Run


def greeting(run: Run) -> str:
    """Where the run writes, what it reads, and what computes."""
    if we.device.type == 'cuda':
        device = torch.cuda.get_device_name(we.device)
    else:
        threads = torch.get_num_threads()
        device = f'{we.device} with {threads} thread{"s" if threads > 1 else ""}'
    datasets = {**run.datasets, **{evaluation.called('eval'): evaluation.dataset for evaluation in run.evaluations.values()}}
    reads = [f'{use} on {len(data):,} samples' for use, data in datasets.items() if data is not None]
    return '; '.join([f'WORK_DIR {run.work_dir}', ', '.join(reads) or 'nothing to read', f'{we.world_size} x {device}'])


def sizes(run: Run) -> str:
    """How large the network is, and how long it trains."""
    trained = sum(p.numel() for o in run.optimizers for p in o.owned.values())
    total = sum(p.numel() for p in run.model.parameters())
    plan = run.plan
    epochs = plan.global_size * run.max_steps / len(run.datasets['train'])
    return (f'{type(run.model).__name__}: {total:,} parameters, {trained:,} trained, in {str(run.dtype).removeprefix("torch.")}; '
            f'{run.max_steps:,} steps of {plan.global_size} samples, {epochs:.3g} epochs')


def farewell(run: Run, seconds: float) -> str:
    """How long it took, and the command that draws from the newest checkpoint where the network draws from a prompt."""
    done = f'done in {duration(seconds)}'
    newest = checkpoints.folder_of(run.work_dir / 'checkpoints', run.step)
    if not newest.is_dir():
        return done
    if 'prompt' not in inspect.signature(run.model.forward_test).parameters:
        return f'{done}; the newest checkpoint is {newest}'
    prompts = (run.batches[-1][0].get('prompt') if run.batches else None) or ['what to draw']
    words = [*draw_command(), '--pretrained_model', str(newest)]
    for word in run.imports:
        words += ['--imports', _near(word)]
    return f'{done}; draw with:\n  {shlex.join([*words, "--prompt", str(prompts[0])])}'


def draw_command() -> list[str]:
    """The drawing door, beside the one that this run came in by."""
    script = Path(sys.argv[0])
    if script.name == 'run_train.py':
        return ['python', str(script.with_name('run_inference.py'))]
    return ['scepter', 'draw'] if script.name.split(' ')[0] == 'scepter' else ['python', '-m', 'scepter.run_inference']


def _near(word: str) -> str:
    """A file as it is called from here, where that is shorter."""
    return min(word, os.path.relpath(word), key=len) if word.endswith('.py') else word
