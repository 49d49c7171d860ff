"""The same thirty small pictures in every form that training reads, from the two photographs that come with scikit-learn.

    python examples/data/make.py [--folder outputs/example_data]        # seconds, 1 MB
"""
from __future__ import annotations

import argparse
import csv
import json
import shutil
import tarfile
from pathlib import Path

from PIL import Image

from scepter.core.registry import need
from scepter.data.rows import write_parquet

SIZE = 96
Picture = tuple[str, str, Image.Image]    # its name, its caption, itself


def main(words: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, default=Path('outputs/example_data'), help='where all goes; what was there is replaced')
    folder = parser.parse_args(words).folder
    shutil.rmtree(folder, ignore_errors=True)
    found = pictures()
    for write in (sidecars, sheet, classes, repeats, tables, parquet, hub, shards, masks):
        write(folder, found)
    print(f'{len(found)} pictures in {folder}, in these forms: {", ".join(sorted(path.name for path in folder.iterdir()))}')
    return folder


def pictures() -> list[Picture]:
    """Pieces of the photographs: squares, and some that are wide or tall."""
    images = need('sklearn.datasets', 'data').load_sample_images().images
    found = []
    for subject, pixels in zip(('a temple', 'a flower'), images):
        photograph = Image.fromarray(pixels)
        for row, height in enumerate(('top', 'middle', 'bottom')):
            for column, side in enumerate(('far left', 'left', 'middle', 'right', 'far right')):
                shape = [(SIZE, SIZE), (SIZE * 3 // 2, SIZE), (SIZE, SIZE * 3 // 2)][(row + column) % 3]
                left, top = column * 120, row * 130
                name = f'{subject.split()[1]}_{row}{column}.jpg'
                found.append((name, f'{subject}, {height} {side}', photograph.crop((left, top, left + shape[0], top + shape[1]))))
    return found


def save(folder: Path, found: list[Picture]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, _, picture in found:
        picture.save(folder / name, quality=90)
    return folder


# ------------------------------------------------------------------------------------------------ folders
def sidecars(folder: Path, found: list[Picture]) -> None:
    """A text file beside each image: a line of tags, and a line of words."""
    save(folder / 'folder', found)
    for name, caption, _ in found:
        (folder / 'folder' / name).with_suffix('.txt').write_text(f'{caption}, photograph, colour\na photograph of {caption}\n')


def sheet(folder: Path, found: list[Picture]) -> None:
    """Hugging Face's imagefolder."""
    save(folder / 'imagefolder', found)
    with open(folder / 'imagefolder' / 'metadata.csv', 'w', newline='') as file:
        csv.writer(file).writerows([('file_name', 'text'), *((name, caption) for name, caption, _ in found)])


def classes(folder: Path, found: list[Picture]) -> None:
    for subject in ('temple', 'flower'):
        save(folder / 'classes' / subject, [row for row in found if row[0].startswith(subject)])


def repeats(folder: Path, found: list[Picture]) -> None:
    """kohya's folders: how often, and of what."""
    save(folder / 'repeats' / '10_a temple', [row for row in found if row[0].startswith('temple')][:2])
    save(folder / 'repeats' / '2_a flower', [row for row in found if row[0].startswith('flower')][:5])


# ------------------------------------------------------------------------------------------------ tables
def tables(folder: Path, found: list[Picture]) -> None:
    """Comma-separated, a line of JSON each, and the list and the CSV of the public project, beside one folder of images."""
    save(folder / 'tables' / 'images', found)
    rows = [(f'images/{name}', caption, picture) for name, caption, picture in found]
    with open(folder / 'tables' / 'table.csv', 'w', newline='') as file:
        csv.writer(file).writerows([('image', 'caption', 'class'), *((path, caption, int('flower' in path)) for path, caption, _ in rows)])
    with open(folder / 'tables' / 'train.csv', 'w', newline='') as file:
        csv.writer(file).writerows([('Target:FILE', 'Prompt'), *((path, caption) for path, caption, _ in rows)])
    (folder / 'tables' / 'list.txt').write_text(''.join(f'{path}#;#{p.width}#;#{p.height}#;#{caption}\n' for path, caption, p in rows))
    (folder / 'tables' / 'table.jsonl').write_text(''.join(
        json.dumps({'photo': path, 'long': f'a photograph of {caption}', 'short': [caption, caption.partition(',')[0]]}) + '\n'
        for path, caption, _ in rows))


def parquet(folder: Path, found: list[Picture]) -> None:
    """The images themselves in a table."""
    (folder / 'parquet').mkdir(parents=True)
    rows = [{'image': {'bytes': jpeg(folder, name), 'path': name}, 'text': caption} for name, caption, _ in found]
    write_parquet(folder / 'parquet' / 'train-000.parquet', rows[:20])
    write_parquet(folder / 'parquet' / 'train-001.parquet', rows[20:])


def hub(folder: Path, found: list[Picture]) -> None:
    """What the library `datasets` saves."""
    library = need('datasets', 'data')
    library.disable_progress_bars()
    rows = {'image': [{'bytes': jpeg(folder, name), 'path': None} for name, _, _ in found], 'text': [caption for _, caption, _ in found]}
    library.Dataset.from_dict(rows, features=library.Features(image=library.Image(), text=library.Value('string'))).save_to_disk(
        str(folder / 'saved'))


def masks(folder: Path, found: list[Picture]) -> None:
    """Two pictures a row: the image, and which part of it is meant."""
    save(folder / 'masks', found)
    with open(folder / 'masks' / 'table.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(('image', 'mask_file', 'text'))
        for name, caption, picture in found:
            mask = Image.new('L', picture.size)
            mask.paste(255, (picture.width // 4, picture.height // 4, picture.width // 2, picture.height // 2))
            mask.save((folder / 'masks' / name).with_suffix('.mask.png'))
            writer.writerow((name, Path(name).with_suffix('.mask.png'), caption))


# ------------------------------------------------------------------------------------------------ archives
def shards(folder: Path, found: list[Picture]) -> None:
    """WebDataset."""
    (folder / 'shards').mkdir(parents=True)
    for number in range(2):
        with tarfile.open(folder / 'shards' / f'{number:05d}.tar', 'w') as tar:
            for name, _, _ in found[number::2]:
                for file in (folder / 'folder' / name, (folder / 'folder' / name).with_suffix('.txt')):
                    tar.add(file, file.name)


def jpeg(folder: Path, name: str) -> bytes:
    return (folder / 'folder' / name).read_bytes()


if __name__ == '__main__':
    main()
