"""Noise schedules: plain functions  n -> (alphas, sigmas) or (alphas, sigmas, times),  [n], from almost clean (0) to noise (n-1).

x_t = alpha * x0 + sigma * eps, float64. All but flows preserve variance: alpha^2 + sigma^2 = 1. Whether they are written in betas, in
the noise of another process or in log-SNR, only alpha/sigma matters to the mathematics; the pair says at which scale the network
sees the state. times is what the network is told at each level; where a schedule leaves it out, the index 0 .. n-1.
"""
from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from scepter.core.registry import SCHEDULES
from scepter.core.values import Bounds

Schedule = tuple[Tensor, Tensor]
Beta = Annotated[float, Bounds(above=0, below=1)]    # the share of the signal's variance that one step replaces by noise
Positive = Annotated[float, Bounds(above=0)]


@SCHEDULES.register_function()
def linear(n: int, *, beta_min: Beta = 1e-4, beta_max: Beta = 0.02) -> Schedule:
    """beta rises linearly (DDPM, arXiv:2006.11239)."""
    return from_betas(_line(beta_min, beta_max, n))


@SCHEDULES.register_function()
def scaled_linear(n: int, *, beta_min: Beta = 0.00085, beta_max: Beta = 0.012) -> Schedule:
    """The root of beta rises linearly (latent diffusion, arXiv:2112.10752); the defaults are Stable Diffusion's."""
    return from_betas(_line(math.sqrt(beta_min), math.sqrt(beta_max), n) ** 2)


@SCHEDULES.register_function()
def quadratic(n: int, *, init_beta: Beta = 0.00085, last_beta: Beta = 0.012) -> Schedule:
    """`scaled_linear` under its older name and arguments."""
    return scaled_linear(n, beta_min=init_beta, beta_max=last_beta)


@SCHEDULES.register_function()
def cosine(n: int, *, cosine_s: Annotated[float, Bounds(least=0)] = 0.008, beta_max: Beta = 0.999) -> Schedule:
    """alpha^2 falls like a squared cosine (arXiv:2102.09672, equation 17), each beta at most beta_max."""
    alpha_bar = torch.cos((_line(0, 1, n + 1) + cosine_s) / (1 + cosine_s) * math.pi / 2) ** 2
    return from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max))


@SCHEDULES.register_function()
def sigmoid(n: int, *, beta_min: Beta = 1e-4, beta_max: Beta = 0.02) -> Schedule:
    """beta rises like a sigmoid over -6 .. 6 (GeoDiff, arXiv:2203.02923)."""
    return from_betas(torch.sigmoid(_line(-6, 6, n)) * (beta_max - beta_min) + beta_min)


@SCHEDULES.register_function()
def listed(n: int, *, betas: list[float]) -> Schedule:
    """Betas one by one, n of them, as a scheduler of diffusers may list them (trained_betas)."""
    if len(betas) != n:
        raise ValueError(f'{len(betas)} betas for {n} levels: list one for each')
    return from_betas(torch.tensor(betas, dtype=torch.float64))


@SCHEDULES.register_function()
def karras(n: int, *, sigma_min: Positive = 0.002, sigma_max: Positive = 80.0, rho: Positive = 7.0) -> Schedule:
    """sigma/alpha is a line in its rho-th root (EDM, arXiv:2206.00364, equation 5), scaled to preserve variance."""
    return from_noise_ratios(_line(sigma_min ** (1 / rho), sigma_max ** (1 / rho), n) ** rho)


@SCHEDULES.register_function()
def exponential(n: int, *, sigma_min: Positive = 0.002, sigma_max: Positive = 80.0) -> Schedule:
    """log(sigma/alpha) is a line, scaled to preserve variance."""
    return polyexponential(n, sigma_min=sigma_min, sigma_max=sigma_max)


@SCHEDULES.register_function()
def polyexponential(n: int, *, sigma_min: Positive = 0.002, sigma_max: Positive = 80.0, rho: Positive = 1.0) -> Schedule:
    """log(sigma/alpha) goes like a power rho of time; rho 1 is `exponential`."""
    ramp = _line(0, 1, n) ** rho
    return from_noise_ratios(torch.exp(ramp * math.log(sigma_max / sigma_min) + math.log(sigma_min)))


@SCHEDULES.register_function()
def vp(n: int, *, beta_d: Positive = 19.9, beta_min: Annotated[float, Bounds(least=0)] = 0.1, eps_s: Positive = 1e-3) -> Schedule:
    """The continuous variance-preserving process (arXiv:2011.13456) from time eps_s to 1."""
    t = _line(eps_s, 1, n)
    return from_noise_ratios(torch.sqrt(torch.expm1(beta_d * t ** 2 / 2 + beta_min * t)))


@SCHEDULES.register_function()
def logsnr_cosine(n: int, *, logsnr_min: float = -15.0, logsnr_max: float = 15.0) -> Schedule:
    """The cosine schedule written in log-SNR = log(alpha^2/sigma^2) (arXiv:2107.00630; arXiv:2301.11093, section 3.1)."""
    return from_log_snr(_cosine_log_snr(n, logsnr_min, logsnr_max))


@SCHEDULES.register_function()
def logsnr_cosine_shifted(n: int, *, logsnr_min: float = -15.0, logsnr_max: float = 15.0, scale: Positive = 2.0) -> Schedule:
    """`logsnr_cosine` with `scale` times the noise, for larger pictures (simple diffusion, arXiv:2301.11093, section 3.1)."""
    return from_log_snr(_cosine_log_snr(n, logsnr_min, logsnr_max) - 2 * math.log(scale))


@SCHEDULES.register_function()
def logsnr_cosine_interp(n: int, *, logsnr_min: float = -15.0, logsnr_max: float = 15.0,
                         scale_min: Positive = 2.0, scale_max: Positive = 4.0) -> Schedule:
    """`logsnr_cosine` shifted by scale_min where it is clean, going over to scale_max where it is noise (arXiv:2301.11093)."""
    shift = _line(2 * math.log(scale_min), 2 * math.log(scale_max), n)
    return from_log_snr(_cosine_log_snr(n, logsnr_min, logsnr_max) - shift)


@SCHEDULES.register_function()
def flow(n: int, *, shift: Positive = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rectified flow (arXiv:2209.03003): sigma = s*t / (1 + (s-1)*t), alpha = 1 - sigma, t = 1/n .. 1; the network is told 1000*sigma.

    So are published flow networks, whatever their shift s, and one that is trained under one shift may be drawn from under another.
    shift: 1 is plain flow matching; more noise for larger pictures (SD3, arXiv:2403.03206, equation 23).
    """
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    alphas = (1 - t) / (1 + (shift - 1) * t)
    sigmas = 1 - alphas
    return alphas, sigmas, 1000 * sigmas


@SCHEDULES.register_function()
def shifted(n: int, *, shift: Positive = 3.0) -> Schedule:
    """The levels of `flow` for a network that is told their index 0 .. n-1: one whose training began before there was `flow`.

    What an index means depends on the shift, so it is drawn from under the shift that it was trained under.
    """
    return flow(n, shift=shift)[:2]


def zero_terminal_snr(alphas: Tensor, sigmas: Tensor, *times: Tensor) -> tuple[Tensor, ...]:
    """The schedule stretched so that its last level is noise alone (arXiv:2305.08891, algorithm 1: alpha is moved and scaled).

    times, where there are any, stay as they are. Raises ValueError where the schedule does not preserve variance.
    """
    alphas, sigmas = alphas.double(), sigmas.double()
    if not torch.allclose(alphas ** 2 + sigmas ** 2, torch.ones_like(alphas), atol=1e-5):
        raise ValueError('zero terminal SNR rescales schedules with alpha^2 + sigma^2 = 1 only; a flow ends in pure noise by itself')
    alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    return alphas, torch.sqrt(1 - alphas ** 2), *times


def from_betas(betas: Tensor) -> Schedule:
    """x_i = sqrt(1 - beta_i) * x_(i-1) + sqrt(beta_i) * noise, composed."""
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    return torch.exp(log_alpha_bar / 2), torch.sqrt(-torch.expm1(log_alpha_bar))


def from_noise_ratios(ratios: Tensor) -> Schedule:
    """sigma/alpha, which is the sigma of a variance-exploding process, scaled to preserve variance."""
    alphas = torch.rsqrt(1 + ratios ** 2)
    return alphas, ratios * alphas


def from_log_snr(log_snr: Tensor) -> Schedule:
    """log(alpha^2/sigma^2), scaled to preserve variance."""
    return torch.sqrt(torch.sigmoid(log_snr)), torch.sqrt(torch.sigmoid(-log_snr))


def _cosine_log_snr(n: int, logsnr_min: float, logsnr_max: float) -> Tensor:
    return -2 * torch.log(torch.tan(_line(math.atan(math.exp(-logsnr_max / 2)), math.atan(math.exp(-logsnr_min / 2)), n)))


def _line(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)
