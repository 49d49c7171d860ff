"""The colour emoji of the system's font, drawn by Pillow, with their Unicode names for captions.

About 1,300 single characters; with skin tones, professions and genders (sequences that the font draws as one picture) about three thousand;
what the font has in one colour alone is there in six more, each pixel as light as before. Some combinations of an object and a skin tone or
colour are held out: a network that draws one has put together what it never saw so.
"""
from __future__ import annotations

import re
import shutil
import subprocess
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from scepter.core.errors import DataError
from scepter.core.registry import DATASETS, need
from scepter.core.schema import param
from scepter.data.datasets import BaseDataset

FONT_NAME = 'Noto Color Emoji'
FONT_SIZE = 109      # pixels; the only one that the bitmaps of this font have
TONES = {'\U0001F3FB': 'light skin', '\U0001F3FC': 'medium light skin', '\U0001F3FD': 'medium skin',
         '\U0001F3FE': 'medium dark skin', '\U0001F3FF': 'dark skin'}
JOINER, AS_EMOJI = '\u200d', '\ufe0f'
PEOPLE = {'\U0001F468': 'man', '\U0001F469': 'woman', '\U0001F9D1': 'person'}
GENDERS = {'\u2642': 'man', '\u2640': 'woman'}
ROLES = {'\u2695': 'doctor', '\u2696': 'judge', '\u2708': 'pilot', '\U0001F33E': 'farmer', '\U0001F373': 'cook', '\U0001F393': 'student',
         '\U0001F3A4': 'singer', '\U0001F3A8': 'painter', '\U0001F3EB': 'teacher', '\U0001F3ED': 'factory worker',
         '\U0001F4BB': 'at a computer', '\U0001F4BC': 'with a tie', '\U0001F527': 'mechanic', '\U0001F52C': 'scientist',
         '\U0001F680': 'astronaut', '\U0001F692': 'firefighter', '\U0001F9AF': 'with a cane', '\U0001F9B0': 'with red hair',
         '\U0001F9B1': 'with curly hair', '\U0001F9B3': 'with white hair', '\U0001F9B2': 'without hair'}
COLOURS = ('red', 'orange', 'yellow', 'green', 'blue', 'purple', 'brown', 'black', 'white')
TINTS = {'red': (218, 47, 71), 'orange': (255, 145, 0), 'yellow': (255, 213, 79), 'green': (67, 160, 71), 'blue': (30, 136, 229),
         'purple': (142, 68, 214)}
COLOURED = re.compile(r'(?:large )?(red|orange|yellow|green|blue|purple|brown|black|white) (circle|square|heart|book|apple)')
HELD_OUT_COLOURS = ('green heart', 'large purple circle', 'large orange square', 'blue book')
HELD_OUT_SHARE = 10  # of skin tones and tints with an object, every tenth combination, chosen by a checksum of its name


class Emoji(NamedTuple):
    """What is drawn, its name, and the colour that it is given, which its name then begins with."""
    text: str
    name: str
    tint: str | None = None


@DATASETS.register_class()
class EmojiDataset(BaseDataset):
    """Emoji on white.    image [3, S, S] in -1..1, prompt

    A prompt is the name, or sometimes only some of its words, so that the network also understands who says less.
    """

    FONT: str | None = param(None, f'A colour font; null: {FONT_NAME}, found through fontconfig.')
    SPLIT: Literal['train', 'held_out', 'all'] = param('train', 'train leaves out the combinations that held_out is made of.')
    SEQUENCES: bool = param(True, 'Skin tones, professions and genders too, not only single characters.')
    TINTED: bool = param(True, 'Also what the font has in one colour alone, in six more.')
    IMAGE_SIZE: int = param(64, 'Side of the picture, in pixels.', least=1)
    SHORTER: float = param(0.3, 'How often words are left out of a name.', least=0, most=1)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        font = open_font(self.FONT)
        everything = all_emoji(font, self.SEQUENCES, self.TINTED)
        self.emoji = [emoji for emoji in everything if self.SPLIT in ('all', split_of(emoji))]
        if not self.emoji:
            raise DataError(f'{font.path} draws no emoji of the split {self.SPLIT}')
        self.images = draw_all(self.emoji, font, self.IMAGE_SIZE)    # uint8: a quarter of the memory

    def __len__(self) -> int:
        return len(self.emoji)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.from_numpy(self.images[index]).permute(2, 0, 1).float() / 127.5 - 1
        words = self.emoji[index].name.split()
        if torch.rand(()) < self.SHORTER:      # torch's generator is keyed by the sample while it is read
            kept = torch.rand(len(words)) < 0.7
            kept[0] |= self.emoji[index].tint is not None      # without its colour it would be what the font has
            words = [word for word, keep in zip(words, kept) if keep] or words
        return {'image': image, 'prompt': with_article(' '.join(words))}

    def name_of(self, index: int) -> str:
        return self.emoji[index].name


# ------------------------------------------------------------------------------------------------ which there are
def open_font(path: str | None = None) -> ImageFont.FreeTypeFont:
    """The font at `path`, else the system's. Raises DataError with what to install where there is none."""
    found = path or _found_by_fontconfig()
    if not found:
        raise DataError(f'no colour emoji font on this machine: install {FONT_NAME} (Debian, Ubuntu: apt install fonts-noto-color-emoji; '
                        'Fedora: dnf install google-noto-color-emoji-fonts), or name a font with FONT')
    try:
        return ImageFont.truetype(found, FONT_SIZE)
    except OSError as error:
        raise DataError(f'{found} is no font that Pillow can draw with at {FONT_SIZE} pixels: {error}') from error


def _found_by_fontconfig() -> str | None:
    if shutil.which('fc-list') is None:
        return None
    listed = subprocess.run(['fc-list', f':family={FONT_NAME}', 'file'], capture_output=True, text=True, check=False).stdout
    return next((line.strip().rstrip(':') for line in sorted(listed.splitlines()) if Path(line.strip().rstrip(':')).is_file()), None)


def all_emoji(font: ImageFont.FreeTypeFont, sequences: bool = True, tinted: bool = True) -> list[Emoji]:
    """Each emoji of a font, in one order on every machine."""
    codes = need('fontTools.ttLib', 'data').TTFont(font.path, lazy=True).getBestCmap()
    singles = {chr(code): name for code in sorted(codes) if (name := name_of(chr(code)))}
    found = dict(singles)
    if sequences:
        one = font.getlength('\U0001F600')
        found |= {text: name for text, name in _sequences(singles) if font.getlength(text) == one}    # else the font draws its parts
    names: dict[str, str] = {}
    for text, name in found.items():
        names.setdefault(name, text)
    plain = (Emoji(text, name) for name, text in names.items())
    return sorted([*plain, *(_tinted(names) if tinted else ())], key=lambda emoji: (emoji.text, emoji.name))


def _tinted(names: dict[str, str]) -> Iterator[Emoji]:
    """Single characters in each tint, but not those that have a colour by name, or skin."""
    for name, text in names.items():
        if len(text) == 1 and not set(name.split()) & set(COLOURS) and f'{name} dark skin' not in names:
            yield from (Emoji(text, f'{tint} {name}', tint) for tint in TINTS)


def name_of(character: str) -> str | None:
    """Its Unicode name as one would say it; None of what is no picture (digits, letters of flags, skin tones)."""
    if character == '\u2764':
        return 'red heart'                # HEAVY BLACK HEART in the standard, which has no colours
    if unicodedata.category(character) != 'So' or '\U0001F1E6' <= character <= '\U0001F1FF':
        return None
    name = unicodedata.name(character, '').lower().replace('-', ' ')
    if character < '\U0001F000' and not COLOURED.search(name):
        name = re.sub(r'^(?:heavy |black |white )+', '', name)     # filled and outlined, not colours
    return name or None


def _sequences(singles: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What a font may draw as one picture: people in each role, objects in each skin tone, and both."""
    people = [(person + JOINER + role, '', f'{who} {what}') for person, who in PEOPLE.items() for role, what in ROLES.items()]
    genders = [(base, JOINER + sign, re.sub(r'\b(?:man|woman|person) ?', '', f'{name} ').strip() + f', a {who}')
               for base, name in singles.items() for sign, who in GENDERS.items()]
    for first, rest, name in [*((base, '', name) for base, name in singles.items()), *people, *genders]:
        for tone, said in {'': '', **TONES}.items():
            text = first[:1] + tone + first[1:] + rest
            if len(text) > 1:
                yield text + (AS_EMOJI if text[-1] < '\U0001F000' and JOINER in text else ''), f'{name} {said}'.strip()


def split_of(emoji: Emoji) -> Literal['train', 'held_out']:
    is_combination = emoji.tint is not None or emoji.name.endswith(' skin')
    is_tenth = is_combination and zlib.crc32(emoji.name.encode()) % HELD_OUT_SHARE == 0
    return 'held_out' if is_tenth or emoji.name in HELD_OUT_COLOURS else 'train'


def with_article(name: str) -> str:
    return f'{"an" if name[0] in "aeiou" else "a"} {name}'


# ------------------------------------------------------------------------------------------------ how they look
def draw_all(emoji: list[Emoji], font: ImageFont.FreeTypeFont, size: int) -> np.ndarray:
    """[N, size, size, 3] uint8, in their tints."""
    plain = {text: draw(text, font, size) for text in dict.fromkeys(e.text for e in emoji)}
    return np.stack([plain[e.text] if e.tint is None else in_colour(plain[e.text], TINTS[e.tint]) for e in emoji])


def draw(text: str, font: ImageFont.FreeTypeFont, size: int) -> np.ndarray:
    """[size, size, 3] uint8, on white, in the middle."""
    left, top, right, bottom = font.getbbox(text)
    side = max(right - left, bottom - top)
    picture = Image.new('RGB', (side, side), 'white')
    ImageDraw.Draw(picture).text(((side - right - left) / 2, (side - bottom - top) / 2), text, font=font, embedded_color=True)
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))


def in_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Shades of one colour, from black over itself to white, as light as the pixels are.    [H, W, 3] uint8 -> [H, W, 3] uint8"""
    weights, full = np.array([0.299, 0.587, 0.114]), np.array(colour) / 255
    light, own = (pixels / 255 @ weights)[..., None], full @ weights
    shades = np.where(light < own, full * light / own, 1 - (1 - full) * (1 - light) / (1 - own))
    return (shades * 255).round().astype(np.uint8)
