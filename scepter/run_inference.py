"""Draw what a prompt asks for.

    python scepter/run_inference.py --prompt "a woman" --n_prompt "" --num_samples 4 --pretrained_model path/to/model
    python scepter/run_inference.py --prompt "the number three" --pretrained_model outputs/digits/diffusion

--pretrained_model takes a checkpoint of run_train or a run's folder (its newest), a published single file, or a diffusers folder. Without
--cfg the network is built from the config that came with the weights, else from what the files themselves say (docs/weights.md). A flag
that is not given never overrides SAMPLE_ARGS; one that the network does not take is an error. No picture is ever overwritten. In Python:
scepter.load.
"""
from __future__ import annotations

import os
import sys

if not __package__:    # run as a file: Python has put this folder on the path, where the project's root belongs
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.path.dirname(_here), *(p for p in sys.path if os.path.abspath(p) != _here)]

import argparse
from collections.abc import Sequence
from pathlib import Path

# flags that are arguments of forward_test
OPTIONS = ('n_prompt', 'sampler', 'sample_steps', 'discretization', 'seed', 'guide_scale', 'guide_rescale', 'image_size',
           'num_frames', 'denoising_strength', 'image', 'mask', 'first_frame', 'motion_flow', 'sets', 'image_guide_scale',
           'spatiotemporal_guide_scale', 'guide_renorm', 'guide_trunc', 'min_guide_scale', 'flow_shift')


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: this process's). Answers the exit code of docs/design.md, section 9."""
    parser = command_line()
    args = parser.parse_intermixed_args(argv)
    if args.prompt is None and args.prompt_file is None and args.label is None:
        parser.error('--prompt TEXT, --prompt_file FILE or --label N is required')
    if args.label is not None and (args.prompt is not None or args.prompt_file is not None):
        parser.error('--label and --prompt: a network is told classes or texts, give one of them')
    from scepter.core.env import guarded  # from here on torch is needed
    return guarded(lambda: run(args))


def command_line() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('overrides', nargs='*', metavar='KEY.PATH=VALUE', help='set a key of the config; the last one wins')
    add('--cfg', metavar='FILE', help='the config whose SOLVER.MODEL to build')
    add('--save_cfg', metavar='FILE', help='also write the config that is drawn with')
    add('--imports', metavar='FILE', action='append', default=[], help='a file or module with components of yours; may be repeated')
    add('--pretrained_model', metavar='PATH', help="checkpoint or run's folder, single file, or diffusers folder")
    add('--allow_downloads', action='store_true', help='also fetch what the config that came with the weights names')
    add('--ema', choices=('on', 'off'), default='on', help='draw with averaged weights where there are any (default on)')
    add('--prompt', help='what to draw')
    add('--prompt_file', metavar='FILE', help='a prompt on each line')
    add('--label', type=_numbers, metavar='N or N,N,...', help='classes to draw, where the network is told a class')
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
    add('--num_frames', type=int, help='frames of a clip')
    add('--clips', choices=('png', 'mp4'), default='png', help='how clips are written: animated PNG, which loses nothing (default), or MP4')
    add('--first_frame', metavar='FILE', help='the picture that a clip begins with; scaled and cut in the middle to its size')
    add('--motion_flow', type=float, help='how much moves in a clip, in pixels per frame')
    add('--image', metavar='FILE', help='a picture to begin with; scaled and cut in the middle where a size is asked for')
    add('--denoising_strength', type=float, help='how much of --image is made anew, 0..1 (default 0.75 with --image, 1 with --mask)')
    add('--mask', metavar='FILE', help='white where --image is made anew; the rest of it stays as it is')
    nova = parser.add_argument_group('networks that draw tokens set by set (NOVA)').add_argument
    nova('--sets', type=int, help='sets of tokens in a frame; --sample_steps are those of each set')
    nova('--image_guide_scale', type=float, help='strength of guidance by the frames before; 0 for none')
    nova('--spatiotemporal_guide_scale', type=float, help='as published: it changes nothing in these networks')
    nova('--guide_renorm', type=float, help="below 1: bring the guided output's norm back to the unguided one's, at most by this factor")
    nova('--guide_trunc', type=float, help='no guidance at times below this one, of 1000')
    nova('--min_guide_scale', type=float, help='strength of guidance of the first set, from which it grows')
    nova('--flow_shift', type=float, help='another shift of a flow than that of training')
    add('--dtype', choices=('auto', 'float32', 'bfloat16', 'float16'), default='auto', help='auto: float16 on CUDA, else float32')
    add('--save_folder', default='outputs/inference', help='where pictures go (default outputs/inference)')
    add('--grid', action='store_true', help='also save all pictures as one, a row for each prompt')
    add('--debug', action='store_true', help='say more')
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, without exit codes: errors are raised."""
    from scepter import drawing
    from scepter.core.faults import ConfigError
    from scepter.core.logger import set_up_logging
    set_up_logging(None, debug=args.debug)
    prompts = prompts_of(args)
    pipe = drawing.load(args.pretrained_model, args.cfg, dtype=args.dtype, ema=args.ema == 'on', imports=args.imports,
                        overrides=args.overrides, allow_downloads=args.allow_downloads)
    if args.save_cfg is not None:
        Path(args.save_cfg).write_text(pipe.cfg.dump(is_secure=True), encoding='utf-8')
        print(args.save_cfg)
    how = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    count = args.num_samples
    if prompts is None:    # one draw of as many pictures as there are classes and samples of each
        how['label'] = [label for label in args.label for _ in range(args.num_samples)]
        count = len(how['label'])
    results = []
    try:
        for result in pipe.draw(prompts, num_samples=count, batch_size=args.batch_size,
                                show_progress=sys.stderr.isatty(), **how):
            print(*drawing.Drawn([result]).save(args.save_folder, args.clips), sep='\n', flush=True)
            if args.grid:
                results.append(result)
    except ValueError as error:     # a size, a sampler, a number of steps that cannot be
        raise ConfigError(str(error)) from error
    if args.grid:
        print(drawing.Drawn(results).save_grid(args.save_folder, args.num_samples))


def prompts_of(args: argparse.Namespace) -> list[str] | None:
    """Every prompt, in order; None where classes are given instead. Raises DataError where the file cannot be read or is empty."""
    from scepter.core.errors import DataError
    if args.prompt is None and args.prompt_file is None:
        return None
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


def _numbers(word: str) -> list[int]:
    try:
        return [int(number) for number in word.split(',')]
    except ValueError:
        raise argparse.ArgumentTypeError(f'{word!r} is no class: give numbers, e.g. 7 or 3,5,7') from None


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
