"""Datasets: an index goes in, a dict comes out.

    image [3, H, W] float32 in -1..1 · prompt str · label int · mask [1, H, W] in 0..1 · original_size, crop_top_left, target_size [2]

A dataset of one's own is a class on BaseDataset with __len__ and __getitem__ (docs/data.md); order, batches, workers, keyed
randomness and the replacement of unreadable files are the loader's.
"""
from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor

import scepter.data.transforms  # noqa: F401  fills TRANSFORMS
from scepter.core.config import Config, plain
from scepter.core.errors import DataError
from scepter.core.faults import Fault
from scepter.core.logger import get_logger
from scepter.core.registry import DATASETS, TRANSFORMS
from scepter.core.schema import Component, param, parts
from scepter.core.stores import FS
from scepter.data.buckets import Size, bucket_sizes, nearest
from scepter.data.captions import MAX_CAPTION_BYTES, Record, clean_caption, find_records, prompts_of_file
from scepter.data.images import UnreadableError, load_image, size_of_image, to_mask, to_tensor
from scepter.data.order import Bucketed, Order, Shuffled
from scepter.data.sources import Source

T = TypeVar('T')
PICTURES = ('image', 'video')    # what a sample's picture, or clip, is called


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

    def order(self, seed: int, step: int) -> Order:
        """Which sample each draw of training is (data/order.py).    step: samples of one step of the optimizer, over all processes"""
        return Shuffled(seed, len(self))

    def batches(self, size: int) -> list[Sequence[int]]:
        """The indices of each batch of a pass for evaluation: every sample once, up to `size` that can be in one batch together."""
        return [range(first, min(first + size, len(self))) for first in range(0, len(self), size)]

    @property
    def file_count(self) -> int:
        """How many different files the samples come from; MAX_BAD_FRACTION is a share of it."""
        return len(self)

    # ---------------------------------------------------------------- what a cache asks (data/cache.py)
    mirrors = False    # whether pictures are mirrored by chance

    def beside(self, index: int) -> dict[str, Any]:
        """The sample without its picture and what transforms note of that; what is drawn for it is drawn here too, before all else."""
        return {key: value for key, value in self[index].items() if key not in PICTURES}

    def source_of(self, index: int) -> Source | None:
        """The bytes that the picture is made of; None: the picture itself is looked at, each time that a cache is opened."""
        return None

    def view_of(self, index: int) -> Any:
        """What is done to the source, in plain values: where it changes, so does the picture."""
        return None

    def unmirrored(self) -> BaseDataset:
        """The same samples, none of them mirrored."""
        return self

    def draws_mirror(self, index: int) -> bool:
        """Whether the picture is mirrored, drawn as reading it would."""
        return False


class ImageTextDataset(BaseDataset):
    """Images with captions, wherever they lie: a subclass finds and opens them.    index  ->  image [3, H, W] in -1..1, prompt

    With BUCKETS also target_size (h, w), the sample's bucket, to which TRANSFORMS cut; RecordedCrop without a SIZE does.
    """

    PROMPT_PREFIX: str = param('', 'Put before every caption.')
    REPEATS: int = param(1, 'How often each image is seen in one epoch.', least=1)
    TRANSFORMS: list = parts(TRANSFORMS, 'What is done to a sample, in this order; the result must be of one size, or of its bucket.')
    BUCKETS: int | None = param(None, 'Cut each image to the nearest of several sizes of at most so many pixels squared; null: one size.',
                                least=1)
    BUCKET_STEP: int = param(64, 'Sides of buckets are multiples of this.', least=1)
    BUCKET_SIDES: tuple[int, int] | None = param(None, 'Shortest and longest side of a bucket; null: half and twice BUCKETS.', least=1)

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        for i, node in enumerate(cfg.TRANSFORMS):
            has_size = node.get('SIZE') is not None
            if node['NAME'] == 'RecordedCrop' and has_size == (cfg.BUCKETS is not None):
                yield Fault(f'TRANSFORMS[{i}]', 'has a SIZE, which would undo the BUCKETS: leave it out' if has_size else
                            'needs a SIZE, as there are no BUCKETS')
        if cfg.BUCKETS is not None and (not _sizes(cfg) or cfg.BUCKETS < cfg.BUCKET_STEP):
            yield Fault('BUCKETS', f'no size of {cfg.BUCKETS} pixels squared has sides in multiples of {cfg.BUCKET_STEP}'
                        + (f' from {cfg.BUCKET_SIDES[0]} to {cfg.BUCKET_SIDES[1]}' if cfg.BUCKET_SIDES else ''))

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.logger = logger or get_logger()
        self.transforms = [TRANSFORMS.build(t, logger=logger) for t in self.TRANSFORMS]
        self.records = self.find()
        without = [name for name, caption, *_ in self.records if caption is None]
        self.missing_captions = len(without)
        if without:
            self.logger.warning(f'{self.place}: {len(without)} of {len(self.records)} images have no caption, e.g. {without[0]}; '
                                "their prompt is ''")
        self.sizes: list[Size] = []
        if self.BUCKETS is not None:
            self._sort()

    # ---------------------------------------------------------------- what a subclass says
    place: str    # what messages call all of it

    def find(self) -> Sequence[Any]:
        """A tuple for each image: its name, its caption or where that is (None: there is none), and what else open_image needs."""
        raise NotImplementedError

    def open_image(self, record: Any) -> str | BinaryIO:
        """Its file, or the path of it. Raises UnreadableError or OSError."""
        raise NotImplementedError

    def caption_of(self, record: Any) -> str:
        """Its caption, whole, in one line. Raises UnreadableError."""
        raise NotImplementedError

    # ---------------------------------------------------------------- samples
    def __len__(self) -> int:
        return len(self.records) * self.REPEATS

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index % len(self.records)]
        sample: dict[str, Any] = {'image': self._decoded(record, load_image), **self.beside(index)}
        for transform in self.transforms:
            sample = transform(sample)
        sample['image'] = to_tensor(sample['image'])
        if 'mask' in sample:
            sample['mask'] = to_mask(sample['mask'])
        if self.sizes and sample['image'].shape[-2:] != sample['target_size']:
            raise DataError(f'{self.name_of(index)} is {tuple(sample["image"].shape[-2:])} after TRANSFORMS, but its bucket is '
                            f'{sample["target_size"]} (height, width): cut by {{NAME: RecordedCrop}} without a SIZE')
        return sample

    def name_of(self, index: int) -> str:
        return str(self.records[index % len(self.records)][0])

    @property
    def file_count(self) -> int:
        return len(self.records)

    # ---------------------------------------------------------------- what a cache asks
    def beside(self, index: int) -> dict[str, Any]:
        i = index % len(self.records)
        sample: dict[str, Any] = {'prompt': self.PROMPT_PREFIX + self.caption_of(self.records[i])}
        return {**sample, 'target_size': self.sizes[self.bucket_of[i]]} if self.sizes else sample

    def source_of(self, index: int) -> Source | None:
        try:
            file = self.open_image(self.records[index % len(self.records)])
        except (OSError, UnreadableError):
            return None
        if isinstance(file, str):
            return Source(file)
        file.close()
        return None

    def view_of(self, index: int) -> Any:
        return self._view, self.sizes[self.bucket_of[index % len(self.records)]] if self.sizes else None

    @cached_property
    def _view(self) -> Any:
        return [[plain(TRANSFORMS.filled(node)), code_of(TRANSFORMS.get(node.NAME))] for node in self.cfg.TRANSFORMS]

    @property
    def mirrors(self) -> bool:    # type: ignore[override]
        return any(getattr(transform, 'FLIP', 0) for transform in self.transforms)

    def unmirrored(self) -> ImageTextDataset:
        still = copy.copy(self)
        still.transforms = [t.unmirrored() if hasattr(t, 'unmirrored') else t for t in self.transforms]
        return still

    def draws_mirror(self, index: int) -> bool:
        return sum(t.draws_mirror() for t in self.transforms if hasattr(t, 'draws_mirror')) % 2 == 1

    def _decoded(self, record: Any, read: Callable[[str | BinaryIO], T]) -> T:
        try:
            file = self.open_image(record)
        except OSError as error:
            raise UnreadableError(f'{type(error).__name__}: {error}') from error
        if isinstance(file, str):
            return read(file)
        with file:
            return read(file)

    # ---------------------------------------------------------------- buckets
    def order(self, seed: int, step: int) -> Order:
        if not self.sizes:
            return super().order(seed, step)
        members = self._members()
        small = [f'{height}x{width} ({len(m)})' for (height, width), m in zip(self.sizes, members) if 0 < len(m) < step]
        if small:
            self.logger.warning(f'{self.place}: buckets with fewer samples than a step of {step} takes: {", ".join(small)}. '
                                'They come once in several epochs, and samples are then repeated')
        return Bucketed(seed, members, step)

    def batches(self, size: int) -> list[Sequence[int]]:
        if not self.sizes:
            return super().batches(size)
        return [members[first:first + size].tolist() for members in self._members() for first in range(0, len(members), size)]

    def _members(self) -> list[np.ndarray]:
        """The indices of each bucket's samples."""
        bucket_of = np.tile(self.bucket_of, self.REPEATS)
        return [np.flatnonzero(bucket_of == b) for b in range(len(self.sizes))]

    def _sort(self) -> None:
        """Give each image its bucket, by its header; one that cannot be read is met, and replaced, when its turn comes."""
        shapes = np.zeros((len(self.records), 2), np.int64)
        for i, record in enumerate(self.records):
            with contextlib.suppress(UnreadableError):
                shapes[i] = self._decoded(record, size_of_image)
        is_read = shapes.all(1)
        if not is_read.any():
            raise DataError(f'{self.place}: not one of {len(self.records)} images can be read')
        self.sizes = _sizes(self.cfg)
        self.bucket_of = np.zeros(len(self.records), np.int64)
        self.bucket_of[is_read] = nearest(self.sizes, shapes[is_read, 0], shapes[is_read, 1])
        counts = np.bincount(self.bucket_of[is_read], minlength=len(self.sizes))
        self.bucket_of[~is_read] = counts.argmax()
        filled = ', '.join(f'{height}x{width} ({count})' for (height, width), count in zip(self.sizes, counts) if count)
        self.logger.info(f'{self.place}: images by height x width of their bucket: {filled}')


def code_of(transform: Any) -> str:
    """A digest of the file that a transform of a user's own is written in; empty for ours and a library's, whose arguments say it all."""
    if transform.__module__.split('.')[0] in ('scepter', 'torchvision'):
        return ''
    try:
        return hashlib.sha256(inspect.getsource(sys.modules[transform.__module__]).encode()).hexdigest()
    except (OSError, TypeError, KeyError):
        return ''


def _sizes(cfg: Config) -> list[Size]:
    shortest, longest = cfg.BUCKET_SIDES or (max(1, cfg.BUCKETS // 2), cfg.BUCKETS * 2)
    return bucket_sizes(cfg.BUCKETS, cfg.BUCKET_STEP, shortest, longest)


@DATASETS.register_class()
class ImageTextFolderDataset(ImageTextDataset):
    """A folder of images with their captions.    index  ->  image [3, H, W] float32 in -1..1, prompt str

    Captions come from metadata.jsonl or metadata.csv in the folder (file_name, text), else from a .txt or .caption file beside
    each image; the folder is then searched to its bottom. Raises DataError where there is nothing to read.
    """

    DATA_FOLDER: str = param(doc='Folder of the images, local or in any store.')

    def find(self) -> list[Record]:
        self.place = self.DATA_FOLDER
        with FS.get_dir_to_local_dir(self.DATA_FOLDER, wait_finish=True) as folder:
            self.folder = os.path.abspath(folder)
        return find_records(self.folder, self.DATA_FOLDER)

    def open_image(self, record: Record) -> str:
        return os.path.join(self.folder, record[0])

    def name_of(self, index: int) -> str:
        return os.path.join(self.folder, super().name_of(index))

    def caption_of(self, record: Record) -> str:
        caption = record[1]
        if not isinstance(caption, Path):
            return caption or ''
        try:
            with open(os.path.join(self.folder, caption), 'rb') as file:
                return clean_caption(file.read(MAX_CAPTION_BYTES + 1).decode('utf-8-sig'))
        except (OSError, ValueError) as error:    # UnicodeDecodeError is one
            raise UnreadableError(f'caption {caption}: {error}') from error


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
        lines = prompts_of_file(self.PROMPT_FILE) if self.PROMPT_FILE else [{'prompt': p} for p in self.PROMPTS]
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
