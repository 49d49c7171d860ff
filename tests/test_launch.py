"""One run, however it is started: the same samples, the same losses, and a checkpoint that any launcher goes on from."""
from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launched import ALONE, CUT, ENVIRONMENT, LONG, ROOT, STEPS, command, end, ranks, samples, start, wait_for
from scepter import run_train
from scepter.core.disk import checkpoints
from tests.models import nova_runs
from tiny import groups, same

slow = pytest.mark.slow
NOVA_STEPS, NOVA_CUT = 8, 3


def train(folder: Path, launcher: str, *words: str, **solver: Any) -> Path:
    line = command(folder, launcher, *words, **solver)
    if launcher in ALONE:     # what would be a process of its own is this one: a second less, and the same path from the door on
        assert run_train.main(line[2:]) == 0
    else:
        end(start(line, folder), folder)
    return folder / 'work'


def losses(work_dir: Path, steps: int = STEPS) -> list[float]:
    rows = [json.loads(line) for line in (work_dir / 'log.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == list(range(1, steps + 1))
    return [row['train/loss'] for row in rows]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The run of a launcher, undisturbed; each once."""
    folder, done = tmp_path_factory.mktemp('whole'), {}

    def of(launcher: str) -> Path:
        if launcher not in done:
            done[launcher] = train(folder / launcher, launcher)
        return done[launcher]

    return of


# ------------------------------------------------------------------------------------------------ one curve
@pytest.mark.parametrize('launcher', ['lightning', 'spawn', 'torchrun', 'fsdp', *(
    pytest.param(n, marks=slow) for n in ('lightning-2', 'torchrun-lightning', 'torchrun-fsdp', 'lightning-fsdp'))])
def test_every_launcher_sees_the_samples_and_the_losses_of_a_single_process(whole, launcher, record_figure):
    alone, this = whole('single'), whole(launcher)

    assert samples(this) == samples(alone) and len(samples(this)) == STEPS
    assert losses(this) == pytest.approx(losses(alone), rel=1e-5, abs=0)
    difference = max(abs(x / y - 1) for x, y in zip(losses(this), losses(alone)))
    record_figure('losses on two processes against one, largest relative difference', difference)
    a, b = groups(alone, STEPS)['model'], groups(this, STEPS)['model']
    assert all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6) for key in a if key != 'seen')
    assert checkpoints.load(checkpoints.folder_of(this / 'checkpoints', STEPS)).state['world_size'] == 1 + (launcher not in ALONE)


@pytest.mark.parametrize(('first', 'then'), [
    ('single', 'lightning'), ('lightning', 'single'), ('spawn', 'torchrun'),
    *(pytest.param(*pair, marks=slow) for pair in (('torchrun', 'spawn'), ('torchrun', 'lightning-2'),
                                                   ('lightning-2', 'torchrun-lightning'), ('fsdp', 'torchrun-fsdp')))])
def test_what_one_launcher_saved_another_continues_to_the_bit(whole, tmp_path, first, then, record_figure):
    train(tmp_path, first, f'SOLVER.MAX_STEPS={CUT}')
    work_dir = train(tmp_path, then)

    assert same(groups(whole(first), STEPS), groups(work_dir, STEPS)) and losses(work_dir) == losses(whole(first))
    record_figure('changes of launcher in the midst of a run, equal to the bit')


IN_PARTS = ('SOLVER.SHARD_SIZE=2e-7', 'SOLVER.ASYNC_SAVE=true')    # several files for each group, written beside the loop


@pytest.mark.parametrize('launchers', [('single', 'fsdp', 'single'), pytest.param(('single', 'spawn', 'single'), marks=slow),
                                       pytest.param(('fsdp', 'torchrun', 'single', 'lightning-fsdp'), marks=slow)], ids='-'.join)
def test_a_run_may_change_the_number_of_its_processes_and_how_they_share_it_and_keeps_its_samples(whole, tmp_path, launchers):
    for i, launcher in enumerate(launchers[:-1]):
        train(tmp_path, launcher, *IN_PARTS, f'SOLVER.MAX_STEPS={CUT + i * (STEPS - CUT) // (len(launchers) - 1)}')
    work_dir, alone = train(tmp_path, launchers[-1], *IN_PARTS), whole('single')

    assert samples(work_dir) == samples(alone) and losses(work_dir) == pytest.approx(losses(alone), rel=1e-5, abs=0)
    a, b = groups(alone, STEPS)['model'], groups(work_dir, STEPS)['model']
    assert all(torch.linalg.vector_norm(a[key] - b[key]) <= 1e-5 * torch.linalg.vector_norm(a[key]) for key in a if key != 'seen')
    assert len(list((work_dir / 'checkpoints').glob('*/optimizer-00002.safetensors'))) >= len(launchers)


# ------------------------------------------------------------------------------------------------ NOVA
@pytest.fixture(scope='module')
def nova(tmp_path_factory):
    """The run of NOVA of a launcher, undisturbed; each once. And what it is made of, on clips of several lengths."""
    folder, done = tmp_path_factory.mktemp('nova'), {}
    clips = nova_runs.write_clips(folder / 'clips', [3, 2, 3, 2] * 6)
    told = nova_runs.experiment(folder, clips).SOLVER
    hooks = [{'NAME': 'ModelEmaHook', 'BETA': 0.9}, {'NAME': 'CheckpointHook', 'INTERVAL': NOVA_CUT},
             {'NAME': 'LogHook', 'LOG_INTERVAL': 1, 'PROGRESS': False}]
    solver = {'MODEL': told.MODEL, 'OPTIMIZER': told.OPTIMIZER, 'TRAIN_DATA': {**told.TRAIN_DATA, 'BATCH_SIZE': 6}, 'TRAIN_HOOKS': hooks,
              'MAX_STEPS': NOVA_STEPS}

    def of(launcher: str) -> tuple[Path, dict[str, Any]]:
        if launcher not in done:
            done[launcher] = train(folder / launcher, launcher, **solver)
        return done[launcher], solver

    return of


@pytest.mark.parametrize('launcher', ['spawn', *(pytest.param(n, marks=slow) for n in ('lightning', 'torchrun', 'fsdp', 'torchrun-fsdp',
                                                                                       'lightning-2', 'lightning-fsdp'))])
def test_nova_learns_the_same_below_every_launcher(nova, launcher):
    (alone, _), (this, _) = nova('single'), nova(launcher)

    assert losses(this, NOVA_STEPS) == pytest.approx(losses(alone, NOVA_STEPS), rel=1e-4, abs=0)
    a, b = groups(alone, NOVA_STEPS), groups(this, NOVA_STEPS)
    for group in ('model', 'ema'):
        assert a[group].keys() == b[group].keys()
        assert all(torch.allclose(a[group][key], b[group][key], rtol=1e-3, atol=1e-4) for key in a[group])


@slow
@pytest.mark.parametrize(('first', 'then'), [('single', 'lightning'), ('spawn', 'torchrun'), ('fsdp', 'torchrun-fsdp')])
def test_nova_goes_on_to_the_bit_below_another_launcher(nova, tmp_path, first, then):
    whole, solver = nova(first)
    train(tmp_path, first, f'SOLVER.MAX_STEPS={NOVA_CUT}', **solver)
    work_dir = train(tmp_path, then, **solver)

    assert same(groups(whole, NOVA_STEPS), groups(work_dir, NOVA_STEPS)) and losses(work_dir, NOVA_STEPS) == losses(whole, NOVA_STEPS)


# ------------------------------------------------------------------------------------------------ the ends
@pytest.mark.skipif(sys.platform != 'linux', reason='looks up processes in /proc')
@pytest.mark.parametrize(('launcher', 'code'), [pytest.param('torchrun', 1), pytest.param('lightning-2', 143, marks=slow),
                                                pytest.param('torchrun-lightning', 1, marks=slow)])
def test_a_stop_signal_to_the_launcher_has_the_step_saved_and_nothing_is_left(tmp_path, launcher, code):
    process = start(command(tmp_path, launcher, LONG), tmp_path)
    wait_for(CUT + 1, tmp_path, process)
    trained = ranks(process)
    process.send_signal(signal.SIGTERM)
    end(process, tmp_path, code)

    saved, rows = checkpoints.resolve(tmp_path / 'work', 'latest'), samples(tmp_path / 'work')
    assert len(trained) == 2 and saved is not None and saved.step == len(rows) > CUT
    assert not any(Path(f'/proc/{pid}').exists() for pid in trained)


@pytest.mark.skipif(sys.platform != 'linux', reason='looks up processes in /proc')
@pytest.mark.parametrize(('launcher', 'code'), [pytest.param('torchrun', 1, marks=slow), pytest.param('lightning-2', 5, marks=slow)])
def test_a_process_that_is_killed_takes_the_others_along(tmp_path, launcher, code):
    process = start(command(tmp_path, launcher, LONG), tmp_path)
    wait_for(1, tmp_path, process)
    killed, begin = ranks(process), time.monotonic()
    os.kill(killed[-1], signal.SIGKILL)
    end(process, tmp_path, code)

    assert time.monotonic() - begin < 15 and not any(Path(f'/proc/{pid}').exists() for pid in killed)


# ------------------------------------------------------------------------------------------------ torchrun
@pytest.mark.skipif(sys.platform != 'linux', reason='looks up processes in /proc')
def test_torchrun_begins_a_run_again_whose_worker_was_killed_and_it_ends_as_if_nothing_had_happened(whole, tmp_path):
    line = command(tmp_path, 'torchrun')
    line[1:1] = ['--max-restarts', '1']
    process = start(line, tmp_path)
    wait_for(CUT + 3, tmp_path, process)
    os.kill(ranks(process)[-1], signal.SIGKILL)
    end(process, tmp_path)

    assert 'continuing' in (tmp_path / 'said.txt').read_text()
    assert same(groups(whole('spawn'), STEPS), groups(tmp_path / 'work', STEPS)) and losses(tmp_path / 'work') == losses(whole('spawn'))


@slow
@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux answers at all of 127.0.0.0/8')
@pytest.mark.parametrize('rendezvous', ['c10d', 'static'])
def test_two_machines_of_torchrun_train_what_two_processes_of_one_do(whole, tmp_path, rendezvous):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    meet = {'c10d': ['--rdzv_backend', 'c10d', '--rdzv_endpoint', f'127.0.0.1:{port}', '--rdzv_id', 'two'],
            'static': ['--master_addr', '127.0.0.1', '--master_port', port]}[rendezvous]
    line = command(tmp_path, 'torchrun')[3:]
    machines = [start(['torchrun', '--nnodes', '2', '--nproc_per_node', '1', '--node_rank', str(i), '--local_addr', f'127.0.0.{i + 1}',
                       *meet, *line], tmp_path) for i in range(2)]
    for machine in machines:
        end(machine, tmp_path)

    assert same(groups(whole('spawn'), STEPS), groups(tmp_path / 'work', STEPS))


@slow
def test_two_machines_of_spawn_find_each_other_by_the_variables_of_the_scheduler(whole, tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        meeting = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1]), 'WORLD_SIZE': '2'}
    machines = [start(command(tmp_path, 'single'), tmp_path, RANK=str(i), **meeting) for i in range(2)]
    for machine in machines:
        end(machine, tmp_path)

    assert same(groups(whole('spawn'), STEPS), groups(tmp_path / 'work', STEPS))


# ------------------------------------------------------------------------------------------------ the quick start's commands
def commands_of_the_quick_start() -> list[Any]:
    """(exports and command, words that its comment asks for, processes) of each line of section 6 that starts a run."""
    section = (ROOT / 'docs' / 'quick_start.md').read_text(encoding='utf-8').split('# 6.')[1].split('# 7.')[0]
    found, exports, comment = [], [], ''
    for line in re.search(r'```shell\n(.*?)```', section, re.DOTALL).group(1).splitlines():
        if line.startswith('#'):
            comment = line
        elif line.startswith('export'):
            exports = [line] if 'CUDA' in line else [*exports, line]
        else:
            is_many = '0,1' in exports[0]
            words = re.findall(r'ENV\.\w+=\w+', comment)
            processes = int(re.search(r'nproc_per_node (\d+)', line + 'nproc_per_node 2').group(1)) if is_many else 1
            found.append(pytest.param('\n'.join([*exports, line]), words, processes, id=f'{len(found)}', marks=[slow] if is_many else []))
    return found


def test_no_command_of_the_quick_start_is_forgotten():
    section = (ROOT / 'docs' / 'quick_start.md').read_text(encoding='utf-8').split('# 6.')[1].split('# 7.')[0]
    assert len(commands_of_the_quick_start()) == section.count('scepter/run_train.py') == 6


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    from tests.twins import three_images
    return three_images(tmp_path_factory.mktemp('pictures') / 'images')


def small(folder: Path, pictures: Path, **more: Any) -> str:
    """Words that make the shipped recipe so small that two steps of it take a second."""
    unet = {'MODEL_CHANNELS': 32, 'CHANNEL_MULT': '[1, 1]', 'NUM_RES_BLOCKS': 1, 'ATTENTION_RESOLUTIONS': '[2]', 'NUM_HEADS': 2,
            'CONTEXT_DIM': 32}
    coder = {'CH': 32, 'CH_MULT': '[1, 1, 1, 1]', 'NUM_RES_BLOCKS': 1}
    model = {**{f'DIFFUSION_MODEL.{key}': value for key, value in unet.items()}, 'PRETRAINED_MODEL': 'null', 'IMAGE_SIZE': 64,
             **{f'FIRST_STAGE_MODEL.{side}.{key}': value for side in ('ENCODER', 'DECODER') for key, value in coder.items()},
             'COND_STAGE_MODEL.WIDTH': 32, 'COND_STAGE_MODEL.DEPTH': 1, 'COND_STAGE_MODEL.HEADS': 2}
    words = {'ENV.DEVICE': 'cpu', 'ENV.THREADS': 1, 'SOLVER.WORK_DIR': folder / 'work', 'SOLVER.MAX_STEPS': 2, 'SOLVER.DTYPE': 'float32',
             **{f'SOLVER.MODEL.{key}': value for key, value in model.items()}, 'SOLVER.SAMPLE_ARGS.IMAGE_SIZE': 64,
             'SOLVER.TRAIN_DATA.DATA_FOLDER': pictures, 'SOLVER.TRAIN_DATA.BATCH_SIZE': 1, 'SOLVER.TRAIN_DATA.NUM_WORKERS': 0,
             'SOLVER.TRAIN_DATA.TRANSFORMS': '[{NAME: RecordedCrop, SIZE: 64}]', 'SOLVER.ACCU_STEP': 1, **more}
    return ' '.join(f"'{key}={value}'" for key, value in words.items())


def processes_of(folder: Path) -> int:
    return checkpoints.load(folder / 'work' / 'checkpoints' / 'step-00000002').state['world_size']


@pytest.mark.parametrize(('line', 'asked', 'processes'), commands_of_the_quick_start())
def test_a_command_of_the_quick_start_trains_as_it_is_written(line, asked, processes, pictures, tmp_path):
    # the visible GPUs, where there are some
    more = {'ENV.NPROC': processes} if processes > 1 and 'torchrun' not in line else {}
    end(start(['sh', '-e', '-c', ' '.join([line, *asked, small(tmp_path, pictures, **more)])], tmp_path), tmp_path)

    assert processes_of(tmp_path) == processes and 'done in' in (tmp_path / 'said.txt').read_text()


# ------------------------------------------------------------------------------------------------ schedulers
SLURM, KUBERNETES = ROOT / 'tools' / 'launch' / 'slurm.sh', ROOT / 'tools' / 'launch' / 'pytorchjob.yaml'


def test_the_script_and_the_manifest_are_well_formed():
    assert subprocess.run(['bash', '-n', str(SLURM)]).returncode == 0
    kinds = yaml.safe_load(KUBERNETES.read_text())['spec']['pytorchReplicaSpecs']

    assert kinds['Master']['replicas'] == 1 and kinds['Master']['template'] == kinds['Worker']['template']


@pytest.mark.parametrize('is_stopped', [False, pytest.param(True, marks=slow)])
def test_the_script_for_slurm_trains_and_when_its_time_ends_it_is_saved_and_queued_again(pictures, tmp_path, is_stopped):
    for name, does in {'srun': 'shift; exec "$@"', 'scontrol': 'echo "$@" >> "$SLURM_TMP/asked"; echo 127.0.0.1'}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n{does}\n')
        (tmp_path / name).chmod(0o755)
    scheduler = {'SLURM_SUBMIT_DIR': str(ROOT), 'SLURM_JOB_NODELIST': 'n1', 'SLURM_NNODES': '1', 'SLURM_CPUS_PER_TASK': '2',
                 'SLURM_JOB_ID': str(os.getpid()), 'SLURM_TMP': str(tmp_path), 'PATH': f'{tmp_path}{os.pathsep}{ENVIRONMENT["PATH"]}'}
    if is_stopped:
        words = command(tmp_path, 'single', LONG)[2:]
    else:
        words = ['--cfg', 'sd15.yaml', *shlex.split(small(tmp_path, pictures))]
    process = start(['bash', str(SLURM), *words], tmp_path, **scheduler)
    if is_stopped:
        wait_for(CUT + 1, tmp_path, process)
        process.send_signal(signal.SIGTERM)
    end(process, tmp_path)

    assert ('requeue' in (tmp_path / 'asked').read_text()) == is_stopped
    if is_stopped:
        assert checkpoints.resolve(tmp_path / 'work', 'latest').step == len(samples(tmp_path / 'work'))
    else:
        assert processes_of(tmp_path) == 2


@slow
def test_the_pods_of_the_manifest_find_each_other_by_the_variables_of_the_operator(pictures, tmp_path):
    pod = yaml.safe_load(KUBERNETES.read_text())['spec']['pytorchReplicaSpecs']['Worker']['template']['spec']['containers'][0]
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        operator = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1]), 'WORLD_SIZE': '2', 'PYTHONUNBUFFERED': '1'}
    line = f'{pod["args"][0]} {small(tmp_path, pictures)}'
    pods = [start([*pod['command'], line], tmp_path, RANK=str(i), **operator) for i in range(2)]
    for one in pods:
        end(one, tmp_path)

    assert processes_of(tmp_path) == 2
