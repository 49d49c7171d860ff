"""The levels that one set of tokens goes through, as the schedulers of published NOVA folders have them.

    for levels in chains(diffusion, 25, 'flow'):  x = sampler(denoise, x, levels, ...)

A chain is a list of levels for a sampler, noisiest first. There is more than one only where a published scheduler ends a step at another
level than that at which it begins the next (linspace, and trailing with steps that do not divide the levels).
"""
from __future__ import annotations

from itertools import pairwise
from typing import Literal

from scepter.diffusion.process import Diffusion, Level

Spacing = Literal['flow', 'leading', 'linspace', 'trailing']
CLEAN = Level(0, 1.0, 0.0)


def chains(diffusion: Diffusion, steps: int, spacing: Spacing, offset: int = 0, shift: float | None = None) -> list[list[Level]]:
    """`steps` levels and the clean one behind them.

    flow: times in a line from 1 to the noise of the last level of training, then shifted, by the process's own shift or another.
    leading, linspace, trailing: of T levels, each step T // steps long.  offset: added to the indices of leading.
    Raises ValueError where there are more steps than levels, and for a shift of a process that is no flow.
    """
    count = diffusion.num_timesteps
    if not 1 <= steps <= count:
        raise ValueError(f'{steps} steps over {count} levels: expected 1 .. {count}')
    if spacing == 'flow':
        return [flow_levels(diffusion, steps, shift)]
    if shift is not None:
        raise ValueError(f'flow_shift is {shift}, but this process is no flow: it has no shift')
    length = count // steps
    if spacing == 'leading':
        indices = [min(length * i + offset, count - 1) for i in reversed(range(steps))]
    elif spacing == 'linspace':
        indices = [round((count - 1) * i / (steps - 1)) if steps > 1 else 0 for i in reversed(range(steps))]
    else:
        indices = [round(count - i * count / steps) - 1 for i in range(steps)]
    ends = [diffusion.at(i - length) if i >= length else CLEAN for i in indices]
    return _joined([(diffusion.at(i), end) for i, end in zip(indices, ends)])


def flow_levels(diffusion: Diffusion, steps: int, shift: float | None = None) -> list[Level]:
    """Levels of a flow: alpha 1 - sigma, and the network is told sigma times what it is told at pure noise."""
    lowest, loudest = diffusion.at(0).sigma, diffusion.at(diffusion.num_timesteps - 1).t
    shift = shift_of(diffusion) if shift is None else shift
    times = [1 + (lowest - 1) * i / (steps - 1) if steps > 1 else 1.0 for i in range(steps)]
    sigmas = [shift * u / (1 + (shift - 1) * u) for u in times]
    return [*(Level(sigma * loudest, 1 - sigma, sigma) for sigma in sigmas), CLEAN]


def shift_of(diffusion: Diffusion) -> float:
    """s of sigma = s*t / (1 + (s-1)*t), from the lowest level, where t is 1 / T."""
    lowest, count = diffusion.at(0).sigma, diffusion.num_timesteps
    return lowest * (count - 1) / (1 - lowest) if count > 1 else 1.0


def _joined(steps: list[tuple[Level, Level]]) -> list[list[Level]]:
    """Steps, each from one level to another, as chains."""
    found = [[*steps[0]]]
    for (_, end), (begin, then) in pairwise(steps):
        if end.sigma == begin.sigma:
            found[-1].append(then)
        else:
            found.append([begin, then])
    return found
