"""One image: from the bytes of a file to RGB, upright, and on to a tensor in -1..1."""
from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.avif')
# what is opened, whatever the name says: a PostScript file called .png would start Ghostscript
Image.init()
FORMATS = tuple(name for name in ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'AVIF') if name in Image.OPEN)
MAX_PIXELS = 89_478_485      # what Pillow warns at; a header that promises more is a bomb, or a picture to be scaled down first
FREE_PIXELS = 1 << 24        # up to here a picture may be as small a file as it likes
MAX_PIXELS_PER_BYTE = 100    # photographs have 1 to 10; a file of 260 kB with 89 million pixels took 2.6 GB


class UnreadableError(Exception):
    """One sample cannot be read. The loader names it once and puts another sample in its place."""


def load_image(file: str | BinaryIO, least: tuple[int, int] | None = None) -> Image.Image:
    """An image file as RGB, upright: the first frame, EXIF orientation applied, transparency laid on white, 16 bits scaled to 8.

    least: the (height, width) that is made of it, covered and cut. A JPEG is then decoded at half, a quarter or an eighth of its size,
    where that is not smaller still; `info['shrunk']` says which part of the result (left, top, right, bottom) is the whole picture.
    `info['original_size']` is its (height, width). Raises UnreadableError for whatever cannot be decoded whole.
    """
    with _opened(file) as image:
        turn, size = image.getexif().get(ExifTags.Base.Orientation, 1), image.size
        full = size[::-1] if turn < 5 else size
        if least is not None and image.format == 'JPEG':
            image.draft(None, least[::-1] if turn < 5 else least)
        is_shrunk = image.size != size
        image.load()
        image = _turned(to_rgb(image), turn)
    image.info = {'original_size': full, **({'shrunk': _whole(image.size, full, turn)} if is_shrunk else {})}
    return image


def _whole(size: tuple[int, int], full: tuple[int, int], turn: int) -> tuple[float, float, float, float]:
    """The box of the whole picture in one that was decoded at a part of its size, whose last row and column hold less than others.

    size: (width, height), upright.  full: (height, width) of the file, upright.
    """
    parts = next(n for n in (2, 4, 8) if size == (-(-full[1] // n), -(-full[0] // n)))
    width, height = full[1] / parts, full[0] / parts
    left = size[0] - width if turn in (2, 3, 6, 7) else 0.0    # the last column of the file may have become the first
    top = size[1] - height if turn in (3, 4, 7, 8) else 0.0
    return left, top, left + width, top + height


def size_of_image(file: str | BinaryIO) -> tuple[int, int]:
    """(height, width) of the upright image, from its header alone. Raises UnreadableError."""
    with _opened(file) as image:
        # for a PNG without an orientation at its head, Pillow would decode all of it to look behind the pixels
        is_turned = (image.format != 'PNG' or 'exif' in image.info) and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (image.width, image.height) if is_turned else (image.height, image.width)


@contextmanager
def _opened(file: str | BinaryIO) -> Iterator[Image.Image]:
    """The image of a file whose header makes sense; whatever goes wrong inside is an UnreadableError."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False    # other libraries switch it on; half a picture is a bad sample
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with Image.open(file, formats=FORMATS) as image:
                _refuse_bomb(image, os.path.getsize(file) if isinstance(file, str) else file.seek(0, io.SEEK_END))
                yield image
    except UnreadableError:
        raise
    except Exception as error:    # on damaged bytes, decoders raise anything: SyntaxError, struct.error, IndexError, ...
        name = file if isinstance(file, str) else repr(file)
        raise UnreadableError(f'{type(error).__name__}: {error}'.replace(name, 'the file')) from error


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
    return image if image.mode == 'RGB' else image.convert('RGB')    # convert would copy


_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def to_tensor(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    """Float32 [C, H, W] in -1..1. Bytes are scaled; a tensor of floats is what a transform made it, and stays."""
    if isinstance(image, Image.Image):
        image = np.array(image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image[..., None] if image.ndim == 2 else image).movedim(-1, 0)
    image = image.as_subclass(Tensor)    # torchvision's own tensor class stays behind
    if image.dtype != torch.uint8:
        return image.float().contiguous()
    return image.contiguous().float().div_(127.5).sub_(1)    # the bytes are laid out anew, since they are a quarter of the floats


def to_mask(mask: Image.Image | Tensor) -> Tensor:
    """Float32 [1, H, W] in 0..1; bytes are scaled."""
    if isinstance(mask, Image.Image):
        mask = torch.from_numpy(np.array(mask.convert('L')))
    mask = mask.as_subclass(Tensor).reshape(1, *mask.shape[-2:])
    return mask.float().div(255) if mask.dtype == torch.uint8 else mask.float()
