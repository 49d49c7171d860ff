"""The average of the weights: what is averaged, what is copied, and that nothing is lost when it is looked at."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from scepter.core.disk.tensors import TensorFile, write_tensors
from scepter.core.errors import CheckpointError
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
    hook.begin(network)
    return hook, network


def test_parameters_follow_the_formula():
    hook, network = started(BETA=0.9, WARMUP=False)
    expected = network.layer.weight.detach().clone()
    for count in range(1, 4):
        with torch.no_grad():
            network.layer.weight.add_(1.0)
        hook.update(count)
        expected = 0.9 * expected + 0.1 * network.layer.weight.detach()
    assert torch.allclose(hook.average['layer.weight'], expected)


def test_warm_up_follows_quickly_at_first_and_ends_at_beta():
    hook, network = started(BETA=0.5)
    with torch.no_grad():
        network.layer.weight.fill_(1.0)
    before = hook.average['layer.weight'].clone()
    hook.update(1)
    assert torch.allclose(hook.average['layer.weight'], before + (1 - 2 / 11) * (1 - before))
    before = hook.average['layer.weight'].clone()
    hook.update(1000)
    assert torch.allclose(hook.average['layer.weight'], (before + 1) / 2)


def test_buffers_are_copied_and_a_schedule_stays_what_it_is():
    hook, network = started(BETA=0.9)
    network.norm(torch.randn(8, 3) + 5)
    hook.update(1)
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
    own, average, place = network.layer.weight.detach().clone(), hook.average['layer.weight'].clone(), network.layer.weight.data_ptr()
    with pytest.raises(RuntimeError, match='on purpose'), hook.swapped(network):
        assert torch.equal(network.layer.weight, average)
        assert network.layer.weight.data_ptr() == place      # copied: to re-point .data changes nothing in a sharded network
        with hook.swapped(network):
            assert torch.equal(network.layer.weight, average)
        raise RuntimeError('on purpose')
    assert torch.equal(network.layer.weight, own)
    assert torch.equal(hook.average['layer.weight'], average)


def test_names_and_modules_are_walked_once_and_not_at_each_step(monkeypatch):
    hook, network = started()
    monkeypatch.setattr(nn.Module, 'named_modules', None)
    with torch.no_grad():
        network.layer.weight.add_(1.0)
    hook.update(1)
    with hook.swapped(network):
        pass


def load(hook: ModelEmaHook, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """As from a checkpoint."""
    file = folder / f'{len(list(folder.iterdir()))}.safetensors'
    write_tensors(file, tensors)
    hook.load_state_dict({}, TensorFile(file))


def test_a_checkpoint_of_another_shape_or_type_is_refused_by_name(tmp_path):
    before, _ = started()
    for change, words in ((lambda w: w[:2], r'layer.weight: float32 \[3, 3\] expected, float32 \[2, 3\] found'),
                          (lambda w: w.half(), r'layer.weight: float32 \[3, 3\] expected, float16 \[3, 3\] found')):
        hook = ModelEmaHook({'NAME': 'ModelEmaHook'})
        load(hook, {**before.state_tensors(), 'layer.weight': change(before.average['layer.weight'])}, tmp_path)
        with pytest.raises(CheckpointError, match=words):
            hook.begin(Network())


def test_a_layer_frozen_since_is_told_and_drawn_as_it_is(tmp_path, capsys):
    before, network = started()
    before.average['layer.weight'] += 1
    hook = ModelEmaHook({'NAME': 'ModelEmaHook'})
    load(hook, before.state_tensors(), tmp_path)
    network.norm.requires_grad_(False)
    hook.begin(network)
    told = capsys.readouterr().err
    assert '5 weights are trained no longer' in told and 'norm.bias' in told
    assert hook.average.keys() == {'layer.weight', 'layer.bias'}
    assert torch.equal(hook.average['layer.weight'], before.average['layer.weight'])


def test_the_average_lies_in_memory_as_its_weight_does_also_after_a_resume(tmp_path):
    network = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    hook = ModelEmaHook({'NAME': 'ModelEmaHook'})
    load(hook, {name: p.detach().contiguous() for name, p in network.named_parameters()}, tmp_path)
    hook.begin(network)
    assert hook.average['weight'].stride() == network.weight.stride()


def test_of_two_averages_each_is_kept_and_the_first_one_draws(tmp_path):
    hooks = [{'NAME': 'ModelEmaHook', 'BETA': 0.5, 'WARMUP': False}, {'NAME': 'ModelEmaHook', 'BETA': 0.99, 'WARMUP': False},
             {'NAME': 'CheckpointHook', 'INTERVAL': 0}]
    solver = tiny.run(tiny.config(tmp_path / 'whole', TRAIN_HOOKS=hooks))
    whole = tiny.groups(tmp_path / 'whole', 10)
    assert not torch.equal(whole['ema']['net.0.weight'], whole['ema#2']['net.0.weight'])
    with solver.ema_weights():
        assert torch.equal(solver.model.net[0].weight, whole['ema']['net.0.weight'])
    tiny.run(tiny.config(tmp_path / 'cut', steps=5, TRAIN_HOOKS=hooks, LR_SCHEDULER=None))
    tiny.run(tiny.config(tmp_path / 'cut', TRAIN_HOOKS=hooks, LR_SCHEDULER=None, RESUME_FROM='latest'))
    tiny.run(tiny.config(tmp_path / 'plain', TRAIN_HOOKS=hooks, LR_SCHEDULER=None))
    assert tiny.same(tiny.groups(tmp_path / 'plain', 10), tiny.groups(tmp_path / 'cut', 10))


def test_a_half_precision_network_has_an_average_in_full_precision():
    torch.manual_seed(0)
    network = Network().bfloat16()
    hook = ModelEmaHook({'NAME': 'ModelEmaHook', 'BETA': 0.999, 'WARMUP': False})
    hook.begin(network)
    before = hook.average['layer.weight'].clone()
    with torch.no_grad():
        network.layer.weight.add_(0.125)
    hook.update(1)
    assert hook.average['layer.weight'].dtype == torch.float32
    assert not torch.equal(hook.average['layer.weight'], before)      # bfloat16 would have rounded the change away
