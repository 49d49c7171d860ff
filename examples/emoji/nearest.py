"""Which real emoji a drawn picture is nearest to: how well it is what its prompt asked for."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from emoji_data import COLOURS, TONES, Emoji, all_emoji, draw_all, open_font, split_of, with_article
from PIL import Image

from scepter.core.images import read_settings

SIDE = 32     # pixels of the pictures that are compared


class Real:
    """All emoji of the font as they are compared.    pictures [N, 32 * 32 * 3] float32 in 0..1"""

    def __init__(self, emoji: list[Emoji], pictures: np.ndarray):
        self.emoji, self.names, self.pictures = emoji, [e.name for e in emoji], pictures
        self.held_out = np.array([split_of(e) == 'held_out' for e in emoji])
        self.objects = [object_of(name) for name in self.names]

    @classmethod
    def of_the_font(cls, path: str | None = None) -> Real:
        font = open_font(path)
        emoji = all_emoji(font)
        return cls(emoji, flat(draw_all(emoji, font, 64)))


def object_of(name: str) -> str:
    """The name without its skin tone or colour."""
    for tone in sorted(TONES.values(), key=len, reverse=True):
        name = name.removesuffix(f' {tone}')
    return ' '.join(word for word in name.split() if word not in COLOURS)


def flat(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Pictures [H, W, 3] uint8, made small  ->  [N, 32 * 32 * 3] float32 in 0..1"""
    small = [np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX)) for picture in pictures]
    return np.stack(small).reshape(len(small), -1).astype(np.float32) / 255


def judge(folder: Path, real: Real) -> dict:
    """How near each drawn picture is to the emoji of its prompt, by squared difference of pixels, among all emoji of the font."""
    number = {with_article(name): i for i, name in enumerate(real.names)}
    files = sorted(folder.glob('*.png'))
    asked = np.array([number[read_settings(file)['prompt']] for file in files])
    drawn = flat([np.asarray(Image.open(file).convert('RGB')) for file in files])
    far = (drawn ** 2).sum(1)[:, None] - 2 * drawn @ real.pictures.T + (real.pictures ** 2).sum(1)     # [drawn, real]
    rank = (far < far[np.arange(len(asked)), asked][:, None]).sum(1)
    variants = [[i for i, what in enumerate(real.objects) if what == real.objects[name]] for name in asked]
    right = np.array([same[int(row[same].argmin())] == name for row, same, name in zip(far, variants, asked)])
    chance = np.array([1 / len(same) for same in variants])
    figures: dict = {'chance_top5': 5 / len(real.names)}
    for split, rows in (('trained', ~real.held_out[asked]), ('held_out', real.held_out[asked])):
        several = rows & (chance < 1)
        figures[split] = {'pictures': int(rows.sum()), 'top1': float((rank[rows] == 0).mean()), 'top5': float((rank[rows] < 5).mean()),
                          'variant': float(right[several].mean()), 'chance_variant': float(chance[several].mean())}
    return figures
