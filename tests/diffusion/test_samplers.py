"""Laws of the samplers, on data whose exact denoiser is known."""
from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from scepter.core.registry import SAMPLERS
from scepter.diffusion import Level
from scepter.diffusion.samplers import ancestral, log_ratio

MEANS, WEIGHTS, STD = torch.tensor([-1.0, 0.4, 1.3]).double(), torch.tensor([0.3, 0.5, 0.2]).double(), 0.35
DETERMINISTIC = {'dpm2_ancestral': 0.0, 'dpmpp_2s_ancestral': 0.0, 'dpmpp_sde': 0.0, 'dpmpp_2m_sde': 0.0, 'dpmpp_3m_sde': 0.0,
                 'euler_ancestral': 0.0}
STOCHASTIC = ['ddpm', 'euler_ancestral', 'dpm2_ancestral', 'dpmpp_2s_ancestral', 'dpmpp_sde', 'dpmpp_2m_sde', 'dpmpp_3m_sde']


def vp(lam: float) -> Level:
    return Level(lam, math.sqrt(1 / (1 + math.exp(-2 * lam))), math.sqrt(1 / (1 + math.exp(2 * lam))))


def flow(s: float) -> Level:
    return Level(s, 1 - s, s)


def vp_between(a: Level, b: Level, r: float) -> Level:
    return vp((1 - r) * log_ratio(a) + r * log_ratio(b))


def flow_between(a: Level, b: Level, r: float) -> Level:
    return flow(1 / (1 + math.exp((1 - r) * log_ratio(a) + r * log_ratio(b))))


def mixture(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """The exact denoiser of three Gaussians on a line; x float64 [N]."""
    alpha, sigma = level.alpha, level.sigma
    variance = (alpha * STD) ** 2 + sigma ** 2
    away = x[:, None] - alpha * MEANS
    share = (WEIGHTS.log() - away ** 2 / (2 * variance)).softmax(-1)
    x0 = (share * (MEANS + alpha * STD ** 2 / variance * away)).sum(-1)
    return x0, (x - alpha * x0) / sigma


def gaussian(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """The exact denoiser of N(0, STD^2): linear in x."""
    x0 = level.alpha * STD ** 2 / ((level.alpha * STD) ** 2 + level.sigma ** 2) * x
    return x0, (x - level.alpha * x0) / level.sigma


def no_noise(x: Tensor) -> Tensor:
    raise AssertionError('a deterministic sampler drew noise')


def run(name: str, denoise, x: Tensor, levels: list[Level], fresh=no_noise, between=vp_between, **options) -> Tensor:
    return SAMPLERS.get(name)(denoise, x, levels, fresh=fresh, between=between, **options)


def even(steps: int, graded: bool = False) -> list[Level]:
    """Steps of equal length in lambda from -2.5 to 2; graded: the first one cut into ever shorter ones towards the noise, so that a
    multistep method has gathered its history before its first steps of low order can be felt."""
    h = 4.5 / steps
    start = [-2.5 + h * 2.0 ** -j for j in range(2 * steps.bit_length(), 0, -1)] if graded else []
    return [vp(lam) for lam in [-2.5, *start, *(-2.5 + h * i for i in range(1, steps + 1))]]


@pytest.fixture(scope='module')
def exact() -> tuple[Tensor, Tensor]:
    """States at the noisy end, and where the probability flow carries them."""
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)
    return x, run('unipc', mixture, x, even(600), order=3)


@pytest.mark.parametrize(('name', 'order', 'options'), [
    ('ddim', 1, {}), ('euler', 1, {}), ('euler_ancestral', 1, {}), ('heun', 2, {}), ('dpm2', 2, {}), ('dpm2_ancestral', 2, {}),
    ('dpmpp_2s_ancestral', 2, {}), ('dpmpp_sde', 2, {}), ('dpmpp_2m', 2, {}), ('dpmpp_2m_sde', 2, {}), ('dpmpp_3m_sde', 3, {}),
    ('unipc', 2, {'order': 1}), ('unipc', 3, {}), ('unipc', 4, {'order': 3}), ('lms', 2, {'order': 2}), ('lms', 4, {}),
])
def test_the_error_falls_with_the_stated_power_of_the_step(name, order, options, exact):
    x, end = exact
    options = options | ({'eta': 0.0} if name in DETERMINISTIC else {})
    coarse, fine = ((run(name, mixture, x, even(n, graded=True), **options) - end).abs().max().item() for n in (64, 128))
    assert order - 0.2 < math.log2(coarse / fine) < order + 0.5


@pytest.mark.parametrize(('name', 'order'), [('ddim', 1), ('heun', 2), ('dpm2', 2), ('dpmpp_2m', 2), ('unipc', 2), ('lms', 2)])
def test_samplers_keep_their_order_from_pure_noise_on(name, order):
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)

    def end(method: str, n: int) -> Tensor:
        return run(method, mixture, x, [flow(1 - 0.95 * i / n) for i in range(n + 1)], between=flow_between)

    truth = end('heun', 3000)
    coarse, fine = ((end(name, n) - truth).abs().max().item() for n in (60, 120))
    assert math.log2(coarse / fine) > order - 0.25


@pytest.mark.parametrize('name', sorted(set(SAMPLERS)))
def test_every_sampler_goes_from_pure_noise_to_the_clean_level(name):
    levels = [flow(1 - i / 12) for i in range(12)] + [Level(0.0, 1.0, 0.0)]
    x = torch.linspace(-2, 2, 16, dtype=torch.float64)
    end = run(name, mixture, x, levels, fresh=torch.randn_like, between=flow_between)
    assert end.isfinite().all() and end.abs().max() < 3


def variance_after(name: str, levels: list[Level], denoise=gaussian, **options) -> float:
    """The variance of a sampler's result on Gaussian data, exactly: it is linear in its noises, so each is given a row of its own."""
    rows, x = 400, torch.zeros(400, dtype=torch.float64)
    x[0] = math.sqrt((levels[0].alpha * STD) ** 2 + levels[0].sigma ** 2)
    drawn = []

    def fresh(like: Tensor) -> Tensor:
        drawn.append(torch.zeros(rows, dtype=torch.float64))
        drawn[-1][len(drawn)] = 1
        return drawn[-1]

    return run(name, denoise, x, levels, fresh=fresh, **options).square().sum().item()


@pytest.mark.parametrize('name', STOCHASTIC)
def test_stochastic_samplers_converge_in_distribution(name):
    truth = (even(8)[-1].alpha * STD) ** 2 + even(8)[-1].sigma ** 2
    coarse, fine = (abs(variance_after(name, even(n)) - truth) for n in (40, 160))
    assert fine < 0.03 * truth
    assert fine < max(coarse / 3.5, 1e-4 * truth)    # some are that near from the beginning


@pytest.mark.parametrize('name', ['dpmpp_sde', 'dpmpp_2m_sde', 'dpmpp_3m_sde'])
def test_sde_samplers_of_second_order_beat_ancestral_euler(name):
    truth = (even(8)[-1].alpha * STD) ** 2 + even(8)[-1].sigma ** 2
    assert abs(variance_after(name, even(40)) - truth) < 0.3 * abs(variance_after('ddpm', even(40)) - truth)


def test_lcm_with_the_exact_consistency_map_has_the_right_variance_in_any_number_of_steps():
    def consistency(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return STD / math.sqrt((level.alpha * STD) ** 2 + level.sigma ** 2) * x, x
    for steps in (1, 2, 4):
        assert variance_after('lcm', [*even(steps)[:-1], Level(0, 1.0, 0.0)], consistency) == pytest.approx(STD ** 2, rel=1e-12)


def test_flow_euler_is_ddim():
    levels = [flow(1 - i / 10) for i in range(11)]
    x = torch.linspace(-2, 2, 16, dtype=torch.float64)
    by_hand = x
    for now, then in pairwise(levels):
        x0, eps = mixture(by_hand, now)
        by_hand = by_hand + (then.sigma - now.sigma) * (eps - x0)
    torch.testing.assert_close(run('ddim', mixture, x, levels), by_hand, rtol=1e-12, atol=1e-12)


def test_ddim_with_eta_1_is_the_ddpm_posterior():
    """arXiv:2006.11239, equations 6 and 7, written in betas."""
    betas = torch.linspace(1e-3, 0.2, 20, dtype=torch.float64)
    bars = torch.cumprod(1 - betas, 0)
    levels = [Level(i, math.sqrt(bars[i]), math.sqrt(1 - bars[i])) for i in reversed(range(20))]
    x = torch.linspace(-2, 2, 16, dtype=torch.float64)
    noise = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_hand = x
    for k, i in enumerate(range(19, 0, -1)):
        x0, _ = mixture(by_hand, levels[k])
        mean = (bars[i - 1].sqrt() * betas[i] * x0 + (1 - betas[i]).sqrt() * (1 - bars[i - 1]) * by_hand) / (1 - bars[i])
        by_hand = mean + ((1 - bars[i - 1]) / (1 - bars[i]) * betas[i]).sqrt() * noise[k]
    for name, options in (('ddim', {'eta': 1.0}), ('ddpm', {}), ('euler_ancestral', {})):
        draws = iter(noise)
        torch.testing.assert_close(run(name, mixture, x, levels, fresh=lambda _: next(draws), **options), by_hand)  # noqa: B023


def test_ancestral_noise_is_that_of_the_posterior_for_a_flow_too():
    now, then = flow(0.8), flow(0.5)
    _, up = ancestral(now, then, 1.0)
    step = now.sigma ** 2 - (now.alpha / then.alpha * then.sigma) ** 2    # variance of q(x | x')
    assert up == pytest.approx(math.sqrt(then.sigma ** 2 * step / now.sigma ** 2))


@pytest.mark.parametrize(('one', 'other'), [('dpmpp_2m', 'dpmpp_2m_sde'), ('dpm2', 'dpm2_ancestral'), ('euler', 'euler_ancestral')])
def test_without_noise_a_stochastic_sampler_is_its_deterministic_one(one, other):
    x = torch.linspace(-2, 2, 16, dtype=torch.float64)
    assert torch.equal(run(one, mixture, x, even(10)), run(other, mixture, x, even(10), eta=0.0))


def test_the_two_noises_of_dpmpp_sde_lie_on_one_brownian_path():
    """The half step's noise, carried on to the end of the step, has the covariance with the whole step's that the SDE gives it."""
    now, then, r = vp(-0.5), vp(0.3), 0.5
    middle = vp_between(now, then, r)
    draws: list[Tensor] = []

    def fresh(like: Tensor) -> Tensor:
        draws.append(torch.eye(2, dtype=torch.float64)[len(draws)])
        return draws[-1]

    states: list[Tensor] = []

    def nothing(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        states.append(x)
        return torch.zeros_like(x), x / level.sigma

    end = run('dpmpp_sde', nothing, torch.zeros(2, dtype=torch.float64), [now, then], fresh=fresh)
    # with x0 = 0 the exact SDE carries a state on by a factor (sigma'/sigma) e^-h, so the later noise adds to the earlier one
    carried = then.sigma / middle.sigma * math.exp(-(log_ratio(then) - log_ratio(middle))) * states[1]
    assert (end * carried).sum().item() == pytest.approx(carried.square().sum().item())
