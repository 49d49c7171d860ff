"""The average of the weights: what is averaged, what is copied, and that nothing is lost when it is looked at."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from scepter.hooks.ema import ModelEmaHook


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer('alphas_cumprod', torch.linspace(1, 0, 10))


def started(**settings) -> tuple[ModelEmaHook, Network]:
    torch.manual_seed(0)
    hook, network = ModelEmaHook({'NAME': 'ModelEmaHook', **settings}), Network()
    hook._begin(network)
    return hook, network


def test_parameters_follow_the_formula():
    hook, network = started(BETA=0.9, WARMUP=False)
    expected = network.layer.weight.detach().clone()
    for count in range(1, 4):
        with torch.no_grad():
            network.layer.weight.add_(1.0)
        hook.update(network, count)
        expected = 0.9 * expected + 0.1 * network.layer.weight.detach()
    assert torch.allclose(hook.average['layer.weight'], expected)


def test_warm_up_follows_quickly_at_first_and_ends_at_beta():
    hook, network = started(BETA=0.5)
    with torch.no_grad():
        network.layer.weight.fill_(1.0)
    before = hook.average['layer.weight'].clone()
    hook.update(network, 1)
    assert torch.allclose(hook.average['layer.weight'], before + (1 - 2 / 11) * (1 - before))
    before = hook.average['layer.weight'].clone()
    hook.update(network, 1000)
    assert torch.allclose(hook.average['layer.weight'], (before + 1) / 2)


def test_buffers_are_copied_and_a_schedule_stays_what_it_is():
    hook, network = started(BETA=0.9)
    network.norm(torch.randn(8, 3) + 5)
    hook.update(network, 1)
    assert torch.equal(hook.buffers['norm.running_mean'], network.norm.running_mean)
    assert torch.equal(hook.buffers['norm.num_batches_tracked'], torch.tensor(1))
    assert torch.equal(hook.buffers['alphas_cumprod'], torch.linspace(1, 0, 10))


def test_frozen_weights_are_not_kept_twice():
    hook, _ = started()
    assert not any(name.startswith('frozen') for name in hook.average)


def test_looking_at_the_average_leaves_the_weights_untouched_also_after_an_error():
    hook, network = started()
    with torch.no_grad():
        network.layer.weight.add_(1.0)
    own = network.layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match='on purpose'), hook.swapped(network):
        assert torch.equal(network.layer.weight, hook.average['layer.weight'])
        raise RuntimeError('on purpose')
    assert torch.equal(network.layer.weight, own)


def test_a_half_precision_network_has_an_average_in_full_precision():
    torch.manual_seed(0)
    network = Network().bfloat16()
    hook = ModelEmaHook({'NAME': 'ModelEmaHook', 'BETA': 0.999, 'WARMUP': False})
    hook._begin(network)
    before = hook.average['layer.weight'].clone()
    with torch.no_grad():
        network.layer.weight.add_(0.125)
    hook.update(network, 1)
    assert hook.average['layer.weight'].dtype == torch.float32
    assert not torch.equal(hook.average['layer.weight'], before)      # bfloat16 would have rounded the change away
