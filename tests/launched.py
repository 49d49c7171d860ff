"""Runs as a user starts them, by each launcher: the command, its processes, and what they leave."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny import config

ROOT = Path(__file__).resolve().parents[1]
TINY, TROUBLE = ROOT / 'tests' / 'tiny.py', ROOT / 'tests' / 'trouble.py'

STEPS, CUT = 50, 20
SCRIPT = 'scepter/run_train.py'
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')},
               'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}

# the words of a command line before and after those of the run itself
LAUNCHERS: dict[str, tuple[list[str], list[str]]] = {
    'single': ([sys.executable, SCRIPT], ['ENV.NPROC=1']),
    'spawn': ([sys.executable, SCRIPT], ['ENV.NPROC=2']),
    'torchrun': (['torchrun', '--nproc_per_node', '2', SCRIPT], ['--launcher', 'torchrun']),
    'lightning': ([sys.executable, SCRIPT], ['ENV.NPROC=1', 'ENV.USE_PL=true']),
    'lightning-2': ([sys.executable, SCRIPT], ['ENV.NPROC=2', 'ENV.USE_PL=true']),
    'fsdp': ([sys.executable, SCRIPT], ['ENV.NPROC=2', 'SOLVER.PARALLEL=fsdp']),
    'torchrun-fsdp': (['torchrun', '--nproc_per_node', '2', SCRIPT], ['--launcher', 'torchrun', 'SOLVER.PARALLEL=fsdp']),
    'lightning-fsdp': ([sys.executable, SCRIPT], ['ENV.NPROC=2', 'ENV.USE_PL=true', 'SOLVER.PARALLEL=fsdp']),
    'torchrun-lightning': (['torchrun', '--nproc_per_node', '2', SCRIPT], ['--launcher', 'torchrun', 'ENV.USE_PL=true']),
}
ALONE = ('single', 'lightning')


def command(folder: Path, launcher: str, *words: str, hooks: Sequence[dict[str, Any]] = (), **solver: Any) -> list[str]:
    """A run of fifty steps of twelve samples, checkpoint and log included, in folder/work."""
    folder.mkdir(exist_ok=True)
    own = [{'NAME': 'ModelEmaHook', 'BETA': 0.9}, {'NAME': 'CheckpointHook', 'INTERVAL': CUT}, {'NAME': 'NoteSamples'},
           {'NAME': 'LogHook', 'LOG_INTERVAL': 1, 'PROGRESS': False}]
    cfg = config(folder / 'work', STEPS, GLOBAL_BATCH_SIZE=12, LR_SCHEDULER=None, RESUME_FROM='auto',
                 **{'TRAIN_HOOKS': [*own, *hooks], **solver})
    cfg.update(IMPORTS=[str(TINY), str(TROUBLE)], ENV={'DEVICE': 'cpu', 'SEED': 5, 'THREADS': 1})
    (folder / 'run.yaml').write_text(str(cfg), encoding='utf-8')
    before, after = LAUNCHERS[launcher]
    return [*before, '--cfg', str(folder / 'run.yaml'), *after, *words]


def start(words: list[str], folder: Path, **environment: str) -> subprocess.Popen:
    with open(folder / 'said.txt', 'a') as said:
        return subprocess.Popen(words, cwd=ROOT, env={**ENVIRONMENT, **environment}, stdout=said, stderr=said, start_new_session=True)


def end(process: subprocess.Popen, folder: Path, code: int = 0) -> None:
    try:
        assert process.wait(120) == code, (folder / 'said.txt').read_text()[-4000:]
    finally:
        if process.poll() is None:
            process.kill()


def samples(work_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work_dir / 'samples.jsonl').read_text().splitlines()]


LONG = 'SOLVER.MAX_STEPS=20000'


def wait_for(step: int, folder: Path, process: subprocess.Popen) -> None:
    log = folder / 'work' / 'log.jsonl'
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, (folder / 'said.txt').read_text()[-4000:]
        time.sleep(0.01)


def ranks(process: subprocess.Popen) -> list[int]:
    """The processes of a run that train, below the one that was started."""
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    return [int(pid) for pid in children if re.search(rb'spawn_main|run_train', Path(f'/proc/{pid}/cmdline').read_bytes())]
