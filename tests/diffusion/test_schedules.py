from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from scepter.core.registry import SCHEDULES
from scepter.diffusion import Diffusion, zero_terminal_snr


def log_snr(alphas, sigmas):
    return 2 * torch.log(alphas / sigmas)


@pytest.mark.parametrize('n', [2, 25, 1000])
@pytest.mark.parametrize('name', sorted(set(SCHEDULES) - {'listed'}))
def test_every_schedule_goes_from_clean_to_noise(name, n):
    tables = SCHEDULES.get(name)(n)
    assert {table.dtype for table in tables} == {torch.float64} and {table.shape for table in tables} == {(n,)}
    Diffusion(*tables, prediction='v')    # its constructor refuses any other


@pytest.mark.parametrize('name', sorted(set(SCHEDULES) - {'flow', 'shifted', 'listed'}))
def test_schedules_preserve_variance(name):
    alphas, sigmas = SCHEDULES.get(name)(1000)
    torch.testing.assert_close(alphas ** 2 + sigmas ** 2, torch.ones(1000).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(('ours', 'theirs', 'ends'), [
    ('linear', 'linear', (1e-4, 0.02)), ('scaled_linear', 'scaled_linear', (0.00085, 0.012)),
    ('quadratic', 'scaled_linear', (0.00085, 0.012)), ('cosine', 'squaredcos_cap_v2', (0, 0)), ('sigmoid', 'sigmoid', (1e-4, 0.02)),
])
def test_schedules_in_betas_equal_the_reference_library(ours, theirs, ends):
    reference = DDPMScheduler(1000, beta_schedule=theirs, beta_start=ends[0], beta_end=ends[1]).alphas_cumprod.double()
    alphas, _ = SCHEDULES.get(ours)(1000)
    torch.testing.assert_close(alphas ** 2, reference, rtol=2e-4, atol=1e-6)    # theirs are products in float32


def test_the_cosines_last_beta_is_cut():
    alphas, _ = SCHEDULES.get('cosine')(1000)
    assert 1 - (alphas[-1] / alphas[-2]).item() ** 2 == pytest.approx(0.999, abs=1e-9)


def test_listed_betas_are_those_of_the_schedule_that_they_were_taken_from():
    alphas, sigmas = SCHEDULES.get('linear')(100)
    signal = torch.cat([torch.ones(1, dtype=torch.float64), alphas]) ** 2
    listed = SCHEDULES.get('listed')(100, betas=(1 - signal[1:] / signal[:-1]).tolist())
    torch.testing.assert_close(torch.stack(listed), torch.stack([alphas, sigmas]), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match='100 betas for 99 levels'):
        SCHEDULES.get('listed')(99, betas=[0.01] * 100)


@pytest.mark.parametrize('name', ['karras', 'exponential', 'polyexponential'])
def test_schedules_in_sigma_reach_from_sigma_min_to_sigma_max(name):
    alphas, sigmas = SCHEDULES.get(name)(40, sigma_min=0.01, sigma_max=50.0)
    ratio = sigmas / alphas
    assert ratio[0].item() == pytest.approx(0.01) and ratio[-1].item() == pytest.approx(50)


def test_karras_is_a_line_in_the_seventh_root():
    alphas, sigmas = SCHEDULES.get('karras')(20)
    root = (sigmas / alphas) ** (1 / 7)
    torch.testing.assert_close(root.diff(), (root[-1] - root[0]).expand(19) / 19)


def test_exponential_is_a_line_in_the_logarithm():
    steps = log_snr(*SCHEDULES.get('exponential')(20)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(19))


def test_vp_is_the_continuous_variance_preserving_process():
    alphas, _ = SCHEDULES.get('vp')(11, eps_s=1e-3)
    t = torch.linspace(1e-3, 1, 11).double()
    torch.testing.assert_close(alphas, torch.exp(-(19.9 * t ** 2 / 4 + 0.1 * t / 2)), rtol=1e-6, atol=0)


def test_cosine_in_log_snr_is_the_cosine_schedule():
    alphas, _ = SCHEDULES.get('logsnr_cosine')(101, logsnr_min=-30, logsnr_max=30)
    torch.testing.assert_close(alphas, torch.cos(torch.linspace(0, 1, 101).double() * math.pi / 2), rtol=0, atol=1e-6)


def test_a_shift_moves_log_snr_by_twice_the_log_of_the_scale():
    plain, shifted = (log_snr(*SCHEDULES.get(f'logsnr_cosine{end}')(50)) for end in ('', '_shifted'))
    torch.testing.assert_close(plain - shifted, torch.full((50,), 2 * math.log(2)).double())


def test_the_interpolated_shift_goes_from_scale_min_to_scale_max():
    plain, interp = (log_snr(*SCHEDULES.get(f'logsnr_cosine{end}')(50)) for end in ('', '_interp'))
    torch.testing.assert_close(plain - interp, torch.linspace(2 * math.log(2), 2 * math.log(4), 50).double())


def test_a_shifted_flow_is_that_of_sd3_and_ends_in_pure_noise():
    alphas, sigmas, times = SCHEDULES.get('flow')(4, shift=3.0)
    torch.testing.assert_close(sigmas, torch.tensor([0.5, 0.75, 0.9, 1.0]).double())
    assert alphas[-1] == 0 and torch.equal(alphas + sigmas, torch.ones(4).double()) and torch.equal(times, 1000 * sigmas)


@pytest.mark.parametrize('shift', [1.0, 3.0])
def test_a_flow_has_the_levels_and_the_times_of_the_reference_library(shift):
    reference = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    flow = Diffusion(*SCHEDULES.get('flow')(1000, shift=shift), prediction='flow')
    torch.testing.assert_close(flow.sigmas.flip(0), reference.sigmas.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.times.flip(0), reference.timesteps.double(), rtol=0, atol=1e-3)


def test_shifted_has_the_levels_of_a_flow_and_tells_their_index():
    flow, shifted = (Diffusion(*SCHEDULES.get(name)(50, shift=2.0), prediction='flow') for name in ('flow', 'shifted'))
    assert torch.equal(flow.sigmas, shifted.sigmas) and torch.equal(flow.alphas, shifted.alphas)
    assert [shifted.at(i).t for i in range(50)] == list(range(50))


def test_what_a_schedule_tells_is_not_touched_by_zero_terminal_snr():
    alphas, sigmas = SCHEDULES.get('cosine')(10)
    times = torch.linspace(0, 1, 10)
    stretched = zero_terminal_snr(alphas, sigmas, times)
    assert len(stretched) == 3 and torch.equal(stretched[2], times) and torch.equal(stretched[0], zero_terminal_snr(alphas, sigmas)[0])


@pytest.mark.parametrize('name', ['linear', 'scaled_linear', 'cosine', 'karras'])
def test_zero_terminal_snr_equals_the_reference_library(name):
    alphas, sigmas = SCHEDULES.get(name)(1000)
    betas = 1 - torch.cat([alphas[:1] ** 2, (alphas[1:] / alphas[:-1]) ** 2])
    reference = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0).sqrt()
    stretched, noise = zero_terminal_snr(alphas, sigmas)
    torch.testing.assert_close(stretched, reference, rtol=0, atol=1e-7)
    assert stretched[-1] == 0 and noise[-1] == 1 and stretched[0].item() == pytest.approx(alphas[0].item(), abs=1e-15)


def test_zero_terminal_snr_of_stable_diffusion_has_the_papers_value_in_the_middle():
    _, sigmas = zero_terminal_snr(*SCHEDULES.get('scaled_linear')(1000))
    assert sigmas[500].item() == pytest.approx(0.8712, abs=1e-4)


def test_zero_terminal_snr_refuses_a_flow():
    with pytest.raises(ValueError, match='ends in pure noise by itself'):
        zero_terminal_snr(*SCHEDULES.get('flow')(10))


def test_a_schedule_is_built_from_a_config():
    built = SCHEDULES.build({'NAME': 'shifted', 'SHIFT': 2.0}, n=10)
    assert torch.equal(built[1], SCHEDULES.get('shifted')(10, shift=2.0)[1])
