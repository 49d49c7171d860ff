"""Captions: what is written of an image, and the prompt that one draw of it gets."""
from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from scepter.core.config import Config
from scepter.core.faults import Fault
from scepter.core.schema import Component, param

CAPTION_SUFFIXES = ('.txt', '.caption')
MAX_CAPTION_BYTES = 65_536   # the longest real captions are a few kB

Texts = list[list[str]]      # what is written of an image: several kinds (long, short), and of each kind several


class Captions(Component):
    """How a prompt is made of what is written of an image. Draws are keyed by the sample's number, as a transform's are."""

    ONE_PER_LINE: bool = param(False, 'Each line of a caption file is a caption of its own, of which one is drawn; else all of it is one.')
    SHUFFLE: bool = param(False, 'Put the tags of a caption, which SEPARATOR divides, in another order each time.')
    KEEP: int = param(0, 'Tags at the beginning that stay where they are, trigger words for one.', least=0)
    DROPOUT: float = param(0.0, 'Probability of each tag behind those to be left out.', least=0, most=1)
    SEPARATOR: str = param(',', 'What stands between two tags.')
    TEMPLATES: list[str] = param([], 'Sentences with {} where the caption goes, of which one is drawn.')

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        for i, template in enumerate(cfg.TEMPLATES):
            if template.count('{}') != 1:
                yield Fault(f'TEMPLATES[{i}]', f'{template!r} has {{}} {template.count("{}")} times: it stands once, for the caption')
        if not cfg.SEPARATOR.strip():
            yield Fault('SEPARATOR', 'is empty: what divides tags is a comma, or another word of its own')

    def __init__(self, cfg: Config, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.has_choice = self.SHUFFLE or self.DROPOUT > 0 or bool(self.TEMPLATES)    # whether the prompt of one caption is drawn too

    def prompt(self, texts: Texts, weights: Sequence[float]) -> str:
        """The caption that this draw gets.    weights: of each kind of text; a kind that is empty, or of weight 0, is left out"""
        there = [(kind, weight) for kind, weight in zip(texts, weights) if kind and weight]
        if not there:
            return ''
        kind = there[0][0] if len(there) == 1 else random.choices([k for k, _ in there], [w for _, w in there])[0]
        caption = kind[0] if len(kind) == 1 else random.choice(kind)
        if not self.has_choice:
            return caption
        caption = self._tags(caption)
        return random.choice(self.TEMPLATES).replace('{}', caption) if self.TEMPLATES else caption

    def texts_of_file(self, data: bytes) -> list[str]:
        """The captions in the bytes of a caption file. Raises ValueError."""
        if len(data) > MAX_CAPTION_BYTES:
            raise ValueError(f'longer than {MAX_CAPTION_BYTES} bytes')
        text = data.decode('utf-8-sig')
        return [clean for part in (text.splitlines() if self.ONE_PER_LINE else [text]) if (clean := clean_caption(part))]

    def _tags(self, caption: str) -> str:
        if not self.SHUFFLE and not self.DROPOUT:
            return caption
        tags = [tag.strip() for tag in caption.split(self.SEPARATOR.strip()) if tag.strip()]
        kept, rest = tags[:self.KEEP], tags[self.KEEP:]
        if self.SHUFFLE:
            random.shuffle(rest)
        return f'{self.SEPARATOR.strip()} '.join(kept + [tag for tag in rest if random.random() >= self.DROPOUT])


def clean_caption(text: str) -> str:
    """One line without space at its ends. Raises ValueError for what cannot be a caption."""
    if len(text) > MAX_CAPTION_BYTES:
        raise ValueError(f'longer than {MAX_CAPTION_BYTES} bytes')
    return ' '.join(text.split())


def texts_of(value: Any) -> list[str]:
    """The captions in a cell of a table: a text, a list of them, or none. Raises ValueError."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        raise ValueError(f'a caption is a string, got {value!r:.60}')
    return [clean for text in values if (clean := clean_caption(text))]
