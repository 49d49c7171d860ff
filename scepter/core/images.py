"""Pictures to PNG files, with what made them written inside."""
from __future__ import annotations

import json
import os
import re
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor


def to_uint8(image: Tensor) -> np.ndarray:
    """[C, H, W] in 0..1 -> [H, W, 3] uint8, rounded; one channel is repeated."""
    image = image.detach().float().cpu().clamp(0, 1)
    image = image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def save_png(image: Tensor | np.ndarray, path: str | Path, settings: dict[str, Any] | None = None) -> Path:
    """Write an image ([C, H, W] in 0..1, or [H, W, 3] uint8); settings go into its text chunks, as JSON under `scepter`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    if settings:
        info.add_text('scepter', json.dumps(settings, ensure_ascii=True, default=str))
    pixels = to_uint8(image) if isinstance(image, Tensor) else image
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    Image.fromarray(pixels).save(temporary, format='PNG', pnginfo=info)
    os.replace(temporary, path)
    return path


def read_settings(path: str | Path) -> dict[str, Any]:
    """What save_png wrote into the picture."""
    with Image.open(path) as image:
        return json.loads(image.text.get('scepter', '{}'))


def grid(images: list[Tensor], columns: int) -> np.ndarray:
    """Images [C, H, W] of one size, row by row with a gap of 2 pixels -> [rows, columns, 3] uint8."""
    tiles = [np.pad(to_uint8(image), ((1, 1), (1, 1), (0, 0)), constant_values=255) for image in images]
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i:i + columns], axis=1) for i in range(0, len(tiles), columns)])


def save_results(results: list[dict[str, Any]], numbers: list[int], folder: str | Path) -> None:
    """One PNG per result that has an image, its words and numbers inside; the others' go to results.jsonl."""
    for result, number in zip(results, numbers):
        words = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in result.items()
                 if not isinstance(value, Tensor) or (value.numel() <= 4096 and value.ndim < 3)}
        if isinstance(result.get('image'), Tensor):
            save_png(result['image'], Path(folder) / file_name(number, str(result.get('prompt', ''))), words)
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with open(Path(folder) / 'results.jsonl', 'a', encoding='utf-8') as file:
                file.write(json.dumps({'number': number, **words}, default=str) + '\n')


def file_name(number: int, prompt: str = '', suffix: str = '.png') -> str:
    """A name for the picture of a prompt: [a-z0-9-] and a hash, at most 100 bytes. The prompt itself is never a name."""
    plain = unicodedata.normalize('NFKD', prompt[:400]).encode('ascii', 'ignore').decode().lower()
    words = re.sub(r'[^a-z0-9]+', '-', plain).strip('-')[:60].strip('-')
    mark = f'{zlib.crc32(prompt.encode("utf-8", "surrogatepass")):08x}'
    return '-'.join(filter(None, (f'{number:05d}', words, mark))) + suffix
