"""What CLIP and OpenCLIP share: the transformer's mathematics, and prompts -> context with chunks and weights."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scepter.core.config import Config
from scepter.core.faults import ConfigError, Fault
from scepter.core.schema import param
from scepter.models.condition import Condition, Widths
from scepter.models.embedders.base import BaseEmbedder
from scepter.models.embedders.tokenizer import ClipTokenizer, split_weights


class TextTowerEmbedder(BaseEmbedder, base=True):
    """A text tower of the CLIP family.    prompts -> tokens [B, n * MAX_LENGTH] -> context [B, n * MAX_LENGTH, D]

    A subclass sets self.tokenizer and self.tower, a module with `states`, `norm` and `pool`.
    """

    MAX_LENGTH: int = param(77, 'Tokens per prompt, begin and end included; shorter ones are padded.', least=3)
    LONG_PROMPT: Literal['cut', 'chunk'] = param('cut', 'A longer prompt is cut, with a warning, or encoded in chunks that are joined.')
    PROMPT_WEIGHTING: bool = param(False, 'Read (words:1.3) as a weight: the context moves away from that of the empty prompt.')
    MASK_PADDING: bool = param(False, 'Let the network see what stands up to the end of the prompt alone, not the padding behind it.')
    FREEZE: bool = param(True, 'Evaluation mode and no gradients in the weights.')
    USE_GRAD: bool = param(False, 'Record gradients while encoding; training the tower needs it, and FREEZE: false.')
    USE_FINAL_LAYER_NORM: bool = param(False, 'The final layer norm also on an inner activation; last and pooled always have it.')

    tokenizer: ClipTokenizer
    forward_methods = ('encode_both',)    # which encode_text calls too

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if not cfg.FREEZE and not cfg.USE_GRAD:
            yield Fault('FREEZE', 'is false, but without USE_GRAD: true no gradient comes to the tower, so it would not be trained')

    @property
    def gives(self) -> Widths:
        """The width of the context, and whether it has a mask."""
        return Widths(context=self.tower.width, mask=self.MASK_PADDING and self.LAYER != 'pooled')

    def main_blocks(self) -> list[nn.Module]:
        return [*self.tower.blocks()]

    def tokenize(self, prompts: list[str]) -> Tensor:
        """int64 [B, n * MAX_LENGTH]. Tokenize what is guided together in one call: chunks then are as many for all."""
        return self.tokenizer(prompts, self.MAX_LENGTH, self.LONG_PROMPT, self.PROMPT_WEIGHTING, self.warn_of_cut)

    def encode_text(self, tokens: Tensor, tokenizer: Any = None, append_sentence_embedding: bool = False) -> Tensor | Condition:
        """int64 [B, n * MAX_LENGTH] -> [B, n * MAX_LENGTH, D], or [B, 1, D] for LAYER: pooled; with MASK_PADDING the mask too.

        append_sentence_embedding: the pooled vector stands as one further token at the end; it must be of the same width.
        """
        context, pooled = self.encode_both(tokens, pooled=append_sentence_embedding)
        if append_sentence_embedding:
            context = torch.cat([context, pooled[:, None]], dim=1)
        if not self.gives.mask:
            return context
        seen = self.seen(tokens)
        return Condition(context, mask=F.pad(seen, (0, context.shape[1] - seen.shape[1]), value=True))

    def seen(self, tokens: Tensor) -> Tensor:
        """Which tokens are not padding: in each chunk those up to the first end token.    int64 [B, n * MAX_LENGTH] -> bool, as many"""
        ids = split_weights(tokens)[0] if self.PROMPT_WEIGHTING else tokens
        is_end = (ids.unflatten(1, (-1, min(self.MAX_LENGTH, ids.shape[1]))) == self.tokenizer.eos).int()
        return (is_end.cumsum(-1) == is_end).flatten(1)

    def encode_both(self, tokens: Tensor, pooled: bool = True) -> tuple[Tensor, Tensor]:
        """(context [B, n * MAX_LENGTH, D], pooled [B, P]); the pooled vector is that of the first chunk. Without pooled: empty."""
        with torch.set_grad_enabled(self.USE_GRAD and torch.is_grad_enabled()):
            if not self.PROMPT_WEIGHTING:
                return self._encode(tokens, pooled)
            ids, weights = split_weights(tokens)
            context, vector = self._encode(ids, pooled)
            if context.shape[1] == ids.shape[1] and bool((weights != 1).any()):
                plain = torch.tensor([self.tokenizer.frame([], self.MAX_LENGTH)], device=ids.device)
                empty = self._encode(plain, False)[0].repeat(1, ids.shape[1] // self.MAX_LENGTH, 1)
                context = empty + (context - empty) * weights[..., None].to(context.dtype)
            return context, vector

    def _encode(self, ids: Tensor, pooled: bool) -> tuple[Tensor, Tensor]:
        length = min(self.MAX_LENGTH, ids.shape[1])
        if ids.shape[1] % length:
            raise ValueError(f'tokens are [{len(ids)}, {ids.shape[1]}]; expected a multiple of MAX_LENGTH {self.MAX_LENGTH} per prompt')
        rows = ids.reshape(-1, length)    # [B * n, MAX_LENGTH]
        context, vector = self.activations(rows, pooled)
        count = len(rows) // len(ids) if len(ids) else 1
        if context.shape[1] == 1:    # pooled: one vector per prompt, not per chunk
            return context[::count], vector[::count]
        return context.reshape(len(ids), -1, context.shape[-1]), vector[::count]

    @property
    def taken_state(self) -> int:
        """The number of blocks before the activation that LAYER names."""
        if self.LAYER == 'hidden':
            return self.tower.index(self.LAYER_IDX)
        return self.tower.depth - (self.LAYER == 'penultimate')

    def activations(self, ids: Tensor, pooled: bool) -> tuple[Tensor, Tensor]:
        """int64 [B, L] -> what LAYER names, [B, L, D], and the pooled vector [B, P], or an empty tensor where it is not asked for."""
        tower, last, take = self.tower, self.tower.depth, self.taken_state
        if self.LAYER == 'pooled':
            context = tower.pool(tower.states(ids, [last])[0], ids == self.tokenizer.eos)
            return context[:, None], context
        states = tower.states(ids, [take, last] if pooled else [take])
        context = tower.norm(states[0]) if self.LAYER == 'last' or self.USE_FINAL_LAYER_NORM else states[0]
        return context, tower.pool(states[1], ids == self.tokenizer.eos) if pooled else context.new_empty(0)


class Tower(nn.Module):
    """The transformer of CLIP's text side, whatever its weights are called. A subclass names the parts."""

    depth: int

    def freeze_from(self, state: int) -> None:
        """Blocks after the state that is handed on never see a gradient: they must not look trainable to an optimizer or to DDP."""
        for block in [*self.blocks()][state:]:
            block.requires_grad_(False)

    def index(self, layer: int) -> int:
        """The number of blocks before a hidden state, counted as Hugging Face counts them: 0 is the embedding, -1 the last block's."""
        return layer if layer >= 0 else self.depth + 1 + layer

    def embed(self, ids: Tensor) -> Tensor:
        """Tokens [B, L] int64 -> what the first block takes, [B, L, D]."""
        raise NotImplementedError

    def blocks(self) -> Iterable[nn.Module]:
        """The blocks, in their order, each [B, L, D] -> [B, L, D]."""
        raise NotImplementedError

    @property
    def norm(self) -> nn.LayerNorm:
        """The norm behind the last block."""
        raise NotImplementedError

    def states(self, ids: Tensor, wanted: list[int]) -> list[Tensor]:
        """The hidden states [B, L, D] after so many blocks, without the final norm; no block beyond the last wanted one runs."""
        found, x = {}, self.embed(ids)
        for n, block in enumerate([*self.blocks()][:max(wanted)]):
            if n in wanted:
                found[n] = x
            x = block(x)
        found[max(wanted)] = x
        return [found[n] for n in wanted]

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector."""
        return self.norm.normalized_shape[0]

    def pool(self, x: Tensor, is_end: Tensor) -> Tensor:
        """The normed state at the first end token: [B, L, D], bool [B, L] -> [B, D]."""
        return self.norm(x)[torch.arange(len(x), device=x.device), is_end.int().argmax(dim=-1)]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Each token looks at itself and those before it.    q, k, v [B, L, D] -> [B, L, D]"""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))    # [B, H, L, D / H]
    if q.device.type == 'cpu' and q.dtype is torch.bfloat16 and torch.is_grad_enabled():
        # the fused kernel's backward takes 13 ms here, this 2 ms (64 x 16 tokens, 4 heads of 32, two cores)
        mask = torch.full((q.shape[-2], q.shape[-2]), float('-inf'), dtype=q.dtype).triu(1)
        out = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + mask).softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).flatten(2)


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {'quick_gelu': quick_gelu, 'gelu': F.gelu}


def init_block_std(width: int, depth: int) -> tuple[float, float, float]:
    """Standard deviations of CLIP's own start: (projections into attention, out of a residual branch, into the MLP)."""
    return width ** -0.5, width ** -0.5 * (2 * depth) ** -0.5, (2 * width) ** -0.5


def table(count: int, width: int) -> nn.Embedding:
    """An embedding whose weights are still to be filled. PyTorch's own start takes four seconds of imports on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)


def shape_faults(width: int, heads: int, key: str = 'HEADS') -> Iterator[Fault]:
    """Of a tower whose heads cannot share its channels."""
    if width % heads:
        yield Fault(key, f'{heads} attention heads cannot share {width} channels (WIDTH) evenly')


def refuse(embedder: BaseEmbedder, key: str, problem: str) -> ConfigError:
    """A ConfigError about one key of an embedder's config."""
    cfg = embedder.cfg if isinstance(embedder.cfg, Config) else Config(embedder.cfg)
    return ConfigError([Fault(f'{type(embedder).__name__}.{key}', problem, cfg.origin(key))])
