"""Pictures to PNG files, and clips to these or MP4, with what made them written inside."""
from __future__ import annotations

import itertools
import json
import math
import os
import re
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from scepter.core.clips import FRAME_RATE, read_comment, write_mp4
from scepter.core.secrets import hide

# our samplers -> what other programs call them
SAMPLERS = {
    'ddim': 'DDIM', 'euler': 'Euler', 'euler_ancestral': 'Euler a', 'lcm': 'LCM', 'heun': 'Heun', 'dpm2': 'DPM2',
    'dpm2_ancestral': 'DPM2 a', 'dpmpp_2s_ancestral': 'DPM++ 2S a', 'dpmpp_sde': 'DPM++ SDE', 'dpmpp_2m': 'DPM++ 2M',
    'dpmpp_2m_sde': 'DPM++ 2M SDE', 'dpmpp_3m_sde': 'DPM++ 3M SDE', 'unipc': 'UniPC', 'lms': 'LMS', 'ddpm': 'DDPM'}


# what a result shows -> the end of its file's name
PICTURES = {'image': '.png', 'video': '.png', 'train_n_image': '-train_n.png', 'train_n_video': '-train_n.png'}


def is_figure(value: Any) -> bool:
    """Whether this is a number, or a tensor or array of one element."""
    return isinstance(value, (int, float, np.number)) or (isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1)


def is_picture(value: Any) -> bool:
    """Whether this is [3, H, W] or [1, H, W] as a tensor, or [H, W, 3] uint8."""
    if isinstance(value, Tensor):
        return value.ndim == 3 and value.shape[0] in (1, 3)
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3


def to_uint8(image: Tensor) -> np.ndarray:
    """[C, H, W] in 0..1 -> [H, W, 3] uint8, rounded; one channel is repeated."""
    image = image.detach().float().cpu().clamp(0, 1)
    image = image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def save_png(image: Tensor | np.ndarray, path: str | Path, settings: dict[str, Any] | None = None) -> Path:
    """Write an image ([C, H, W] in 0..1, or [H, W, 3] uint8), in place of any that is there; settings go into its text (`png_text`).

    A clip [C, T, H, W] is an animated PNG, which loses nothing and shows its first frame where a program knows pictures alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = image.unbind(1) if isinstance(image, Tensor) and image.ndim == 4 else [image]
    first, *rest = [Image.fromarray(to_uint8(frame) if isinstance(frame, Tensor) else frame) for frame in pictures]
    clip = {'save_all': True, 'append_images': rest, 'duration': 1000 // FRAME_RATE, 'loop': 0} if rest else {}
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    first.save(temporary, format='PNG', pnginfo=png_text(settings or {}), **clip)
    os.replace(temporary, path)
    return path


def save_mp4(clip: Tensor, path: str | Path, settings: dict[str, Any] | None = None) -> Path:
    """Write a clip [C, T, H, W] in 0..1, in place of any that is there; settings go into its comment. Raises as write_mp4."""
    return write_mp4(np.stack([to_uint8(frame) for frame in clip.unbind(1)]), path, _as_json(settings) if settings else '')


def save_new(images: dict[str, Tensor], folder: str | Path, prompt: str, settings: dict[str, Any]) -> list[Path]:
    """Write pictures of one prompt, told apart by the ends of their names, under the number behind the highest in the folder.

    No picture that is there is touched, also where several processes write to one folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    claimed: list[Path] = []
    while len(claimed) < len(images):
        number = next_number(folder)
        try:
            for suffix in list(images)[len(claimed):]:
                path = folder / file_name(number, prompt, suffix)
                open(path, 'x').close()    # from here on the name is ours
                claimed.append(path)
        except FileExistsError:
            continue
    try:
        return [(save_mp4 if path.suffix == '.mp4' else save_png)(image, path, settings) for image, path in zip(images.values(), claimed)]
    except BaseException:
        for path in claimed:
            path.unlink(missing_ok=True)
        raise


def next_number(folder: str | Path) -> int:
    """The number behind the highest that a file's name in this folder begins with."""
    found = (re.match(r'(\d{5,})[-.]', entry.name) for entry in os.scandir(folder))
    return max((int(match[1]) + 1 for match in found if match), default=0)


def free_path(path: str | Path) -> Path:
    """The path itself where nothing is there, else with -2, -3, ... before its suffix."""
    path = Path(path)
    names = itertools.chain([path], (path.with_name(f'{path.stem}-{n}{path.suffix}') for n in itertools.count(2)))
    return next(name for name in names if not name.exists())


def png_text(settings: dict[str, Any]) -> PngImagePlugin.PngInfo:
    """Settings as text of a PNG: JSON under `scepter`, and, where they tell a seed, the form that other programs read, `parameters`.

    A picture is given away: no secret stands in it, and ${NAME} for what came from the environment.
    """
    info = PngImagePlugin.PngInfo()
    if settings:
        info.add_text('scepter', _as_json(settings))
    if 'seed' in settings and 'prompt' in settings:
        info.add_text('parameters', hide(parameters(settings)))
    return info


def _as_json(settings: dict[str, Any]) -> str:
    return hide(json.dumps(settings, ensure_ascii=True, default=str))


def parameters(settings: dict[str, Any]) -> str:
    """Settings as the web interface of AUTOMATIC1111 writes them, and many programs since read them.

    The prompt; `Negative prompt: ...`; then `Steps: 20, Sampler: Euler a, ...` in one line, values with commas or colons in quotes.
    """
    sampler = str(settings.get('sampler', ''))
    is_karras = sampler.endswith('_karras') or settings.get('discretization') == 'karras'
    size, digest = settings.get('size'), settings.get('weights')
    told = {'Steps': settings.get('sample_steps'), 'Sampler': SAMPLERS.get(sampler.removesuffix('_karras'), sampler) or None,
            'Schedule type': 'Karras' if is_karras else None, 'CFG scale': settings.get('guide_scale'), 'Seed': settings['seed'],
            'Size': f'{size[1]}x{size[0]}' if size else None, 'Model hash': digest[:10] if digest else None,
            'Model': Path(str(settings['model'])).stem if settings.get('model') else None,
            'Denoising strength': settings.get('denoising_strength'), 'CFG Rescale': settings.get('guide_rescale'),
            'Picture': settings.get('number'), 'Version': f'scepter {settings["version"]}' if settings.get('version') else None}
    words = [f'{key}: {_quoted(str(value))}' for key, value in told.items() if value is not None]
    unwanted = [f'Negative prompt: {settings["n_prompt"]}'] if settings.get('n_prompt') else []
    return '\n'.join([str(settings['prompt']), *unwanted, ', '.join(words)])


def read_settings(path: str | Path) -> dict[str, Any]:
    """What save_png or save_mp4 wrote into the file."""
    if Path(path).suffix == '.mp4':
        return json.loads(read_comment(path) or '{}')
    with Image.open(path) as image:
        return json.loads(image.text.get('scepter', '{}'))


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n]', value) else value


def grid(images: list[Tensor], columns: int) -> np.ndarray:
    """Images [C, H, W] of one size, row by row with a gap of 2 pixels -> [rows, columns, 3] uint8."""
    tiles = [np.pad(to_uint8(image), ((1, 1), (1, 1), (0, 0)), constant_values=255) for image in images]
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], axis=1) for i in range(0, len(tiles), columns)])


def sheet(images: Sequence[Tensor | np.ndarray], columns: int, captions: Sequence[str] = ()) -> np.ndarray:
    """Pictures to look at, row by row with a caption under each -> [H, W, 3] uint8. Their sizes may differ; see `tile`."""
    tiles = [Image.fromarray(tile(image)) for image in images]
    font = ImageFont.load_default(11)
    width, height = max(t.width for t in tiles), max(t.height for t in tiles)
    texts = [_lines(captions[i] if i < len(captions) else '', font, width) for i in range(len(tiles))]
    space = 13 * max(len(lines) for lines in texts)
    columns = min(columns, len(tiles))
    page = Image.new('RGB', (columns * (width + 4), -(-len(tiles) // columns) * (height + space + 4)), 'white')
    pen = ImageDraw.Draw(page)
    for i, (picture, lines) in enumerate(zip(tiles, texts)):
        x, y = i % columns * (width + 4) + 2, i // columns * (height + space + 4) + 2
        page.paste(picture, (x, y))
        for row, words in enumerate(lines):
            pen.text((x, y + height + 13 * row), words, 'black', font)
    return np.asarray(page)


def tile(image: Tensor | np.ndarray) -> np.ndarray:
    """A picture as a sheet shows it: a small one enlarged by whole pixels to a side of 96 at least, a large one reduced to 512."""
    pixels = to_uint8(image) if isinstance(image, Tensor) else image
    side = max(pixels.shape[:2])
    if side < 96:
        return pixels.repeat(-(-96 // side), 0).repeat(-(-96 // side), 1)
    if side <= 512:
        return pixels
    size = [max(1, round(length * 512 / side)) for length in (pixels.shape[1], pixels.shape[0])]
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _lines(text: str, font: Any, width: int) -> list[str]:
    """The text in two lines at most that fit the width; the rest of it is left out."""
    lines: list[str] = []
    for word in ' '.join(text.split()).split(' ') if text.strip() else []:
        if lines and font.getlength(f'{lines[-1]} {word}') <= width:
            lines[-1] += f' {word}'
        else:
            lines.append(word)
    lines = [*lines[:1], f'{lines[1]} ...'] if len(lines) > 2 else lines
    for i, line in enumerate(lines):
        while font.getlength(line) > width and len(line) > 1:
            line = line[:-1]
        lines[i] = line
    return lines


def save_results(results: list[dict[str, Any]], numbers: list[int], folder: str | Path,
                 told: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """One PNG per result that has an image or a video, with its number, its words and what is `told` of all. Answers the others' rows."""
    rows = []
    for result, number in zip(results, numbers):
        words = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in result.items()
                 if not isinstance(value, Tensor) or (value.numel() <= 4096 and value.ndim < 3)}
        if 'seed' in words:
            words['row_seed'] = words.pop('seed')
        pictures = {suffix: result[key] for key, suffix in PICTURES.items() if isinstance(result.get(key), Tensor)}
        for suffix, picture in pictures.items():
            save_png(picture, Path(folder) / file_name(number, str(result.get('prompt', '')), suffix),
                     {'number': number, **(told or {}), **words})
        if not pictures:
            rows.append({'number': number, **words})
    return rows


def file_name(number: int, prompt: str = '', suffix: str = '.png') -> str:
    """A name for the picture of a prompt: [a-z0-9-] and a hash, at most 100 bytes. The prompt itself is never a name."""
    plain = unicodedata.normalize('NFKD', prompt[:400]).encode('ascii', 'ignore').decode().lower()
    words = re.sub(r'[^a-z0-9]+', '-', plain).strip('-')[:60].strip('-')
    mark = f'{zlib.crc32(prompt.encode("utf-8", "surrogatepass")):08x}'
    return '-'.join(filter(None, (f'{number:05d}', words, mark))) + suffix
