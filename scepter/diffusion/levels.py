"""Which levels are trained on, and how often: plain functions  (use, n, count, tokens) -> int64 [count],  indices 0 .. n-1.

Each is a density over time t in 0 .. 1, from data to noise. The process has n levels, so time is cut into n equal intervals, and index i
is drawn exactly as often as t falls into the i-th of them. Entry k is keyed by (seed, use, the number of sample k), by core/streams; with
tokens there is a level for each of them, [count, L], keyed by the token too.

A shift is the schedule's: what is drawn here is the time before it. For `flow`, logit(sigma) = logit(t) + log(shift), so that logit_normal
with mean m on a schedule of shift s draws noise levels sigma that are logit-normal with mean m + log(s).
"""
from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from scepter.core import streams
from scepter.core.registry import LEVELS
from scepter.core.streams import Tokens
from scepter.core.values import Bounds


@LEVELS.register_function()
def uniform(use: str, n: int, count: int, tokens: Tokens = None) -> Tensor:
    """Every level as often as any other (DDPM, arXiv:2006.11239)."""
    return streams.integers(use, n, count, tokens)


@LEVELS.register_function()
def logit_normal(use: str, n: int, count: int, tokens: Tokens = None, *,
                 mean: float = 0.0, std: Annotated[float, Bounds(above=0)] = 1.0) -> Tensor:
    """logit(t) is normal: the middle most often, the ends hardly ever (SD3, arXiv:2403.03206, equation 19; its best was 0, 1).

    mean: below 0 nearer to the data, above 0 nearer to the noise.  std: the smaller, the narrower about the mean.
    """
    u = streams.uniform(use, count, tokens).double()
    return index_of(torch.sigmoid(mean + std * torch.special.ndtri(u)), n)


@LEVELS.register_function()
def mode(use: str, n: int, count: int, tokens: Tokens = None, *,
         scale: Annotated[float, Bounds(least=-1, most=2 / (math.pi - 2))] = 1.29) -> Tensor:
    """The middle more often (scale > 0) or the ends (scale < 0), and no level never (SD3, arXiv:2403.03206, equation 20)."""
    u = streams.uniform(use, count, tokens).double()
    return index_of(1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u), n)


def index_of(t: Tensor, n: int) -> Tensor:
    """Times in 0 .. 1 -> int64: which of n equal intervals each lies in."""
    return (t * n).long().clamp(0, n - 1)
