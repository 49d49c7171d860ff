"""Draw what a prompt asks for.

    python scepter/run_inference.py --prompt "a woman" --n_prompt "" --num_samples 4 --pretrained_model path/to/model
    python scepter/run_inference.py --prompt "the number three" --pretrained_model outputs/digits/diffusion/checkpoints/step-00000280

--pretrained_model takes a checkpoint of run_train, a published single file, or a diffusers folder. Without --cfg the network is built
from the checkpoint's own config, and from examples/sd15 for any other file. A flag that is not given never overrides SAMPLE_ARGS.
"""
from __future__ import annotations

import os
import sys

if not __package__:    # run as a file: Python has put this folder on the path, where the project's root belongs
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.path.dirname(_here), *(p for p in sys.path if os.path.abspath(p) != _here)]

import argparse
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from scepter.core.config import Config
    from scepter.models.base import TrainModule

DEFAULT_CONFIG = 'sd15/sd15_512_full.yaml'


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: this process's). Answers the exit code of docs/design.md, section 9."""
    parser = command_line()
    args = parser.parse_intermixed_args(argv)
    if args.prompt is None and args.prompt_file is None:
        parser.error('--prompt TEXT or --prompt_file FILE is required')
    from scepter.core.env import guarded  # from here on torch is needed
    return guarded(lambda: run(args))


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='run_inference.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('overrides', nargs='*', metavar='KEY.PATH=VALUE', help='set a key of the config; the last one wins')
    add('--cfg', metavar='FILE', help='the config whose SOLVER.MODEL to build')
    add('--imports', metavar='FILE', action='append', default=[], help='a file or module with components of yours; may be repeated')
    add('--pretrained_model', metavar='PATH', help='checkpoint folder, single file, or diffusers folder')
    add('--ema', choices=('on', 'off'), default='on', help='draw with averaged weights where there are any (default on)')
    add('--prompt', help='what to draw')
    add('--prompt_file', metavar='FILE', help='a prompt on each line')
    add('--n_prompt', help='what to stay away from')
    add('--num_samples', type=int, default=4, help='pictures of each prompt (default 4)')
    add('--batch_size', type=int, help='pictures drawn at once (default all, at most 16); has no part in what they show')
    add('--sampler', help='ddim, euler, heun, dpmpp_2m, ...')
    add('--sample_steps', type=int, help='steps of the sampler')
    add('--discretization', choices=('trailing', 'leading', 'linspace', 'karras'), help='how the steps are spread')
    add('--seed', type=int, help='picture i is keyed by (seed, i); below 0 for another one each time')
    add('--guide_scale', type=float, help='strength of guidance; 1 for none')
    add('--guide_rescale', type=float, help='share by which guided outputs get back the contrast of unguided ones')
    add('--image_size', type=_size, metavar='N or H,W', help='pixels')
    add('--image', metavar='FILE', help='a picture to begin with; scaled and cut in the middle where a size is asked for')
    add('--denoising_strength', type=float, help='how much of --image is made anew, 0..1 (default 0.75 with --image, 1 with --mask)')
    add('--mask', metavar='FILE', help='white where --image is made anew')
    add('--dtype', choices=('auto', 'float32', 'bfloat16', 'float16'), default='auto', help='auto: float16 on CUDA, else float32')
    add('--save_folder', default='outputs/inference', help='where pictures go (default outputs/inference)')
    add('--grid', action='store_true', help='also save all pictures as one, a row for each prompt')
    add('--debug', action='store_true', help='say more')
    return parser


def run(args: argparse.Namespace) -> None:
    from scepter.core.images import file_name, grid, save_png
    from scepter.core.logger import set_up_logging
    set_up_logging(None, debug=args.debug)
    cfg = load_config(args)
    model = load_model(args, cfg)
    arguments = sample_arguments(args, cfg)
    prompts = [p for p in prompts_of(args) for _ in range(args.num_samples)]
    folder, pictures = Path(args.save_folder), []
    files = {k: getattr(args, k) for k in ('image', 'mask') if getattr(args, k) is not None}    # their names, not their pixels
    how = {'model': args.pretrained_model or str(cfg.file), **arguments, **files}
    del how['show_progress']
    for first, results in draw(model, prompts, args.batch_size or min(16, len(prompts)), arguments):
        for i, result in enumerate(results):
            words = {k: v for k, v in result.items() if not k.endswith('image')}
            settings = {'number': first + i, 'size': list(result['image'].shape[-2:]), **how, **words, 'seed': arguments['seed'],
                        'row_seed': result['seed']}
            for key, suffix in (('image', '.png'), ('train_n_image', '-train_n.png')):    # the second with SAMPLE_ARGS.RUN_TRAIN_N
                if key in result:
                    print(save_png(result[key], folder / file_name(first + i, result['prompt'], suffix), settings))
            if args.grid:
                pictures.append(result['image'])
    if args.grid:
        print(save_png(grid(pictures, args.num_samples), folder / 'grid.png', {'prompts': prompts[::args.num_samples], **how}))


def load_config(args: argparse.Namespace) -> Config:
    """The experiment: of --cfg, else the checkpoint's own, else Stable Diffusion 1.5. Only SOLVER.MODEL and SAMPLE_ARGS are looked at."""
    import scepter.components  # noqa: F401  fills the registries
    from scepter.core.config import Config
    from scepter.core.experiment import carry_out_imports, not_carried_out
    from scepter.core.registry import MODELS
    from scepter.core.schema import check, schema_of
    from scepter.models.restore import config_of
    from scepter.solvers.diffusion import SampleArgs
    if args.cfg is not None:
        cfg = Config.load(args.cfg, args.overrides)
    elif is_checkpoint(args.pretrained_model):
        cfg = config_of(args.pretrained_model)
        cfg.override(args.overrides)
    else:
        cfg = Config.load(DEFAULT_CONFIG, args.overrides)
    words, faults = carry_out_imports(cfg, args.imports)
    solver = cfg.get('SOLVER') or Config()
    faults += MODELS.faults(solver.get('MODEL'), 'SOLVER.MODEL')
    faults += schema_of(SampleArgs).faults(solver.get('SAMPLE_ARGS') or Config(), 'SOLVER.SAMPLE_ARGS')
    check([*faults, *(not_carried_out(cfg, words) if faults else [])], cfg.file or 'the config')
    return cfg


def load_model(args: argparse.Namespace, cfg: Config) -> TrainModule:
    """The network with its weights, on this machine's device, in evaluation mode."""
    import torch

    from scepter.core.env import we
    from scepter.core.errors import CheckpointError
    from scepter.core.logger import get_logger
    from scepter.core.registry import MODELS
    from scepter.models.restore import restore
    from scepter.models.unfilled import unfilled
    from scepter.models.weights import load_into, local_copy, read_weights, weights_for
    logger, path = get_logger(), args.pretrained_model
    if is_checkpoint(path):
        with unfilled(cfg.SOLVER.MODEL):
            model = restore(path, cfg, use_ema=args.ema == 'on', logger=logger)
    elif path is None:
        model = MODELS.build(cfg.SOLVER.MODEL, logger=logger)
    else:
        with local_copy(path) as local:
            weights = read_weights(local, use_ema=args.ema == 'on')    # first, so that a file that is none is known at once
            with unfilled(cfg.SOLVER.MODEL):
                model = MODELS.build(without_weights(cfg.SOLVER.MODEL), logger=logger)    # the file holds the weights of all parts
            try:
                load_into(model, weights_for(model, weights), cfg.SOLVER.MODEL.get('IGNORE_KEYS', []), source=path)
            except CheckpointError as error:
                if args.cfg is not None:
                    raise
                raise CheckpointError(f'{error}\nWithout --cfg it is drawn as Stable Diffusion 1.5: name the recipe of another network, '
                                      'e.g. --cfg sdxl/sdxl_1024.yaml') from error
    kind = {'auto': torch.float16 if we.device.type == 'cuda' else torch.float32}.get(args.dtype) or getattr(torch, args.dtype)
    return model.eval().requires_grad_(False).to(device=we.device, dtype=kind, memory_format=torch.channels_last)


def sample_arguments(args: argparse.Namespace, cfg: Config) -> dict[str, Any]:
    """What forward_test is given: a flag, else SAMPLE_ARGS, else nothing, so that its own default stands."""
    from scepter.core.config import Config
    from scepter.solvers.diffusion import SampleArgs
    arguments = SampleArgs(cfg.SOLVER.get('SAMPLE_ARGS') or Config()).given()
    flags = ('n_prompt', 'sampler', 'sample_steps', 'discretization', 'seed', 'guide_scale', 'guide_rescale', 'image_size',
             'denoising_strength')
    arguments |= {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    arguments.setdefault('seed', 2023)
    if arguments['seed'] < 0:
        arguments['seed'] = random.randrange(2 ** 32)
    if args.image is not None:
        arguments['image'] = read_image(args.image, arguments.get('image_size'))
        size = list(arguments['image'].shape[-2:])
        if args.mask is not None:
            arguments['mask'] = (read_image(args.mask, size).mean(1, keepdim=True) > 0).float()
        arguments.setdefault('denoising_strength', 0.75 if args.mask is None else 1.0)
    elif args.mask is not None:
        from scepter.core.errors import DataError
        raise DataError('--mask says which part of --image is made anew: give --image too')
    return {**arguments, 'show_progress': sys.stderr.isatty()}


def draw(model: TrainModule, prompts: list[str], batch_size: int, arguments: dict[str, Any]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number of the first, results) of each batch. Picture i is keyed (seed, i), so the batches have no part in what it shows."""
    from scepter.core import streams
    from scepter.core.calls import accepted
    from scepter.core.config import ConfigError
    seeds = streams.row_seeds(arguments['seed'], len(prompts))
    for rows in batches(model, prompts, batch_size, arguments.get('n_prompt')):
        count = len(prompts[rows])
        own: dict[str, Any] = {key: arguments[key].expand(count, -1, -1, -1) for key in ('image', 'mask') if key in arguments}
        try:
            how = {**arguments, **own, 'prompt': prompts[rows], 'seed': arguments['seed'] + rows.start, 'row_seeds': seeds[rows]}
            yield rows.start, model.forward_test(**accepted(model.forward_test, how))
        except ValueError as error:     # a size, a sampler, a number of steps that cannot be
            raise ConfigError(str(error)) from error


def batches(model: TrainModule, prompts: list[str], batch_size: int, n_prompt: str | None) -> Iterator[slice]:
    """What is drawn at once: contexts of one length, since a prompt of more chunks would lengthen those of the others."""
    tokenize = getattr(getattr(model, 'cond_stage_model', None), 'tokenize', None)
    unwanted = getattr(model, 'default_n_prompt', '') if n_prompt is None else n_prompt

    def length(prompt: str) -> int:
        return tokenize([prompt, unwanted]).shape[-1] if tokenize is not None else 0

    first = 0
    for _, group in itertools.groupby(prompts, length):
        end = first + len(list(group))
        yield from (slice(i, min(i + batch_size, end)) for i in range(first, end, batch_size))
        first = end


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Every prompt, in order. Raises DataError where the file cannot be read or is empty."""
    from scepter.core.errors import DataError
    prompts = [] if args.prompt is None else [args.prompt]
    if args.prompt_file is not None:
        try:
            text = Path(args.prompt_file).read_text(encoding='utf-8-sig')
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f'{args.prompt_file} cannot be read: {error}') from error
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts or args.num_samples < 1:
        raise DataError(f'nothing to draw: {len(prompts)} prompts, {args.num_samples} pictures of each')
    return prompts


def read_image(path: str, size: int | Sequence[int] | None) -> Tensor:
    """[1, 3, H, W] in -1..1, scaled and cut in the middle to a size where one is given. Raises DataError."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    from scepter.core.errors import DataError
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert('RGB')
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f'{path} is no picture that can be read: {error}') from error
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def is_checkpoint(path: str | None) -> bool:
    """Whether this is a checkpoint folder of run_train."""
    return path is not None and (Path(path) / 'MANIFEST.json').is_file()


def without_weights(node: Any) -> Any:
    """A config whose parts load nothing, for a network that gets all of its weights from one file."""
    from scepter.core.config import Config
    if isinstance(node, list):
        return [without_weights(v) for v in node]
    if not isinstance(node, dict):
        return node
    return Config({key: without_weights(value) for key, value in node.items() if key != 'PRETRAINED_MODEL'})


def _size(word: str) -> int | list[int]:
    try:
        sides = [int(side) for side in word.replace('x', ',').split(',')]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides, default=0) < 1:
        raise argparse.ArgumentTypeError(f'{word!r} is no size: give pixels, e.g. 768, or height,width, e.g. 512,768')
    return sides[0] if len(sides) == 1 else sides


if __name__ == '__main__':
    sys.exit(main())
