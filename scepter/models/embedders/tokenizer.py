"""CLIP's byte-pair tokenizer, and prompts that are longer than the tower or carry weights."""
from __future__ import annotations

import heapq
import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from scepter.weights.vocabulary import BOS, EOS, Vocabulary, byte_characters

CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")
WEIGHTED = re.compile(r'\(([^()]*):([+-]?(?:\d+\.?\d*|\.\d+))\)')    # the innermost (words:1.3)
UNIT = 10_000    # a weight travels as an integer of this many to 1


class ClipTokenizer:
    """Text <-> ids of CLIP's vocabulary, equal to the tokenizers of transformers and open_clip."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary, self.pad, self.added = vocabulary, vocabulary.pad, vocabulary.added
        self.ranks = {pair: rank for rank, pair in enumerate(vocabulary.merges)}
        self.bos, self.eos = self.added[BOS], self.added[EOS]
        self.tokens = {i: token for token, i in (*vocabulary.tokens.items(), *self.added.items())}
        self._split_added = re.compile('(' + '|'.join(re.escape(t) for t in sorted(self.added, key=len, reverse=True)) + ')')
        self._known_words: dict[str, list[int]] = {}

    @staticmethod
    @lru_cache(maxsize=4)
    def shipped(pad: int | None = None) -> ClipTokenizer:
        """Of the vocabulary that open_clip_torch brings along. pad: the id that fills short prompts, default the end token."""
        return ClipTokenizer(Vocabulary.shipped(pad))

    @classmethod
    def from_folder(cls, folder: str | Path) -> ClipTokenizer:
        """Of a tokenizer folder of Hugging Face. Raises CheckpointError."""
        return cls(Vocabulary.from_folder(folder))

    def __deepcopy__(self, memo: dict) -> ClipTokenizer:
        return self    # it never changes, and an EMA's copy of a network needs no second vocabulary

    # ---------------------------------------------------------------- text <-> ids
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without begin and end."""
        ids: list[int] = []
        for piece in self._split_added.split(text):
            if piece in self.added:
                ids.append(self.added[piece])
            else:
                for word in words_of(unicodedata.normalize('NFC', piece).lower()):
                    ids += self._encode_word(word)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, lower-cased as CLIP sees it."""
        text = ''.join(self.tokens[i] for i in ids if i not in (self.bos, self.eos))
        table = {c: b for b, c in byte_characters().items()}
        return bytes(table[c] for c in text.replace('</w>', 'Ġ') if c in table).decode('utf-8', errors='replace').strip()

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._known_words:
            if len(self._known_words) > 100_000:    # a long run must not collect every word it ever met
                self._known_words.clear()
            letters = [byte_characters()[b] for b in word.encode(errors='replace')]
            letters[-1] += '</w>'
            self._known_words[word] = [self.vocabulary.tokens.get(s, self.eos) for s in merge(letters, self.ranks)]
        return self._known_words[word]

    # ---------------------------------------------------------------- prompts -> tokens
    def __call__(self, prompts: list[str], length: int = 77, long: Literal['cut', 'chunk'] = 'cut', has_weights: bool = False,
                 on_cut: Callable[[str, int], None] | None = None) -> Tensor:
        """int64 [B, n * length], each chunk framed by begin and end; n is 1 unless long is 'chunk' and a prompt needs more.

        has_weights: (words:1.3) is read, and the weight travels in the upper half of its token (see split_weights).
        """
        room = length - 2
        rows = []
        for prompt in prompts:
            row: list[int] = []
            for text, weight in weighted_pieces(prompt) if has_weights else [(prompt, 1.0)]:
                row += [i | round((weight - 1) * UNIT) << 32 for i in self.encode(text)]
            if long == 'cut' and len(row) > room:
                if on_cut is not None:
                    on_cut(self.decode(i & 0xFFFFFFFF for i in row[room:]), length)
                row = row[:room]
            rows.append(row)
        chunks = max((-(-len(row) // room) for row in rows), default=1) or 1
        return torch.tensor([[token for c in range(chunks) for token in self.frame(row[c * room:(c + 1) * room], length)] for row in rows],
                            dtype=torch.int64).view(len(rows), chunks * length)

    def frame(self, ids: list[int], length: int) -> list[int]:
        """The ids of one chunk between begin and end, padded to `length`."""
        return [self.bos, *ids, self.eos] + [self.pad] * (length - 2 - len(ids))


def split_weights(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, weights) of tokens that carry weights. int64 [B, L] -> int64 [B, L], float32 [B, L]."""
    return tokens & 0xFFFFFFFF, 1 + (tokens >> 32).float() / UNIT


def weighted_pieces(prompt: str) -> list[tuple[str, float]]:
    r"""'a (red:1.3) cat' -> [('a ', 1.0), ('red', 1.3), (' cat', 1.0)]. Nested weights multiply; \( and \) are plain brackets."""
    pieces = [(prompt.replace('\\(', '\0').replace('\\)', '\1'), 1.0)]
    inner: dict[str, list[tuple[str, float]]] = {}

    def lift(match: re.Match) -> str:
        mark = f'\2{len(inner)}\3'
        inner[mark] = [(match[1], min(max(float(match[2]), -100.0), 100.0))]
        return mark

    text = pieces[0][0]
    while True:
        lifted = WEIGHTED.sub(lift, text)
        if lifted == text:
            break
        text = lifted

    def lower(text: str, weight: float) -> list[tuple[str, float]]:
        found = []
        for part in re.split('(\2\\d+\3)', text):
            if part in inner:
                found += lower(inner[part][0][0], weight * inner[part][0][1])
            elif part:
                found.append((part.replace('\0', '(').replace('\1', ')'), weight))
        return found

    return lower(text, 1.0)


def words_of(text: str) -> Iterable[str]:
    """CLIP's words: runs of letters, single digits, runs of anything else, and the contractions of English."""
    place = 0
    while place < len(text):
        contraction = CONTRACTION.match(text, place)
        end = contraction.end() if contraction else place + 1
        kind = _kind(text[place])
        while not contraction and kind in 'LO' and end < len(text) and _kind(text[end]) == kind:
            end += 1
        if kind != ' ':
            yield text[place:end]
        place = end


@lru_cache(maxsize=4096)
def _kind(character: str) -> str:
    if character.isspace():
        return ' '
    category = unicodedata.category(character)[0]
    return category if category in 'LN' else 'O'


def merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair merging, the best rank first and from the left.

    A heap over a linked list: a word of 10,000 letters takes n log n, where the usual rescan takes n squared.
    """
    symbols = list(symbols)
    after = list(range(1, len(symbols) + 1))
    before = list(range(-1, len(symbols) - 1))
    heap = [(ranks[pair], i, *pair) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
    heapq.heapify(heap)

    def offer(left: int, right: int) -> None:
        pair = (symbols[left], symbols[right])
        if pair in ranks:
            heapq.heappush(heap, (ranks[pair], left, *pair))

    while heap:
        _, i, left, right = heapq.heappop(heap)
        j = after[i]
        if symbols[i] != left or j >= len(symbols) or symbols[j] != right:    # one of the two was merged meanwhile
            continue
        symbols[i], symbols[j] = left + right, ''
        after[i] = after[j]
        if after[i] < len(symbols):
            before[after[i]] = i
            offer(i, after[i])
        if before[i] >= 0:
            offer(before[i], i)
    return [s for s in symbols if s]
