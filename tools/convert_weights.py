"""Turn published weights from one form into another.

    python tools/convert_weights.py v1-5-pruned.ckpt sd15                                       a diffusers folder
    python tools/convert_weights.py sd15 sd15.safetensors --dtype float16                       one file
    python tools/convert_weights.py sd21.safetensors work_dir --to scepter --cfg sd21/sd21_512.yaml      a checkpoint of ours

The source is a single file (.safetensors, .ckpt, ...), a diffusers folder, a hub id or a checkpoint of ours. --cfg names the network;
Stable Diffusion 1 and XL are recognised without it, and a folder says itself what it is. Every result but a checkpoint is opened again by
diffusers, where it knows such a network, and compared.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if not __package__:    # run as a file
    sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]

if TYPE_CHECKING:
    from scepter.core.config import Config

CONFIGS = {'Stable Diffusion 1': 'sd15/sd15_512_full.yaml', 'Stable Diffusion XL': 'sdxl/sdxl_1024.yaml'}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: this process's). Answers the exit code of docs/design.md, section 9."""
    args = command_line().parse_args(argv)
    from scepter.core.env import guarded  # from here on torch is needed
    return guarded(lambda: run(args))


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='SOURCE', help='what to read')
    parser.add_argument('target', metavar='TARGET', help='a folder, or a file that ends in .safetensors')
    parser.add_argument('--to', choices=('diffusers', 'single', 'scepter'), help='default: single for .safetensors, else diffusers')
    parser.add_argument('--cfg', metavar='FILE', help='the config whose SOLVER.MODEL is the network')
    parser.add_argument('--ema', choices=('on', 'off'), default='off', help='take averaged weights where there are any (default off)')
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), default='float32', help='of the weights (default float32)')
    parser.add_argument('--no-check', dest='is_checked', action='store_false', help='do not open the result with diffusers')
    return parser


def run(args: argparse.Namespace) -> None:
    import scepter.components  # noqa: F401  fills the registries
    from scepter.core.config import Config
    from scepter.core.faults import ConfigError
    from scepter.core.registry import MODELS
    from scepter.models.restore import without_weights
    from scepter.weights import describe, family_of, load_into, local_copy, read_weights, refuse_contradictions, weights_for
    if args.to is not None and (args.to == 'single') != args.target.endswith('.safetensors'):
        raise ConfigError(f'--to {args.to} does not go with {args.target}: a single file ends in .safetensors, a folder does not')
    with local_copy(args.source) as local:
        weights = read_weights(local, use_ema=args.ema == 'on')
        kind = family_of(weights)
        file = args.cfg or CONFIGS.get(kind or '')
        is_told = file is None and local.is_dir() and not (local / 'MANIFEST.json').is_file()
        if file is None and not is_told:
            raise ConfigError(f'{args.source} is of {kind or "an unknown network"}: say which by --cfg (those of Stable Diffusion 2 differ '
                              'only in what they predict: sd21/sd21_512.yaml or sd21/sd21_768_v.yaml)')
        cfg = describe(args.source).config if is_told else Config.load(file)
        cfg.SOLVER.MODEL = without_weights(cfg.SOLVER.MODEL)
        model = MODELS.build(cfg.SOLVER.MODEL).eval()
        refuse_contradictions(model, weights, source=args.source)
        load_into(model, weights_for(model, weights), source=args.source)
    if args.to == 'scepter':
        print(write_checkpoint(model, cfg, args))
    else:
        import importlib
        importlib.import_module('scepter.tools.export' if __package__ else 'export').write(model, args)


def write_checkpoint(model: object, cfg: Config, args: argparse.Namespace) -> str:
    """A checkpoint folder of ours, step 0, that holds every weight."""
    import torch

    from scepter.core.disk import checkpoints
    model.to(getattr(torch, args.dtype))
    return str(checkpoints.save(args.target, 0, {'model': model.state_dict()}, {'left_out': []}, cfg.dump()))


if __name__ == '__main__':
    sys.exit(main())
