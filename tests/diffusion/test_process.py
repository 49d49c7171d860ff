from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from scepter.core import streams
from scepter.core.faults import ConfigError
from scepter.core.registry import SAMPLERS, SCHEDULES
from scepter.diffusion import PREDICTIONS, Diffusion, Level, zero_terminal_snr

MEAN, STD = 0.3, 0.5
PROCESSES = {
    'vp': SCHEDULES.get('scaled_linear')(1000),
    'zero terminal SNR': zero_terminal_snr(*SCHEDULES.get('scaled_linear')(1000)),
    'flow': SCHEDULES.get('flow')(1000, shift=3.0),
    've': (torch.ones(1000), torch.logspace(-2, 2, 1000)),
}
PAIRS = [(process, prediction) for process, (alphas, *_) in PROCESSES.items() for prediction in PREDICTIONS
         if prediction != 'eps' or alphas.min() > 0]
STABLE = Diffusion(*PROCESSES['vp'])
NOISE = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def exact(diffusion: Diffusion):
    """A network that knows its data to be N(MEAN, STD^2): what it is told decides what it says, as for a real one."""
    def model(x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        level = diffusion.at(np.interp(float(t[0]), diffusion._times, range(diffusion.num_timesteps)))
        alpha, sigma = level.alpha, level.sigma
        x0 = MEAN + alpha * STD ** 2 / ((alpha * STD) ** 2 + sigma ** 2) * (x - alpha * MEAN)
        return diffusion.target(x0, (x - alpha * x0) / sigma, level)
    return model


# ---------------------------------------------------------------- the two equations
@pytest.mark.parametrize(('process', 'prediction'), PAIRS)
def test_split_inverts_target(process, prediction):
    diffusion = Diffusion(*PROCESSES[process], prediction=prediction)
    x0, eps = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    level = diffusion.level(torch.tensor([0, 1, 500, 998, 999]), x0)
    found = diffusion.split(diffusion.target(x0, eps, level), diffusion.diffuse(x0, eps, level), level)
    for got, want in zip(found, (x0, eps)):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_a_level_of_plain_numbers_splits_like_one_of_tensors(prediction):
    diffusion = Diffusion(*PROCESSES['vp'], prediction=prediction)
    out, xt = torch.randn(2, 1, 4, dtype=torch.float64)
    for a, b in zip(diffusion.split(out, xt, diffusion.at(700)), diffusion.split(out, xt, diffusion.level(torch.tensor([700]), xt))):
        torch.testing.assert_close(a, b)


def test_a_level_of_each_token_is_the_same_code():
    x0, noise, t = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.tensor([[0, 500, 999], [999, 1, 2]])
    state = STABLE.diffuse(x0, noise, STABLE.level(t, x0))
    for row in range(2):
        for token in range(3):
            level = STABLE.at(int(t[row, token]))
            torch.testing.assert_close(state[row, token], STABLE.diffuse(x0[row, token], noise[row, token], level))


def test_eps_is_refused_where_alpha_is_zero():
    with pytest.raises(ValueError, match='says nothing about x0 at level 999'):
        Diffusion(*PROCESSES['zero terminal SNR'], prediction='eps')


@pytest.mark.parametrize(('alphas', 'sigmas', 'words'), [
    ([0.2, 0.9], [0.9, 0.2], 'flip'), ([1.0, 0.5], [0.0, 0.5], 'sigma > 0'), ([1.0, float('nan')], [0.1, 0.5], 'alpha >= 0'),
    ([1.0], [0.1, 0.2], 'one length'), ([], [], 'one length'),
])
def test_a_schedule_that_does_not_go_from_clean_to_noise_is_refused(alphas, sigmas, words):
    with pytest.raises(ValueError, match=words):
        Diffusion(torch.tensor(alphas), torch.tensor(sigmas))


def test_an_unknown_prediction_and_misfit_times_are_refused():
    with pytest.raises(ValueError, match="'epsilon' is not one of eps, x0, v, flow"):
        Diffusion(*PROCESSES['vp'], prediction='epsilon')
    with pytest.raises(ValueError, match=r"times is 'v', .* prediction='v'"):
        Diffusion(*PROCESSES['vp'], 'v')
    for times in (torch.arange(10), torch.full((1000,), math.inf)):
        with pytest.raises(ValueError, match='for 1000 levels: expected one finite number for each'):
            Diffusion(*PROCESSES['vp'], times)


# ---------------------------------------------------------------- training
@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_the_loss_is_the_mean_squared_error_of_each_sample(prediction):
    diffusion, t, x0 = Diffusion(*PROCESSES['vp'], prediction=prediction), torch.tensor([10, 400, 990]), torch.randn(3, 2, 4, 4)
    level = diffusion.level(t, x0)
    want = (0.5 * diffusion.diffuse(x0, NOISE, level) - diffusion.target(x0, NOISE, level)).square().mean((1, 2, 3))
    torch.testing.assert_close(diffusion.loss(x0, t, lambda x, t, half: half * x, {'half': 0.5}, NOISE), want)


def test_the_exact_network_has_no_loss_on_a_point():
    diffusion, x0 = Diffusion(*PROCESSES['flow'], prediction='flow'), torch.zeros(3, 2, 4, 4)
    model = lambda x, t: x / (t / 1000).view(-1, 1, 1, 1)    # of x0 = 0: eps - x0 = x / sigma
    assert diffusion.loss(x0, torch.tensor([5, 500, 999]), model).max() < 1e-9


def test_noise_is_keyed_by_sample_whatever_the_batch():
    x0, t = torch.randn(4, 2, 4, 4), torch.tensor([1, 300, 600, 999])
    model = lambda x, t: x
    options = {'offset_noise': 0.1, 'input_perturbation': 0.1}
    with streams.current(7, n=[10, 11, 12, 13], step=0):
        together = STABLE.loss(x0, t, model, **options)
    with streams.current(7, n=[12, 13], step=5):
        apart = STABLE.loss(x0[2:], t[2:], model, **options)
    torch.testing.assert_close(together[2:], apart, rtol=1e-6, atol=0)


def states_and_targets(**options) -> tuple[Tensor, Tensor]:
    """What the network sees and should say of x0 = 0 at the noisiest level, where sigma is nearly 1."""
    kept: dict[str, Tensor] = {}

    def criterion(out: Tensor, target: Tensor) -> Tensor:
        kept.update(out=out, target=target)
        return out - target
    STABLE.loss(torch.zeros(3, 2, 4, 4), torch.full((3,), 999), lambda x, t: x, noise=NOISE, criterion=criterion, **options)
    return kept['out'] / PROCESSES['vp'][1][-1].float(), kept['target']


def test_offset_noise_is_constant_over_each_channel_and_part_of_the_target():
    state, target = states_and_targets(offset_noise=0.5)
    offset = target - NOISE
    torch.testing.assert_close(state, target)
    torch.testing.assert_close(offset, offset[..., :1, :1].expand_as(offset))
    assert offset.std() > 0.1


def test_input_perturbation_is_seen_and_not_part_of_the_target():
    state, target = states_and_targets(input_perturbation=0.1)
    assert torch.equal(target, NOISE)
    assert (state - NOISE).std().item() == pytest.approx(0.1, rel=0.3)


def test_a_weight_multiplies_the_loss_of_its_sample():
    x0, t, model = torch.randn(3, 2, 4, 4), torch.tensor([1, 2, 3]), lambda x, t: x
    plain = STABLE.loss(x0, t, model, noise=NOISE)
    by_sample = STABLE.loss(x0, t, model, noise=NOISE, weight=torch.tensor([0.0, 1.0, 3.0]))
    torch.testing.assert_close(by_sample, plain * torch.tensor([0, 1, 3]))
    by_level = STABLE.loss(x0, t, model, noise=NOISE, weight=lambda level: level.alpha ** 2)
    torch.testing.assert_close(by_level, plain * STABLE.alphas[t].float() ** 2)


def test_the_loss_of_a_level_for_each_token_averages_over_the_tokens():
    x0, noise, t = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.tensor([[0, 500, 999], [999, 1, 2]])
    weight = torch.rand(2, 3)
    got = STABLE.loss(x0, t, lambda x, t: x * t[..., None] / 1000, noise=noise, weight=weight)
    rows = [STABLE.loss(x0[:, i], t[:, i], lambda x, t: x * t[:, None] / 1000, noise=noise[:, i], weight=weight[:, i]) for i in range(3)]
    torch.testing.assert_close(got, torch.stack(rows).mean(0))


@pytest.mark.parametrize('gamma', [1.0, 5.0])
def test_min_snr_weights_have_the_papers_form(gamma):
    t = torch.arange(1000)
    snr = (PROCESSES['vp'][0] / PROCESSES['vp'][1]) ** 2
    forms = {'eps': snr.clamp(max=gamma) / snr, 'v': snr.clamp(max=gamma) / (snr + 1), 'x0': snr.clamp(max=gamma)}
    for prediction, want in forms.items():
        diffusion = Diffusion(*PROCESSES['vp'], prediction=prediction)
        torch.testing.assert_close(diffusion.min_snr(gamma)(diffusion.level(t, t.double())), want)


def test_min_snr_uses_the_square_of_alpha():
    weight = STABLE.min_snr(1e9)(STABLE.level(torch.tensor([500]), torch.zeros(1)))
    assert weight.item() == pytest.approx(1)
    snr = STABLE.alphas[500] ** 2 / STABLE.sigmas[500] ** 2
    assert snr.item() == pytest.approx(0.382, abs=1e-3)


def test_min_snr_is_finite_with_zero_terminal_snr():
    diffusion = Diffusion(*PROCESSES['zero terminal SNR'], prediction='v')
    weights = diffusion.min_snr(5)(diffusion.level(torch.arange(1000), torch.zeros(1000)))
    assert weights.isfinite().all() and weights[-1] == 0


def test_a_criterion_that_reduces_is_refused():
    with pytest.raises(ValueError, match="reduction='none'"):
        STABLE.loss(torch.zeros(3, 2, 4, 4), torch.tensor([1, 2, 3]), lambda x, t: x, criterion=nn.functional.mse_loss)


def test_a_latent_of_half_precision_is_seen_in_half_and_judged_in_full():
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x
    loss = STABLE.loss(torch.zeros(3, 2, 4, 4, dtype=torch.bfloat16), torch.tensor([1, 2, 3]), model)
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32


def test_a_network_of_half_precision_is_trained_on_full_latents():
    network = Half()
    STABLE.loss(NOISE, torch.tensor([1, 2, 3]), network).mean().backward()
    assert network.seen == {torch.bfloat16} and network.layer.weight.grad.isfinite().all()


def test_the_network_is_told_the_times():
    told = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return x
    alphas, sigmas = SCHEDULES.get('shifted')(1000)
    diffusion = Diffusion(alphas, sigmas, 1000 * sigmas, prediction='flow')
    diffusion.loss(NOISE, torch.tensor([0, 10, 999]), model)
    diffusion.sample(NOISE, model, steps=2)
    STABLE.sample(NOISE, model, steps=2)
    torch.testing.assert_close(told[0], (1000 * sigmas[[0, 10, 999]]).float())
    torch.testing.assert_close(torch.stack(told[1:3])[:, 0], (1000 * sigmas[[999, 499]]).float())
    assert torch.equal(torch.stack(told[3:])[:, 0], torch.tensor([999, 499]))    # an index stays a whole number


# ---------------------------------------------------------------- levels
@pytest.mark.parametrize('discretization', ['leading', 'linspace', 'trailing'])
def test_every_number_of_steps_has_exactly_as_many_levels(discretization):
    for n in range(1, 1001):
        *levels, clean = STABLE.levels(n, discretization)
        times = [level.t for level in levels]
        assert len(times) == len(set(times)) == n and times == sorted(times, reverse=True) and clean[1:] == (1.0, 0.0)


def test_every_number_of_karras_steps_has_exactly_as_many_levels():
    for process in ('vp', 'zero terminal SNR'):
        diffusion = Diffusion(*PROCESSES[process], prediction='v')
        for n in [1, 2, 3, 4, 61, 103, 121, 122, *range(5, 1001, 13), 1000]:
            levels = diffusion.levels(n, 'karras')
            assert len(levels) == n + 1 and levels[0].t == 999 and levels[-1][1:] == (1.0, 0.0)
            assert all(a.sigma * b.alpha > b.sigma * a.alpha for a, b in pairwise(levels))


@pytest.mark.parametrize('n', [1, 4, 10, 20, 25, 50, 999, 1000])
def test_trailing_and_linspace_equal_the_reference_library(n):
    for spacing in ('trailing', 'linspace'):
        scheduler = DDIMScheduler(1000, timestep_spacing=spacing)
        scheduler.set_timesteps(n)
        ours = [level.t for level in STABLE.levels(n, spacing)][:-1]
        # numpy's linspace of one number is its beginning; ours is the noisiest level
        assert ours == (scheduler.timesteps.tolist() if n > 1 else [999])


@pytest.mark.parametrize('n', [4, 10, 30, 50])
def test_leading_equals_the_reference_library(n):
    scheduler = DDIMScheduler(1000, timestep_spacing='leading', steps_offset=1)
    scheduler.set_timesteps(n)
    assert [level.t for level in STABLE.levels(n, 'leading')][:-1] == scheduler.timesteps.tolist()


def test_karras_levels_are_a_line_in_the_seventh_root():
    ratios = np.array([level.sigma / level.alpha for level in STABLE.levels(20, 'karras')[:-1]])
    np.testing.assert_allclose(np.diff(ratios ** (1 / 7)), np.diff(ratios[[0, -1]] ** (1 / 7))[0] / 19)


@pytest.mark.parametrize('discretization', ['leading', 'linspace', 'trailing', 'karras'])
def test_t_max_and_t_min_bound_the_levels(discretization):
    levels = STABLE.levels(10, discretization, t_max=799, t_min=100)
    assert all(100 <= level.t <= 799 for level in levels[:-1])
    assert levels[0].t == (731 if discretization == 'leading' else 799)
    assert levels[9].t == {'trailing': 169, 'leading': 101}.get(discretization, 100)


def test_the_penultimate_level_is_left_out_and_the_number_stays():
    with_it, without = STABLE.levels(11, 'trailing'), STABLE.levels(10, 'trailing', discard_penultimate=True)
    assert without == [*with_it[:10], with_it[-1]] and len(without) == 11
    assert len(STABLE.levels(1000, 'trailing', discard_penultimate=True)) == 1001


def test_steps_may_be_the_indices_themselves():
    assert [level.t for level in STABLE.levels([999, 759, 499.5, 259])][:-1] == [999, 759, 499.5, 259]


@pytest.mark.parametrize(('arguments', 'words'), [
    ({'steps': 1001}, '1001 steps over 1000 levels'), ({'steps': 0}, 'expected 1 .. 1000'), ({'steps': 5, 't_max': 1000}, 't_max 1000'),
    ({'steps': [1, 2]}, 'descend'), ({'steps': [1000]}, 'descend'), ({'steps': []}, 'descend'),
    ({'steps': 5, 'discretization': 'tailing'}, 'not one of trailing'), ({'steps': 5, 't_max': 3, 't_min': 4}, 't_min 4'),
])
def test_impossible_levels_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        STABLE.levels(**arguments)


@pytest.mark.parametrize('process', PROCESSES)
def test_a_level_between_two_lies_there_in_log_snr_and_on_the_process(process):
    diffusion = Diffusion(*PROCESSES[process], prediction='v')
    a, b = diffusion.at(900), diffusion.at(300.5)
    middle = diffusion.between(a, b, 0.25)
    log = [math.log(level.alpha / level.sigma) for level in (a, middle, b)]
    assert log[1] == pytest.approx(0.75 * log[0] + 0.25 * log[2]) and b.t < middle.t < a.t
    kept = {'flow': lambda level: level.alpha + level.sigma, 've': lambda level: level.alpha}
    if process in kept:
        assert kept[process](middle) == pytest.approx(1, abs=1e-12)
    else:
        assert math.hypot(middle.alpha, middle.sigma) == pytest.approx(1, abs=5e-6)


def test_between_finds_the_levels_of_the_schedule_and_those_cleaner_than_all_of_them():
    assert STABLE.between(STABLE.at(700), STABLE.at(10), 0.0).t == pytest.approx(700)
    cleaner = STABLE.between(STABLE.at(1), Level(0, 1.0, 1e-4), 0.9)
    assert cleaner.t == 0 and cleaner.sigma < STABLE.at(0).sigma


# ---------------------------------------------------------------- sampling
@pytest.mark.parametrize('solver', [*SAMPLERS, 'dpmpp_2m_karras'])
@pytest.mark.parametrize('process', PROCESSES)
def test_all_predictions_draw_the_same(solver, process):
    draws = []
    for prediction in (p for q, p in PAIRS if q == process):
        diffusion = Diffusion(*PROCESSES[process], prediction=prediction)
        draws.append(diffusion.sample(NOISE.double(), exact(diffusion), solver=solver, steps=8, seed=1))
    for other in draws[1:]:
        torch.testing.assert_close(other, draws[0], rtol=1e-4, atol=1e-4)    # times of levels between two are float32


@pytest.mark.parametrize('solver', ['ddim', 'heun', 'dpm2', 'dpmpp_2m', 'unipc', 'lms'])
@pytest.mark.parametrize('discretization', ['linspace', 'karras'])
@pytest.mark.parametrize('process', PROCESSES)
def test_noise_is_carried_to_the_data(solver, discretization, process):
    """The exact flow of a Gaussian keeps each state's place in units of the standard deviation."""
    diffusion = Diffusion(*PROCESSES[process], prediction='v')
    end = diffusion.sample(NOISE.double(), exact(diffusion), solver=solver, steps=200, discretization=discretization,
                           discard_penultimate_step=False)
    start = diffusion.at(999)
    place = (NOISE.double() * math.hypot(start.alpha, start.sigma) - start.alpha * MEAN) / math.hypot(start.alpha * STD, start.sigma)
    # what is left of second order is the one step from the cleanest level to the clean one
    torch.testing.assert_close(end, MEAN + STD * place, rtol=0, atol=0.06 if solver == 'ddim' else 0.008)


@pytest.mark.parametrize('solver', [s for s in SAMPLERS if s not in ('ddim', 'euler', 'heun', 'dpm2', 'dpmpp_2m', 'unipc', 'lms')])
def test_added_noise_obeys_the_seed_and_not_the_batch(solver):
    def draw(rows: slice, seed: int | list[int]) -> Tensor:
        return STABLE.sample(NOISE[rows], exact(STABLE), solver=solver, steps=5, seed=seed)
    every = draw(slice(None), 3)
    torch.testing.assert_close(draw(slice(0, 2), 3), every[:2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(draw(slice(1, 3), streams.row_seeds(3, 2, first=1)), every[1:], rtol=1e-5, atol=1e-6)
    assert (draw(slice(None), 4) - every).abs().max() > 0.01


def test_the_kth_draw_of_a_row_differs_from_its_others():
    noise = torch.zeros(1, 1, 64, 64)
    diffusion = Diffusion(torch.tensor([0.9, 0.5, 0.1]).sqrt(), torch.tensor([0.1, 0.5, 0.9]).sqrt(), prediction='x0')
    _, states = diffusion.sample(noise, lambda x, t: 0 * x, solver='ddpm', steps=3, seed=0, return_intermediate='xt')
    drawn = states[2] - math.sqrt(1 / 45) * states[1]    # what the last step but one added, beside down * eps
    assert abs(torch.corrcoef(torch.stack([states[1].flatten(), drawn.flatten()]))[0, 1]) < 0.05


def test_without_a_seed_torchs_own_generator_draws():
    def draw() -> Tensor:
        torch.manual_seed(5)
        return STABLE.sample(NOISE, exact(STABLE), solver='ddpm', steps=3)
    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), STABLE.sample(NOISE, exact(STABLE), solver='ddpm', steps=3))


def test_only_model_kwargs_reach_the_network():
    def model(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return cond * x
    out = STABLE.sample(NOISE, model, [{'cond': torch.ones(3, 1, 1, 1)}, {'cond': torch.zeros(3, 1, 1, 1)}], solver='ddim', steps=3,
                        guide_scale=2.0, guide_rescale=0.5, discretization='leading', seed=1, eta=0.5, t_max=900, t_min=10)
    assert out.isfinite().all()


def test_unknown_samplers_and_options_are_refused():
    with pytest.raises(ConfigError, match='SAMPLERS has no dpmpp_9m; it has ddim'):
        STABLE.sample(NOISE, exact(STABLE), solver='dpmpp_9m')
    with pytest.raises(ConfigError, match='did you mean ETA'):
        STABLE.sample(NOISE, exact(STABLE), solver='ddim', etaa=1.0)


def test_karras_in_the_name_is_karras_spacing():
    by_name = STABLE.sample(NOISE, exact(STABLE), solver='dpmpp_2m_karras', steps=6)
    assert torch.equal(by_name, STABLE.sample(NOISE, exact(STABLE), solver='dpmpp_2m', steps=6, discretization='karras'))


def steps_taken(**options) -> int:
    calls = []
    STABLE.sample(NOISE, lambda x, t: calls.append(t) or x, solver='ddim', **options)
    return len(calls)


@pytest.mark.parametrize(('strength', 'calls'), [(0.0, 0), (0.25, 2), (0.5, 5), (0.99, 9), (1.0, 10)])
def test_denoising_strength_is_the_share_of_the_steps(strength, calls):
    assert steps_taken(steps=10, x=torch.zeros_like(NOISE), denoising_strength=strength) == calls


def test_image_to_image_begins_with_the_picture_under_noise():
    picture = torch.randn(3, 2, 4, 4)
    _, states = STABLE.sample(NOISE, exact(STABLE), x=picture, denoising_strength=0.5, steps=10, return_intermediate='xt')
    level = STABLE.at(499)
    torch.testing.assert_close(states[0], level.alpha * picture + level.sigma * NOISE)
    assert torch.equal(STABLE.sample(NOISE, exact(STABLE), x=picture, denoising_strength=0.0), picture)


@pytest.mark.parametrize('solver', SAMPLERS)
def test_inpainting_keeps_what_the_mask_does_not_cover(solver):
    picture, mask = torch.randn(3, 2, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    out = STABLE.sample(NOISE, exact(STABLE), x=picture, mask=mask, solver=solver, steps=6, seed=0)
    torch.testing.assert_close(out[..., 2:], picture[..., 2:], rtol=0, atol=2e-5)
    assert (out - picture)[..., :2].abs().mean() > 0.1


@pytest.mark.parametrize(('options', 'words'), [
    ({'mask': torch.ones(1)}, 'needs x'), ({'denoising_strength': 0.5}, 'expected 0 .. 1'),
    ({'x': NOISE, 'denoising_strength': 1.5}, 'is 1.5'), ({'return_intermediate': 'x_0'}, 'x0'),
])
def test_arguments_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        STABLE.sample(NOISE, exact(STABLE), **options)


def last_x0(**options) -> Tensor:
    return STABLE.sample(20 * NOISE, lambda x, t: 0 * x, steps=4, **options)


def test_clamp_bounds_x0():
    assert last_x0().abs().max() > 2
    assert last_x0(clamp=1.5).abs().max().item() == pytest.approx(1.5)


def test_a_percentile_divides_each_row_by_its_own_quantile():
    _, predicted = STABLE.sample(NOISE, lambda x, t: 0 * x, steps=1, percentile=0.9, return_intermediate='x0')
    raw = NOISE / STABLE.at(999).alpha
    bound = raw.abs().flatten(1).quantile(0.9, dim=1).view(3, 1, 1, 1)
    torch.testing.assert_close(predicted[0], raw.clamp(-bound, bound) / bound)


def test_a_condition_turns_the_unconditional_network_into_the_conditional_one():
    """Of y = x0 + noise the exact gradient of log p(y | x) is known; guided by it, N(MEAN, STD^2) becomes its posterior given y."""
    y, var_y = 1.1, 0.2
    gain = STD ** 2 / (STD ** 2 + var_y)
    mean, var = MEAN + gain * (y - MEAN), (1 - gain) * STD ** 2

    def condition(x: Tensor, t: Tensor) -> Tensor:
        level = STABLE.at(float(t[0]))
        slope = level.alpha * STD ** 2 / ((level.alpha * STD) ** 2 + level.sigma ** 2)
        x = x.detach().requires_grad_()
        x0 = MEAN + slope * (x - level.alpha * MEAN)
        spread = var_y + STD ** 2 - slope * level.alpha * STD ** 2
        return torch.autograd.grad((-(y - x0) ** 2 / (2 * spread)).sum(), x)[0]

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        level = STABLE.at(float(t[0]))
        x0 = mean + level.alpha * var / (level.alpha ** 2 * var + level.sigma ** 2) * (x - level.alpha * mean)
        return (x - level.alpha * x0) / level.sigma

    guided = STABLE.sample(NOISE.double(), exact(STABLE), condition_fn=condition, steps=10)
    torch.testing.assert_close(guided, STABLE.sample(NOISE.double(), conditional, steps=10), rtol=1e-6, atol=1e-6)


def test_a_condition_leaves_pure_noise_alone():
    diffusion = Diffusion(*PROCESSES['zero terminal SNR'], prediction='v')
    out = diffusion.sample(NOISE, exact(diffusion), condition_fn=lambda x, t: torch.ones_like(x), steps=5)
    assert out.isfinite().all()


@pytest.mark.parametrize('solver', SAMPLERS)
def test_intermediates_are_one_for_each_step(solver):
    for what in ('x0', 'xt'):
        out, seen = STABLE.sample(NOISE, exact(STABLE), solver=solver, steps=7, seed=0, return_intermediate=what)
        assert len(seen) == 7 and all(one.shape == out.shape for one in seen)
        if what == 'xt':
            torch.testing.assert_close(seen[0], NOISE, rtol=1e-6, atol=1e-6)
        elif solver != 'lms':    # its last step goes on by four slopes, the others' straight to x0
            assert torch.equal(seen[-1], out)


def test_progress_is_shown_and_changes_nothing(capsys):
    quiet = STABLE.sample(NOISE, exact(STABLE), solver='heun', steps=7)
    assert capsys.readouterr().err == ''
    assert torch.equal(STABLE.sample(NOISE, exact(STABLE), solver='heun', steps=7, show_progress=True), quiet)
    assert '/7' in capsys.readouterr().err


def test_a_network_of_half_precision_is_sampled_in_full():
    network = Half()
    out = STABLE.sample(NOISE, network, steps=3)
    assert out.dtype == torch.float32 and network.seen == {torch.bfloat16}
    assert STABLE.sample(NOISE.bfloat16(), exact(STABLE), steps=3).dtype == torch.float32
    assert STABLE.sample(NOISE.double(), exact(STABLE), steps=3).dtype == torch.float64


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Conv2d(2, 2, 1).bfloat16(), set()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.add(x.dtype)
        return self.layer(x)


def test_sampling_leaves_no_graph_and_the_schedule_pickles():
    import copy
    import pickle
    out = STABLE.sample(NOISE, Half().float(), steps=2)
    assert not out.requires_grad
    for twin in (pickle.loads(pickle.dumps(Diffusion(*PROCESSES['vp']))), copy.deepcopy(STABLE)):  # noqa: S301
        assert torch.equal(twin.sample(NOISE, exact(twin), steps=2), STABLE.sample(NOISE, exact(STABLE), steps=2))


@pytest.mark.gpu
@pytest.mark.parametrize('solver', SAMPLERS)
def test_no_step_waits_for_the_device(solver):
    arguments = {'solver': solver, 'steps': 6, 'seed': 1, 'guide_scale': 3.0, 'guide_rescale': 0.5, 'clamp': 2.0}
    model = lambda x, t, c: c * torch.tanh(x)
    kwargs = [{'c': torch.full((3, 1, 1, 1), value)} for value in (1.0, 0.5)]
    noise, on_device = NOISE.cuda(), [{'c': k['c'].cuda()} for k in kwargs]
    try:
        torch.cuda.set_sync_debug_mode('error')
        out = STABLE.sample(noise, model, on_device, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    torch.testing.assert_close(out.cpu(), STABLE.sample(NOISE, model, kwargs, **arguments), rtol=1e-3, atol=1e-3)
