"""Write what was trained as a file that other programs open.

    python tools/export.py outputs/sd15/checkpoints/step-00001000 my_model                  a diffusers folder
    python tools/export.py outputs/sd15/checkpoints/step-00001000 my_model.safetensors      one file, as CompVis and SGM name it

The result is opened again by diffusers, where that is installed, one forward is compared with ours, and the figure stands in the
metadata of the files beside the ModelSpec keys. Averaged weights are taken where there are any.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

if not __package__:    # run as a file
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: this process's). Answers the exit code of docs/design.md, section 9."""
    args = command_line().parse_args(argv)
    from scepter.core.env import guarded  # from here on torch is needed
    return guarded(lambda: run(args))


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help="folder of a checkpoint, or of a run")
    parser.add_argument('target', metavar='TARGET', help='a folder, or a file that ends in .safetensors')
    parser.add_argument('--ema', choices=('on', 'off'), default='on', help='take averaged weights where there are any (default on)')
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), default='float32', help='of the weights (default float32)')
    parser.add_argument('--imports', metavar='FILE', action='append', default=[], help='a file or module with components of yours')
    parser.add_argument('--allow_downloads', action='store_true', help="also fetch what the checkpoint's own config names")
    parser.add_argument('--no-check', dest='is_checked', action='store_false', help='do not open the result with diffusers')
    return parser


def run(args: argparse.Namespace) -> None:
    from scepter import drawing
    pipe = drawing.load(args.checkpoint, device='cpu', dtype='float32', ema=args.ema == 'on', imports=args.imports,
                        allow_downloads=args.allow_downloads)
    write(pipe.model, args)


def write(model: object, args: argparse.Namespace) -> None:
    """Export, and say how near diffusers came. Raises CheckpointError where it cannot hold such a network."""
    import importlib.util

    import torch

    from scepter.commands import tool
    from scepter.core.errors import CheckpointError
    is_checked = args.is_checked and importlib.util.find_spec('diffusers') is not None
    dtype = None if args.dtype == 'float32' else getattr(torch, args.dtype)
    try:
        figure = tool('parity').export(model, args.target, dtype, is_checked)
    except ValueError as error:
        raise CheckpointError(f'{args.target} cannot be written: {error}') from error
    said = 'not opened with diffusers' if figure is None else f'diffusers differs by {figure:.1e} of the largest value'
    print(f'{args.target}  {said}')


if __name__ == '__main__':
    sys.exit(main())
