"""Learning rates: functions of the step that agree with NOVA's own program, and a warm-up that begins where it is told to."""
from __future__ import annotations

import json
from typing import Any

import pytest

import scepter.components  # noqa: F401
from scepter.core.config import Config
from scepter.solvers.optim import rate_function
from tests.models.nova_cases import with_file

PUBLISHED: dict[str, Any] = {name: case for file in with_file('lr.json', 'misc')
                             for name, case in json.loads(file.read_text(encoding='utf-8')).items()}
NAMES = {'ConstantLR': 'Constant', 'CosineLR': 'CosineAfter', 'MultiStepLR': 'Step'}


@pytest.mark.parametrize('case', PUBLISHED.values(), ids=PUBLISHED)
def test_a_schedule_gives_the_published_rate_at_every_step(case: dict[str, Any]):
    said = case['kwargs']
    top, warmup = said['lr_max'], said.get('warmup_steps', 0)
    schedule: dict[str, Any] = {'NAME': NAMES[case['class']]}
    if case['class'] == 'CosineLR':
        schedule |= {'BEGIN': warmup, 'EVERY': said.get('decay_step', 1), 'FINAL': said.get('lr_min', 0.0) / top}
    elif case['class'] == 'MultiStepLR':
        schedule |= {'MILESTONES': said['decay_steps'], 'GAMMA': said['decay_gamma']}

    factor = rate_function(Config(schedule), warmup, said.get('max_steps', 100), said.get('warmup_factor', 0.0))

    assert [top * factor(step) for step in range(len(case['lr']))] == pytest.approx(case['lr'], rel=1e-9, abs=1e-18)


def test_steps_fall_towards_the_final_rate():
    factor = rate_function(Config({'NAME': 'Step', 'MILESTONES': [2, 4], 'GAMMA': 0.5, 'FINAL': 0.2}), 0, 10)

    assert [factor(step) for step in (0, 2, 4)] == pytest.approx([1.0, 0.6, 0.4])


def test_without_a_factor_the_warm_up_is_what_it_was():
    assert [rate_function(None, 4, 10)(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
