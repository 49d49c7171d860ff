"""Look at checkpoints, and make one file of one.

    python tools/checkpoint.py list outputs/digits                             every checkpoint below, newest first
    python tools/checkpoint.py verify outputs/digits                           read every byte; exit code 4 if anything is damaged
    python tools/checkpoint.py to-single outputs/digits/checkpoints/step-00000360 digits.safetensors

The single file holds the whole network, frozen parts too, with its averaged weights where there are any; the run's config stands in
its metadata. `run_inference.py --pretrained_model digits.safetensors` draws with it.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

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
    for name, run, about in (('list', list_checkpoints, 'show every checkpoint'), ('verify', verify, 'read every byte and compare')):
        command = commands.add_parser(name, help=about)
        command.add_argument('paths', nargs='+', metavar='PATH', help='a checkpoint, or a WORK_DIR that holds some')
        command.set_defaults(run=run)
    single = commands.add_parser('to-single', help='write the whole network to one .safetensors file')
    single.add_argument('checkpoint', metavar='CHECKPOINT', help='folder of a checkpoint, or of a run')
    single.add_argument('target', metavar='FILE', help='the file to write, in any store')
    single.add_argument('--ema', choices=('on', 'off'), default='on', help='take averaged weights where there are any (default on)')
    single.add_argument('--imports', metavar='FILE', action='append', default=[], help='a file or module with components of yours')
    single.add_argument('--allow_downloads', action='store_true', help="also fetch what the checkpoint's own config names")
    single.set_defaults(run=to_single)
    return parser


def list_checkpoints(args: argparse.Namespace) -> None:
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


def to_single(args: argparse.Namespace) -> None:
    from scepter import drawing
    from scepter.core.disk import checkpoints
    from scepter.core.disk.tensors import nbytes, write_tensors
    from scepter.core.stores import FS
    from scepter.models.restore import put_places, without_files
    pipe = drawing.load(args.checkpoint, device='cpu', dtype='float32', ema=args.ema == 'on', imports=args.imports,
                        allow_downloads=args.allow_downloads)
    checkpoint, tensors = checkpoints.load(pipe.source, verify='size'), pipe.model.state_dict()
    cfg = pipe.cfg.copy()
    put_places(cfg.SOLVER.MODEL, checkpoint)
    with FS.put_to(args.target) as path:
        write_tensors(Path(path), tensors, {'format': 'pt', 'step': str(checkpoint.step), 'config': without_files(cfg, pipe.model).dump()})
    print(f'{args.target}  {len(tensors)} tensors, {nbytes(tensors) / 1e6:,.1f} MB')


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
