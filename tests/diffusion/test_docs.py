from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from scepter.core.registry import LEVELS, SAMPLERS, SCHEDULES
from scepter.diffusion import PREDICTIONS, Diffusion, schedules

PAGE = (Path(__file__).parents[2] / 'docs' / 'diffusion.md').read_text(encoding='utf-8')


@pytest.fixture
def page() -> dict:
    """The names that the page's examples leave behind; what they register is taken back afterwards."""
    tables = (PREDICTIONS, SAMPLERS._entries, SCHEDULES._entries, LEVELS._entries)
    before = [dict(table) for table in tables]
    names: dict = {'__name__': 'page'}
    exec(compile('\n'.join(re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)), 'docs/diffusion.md', 'exec', dont_inherit=True), names)  # noqa: S102
    yield names
    for table, old in zip(tables, before):
        table.clear()
        table.update(old)


def test_every_example_of_the_page_runs(page):
    assert page['picture'].shape == (2, 4, 8, 8) and page['picture'].isfinite().all()
    torch.testing.assert_close(page['half_new'][..., :4], page['x0'][..., :4], rtol=0, atol=1e-5)


def test_the_pages_edm_prediction_is_edms_preconditioning(page):
    diffusion, level = page['edm_diffusion'], page['edm_diffusion'].at(25)
    x0, eps = torch.randn(2, 8, dtype=torch.float64)
    xt, d = diffusion.diffuse(x0, eps, level), 0.5
    c_skip, c_out = d ** 2 / (level.sigma ** 2 + d ** 2), level.sigma * d / (level.sigma ** 2 + d ** 2) ** 0.5
    torch.testing.assert_close(diffusion.target(x0, eps, level), (x0 - c_skip * xt) / c_out)


@pytest.mark.parametrize('discretization', ['trailing', 'leading', 'linspace'])
def test_the_pages_levels_are_those_of_four_steps(discretization):
    times = [level.t for level in Diffusion(*schedules.scaled_linear(1000)).levels(4, discretization)[:-1]]
    row = next(line for line in PAGE.splitlines() if line.startswith(f'| `{discretization}`'))
    assert ', '.join(map(str, times)) in row


def test_the_page_names_every_schedule_and_density_and_sampler():
    assert [name for name in [*SCHEDULES, *LEVELS, *SAMPLERS, *PREDICTIONS] if f'`{name}`' not in PAGE] == []
