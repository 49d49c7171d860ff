"""Phi, the language model whose last states NOVA reads (Javaheripi et al. 2023), through transformers."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from scepter.core.config import Config
from scepter.core.faults import Fault
from scepter.core.registry import EMBEDDERS, need
from scepter.core.schema import param
from scepter.models.condition import Condition, Widths
from scepter.models.embedders.base import BaseEmbedder
from scepter.weights import local_copy
from scepter.weights.marks import Loaded
from scepter.weights.vocabulary import Vocabulary

NOTHING = -1    # stands behind a prompt's last token; what pads there could be a token of a prompt too


@EMBEDDERS.register_class()
class FrozenPhiEmbedder(BaseEmbedder):
    """Phi's last states, normed.    tokens [B, L] int64  ->  context [B, L, D], and a mask of where the prompt is

    Frozen always. Causal, so that no token sees what pads the prompts behind it; an empty prompt has no tokens, and a context of none.
    The sizes are those of Phi-2 where nothing else is said.
    """

    TOKENIZER_PATH: str = param(doc='Folder or hf:// address of its tokenizer, as transformers saves it.')
    PRETRAINED_MODEL: str | None = param(None, 'Weights: folder, file, URL or hf:// address of a Phi, or of a whole NOVA.')
    IGNORE_KEYS: list[str] = param([], 'Names or globs of weights that may be missing, left over or of another shape.')
    MAX_LENGTH: int = param(256, 'Tokens per prompt; longer ones are cut, with a warning.', least=1)
    WIDTH: int = param(2560, 'Channels.', least=1)
    DEPTH: int = param(32, 'Transformer blocks.', least=1)
    HEADS: int = param(32, 'Attention heads.', least=1)
    MLP_WIDTH: int = param(10240, 'Channels within the MLPs.', least=1)
    VOCABULARY: int = param(51200, 'Tokens that it knows.', least=1)
    ROTARY_SHARE: float = param(0.4, 'Share of each head that turns with the place of a token.', above=0, most=1)

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        turned = int(cfg.WIDTH // cfg.HEADS * cfg.ROTARY_SHARE)
        if cfg.WIDTH % cfg.HEADS or turned % 2 or not turned:
            yield Fault('HEADS', f'{cfg.HEADS} heads of {cfg.WIDTH} channels, of which ROTARY_SHARE {cfg.ROTARY_SHARE} turn: expected '
                                 'whole heads, and an even number of turned channels in each')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.transformer = self._network()
        # older transformers saved what follows from the sizes
        self.spare_weights = [f'transformer.layers.{i}.self_attn.rotary_emb.inv_freq' for i in range(self.DEPTH)]
        with local_copy(self.TOKENIZER_PATH) as folder:
            self.built_from = [Loaded(self.TOKENIZER_PATH, folder, also=Vocabulary.files_of(folder))]
            self.tokenizer = need('transformers', 'clip').AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        if self.PRETRAINED_MODEL is not None:
            self.load_pretrained(self.PRETRAINED_MODEL, self.IGNORE_KEYS)
        self.freeze()

    def _network(self) -> nn.Module:
        """A PhiModel, begun as transformers begins one, but in our way, which `unfilled` knows to leave out."""
        transformers = need('transformers', 'clip')
        config = transformers.PhiConfig(
            vocab_size=self.VOCABULARY, hidden_size=self.WIDTH, intermediate_size=self.MLP_WIDTH, num_hidden_layers=self.DEPTH,
            num_attention_heads=self.HEADS, partial_rotary_factor=self.ROTARY_SHARE, max_position_embeddings=max(2048, self.MAX_LENGTH))
        with torch.device('meta'):
            network = transformers.PhiModel(config)
        network.to_empty(device='cpu')
        network.rotary_emb = type(network.rotary_emb)(config)    # its table is no weight, and nothing else would fill it
        self._turns = network.rotary_emb.inv_freq.clone()    # no buffer of ours
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            if getattr(module, 'bias', None) is not None:
                nn.init.zeros_(module.bias)
        return network

    def _apply(self, *args: Any, **kwargs: Any) -> FrozenPhiEmbedder:
        """As in PyTorch, but the turns stay float32: those of bfloat16 are off by a tenth of a turn at the 256th token."""
        super()._apply(*args, **kwargs)
        self.transformer.rotary_emb.inv_freq = self._turns.to(self.device)
        return self

    @property
    def gives(self) -> Widths:
        """The width of the context, which comes with a mask."""
        return Widths(context=self.WIDTH, mask=True)

    def main_blocks(self) -> list[nn.Module]:
        return [*self.transformer.layers]

    def tokenize(self, prompts: list[str]) -> Tensor:
        """int64 [B, MAX_LENGTH], -1 behind the end of each. What does not fit is cut, and one warning shows what was lost."""
        rows = self.tokenizer(prompts, verbose=False)['input_ids'] if prompts else []
        tokens = torch.full((len(rows), self.MAX_LENGTH), NOTHING)
        for row, ids in zip(tokens, rows):
            if len(ids) > self.MAX_LENGTH:
                self.warn_of_cut(self.tokenizer.decode(ids[self.MAX_LENGTH:]), self.MAX_LENGTH)
            row[:len(ids)] = torch.tensor(ids[:self.MAX_LENGTH], dtype=torch.int64)
        return tokens

    @torch.no_grad()
    def encode_text(self, tokens: Tensor, tokenizer: Any = None, append_sentence_embedding: bool = False) -> Condition:
        """int64 [B, L] -> context [B, L, D], zeros where the mask [B, L] is False."""
        mask = tokens != NOTHING
        longest = int(mask.sum(1).max()) if len(tokens) else 0    # what only pads need not be computed
        context = torch.zeros(*tokens.shape, self.WIDTH, dtype=self.transformer.embed_tokens.weight.dtype, device=tokens.device)
        if longest:
            states = self.transformer(input_ids=tokens[:, :longest].clamp_min(0), use_cache=False).last_hidden_state
            context[:, :longest] = states.masked_fill(~mask[:, :longest, None], 0)
        return Condition(context, mask=mask)
