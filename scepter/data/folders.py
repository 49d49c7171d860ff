"""Folders of images with their captions: text files beside them, a sheet, or what the names of the folders say."""
from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from scepter.core.errors import DataError
from scepter.core.registry import DATASETS
from scepter.core.schema import param
from scepter.core.stores import FS
from scepter.data.captions import CAPTION_SUFFIXES, MAX_CAPTION_BYTES, texts_of
from scepter.data.datasets import Account, ImageTextDataset, Record
from scepter.data.images import IMAGE_SUFFIXES
from scepter.data.index import Index, Packed, place_of
from scepter.data.rows import joined, rows

Found = tuple[str, list[str] | Path | None]    # path of an image below the folder; its captions, or the file that holds them
METADATA_FILES = ('metadata.jsonl', 'metadata.csv', 'metadata.parquet')    # as Hugging Face's imagefolder has them


@DATASETS.register_class()
class ImageTextFolderDataset(ImageTextDataset):
    """A folder of images with their captions.    index  ->  image [3, H, W] float32 in -1..1, prompt str; of FOLDERS: classes, label int

    Captions come from metadata.jsonl, .csv or .parquet in the folder (file_name, text), else from a .txt or .caption file beside
    each image; the folder is then searched to its bottom. Raises DataError where there is nothing to read.
    """

    DATA_FOLDER: str = param(doc='Folder of the images, local or in any store.')
    FOLDERS: Literal['plain', 'classes', 'repeats'] = param(
        'plain', 'What the folders in it say. classes: each is one, its number in their order the label; repeats: one that is called '
                 "10_a name is seen ten times an epoch, as kohya has it. Either's name is the prompt where none is written.")

    def listed(self) -> Index:
        self.place = self.DATA_FOLDER
        with FS.get_dir_to_local_dir(self.DATA_FOLDER, wait_finish=True) as folder:
            self.folder = os.path.abspath(folder)
        account = Account()
        packed = Packed.of(account.of(self.find()))
        state = hashlib.sha256(packed.data.data).hexdigest() if self.BUCKETS else ''
        return Index(packed, account.told(), place_of(['folder', self.folder], state) if self.BUCKETS else None, self.logger)

    def find(self) -> Iterable[Record]:
        if self.FOLDERS != 'plain' and (sheet := sheet_of(self.folder, self.place)):
            raise DataError(f'{self.place}/{sheet} says what there is, so FOLDERS: {self.FOLDERS} has no effect: take one of them away')
        found = find_records(self.folder, self.place)
        folders = self._folders([name for name, _ in found])
        labels = {name: i for i, name in enumerate(folders)} if self.FOLDERS == 'classes' else {}
        if labels:
            self.logger.info(f'{self.place}: classes by label: {", ".join(f"{i} {name}" for name, i in labels.items())}')
        if self.FOLDERS == 'repeats':
            self.times = np.array([folders[name.partition('/')[0]][0] for name, _ in found])
        for name, caption in found:
            top = name.partition('/')[0]
            texts = [folders[top][1]] if folders and caption is None else caption if isinstance(caption, list) else None
            yield Record(name, name, [texts] if texts else None, str(caption) if isinstance(caption, Path) else None, labels.get(top),
                         stamp=self._stamp(name))

    def open_image(self, place: str) -> str:
        return os.path.join(self.folder, place)

    def texts_in(self, sidecar: str) -> list[str]:
        with open(os.path.join(self.folder, sidecar), 'rb') as file:
            return self.captions.texts_of_file(file.read(MAX_CAPTION_BYTES + 1))

    def name_of(self, index: int) -> str:
        return os.path.join(self.folder, super().name_of(index))

    def _folders(self, images: list[str]) -> dict[str, tuple[int, str]]:
        """The folders at the top, sorted: how often the images in each come, and their prompt."""
        if self.FOLDERS == 'plain':
            return {}
        if outside := next((name for name in images if '/' not in name), None):
            raise DataError(f'{self.place}/{outside} is in no folder, but FOLDERS: {self.FOLDERS} means the folders that images are in')
        found = {}
        for top in sorted({name.partition('/')[0] for name in images}):
            times, word = 1, top
            if self.FOLDERS == 'repeats':
                match = re.fullmatch(r'(\d+)_(.+)', top)
                if match is None or int(match[1]) == 0:
                    raise DataError(f'{self.place}/{top}: expected a folder called like 10_{top}, which is seen ten times an epoch; '
                                    'one that is not to be seen is moved elsewhere')
                times, word = int(match[1]), match[2]
            found[top] = times, word.replace('_', ' ').strip()
        return found

    def _stamp(self, name: str) -> list[int] | None:
        """When the picture changed; asked where it decides whether its header has to be read."""
        if not self.BUCKETS:
            return None
        try:
            state = os.stat(os.path.join(self.folder, name))
        except OSError:
            return None
        return [state.st_size, state.st_mtime_ns]


def find_records(folder: str, shown: str) -> list[Found]:
    """The images of a folder with their captions: those that its sheet lists, else all of them down to its bottom, sorted.

    shown: what messages call the folder. Raises DataError.
    """
    if sheet := sheet_of(folder, shown):
        return list(_records_of_sheet(folder, os.path.join(folder, sheet)))
    names = sorted(_walk(folder))
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        found = f'{len(names)} other files, e.g. {names[0]}' if names else 'nothing'
        raise DataError(f'no images in {shown}: looked for {", ".join(METADATA_FILES)} and for files that end in '
                        f'{" ".join(IMAGE_SUFFIXES)}, found {found}')
    texts = set(names)
    sidecars = ([os.path.splitext(image)[0] + suffix for suffix in CAPTION_SUFFIXES] for image in images)
    return [(image, next((Path(t) for t in beside if t in texts), None)) for image, beside in zip(images, sidecars)]


def sheet_of(folder: str, shown: str) -> str | None:
    """The name of the sheet in a folder; None where there is none. Raises DataError where there are two."""
    sheets = [name for name in METADATA_FILES if os.path.isfile(os.path.join(folder, name))]
    if len(sheets) > 1:
        raise DataError(f'{shown} holds {" and ".join(sheets)}: keep the one that is meant')
    return sheets[0] if sheets else None


def _records_of_sheet(folder: str, sheet: str) -> Iterator[Found]:
    columns: dict[str, None] = {}
    for where, row in rows(sheet):
        columns.update(dict.fromkeys(row))
        name = row.get('file_name')
        if not isinstance(name, str) or not name:
            raise DataError(f'{where}: expected a file_name, got the keys {", ".join(map(str, row)) or "(none)"}')
        try:
            if '://' in name or os.path.isabs(name):
                raise ValueError(f'{name!r} leads out of the folder; file_name is a path below it')
            joined(folder, name)
            yield name, None if row.get('text') is None else texts_of(row['text'])
        except ValueError as error:
            raise DataError(f'{where}: {error}') from error
    if not columns:
        raise DataError(f'{sheet} lists no image')
    if 'text' not in columns:
        raise DataError(f'{sheet} has no text for any image, only {", ".join(columns)}: name the captions "text", or read it by '
                        'ImageTextTableDataset, which is told their column')


def _walk(folder: str) -> Iterator[str]:
    """Files below the folder, as paths with forward slashes, hidden ones left out."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(('.', '__MACOSX'))]
        below = '' if root == folder else os.path.relpath(root, folder).replace(os.sep, '/') + '/'
        yield from (below + f for f in files if not f.startswith('.'))
