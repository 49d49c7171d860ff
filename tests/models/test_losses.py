from __future__ import annotations

import pytest
import torch

import scepter.models.losses  # noqa: F401  (registers)
from scepter.core.faults import ConfigError
from scepter.core.registry import LOSSES


@pytest.mark.parametrize(('loss_type', 'expected'), [('l1', [0.5, 3.0]), ('l2', [0.25, 9.0]), ('huber', [0.125, 4.0])])
def test_reconstruct_loss_is_the_error_of_each_value(loss_type, expected):
    loss = LOSSES.build({'NAME': 'ReconstructLoss', 'LOSS_TYPE': loss_type, 'HUBER_DELTA': 2.0})
    torch.testing.assert_close(loss(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 2.0]])), torch.tensor([expected]))


def test_reconstruct_loss_is_the_square_by_default():
    assert LOSSES.build({'NAME': 'ReconstructLoss'}).LOSS_TYPE == 'l2'


def test_cross_entropy_is_the_surprise_at_the_right_class():
    logits = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]]).log()
    loss = LOSSES.build({'NAME': 'CrossEntropy'})
    torch.testing.assert_close(loss(logits, torch.tensor([2, 0])), -torch.tensor([0.5, 0.1]).log())


def test_label_smoothing_spreads_its_share_over_all_classes():
    logits = torch.tensor([[0.2, 0.3, 0.5]]).log()
    loss = LOSSES.build({'NAME': 'CrossEntropy', 'LABEL_SMOOTHING': 0.3})
    torch.testing.assert_close(loss(logits, torch.tensor([2])), -(0.1 * logits[:, 0] + 0.1 * logits[:, 1] + 0.8 * logits[:, 2]))


def test_label_smoothing_beyond_its_range_is_refused():
    with pytest.raises(ConfigError, match=r'LABEL_SMOOTHING: expected at least 0, below 1, got 1\.5'):
        LOSSES.build({'NAME': 'CrossEntropy', 'LABEL_SMOOTHING': 1.5})
