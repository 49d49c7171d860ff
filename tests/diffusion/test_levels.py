"""Where t is drawn from: each density by its law, and what a schedule makes of it."""
from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scepter.core import streams
from scepter.core.faults import ConfigError
from scepter.core.registry import LEVELS, SCHEDULES
from scepter.diffusion import Diffusion
from scepter.diffusion.levels import index_of

DRAWS = 200_000


def drawn(name: str, n: int, count: int = DRAWS, first: int = 0, seed: int = 1, **options: Any) -> Tensor:
    with streams.current(seed, range(first, first + count)):
        return LEVELS.get(name)('timestep', n, count, **options)


def excess(indices: Tensor, shares: Tensor) -> float:
    """Pearson's chi-square of a histogram against the share [n] of each index, in its standard deviations above its mean.

    It has n - 1 degrees of freedom: mean n - 1, variance 2 (n - 1). What is rarer than 5 draws is taken together.
    """
    counts, expected = torch.bincount(indices.flatten(), minlength=len(shares)).double(), shares * indices.numel()
    rare = expected < 5
    counts, expected = (torch.cat([v[~rare], v[rare].sum()[None]]) if rare.any() else v for v in (counts, expected))
    freedom = len(counts) - 1
    return ((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)).item()


def logit_normal_below(t: float, mean: float, std: float) -> float:
    """The share of a logit-normal that lies below t: arXiv:2403.03206, equation 19, integrated."""
    return float(t >= 1) if not 0 < t < 1 else NormalDist(mean, std).cdf(math.log(t / (1 - t)))


def mode_below(t: float, scale: float) -> float:
    """The share of arXiv:2403.03206, equation 20, below t: it falls in u, so it is 1 - u where f(u) = t, found by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        u = (low + high) / 2
        low, high = (u, high) if 1 - u - scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u) > t else (low, u)
    return 1 - low


LAWS = {
    'uniform': [({}, lambda t: t)],
    'logit_normal': [({'mean': m, 'std': s}, lambda t, m=m, s=s: logit_normal_below(t, m, s)) for m, s in ((0, 1), (-0.5, 0.6), (1, 2))],
    'mode': [({'scale': s}, lambda t, s=s: mode_below(t, s)) for s in (1.29, -0.8, 0.0, 2 / (math.pi - 2))],
}


@pytest.mark.parametrize('n', [2, 25, 1000])
@pytest.mark.parametrize(('name', 'options', 'below'), [(name, *law) for name, laws in LAWS.items() for law in laws])
def test_each_level_is_drawn_as_often_as_its_interval_of_the_density(name, options, below, n):
    shares = torch.tensor([below((i + 1) / n) - below(i / n) for i in range(n)]).double()
    assert abs(excess(drawn(name, n, **options), shares)) < 6


def test_every_density_is_held_against_its_law():
    assert set(LAWS) == set(LEVELS)


def test_a_density_that_is_off_by_two_percent_would_be_found():
    shares = torch.tensor([logit_normal_below((i + 1) / 25, 0, 1) - logit_normal_below(i / 25, 0, 1) for i in range(25)]).double()
    for off in ({'mean': 0.02}, {'std': 1.02}):
        assert excess(drawn('logit_normal', 25, **off), shares) > 6


def test_uniform_levels_are_the_draws_that_older_runs_made():
    """Written down from commit aff6a90: streams.integers('timestep', 1000, 8) of seed 3, samples 10 .. 17."""
    assert drawn('uniform', 1000, count=8, first=10, seed=3).tolist() == [846, 84, 873, 487, 348, 585, 722, 111]


@pytest.mark.parametrize('name', sorted(LEVELS))
def test_a_level_is_keyed_by_its_sample_whatever_the_batch(name):
    together = drawn(name, 1000, count=64, first=5)
    assert together.dtype == torch.int64
    assert torch.equal(together[10:20], drawn(name, 1000, count=10, first=15))
    assert not torch.equal(together, drawn(name, 1000, count=64, first=5, seed=2))


@pytest.mark.parametrize(('name', 'options', 'below'), [(name, *laws[0]) for name, laws in LAWS.items()])
def test_a_level_of_each_token_has_the_same_law_and_is_its_own(name, options, below):
    rows, tokens, n = 4000, 50, 25
    levels = drawn(name, n, count=rows, tokens=tokens, **options)
    shares = torch.tensor([below((i + 1) / n) - below(i / n) for i in range(n)]).double()
    assert levels.shape == (rows, tokens) and abs(excess(levels, shares)) < 6
    # levels of two tokens, or of two rows, know nothing of each other: the correlation of m pairs is below 6 / sqrt(m)
    centred = (levels.double() - levels.double().mean()) / levels.double().std()
    for a, b in ((centred[:, :-1], centred[:, 1:]), (centred[:-1], centred[1:])):
        assert (a * b).mean().abs() < 6 / math.sqrt(a.numel())
    # and a token's level depends neither on the batch nor on the tokens beside it
    assert torch.equal(levels[10:20, :7], drawn(name, n, count=10, first=10, tokens=7, **options))


def test_the_loss_takes_a_level_of_each_token_and_the_criterion_sees_its_shape():
    flow = Diffusion(*SCHEDULES.get('flow')(1000), prediction='flow')
    x0, noise = torch.randn(4, 6, 8, dtype=torch.float64), torch.randn(4, 6, 8, dtype=torch.float64)
    t = drawn('logit_normal', 1000, count=4, tokens=6)
    told, shapes = [], []

    def network(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return 0.5 * x

    def absolute(out: Tensor, target: Tensor) -> Tensor:
        shapes.append(out.shape)
        return (out - target).abs()

    def by_hand(error: Callable[[Tensor], Tensor], weight: Tensor | float = 1.0) -> Tensor:
        sigma = flow.sigmas[t][..., None]
        out = 0.5 * ((1 - sigma) * x0 + sigma * noise)
        return (error(out - (noise - x0)).mean(-1) * weight).mean(1)

    torch.testing.assert_close(flow.loss(x0, t, network, noise=noise, criterion=absolute), by_hand(torch.abs))
    assert torch.equal(told[0], flow.times[t].float()) and shapes == [(4, 6, 8)]
    snr = ((1 - flow.sigmas[t]) / flow.sigmas[t]) ** 2
    weight = flow.sigmas[t] ** 2 * snr.clamp(max=5)    # an error in the flow is sigma times it in x0
    torch.testing.assert_close(flow.loss(x0, t, network, noise=noise, weight=flow.min_snr(5)), by_hand(torch.square, weight))


@pytest.mark.parametrize('name', sorted(LEVELS))
def test_levels_can_be_drawn_outside_of_a_run(name):
    for tokens, shape in ((None, (1000,)), (2, (1000, 2))):
        levels = LEVELS.get(name)('timestep', 4, 1000, tokens)
        assert levels.shape == shape and levels.unique().tolist() == [0, 1, 2, 3]


def test_the_ends_of_time_are_levels_too():
    assert index_of(torch.tensor([0.0, 1e-9, 0.25, 0.5 - 1e-9, 1.0], dtype=torch.float64), 4).tolist() == [0, 0, 1, 1, 3]


@pytest.mark.parametrize('shift', [0.5, 1.0, 3.0])
def test_a_shifted_flow_draws_noise_levels_of_the_papers_density(shift):
    """arXiv:2403.03206, section 5.3.2: equation 23 on t adds log(shift) to logit(t), the mean of a logit-normal."""
    n, mean, std = 50, -0.3, 0.8
    _, sigmas, _ = SCHEDULES.get('flow')(n, shift=shift)
    edges = [0.0, *sigmas.tolist()]
    below = [logit_normal_below(edge, mean + math.log(shift), std) for edge in edges]
    assert abs(excess(drawn('logit_normal', n, mean=mean, std=std), torch.tensor(np.diff(below)))) < 6


def test_a_shift_moves_the_mean_of_log_snr_by_twice_its_logarithm():
    flow = [Diffusion(*SCHEDULES.get('flow')(1000, shift=shift), prediction='flow') for shift in (1.0, 3.0)]
    t = drawn('logit_normal', 1000)[:20_000].clamp(max=998)    # log-SNR is -inf at the last
    plain, shifted = (2 * torch.log(f.alphas[t] / f.sigmas[t]).mean() for f in flow)
    assert (plain - shifted).item() == pytest.approx(2 * math.log(3))


@pytest.mark.parametrize('wrong', [{'NAME': 'logit_normal', 'STD': 0}, {'NAME': 'mode', 'SCALE': 1.8}, {'NAME': 'logit_normal', 'N': 10},
                                   {'NAME': 'logitnormal'}])
def test_a_density_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match='LEVELS'):
        LEVELS.function(wrong)
