"""NOVA from nothing: train both stages on digits, draw them in 1, 2, 4 and 8 sets of tokens, and let a classifier read what was drawn.

    make demo-nova       or            python examples/nova/demo.py --seed 2
    make demo-nova-clips or            python examples/nova/demo.py --clips

Writes outputs/nova/: samples.png, loss.png, report.json; with --clips clips.png, loss_clips.png, report_clips.json and the clips
themselves, whose centroids say whether they move the way that they were told.
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPES.parents[1]), str(RECIPES.parent), str(RECIPES.parent / 'digits'), str(RECIPES)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from digits.demo import flat, judge, reader_of_digits, reduced  # noqa: E402
from digits_data import WORDINGS, WORDS  # noqa: E402
from moving_digits import APART, PROMPT, WAYS, WHOLE, digits_of, way_of  # noqa: E402
from PIL import Image  # noqa: E402
from running import draw, newest, plot_losses, python, train, write_prompts  # noqa: E402
from torch import Tensor  # noqa: E402

from scepter.core.images import grid  # noqa: E402
from scepter.drawing import Drawn, load  # noqa: E402

SETS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=1, help='of the whole run (default 1)')
    parser.add_argument('--clips', action='store_true', help='two digits that move, in the place of one that stands')
    parser.add_argument('--out', type=Path, default=Path('outputs/nova'), help='folder of the run; what is there is removed')
    args = parser.parse_args()
    (clips if args.clips else pictures)(args.out, args.seed)


def pictures(out: Path, seed: int) -> None:
    """Digits, in the same words and read by the same reader as in examples/digits."""
    print(f'Two short trainings and 2400 pictures: 3 to 6 minutes on two CPU cores, 1.5 GB of memory, 150 MB in {out}', flush=True)
    seconds = train_both(out, 'autoencoder', 'digits_nova', seed)
    shutil.rmtree(out / 'drawn', ignore_errors=True)
    prompts = write_prompts(out / 'prompts.txt', (wording.format(word) for word in WORDS for wording in WORDINGS))
    rows = []
    for sets in SETS:
        begin, folder = time.monotonic(), out / 'drawn' / f'{sets}'
        draw(out / 'digits_nova', folder, seed, 600, '--sets', str(sets), '--num_samples', '15', '--prompt_file', prompts)
        rows.append({'sets': sets, **judge(folder, pixels=64), 'sample_seconds': round(time.monotonic() - begin, 1)})
    save_sheet([small(shown) for shown in first_of_each(out / 'drawn' / f'{SETS[-1]}', rows=6)], len(WORDS), out / 'samples.png')
    plot_losses(out / 'loss.png', out / 'autoencoder', out / 'digits_nova')
    write_report(out / 'report.json', {'train_seconds': seconds, 'seed': seed, 'of_sets': rows})
    print(table(rows))
    print(f'trained {seconds:.0f} s\n')
    for name in ('samples.png', 'loss.png', 'report.json'):
        print(out / name)
    print(f'\nDraw your own:\n  {python()} scepter/run_inference.py --prompt "the number seven" --pretrained_model {out}/digits_nova')


def clips(out: Path, seed: int) -> None:
    """Two digits that move, in pairs that training never saw together: which clips move as they were told, and which digits are read."""
    print(f'Two short trainings and 120 clips: 8 to 15 minutes on two CPU cores, 1.5 GB of memory, 150 MB in {out}', flush=True)
    seconds = train_both(out, 'moving_autoencoder', 'moving_digits', seed)
    shutil.rmtree(out / 'clips', ignore_errors=True)
    begin, pipe = time.monotonic(), load(out / 'moving_digits')
    prompts = [PROMPT.format(WORDS[i], WORDS[(i + APART) % 10], way) for i in range(10) for way in WAYS]
    results = []
    for result in pipe.draw(prompts, num_samples=3, batch_size=40, seed=seed):
        Drawn([result]).save(out / 'clips', clips='mp4')
        results.append(result)
        if len(results) % 40 == 0:
            print(f'  {len(results)} of {3 * len(prompts)} clips', flush=True)
    figures = judge_clips(results)
    strips = [frame for result in results[::15] for frame in result['video'].unbind(1)]    # eight pairs, each way twice
    save_sheet(strips, 2 * WHOLE, out / 'clips.png')
    plot_losses(out / 'loss_clips.png', out / 'moving_autoencoder', out / 'moving_digits')
    write_report(out / 'report_clips.json', {**figures, 'train_seconds': seconds, 'sample_seconds': time.monotonic() - begin, 'seed': seed})
    print(f'\ndirection {figures["direction"]:.3f} over {figures["clips"]} clips, digits read in their places, frame by frame: '
          + ' '.join(f'{share:.3f}' for share in figures['read_in_frame']) + f', trained {seconds:.0f} s\n')
    for name in ('clips', 'clips.png', 'loss_clips.png', 'report_clips.json'):
        print(out / name)
    print(f'\nDraw your own:\n  {python()} scepter/run_inference.py --prompt "{PROMPT.format("two", "seven", "left")}" '
          f'--pretrained_model {out}/moving_digits')


def train_both(out: Path, stage1: str, stage2: str, seed: int) -> float:
    """Seconds that both trainings took."""
    for name in (stage1, stage2, 'cache'):
        shutil.rmtree(out / name, ignore_errors=True)
    begin = time.monotonic()
    train(RECIPES / f'{stage1}.yaml', out / stage1, seed)
    train(RECIPES / f'{stage2}.yaml', out / stage2, seed, f'SOLVER.MODEL.FIRST_STAGE_MODEL.PRETRAINED_MODEL={newest(out / stage1)}',
          f'SOLVER.CACHE.FOLDER={out / "cache"}')
    return round(time.monotonic() - begin, 1)


# ------------------------------------------------------------------------------------------------ judging
def judge_clips(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share of clips that move as they were told, in all and for each way, and of digits that are read in their places."""
    told = [result['prompt'].split() for result in results]
    right = [way_of(result['video']) == words[-1] for result, words in zip(results, told)]
    of_way = {way: [hit for hit, words in zip(right, told) if words[-1] == way] for way in WAYS}
    digits = torch.stack([digits_of(result['video'], words[-1]) for result, words in zip(results, told)], 1)    # [T, B, 2, 28, 28]
    wanted = np.array([[WORDS.index(words[0]), WORDS.index(words[2])] for words in told]).reshape(-1)
    size = 8
    reader = reader_of_digits(size)
    read = [reader.predict(flat(reduced(2 * frame.flatten(0, 1)[:, None] - 1, size))) == wanted for frame in digits]
    return {'direction': sum(right) / len(right), 'clips': len(right), 'read_in_frame': [float(hits.mean()) for hits in read],
            'of_way': {way: sum(hits) / len(hits) for way, hits in of_way.items()}}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What each number of sets gave."""
    lines = [f'{row["sets"]:4d}  {row["prompt_accuracy"]:15.3f}  {row["diversity"]:9.2f}  {row["sample_seconds"]:7.0f} s' for row in rows]
    return '\n'.join(['\nsets  prompt accuracy  diversity  drawn in', *lines])


# ------------------------------------------------------------------------------------------------ showing
def first_of_each(folder: Path, rows: int) -> list[Tensor]:
    """Pictures [1, H, W] in 0..1, row by row, a column for each word; prompts were drawn one word after the other, equally often."""
    files = sorted(folder.glob('*.png'))
    each = len(files) // len(WORDS)
    return [grey(files[word * each + row]) for row in range(rows) for word in range(len(WORDS))]


def grey(file: Path) -> Tensor:
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert('L')))[None] / 255


def small(image: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(image, 2)


def save_sheet(images: Sequence[Tensor], columns: int, path: Path) -> None:
    """Pictures side by side, in grey."""
    Image.fromarray(grid(list(images), columns)).convert('L').save(path, optimize=True)


def write_report(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
