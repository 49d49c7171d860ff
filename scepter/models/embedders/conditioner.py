"""Stable Diffusion XL's condition: two text towers side by side, and the sizes of the picture as a vector."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scepter.core.config import Config
from scepter.core.faults import Fault
from scepter.core.registry import EMBEDDERS
from scepter.core.schema import REQUIRED, param, parts
from scepter.models.condition import Condition, Widths
from scepter.models.embedders.base import BaseEmbedder
from scepter.models.layers import timestep_embedding

NO_TOKEN = -1    # behind those of a tower that has fewer than another; no token is, with a weight or without
# how many numbers each entry of a batch has
NUMBERS = {'original_size': 2, 'crop_top_left': 2, 'target_size': 2, 'aesthetic_score': 1}


@EMBEDDERS.register_class()
class GeneralConditioner(BaseEmbedder):
    """Several towers as one condition.    tokens [B, T, L]  ->  Condition: context [B, L, D1 + D2], vector [B, P + 256 * numbers]

    Podell et al. 2023 (arXiv 2307.01952), section 2.2. The pooled vector is that of the last tower. Base: the sizes below; refiner:
    original_size, crop_top_left, aesthetic_score. The sizes are (height, width) and (top, left), original_size that before any resizing.
    Towers of another length than the longest have zeros behind their tokens; with MASK_PADDING the network sees what any tower sees.
    """

    forward_methods = ()    # each tower has its own

    EMBEDDERS: list = parts(EMBEDDERS, 'The text towers; their contexts are joined along the features, the last gives the pooled vector.',
                           default=REQUIRED)
    SIZES: list[Literal['original_size', 'crop_top_left', 'target_size', 'aesthetic_score']] = param(
        ['original_size', 'crop_top_left', 'target_size'], 'Entries of the batch that the network is told, in this order.')
    SIZE_DIM: int = param(256, 'Features for each of their numbers.', least=2)
    ZERO_EMPTY: bool = param(False, 'An empty prompt is all zeros, as the published SDXL base was trained, not the code of an empty text.')

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if not cfg.EMBEDDERS:
            yield Fault('EMBEDDERS', 'expected at least one text tower')
            return
        if EMBEDDERS.filled(cfg.EMBEDDERS[-1]).get('RETURN_POOLED') is False:
            yield Fault('EMBEDDERS', 'the last tower gives the pooled vector: set its RETURN_POOLED to true')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.embedders = nn.ModuleList(EMBEDDERS.build(node, logger=logger) for node in self.EMBEDDERS)

    @property
    def reads_too(self) -> list[str]:
        """The sizes."""
        return self.SIZES

    @property
    def gives(self) -> Widths:
        """The contexts of all towers side by side, and the pooled vector with the sizes."""
        return Widths(sum(embedder.tower.width for embedder in self.embedders), self.vector_width,
                      mask=any(embedder.gives.mask for embedder in self.embedders))

    @property
    def vector_width(self) -> int:
        """Width of `y`."""
        return self.embedders[-1].tower.pooled_width + self.SIZE_DIM * sum(NUMBERS[name] for name in self.SIZES)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """int64 [B, T, L], a row for each tower."""
        rows = [embedder.tokenize(prompts) for embedder in self.embedders]
        longest = max(row.shape[1] for row in rows)
        return torch.stack([F.pad(row, (0, longest - row.shape[1]), value=NO_TOKEN) for row in rows], dim=1)

    def encode_text(self, tokens: Tensor, tokenizer: Any = None, append_sentence_embedding: bool = False,
                    **sizes: Tensor) -> Condition:
        """tokens [B, T, L], and each entry of SIZES as [B, 2], the score as [B] or [B, 1]; other entries are not read.

        Raises ValueError where an entry is missing: a guess would teach the network a wrong size.
        """
        missing = [name for name in self.SIZES if sizes.get(name) is None]
        if missing:
            raise ValueError(f'the condition needs {", ".join(missing)} of every picture, but got only {sorted(sizes) or "prompts"}')
        return self.with_sizes(self.encode_words(tokens), **sizes)

    def encode_words(self, tokens: Tensor) -> Condition:
        """The vector is the pooled one alone."""
        context, pooled, mask = self._side_by_side(tokens)
        if self.ZERO_EMPTY:
            has_words = (tokens[:, 0, 1] != self.embedders[0].tokenizer.eos).to(context)
            context, pooled = context * has_words[:, None, None], pooled * has_words[:, None]
        return Condition(context, pooled, mask=mask)

    def with_sizes(self, words: Condition, **sizes: Tensor) -> Condition:    # type: ignore[override]
        vectors = [self._embed(sizes[name], NUMBERS[name], words.vector) for name in self.SIZES]
        return words._replace(vector=torch.cat([words.vector, *vectors], dim=-1))

    def _side_by_side(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(contexts beside one another, the last tower's pooled vector, what any tower sees where one of them has a mask)"""
        longest, contexts, masks = tokens.shape[2], [], []
        for i, embedder in enumerate(self.embedders):
            ids = tokens[:, i]
            if len({tower.MAX_LENGTH for tower in self.embedders}) > 1:
                ids = ids[:, :int((ids[0] != NO_TOKEN).sum())]
            context, pooled = embedder.encode_both(ids, pooled=embedder is self.embedders[-1])
            seen = embedder.seen(ids) if embedder.gives.mask else torch.ones_like(ids, dtype=torch.bool)
            contexts.append(F.pad(context, (0, 0, 0, longest - context.shape[1])))
            masks.append(F.pad(seen, (0, longest - seen.shape[1])))
        return torch.cat(contexts, dim=-1), pooled, torch.stack(masks).any(0) if self.gives.mask else None

    def forward(self, prompts: list[str], **sizes: Tensor) -> Condition:
        return self.encode_text(self.tokenize(prompts).to(self.device), **sizes)

    def _embed(self, numbers: Tensor, count: int, like: Tensor) -> Tensor:
        numbers = torch.as_tensor(numbers, device=like.device).reshape(len(like), count)
        return timestep_embedding(numbers.float(), self.SIZE_DIM).flatten(1).to(like.dtype)    # [B, count * SIZE_DIM]
