"""Datasets: an index goes in, a dict comes out.

    image [3, H, W] float32 in -1..1 · prompt str · label int · mask [1, H, W] in 0..1 · original_size, crop_top_left, target_size [2]

A dataset of one's own is a class on BaseDataset with __len__ and __getitem__ (docs/data.md); order, batches, workers, keyed
randomness and the replacement of unreadable files are the loader's.
"""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from scepter.core.config import Config, plain
from scepter.core.errors import DataError
from scepter.core.faults import ConfigError, Fault
from scepter.core.logger import get_logger
from scepter.core.registry import TRANSFORMS
from scepter.core.schema import Component, param, parts
from scepter.data.buckets import Occupancy, Size, bucket_sizes, nearest
from scepter.data.captions import Captions, Texts
from scepter.data.collating import collate
from scepter.data.generators import ALL
from scepter.data.images import UnreadableError, load_image, size_of_image, to_mask, to_tensor
from scepter.data.index import Index
from scepter.data.order import Bucketed, Order, Shuffled
from scepter.data.sources import Source, code_of
from scepter.data.transforms import RecordedCrop

T = TypeVar('T')
PICTURES = ('image', 'video')    # what a sample's picture, or clip, is called
BLOCK = 1 << 18                  # pictures that are sorted into buckets at once


class BaseDataset(Component, base=True):
    """What every dataset is built on: the loader's settings, and the order of a sample's last steps."""

    BATCH_SIZE: int = param(4, 'Samples of one batch, per process.', least=1)
    NUM_WORKERS: int = param(0, 'Processes that read ahead; 0 reads in the main process. Samples are the same, to the bit.', least=0)
    PREFETCH: int = param(2, 'Batches that each worker reads ahead.', least=1)
    PIN_MEMORY: bool = param(False, 'Hand batches over in page-locked memory, which a GPU copies faster.')
    TIMEOUT: float = param(120.0, 'Seconds to wait for one batch before its worker counts as stuck and is replaced.', above=0)
    MAX_BAD_FRACTION: float = param(0.01, 'Share of the files that may be unreadable (two always may); 0: none may.', least=0, most=1)
    QUARANTINE: str | None = param(None, 'A file of names of samples, one a line, that are passed over: the data doctor writes one.')
    CHECKSUMS: str | None = param(None, 'A file that sha256sum wrote: a picture file with other bytes counts as unreadable.')

    def __len__(self) -> int:
        raise NotImplementedError(f'{type(self).__name__} has no __len__: return the number of samples of one epoch')

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at 0 <= index < len(self). Raises UnreadableError where only this sample is at fault."""
        raise NotImplementedError(f'{type(self).__name__} has no __getitem__: return the sample as a dict')

    def name_of(self, index: int) -> str:
        """What a message calls this sample: its path, where it has one."""
        return f'sample {index}'

    def samples_of(self, indices: Sequence[int], seed: Callable[[int], None]) -> list[dict[str, Any] | UnreadableError]:
        """The samples of a batch, or what is wrong with each.    seed: seeds what is drawn from, for the sample at a place among them"""
        found: list[dict[str, Any] | UnreadableError] = []
        for place, index in enumerate(indices):
            seed(place)
            try:
                found.append(self[index])
            except UnreadableError as error:
                found.append(error)
        return found

    def collate(self, samples: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """The samples of one batch as the network gets them: tensors, arrays, numbers and tuples of numbers stacked, the rest in lists.

        Raises DataError, with two of the names, where they have not the same keys or shapes.
        """
        return collate(samples, names)

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

    draws_from: Sequence[str] = ALL    # the generators that samples draw from (data/generators.py)

    # ---------------------------------------------------------------- what a cache asks (data/cache.py)
    mirrors = False                      # whether pictures are mirrored by chance
    draws_beside: Sequence[str] = ALL    # the generators that `beside` and `draws_mirror` draw from

    def beside(self, index: int) -> dict[str, Any]:
        """The sample without its picture and what transforms note of that; what is drawn for it is drawn here too, before all else."""
        return {key: value for key, value in self[index].items() if key not in PICTURES}

    def source_of(self, index: int) -> Source | None:
        """The bytes that the picture is made of; None: the picture itself is looked at, each time that a cache is opened."""
        return None

    def bytes_of(self, index: int) -> bytes:
        """Those of a source that is a cell. Raises UnreadableError or OSError."""
        raise NotImplementedError

    def view_of(self, index: int) -> Any:
        """What is done to the source, in plain values: where it changes, so does the picture."""
        return None

    def unmirrored(self) -> BaseDataset:
        """The same samples, none of them mirrored."""
        return self

    def draws_mirror(self, index: int) -> bool:
        """Whether the picture is mirrored, drawn as reading it would."""
        return False


class Record(NamedTuple):
    """One image of a dataset, in values that JSON has."""

    name: str                                # what messages call it: its path, where it has one
    place: Any                               # where the picture is, as `open_image` understands it
    texts: Texts | None = None               # its captions, where they are known already
    sidecar: Any = None                      # else where they are, as `texts_in` understands it; None: nowhere
    label: int | None = None
    size: Sequence[int] | None = None        # (height, width), where the source tells it
    beside: dict[str, Any] | None = None     # further pictures of the sample, e.g. its mask: key -> place
    stamp: Any = None                        # changes when the picture does, where that is known


class ImageTextDataset(BaseDataset):
    """Images with captions, wherever they lie: a subclass finds and opens them.    index  ->  image [3, H, W] in -1..1, prompt

    With BUCKETS also target_size (h, w), the sample's bucket, to which TRANSFORMS cut; RecordedCrop without a SIZE does.
    """

    PROMPT_PREFIX: str = param('', 'Put before every caption.')
    CAPTIONS: Captions = param({}, 'How the prompt is made of what is written of an image: tags shuffled, templates, one of several.')
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
        self.captions = Captions(self.cfg['CAPTIONS'], logger=logger)
        self.transforms = [TRANSFORMS.build(t, logger=logger) for t in self.TRANSFORMS]
        self.times: np.ndarray | None = None       # [N] how often each image comes, where that is not alike
        self.index = self.listed()
        self.missing_captions = self.index.told['missing']
        if self.missing_captions:
            self.logger.warning(f'{self.place}: {self.missing_captions} of {self.file_count} images have no caption, e.g. '
                                f"{self.index.told['without']}; their prompt is ''")
        self.rows = None if self.times is None else np.repeat(np.arange(self.file_count), self.times)
        self.sizes: list[Size] = []
        if self.BUCKETS is not None:
            self._sort()

    # ---------------------------------------------------------------- what a subclass says
    place: str    # what messages call all of it

    def sources(self) -> list[str]:
        """Sets `place`, and answers the local files that are read for what there is; where one changes, they are read again."""
        raise NotImplementedError

    def find(self) -> Iterable[Record]:
        """Each of the images. Asked after `sources`, unless an index of them is kept. Raises DataError."""
        raise NotImplementedError

    def open_image(self, place: Any) -> str | BinaryIO:
        """The file at a record's place, or the path of it. Raises UnreadableError or OSError."""
        raise NotImplementedError

    def texts_in(self, sidecar: Any) -> list[str]:
        """The captions at a record's sidecar, each in one line. Raises ValueError or OSError."""
        raise NotImplementedError

    @property
    def weights(self) -> Sequence[float]:
        """How often each kind of text is the prompt, against the others."""
        return (1.0,)

    def listed(self) -> Index:
        """All records and how many have no caption, from the index that is kept, or anew."""
        account = Account()
        sources, settings = self.sources(), {key: value for key, value in self.cfg.items() if key not in ImageTextDataset.para_dict}
        return Index.made(self.place, [type(self).__name__, plain(settings)], sources, lambda: account.of(self.find()), account.told,
                          self.logger)

    # ---------------------------------------------------------------- samples
    def __len__(self) -> int:
        return (self.file_count if self.rows is None else len(self.rows)) * self.REPEATS

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, words = self.record(index), self.beside(index)    # words first: what is drawn for them is drawn before all else
        first = self.transforms[0] if self.transforms else None
        load = partial(load_image, least=first.size_of(words) if isinstance(first, RecordedCrop) else None)
        sample: dict[str, Any] = {'image': self._read(record.place, load), **words}
        for key, place in (record.beside or {}).items():
            sample[key] = self._read(place, load_image if key == 'mask' else load)    # a mask is never blended
            (h, w), (height, width) = sample[key].info['original_size'], sample['image'].info['original_size']
            if (h, w) != (height, width):
                raise UnreadableError(f'its {key} is {w}x{h} pixels, the image {width}x{height}')
        for transform in self.transforms:
            sample = transform(sample)
        for key in ('image', *(record.beside or {})):
            sample[key] = to_mask(sample[key]) if key == 'mask' else to_tensor(sample[key])
        if self.sizes and sample['image'].shape[-2:] != sample['target_size']:
            raise DataError(f'{self.name_of(index)} is {tuple(sample["image"].shape[-2:])} after TRANSFORMS, but its bucket is '
                            f'{sample["target_size"]} (height, width): cut by {{NAME: RecordedCrop}} without a SIZE')
        return sample

    def record(self, index: int) -> Record:
        """Where the picture and the captions of a sample are."""
        return Record(*self.index.rows[self._row(index)])

    def prompt_of(self, record: Record) -> str:
        """The prompt that this draw gets. Raises UnreadableError."""
        texts = record.texts
        if texts is None and record.sidecar is not None:
            try:
                texts = [self.texts_in(record.sidecar)]
            except (OSError, ValueError, RecursionError) as error:    # UnicodeDecodeError is a ValueError
                raise UnreadableError(f'caption of {record.name}: {error}') from error
        return self.PROMPT_PREFIX + self.captions.prompt(texts or [], self.weights)

    def name_of(self, index: int) -> str:
        return self.record(index).name

    @property
    def file_count(self) -> int:
        return len(self.index.rows)

    # ---------------------------------------------------------------- what a cache asks
    def beside(self, index: int) -> dict[str, Any]:
        row = self._row(index)
        record = Record(*self.index.rows[row])
        sample: dict[str, Any] = {'prompt': self.prompt_of(record)}
        if record.label is not None:
            sample['label'] = record.label
        if self.sizes:
            sample['target_size'] = self.sizes[self.bucket_of[row]]
        return sample

    def source_of(self, index: int) -> Source | None:
        try:
            file = self.open_image(self.record(index).place)
        except (OSError, ValueError, DataError, UnreadableError):
            return None
        if isinstance(file, str):
            return Source(file)
        file.close()
        return None

    def view_of(self, index: int) -> Any:
        if further := self.record(index).beside:
            raise ConfigError(f'CACHE keeps the image of a sample, and not its {" and ".join(further)}: leave CACHE or BESIDE out')
        return self._view, self.sizes[self.bucket_of[self._row(index)]] if self.sizes else None

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

    @cached_property
    def draws_beside(self) -> Sequence[str]:    # type: ignore[override]
        drawing = [self, *(t for t in self.transforms if hasattr(t, 'draws_mirror'))]
        if not all(type(one).__module__.startswith('scepter.') for one in drawing):
            return ALL    # what is a user's own may draw from anything
        return ('python',) if self.mirrors or self.captions.has_choice or self.index.told['has_choice'] else ()

    def _row(self, index: int) -> int:
        """The record of a sample."""
        return index % self.file_count if self.rows is None else int(self.rows[index % len(self.rows)])

    def _read(self, place: Any, read: Callable[[str | BinaryIO], T]) -> T:
        try:
            file = self.open_image(place)
        except (OSError, ValueError, DataError) as error:
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
        bucket_of = np.tile(self.bucket_of if self.rows is None else self.bucket_of[self.rows], self.REPEATS)
        return [np.flatnonzero(bucket_of == b) for b in range(len(self.sizes))]

    def _sort(self) -> None:
        """Give each image its bucket, by its size; one that cannot be read is met, and replaced, when its turn comes."""
        shapes = self.index.sizes(self._measured)
        self.sizes, self.bucket_of = _sizes(self.cfg), np.full(len(shapes), -1, np.int16)
        found = Occupancy(self.sizes)
        for first in range(0, len(shapes), BLOCK):
            block, bucket_of = shapes[first:first + BLOCK], self.bucket_of[first:first + BLOCK]
            is_read = (block[:, 0] > 0) & (block[:, 1] > 0)
            read = block[is_read]
            bucket_of[is_read] = nearest(self.sizes, read[:, 0], read[:, 1])
            found.add(bucket_of[is_read], read)
        if not found.counts.any():
            raise DataError(f'{self.place}: not one of {self.file_count} images can be read')
        self.bucket_of[self.bucket_of < 0] = found.counts.argmax()
        self.logger.info(f'{self.place}: {found}')

    def _measured(self, before: Index | None, earlier: np.ndarray | None) -> np.ndarray:
        """[N, 2] int32 (height, width) of each picture, 0 where it cannot be read: from its header, unless it is known."""
        known = {} if before is None or earlier is None else {
            (row.name, str(row.stamp)): size for row, size in zip((Record(*r) for r in before.rows), earlier.tolist()) if row.stamp}
        shapes = np.zeros((self.file_count, 2), np.int32)
        for i, record in enumerate(Record(*row) for row in self.index.rows):
            if (size := record.size or known.get((record.name, str(record.stamp)))) is not None:
                shapes[i] = size
                continue
            with contextlib.suppress(UnreadableError):
                shapes[i] = self._read(record.place, size_of_image)
        return shapes


class Account:
    """Records on their way into an index: counts those without a caption, and sees whether any may have several."""

    def __init__(self) -> None:
        self.missing, self.without, self.has_choice = 0, '', False

    def of(self, records: Iterable[Record]) -> Iterator[list[Any]]:
        """Each record as a list that is as short as it can be."""
        for record in records:
            if not any(record.texts or []) and record.sidecar is None:
                self.missing, self.without = self.missing + 1, self.without or record.name
            self.has_choice = self.has_choice or record.sidecar is not None or sum(map(len, record.texts or [])) > 1
            row = list(record)
            while row[-1] is None:
                row.pop()
            yield row

    def told(self) -> dict[str, Any]:
        """What an index tells of all of them."""
        return {'missing': self.missing, 'without': self.without, 'has_choice': self.has_choice}


def _sizes(cfg: Config) -> list[Size]:
    shortest, longest = cfg.BUCKET_SIDES or (max(1, cfg.BUCKETS // 2), cfg.BUCKETS * 2)
    return bucket_sizes(cfg.BUCKETS, cfg.BUCKET_STEP, shortest, longest)
