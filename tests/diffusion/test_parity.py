"""The same levels, start and injected noise give the same result as the reference library's scheduler of the same name."""
from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from scepter.core.registry import SAMPLERS
from scepter.diffusion import Diffusion, Level, schedules
from scepter.diffusion.samplers import correlation

STABLE = Diffusion(*schedules.scaled_linear(1000))
BETAS = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear'}
START = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
NOISES = torch.randn(32, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
STEPS = 10


def network(x: Tensor, t: float) -> Tensor:
    """Some smooth eps of a state at the scale that preserves variance; it also shows when it is told another time."""
    return torch.tanh(x) * (0.9 + 0.1 * math.sin(t / 300)) + 0.1 * torch.roll(x, 1, -1)


def theirs(scheduler: Any, monkeypatch: pytest.MonkeyPatch, predict=network, **options: Any) -> Tensor:
    """The reference library's loop, with NOISES in place of its draws."""
    draws, module = iter(NOISES), importlib.import_module(type(scheduler).__module__)
    if hasattr(module, 'randn_tensor'):
        monkeypatch.setattr(module, 'randn_tensor', lambda *args, **kwargs: next(draws))
    first = scheduler.timesteps[0]
    # schedulers of sigma/alpha keep the state over alpha; the state itself is the same
    x = START * START.norm() / scheduler.scale_model_input(START, first).norm()
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), float(t)), t, x, return_dict=False, **options)[0]
    return x


def ours(name: str, levels: list[Level], between=STABLE.between, **options: Any) -> Tensor:
    draws = iter(NOISES)
    return SAMPLERS.get(name)(lambda x, level: STABLE.split(network(x, level.t), x, level), START, levels,
                              fresh=lambda like: next(draws), between=between, **options)


def levels_of(scheduler: Any, evaluations: int = 1) -> list[Level]:
    """The levels a scheduler goes through: it counts a level once for each evaluation of a step."""
    ratios = scheduler.sigmas.double().tolist()[:len(scheduler.timesteps)][::evaluations]
    times = scheduler.timesteps.tolist()[::evaluations]
    return [*(Level(t, 1 / math.hypot(1, r), r / math.hypot(1, r)) for t, r in zip(times, ratios)), Level(0, 1.0, 0.0)]


def assert_same(a: Tensor, b: Tensor) -> None:
    assert (a - b).norm() / b.norm() < 1e-4


@pytest.mark.parametrize('eta', [0.0, 0.6, 1.0])
def test_ddim(eta, monkeypatch):
    scheduler = diffusers.DDIMScheduler(1000, **BETAS, timestep_spacing='trailing', clip_sample=False)
    scheduler.set_timesteps(STEPS)
    assert_same(ours('ddim', STABLE.levels(STEPS, 'trailing'), eta=eta), theirs(scheduler, monkeypatch, eta=eta))


def test_ddpm(monkeypatch):
    scheduler = diffusers.DDPMScheduler(1000, **BETAS, timestep_spacing='trailing', clip_sample=False)
    scheduler.set_timesteps(STEPS)
    assert_same(ours('ddpm', STABLE.levels(STEPS, 'trailing')), theirs(scheduler, monkeypatch))


def test_lcm(monkeypatch):
    # their boundary condition, f(x, 0) = x, mixes about 1e-5 of x into every other level: with this scaling it is gone
    scheduler = diffusers.LCMScheduler(1000, **BETAS, timestep_scaling=1e6)
    scheduler.set_timesteps(4)
    assert_same(ours('lcm', STABLE.levels(scheduler.timesteps.tolist())), theirs(scheduler, monkeypatch))


@pytest.mark.parametrize('spacing', ['trailing', 'karras'])
@pytest.mark.parametrize(('name', 'scheduler', 'evaluations', 'options'), [
    ('euler', 'EulerDiscrete', 1, {}), ('heun', 'HeunDiscrete', 2, {}), ('lms', 'LMSDiscrete', 1, {}), ('unipc', 'UniPCMultistep', 1, {}),
    ('dpm2', 'KDPM2Discrete', 2, {}), ('dpm2_ancestral', 'KDPM2AncestralDiscrete', 2, {}),
    ('dpmpp_2m', 'DPMSolverMultistep', 1, {}), ('dpmpp_2m_sde', 'DPMSolverMultistep', 1, {'algorithm_type': 'sde-dpmsolver++'}),
])
def test_on_the_same_levels(name, scheduler, evaluations, options, spacing, monkeypatch):
    kind = getattr(diffusers, f'{scheduler}Scheduler')
    scheduler = kind(1000, **BETAS, **options, **({'use_karras_sigmas': True} if spacing == 'karras' else {'timestep_spacing': spacing}))
    scheduler.set_timesteps(STEPS)
    assert_same(ours(name, levels_of(scheduler, evaluations)), theirs(scheduler, monkeypatch))


def test_euler_ancestral(monkeypatch):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(1000, **BETAS, timestep_spacing='trailing')
    scheduler.set_timesteps(STEPS)
    assert_same(ours('euler_ancestral', levels_of(scheduler)), theirs(scheduler, monkeypatch))


def test_dpmpp_2s_without_noise_is_the_single_step_solver(monkeypatch):
    """It takes its levels in pairs, with the odd ones for midpoints, and its last two one by one."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(1000, **BETAS, use_exponential_sigmas=True)
    scheduler.set_timesteps(STEPS)
    levels = levels_of(scheduler)

    def predict(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return STABLE.split(network(x, level.t), x, level)

    def odd(a: Level, b: Level, r: float) -> Level:
        return levels[levels.index(a) + 1]
    x = SAMPLERS.get('dpmpp_2s_ancestral')(predict, START, levels[:STEPS:2], fresh=None, between=odd, eta=0.0)
    x = SAMPLERS.get('ddim')(predict, x, levels[STEPS - 2:], fresh=None, between=None)
    assert_same(x, theirs(scheduler, monkeypatch))


def test_dpmpp_sde_with_the_noise_of_one_path(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchsde', ModuleType('torchsde'))    # it only draws, and the draws are ours
    module = importlib.import_module('diffusers.schedulers.scheduling_dpmsolver_sde')
    scheduler = module.DPMSolverSDEScheduler(1000, **BETAS, timestep_spacing='trailing')
    scheduler.set_timesteps(STEPS)
    levels = levels_of(scheduler, 2)
    calls = iter(range(2 * STEPS))

    def noise(start: Tensor, end: Tensor) -> Tensor:
        step, whole = divmod(next(calls), 2)
        shared = correlation(levels[step], STABLE.between(levels[step], levels[step + 1], 0.5), levels[step + 1])
        return shared * NOISES[2 * step] + math.sqrt(1 - shared ** 2) * NOISES[2 * step + 1] if whole else NOISES[2 * step]
    scheduler.noise_sampler = noise
    assert_same(ours('dpmpp_sde', levels), theirs(scheduler, monkeypatch))


def test_euler_of_a_flow(monkeypatch):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    scheduler.set_timesteps(STEPS)
    levels = [Level(1000 * s, 1 - s, s) for s in scheduler.sigmas.tolist()]
    flow = Diffusion(*schedules.flow(1000, shift=3.0), prediction='flow')
    x = theirs_x = START
    x = SAMPLERS.get('euler')(lambda x, level: flow.split(network(x, level.t), x, level), x, levels, fresh=None, between=None)
    for t in scheduler.timesteps:
        theirs_x = scheduler.step(network(theirs_x, float(t)), t, theirs_x, return_dict=False)[0]
    assert_same(x, theirs_x)


def test_zero_terminal_snr_from_pure_noise(monkeypatch):
    """v at alpha 0, by both libraries' DDIM."""
    alphas, sigmas = schedules.zero_terminal_snr(*schedules.scaled_linear(1000))
    v = Diffusion(alphas, sigmas, prediction='v')
    scheduler = diffusers.DDIMScheduler(1000, **BETAS, timestep_spacing='trailing', clip_sample=False, prediction_type='v_prediction',
                                        rescale_betas_zero_snr=True)
    scheduler.set_timesteps(STEPS)
    mine = v.sample(START, lambda x, t: network(x, float(t[0])), steps=STEPS)
    assert_same(mine, theirs(scheduler, monkeypatch))
