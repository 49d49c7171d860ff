"""What every text embedder is built on: prompts -> tokens -> context."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scepter.core.logger import get_logger
from scepter.models.base import BaseModel
from scepter.models.condition import Condition, Widths
from scepter.weights.hugging_face import accept_both_layouts, give_both_names


class BaseEmbedder(BaseModel, base=True):
    """Prompts -> context [B, L, D], or a Condition.

    A subclass writes encode_text and sets self.tokenizer and self.max_length, or writes tokenize too. self.tokenizer may be any tokenizer
    of Hugging Face. A text model of theirs inside loads weights of either layout of its names.
    """

    reads: Literal['prompt', 'label'] = 'prompt'    # the entry of a batch that it is made for
    reads_too: Sequence[str] = ()                   # entries of a batch that it is told beside these, by their names
    gives: Widths | None = None                     # of what it gives; None: it does not tell, and nothing is checked
    forward_methods = ('encode_text',)
    keeps_float32 = True
    LAYERS = ('last', 'pooled', 'hidden', 'penultimate')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.has_warned_of_cut = False
        self.built_from: list[Any] = []    # files beside weights that it cannot do without (weights.marks.Loaded)
        self._register_load_state_dict_pre_hook(accept_both_layouts, with_module=True)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            give_both_names(value)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """int64 [B, L], L = max_length. What does not fit is cut, and one warning shows what was lost."""
        if any(len(prompt.encode(errors='replace')) > self.max_length - 2 for prompt in prompts):    # a token has at least one byte
            for ids in self.tokenizer(prompts, verbose=False)['input_ids']:
                if len(ids) > self.max_length:
                    self.warn_of_cut(self.tokenizer.decode(ids[self.max_length - 1:], skip_special_tokens=True), self.max_length)
        return self.tokenizer(prompts, truncation=True, max_length=self.max_length, padding='max_length', return_tensors='pt')['input_ids']

    def encode_text(self, tokens: Tensor, tokenizer: Any = None, append_sentence_embedding: bool = False) -> Tensor | Condition:
        """int64 [B, L] -> context [B, L, D], or a Condition, which may have more."""
        raise TypeError(f'{type(self).__name__} has no encode_text(tokens, tokenizer=None, append_sentence_embedding=False): write one')

    def encode_words(self, tokens: Tensor) -> Tensor | Condition:
        """What encode_text makes of the tokens alone: with_sizes does the rest. Rows are as if each were encoded by itself."""
        return self.encode_text(tokens, tokenizer=getattr(self, 'tokenizer', None))

    def with_sizes(self, words: Tensor | Condition, **sizes: Tensor) -> Tensor | Condition:
        """What encode_words gave, and what the embedder is told beside it (`reads_too`), as encode_text gives both."""
        return words

    def forward(self, prompts: list[str]) -> Tensor | Condition:
        return self.encode_text(self.tokenize(prompts).to(self.device))

    def encode(self, prompts: list[str]) -> Tensor | Condition:
        """Prompts -> context [B, L, D], or a Condition."""
        return self(prompts)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next((p.device for p in self.parameters()), torch.device('cpu'))

    def warn_of_cut(self, lost: str, limit: int) -> None:
        """Say once per embedder what a long prompt lost: a training set would say it a million times."""
        if not self.has_warned_of_cut:
            self.has_warned_of_cut = True
            (self.logger or get_logger()).warning(
                f'a prompt is longer than {limit} tokens; this was cut: "{lost.strip()[:200]}" (further ones are cut without a word)')
