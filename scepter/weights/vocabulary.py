"""CLIP's vocabulary: read from a folder of Hugging Face or from open_clip_torch, and written."""
from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from scepter.core.errors import CheckpointError

BOS, EOS = '<|startoftext|>', '<|endoftext|>'


class Vocabulary(NamedTuple):
    """tokens: token -> id, words ending in </w>.  merges: pairs in order of rank.  added: tokens that are no words, begin and end among
    them.  pad: the id that fills short prompts (CLIP: the end token; OpenCLIP: 0)."""
    tokens: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, int]
    pad: int

    @classmethod
    def of(cls, tokens: dict[str, int], merges: Iterable[tuple[str, str]], pad: int | None = None,
           added: Mapping[str, int] = {}) -> Vocabulary:
        # a padding token "!" is listed as added too, but the "!" of a text is a word of its own, as it was in training
        """From the files of a tokenizer. pad: the padding token; default the end of a text."""
        new = {token: i for token, i in added.items() if token not in tokens}
        special = {BOS: tokens.get(BOS, 0), EOS: tokens.get(EOS, 0), **new}
        return cls(tokens, list(merges), special, special[EOS] if pad is None else pad)

    @classmethod
    def shipped(cls, pad: int | None = None) -> Vocabulary:
        """The 49,408 tokens that open_clip_torch brings along; only its file is read, nothing is imported."""
        return cls.of(*_shipped(), pad=pad)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Vocabulary:
        """Read a tokenizer folder of Hugging Face: tokenizer.json, or vocab.json and merges.txt. Raises CheckpointError."""
        folder = Path(folder)
        try:
            if (folder / 'tokenizer.json').is_file():
                whole = json.loads((folder / 'tokenizer.json').read_text('utf-8'))
                tokens, merges = whole['model']['vocab'], whole['model']['merges']
                added = {t['content']: t['id'] for t in whole.get('added_tokens', ())}
            elif (folder / 'vocab.json').is_file():
                tokens = json.loads((folder / 'vocab.json').read_text('utf-8'))
                merges = [line for line in (folder / 'merges.txt').read_text('utf-8').split('\n')[1:] if line.strip()]
                extra = folder / 'added_tokens.json'
                added = json.loads(extra.read_text('utf-8')) if extra.is_file() else {}
            else:
                raise CheckpointError(f'{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt')
            settings = folder / 'tokenizer_config.json'
            pad = json.loads(settings.read_text('utf-8')).get('pad_token') if settings.is_file() else None
            pad = pad['content'] if isinstance(pad, dict) else pad
            pairs = [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in merges]
            return cls.of(tokens, pairs, pad={**tokens, **added}.get(pad) if pad else None, added=added)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f'{folder}: not a CLIP tokenizer ({type(error).__name__}: {error})') from error

    @staticmethod
    def files_of(folder: str | Path) -> list[Path]:
        """What from_folder may read of a folder."""
        names = ('tokenizer.json', 'vocab.json', 'merges.txt', 'added_tokens.json', 'tokenizer_config.json')
        return [file for name in names if (file := Path(folder) / name).is_file()]

    def save(self, folder: str | Path, max_length: int = 77) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json, as transformers and diffusers read them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'vocab.json').write_text(json.dumps(self.tokens, ensure_ascii=False), 'utf-8')
        (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(' '.join(m) for m in self.merges) + '\n', 'utf-8')
        pad = next(token for token, i in (*self.added.items(), *self.tokens.items()) if i == self.pad)
        special = {'bos_token': BOS, 'eos_token': EOS, 'unk_token': EOS, 'pad_token': pad}
        settings = {**special, 'tokenizer_class': 'CLIPTokenizer', 'model_max_length': max_length, 'do_lower_case': True}
        (folder / 'tokenizer_config.json').write_text(json.dumps(settings, indent=2), 'utf-8')
        (folder / 'special_tokens_map.json').write_text(json.dumps(special, indent=2), 'utf-8')
        new = {t: i for t, i in self.added.items() if t not in self.tokens}
        if new:
            (folder / 'added_tokens.json').write_text(json.dumps(new, ensure_ascii=False), 'utf-8')


@lru_cache(maxsize=1)
def byte_characters() -> dict[int, str]:
    """A printable character for each byte: printable ones stand for themselves, the rest follow from U+0100. Order is the vocabulary's."""
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(rest)}}


@lru_cache(maxsize=1)
def _shipped() -> tuple[dict[str, int], list[tuple[str, str]]]:
    found = importlib.util.find_spec('open_clip')    # finds the folder without the seconds that its import takes
    if found is None or found.origin is None:
        raise ImportError('the vocabulary comes with open_clip_torch: pip install -e ".[clip]", or set TOKENIZER_PATH', name='open_clip')
    with gzip.open(Path(found.origin).parent / 'bpe_simple_vocab_16e6.txt.gz', 'rt', encoding='utf-8') as file:
        lines = file.read().split('\n')[1:49152 - 256 - 2 + 1]    # the tower was trained with this many merges of a longer file
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    letters = list(byte_characters().values())
    tokens = [*letters, *(c + '</w>' for c in letters), *(a + b for a, b in merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges
