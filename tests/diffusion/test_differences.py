"""Where whole samplers differ from diffusers' own: with the cause taken out they agree, and the cause is on the other side."""
from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from scepter.core.faults import ConfigError
from scepter.diffusion import Diffusion, schedules
from tests.diffusion.test_parity import BETAS, STABLE, START, STEPS, network


def theirs(scheduler: Any, start: float, times: list[float] | None = None, predict=network) -> Tensor:
    """Their loop from START * start; times: what the network is told in place of their own."""
    scheduler.set_timesteps(STEPS)
    x = START * start
    told = times or [float(t) for t in scheduler.timesteps]
    for t, time in zip(scheduler.timesteps, told, strict=True):
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), time), t, x, return_dict=False)[0]
    return x


def ours(name: str, diffusion: Diffusion = STABLE, **options: Any) -> Tensor:
    return diffusion.sample(START, lambda x, t: network(x, float(t[0])), solver=name, steps=STEPS, **options)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize('spacing', ['trailing', 'linspace', 'karras'])
@pytest.mark.parametrize(('name', 'scheduler', 'evaluations'), [
    ('euler', 'EulerDiscrete', 1), ('heun', 'HeunDiscrete', 2), ('lms', 'LMSDiscrete', 1)])
def test_their_start_from_the_noisiest_level_is_too_small(name, scheduler, evaluations, spacing):
    options = {'use_karras_sigmas': True} if spacing == 'karras' else {'timestep_spacing': spacing}
    scheduler = getattr(diffusers, f'{scheduler}Scheduler')(1000, **BETAS, **options)
    scheduler.set_timesteps(STEPS)
    own, right = float(scheduler.init_noise_sigma), math.hypot(1, float(scheduler.sigmas[0]))
    mine = ours(name, discretization=spacing)
    assert apart(mine, theirs(scheduler, own)) > 1e-3
    assert apart(mine, theirs(scheduler, right)) < 1e-5


def test_data_of_variance_one_keeps_it_from_our_start_and_loses_some_from_theirs():
    """The exact denoiser of standard normal data, x0 = alpha * x, by which the flow leaves every state of this process as it is."""
    def lost(steps: int) -> float:
        drawn = STABLE.sample(START, lambda x, t: STABLE.level(t, x).sigma * x, solver='dpmpp_2m', steps=steps)
        return 1 - float(drawn.norm() / START.norm()) ** 2

    assert 0 < lost(1000) < lost(500) * 0.6 < 1e-3    # it goes to 0 with the steps
    top = float(STABLE.sigmas[-1] / STABLE.alphas[-1])
    assert 1 - (top / math.hypot(1, top)) ** 2 == pytest.approx(0.00466, rel=0.01)    # theirs begins without, however many they are


@pytest.mark.parametrize(('name', 'scheduler'), [('dpmpp_2m', 'DPMSolverMultistep'), ('unipc', 'UniPCMultistep')])
def test_their_multistep_solvers_round_the_times_of_karras_levels(name, scheduler):
    scheduler = getattr(diffusers, f'{scheduler}Scheduler')(1000, **BETAS, use_karras_sigmas=True)
    mine = ours(f'{name}_karras')
    levels = STABLE.levels(STEPS, 'karras')[:-1]
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == [round(level.t) for level in levels]
    assert apart(mine, theirs(scheduler, 1.0)) > 1e-5
    assert apart(mine, theirs(scheduler, 1.0, [float(level.t) for level in levels])) < 2e-6


@pytest.mark.parametrize(('name', 'scheduler', 'tolerance'), [
    ('euler', 'EulerDiscrete', 2e-5), ('dpmpp_2m', 'DPMSolverMultistep', 2e-6), ('unipc', 'UniPCMultistep', 2e-6)])
def test_their_zero_terminal_snr_is_not_zero_but_for_ddim(name, scheduler, tolerance):
    """With whom ours agrees is in test_parity.test_zero_terminal_snr_from_pure_noise."""
    scheduler = getattr(diffusers, f'{scheduler}Scheduler')(1000, **BETAS, timestep_spacing='trailing', prediction_type='v_prediction',
                                                            rescale_betas_zero_snr=True)
    scheduler.set_timesteps(STEPS)
    ratios = scheduler.sigmas.double()[:STEPS].flip(0)
    assert ratios[-1] == pytest.approx(4096, rel=1e-6)    # of float32 roots, which processors round differently
    other = theirs(scheduler, float(scheduler.init_noise_sigma))
    exact = Diffusion(*schedules.zero_terminal_snr(*schedules.scaled_linear(1000)), prediction='v')
    assert apart(ours(name, exact), other) > 1e-4

    alphas = (1 + ratios ** 2).rsqrt()
    as_theirs = Diffusion(alphas, alphas * ratios, scheduler.timesteps.flip(0), prediction='v')
    assert apart(ours(name, as_theirs), other) < tolerance


def test_leading_begins_and_ends_where_published_schedulers_do():
    scheduler = diffusers.DDIMScheduler(1000, **BETAS, timestep_spacing='leading', steps_offset=1, clip_sample=False)
    assert apart(ours('ddim', discretization='leading'), theirs(scheduler, 1.0)) < 1e-5


# ------------------------------------------------------------------------------------------------ names
@pytest.mark.parametrize(('said', 'name'), [
    ('euler_a', 'euler_ancestral'), ('Euler a', 'euler_ancestral'), ('DPM++ 2M', 'dpmpp_2m'), ('dpm++ 2m karras', 'dpmpp_2m_karras'),
    ('DPM++ 2M SDE', 'dpmpp_2m_sde'), ('DPM++ SDE', 'dpmpp_sde'), ('DPM++ 2S a Karras', 'dpmpp_2s_ancestral_karras'), ('DDIM', 'ddim'),
    ('UniPC', 'unipc'), ('LMS', 'lms'), ('k_dpm_2_a', 'dpm2_ancestral'), ('DPM2 a', 'dpm2_ancestral'), ('Heun', 'heun')])
def test_a_sampler_goes_by_the_names_that_others_gave_it(said, name):
    assert torch.equal(ours(said, seed=1), ours(name, seed=1))


@pytest.mark.parametrize('name', ['pndm', 'PLMS', 'deis', 'DPM fast', 'ddmi', 'dpmpp_4m', 'dpm++ 2m exponential', 'karras', 'k'])
def test_a_sampler_that_is_not_there_is_an_error_and_never_another_one(name):
    with pytest.raises(ConfigError, match=r'SAMPLERS has no .*; it has ddim, ddpm, dpm2') as error:
        ours(name)
    assert 'did you mean' not in str(error.value)


@pytest.mark.parametrize('options', [
    {'guide_scale': math.nan}, {'guide_scale': math.inf}, {'guide_scale': torch.tensor([1.0, math.nan])},
    {'guide_scale': 2.0, 'guide_rescale': math.nan}, {'clamp': math.nan}, {'percentile': math.nan}, {'eta': math.nan}])
def test_a_number_that_is_none_is_refused_before_anything_is_drawn(options):
    model_kwargs = [{'c': 1.0}, {'c': 0.0}] if 'guide_scale' in options else {'c': 1.0}
    with pytest.raises((ValueError, ConfigError), match=rf'(?i){next(reversed(options))}'):
        STABLE.sample(START, lambda x, t, c: x * c, model_kwargs, steps=2, **options)
