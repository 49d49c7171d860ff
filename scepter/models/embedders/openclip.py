"""OpenCLIP's text tower, under the names that SGM files use."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scepter.core.config import Config
from scepter.core.faults import Fault
from scepter.core.registry import EMBEDDERS
from scepter.core.schema import param
from scepter.models.embedders.text_tower import TextTowerEmbedder, Tower, causal_attention, init_block_std, shape_faults, table
from scepter.models.embedders.tokenizer import ClipTokenizer
from scepter.weights import load_pretrained, local_copy
from scepter.weights.families.text import ARCHITECTURES
from scepter.weights.marks import Loaded
from scepter.weights.vocabulary import Vocabulary


@EMBEDDERS.register_class()
class FrozenOpenCLIPEmbedder(TextTowerEmbedder):
    """OpenCLIP's text tower as Stable Diffusion 2 and XL use it.    tokens [B, L] int64  ->  context [B, L, D]

    SD2: LAYER penultimate with the final norm. SDXL: penultimate without it, and RETURN_POOLED. Blocks and projection that no activation
    asks for are not built, and a file may hold them all the same.
    """

    ARCH: Literal['ViT-L-14', 'ViT-H-14', 'ViT-bigG-14', 'custom'] = param(
        'ViT-H-14', 'The tower: a published one, or `custom`, which WIDTH, DEPTH and HEADS describe.')
    PRETRAINED_MODEL: str | None = param(None, 'Weights of OpenCLIP, Hugging Face or a Stable Diffusion: file, folder, URL or hf://.')
    TOKENIZER_PATH: str | None = param(None, 'Folder of another tokenizer than the one that open_clip_torch ships.')
    LAYER: Literal['last', 'pooled', 'penultimate'] = param('penultimate', 'Which activation to hand on.')
    USE_FINAL_LAYER_NORM: bool = param(True, 'The final layer norm also on the penultimate activation (SD2); SDXL takes it without.')
    RETURN_POOLED: bool = param(False, 'Be ready to give the projected vector of the whole prompt too (SDXL).')
    WIDTH: int | None = param(None, 'Channels of a custom tower.', least=1)
    DEPTH: int | None = param(None, 'Its transformer blocks.', least=1)
    HEADS: int | None = param(None, 'Its attention heads.', least=1)

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        custom = (cfg.WIDTH, cfg.DEPTH, cfg.HEADS)
        if cfg.ARCH == 'custom' and None in custom:
            yield Fault('ARCH', f'custom needs WIDTH, DEPTH and HEADS, got {custom}')
        elif cfg.ARCH == 'custom':
            yield from shape_faults(cfg.WIDTH, cfg.HEADS)
        elif custom != (None, None, None):
            yield Fault('WIDTH', f'WIDTH, DEPTH and HEADS are for ARCH: custom, but ARCH is {cfg.ARCH}')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        width, depth, heads, pooled_width = \
            (self.WIDTH, self.DEPTH, self.HEADS, self.WIDTH) if self.ARCH == 'custom' else ARCHITECTURES[self.ARCH]
        needs_pooled = self.RETURN_POOLED or self.LAYER == 'pooled'
        self.model = OpenClipText(width, depth, heads, self.MAX_LENGTH, pooled_width if needs_pooled else None,
                                  leave_out_last=self.LAYER == 'penultimate' and not needs_pooled)
        if self.TOKENIZER_PATH is None:
            self.tokenizer = ClipTokenizer.shipped(pad=0)
        else:
            with local_copy(self.TOKENIZER_PATH) as folder:
                self.built_from.append(Loaded(self.TOKENIZER_PATH, folder, also=Vocabulary.files_of(folder)))
                self.tokenizer = ClipTokenizer.from_folder(folder)
        self.spare_weights = ['model.attn_mask', 'model.logit_scale', *(f'model.{name}' for name in self.model.left_out)]
        if self.PRETRAINED_MODEL is not None:
            load_pretrained(self, self.PRETRAINED_MODEL)
        if self.FREEZE:
            self.freeze()
        elif not needs_pooled:
            self.model.freeze_from(self.taken_state)

    @property
    def tower(self) -> OpenClipText:
        """The network inside, under the published names."""
        return self.model


class OpenClipText(Tower):
    """The text transformer of OpenCLIP under its own names.    int64 [B, L] -> hidden states [B, L, D]

    pooled_width: width of the projected vector; None: without the projection.
    leave_out_last: a tower whose last hidden state nobody wants is built without its last block; `depth` still counts it.
    """

    def __init__(self, width: int, depth: int, heads: int, positions: int = 77, pooled_width: int | None = None,
                 leave_out_last: bool = False, vocabulary: int = 49408):
        super().__init__()
        self.width, self.depth, self.heads, self.positions = width, depth, heads, positions
        self.token_embedding = table(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(positions, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(OpenClipBlock(width, heads) for _ in range(depth - leave_out_last))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, pooled_width)) if pooled_width else None
        self.left_out = [f'transformer.resblocks.{depth - 1}.{n}' for n in OpenClipBlock.NAMES] if leave_out_last else []
        self.left_out += [] if pooled_width else ['text_projection']
        self._init_weights()

    def embed(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]

    def blocks(self) -> nn.ModuleList:
        return self.transformer.resblocks

    @property
    def norm(self) -> nn.LayerNorm:
        return self.ln_final

    @property
    def pooled_width(self) -> int:
        return super().pooled_width if self.text_projection is None else self.text_projection.shape[1]

    def pool(self, x: Tensor, is_end: Tensor) -> Tensor:
        """The normed state at the first end token, projected: [B, L, D], bool [B, L] -> [B, P]."""
        return super().pool(x, is_end) @ self.text_projection

    @torch.no_grad()
    def _init_weights(self) -> None:
        into, out, mlp = init_block_std(self.width, self.depth)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            for weight, std in ((block.attn.in_proj_weight, into), (block.attn.out_proj.weight, out), (block.mlp.c_fc.weight, mlp),
                                (block.mlp.c_proj.weight, out)):
                nn.init.normal_(weight, std=std)
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=self.width ** -0.5)


class OpenClipBlock(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual.    [B, L, D] -> [B, L, D]"""

    NAMES = tuple(f'{module}{dot}{leaf}' for module, dot in (('ln_1', '.'), ('attn.in_proj', '_'), ('attn.out_proj', '.'), ('ln_2', '.'),
                                                             ('mlp.c_fc', '.'), ('mlp.c_proj', '.')) for leaf in ('weight', 'bias'))

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = OpenClipAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({'c_fc': nn.Linear(width, 4 * width), 'c_proj': nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class OpenClipAttention(nn.Module):
    """Causal self-attention with one matrix for q, k and v.    [B, L, D] -> [B, L, D]"""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(causal_attention(q, k, v, self.heads))
