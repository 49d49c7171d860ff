"""Look at checkpoints, thin them out, and make one file of one or of several.

    python tools/checkpoint.py ls outputs/digits                               every checkpoint below, newest first
    python tools/checkpoint.py verify outputs/digits                           read every byte; exit code 4 if anything is damaged
    python tools/checkpoint.py prune outputs/digits --keep 3 --every 1000      remove all others; --dry-run says which
    python tools/checkpoint.py to-single outputs/digits/checkpoints/step-00000360 digits.safetensors
    python tools/checkpoint.py average soup.safetensors CHECKPOINT CHECKPOINT ...    the mean of their weights

The single file holds the whole network, frozen parts too, with its averaged weights where there are any; the run's config stands in
its metadata. `run_inference.py --pretrained_model digits.safetensors` draws with it.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from scepter.core.disk.checkpoints import Checkpoint
    from scepter.drawing import Pipeline

if not __package__:    # run as a file
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: this process's). Answers the exit code of docs/design.md, section 9."""
    args = command_line().parse_args(argv)
    from scepter.core.env import guarded  # from here on torch is needed
    return guarded(lambda: args.run(args))


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    for name, run, about in (('ls', ls, 'show every checkpoint'), ('verify', verify, 'read every byte and compare')):
        command = commands.add_parser(name, help=about)
        command.add_argument('paths', nargs='+', metavar='PATH', help='a checkpoint, or a WORK_DIR that holds some')
        command.set_defaults(run=run)
    pruning = commands.add_parser('prune', help='remove old checkpoints of runs that have ended')
    pruning.add_argument('paths', nargs='+', metavar='WORK_DIR', help='a folder of a run')
    pruning.add_argument('--keep', type=positive, required=True, metavar='N', help='the newest N stay')
    pruning.add_argument('--every', type=positive, metavar='STEPS', help='so do multiples of this many steps')
    pruning.add_argument('--dry-run', action='store_true', help='say what would go, and leave it')
    pruning.set_defaults(run=prune)
    single = commands.add_parser('to-single', help='write the whole network to one .safetensors file')
    single.add_argument('checkpoint', metavar='CHECKPOINT', help='folder of a checkpoint, or of a run')
    single.add_argument('target', metavar='FILE', help='the file to write, in any store')
    single.set_defaults(run=to_single)
    mean = commands.add_parser('average', help='write the mean of the weights of several checkpoints of one run to one .safetensors file')
    mean.add_argument('target', metavar='FILE', help='the file to write, in any store')
    mean.add_argument('checkpoints', nargs='+', metavar='CHECKPOINT',
                      help='folders of checkpoints; what is not trained is that of the first')
    mean.set_defaults(run=average)
    for command in (single, mean):
        command.add_argument('--ema', choices=('on', 'off'), default='on', help='take averaged weights where there are any (default on)')
        command.add_argument('--imports', metavar='FILE', action='append', default=[], help='a file or module with components of yours')
        command.add_argument('--allow_downloads', action='store_true', help="also fetch what the checkpoint's own config names")
    return parser


def positive(word: str) -> int:
    """A whole number from 1 on."""
    if int(word) < 1:
        raise ValueError(word)
    return int(word)


def ls(args: argparse.Namespace) -> None:
    from scepter.core.disk import checkpoints
    from scepter.core.errors import CheckpointError
    for folder in below(args.paths):
        try:
            checkpoint = checkpoints.load(folder, verify='size')
        except CheckpointError as error:
            print(f'{folder}  DAMAGED: {error}')
            continue
        size = sum(file['size'] for file in checkpoint.manifest['files'].values())
        print(f'{folder}  step {checkpoint.step}  {size / 1e6:,.1f} MB  {", ".join(checkpoint.groups)}')


def verify(args: argparse.Namespace) -> None:
    from scepter.core.disk import checkpoints
    from scepter.core.errors import CheckpointError
    faults = []
    for folder in below(args.paths):
        try:
            checkpoints.load(folder)
            print(f'{folder}  ok')
        except CheckpointError as error:
            print(f'{folder}  DAMAGED')
            faults.append(str(error))
    if faults:
        raise CheckpointError('\n'.join(faults))


def prune(args: argparse.Namespace) -> None:
    """Raises CheckpointError where a run is still writing there."""
    import contextlib

    from scepter.core.disk import checkpoints
    from scepter.core.errors import CheckpointError
    from scepter.core.lock import WorkDirLock
    for path in map(Path, args.paths):
        if not checkpoints.folders(path / 'checkpoints'):
            raise CheckpointError(f'{path} is no folder of a run: it has no checkpoints')
        with contextlib.closing(WorkDirLock(path)) as lock:
            lock.take()
            best = pinned(path / 'checkpoints')
            gone = checkpoints.prune(path / 'checkpoints', args.keep, best, args.every, dry=args.dry_run)
        for folder in gone:
            print(f'{folder}  {"would go" if args.dry_run else "removed"}')


def pinned(root: Path) -> list[int]:
    """The step that SAVE_BEST_BY of the run holds on to, as its newest checkpoint knows it."""
    from scepter.core.disk import checkpoints
    newest = checkpoints.latest(root)
    hooks = newest.state.get('hooks', {}) if newest is not None else {}
    return [state['best_step'] for state in hooks.values() if isinstance(state, dict) and isinstance(state.get('best_step'), int)]


def to_single(args: argparse.Namespace) -> None:
    from scepter import drawing
    pipe = drawing.load(args.checkpoint, device='cpu', dtype='float32', ema=args.ema == 'on', imports=args.imports,
                        allow_downloads=args.allow_downloads)
    write(pipe, args.target)


def average(args: argparse.Namespace) -> None:
    """The mean, in float64, of what each checkpoint holds. Raises CheckpointError where they are of different networks."""
    import torch

    from scepter import drawing
    from scepter.core.disk import checkpoints
    from scepter.core.errors import CheckpointError
    pipe = drawing.load(args.checkpoints[0], device='cpu', dtype='float32', ema=args.ema == 'on', imports=args.imports,
                        allow_downloads=args.allow_downloads)
    own = pipe.model.state_dict()
    parts = [weights_of(checkpoints.load(path), args.ema == 'on') for path in args.checkpoints]
    for path, part in zip(args.checkpoints[1:], parts[1:]):
        if {k: v.shape for k, v in part.items()} != {k: v.shape for k, v in parts[0].items()}:
            raise CheckpointError(f'{path} holds other weights than {args.checkpoints[0]}: only checkpoints of one network have a mean')
    with torch.no_grad():
        for name, first in parts[0].items():
            if first.is_floating_point():    # a count of steps has no mean: it is the first one's
                own[name].copy_(sum(part[name].double() for part in parts) / len(parts))
    write(pipe, args.target)


def weights_of(checkpoint: Checkpoint, use_ema: bool) -> Mapping[str, Tensor]:
    """What the checkpoint itself holds of a network, each tensor read when it is asked for; averages where there are and are wished for."""
    averaged = [checkpoint.tensors('ema')] if use_ema and 'ema' in checkpoint.groups else []
    return ChainMap(*averaged, checkpoint.tensors('model'))    # type: ignore[arg-type]  it is only read


def write(pipe: Pipeline, target: str) -> None:
    """All weights of a network in one file that carries its config and needs no other."""
    from scepter.core.disk import checkpoints
    from scepter.core.disk.tensors import nbytes, write_tensors
    from scepter.core.stores import FS
    from scepter.models.restore import put_places, without_files
    checkpoint, tensors = checkpoints.load(pipe.source, verify='size'), pipe.model.state_dict()
    cfg = pipe.cfg.copy()
    put_places(cfg.SOLVER.MODEL, checkpoint)
    with FS.put_to(target) as path:
        write_tensors(Path(path), tensors, {'format': 'pt', 'step': str(checkpoint.step), 'config': without_files(cfg, pipe.model).dump()})
    print(f'{target}  {len(tensors)} tensors, {nbytes(tensors) / 1e6:,.1f} MB')


def below(paths: Sequence[str]) -> list[Path]:
    """The checkpoints that the paths mean: themselves, or those of a WORK_DIR. Raises CheckpointError where there is none."""
    from scepter.core.disk import checkpoints
    from scepter.core.errors import CheckpointError
    found = []
    for path in map(Path, paths):
        folders = checkpoints.folders(path / 'checkpoints') or checkpoints.folders(path)
        if not folders and not (path / checkpoints.MANIFEST).exists() and checkpoints.step_of(path) < 0:
            raise CheckpointError(f'{path} is neither a checkpoint nor a folder that holds some')
        found += folders or [path]
    return found


if __name__ == '__main__':
    sys.exit(main())
