"""Datasets: an index goes in, a dict comes out.

    image [3, H, W] float32 in -1..1 · prompt str · label int · mask [1, H, W] in 0..1 · original_size, crop_top_left, target_size [2]

A dataset of one's own is a class on BaseDataset with __len__ and __getitem__ (docs/data.md); order, batches, workers, keyed
randomness and the replacement of unreadable files are the loader's.
"""
from __future__ import annotations

import csv
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

import scepter.data.transforms  # noqa: F401  fills TRANSFORMS
from scepter.core.config import Config
from scepter.core.errors import DataError
from scepter.core.faults import Fault
from scepter.core.logger import get_logger
from scepter.core.registry import DATASETS, TRANSFORMS
from scepter.core.schema import Component, param, parts
from scepter.core.stores import FS

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.avif')
# what is opened, whatever the name says: a PostScript file called .png would start Ghostscript
Image.init()
FORMATS = tuple(name for name in ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'AVIF') if name in Image.OPEN)
CAPTION_SUFFIXES = ('.txt', '.caption')
METADATA_FILES = ('metadata.jsonl', 'metadata.csv')
MAX_PIXELS = 89_478_485      # what Pillow warns at; a header that promises more is a bomb, or a picture to be scaled down first
FREE_PIXELS = 1 << 24        # up to here a picture may be as small a file as it likes
MAX_PIXELS_PER_BYTE = 100    # photographs have 1 to 10; a file of 260 kB with 89 million pixels took 2.6 GB
MAX_CAPTION_BYTES = 65_536   # the longest real captions are a few kB

Record = tuple[str, str | Path | None]    # path of an image below the folder; its caption, or the file that holds it


class UnreadableError(Exception):
    """One sample cannot be read. The loader names it once and puts another sample in its place."""


class BaseDataset(Component, base=True):
    """What every dataset is built on: the loader's settings, and the order of a sample's last steps."""

    BATCH_SIZE: int = param(4, 'Samples of one batch, per process.', least=1)
    NUM_WORKERS: int = param(0, 'Processes that read ahead; 0 reads in the main process. Samples are the same, to the bit.', least=0)
    PREFETCH: int = param(2, 'Batches that each worker reads ahead.', least=1)
    PIN_MEMORY: bool = param(False, 'Hand batches over in page-locked memory, which a GPU copies faster.')
    TIMEOUT: float = param(120.0, 'Seconds to wait for one batch before its worker counts as stuck and is replaced.', above=0)
    MAX_BAD_FRACTION: float = param(0.01, 'Share of the files that may be unreadable (two always may); 0: none may.', least=0, most=1)

    def __len__(self) -> int:
        raise NotImplementedError(f'{type(self).__name__} has no __len__: return the number of samples of one epoch')

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at 0 <= index < len(self). Raises UnreadableError where only this sample is at fault."""
        raise NotImplementedError(f'{type(self).__name__} has no __getitem__: return the sample as a dict')

    def name_of(self, index: int) -> str:
        """What a message calls this sample: its path, where it has one."""
        return f'sample {index}'

    def collate(self, samples: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
        """The samples of one batch as the network gets them: tensors, arrays, numbers and tuples of numbers stacked, the rest in lists.

        Raises DataError, with two of the names, where they have not the same keys or shapes.
        """
        for sample, name in zip(samples, names):
            if sample.keys() != samples[0].keys():
                raise DataError(f'samples of one batch need the same keys: {names[0]} has {", ".join(samples[0])}; '
                                f'{name} has {", ".join(sample)}')
        return {key: _stack(key, [sample[key] for sample in samples], names) for key in samples[0]}

    @property
    def file_count(self) -> int:
        """How many different files the samples come from; MAX_BAD_FRACTION is a share of it."""
        return len(self)


@DATASETS.register_class()
class ImageTextFolderDataset(BaseDataset):
    """A folder of images with their captions.    index  ->  image [3, H, W] float32 in -1..1, prompt str

    Captions come from metadata.jsonl or metadata.csv in the folder (file_name, text), else from a .txt or .caption file beside
    each image; the folder is then searched to its bottom. Raises DataError where there is nothing to read.
    """

    DATA_FOLDER: str = param(doc='Folder of the images, local or in any store.')
    PROMPT_PREFIX: str = param('', 'Put before every caption.')
    REPEATS: int = param(1, 'How often each image is seen in one epoch.', least=1)
    TRANSFORMS: list = parts(TRANSFORMS, 'What is done to a sample, in this order; the result must be of one size.')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.logger = logger or get_logger()
        self.transforms = [TRANSFORMS.build(t, logger=logger) for t in self.TRANSFORMS]
        with FS.get_dir_to_local_dir(self.DATA_FOLDER, wait_finish=True) as folder:
            self.folder = os.path.abspath(folder)
        self.records = self._find_records()
        missing = sum(caption is None for _, caption in self.records)
        self.missing_captions = missing
        if missing:
            first = next(path for path, caption in self.records if caption is None)
            self.logger.warning(f'{self.DATA_FOLDER}: {missing} of {len(self.records)} images have no caption, e.g. {first}; '
                                "their prompt is ''")

    def __len__(self) -> int:
        return len(self.records) * self.REPEATS

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, caption = self.records[index % len(self.records)]
        sample: dict[str, Any] = {'image': load_image(os.path.join(self.folder, path)), 'prompt': self.PROMPT_PREFIX + self._read(caption)}
        for transform in self.transforms:
            sample = transform(sample)
        sample['image'] = to_tensor(sample['image'])
        if 'mask' in sample:
            sample['mask'] = to_mask(sample['mask'])
        return sample

    def name_of(self, index: int) -> str:
        return os.path.join(self.folder, self.records[index % len(self.records)][0])

    @property
    def file_count(self) -> int:
        return len(self.records)

    def _read(self, caption: str | Path | None) -> str:
        if not isinstance(caption, Path):
            return caption or ''
        try:
            with open(os.path.join(self.folder, caption), 'rb') as file:
                return clean_caption(file.read(MAX_CAPTION_BYTES + 1).decode('utf-8-sig'))
        except (OSError, ValueError) as error:    # UnicodeDecodeError is one
            raise UnreadableError(f'caption {caption}: {error}') from error

    def _find_records(self) -> list[Record]:
        sheets = [name for name in METADATA_FILES if os.path.isfile(os.path.join(self.folder, name))]
        if len(sheets) > 1:
            raise DataError(f'{self.DATA_FOLDER} holds {" and ".join(sheets)}: keep the one that is meant')
        if sheets:
            records = _records_of_metadata(os.path.join(self.folder, sheets[0]))
            if not records:
                raise DataError(f'{self.DATA_FOLDER}/{sheets[0]} lists no image')
            return records
        names = sorted(_walk(self.folder))
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        if not images:
            found = f'{len(names)} other files, e.g. {names[0]}' if names else 'nothing'
            raise DataError(f'no images in {self.DATA_FOLDER}: looked for {", ".join(METADATA_FILES)} and for files that end in '
                            f'{" ".join(IMAGE_SUFFIXES)}, found {found}')
        texts = set(names)
        sidecars = ([os.path.splitext(image)[0] + suffix for suffix in CAPTION_SUFFIXES] for image in images)
        return [(image, next((Path(t) for t in beside if t in texts), None)) for image, beside in zip(images, sidecars)]


@DATASETS.register_class()
class PromptListDataset(BaseDataset):
    """Prompts to draw, for TEST_DATA.    index  ->  prompt, and what its line says besides: n_prompt, image_size, seed, ...

    A line of PROMPT_FILE is a prompt; in a .jsonl file it is an object ({"prompt": ..., "seed": 7, "guide_scale": 5.0}), whose keys are
    arguments of the network's forward_test. Those that hold for a whole batch must be equal in it: BATCH_SIZE 1 allows all.
    """

    PROMPTS: list[str] = param([], 'The prompts themselves.')
    PROMPT_FILE: str | None = param(None, 'A file with a prompt per line, or .jsonl with an object per line.')
    N_PROMPT: str | None = param(None, "Negative prompt where a line gives none; null: the network's own.")
    PROMPT_PREFIX: str = param('', 'Put before every prompt.')
    IMAGE_SIZE: int | tuple[int, int] | None = param(
        None, "Pixels, or [height, width], where a line gives none; null: the network's own.", least=1)

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if bool(cfg.PROMPTS) == bool(cfg.PROMPT_FILE):
            yield Fault('PROMPTS', f'give either PROMPTS (got {len(cfg.PROMPTS)}) or PROMPT_FILE (got {cfg.PROMPT_FILE})')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        lines = _prompts_of_file(self.PROMPT_FILE) if self.PROMPT_FILE else [{'prompt': p} for p in self.PROMPTS]
        common = {key: value for key, value in (('n_prompt', self.N_PROMPT), ('image_size', self.IMAGE_SIZE)) if value is not None}
        self.lines = [{**common, **line, 'prompt': self.PROMPT_PREFIX + line['prompt']} for line in lines]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.lines[index])

    def name_of(self, index: int) -> str:
        return f'prompt {index + 1} ({self.lines[index]["prompt"]:.40})'

    def collate(self, samples: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
        """Lists of prompts, negative prompts and seeds; every other setting once."""
        batch: dict[str, Any] = {}
        for key in {key: None for sample in samples for key in sample}:
            values = [sample.get(key) for sample in samples]
            for value, name in zip(values, names):
                if value is None or (key not in ('prompt', 'n_prompt', 'seed') and value != values[0]):
                    raise DataError(f'{names[0]} and {name} are drawn in one batch, but have {key} {values[0]!r} and {value!r}: '
                                    'make them equal, or set BATCH_SIZE: 1')
            batch[key] = values if key in ('prompt', 'n_prompt', 'seed') else values[0]
        return batch


def _stack(key: str, values: list[Any], names: list[str]) -> Any:
    if isinstance(values[0], (bool, int, float)):
        return torch.tensor(values)
    if not _is_numeric(values[0]):
        return values
    tensors = [torch.as_tensor(v) for v in values]
    for tensor, name in zip(tensors, names):
        if tensor.shape != tensors[0].shape:
            raise DataError(f'{key} has shape {list(tensors[0].shape)} in {names[0]}, but {list(tensor.shape)} in {name}: samples of one '
                            'batch need one shape; give the dataset a transform that makes it, '
                            'e.g. TRANSFORMS: [{NAME: RecordedCrop, SIZE: 512}]')
    return torch.stack(tensors)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, (bool, int, float)) for v in value)
    return isinstance(value, (Tensor, np.ndarray, np.generic))


# ---------------------------------------------------------------------------------------- one image
def load_image(path: str) -> Image.Image:
    """An image file as RGB, upright: the first frame, EXIF orientation applied, transparency laid on white, 16 bits scaled to 8.

    `info['original_size']` of the result is its (height, width). Raises UnreadableError for whatever cannot be decoded whole.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False    # other libraries switch it on; half a picture is a bad sample
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with Image.open(path, formats=FORMATS) as image:
                _refuse_bomb(image, os.path.getsize(path))
                image.load()
                image = to_rgb(_upright(image))
    except UnreadableError:
        raise
    except Exception as error:    # on damaged bytes, decoders raise anything: SyntaxError, struct.error, IndexError, ...
        raise UnreadableError(f'{type(error).__name__}: {error}'.replace(path, 'the file')) from error
    image.info = {'original_size': (image.height, image.width)}
    return image


def _refuse_bomb(image: Image.Image, size: int) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise UnreadableError(f'{image.width}x{image.height} pixels, more than the {MAX_PIXELS} that are allowed')
    if pixels > FREE_PIXELS and pixels > MAX_PIXELS_PER_BYTE * size:
        raise UnreadableError(f'{image.width}x{image.height} pixels out of {size} bytes: no picture packs so small, this is a bomb')


def to_rgb(image: Image.Image) -> Image.Image:
    """Any kind of image as 8-bit RGB."""
    if image.mode.startswith('I'):    # 16 bits; Pillow itself would clip all above 255 to white
        gray = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert('RGB')
    if image.mode == 'F':
        raise UnreadableError('pixels are floating-point numbers of unknown range: save it with 8 or 16 bits')
    if image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    return image.convert('RGB')


_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def to_tensor(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    """Float32 [C, H, W] in -1..1. Bytes are scaled; a tensor of floats is what a transform made it, and stays."""
    if isinstance(image, Image.Image):
        image = np.array(image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image[..., None] if image.ndim == 2 else image).movedim(-1, 0)
    image = image.as_subclass(Tensor)    # torchvision's own tensor class stays behind
    return image.float().div(127.5).sub(1).contiguous() if image.dtype == torch.uint8 else image.float().contiguous()


def to_mask(mask: Image.Image | Tensor) -> Tensor:
    """Float32 [1, H, W] in 0..1; bytes are scaled."""
    if isinstance(mask, Image.Image):
        mask = torch.from_numpy(np.array(mask.convert('L')))
    mask = mask.as_subclass(Tensor).reshape(1, *mask.shape[-2:])
    return mask.float().div(255) if mask.dtype == torch.uint8 else mask.float()


# ------------------------------------------------------------------------------- captions and their files
def clean_caption(text: str) -> str:
    """One line without space at its ends. Raises ValueError for what cannot be a caption."""
    if len(text) > MAX_CAPTION_BYTES:
        raise ValueError(f'longer than {MAX_CAPTION_BYTES} bytes')
    return re.sub(r'\s+', ' ', text).strip()


def _walk(folder: str) -> Iterator[str]:
    """Files below the folder, as paths with forward slashes, hidden ones left out."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(('.', '__MACOSX'))]
        yield from (os.path.relpath(os.path.join(root, f), folder).replace(os.sep, '/') for f in files if not f.startswith('.'))


def _records_of_metadata(path: str) -> list[Record]:
    rows = _csv_rows(path) if path.endswith('.csv') else ((n, _row(path, n, line)) for n, line in _lines(path) if line.strip())
    records: list[Record] = []
    columns: dict[str, None] = {}
    for number, row in rows:
        where = f'{path}, line {number}'
        columns.update(dict.fromkeys(row))
        name, text = row.get('file_name'), row.get('text')
        if not isinstance(name, str) or not name:
            raise DataError(f'{where}: expected a file_name, got the keys {", ".join(map(str, row)) or "(none)"}')
        if text is not None and not isinstance(text, str):
            raise DataError(f'{where}: text is a string, got {text!r:.60}')
        parts = name.replace('\\', '/').split('/')
        if '..' in parts or parts[0] == '' or ':' in parts[0] or '\0' in name:
            raise DataError(f'{where}: {name!r} leads out of the folder; file_name is a path below it')
        try:
            records.append((name, None if text is None else clean_caption(text)))
        except ValueError as error:
            raise DataError(f'{where}: the text is {error}') from error
    if records and 'text' not in columns:
        raise DataError(f'{path} has no text for any image, only {", ".join(columns)}: name the captions "text"')
    return records


def _prompts_of_file(address: str) -> list[dict[str, Any]]:
    with FS.get_from(address) as path:
        lines = [(number, line.strip()) for number, line in _lines(path) if line.strip()]
    if not lines:
        raise DataError(f'PROMPT_FILE: {address} holds no prompt')
    if not address.endswith('.jsonl'):
        return [{'prompt': line} for _, line in lines]
    rows = [_row(address, number, line) for number, line in lines]
    for (number, _), row in zip(lines, rows):
        if not isinstance(row.get('prompt'), str):
            raise DataError(f'{address}, line {number}: expected a "prompt", got the keys {", ".join(row) or "(none)"}')
    return rows


def _lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding='utf-8-sig') as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError as error:
        raise DataError(f'{path} is not UTF-8: {error}') from error
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}') from error


def _row(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path}, line {number}: not JSON ({error})') from error
    if not isinstance(row, dict):
        raise DataError(f'{path}, line {number}: expected an object, got {line[:60]}')
    return row


def _csv_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row:
                    raise DataError(f'{path}, line {reader.line_num}: more fields than headings; a text that holds a comma needs quotes')
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f'{path}: not CSV ({error})') from error
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}') from error
