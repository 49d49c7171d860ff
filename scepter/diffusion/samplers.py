"""Samplers: plain functions  (denoise, x, levels, *, fresh, between, ...) -> x at the last level.

    denoise(x, level) -> (x0, eps)      what the network thinks of the state
    levels                              noisiest first; alpha and sigma are plain numbers, so no step waits for the device
    fresh(x) -> noise                   standard normals like x
    between(a, b, r) -> level           a share r of the way in log-SNR

Letters of the papers: lambda = log(alpha/sigma), h = the step in lambda, primes for where a step goes. All are written in (alpha,
sigma), so one function serves diffusion, flow and variance-exploding processes, from pure noise (alpha 0) to the clean level
(sigma 0). At these two ends lambda is infinite: there a step has first order, as in the papers' own code.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated

import numpy as np
from torch import Tensor

from scepter.core.registry import SAMPLERS
from scepter.core.values import Bounds
from scepter.diffusion.process import Level

Denoise = Callable[[Tensor, Level], tuple[Tensor, Tensor]]
Fresh = Callable[[Tensor], Tensor]
Between = Callable[[Level, Level, float], Level]
Share = Annotated[float, Bounds(least=0)]    # how much of the noise of the full stochastic step is added
Order = Annotated[int, Bounds(least=1, most=8)]


# ---------------------------------------------------------------- one evaluation a step, first order
@SAMPLERS.register_function()
def ddim(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between, eta: Share = 0.0) -> Tensor:
    """DDIM (arXiv:2010.02502, equation 12). eta 0 is Euler's method for every process; eta 1 is DDPM."""
    for now, then in pairwise(levels):
        x0, eps = denoise(x, now)
        down, up = ancestral(now, then, eta)
        x = then.alpha * x0 + down * eps
        if up:
            x = x + up * fresh(x)
    return x


@SAMPLERS.register_function()
def euler(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between) -> Tensor:
    """Euler's method on the probability flow (arXiv:2206.00364), in sigma/alpha or in a flow's time: the same step, and DDIM's."""
    return ddim(denoise, x, levels, fresh=fresh, between=between)


@SAMPLERS.register_function()
def euler_ancestral(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between, eta: Share = 1.0) -> Tensor:
    """Euler's method to below the next level, and noise back up to it."""
    return ddim(denoise, x, levels, fresh=fresh, between=between, eta=eta)


@SAMPLERS.register_function()
def ddpm(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between) -> Tensor:
    """The posterior q(x' | x, x0) at the predicted x0, with its own variance (arXiv:2006.11239, equation 7)."""
    return ddim(denoise, x, levels, fresh=fresh, between=between, eta=1.0)


@SAMPLERS.register_function()
def lcm(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between) -> Tensor:
    """Multistep consistency sampling (arXiv:2303.01469, algorithm 1; arXiv:2310.04378): to x0 at once, and noise back up."""
    for now, then in pairwise(levels):
        x0, _ = denoise(x, now)
        x = x0 if then.sigma == 0 else then.alpha * x0 + then.sigma * fresh(x)
    return x


# ---------------------------------------------------------------- two evaluations a step, second order in sigma/alpha
@SAMPLERS.register_function()
def heun(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between) -> Tensor:
    """Heun's trapezoid in sigma/alpha (arXiv:2206.00364, algorithm 1)."""
    for now, then in pairwise(levels):
        x0, eps = denoise(x, now)
        x = then.alpha * x0 + then.sigma * eps
        if finite(now, then):
            _, eps2 = denoise(x, then)
            x = x + (then.sigma - then.alpha * now.sigma / now.alpha) / 2 * (eps2 - eps)
    return x


@SAMPLERS.register_function()
def dpm2(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between) -> Tensor:
    """DPM-Solver-2: the midpoint in log-SNR (arXiv:2206.00927, algorithm 1)."""
    return dpm2_ancestral(denoise, x, levels, fresh=fresh, between=between, eta=0.0)


@SAMPLERS.register_function()
def dpm2_ancestral(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between, eta: Share = 1.0) -> Tensor:
    """`dpm2` to below the next level, and noise back up to it."""
    for now, then in pairwise(levels):
        x0, eps = denoise(x, now)
        down, up = ancestral(now, then, eta)
        below = then._replace(sigma=down)
        if finite(now, below):
            middle = between(now, below, 0.5)
            # x0 + sigma/alpha * eps is the state over alpha: from here to the middle, then with its slope all the way
            _, eps = denoise(middle.alpha * x0 + middle.sigma * eps, middle)
            x = then.alpha / now.alpha * x + (down - then.alpha * now.sigma / now.alpha) * eps
        else:
            x = then.alpha * x0 + down * eps
        if up:
            x = x + up * fresh(x)
    return x


@SAMPLERS.register_function()
def dpmpp_2s_ancestral(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between, eta: Share = 1.0) -> Tensor:
    """DPM-Solver++(2S), the midpoint (arXiv:2211.01095, algorithm 1), to below the next level, and noise back up to it."""
    for now, then in pairwise(levels):
        x0, _ = denoise(x, now)
        down, up = ancestral(now, then, eta)
        below = then._replace(sigma=down)
        if finite(now, below):
            middle = between(now, below, 0.5)
            x0, _ = denoise(towards(x, x0, now, middle, middle.sigma), middle)
        x = towards(x, x0, now, then, down)
        if up:
            x = x + up * fresh(x)
    return x


@SAMPLERS.register_function()
def dpmpp_sde(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between,
              eta: Share = 1.0, r: Annotated[float, Bounds(above=0, most=1)] = 0.5) -> Tensor:
    """DPM-Solver++ for the reverse SDE, single-step of second order (arXiv:2211.01095, algorithm 1 with noise), midpoint at r.

    The noise of the half step and that of the whole step belong to one Brownian path, so they are correlated.
    """
    for now, then in pairwise(levels):
        x0, _ = denoise(x, now)
        down, up = ancestral(now, then, eta)
        noise = None
        if finite(now, then):
            middle = between(now, then, r)
            down_middle, up_middle = ancestral(now, middle, eta)
            x_middle = towards(x, x0, now, middle, down_middle)
            if up:
                noise = fresh(x)
                x_middle = x_middle + up_middle * noise
            x0_middle, _ = denoise(x_middle, middle)
            x0 = x0 + (x0_middle - x0) / (2 * r)
        x = towards(x, x0, now, then, down)
        if up:
            if noise is None:
                noise = fresh(x)
            else:
                shared = correlation(now, middle, then)
                noise = shared * noise + math.sqrt(1 - shared ** 2) * fresh(x)
            x = x + up * noise
    return x


# ---------------------------------------------------------------- one evaluation a step, higher order from the steps before
@SAMPLERS.register_function()
def dpmpp_2m(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between) -> Tensor:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2)."""
    return dpmpp_2m_sde(denoise, x, levels, fresh=fresh, between=between, eta=0.0)


@SAMPLERS.register_function()
def dpmpp_2m_sde(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between, eta: Share = 1.0) -> Tensor:
    """DPM-Solver++(2M) for the reverse SDE of strength eta, by the midpoint; eta 0 is `dpmpp_2m`."""
    before, h_before = None, math.inf
    for now, then in pairwise(levels):
        x0, _ = denoise(x, now)
        h = log_ratio(then) - log_ratio(now)
        data = x0
        if before is not None and finite(now, then):
            data = x0 + h / (2 * h_before) * (x0 - before)
        x = reverse_sde(x, data, now, then, h, eta, fresh)
        before, h_before = x0, h
    return x


@SAMPLERS.register_function()
def dpmpp_3m_sde(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between, eta: Share = 1.0) -> Tensor:
    """DPM-Solver++ for the reverse SDE of strength eta, multistep of third order: x0 is a parabola in lambda (Crowson 2023)."""
    past: list[tuple[Tensor, float]] = []    # (x0, lambda) of the levels before, the latest first
    for now, then in pairwise(levels):
        x0, _ = denoise(x, now)
        here = log_ratio(now)
        h = log_ratio(then) - here
        data = x0
        if past and finite(now, then):
            z = (1 + eta) * h
            whole = -math.expm1(-z)                  # the integrals of e^(u-1) * (1, u, u^2), u = 0 .. 1 in units of z
            phi1 = (z - whole) / z
            phi2 = (z - 2 * phi1) / z
            slope1 = (x0 - past[0][0]) * (h / (here - past[0][1]))
            if len(past) == 1:
                data = x0 + phi1 / whole * slope1
            else:
                r1, r2 = (here - past[0][1]) / h, (past[0][1] - past[1][1]) / h
                slope2 = (past[0][0] - past[1][0]) / r2
                curve = (slope1 - slope2) / (r1 + r2)
                data = x0 + phi1 / whole * (slope1 + r1 * curve) + phi2 / whole * curve
        x = reverse_sde(x, data, now, then, h, eta, fresh)
        past = [(x0, here), *past[:1]] if math.isfinite(here) else []
    return x


@SAMPLERS.register_function()
def unipc(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between, order: Order = 2) -> Tensor:
    """UniPC, a predictor of `order` and a corrector one higher that needs no evaluation of its own (arXiv:2302.04867, B2(h)).

    The corrector goes back over the step just made, now that x0 at its end is known.
    """
    past: list[tuple[Tensor, float]] = []    # (x0, lambda) of the levels before, the latest first
    start: Tensor | None = None              # the state from which the last step was made,
    came: Level | None = None                # its level,
    used = 0                                 # and the order of that step
    for now, then in pairwise(levels):
        x0, _ = denoise(x, now)
        here = log_ratio(now)
        if start is not None and came is not None and past:
            h = here - past[0][1]
            nodes = [(lam - past[0][1]) / h for _, lam in past[1:used]] + [1.0]
            slopes = [(old - past[0][0]) / r for (old, _), r in zip(past[1:used], nodes)] + [x0 - past[0][0]]
            data = _unipc_data(past[0][0], slopes, nodes, h)
            x = towards(start, data, came, now, now.sigma)
        past = [(x0, here), *past[:order - 1]] if math.isfinite(here) else []
        data, used = x0, 1
        if finite(now, then):
            used = max(len(past), 1)
            h = log_ratio(then) - here
            nodes = [(lam - here) / h for _, lam in past[1:]]
            data = _unipc_data(x0, [(old - x0) / r for (old, _), r in zip(past[1:], nodes)], nodes, h)
        start, came = x, now
        x = towards(x, data, now, then, then.sigma)
    return x


@SAMPLERS.register_function()
def lms(denoise: Denoise, x: Tensor, levels: list[Level], *, fresh: Fresh, between: Between, order: Order = 4) -> Tensor:
    """Linear multistep (Adams and Bashforth) in sigma/alpha: the integral of the polynomial through the last `order` slopes."""
    past: list[tuple[Tensor, float]] = []    # (eps, sigma/alpha), the latest first
    for now, then in pairwise(levels):
        x0, eps = denoise(x, now)
        if not finite(now, now):
            x = then.alpha * x0 + then.sigma * eps
            continue
        here, there = now.sigma / now.alpha, then.sigma / then.alpha
        past = [(eps, here), *past[:order - 1]]
        weights = _adams_weights([node for _, node in past], here, there)
        x = then.alpha / now.alpha * x
        for weight, (slope, _) in zip(weights, past):
            x = x + then.alpha * weight * slope
    return x


# ---------------------------------------------------------------- bricks
def log_ratio(level: Level) -> float:
    """lambda = log(alpha/sigma), half of the log-SNR; -inf for pure noise, inf for the clean level."""
    if level.alpha == 0:
        return -math.inf
    return math.inf if level.sigma == 0 else math.log(level.alpha / level.sigma)


def finite(now: Level, then: Level) -> bool:
    """Whether the step has a finite length in lambda."""
    return now.alpha > 0 and then.sigma > 0


def ancestral(now: Level, then: Level, eta: float) -> tuple[float, float]:
    """(down, up): how far below `then` the deterministic part goes, and the noise that brings it back: down^2 + up^2 = sigma'^2.

    With eta 1, up is the standard deviation of q(x' | x, x0), for every process.
    """
    up = min(then.sigma, eta * then.sigma * math.sqrt(max(0.0, 1 - (then.sigma * now.alpha / (then.alpha * now.sigma)) ** 2)))
    return math.sqrt(then.sigma ** 2 - up ** 2), up


def towards(x: Tensor, data: Tensor, now: Level, then: Level, sigma: float) -> Tensor:
    """alpha' * data + sigma * eps, where eps is what explains x with `data` as its x0: the step of all the DPM-Solver++ family."""
    scale = sigma / now.sigma
    return scale * x + (then.alpha - scale * now.alpha) * data


def reverse_sde(x: Tensor, data: Tensor, now: Level, then: Level, h: float, eta: float, fresh: Fresh) -> Tensor:
    """One step of the reverse SDE of strength eta with x0 held at `data`: exact, so the noise is kept by e^(-eta h)."""
    if then.sigma == 0:
        return then.alpha * data
    kept = math.exp(-eta * h) if eta else 1.0    # h may be infinite
    x = towards(x, data, now, then, kept * then.sigma)
    return x + then.sigma * math.sqrt(1 - kept ** 2) * fresh(x) if eta else x


def correlation(now: Level, middle: Level, then: Level) -> float:
    """Of the noise gathered from now to middle with that from now to then: both are integrals over one Brownian path whose clock is
    the SNR."""
    snr = [(level.alpha / level.sigma) ** 2 for level in (now, middle, then)]
    return math.sqrt((snr[1] - snr[0]) / (snr[2] - snr[0]))


def _unipc_data(x0: Tensor, slopes: list[Tensor], nodes: list[float], h: float) -> Tensor:
    """The constant x0 that moves the state as the polynomial through x0 and its slopes at `nodes` (in units of h) does, to the
    order that the paper's B2(h) = 1 - e^(-h) keeps. A predictor of order two and a first corrector use 1/2, as the paper does."""
    if not slopes:
        return x0
    if len(slopes) == 1:
        return x0 + 0.5 * slopes[0]
    whole = moment = -math.expm1(-h)    # of e^(h(u-1)) * u^k, u = 0 .. 1 in units of h: here k = 0
    moments = []
    for k in range(1, len(nodes) + 1):
        moment = 1 - k * moment / h
        moments.append(moment / whole)
    weights = np.linalg.solve(np.vander(np.array(nodes), increasing=True).T, np.array(moments))
    for weight, slope in zip(weights.tolist(), slopes):
        x0 = x0 + weight * slope
    return x0


def _adams_weights(nodes: list[float], start: float, end: float) -> list[float]:
    """The integrals from start to end of the Lagrange polynomials through `nodes`; Gauss's rule is exact for them."""
    points, gauss = np.polynomial.legendre.leggauss((len(nodes) + 1) // 2)
    at = (end + start) / 2 + (end - start) / 2 * points
    return [float((end - start) / 2 * np.sum(gauss * np.prod([(at - other) / (node - other) for other in nodes if other != node], axis=0)))
            for node in nodes]
