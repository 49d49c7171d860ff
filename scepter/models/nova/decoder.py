"""NOVA's head: a small network that removes noise from one token at a time, told what the image encoder says about it.

Li et al. 2024 (arXiv 2406.11838), section 3.2: a diffusion loss in place of a codebook.
"""
from __future__ import annotations

from torch import Tensor, nn

from scepter.models.layers import checkpoint, timestep_embedding
from scepter.models.nova.blocks import FeedForward, Modulation, PatchEmbed, Size
from scepter.models.nova.positions import FEATURES


class ImageDecoder(nn.Module):
    """What noisy tokens, their times and what is known about them say about the clean ones.

    x [B, N, p*p*C] as `patchify` cuts it, t [B] or [B, N], z [B, N, D]  ->  [B, N, p*p*C].  No token sees another.
    known [B, N, M]: what `knows` makes of z, in its place, where the same z is asked about at many times.
    """

    def __init__(self, channels: int, patch: int, size: Size, condition: int):
        super().__init__()
        self.patch_embed = PatchEmbed(channels, patch, size.width)
        self.time_cond_embed = TimeConditionEmbed(condition, size.width)
        self.blocks = nn.ModuleList(DecoderBlock(size.width) for _ in range(size.depth))
        self.norm = Modulation(size.width, size.width, has_gate=False)
        self.head = nn.Linear(size.width, patch * patch * channels)

    def forward(self, x: Tensor, t: Tensor, z: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        h, told = self.patch_embed.of_tokens(x), self.time_cond_embed(t, z, known)
        for block in self.blocks:
            h = block(h, told)
        return self.head(self.norm(h, told)[0])

    def knows(self, z: Tensor) -> Tensor:
        """What is known about tokens, as the blocks are told it whatever the time.    [B, N, D] -> [B, N, M]"""
        return self.time_cond_embed.condition_proj(z)


class TimeConditionEmbed(nn.Module):
    """Time and condition as one vector.    t [B] or [B, N], z [B, N, D], or known [B, N, M] -> [B, N, M]"""

    def __init__(self, condition: int, width: int):
        super().__init__()
        self.timestep_proj = FeedForward(FEATURES, width, width, nn.SiLU())
        self.condition_proj = FeedForward(condition, width, width, nn.SiLU())

    def forward(self, t: Tensor, z: Tensor | None, known: Tensor | None = None) -> Tensor:
        times = timestep_embedding(t if t.ndim == 2 else t[:, None], FEATURES)
        known = self.condition_proj(z) if known is None else known
        return self.timestep_proj(times.to(self.timestep_proj.fc1.weight.dtype)) + known


class DecoderBlock(nn.Module):
    """x + gate * norm(mlp(modulated x)).    [B, N, M], told [B, N, M] -> [B, N, M]"""
    is_checkpointed = False

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = Modulation(width, width, has_gate=True)
        self.proj = FeedForward(width, width, width, nn.SiLU())
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return checkpoint(self._forward, x, told) if self.is_checkpointed else self._forward(x, told)

    def _forward(self, x: Tensor, told: Tensor) -> Tensor:
        h, gate = self.norm1(x, told)
        return x + gate * self.norm2(self.proj(h))
