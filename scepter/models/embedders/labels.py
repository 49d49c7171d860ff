"""Class labels as the condition: a table with a row for each class, and one more for `none`, which guidance needs."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from scepter.core.config import Config
from scepter.core.errors import DataError
from scepter.core.faults import Fault
from scepter.core.registry import EMBEDDERS
from scepter.core.schema import param
from scepter.models.condition import Condition, Widths
from scepter.models.embedders.base import BaseEmbedder


@EMBEDDERS.register_class()
class LabelEmbedder(BaseEmbedder):
    """Labels -> what a network is told of a class.    int64 [B] in 0 .. NUM_CLASSES-1  ->  context [B, 1, D], vector [B, D] or label [B]

    Label NUM_CLASSES stands for none: training puts it in the place of a share P_ZERO of the labels, and guidance draws away from it.
    Where a width is given, a table of that width is learnt here; without any, it is handed on itself, for a network with a table of its
    own of NUM_CLASSES + 1 rows. As a prompt a class is its name or its number; an empty prompt is none.
    """

    NUM_CLASSES: int = param(doc='Classes, without the one that stands for none.', least=1)
    CONTEXT_DIM: int | None = param(None, 'Width of a context of one token, for networks with cross attention.', least=1)
    VECTOR_DIM: int | None = param(None, 'Width of a vector, for networks that add one to their time (NUM_CLASSES: sequential).', least=1)
    NAMES: list[str] = param([], 'What the classes are called in prompts, in their order; they may always be called by number.')

    reads = 'label'

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.context = nn.Embedding(self.NUM_CLASSES + 1, self.CONTEXT_DIM) if self.CONTEXT_DIM is not None else None
        self.vector = nn.Embedding(self.NUM_CLASSES + 1, self.VECTOR_DIM) if self.VECTOR_DIM is not None else None
        self._numbers = {**{str(i): i for i in range(self.NUM_CLASSES)}, **{name: i for i, name in enumerate(self.NAMES)},
                         '': self.NUM_CLASSES}

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if cfg.NAMES and len(set(cfg.NAMES)) != cfg.NUM_CLASSES:
            yield Fault('NAMES', f'{len(set(cfg.NAMES))} different names for {cfg.NUM_CLASSES} classes: give one for each, or none')

    @property
    def gives(self) -> Widths:
        """A context or a vector where their widths are given, else the label itself."""
        is_number = self.context is None and self.vector is None
        return Widths(self.CONTEXT_DIM, self.VECTOR_DIM, self.NUM_CLASSES + 1 if is_number else None)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """int64 [B]. Raises DataError for what is no class."""
        unknown = [prompt for prompt in prompts if prompt not in self._numbers]
        if unknown:
            raise DataError(f'{unknown[0]!r} is no class: expected a number from 0 to {self.NUM_CLASSES - 1}'
                            + (f', one of {", ".join(self.NAMES[:12])}' if self.NAMES else '') + ', or nothing')
        return torch.tensor([self._numbers[prompt] for prompt in prompts])

    def without(self, labels: Tensor, dropped: Tensor) -> Tensor:
        """Labels [B] with none where dropped, bool [B]. Raises DataError for a label out of range where the device need not be asked."""
        if labels.device.type == 'cpu' and not 0 <= labels.min() <= labels.max() <= self.NUM_CLASSES:
            raise DataError(f'labels are {labels.min()} to {labels.max()}, expected 0 to {self.NUM_CLASSES - 1} (NUM_CLASSES)')
        return labels.masked_fill(dropped, self.NUM_CLASSES)

    def encode_text(self, tokens: Tensor, tokenizer: Any = None, append_sentence_embedding: bool = False) -> Condition:
        """int64 [B] -> the parts of a condition that the widths ask for."""
        if self.context is None and self.vector is None:
            return Condition(label=tokens)
        return Condition(None if self.context is None else self.context(tokens)[:, None],
                         None if self.vector is None else self.vector(tokens))
