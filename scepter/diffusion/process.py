"""One process object for diffusion and flow alike.

    x_t = alpha * x0 + sigma * eps          the state at a level
    out =   a   * x0 +   b   * eps          what the network predicts

Two linear equations in two unknowns: solving them turns every prediction into (x0, eps), and a sampler needs nothing else.
docs/diffusion.md derives it and says how to add a prediction, a schedule or a sampler.
"""
from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from scepter.core import pulse, streams
from scepter.core.registry import SAMPLERS, sampler_named
from scepter.diffusion.guidance import GuideScale, ModelKwargs, bounded, guided, shaped_like


class Level(NamedTuple):
    """A point on the way from noise to data: tensors that broadcast against the state in training, plain numbers in sampling."""
    t: Any        # what the network is told
    alpha: Any    # how much signal is left
    sigma: Any    # how much noise there is


# name -> (alpha, sigma) -> (a, b), with out = a * x0 + b * eps
PREDICTIONS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    'eps': lambda alpha, sigma: (0.0, 1.0),
    'x0': lambda alpha, sigma: (1.0, 0.0),
    'v': lambda alpha, sigma: (-sigma, alpha),
    'flow': lambda alpha, sigma: (-1.0, 1.0),
}

# indices of n levels out of `span`, noisiest first, in whole-number arithmetic: a float step would give n + 1 of them for some n
DISCRETIZATIONS: dict[str, Callable[[int, int], list[int]]] = {
    'trailing': lambda n, span: [round(span * (n - i) / n) - 1 for i in range(n)],
    # as published schedulers have it (steps_offset 1): whole steps of span // n, from 1 on where there is room for it
    'leading': lambda n, span: [span // n * i + (span // n * (n - 1) + 1 < span) for i in reversed(range(n))],
    'linspace': lambda n, span: [round((span - 1) * (n - 1 - i) / max(n - 1, 1)) if n > 1 else span - 1 for i in range(n)],
}
Discretization = Literal['leading', 'linspace', 'trailing', 'karras']

# half-step samplers, and the one that is noisiest there, look better when the last step but one is left out
DISCARD_PENULTIMATE = {'dpm2', 'dpm2_ancestral', 'dpmpp_2m_sde'}


class Diffusion:
    """A noise schedule together with what the network predicts.

        diffusion = Diffusion(*schedules.flow(1000), prediction='flow')

    alphas, sigmas: [T], from almost clean (index 0) to noise (index T-1); any process, see `schedules`.
    times: [T], what the network is told at each level, a schedule's third table; by default the index itself.

    Raises ValueError for an unknown prediction, a schedule that does not go from clean to noise, and a prediction that says nothing
    about x0 at some level, as eps does where alpha is 0.
    """

    def __init__(self, alphas: Tensor, sigmas: Tensor, times: Tensor | None = None, *, prediction: str = 'eps'):
        if prediction not in PREDICTIONS:
            raise ValueError(f'prediction {prediction!r} is not one of {", ".join(PREDICTIONS)}')
        alphas, sigmas = (torch.as_tensor(v, dtype=torch.float64, device='cpu') for v in (alphas, sigmas))
        if alphas.ndim != 1 or alphas.shape != sigmas.shape or len(alphas) == 0:
            raise ValueError(f'alphas {list(alphas.shape)} and sigmas {list(sigmas.shape)}: expected two tensors [T] of one length')
        ratios = sigmas / alphas
        if not (alphas >= 0).all() or not (sigmas > 0).all() or not (ratios[1:] > ratios[:-1]).all():
            raise ValueError('a schedule goes from almost clean (index 0) to noise: alpha >= 0, sigma > 0, sigma/alpha ascending; '
                             'turn a descending one round with .flip(0)')
        if isinstance(times, str):
            raise ValueError(f'times is {times!r}, expected a tensor [T]: the prediction is given by its name, prediction={times!r}')
        if times is not None and (times.shape != alphas.shape or not times.isfinite().all()):
            raise ValueError(f'times {list(times.shape)} for {len(alphas)} levels: expected one finite number for each')
        self.prediction, self.num_timesteps = prediction, len(alphas)
        self.alphas, self.sigmas = alphas, sigmas
        self.times = None if times is None else times.detach().cpu()
        self._alphas, self._sigmas, self._ratios = alphas.tolist(), sigmas.tolist(), ratios.tolist()
        self._times: list[float] = list(range(len(alphas))) if self.times is None else self.times.tolist()
        self._tables: dict[tuple, tuple[Tensor, Tensor, Tensor | None]] = {}
        for i, (alpha, sigma) in enumerate(zip(self._alphas, self._sigmas)):
            if self._determinant(alpha, sigma)[2] == 0:
                raise ValueError(f'prediction {prediction!r} says nothing about x0 at level {i} of {len(alphas)}, where alpha is {alpha:g} '
                                 f'and sigma {sigma:g}: use v or x0 with zero terminal SNR, or a schedule that stops earlier')

    # ---------------------------------------------------------------- the two equations
    def level(self, t: Tensor, like: Tensor) -> Level:
        """The levels of indices t, shaped to broadcast against like.

        t: int64 [B], or [B, L] for a level of each token.  like: [B, ...] or [B, L, ...].
        """
        key = (like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
        if key not in self._tables:
            times = self.times if self.times is None or not self.times.is_floating_point() else self.times.float()
            self._tables[key] = (self.alphas.to(*key), self.sigmas.to(*key), None if times is None else times.to(like.device))
        alphas, sigmas, times = self._tables[key]
        t = t.to(like.device)
        shape = (*t.shape, *[1] * (like.ndim - t.ndim))
        return Level(t if times is None else times[t], alphas[t].view(shape), sigmas[t].view(shape))

    def diffuse(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """The state at a level."""
        return level.alpha * x0 + level.sigma * noise

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """What the network should have said."""
        a, b = PREDICTIONS[self.prediction](level.alpha, level.sigma)
        return a * x0 + b * noise

    def split(self, out: Tensor, xt: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The (x0, eps) that explain both the state xt and the network's output.

        Exact for every prediction; Salimans & Ho 2022, appendix D, for v. The determinant is never 0: the constructor saw to it.
        """
        a, b, det = self._determinant(level.alpha, level.sigma)
        return xt * (b / det) - out * (level.sigma / det), out * (level.alpha / det) - xt * (a / det)

    def _determinant(self, alpha: Any, sigma: Any) -> tuple[Any, Any, Any]:
        a, b = PREDICTIONS[self.prediction](alpha, sigma)
        return a, b, alpha * b - sigma * a

    # ---------------------------------------------------------------- training
    def loss(self, x0: Tensor, t: Tensor, model: Callable[..., Tensor], model_kwargs: Mapping[str, Any] | None = None,
             noise: Tensor | None = None, criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
             weight: Callable[[Level], Tensor] | Tensor | None = None, offset_noise: float = 0.0,
             input_perturbation: float = 0.0) -> Tensor:
        """The loss [B] of each sample at levels t.

        x0: [B, C, ...].  t: int64 [B] indices, or [B, L] for a level of each token.  noise: like x0; drawn, keyed by sample, if None.
        criterion: (out, target) -> error of each element, squared by default.
        weight: of the shape of t, or a function of the level that gives it, e.g. `min_snr(5)`.
        offset_noise: standard deviation of noise that is constant over a channel, so that brightness is learnt (Guttenberg 2023).
        input_perturbation: share of further noise that the network sees and the target does not have (arXiv:2301.11706).
        """
        kind = network_dtype(model, x0)
        x0 = x0 if x0.dtype == torch.float64 else x0.float()    # levels near the ends drown in half precision
        noise = streams.normal('noise', x0) if noise is None else noise.to(x0.dtype)
        if offset_noise:
            channel = streams.normal('offset_noise', x0.flatten(2)[..., :1]).view(*x0.shape[:2], *[1] * (x0.ndim - 2))
            noise = noise + offset_noise * channel
        seen = noise + input_perturbation * streams.normal('input_perturbation', x0) if input_perturbation else noise
        level = self.level(t, x0)
        out = shaped_like(x0, model(self.diffuse(x0, seen, level).to(kind), t=level.t, **(model_kwargs or {})), model).to(x0.dtype)
        target = self.target(x0, noise, level)
        error = (out - target) ** 2 if criterion is None else criterion(out, target)
        if error.shape != target.shape:
            raise ValueError(f'the criterion gave {list(error.shape)} for an output {list(target.shape)}: '
                             "expected the error of each element (reduction='none')")
        error = error.flatten(t.ndim).mean(-1) if error.ndim > t.ndim else error
        if weight is not None:
            error = error * (weight(level) if callable(weight) else weight).to(error).view_as(error)
        return error.flatten(1).mean(1) if error.ndim > 1 else error

    def min_snr(self, gamma: float) -> Callable[[Level], Tensor]:
        """The weight min(SNR, gamma) of the error in x0, SNR = alpha^2/sigma^2, told in terms of the prediction (arXiv:2303.09556).

        eps: min(SNR, gamma)/SNR.  x0: min(SNR, gamma).  v of a variance-preserving process: min(SNR, gamma)/(SNR + 1).
        """
        def weight(level: Level) -> Tensor:
            # an error e in the output is an error (sigma/det) * e in x0
            share = (level.sigma / self._determinant(level.alpha, level.sigma)[2]) ** 2
            return share * ((level.alpha / level.sigma) ** 2).clamp(max=gamma)
        return weight

    # ---------------------------------------------------------------- sampling
    @torch.no_grad()
    def sample(self, noise: Tensor, model: Callable[..., Tensor], model_kwargs: ModelKwargs | None = None, *,
               x: Tensor | None = None, denoising_strength: float = 1.0, mask: Tensor | None = None,
               solver: str = 'ddim', steps: int | Sequence[float] = 50, guide_scale: GuideScale | None = None,
               guide_rescale: float = 0.0, discretization: Discretization = 'trailing', seed: int | Sequence[int] | None = None,
               clamp: float | None = None, percentile: float | None = None, t_max: int | None = None, t_min: int | None = None,
               condition_fn: Callable[[Tensor, Tensor], Tensor] | None = None, discard_penultimate_step: bool | None = None,
               return_intermediate: Literal['x0', 'xt'] | None = None, show_progress: bool = False,
               on_step: Callable[[int, int, Tensor], None] | None = None, **options: Any) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Draw x0 [B, ...] from the network, beginning with noise [B, ...].

        model: (x, t=[B], **model_kwargs) -> out.  It sees x in its own precision; the arithmetic is float32, or float64 if noise is.
            t is int64 where a level lies on an index, float32 between two (karras, half steps) and where times are given.
        model_kwargs, guide_scale, guide_rescale: see `guidance.guided`.
        x, denoising_strength: begin with the picture x under noise, and run the last int(strength * steps) steps; 1 keeps nothing of
            it, 0 returns it.
        mask: broadcasts against x; where it is 1 the picture is new, where it is 0 it stays x, to the end.
        solver: a name in SAMPLERS, or what others call it; `karras` behind it means discretization='karras'.  options: the sampler's own.
        steps: how many levels the network sees, or their indices themselves, noisiest first (fractions lie between two levels).
        discretization, t_max, t_min: which of the levels t_min .. t_max these are; see `levels`.
        seed: of the noise that a sampler adds. A number: row i is keyed by (seed, i). A list: one seed for each row. None: torch's own.
        clamp: bound of x0 at every step.  percentile: 0 .. 1, x0 is divided by this quantile of its size where that is over 1
            (arXiv:2205.11487, section 2.3), and cut there; takes the place of clamp.
        condition_fn: (x, t) -> gradient of a log-probability in x, added to the score (arXiv:2105.05233, algorithm 2).
        discard_penultimate_step: make one step more and leave out the last but one; None: for dpm2, dpm2_ancestral, dpmpp_2m_sde.
        return_intermediate: with the result, a list of the x0 or of the states at each of the steps.
        on_step: called as (step, steps, x0) at each of the steps; what it raises ends the drawing.
        """
        name, is_karras = sampler_named(solver)
        sampler = SAMPLERS.function({'NAME': name, **{key.upper(): value for key, value in options.items()}})
        _refuse_options(x, denoising_strength, mask, clamp, percentile, return_intermediate)
        kind = network_dtype(model, noise)
        noise = noise if noise.dtype == torch.float64 else noise.float()
        levels = self.levels(steps, 'karras' if is_karras else discretization, t_max, t_min,
                             name in DISCARD_PENULTIMATE if discard_penultimate_step is None else discard_penultimate_step)
        state = noise * math.hypot(levels[0].alpha, levels[0].sigma)
        if x is not None:
            x = x.to(noise)
            if denoising_strength < 1:
                levels = levels[len(levels) - 1 - int(denoising_strength * (len(levels) - 1)):]
                state = self.diffuse(x, noise, levels[0])    # the one level left at strength 0 is the clean one: x itself

        predict = guided(model, model_kwargs, guide_scale, guide_rescale, noise)
        adjusts = condition_fn is not None or clamp is not None or percentile is not None or mask is not None
        steps_made = dict.fromkeys(levels[:-1], False)
        kept: dict[Level, Tensor] = {}
        progress = _progress_bar(len(steps_made)) if show_progress else None

        def denoise(xt: Tensor, level: Level) -> tuple[Tensor, Tensor]:
            pulse.beat()
            t = torch.full((len(xt),), level.t, device=xt.device, dtype=torch.int64 if isinstance(level.t, int) else torch.float32)
            x0, eps = self.split(predict(xt.to(kind), t), xt, level)
            if adjusts:
                if condition_fn is not None and level.alpha > 0:    # pure noise says nothing about the condition
                    with torch.enable_grad():
                        x0 = x0 + condition_fn(xt, t).to(x0) * (level.sigma ** 2 / level.alpha)
                x0 = bounded(x0, clamp, percentile)
                if mask is not None and x is not None:
                    x0 = torch.lerp(x, x0, mask.to(x0))
                eps = (xt - level.alpha * x0) / level.sigma    # so that (x0, eps) still explain the state
            if level in steps_made:
                is_new, steps_made[level] = not steps_made[level], True
                if progress is not None and is_new:
                    progress.update()
                if on_step is not None and is_new:
                    on_step(sum(steps_made.values()), len(steps_made), x0)
                if return_intermediate is not None:    # a corrector sees a level before its own step does: the step has the last word
                    kept[level] = x0 if return_intermediate == 'x0' else xt
            return x0, eps

        try:
            state = sampler(denoise, state, levels, fresh=_fresh_noise(seed, len(noise)), between=self.between)
        finally:
            if progress is not None:
                progress.close()
        return state if return_intermediate is None else (state, list(kept.values()))

    def levels(self, steps: int | Sequence[float], discretization: Discretization = 'trailing', t_max: int | None = None,
               t_min: int | None = None, discard_penultimate: bool = False) -> list[Level]:
        """`steps` levels of plain numbers from t_max (default T-1) down to t_min (0), and the clean one behind them.

        trailing: begins at t_max, as sampling in few steps should (arXiv:2305.08891, table 2).  leading: ends at t_min + 1.
        linspace: has both.  karras: both, and lines in the 7th root of sigma/alpha between them (arXiv:2206.00364, equation 5).
        steps may be the indices themselves, descending.
        discard_penultimate: one step more is made, and the last but one left out, where there is room for it.

        Raises ValueError for more steps than levels (karras knows no such bound), and for indices that do not descend in 0 .. T-1.
        """
        last, first = (self.num_timesteps - 1 if t_max is None else t_max), (0 if t_min is None else t_min)
        if not 0 <= first <= last < self.num_timesteps:
            raise ValueError(f't_min {first} and t_max {last}: expected 0 <= t_min <= t_max <= {self.num_timesteps - 1}')
        if not isinstance(steps, int):
            indices = [float(i) for i in steps]
            if not indices or not 0 <= indices[-1] <= indices[0] <= self.num_timesteps - 1 \
                    or any(a <= b for a, b in itertools.pairwise(indices)):
                raise ValueError(f'steps is {list(steps)}: expected indices that descend within 0 .. {self.num_timesteps - 1}')
            return [*(self.at(i) for i in indices), self._clean()]

        span = last - first + 1
        if discretization != 'karras' and discretization not in DISCRETIZATIONS:
            raise ValueError(f'discretization {discretization!r} is not one of {", ".join([*DISCRETIZATIONS, "karras"])}')
        if steps < 1 or (steps > span and discretization != 'karras'):
            raise ValueError(f'{steps} steps over {span} levels: expected 1 .. {span}')
        drops = discard_penultimate and (steps < span or discretization == 'karras')
        if discretization == 'karras':
            levels = self._karras(steps + drops, first, last)
        else:
            levels = [self.at(first + i) for i in DISCRETIZATIONS[discretization](steps + drops, span)]
        return [*(levels[:-1] if drops else levels), self._clean()]

    def at(self, index: float) -> Level:
        """The level at an index 0 .. T-1; between two of them, on the straight line that joins them."""
        low = int(index)
        share = index - low
        if share == 0:
            return Level(self._times[low], self._alphas[low], self._sigmas[low])
        t, alpha, sigma = (a + share * (b - a) for a, b in ((v[low], v[low + 1]) for v in (self._times, self._alphas, self._sigmas)))
        return Level(t, alpha, sigma)

    def between(self, a: Level, b: Level, r: float) -> Level:
        """The level a share r of the way from a to b in log-SNR; both need alpha and sigma over 0."""
        return self._with_ratio(math.exp((1 - r) * math.log(a.sigma / a.alpha) + r * math.log(b.sigma / b.alpha)))

    def _with_ratio(self, ratio: float) -> Level:
        """The level whose sigma/alpha is `ratio`: a point of the chain of straight lines (t, alpha, sigma) from the clean level on.

        A line keeps alpha + sigma of a flow and alpha of a variance-exploding process exactly; of T = 1000 variance-preserving
        levels it misses alpha^2 + sigma^2 = 1 by about 1e-6.
        """
        low = bisect_right(self._ratios, ratio) - 1
        if low >= 0 and self._ratios[low] == ratio:
            return self.at(low)
        if low == self.num_timesteps - 1:
            raise ValueError(f'sigma/alpha {ratio:g} is beyond the noisiest level, {self._ratios[-1]:g}')
        here = self.at(low) if low >= 0 else self._clean()
        there = self.at(low + 1)
        slope = Level(*(q - p for p, q in zip(here, there)))
        share = (ratio * here.alpha - here.sigma) / (slope.sigma - ratio * slope.alpha)
        alpha = here.alpha + share * slope.alpha
        return Level(float(here.t + share * slope.t), alpha, ratio * alpha)

    def _karras(self, count: int, first: int, last: int, rho: float = 7.0) -> list[Level]:
        noisiest = [self.at(last)]
        if math.isinf(self._ratios[last]) and last > first:    # pure noise lies on no such line: the line begins at the level below it
            count, last = count - 1, last - 1
        else:
            noisiest = []
        top, end = self._ratios[last] ** (1 / rho), self._ratios[first] ** (1 / rho)
        inner = [self._with_ratio((top + i / (count - 1) * (end - top)) ** rho) for i in range(1, count - 1)]
        return [*noisiest, *([self.at(last)] if count > 0 else []), *inner, *([self.at(first)] if count > 1 else [])]

    def _clean(self) -> Level:
        return Level(self._times[0], 1.0, 0.0)


SAMPLERS.reserve(Diffusion.sample)    # its options are given beside a sampler's own


def network_dtype(model: Callable[..., Tensor], like: Tensor) -> torch.dtype:
    """The precision in which a network wants its input: that of its weights; that of `like` where it is a plain function."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    return next((w.dtype for w in weights if w.is_floating_point()), like.dtype)


def _refuse_options(x: Tensor | None, denoising_strength: float, mask: Tensor | None, clamp: float | None, percentile: float | None,
                    return_intermediate: str | None) -> None:
    """Raises ValueError where options of `sample` are out of range, or lack what they act on."""
    if (percentile is not None and not 0 <= percentile <= 1) or (clamp is not None and not clamp > 0):
        raise ValueError(f'percentile is {percentile} and clamp {clamp}: expected 0 .. 1, and a number above 0')
    if return_intermediate not in (None, 'x0', 'xt'):
        raise ValueError(f'return_intermediate is {return_intermediate!r}, expected x0, xt or None')
    if mask is not None and x is None:
        raise ValueError('a mask needs x, the picture that stays where the mask is 0')
    if not 0 <= denoising_strength <= 1 or (denoising_strength < 1 and x is None):
        raise ValueError(f'denoising_strength is {denoising_strength}, expected 0 .. 1, and x, the picture to begin with, below 1')


def _fresh_noise(seed: int | Sequence[int] | None, rows: int) -> Callable[[Tensor], Tensor]:
    """like [rows, ...] -> standard normals; the k-th call of row i is keyed by its seed and k, or drawn by torch where seed is None."""
    draws = itertools.count()
    seeds = None if seed is None else streams.row_seeds(seed, rows)

    def fresh(like: Tensor) -> Tensor:
        if seeds is None:
            return torch.randn_like(like)
        drawn = streams.normal_rows(seeds, f'fresh {next(draws)}', like.shape[1:], 'cpu', like.dtype)
        # from pinned memory, or the copy would wait for the network, and the next step's launches with it
        return drawn.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else drawn.to(like.device)

    return fresh


def _progress_bar(total: int) -> Any:
    from tqdm import tqdm
    return tqdm(total=total, desc='sample', leave=False)
