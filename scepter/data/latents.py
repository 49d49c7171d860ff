"""Latents that an autoencoder gave earlier, out of record files (data/records.py): nothing is decoded or encoded in training."""
from __future__ import annotations

import math
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scepter.core.errors import DataError
from scepter.core.logger import get_logger
from scepter.core.registry import DATASETS
from scepter.core.schema import param
from scepter.core.stores import FS
from scepter.data.datasets import BaseDataset
from scepter.data.images import UnreadableError
from scepter.data.order import Bucketed, Order
from scepter.data.records import RecordReader


@DATASETS.register_class()
class LatentRecordDataset(BaseDataset):
    """Moments of images or clips, with what they show.    index  ->  moments [2C, h, w] or [2C, T, h, w] float16, and of these:

    label int; without one prompt, a str, or its features [L, F] float16 where those were cached; motion_flow float.
    A record has moments and shape; label, or caption (long) and text (short), each a string or {data, shape}; flow.
    """

    DATA_FOLDER: str = param(doc='Folder of the record files, local or in any store.')
    SECOND_FOLDER: str | None = param(None, 'Records of the same samples, in the same order; what they hold goes over the first.')
    CAPTION_PROB: float = param(0.5, 'How often the long caption is the prompt; else the short text, or the first sentence where there is '
                                     'none.', least=0, most=1)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.logger = logger or get_logger()
        self.readers = [_opened(folder) for folder in (self.DATA_FOLDER, self.SECOND_FOLDER) if folder is not None]
        sizes = [len(reader) for reader in self.readers]
        if sizes[0] != sizes[-1]:
            raise DataError(f'{self.DATA_FOLDER} holds {sizes[0]} records, but {self.SECOND_FOLDER} {sizes[-1]}: expected as many, '
                            'in the same order')
        features = {name for reader in self.readers for name in reader.features}
        if missing := {'moments', 'shape'} - features:
            raise DataError(f'{self.DATA_FOLDER} has no feature {" and ".join(sorted(missing))}, only {", ".join(sorted(features))}')

    def __len__(self) -> int:
        return len(self.readers[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = {name: value for reader in self.readers for name, value in reader[index].items()}
            sample: dict[str, Any] = {'moments': halves(record['moments'], record['shape'])}
            if 'label' in record:
                sample['label'] = record['label']
            elif 'caption' in record or 'text' in record:
                sample['prompt'] = self._prompt(record.get('caption'), record.get('text'))
            if 'flow' in record:
                sample['motion_flow'] = record['flow']
        except (ValueError, OSError) as error:
            raise UnreadableError(str(error)) from error
        return sample

    def order(self, seed: int, step: int) -> Order:
        """Shuffled; where moments have several shapes, each step takes those of one shape alone."""
        members = self._members
        small = [f'{list(shape)} ({len(indices)})' for shape, indices in members.items() if len(indices) < step]
        if len(members) > 1 and small:
            self.logger.warning(f'{self.DATA_FOLDER}: shapes with fewer samples than a step of {step} takes: {", ".join(small)}. '
                                'They come once in several epochs, and samples are then repeated')
        return Bucketed(seed, list(members.values()), step) if len(members) > 1 else super().order(seed, step)

    def batches(self, size: int) -> list[Sequence[int]]:
        return [indices[first:first + size].tolist() for indices in self._members.values() for first in range(0, len(indices), size)]

    @cached_property
    def _members(self) -> dict[tuple[int, ...], np.ndarray]:
        """The indices of the samples of each shape, the commonest first; what cannot be read is met, and replaced, among those."""
        reader = next(reader for reader in reversed(self.readers) if 'shape' in reader.features)
        shapes = reader.shapes()
        counts = Counter(shape for shape in shapes if shape is not None)
        common = counts.most_common(1)[0][0] if counts else ()
        found: dict[tuple[int, ...], list[int]] = {common: []}
        for index, shape in enumerate(shapes):
            found.setdefault(common if shape is None else shape, []).append(index)
        return {shape: np.array(indices, np.int64) for shape, indices in found.items()}

    def name_of(self, index: int) -> str:
        return self.readers[0].name_of(index)

    def collate(self, samples: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """Moments [B, ...] of one shape, label and motion_flow [B], prompt a list: features are of different length."""
        prompts = [sample.pop('prompt') for sample in samples if 'prompt' in sample]
        shapes = {tuple(sample['moments'].shape): name for sample, name in zip(samples, names)}
        if len(shapes) > 1:
            found = ' and '.join(f'{list(shape)} in {name}' for shape, name in shapes.items())
            raise DataError(f'a batch has moments of one shape, but there are {found}')
        return {**super().collate(samples, names), **({'prompt': prompts} if prompts else {})}

    def _prompt(self, caption: Any, text: Any) -> str | Tensor:
        """The long caption, or the short one."""
        wants_long = random.random() < self.CAPTION_PROB
        long, short = (words(value) for value in (caption, text))
        if len(short) == 0:    # none was written
            short = first_sentence(long) if isinstance(long, str) else long
        return long if wants_long and len(long) else short


def words(value: Any) -> str | Tensor:
    """What a record says of a caption: a string, or features [L, F]; empty where it says nothing."""
    if value is None or isinstance(value, str):
        return value or ''
    return halves(value['data'], value['shape']) if value['data'] else torch.empty(0, 0, dtype=torch.float16)


def halves(data: bytes, shape: list[int]) -> Tensor:
    """Bytes of float16, the lowest first, as a tensor. Raises ValueError where they do not fill the shape."""
    if len(data) != 2 * math.prod(shape) or min(shape, default=0) < 0:
        raise ValueError(f'{len(data)} bytes are not an array of halves of shape {shape}')
    return torch.from_numpy(np.frombuffer(bytearray(data), np.dtype('<f2')).astype(np.float16, copy=False).reshape(shape))


def first_sentence(caption: str) -> str:
    """Up to the first full stop, exclamation or question mark that is followed by a space; all of it where there is none."""
    return re.split(r'(?<=[.!?])\s', caption, maxsplit=1)[0]


def _opened(folder: str) -> RecordReader:
    with FS.get_dir_to_local_dir(folder, wait_finish=True) as local:
        return RecordReader(os.path.abspath(local))
