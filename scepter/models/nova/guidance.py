"""NOVA's guidance: up to three passes of the network over the same tokens, and one prediction out of them.

The passes are c, with everything wanted, u, with nothing, and for guidance by frames f: with the frames before, but no words.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Guidance(NamedTuple):
    """How much a drawing follows what it is told."""
    scale: float = 5.0               # of the words; up to 1 there is no guidance
    image_scale: float = 0.0         # of the frames before; 0: no third pass
    perturbed_scale: float = 0.0     # away from a third pass of a disturbed network
    renorm: float = 1.0              # below 1: the prediction's norm over c's is brought down to 1, by no more than this factor
    trunc: float = 0.0               # no guidance where the network is told a time below this
    min_scale: float | None = None   # the scale grows from here over the sets of a frame

    @property
    def passes(self) -> int:
        """How many conditionings of a state go through the network together."""
        if self.scale <= 1:
            return 1
        return 3 if self.image_scale or self.perturbed_scale else 2

    def at_set(self, number: int, count: int) -> Guidance:
        """That of one of `count` sets."""
        if self.min_scale is None:
            return self
        return self._replace(scale=self.min_scale + (self.scale - self.min_scale) * (number + 1) / count)

    def words(self, wanted: Tensor, empty: Tensor) -> Tensor:
        """Conditions of all passes, one behind the other.    [B, K, D], [B, K, D] -> [passes * B, K, D]"""
        third = empty if self.image_scale else wanted
        return torch.cat([wanted, empty, third][:self.passes])

    def frames(self, tokens: Tensor, bos: Tensor) -> Tensor:
        """Tokens of the frame before, for all passes: the one with nothing sees the frame before the first.    -> [passes * B, N, D]"""
        second = bos.expand_as(tokens) if self.image_scale else tokens
        return torch.cat([tokens, second, tokens][:self.passes])

    def combine(self, predictions: Tensor) -> Tensor:
        """One prediction out of those of all passes.    [passes * B, N, E] -> [B, N, E]"""
        if self.passes == 1:
            return predictions
        c, u, *third = predictions.chunk(self.passes)
        out = u + self.scale * (c - (third[0] if self.image_scale else u))
        if self.renorm < 1:
            rows = tuple(range(1, out.ndim))
            norms = [torch.linalg.vector_norm(x, dim=rows, keepdim=True) for x in (c, out)]
            out = out * (norms[0] / norms[1]).clamp(self.renorm, 1)
        if self.image_scale:
            return out + self.image_scale * (third[0] - u)
        return out + self.perturbed_scale * (c - third[0]) if third else out
