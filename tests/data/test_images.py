"""JPEGs that are decoded at a part of their size, and files that are more than they seem."""
from __future__ import annotations

import io
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scepter.data.images import UnreadableError, load_image
from scepter.data.transforms import RecordedCrop

SIZES = [(643, 429), (800, 600), (257, 1031), (1024, 1024)]


def photograph(width: int, height: int, orientation: int = 1) -> io.BytesIO:
    """Smooth colours with something of its own everywhere, so that a shift by half a pixel shows."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 31 + k) + np.cos(y / 23 - k) + np.sin((x + y) / 57) for k in range(3)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(((np.stack(waves, -1) + 3) / 6 * 255).astype(np.uint8)).save(file, 'JPEG', quality=95, subsampling=0, exif=exif)
    return file


def noise(a: Image.Image, b: Image.Image) -> float:
    """dB"""
    return 10 * np.log10(255 ** 2 / np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('size', SIZES)
def test_a_jpeg_at_a_part_of_its_size_gives_the_crop_of_the_whole_one(size, orientation):
    file, crop = photograph(*size, orientation), RecordedCrop({'SIZE': [100, 120]})
    whole, part = load_image(file), load_image(file, (100, 120))
    assert part.height < whole.height and part.width < whole.width and part.height >= 100 and part.width >= 120
    expected, found = crop({'image': whole}), crop({'image': part})
    assert {key: found[key] for key in found if key != 'image'} == {key: expected[key] for key in expected if key != 'image'}
    assert noise(found['image'], expected['image']) > 48    # half a pixel aside it is below 42


@pytest.mark.parametrize('least', [(429, 643), (300, 100), (215, 322)])
def test_it_is_never_decoded_to_less_than_is_made_of_it(least):
    image = load_image(photograph(643, 429), least)
    assert 'shrunk' not in image.info or (image.height >= least[0] and image.width >= least[1])
    assert image.info['original_size'] == (429, 643)


def test_other_formats_are_whole():
    file = io.BytesIO()
    Image.new('RGB', (800, 600)).save(file, 'PNG')
    assert load_image(file, (100, 100)).size == (800, 600)


def test_half_a_jpeg_is_refused_at_a_part_of_its_size_too():
    with pytest.raises(UnreadableError, match='truncated'):
        load_image(io.BytesIO(photograph(800, 600).getvalue()[:-9000]), (64, 64))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def png(extra: bytes) -> bytes:
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', 1, 1, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + head + extra + chunk(b'IDAT', zlib.compress(bytes(4))) + chunk(b'IEND', b'')


def gif(frames: int) -> bytes:
    """So many frames of one pixel, each of 16 bytes."""
    frame = b'\x2c' + struct.pack('<HHHHB', 0, 0, 1, 1, 0) + b'\x02\x02\x44\x01\x00'
    return b'GIF89a' + struct.pack('<HHBBB', 1, 1, 0x80, 0, 0) + bytes(6) + frame * frames + b';'


@pytest.mark.parametrize(('data', 'is_read'), [
    (png(chunk(b'iCCP', b'x\0\0' + zlib.compress(bytes(200_000_000), 1))), None), (gif(1_000_000), True),
], ids=['a colour profile of 200 MB', 'a million frames'])
def test_what_is_small_and_becomes_large_costs_neither_memory_nor_time(data, is_read, tmp_path: Path):
    (tmp_path / 'x').write_bytes(data)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read = load_image(str(tmp_path / 'x')).size == (1, 1)
    except UnreadableError:
        read = False
    assert is_read is None or read is is_read
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000    # kB
    assert time.process_time() - begin < 1
