"""Commands as a user types them, for the demos of these examples: each step that a demo takes is a line that can be repeated by hand."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def train(recipe: Path, work_dir: Path, seed: int, *words: str) -> None:
    _run('run_train.py', '--cfg', str(recipe), f'ENV.SEED={seed}', f'SOLVER.WORK_DIR={work_dir}', *words)


def draw(model: Path, folder: Path, seed: int, count: int, *words: str) -> None:
    """count: how many pictures it will be, to say how far it is."""
    _run('run_inference.py', '--pretrained_model', str(model), '--seed', str(seed), '--save_folder', str(folder),
         '--batch_size', '100', *words, count=count)


def _run(script: str, *words: str, count: int = 0) -> None:
    """Ends with the command's exit code where it fails. count: how many files it will name, instead of their names."""
    command = [sys.executable, str(ROOT / 'scepter' / script), *words]
    print('\n$ python scepter/' + ' '.join([script, *words]), flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE if count else None, text=True,
                          env={**os.environ, 'PYTHONWARNINGS': 'ignore'}) as process:
        for done, _ in enumerate(process.stdout or (), 1):
            if done % 100 == 0:
                print(f'  {done} of {count} pictures', flush=True)
    if process.returncode:
        sys.exit(process.returncode)


def newest(work_dir: Path) -> Path:
    return max((work_dir / 'checkpoints').glob('step-*'))


def python() -> str:
    """How this interpreter is called from the project's folder."""
    return os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(ROOT) else 'python'


def write_prompts(path: Path, prompts: Iterable[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(prompts) + '\n', encoding='utf-8')
    return str(path)


def plot_losses(path: Path, *work_dirs: Path) -> None:
    """The loss of each run, side by side, as a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(work_dirs), figsize=(4.5 * len(work_dirs), 3.2), layout='constrained', squeeze=False)
    for axis, work_dir in zip(axes[0], work_dirs):
        rows = [row for line in (work_dir / 'log.jsonl').read_text().splitlines() if 'train/loss' in (row := json.loads(line))]
        axis.plot([r['step'] for r in rows], [r['train/loss'] for r in rows], color='black')
        axis.set(title=work_dir.name, xlabel='step', ylabel='loss', yscale='log')
        axis.grid(alpha=0.3, which='both')
    figure.savefig(path, dpi=110)
