"""From a font to pictures drawn on demand: train both stages, draw, and ask which real emoji each picture is nearest to.

    make demo-emoji      or            python examples/emoji/demo.py --seed 2

Writes outputs/emoji/: samples.png (a prompt each), held_out.png (above: drawn, below: the real one, which nothing was trained on), loss.png
and report.json.
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPES.parents[1]), str(RECIPES.parent), str(RECIPES)]

import numpy as np  # noqa: E402
from emoji_data import draw_all, open_font, with_article  # noqa: E402
from nearest import Real, judge  # noqa: E402
from PIL import Image  # noqa: E402
from running import draw as draw_prompts  # noqa: E402
from running import newest, plot_losses, python, train, write_prompts  # noqa: E402

from scepter.core.errors import DataError  # noqa: E402
from scepter.core.images import read_settings  # noqa: E402

SHOWN = ('a red apple', 'a cat with heart eyes', 'a green train', 'a slice of pizza', 'a rocket', 'a sunflower', 'a panda',
         'a woman astronaut dark skin',
         # none of these was trained on, though each object and each colour was
         'a purple cat', 'a blue guitar', 'a green banana', 'a red turtle', 'a blue birthday cake', 'a green heart', 'a red train',
         'a raised hand light skin')
NETWORK = ('--imports', str(RECIPES / 'whole_picture.py'))    # what comes with weights carries out no file of its own accord
TRAINED = 200    # of the prompts trained on, about so many are drawn to judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=1, help='of the whole run (default 1)')
    parser.add_argument('--out', default='outputs/emoji', help='folder of the run; what an earlier run left there is removed')
    args = parser.parse_args()
    out = Path(args.out)
    try:
        real = Real.of_the_font()
    except DataError as error:
        sys.exit(f'{error}')
    for name in ('autoencoder', 'diffusion', 'cache', 'drawn', 'shown'):
        shutil.rmtree(out / name, ignore_errors=True)

    print(f'{len(real.names)} emoji, {sum(real.held_out)} of them held out. Two trainings: 50 minutes on one busy CPU core, '
          'less on two quiet ones', flush=True)
    begin = time.monotonic()
    train(RECIPES / 'autoencoder.yaml', out / 'autoencoder', args.seed)
    train(RECIPES / 'emoji.yaml', out / 'diffusion', args.seed,
          f'SOLVER.MODEL.FIRST_STAGE_MODEL.PRETRAINED_MODEL={newest(out / "autoencoder")}', f'SOLVER.CACHE.FOLDER={out / "cache"}')
    train_seconds = time.monotonic() - begin

    report = {**draw_and_judge(out, real, args.seed), 'train_seconds': round(train_seconds, 1), 'seed': args.seed}
    (out / 'report.json').write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')
    for name in ('samples.png', 'held_out.png', 'loss.png', 'report.json'):
        print(out / name)
    print(f'\nDraw your own:\n  {python()} scepter/run_inference.py --prompt "a red apple" --pretrained_model {out / "diffusion"} '
          '--imports examples/emoji/whole_picture.py')


def draw_and_judge(out: Path, real: Real, seed: int) -> dict:
    """All pictures of a run, in its folder, and how near they are to what was asked for."""
    trained = np.flatnonzero(~real.held_out)
    chosen = [*trained[::max(len(trained) // TRAINED, 1)], *np.flatnonzero(real.held_out)]
    draw_prompts(out / 'diffusion', out / 'drawn', seed, len(chosen), *NETWORK, '--num_samples', '1',
                 '--prompt_file', write_prompts(out / 'prompts.txt', (with_article(real.names[i]) for i in chosen)))
    draw_prompts(out / 'diffusion', out / 'shown', seed, len(SHOWN), *NETWORK, '--num_samples', '1',
                 '--prompt_file', write_prompts(out / 'shown.txt', SHOWN))
    shown = [np.asarray(Image.open(file).convert('RGB').resize((128, 128))) for file in sorted((out / 'shown').glob('*.png'))]
    Image.fromarray(np.vstack([np.hstack(shown[i:i + 8]) for i in range(0, len(shown), 8)])).save(out / 'samples.png')
    show_held_out(out, real)
    plot_losses(out / 'loss.png', out / 'autoencoder', out / 'diffusion')

    report = judge(out / 'drawn', real)
    for what, figures in (('trained on', report['trained']), ('never seen together', report['held_out'])):
        print(f'{what}: {figures["pictures"]} pictures. The emoji that was asked for is the nearest of all {len(real.names)} for '
              f'{figures["top1"]:.2f}, among the five nearest for {figures["top5"]:.2f} (chance {report["chance_top5"]:.4f}); '
              f'the nearest of its own tones and colours for {figures["variant"]:.2f} (chance {figures["chance_variant"]:.2f})')
    return report


def show_held_out(out: Path, real: Real, count: int = 12) -> None:
    """held_out.png: `count` drawn pictures above the real ones that nobody showed to the network."""
    number = {with_article(name): i for i, name in enumerate(real.names)}
    files = [(number[read_settings(file)['prompt']], file) for file in sorted((out / 'drawn').glob('*.png'))]
    held_out = [(i, file) for i, file in files if real.held_out[i]]
    some = held_out[::max(len(held_out) // count, 1)][:count]
    drawn = [np.asarray(Image.open(file).convert('RGB').resize((64, 64))) for _, file in some]
    asked = draw_all([real.emoji[i] for i, _ in some], open_font(), 64)
    Image.fromarray(np.vstack([np.hstack(drawn), np.hstack(asked)])).save(out / 'held_out.png')


if __name__ == '__main__':
    main()
