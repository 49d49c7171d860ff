"""How cache_latents.py works: samples are cut into chunks, whoever is free takes the next, and what is done appears whole.

    TARGET/cache.json              what is cached, and how: a second start must mean the same
    TARGET/.parts/claims           byte k is locked by the process that works on chunk k; the lock dies with it
    TARGET/.parts/00000007/        chunk 7: records of its own
    TARGET/00000.data .index       a shard: its chunks behind one another; they are then taken away
    TARGET/METADATA                written last: the folder is whole

Nothing depends on the locks but that work is not done twice: a chunk's bytes follow from its samples alone, and it appears by a rename.
"""
from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scepter.core import jsonl
from scepter.core.config import Config
from scepter.core.disk import atomic
from scepter.core.errors import DataError
from scepter.core.logger import duration, get_logger
from scepter.core.registry import DATASETS
from scepter.core.schema import schema_of
from scepter.core.stores import FS
from scepter.data.cache import Pictures
from scepter.data.captions import clean_caption
from scepter.data.clips import VIDEO_SUFFIXES, find_clips, read_clip
from scepter.data.folders import Found, find_records
from scepter.data.images import UnreadableError, load_image
from scepter.data.kept import encoder_word
from scepter.data.motion import motion_score
from scepter.data.records import RecordWriter, join_shards, write_metadata
from scepter.data.transforms import RecordedCrop
from scepter.models.autoencoder import AutoencoderKL
from scepter.models.autoencoder_video import VideoAutoencoderKL
from scepter.models.nova.model import by_frames
from scepter.models.resting import fingerprint
from scepter.models.restore import restore
from scepter.weights import local_copy, read_json

SAID_EVERY = 5.0    # seconds between lines of progress
PAUSE = 0.2         # seconds until a process that has nothing left to take looks again


# ---------------------------------------------------------------- the autoencoder
def open_autoencoder(path: str, device: str | None) -> Any:
    """The autoencoder of a published folder, or of a checkpoint of ours: itself, or the first stage of a network."""
    with local_copy(path) as local:
        config = local / 'config.json'
        is_published = local.is_dir() and config.is_file()
        is_of_clips = is_published and 'OpenSora' in read_json(config).get('_class_name', '')
    if is_published:
        found: Any = (VideoAutoencoderKL if is_of_clips else AutoencoderKL).from_pretrained(path)
    else:
        whole = restore(path)
        found = whole if hasattr(whole, 'encode') else getattr(whole, 'first_stage_model', None)
        if found is None:
            raise DataError(f'{path} holds a {type(whole).__name__}, which has no autoencoder')
    rank = int(os.environ.get('LOCAL_RANK', 0))
    place = device or (f'cuda:{rank % torch.cuda.device_count()}' if torch.cuda.is_available() else 'cpu')
    return found.to(place).eval().requires_grad_(False)


def arithmetic_of(dtype: str, autoencoder: torch.nn.Module) -> torch.dtype:
    """The type that `dtype` means: of auto, float16 on CUDA, else float32."""
    is_on_cuda = next(autoencoder.parameters()).device.type == 'cuda'
    return getattr(torch, ('float16' if is_on_cuda else 'float32') if dtype == 'auto' else dtype)


# ---------------------------------------------------------------- the samples
class Sample(NamedTuple):
    """What is read of one: pixels [H, W, 3] or [T, H, W, 3] uint8, and what else stands in its record."""
    pixels: np.ndarray
    told: dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """The samples of a folder, in their order."""
    folder: str
    records: Sequence[Found]
    labels: dict[str, int] | None      # the number of each class
    size: tuple[int, int] | None       # height, width
    frames: int | None                 # of a clip at most; None: images
    every: int
    side: int                          # sides of a picture are multiples of it
    time: int                          # frames of a clip are 1 more than a multiple of it

    @classmethod
    def find(cls, source: str, autoencoder: Any, *, clips: bool, labels: bool, size: tuple[int, int] | None, frames: int,
             every: int) -> Samples:
        """Those of a folder in any store. Raises DataError where there are none, or the size is none that the autoencoder takes."""
        side = autoencoder.size_factor
        if size is not None and (size[0] % side or size[1] % side):
            raise DataError(f'--size {size[0]}x{size[1]}: the autoencoder makes pictures {side} times smaller, use multiples of {side}')
        with FS.get_dir_to_local_dir(source, wait_finish=True) as local:
            folder = os.path.abspath(local)
        clips = clips or any(name.lower().endswith(VIDEO_SUFFIXES) for _, _, names in os.walk(folder) for name in names)
        records = (find_clips if clips else find_records)(folder, source)
        classes = sorted({Path(name).parts[0] for name, _ in records if len(Path(name).parts) > 1}) if labels else []
        if labels and any(len(Path(name).parts) < 2 for name, _ in records):
            raise DataError(f'--labels: every sample of {source} lies in the folder of its class, but some lie beside those')
        return cls(folder, records, {name: i for i, name in enumerate(classes)} if labels else None, size, frames if clips else None,
                   every, side, getattr(autoencoder, 'time_factor', None) or 1)

    @property
    def features(self) -> dict[str, Any]:
        """Of the records, as NOVA's own program writes them."""
        told = {'label': 'int64'} if self.labels is not None else {'caption': 'string', 'text': 'string'}
        return {'moments': 'bytes', **told, 'shape': ['int64'], **({'flow': 'float64'} if self.frames else {})}

    def told(self) -> str:
        """What they are, in words."""
        what = f'{len(self.records)} {"clips" if self.frames else "images"}'
        if self.labels is not None:
            return f'{what} of {len(self.labels)} classes'
        without = sum(caption is None for _, caption in self.records)
        return f'{what}, {without} of them without a caption' if without else what

    def read(self, index: int) -> Sample:
        """Raises UnreadableError where the sample cannot be decoded whole."""
        name, caption = self.records[index]
        path = os.path.join(self.folder, name)
        try:
            pictures = [load_image(path)] if self.frames is None else read_clip(path, self.frames, self.every)
            if self.labels is not None:
                told: dict[str, Any] = {'label': self.labels[Path(name).parts[0]]}
            else:
                told = {'caption': self._text(caption), 'text': self._text(_short_of(self.folder, name))}
        except (OSError, ValueError) as error:
            raise UnreadableError(f'{type(error).__name__}: {error}') from error
        fitted = np.stack([np.asarray(self._fitted(picture)) for picture in pictures[:self._whole(len(pictures))]])
        if self.frames is None:
            return Sample(fitted[0], told)
        return Sample(fitted, {**told, 'flow': motion_score(torch.from_numpy(fitted))})

    def _whole(self, frames: int) -> int:
        """The most of so many frames that make whole latents."""
        return 1 + (frames - 1) // self.time * self.time

    def _fitted(self, picture: Image.Image) -> Image.Image:
        size = self.size or (picture.height // self.side * self.side, picture.width // self.side * self.side)
        if 0 in size:
            raise UnreadableError(f'{picture.height}x{picture.width} pixels are less than one latent of {self.side}x{self.side}')
        if self.size is not None:
            return RecordedCrop({'SIZE': list(size)})({'image': picture})['image']
        top, left = (picture.height - size[0]) // 2, (picture.width - size[1]) // 2
        return picture.crop((left, top, left + size[1], top + size[0]))

    def _text(self, caption: list[str] | Path | None) -> str:
        if not isinstance(caption, Path):
            return caption[0] if caption else ''
        with open(os.path.join(self.folder, caption), encoding='utf-8-sig') as file:
            return clean_caption(file.read())


def _short_of(folder: str, name: str) -> Path | None:
    """The short caption beside a sample, where there is one."""
    stem = name if os.path.isdir(os.path.join(folder, name)) else os.path.splitext(name)[0]
    return Path(f'{stem}.short.txt') if os.path.isfile(os.path.join(folder, f'{stem}.short.txt')) else None


# ---------------------------------------------------------------- the work
class Work:
    """Chunks of `batch` samples, `chunks_per_shard` to a shard, done by this process and whoever else works on the same target."""

    def __init__(self, target: Path, samples: Samples, autoencoder: Any, batch: int, chunks_per_shard: int, workers: int):
        self.target, self.parts, self.samples, self.autoencoder = target, target / '.parts', samples, autoencoder
        self.batch, self.chunks_per_shard, self.workers = batch, chunks_per_shard, workers
        self.chunks = -(-len(samples.records) // batch)
        self.shards = -(-self.chunks // chunks_per_shard)
        self.todo: deque[int] = deque()
        self.begin = self.said = time.monotonic()
        self.encoded = 0

    def carry_out(self) -> str:
        """Do what nobody else does until all is done. Answers a sentence. Raises DataError where another cache is there."""
        self._agree_on_plan()
        get_logger().info(f'{self.target}: {self.samples.told()}')
        try:
            if not self._is_whole:
                atomic.make_folder(self.parts)
                with Claims(self.parts / 'claims') as self.claims, ThreadPoolExecutor(max(1, self.workers)) as pool:
                    self.before = self._done()
                    self._work(pool)
        except FileNotFoundError:    # whoever finished has tidied up meanwhile
            if not self._is_whole:
                raise
        self._tidy()
        return self._told()

    @property
    def _is_whole(self) -> bool:
        return (self.target / 'METADATA').is_file()

    def _work(self, pool: ThreadPoolExecutor) -> None:
        pending: deque[tuple[int, list[Future[Sample]]]] = deque()
        while True:
            while len(pending) < 2 and (chunk := self._take()) is not None:    # one is read while another is encoded
                pending.append((chunk, [pool.submit(self.samples.read, i) for i in self._indices(chunk)]))
            if pending:
                self._write(*pending.popleft())
                continue
            self._join_what_is_whole()
            if self._is_whole:
                return
            self.todo.extend(self._missing())
            if not self.todo and all(self._stem(shard).with_suffix('.index').is_file() for shard in range(self.shards)):
                self._finish()
            elif not any(self.claims.is_free(chunk) for chunk in self.todo):
                time.sleep(PAUSE)    # others are at work on what is left; should one of them end, its work is taken up

    # ------------------------------------------------ chunks
    def _take(self) -> int | None:
        """The next chunk that is neither done nor taken; now it is ours."""
        while self.todo:
            chunk = self.todo.popleft()
            if self.claims.take(chunk):
                if not self._is_done(chunk):
                    return chunk
                self.claims.release(chunk)
        return None

    def _indices(self, chunk: int) -> range:
        return range(chunk * self.batch, min((chunk + 1) * self.batch, len(self.samples.records)))

    def _part(self, chunk: int) -> Path:
        return self.parts / f'{chunk:08d}'

    def _stem(self, shard: int) -> Path:
        return self.target / f'{shard:05d}'

    def _is_done(self, chunk: int) -> bool:
        return self._part(chunk).is_dir() or self._stem(chunk // self.chunks_per_shard).with_suffix('.index').is_file()

    def _missing(self) -> list[int]:
        """What nobody has done, by one look into each folder: for a million samples that is less than a second."""
        joined = {int(name[:-len('.index')]) for name in os.listdir(self.target) if name.endswith('.index') and not name.startswith('.')}
        parts = {int(name) for name in os.listdir(self.parts) if name.isdecimal()}
        return [chunk for chunk in range(self.chunks) if chunk not in parts and chunk // self.chunks_per_shard not in joined]

    def _write(self, chunk: int, futures: Sequence[Future[Sample]]) -> None:
        """Encode a chunk; it appears whole."""
        found, skipped = {}, []
        for index, future in zip(self._indices(chunk), futures):
            try:
                found[index] = future.result()
            except UnreadableError as error:
                skipped.append({'file': self.samples.records[index][0], 'why': str(error)})
                get_logger().warning(f'{self.samples.records[index][0]} is left out: {error}')
        moments = self._moments(found)
        folder = atomic.beside(self._part(chunk), 'tmp')
        folder.mkdir()
        with RecordWriter(folder, self.samples.features) as writer:
            for index, sample in found.items():
                x = moments[index]
                writer.write({'shape': x.shape, 'moments': x.tobytes(), **sample.told})
        jsonl.append(folder / 'skipped.jsonl', skipped)
        for file in folder.iterdir():
            atomic.sync(file)
        try:
            atomic.publish(folder, self._part(chunk))
        except OSError:    # somebody whose lock we did not see was quicker, with the same bytes
            if not self._is_done(chunk):
                raise
            shutil.rmtree(folder)
        self.claims.release(chunk)
        self.encoded += len(found)
        self._join(chunk // self.chunks_per_shard)
        self._say()

    @torch.no_grad()
    def _moments(self, samples: dict[int, Sample]) -> dict[int, np.ndarray]:
        """Of each sample, [2C, h, w] or [2C, t, h, w] float16; those of one shape are encoded together."""
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index, sample in samples.items():
            shapes.setdefault(sample.pixels.shape, []).append(index)
        found = {}
        for members in shapes.values():
            pixels = torch.from_numpy(np.stack([samples[i].pixels for i in members])).movedim(-1, 1)    # [B, 3, (T,) H, W]
            moments = self._encode(pixels.to(next(self.autoencoder.parameters()))).half().cpu().numpy()
            for index, x in zip(members, moments):
                if not np.isfinite(x).all():
                    raise DataError(f'{self.samples.records[index][0]}: the moments are not finite in float16; try --dtype float32')
                found[index] = np.ascontiguousarray(x)
        return found

    def _encode(self, pixels: Tensor) -> Tensor:
        x = pixels.sub(127.5).div(127.5)
        is_of_clips = getattr(self.autoencoder, 'time_factor', None) is not None
        return self._parameters(x) if is_of_clips else by_frames(self._parameters, x)

    def _parameters(self, x: Tensor) -> Tensor:
        return self.autoencoder.encode(x).latent_dist.parameters

    # ------------------------------------------------ shards
    def _join_what_is_whole(self) -> None:
        for shard in range(self.shards):
            self._join(shard)

    def _join(self, shard: int) -> None:
        """Put the chunks of a shard together where all are there; then take them away."""
        chunks = range(shard * self.chunks_per_shard, min((shard + 1) * self.chunks_per_shard, self.chunks))
        parts, index = [self._part(chunk) for chunk in chunks], self._stem(shard).with_suffix('.index')
        if not (index.is_file() or all(part.is_dir() for part in parts)) or not self.claims.take(self.chunks + shard):
            return
        try:
            if not index.is_file():
                self._write_shard(parts, self._stem(shard))
            for part in parts:
                if part.is_dir():
                    atomic.trash(part)
        except FileNotFoundError:    # somebody whose lock we did not see has done the same meanwhile
            if not index.is_file():
                raise
        self.claims.release(self.chunks + shard)

    def _write_shard(self, parts: Sequence[Path], stem: Path) -> None:
        skipped = b''.join((part / 'skipped.jsonl').read_bytes() for part in parts if 'skipped.jsonl' in os.listdir(part))
        if skipped:
            with atomic.replacing(stem.with_suffix('.skipped.jsonl')) as file:
                file.write_bytes(skipped)
        join_shards(parts, stem)

    def _finish(self) -> None:
        """All shards are there: say so."""
        entries = sum(self._stem(shard).with_suffix('.index').read_bytes().count(b'\n') for shard in range(self.shards))
        if not entries:
            raise DataError(f'not one of {len(self.samples.records)} samples of {self.samples.folder} can be read')
        if self.claims.take(self.chunks + self.shards):
            write_metadata(self.target, self.samples.features, entries)

    def _tidy(self) -> None:
        """The folder is whole: take away what no longer serves, also what writers left that were killed."""
        for left in self.target.glob('.tmp-*'):
            left.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    # ------------------------------------------------ words
    def _agree_on_plan(self) -> None:
        """Write down what is cached, or hold it against what stands there."""
        s = self.samples
        names = json.dumps([(name, None if caption is None else str(caption)) for name, caption in s.records])
        plan = {'samples': len(s.records), 'names': hashlib.sha256(names.encode()).hexdigest(), 'features': sorted(s.features),
                'size': list(s.size) if s.size else None, 'frames': s.frames, 'every': s.every, 'labels': s.labels, 'batch': self.batch,
                'shard': self.batch * self.chunks_per_shard, 'dtype': str(next(self.autoencoder.parameters()).dtype),
                'autoencoder': fingerprint(self.autoencoder)}
        file = self.target / 'cache.json'
        atomic.make_folder(self.target)
        if not file.is_file():
            found = sorted(path.name for path in self.target.iterdir() if not path.name.startswith('.'))
            if found and not file.is_file():    # else another process has begun meanwhile
                raise DataError(f'{self.target} holds {found[0]}: give an empty folder, or one that this command began')
            with atomic.replacing(file) as new:
                new.write_text(json.dumps(plan, indent=2) + '\n', encoding='utf-8')
        there = json.loads(file.read_text(encoding='utf-8'))
        differing = [f'{key} {there.get(key)!r:.60} there, {value!r:.60} now' for key, value in plan.items() if there.get(key) != value]
        if differing:
            raise DataError(f'{self.target} was begun otherwise: {"; ".join(differing)}. Give another folder, or remove it')

    def _done(self) -> int:
        """Samples that are done, by whomever."""
        return min((self.chunks - len(self._missing())) * self.batch, len(self.samples.records))

    def _say(self) -> None:
        now = time.monotonic()
        if now - self.said < SAID_EVERY:
            return
        self.said, done, total = now, self._done(), len(self.samples.records)
        pace = (done - self.before) / (now - self.begin)    # of all processes
        left = duration((total - done) / pace) if pace else '?'
        what = 'clips' if self.samples.frames else 'images'
        get_logger().info(f'{done}/{total} {what}  {pace:.3g} {what}/s, {self.encoded / (now - self.begin):.3g} here  {left} left')

    def _told(self) -> str:
        entries = json.loads((self.target / 'METADATA').read_text(encoding='utf-8'))['entries']
        left_out = len(self.samples.records) - entries
        here = f', {self.encoded} of them by this process in {duration(time.monotonic() - self.begin)}' if self.encoded else ''
        lost = f'; {left_out} samples could not be read, see *.skipped.jsonl' if left_out else ''
        return f'{self.target}: {entries} records{here}{lost}'


# ---------------------------------------------------------------- shards for SOLVER.CACHE
def fill_shards(source: str, target: str, autoencoder: Any, size: tuple[int, int], arithmetic: torch.dtype, batch: int) -> str:
    """Moments of images as a run keeps them itself (docs/data.md, "Latents computed once"). Answers the lines of YAML that read them.

    Each row is under the key that such a run asks for, so what is there already stays, and what has changed is computed anew. Of torchrun's
    processes each takes a part of the shards.
    """
    data = {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': source, 'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': list(size)}]}
    word = encoder_word(fingerprint(autoencoder), arithmetic, 'float32')
    pictures = Pictures(DATASETS.build(Config(data)), Path(target), word, torch.float16)
    parts = pictures.missing()[int(os.environ.get('RANK', 0))::int(os.environ.get('WORLD_SIZE', 1))]
    device = next(autoencoder.parameters()).device

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, arithmetic, enabled=arithmetic != torch.float32):
            return autoencoder.encode(images.to(device)).latent_dist.parameters

    pictures.fill(encode, batch, parts)
    declared, name = schema_of(type(autoencoder)), str(arithmetic).removeprefix('torch.')
    own = {key: value for key, value in autoencoder.cfg.items() if key not in declared or declared[key].default != value}
    return str(Config({'SOLVER': {'MODEL': {'FIRST_STAGE_MODEL': own}, 'TRAIN_DATA': data, 'DTYPE': name,
                                  'CACHE': {'FOLDER': target, 'DTYPE': 'float16'}}})).rstrip()


class Claims:
    """Byte k of a file is locked by whoever works on k. The system lets go of it when the process ends, however it ends."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Claims:
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def take(self, number: int) -> bool:
        """Whether it is ours now."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            return False
        return True

    def is_free(self, number: int) -> bool:
        """Whether nobody else holds it."""
        is_ours = self.take(number)
        if is_ours:
            self.release(number)
        return is_ours

    def release(self, number: int) -> None:
        """Let others have it."""
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, number)
