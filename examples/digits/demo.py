"""From nothing to pictures drawn on demand: train both stages, draw, and let a classifier read what was drawn.

    make demo            or            python examples/digits/demo.py --seed 2 --recipe flow

Writes outputs/digits/: samples.png (a row per prompt), loss.png, report.json. The reader is a classifier of scikit-learn that was
trained on the real digits alone; the network is told what to draw by the prompt and by nothing else.
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPES.parents[1]), str(RECIPES.parent), str(RECIPES)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from digits_data import WORDINGS, WORDS, load_digits  # noqa: E402
from PIL import Image  # noqa: E402
from running import draw, newest, plot_losses, python, train, write_prompts  # noqa: E402

from scepter.core.images import read_settings  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=1, help='of the whole run (default 1)')
    recipes = sorted({path.stem for path in RECIPES.glob('*.yaml')} - {'autoencoder'})
    parser.add_argument('--recipe', choices=recipes, default='diffusion', help='of stage 2: a YAML beside this file (default diffusion)')
    parser.add_argument('--out', default='outputs/digits', help='folder of the run; what an earlier run left there is removed')
    args = parser.parse_args()
    out = Path(args.out)
    for name in ('autoencoder', args.recipe, 'drawn', 'cache'):
        shutil.rmtree(out / name, ignore_errors=True)

    print('Two short trainings and 700 pictures: 2 to 4 minutes on two CPU cores, 1.2 GB of memory, 80 MB in ' + str(out), flush=True)
    begin = time.monotonic()
    train(RECIPES / 'autoencoder.yaml', out / 'autoencoder', args.seed)
    stage1 = newest(out / 'autoencoder')
    train(RECIPES / f'{args.recipe}.yaml', out / args.recipe, args.seed,
          f'SOLVER.MODEL.FIRST_STAGE_MODEL.PRETRAINED_MODEL={stage1}', f'SOLVER.CACHE.FOLDER={out / "cache"}')
    train_seconds = time.monotonic() - begin

    begin = time.monotonic()
    wordings = WORDINGS[1:2] if args.recipe == 'classes' else WORDINGS    # a class has one name
    prompts = [wording.format(word) for word in WORDS for wording in wordings]
    each = 600 // len(prompts)
    draw(out / args.recipe, out / 'drawn', args.seed, 600, '--num_samples', str(each),
         '--prompt_file', write_prompts(out / 'prompts.txt', prompts))
    sample_seconds = time.monotonic() - begin
    draw(out / args.recipe, out / 'drawn' / 'grid', args.seed, 100, '--num_samples', '10', '--grid',
         '--prompt_file', write_prompts(out / 'ten.txt', (wordings[0].format(word) for word in WORDS)))
    shutil.copyfile(out / 'drawn' / 'grid' / 'grid.png', out / 'samples.png')

    plot_losses(out / 'loss.png', out / 'autoencoder', out / args.recipe)
    report = {**judge(out / 'drawn'), 'train_seconds': round(train_seconds, 1), 'sample_seconds': round(sample_seconds, 1),
              'recipe': args.recipe, 'seed': args.seed}
    (out / 'report.json').write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')
    print(f'\nprompt accuracy {report["prompt_accuracy"]:.3f} over {report["samples"]} pictures, diversity {report["diversity"]:.2f}, '
          f'trained {train_seconds:.0f} s, drawn in {sample_seconds:.0f} s')
    for name in ('samples.png', 'loss.png', 'report.json'):
        print(out / name)
    print(f'\nDraw your own:\n  {python()} scepter/run_inference.py --prompt "the number seven" --pretrained_model {out / args.recipe}')


# ------------------------------------------------------------------------------------------------ judging
def judge(folder: Path, pixels: int = 32) -> dict:
    """Read every picture with a classifier of real digits, and compare how much pictures of a class differ.    pixels: their side"""
    size = 8
    reader = reader_of_digits(size)
    test_images, test_labels = load_digits('test', size)
    shown, shown_labels = load_digits('all', pixels)     # as the networks see them, and made small in the same way as what they draw
    drawn, wanted, wording = load_drawn(folder, size)
    read = reader.predict(flat(drawn))
    right = read == wanted
    real = reduced(shown, size), shown_labels.numpy()
    return {'prompt_accuracy': float(right.mean()),
            'diversity': within_class_deviation(drawn, wanted) / within_class_deviation(*real),
            'samples': len(wanted),
            'reader_accuracy': float((reader.predict(flat(test_images)) == test_labels.numpy()).mean()),
            'accuracy_of_digit': {word: float(right[wanted == i].mean()) for i, word in enumerate(WORDS)},
            'accuracy_of_wording': {WORDINGS[i].format('...'): float(right[wording == i].mean()) for i in sorted(set(wording))}}


def reader_of_digits(size: int) -> Any:
    """A classifier that knows the digits of the training set, as pictures of this side; `predict` takes what `flat` gives."""
    from sklearn.svm import SVC
    images, labels = load_digits('train', size)
    return SVC(gamma=0.02, C=10).fit(flat(images), labels)


def load_drawn(folder: Path, size: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Pictures [N, 1, size, size] in -1..1, the digit that each prompt asked for, and the wording it asked in."""
    meaning = {wording.format(word): (i, j) for i, word in enumerate(WORDS) for j, wording in enumerate(WORDINGS)}
    files = sorted(folder.glob('*.png'))
    asked = [meaning[read_settings(file)['prompt']] for file in files]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file).convert('L'))) for file in files])[:, None].float() / 127.5 - 1
    return reduced(pixels, size), np.array([a for a, _ in asked]), np.array([b for _, b in asked])


def reduced(images: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(images[:, :1], size=(size, size), mode='area')


def flat(images: torch.Tensor) -> np.ndarray:
    return images[:, :1].flatten(1).numpy()


def within_class_deviation(images: torch.Tensor, labels: np.ndarray) -> float:
    """Mean over classes and pixels of the standard deviation within a class."""
    return float(np.mean([images[torch.from_numpy(labels == c), :1].std(0).mean() for c in range(len(WORDS))]))


if __name__ == '__main__':
    main()
