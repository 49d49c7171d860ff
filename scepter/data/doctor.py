"""Reads all of a dataset once, and says what is wrong with it.

    examination = examine(dataset, step=64, cut=what_is_cut)
    examination.complaints['near duplicate']       [Complaint(number, name, 'of photos/3.png'), ...]

A sample is read as training reads it, nothing mirrored, by the dataset's own workers. Two pictures are near duplicates where their
difference hashes (of 9x8 gray pixels) differ in at most NEAR_BITS of 64, and no colour of 4x4 by more than NEAR_COLOUR.
"""
from __future__ import annotations

import base64
import html
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from scepter.core.disk import atomic
from scepter.data.cache import digest_of
from scepter.data.datasets import PICTURES, BaseDataset
from scepter.data.generators import seed_generators
from scepter.data.guard import Guard
from scepter.data.images import UnreadableError, size_of_image
from scepter.data.kept import Clock
from scepter.data.loader import OrderedLoader

NEAR_BITS, NEAR_COLOUR = 4, 10    # of 64; of 255
COMPARED = 64                     # pictures of one quarter of a hash that a new one is held against: thousands of white ones have the same
SHOWN = 60                        # thumbnails of each kind
SIDE = 112                        # pixels of a thumbnail

# kind of complaint -> what it means; those that training had better not see come first
KINDS = {
    'unreadable': 'cannot be read; training would put another sample in its place',
    'checksum': 'its bytes are not those that CHECKSUMS tells',
    'failing': 'reading it raises an error that would end a training',
    'duplicate': 'has the bytes of another sample',
    'near duplicate': 'looks like another sample',
    'tiny': 'is smaller than half of what it is made',
    'empty caption': 'has no words',
    'cut caption': 'has more words than the text encoder reads',
    'small bucket': 'its bucket has fewer samples than a step of training takes, so that they come several times in a step',
}
QUARANTINED = ('unreadable', 'checksum', 'failing', 'duplicate')


class Complaint(NamedTuple):
    """One thing that is wrong with one sample."""
    number: int     # its index in the dataset
    name: str
    reason: str


class Seen(NamedTuple):
    """What is known of a sample that was read."""
    number: int
    name: str
    fault: tuple[str, str] | None     # (kind, reason) where it could not be read
    prompt: str | None = None
    digest: str = ''                  # of its source, or of the picture where it has none
    look: tuple[int, bytes] | None = None    # (64 bits, 4x4x3 colours)
    size: tuple[int, int] | None = None      # (height, width) of the source,
    made: tuple[int, int] | None = None      # ... and of what it is made


class Examination(NamedTuple):
    """What was found."""
    samples: int
    complaints: dict[str, list[Complaint]]

    def quarantine(self, kinds: Sequence[str] = QUARANTINED) -> list[dict[str, str]]:
        """The samples that a training had better pass over, each once, with a reason. Of duplicates the first stays."""
        rows = {c.name: f'{kind}: {c.reason}' for kind in reversed(kinds) for c in self.complaints.get(kind, ())}
        return [{'name': name, 'reason': reason} for name, reason in sorted(rows.items())]


def examine(dataset: BaseDataset, step: int, cut: Callable[[str], str] | None = None) -> Examination:
    """Read every sample once.

    step: samples of one step of training, over all processes.  cut: what the text encoder would not read of a prompt.
    """
    complaints: dict[str, list[Complaint]] = defaultdict(list)
    first_of: dict[str, str] = {}     # digest -> the name that it was first seen under
    names, looks = set[str](), Looks()
    clock = Clock(len(dataset), 'samples', dataset.logger, word='doctor')
    for batch, _ in OrderedLoader(_Examined(dataset), 8):
        for seen in batch['seen']:
            clock.tick(1)
            if seen.name in names:    # a sample that comes several times in an epoch
                continue
            names.add(seen.name)
            for kind, reason in _complaints_of(seen, first_of, looks, cut):
                complaints[kind].append(Complaint(seen.number, seen.name, reason))
    for complaint in _small_buckets(dataset, step):
        complaints['small bucket'].append(complaint)
    return Examination(len(names), {kind: sorted(complaints[kind]) for kind in KINDS if kind in complaints})


def _complaints_of(seen: Seen, first_of: dict[str, str], looks: Looks, cut: Callable[[str], str] | None) -> Iterator[tuple[str, str]]:
    if seen.fault is not None:
        yield seen.fault
        return
    if (first := first_of.setdefault(seen.digest, seen.name)) != seen.name:
        yield 'duplicate', f'of {first}'
    elif seen.look is not None and (near := looks.near(*seen.look, seen.name)) is not None:
        yield 'near duplicate', f'of {near}'
    if seen.size is not None and seen.made is not None and 2 * max(seen.size) < max(seen.made):
        yield 'tiny', f'{seen.size[1]}x{seen.size[0]} pixels, made {seen.made[1]}x{seen.made[0]}'
    if seen.prompt is not None:
        if not seen.prompt.strip():
            yield 'empty caption', ''
        elif cut is not None and (lost := cut(seen.prompt)):
            yield 'cut caption', f'without "{lost}"'


def _small_buckets(dataset: BaseDataset, step: int) -> Iterator[Complaint]:
    """The first sample of each bucket that cannot fill a step."""
    if dataset.order(0, step).together > 1:
        for group in dataset.batches(max(1, len(dataset))):
            if len(group) < step:
                yield Complaint(int(group[0]), dataset.name_of(int(group[0])), f'{len(group)} samples, of which a step takes {step}')


class _Examined(BaseDataset):
    """A dataset whose samples are what the doctor sees of them."""

    def __init__(self, dataset: BaseDataset):
        self.__dict__.update(cfg={**dataset.cfg, 'QUARANTINE': None, 'CHECKSUMS': None}, logger=dataset.logger)
        self.dataset, self.guard = dataset.unmirrored(), Guard(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, size: int) -> list[Sequence[int]]:
        return [range(first, min(first + size, len(self))) for first in range(0, len(self), size)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.dataset.name_of(index)
        try:
            self.guard.check(index)
        except UnreadableError as error:
            return {'seen': Seen(index, name, ('checksum', str(error).removeprefix('checksum: ')))}
        seed_generators(index)
        try:
            sample = self.dataset[index]
        except UnreadableError as error:
            return {'seen': Seen(index, name, ('unreadable', str(error)))}
        except Exception as error:    # a dataset of the user's own may raise anything, and the others are to be seen too
            return {'seen': Seen(index, name, ('failing', f'{type(error).__name__}: {error}'))}
        return {'seen': self._seen(index, name, sample)}

    def _seen(self, index: int, name: str, sample: dict[str, Any]) -> Seen:
        prompt = sample['prompt'] if isinstance(sample.get('prompt'), str) else None
        picture = next((sample[key] for key in (*PICTURES, 'moments') if isinstance(sample.get(key), Tensor)), None)
        source, digest, size = self.dataset.source_of(index), '', None
        if source is not None and not source.cell:
            digest = source.digest()
            with source.open() as file:
                size = size_of_image(file)
        elif picture is not None:
            digest = digest_of(picture)
        if picture is None or 'moments' in sample:
            return Seen(index, name, None, prompt, digest or name)
        return Seen(index, name, None, prompt, digest, look_of(picture), size, (picture.shape[-2], picture.shape[-1]))


# ------------------------------------------------------------------------------------------------ what pictures look like
def look_of(picture: Tensor) -> tuple[int, bytes]:
    """(difference hash of 64 bits, colours of 4x4) of an image [3, H, W], or of the first frame of a clip [3, T, H, W], in -1..1."""
    image = (picture if picture.ndim == 3 else picture[:, 0])[None].float()
    gray = interpolate(image.mean(1, keepdim=True), (8, 9), mode='area')[0, 0]
    bits = np.packbits((gray[:, 1:] > gray[:, :-1] + 1e-3).numpy().ravel())
    colours = ((interpolate(image, (4, 4), mode='area')[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return int.from_bytes(bits.tobytes(), 'big'), colours.numpy().tobytes()


class Looks:
    """Pictures by what they look like. Hashes that differ in 4 bits at most have one of five parts in common."""

    PARTS = [(0, 13), (13, 13), (26, 13), (39, 13), (52, 12)]

    def __init__(self) -> None:
        self.by_part: dict[tuple[int, int], list[tuple[int, bytes, str]]] = defaultdict(list)

    def near(self, bits: int, colours: bytes, name: str) -> str | None:
        """The name of an earlier picture that looks like this one; where there is none, this one is kept."""
        parts = [(i, bits >> shift & (1 << width) - 1) for i, (shift, width) in enumerate(self.PARTS)]
        own = np.frombuffer(colours, np.uint8).astype(np.int16)
        for part in parts:
            for other, their, found in self.by_part[part][:COMPARED]:
                is_alike = (bits ^ other).bit_count() <= NEAR_BITS
                if is_alike and np.abs(own - np.frombuffer(their, np.uint8)).max() <= NEAR_COLOUR:
                    return found
        for part in parts:
            self.by_part[part].append((bits, colours, name))
        return None


# ------------------------------------------------------------------------------------------------ what is written of it
def write(examination: Examination, dataset: BaseDataset, folder: Path, kinds: Sequence[str] = QUARANTINED) -> None:
    """report.json, report.html (pictures and all in one file) and quarantine.jsonl, each whole or not at all."""
    told = {'samples': examination.samples, 'meaning': {kind: KINDS[kind] for kind in examination.complaints},
            'complaints': {kind: [c._asdict() for c in found] for kind, found in examination.complaints.items()}}
    lines = ''.join(f'{json.dumps(row, ensure_ascii=False)}\n' for row in examination.quarantine(kinds))
    texts = {'report.json': json.dumps(told, indent=1, ensure_ascii=False), 'report.html': page(examination, dataset),
             'quarantine.jsonl': lines}
    for name, text in texts.items():
        with atomic.replacing(folder / name) as temporary:
            atomic.write_file(temporary, [text.encode('utf-8', 'replace')])


def page(examination: Examination, dataset: BaseDataset) -> str:
    """The report as one HTML file that needs no other: a sheet of small pictures for each kind of complaint."""
    parts = [f'<!doctype html><meta charset="utf-8"><title>The doctor</title><style>{STYLE}</style>',
             f'<h1>{examination.samples:,} samples, {sum(map(len, examination.complaints.values())):,} complaints</h1>']
    for kind, found in examination.complaints.items():
        parts.append(f'<h2>{html.escape(kind)}: {len(found):,}</h2><p>{html.escape(KINDS[kind])}</p><div class="sheet">')
        for complaint in found[:SHOWN]:
            words = f'<b>{html.escape(complaint.name)}</b><br>{html.escape(complaint.reason)}'
            parts.append(f'<figure>{_thumbnail(dataset, complaint.number)}<figcaption>{words}</figcaption></figure>')
        parts.append('</div>' + (f'<p>and {len(found) - SHOWN:,} more, in report.json</p>' if len(found) > SHOWN else ''))
    return '\n'.join(parts if examination.complaints else [*parts, '<p>Nothing is wrong.</p>'])


STYLE = ('body{font:14px sans-serif;margin:2em} .sheet{display:flex;flex-wrap:wrap;gap:8px} figure{margin:0;width:180px} '
         'img,i{display:block;max-width:112px;max-height:112px} figcaption{font-size:11px;overflow-wrap:anywhere}')


def _thumbnail(dataset: BaseDataset, index: int) -> str:
    """The picture of a sample as it is trained on, small, within the page; a word where it cannot be read."""
    seed_generators(index)
    try:
        sample = dataset.unmirrored()[index]
    except Exception:    # that it cannot be read is told already
        return '<i>no picture</i>'
    picture = next((sample[key] for key in PICTURES if isinstance(sample.get(key), Tensor)), None)
    if picture is None:
        return '<i>no picture</i>'
    frame = picture if picture.ndim == 3 else picture[:, 0]
    pixels = ((frame.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).movedim(0, -1).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.convert('RGB').save(file, 'JPEG', quality=70)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
