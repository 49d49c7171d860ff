"""NOVA's drawing: frame by frame, within a frame set by set of tokens in one random order, each set by a sampler on the network's head."""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from scepter.core import streams
from scepter.diffusion.process import Diffusion, Level, network_dtype
from scepter.models.nova.blocks import KeyValues, unpatchify
from scepter.models.nova.guidance import Guidance
from scepter.models.nova.transformer import NovaTransformer

Sampler = Callable[..., Tensor]    # (denoise, x, levels, *, fresh, between) -> x, see diffusion/samplers.py


class Draws(Protocol):
    """What is random in a drawing of B clips with N tokens of E numbers in a frame."""

    def order(self) -> Tensor:
        """[B, N] int64: the order in which tokens of a frame are drawn."""

    def start(self, frame: int, number: int) -> Tensor:
        """[B, N, E]: the noise in which a set begins."""

    def fresh(self, frame: int, number: int, count: int) -> Tensor:
        """[B, N, E]: the noise that a sampler adds in a set for the count-th time, from 0."""


class KeyedDraws(Draws):
    """Draws by the seeds of rows: those of one clip do not depend on the batch that it is drawn in.

    A token is in one set alone, so all sets of a frame share their noise, and only the first of them draws it: 64 sets of 25 steps on a
    GPU would wait for the CPU 1600 times.
    """

    def __init__(self, seeds: Sequence[int], tokens: int, width: int, device: torch.device):
        self.seeds, self.shape, self.device, self.frame = seeds, (tokens, width), device, -1
        self.noises: dict[str, Tensor] = {}    # of this frame

    def order(self) -> Tensor:
        return streams.normal_rows(self.seeds, 'order', self.shape[:1], 'cpu', torch.float64).argsort(dim=1, stable=True).to(self.device)

    def start(self, frame: int, number: int) -> Tensor:
        return self._noise(frame, 'start')

    def fresh(self, frame: int, number: int, count: int) -> Tensor:
        return self._noise(frame, f'fresh {count}')

    def _noise(self, frame: int, use: str) -> Tensor:
        if frame != self.frame:
            self.frame, self.noises = frame, {}
        if use not in self.noises:
            self.noises[use] = streams.normal_rows(self.seeds, f'{use} {frame}', self.shape, self.device)
        return self.noises[use]


class Painter:
    """Draws clips from a network.    conditions [B, K, D] each  ->  latents [B, C, T, h, w]

    sets: of tokens in a frame.  chains: levels of one set (steps.py).  grid: rows and columns of a frame's tokens, where they are not the
    network's own.  on_set: called after each set as (number, of how many in the whole clip, tokens of the frame).
    """

    def __init__(self, network: NovaTransformer, diffusion: Diffusion, chains: list[list[Level]], sampler: Sampler, guidance: Guidance,
                 draws: Draws, sets: int = 64, on_set: Callable[[int, int, Tensor], None] | None = None,
                 grid: tuple[int, int] | None = None):
        self.network, self.diffusion, self.chains, self.sampler = network, diffusion, chains, sampler
        self.guidance, self.draws, self.on_set = guidance, draws, on_set
        self.grid = rows, columns = grid or network.image_grid
        self.coarse = rows // 2, columns // 2    # of the video encoder
        self.sizes, self.dtype = set_sizes(sets, rows * columns), network_dtype(network, torch.empty(0))
        self.done, self.total = 0, 0    # sets of a clip
        self.width = network.patch ** 2 * network.IMAGE_DIM

    @torch.no_grad()
    def draw(self, wanted: Tensor, empty: Tensor, length: int = 1, first: Tensor | None = None) -> Tensor:
        """empty: the condition of a pass that is told nothing.  first [B, C, h, w]: a latent that is the first frame."""
        network, order = self.network, self.draws.order()
        condition = self.guidance.words(wanted, empty)
        caches = network.caches(length, condition.shape[1] + length * self.coarse[0] * self.coarse[1])
        self.done, self.total = 0, sum(map(bool, self.sizes)) * (length if first is None else length - 1)
        frames: list[Tensor] = []
        told_first = None
        for number in range(length):
            told = self._indicator(frames[-1] if frames else None, number, length, condition, caches, len(wanted))
            if told_first is None:
                told_first = told
            else:
                told = network.video_encoder.mix(told_first, told)
            if number == 0 and first is not None:
                frames.append(first.float())
                continue
            frames.append(unpatchify(self._frame(number, told, order), network.patch, self.grid))
        return torch.stack(frames, 2)

    def _indicator(self, frame: Tensor | None, number: int, length: int, condition: Tensor, caches: list[KeyValues] | None,
                   rows: int) -> Tensor:
        """What the frames before say about this one.    frame [B, C, h, w] -> [passes * B, Nv, D]"""
        network, bos = self.network, self.network.bos(rows, self.coarse)    # [B, 1, Nv, D]
        x = bos if frame is None else network.video_encoder.patch_embed(frame.to(self.dtype))[:, None]
        prefix = condition.shape[1] if number == 0 else 0
        x, turns = network.with_positions(x.to(condition.dtype), self.coarse, prefix, number, length)
        x = self.guidance.frames(x[:, 0], bos[:, 0].to(x.dtype))
        return network.video_encoder(x, condition if number == 0 else None, turns, None, caches)

    def _frame(self, frame: int, told: Tensor, order: Tensor) -> Tensor:
        """All tokens of a frame, [B, N, E] float32.    told [passes * B, Nv, D], order [B, N]"""
        network, passes, (batch, count) = self.network, self.guidance.passes, order.shape
        x = torch.zeros(batch, count, self.width, device=order.device)
        hidden, turns, seen = torch.ones(batch, count, 1, device=order.device), network.image_rotations(self.coarse), 0
        for number, size in enumerate(self.sizes):
            if not size:
                continue
            ids, visible = order[:, seen:seen + size], order[:, :seen]
            tokens = network.mask_embed(network.image_encoder.patch_embed.of_tokens(x.to(self.dtype)), hidden)
            z = network.image_encoder(tokens.repeat(passes, 1, 1), told, visible.repeat(passes, 1), turns)
            drawn = self._set(frame, number, z.gather(1, _places(ids.repeat(passes, 1), z.shape[-1])), ids)
            x, hidden, seen = x.scatter(1, _places(ids, self.width), drawn), hidden.scatter(1, ids[..., None], 0.0), seen + size
            self.done += 1
            if self.on_set is not None:
                self.on_set(self.done, self.total, x)
        return x

    def _set(self, frame: int, number: int, z: Tensor, ids: Tensor) -> Tensor:
        """The tokens of one set, [B, n, E].    z [passes * B, n, D], ids [B, n]

        The norm of `renorm` is taken over all tokens of a frame, as published, with the state itself in place of a prediction outside
        of the set: then the state is of all tokens, else of these alone.
        """
        guidance, places = self.guidance.at_set(number, len(self.sizes)), _places(ids, self.width)
        is_whole = guidance.renorm < 1 and guidance.passes > 1
        decoder, counts = self.network.image_decoder, itertools.count()
        known = decoder.knows(z)

        def of_set(x: Tensor) -> Tensor:
            return x.gather(1, places)

        def denoise(xt: Tensor, level: Level) -> tuple[Tensor, Tensor]:
            now = guidance if level.t >= guidance.trunc else Guidance(scale=1.0)
            x = of_set(xt) if is_whole else xt
            t = torch.full((len(x) * now.passes,), float(level.t), device=x.device)
            out = decoder(x.repeat(now.passes, 1, 1).to(self.dtype), t, known=known[:len(t)]).to(xt.dtype)
            if is_whole:
                every = places.repeat(now.passes, 1, 1)
                out = xt.repeat(now.passes, 1, 1).scatter(1, every, out)
            return self.diffusion.split(now.combine(out), xt, level)

        def fresh(like: Tensor) -> Tensor:
            noise = self.draws.fresh(frame, number, next(counts)).to(like)
            return noise if is_whole else of_set(noise)

        state = self.draws.start(frame, number).float()
        state = (state if is_whole else of_set(state)) * math.hypot(self.chains[0][0].alpha, self.chains[0][0].sigma)
        for levels in self.chains:
            state = self.sampler(denoise, state, levels, fresh=fresh, between=self.diffusion.between)
        return of_set(state) if is_whole else state


class Progress:
    """Counts sets on a bar where one is wanted, and calls `on_step`."""

    def __init__(self, is_shown: bool, on_step: Callable[[int, int, Tensor], None] | None):
        self.bar = tqdm(desc='sets', leave=False) if is_shown else None
        self.on_step = on_step

    def __enter__(self) -> Callable[[int, int, Tensor], None]:
        return self.count

    def count(self, number: int, total: int, tokens: Tensor) -> None:
        """After a set: its number, from 1, and how many there are in all frames."""
        if self.bar is not None:
            self.bar.total = total
            self.bar.update()
        if self.on_step is not None:
            self.on_step(number, total, tokens)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def set_sizes(sets: int, tokens: int) -> list[int]:
    """How many of the tokens each set has: few at first, by a cosine (Chang et al. 2022, arXiv 2202.04200); some may have none."""
    left = [round(math.cos(math.pi / 2 * k / sets) * tokens) for k in range(sets + 1)]
    return [before - after for before, after in pairwise(left)]


def _places(ids: Tensor, width: int) -> Tensor:
    """Numbers of tokens as `gather` and `scatter` want them.    [B, n] -> [B, n, width]"""
    return ids[..., None].expand(-1, -1, width)
