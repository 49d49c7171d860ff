"""CLIP's text tower, under the names that CompVis files and published folders use."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scepter.core.config import Config
from scepter.core.errors import CheckpointError
from scepter.core.faults import Fault
from scepter.core.registry import EMBEDDERS
from scepter.core.schema import param
from scepter.models.embedders.text_tower import (
    ACTIVATIONS,
    TextTowerEmbedder,
    Tower,
    causal_attention,
    init_block_std,
    refuse,
    shape_faults,
    table,
)
from scepter.models.embedders.tokenizer import ClipTokenizer
from scepter.weights import Weights, load_into, local_copy, read_json, text_tower_weights
from scepter.weights.marks import Loaded, mark
from scepter.weights.vocabulary import Vocabulary


@EMBEDDERS.register_class()
class FrozenCLIPEmbedder(TextTowerEmbedder):
    """CLIP's text tower as Stable Diffusion 1.x and XL use it.    tokens [B, L] int64  ->  context [B, L, D]

    With PRETRAINED_MODEL the folder says how large the tower is; otherwise WIDTH, DEPTH and HEADS do (default: ViT-L/14), and the
    weights start as CLIP's own did.
    """

    PRETRAINED_MODEL: str | None = param(None, 'Folder, URL or hf:// address of a Hugging Face CLIP text model and its tokenizer.')
    TOKENIZER_PATH: str | None = param(None, 'Another folder for the tokenizer; without both, the vocabulary that open_clip_torch ships.')
    LAYER: Literal['last', 'pooled', 'hidden', 'penultimate'] = param('last', 'Which activation to hand on.')
    LAYER_IDX: int | None = param(None, 'For LAYER: hidden: how many blocks before it; -2 is the last but one.')
    WIDTH: int = param(768, 'Channels of a tower without PRETRAINED_MODEL.', least=1)
    DEPTH: int = param(12, 'Its transformer blocks.', least=1)
    HEADS: int = param(12, 'Its attention heads.', least=1)

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if cfg.PRETRAINED_MODEL is None:
            yield from shape_faults(cfg.WIDTH, cfg.HEADS)
        if cfg.LAYER == 'hidden' and (cfg.LAYER_IDX is None or (cfg.PRETRAINED_MODEL is None and not _has_layer(cfg.DEPTH, cfg.LAYER_IDX))):
            depths = f'{-cfg.DEPTH - 1} to {cfg.DEPTH}' if cfg.PRETRAINED_MODEL is None else 'a number, e.g. -2 for the last but one'
            yield Fault('LAYER_IDX', f'LAYER: hidden needs {depths}, got {cfg.LAYER_IDX}')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        if self.PRETRAINED_MODEL is None:
            self._build(ClipText(self.WIDTH, self.DEPTH, self.HEADS, self.MAX_LENGTH), None)
        else:
            with local_copy(self.PRETRAINED_MODEL) as folder:
                weights = text_tower_weights(folder)
                loaded = Loaded(self.PRETRAINED_MODEL, folder, weights.entries.values(), Vocabulary.files_of(folder))
                self.built_from = [loaded]
                self._build(ClipText.from_folder(folder, weights), folder)
                mark(self, weights.under('transformer.text_model.').entries, loaded)
        depth = self.tower.depth
        if self.LAYER == 'hidden' and not _has_layer(depth, self.LAYER_IDX):    # only the folder told the depth
            raise refuse(self, 'LAYER_IDX', f'LAYER: hidden needs {-depth - 1} to {depth}, got {self.LAYER_IDX}')
        if self.FREEZE:
            self.freeze()
        else:
            self.tower.freeze_from(self.taken_state)

    def _build(self, tower: ClipText, folder: Path | None) -> None:
        self.transformer = nn.Module()    # its names: transformer.text_model.embeddings...
        self.transformer.text_model = tower
        if tower.positions < self.MAX_LENGTH:
            raise refuse(self, 'MAX_LENGTH', f'{self.MAX_LENGTH} tokens, but the tower knows {tower.positions} places')
        if self.TOKENIZER_PATH is not None:
            with local_copy(self.TOKENIZER_PATH) as tokenizer:
                self.built_from.append(Loaded(self.TOKENIZER_PATH, tokenizer, also=Vocabulary.files_of(tokenizer)))
                self.tokenizer = ClipTokenizer.from_folder(tokenizer)
        else:
            self.tokenizer = ClipTokenizer.shipped() if folder is None else ClipTokenizer.from_folder(folder)

    @property
    def tower(self) -> ClipText:
        """The network inside, under the published names."""
        return self.transformer.text_model

    def sizes_as_config(self) -> dict[str, int] | None:
        """The keys that build this tower and its tokenizer without a folder; None where they cannot say all of it."""
        tower = self.tower
        with torch.device('meta'):
            twin = ClipText(tower.width, tower.depth, tower.heads, self.MAX_LENGTH)
        is_same = self.tokenizer.vocabulary == Vocabulary.shipped()
        is_same &= {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in tower.named_parameters()}
        if not is_same or (tower.activation, tower.norm.eps) != (twin.activation, twin.norm.eps):
            return None
        return {'WIDTH': tower.width, 'DEPTH': tower.depth, 'HEADS': tower.heads}


def _has_layer(depth: int, index: int) -> bool:
    """Whether a tower of so many blocks has a hidden state of this number: 0 is the embedding, -1 the last block's."""
    return -depth - 1 <= index <= depth


class ClipText(Tower):
    """The text transformer of CLIP (Radford et al. 2021) under Hugging Face's names.    int64 [B, L] -> hidden states [B, L, D]"""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, positions: int = 77, vocabulary: int = 49408,
                 mlp_width: int | None = None, activation: str = 'quick_gelu', eps: float = 1e-5):
        super().__init__()
        self.width, self.depth, self.heads, self.positions, self.activation = width, depth, heads, positions, activation
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = table(vocabulary, width)
        self.embeddings.position_embedding = table(positions, width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            ClipBlock(width, heads, mlp_width or 4 * width, activation, eps) for _ in range(depth))
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)
        if not self.final_layer_norm.weight.is_meta:
            self._init_weights()

    @classmethod
    def from_folder(cls, folder: str | Path, weights: Weights | None = None) -> ClipText:
        """The tower of a folder with config.json and weights, of the whole CLIP or its text side alone. Raises CheckpointError."""
        try:
            config = read_json(Path(folder) / 'config.json')
            config = config.get('text_config') or config
            with torch.device('meta'):
                tower = cls(config['hidden_size'], config['num_hidden_layers'], config['num_attention_heads'],
                            config['max_position_embeddings'], config['vocab_size'], config['intermediate_size'],
                            config.get('hidden_act', 'quick_gelu'), config.get('layer_norm_eps', 1e-5))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise CheckpointError(f'{folder}: expected the config.json of a CLIP text model ({type(error).__name__}: {error})') from error
        load_into(tower, weights or text_tower_weights(folder), source=str(folder))
        return tower

    def embed(self, ids: Tensor) -> Tensor:
        return self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight[:ids.shape[1]]

    def blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    @property
    def norm(self) -> nn.LayerNorm:
        return self.final_layer_norm

    @torch.no_grad()
    def _init_weights(self) -> None:
        into, out, mlp = init_block_std(self.width, self.depth)
        nn.init.normal_(self.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.01)
        for block in self.encoder.layers:
            attn = block.self_attn
            for linear, std in ((attn.q_proj, into), (attn.k_proj, into), (attn.v_proj, into), (attn.out_proj, out),
                                (block.mlp.fc1, mlp), (block.mlp.fc2, out)):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)


class ClipBlock(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual.    [B, L, D] -> [B, L, D]"""

    def __init__(self, width: int, heads: int, mlp_width: int, activation: str, eps: float):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = ClipAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = ClipMLP(width, mlp_width, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipAttention(nn.Module):
    """Causal self-attention.    [B, L, D] -> [B, L, D]"""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(causal_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class ClipMLP(nn.Module):
    """[B, L, D] -> [B, L, D]"""

    def __init__(self, width: int, mlp_width: int, activation: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))
