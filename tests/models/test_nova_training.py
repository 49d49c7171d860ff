"""One training pass of NOVA against the published code, with its recorded masks, noise and times; and what is random in ours."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scepter.models.autoencoder import DiagonalGaussian
from scepter.models.nova.blocks import patchify
from scepter.models.nova.model import weighed
from scepter.models.nova.training import Chance, frame_losses
from tests.models.nova_cases import Case, close, label, with_file

TRAIN = with_file('train.safetensors')


def chance_of(case: Case, train: dict[str, Tensor]) -> Chance:
    """The recorded draws. A flow's times were recorded from noise to data; ours count from data to noise."""
    order, seen = train['rand.mask_u'].squeeze(-1).argsort(1), train['rand.prev_ids'].squeeze(-1)
    assert torch.equal(order[:, :seen.shape[1]], seen)
    t = train['rand.timesteps']
    is_flow, last = case.told['scheduler']['class'].startswith('Flow'), case.told['scheduler'].get('num_train_timesteps', 1000) - 1
    return Chance(order, seen.shape[1], train['rand.loss_noise'], last - t if is_flow else t)


@pytest.mark.parametrize('file', TRAIN, ids=label)
def test_a_pass_is_made_of_what_was_recorded_on_the_way(file: Path):
    case, train = Case(file.parent), Case(file.parent).read('train')
    model, chance = case.model(), chance_of(case, train)

    z = DiagonalGaussian(train['in.moments'].float()).sample(train['rand.latent_noise'])
    latents = (z - model.SHIFT_FACTOR) * model.SCALE_FACTOR
    condition = model.model.condition(case.told_to(model.model, train), train.get('in.motion_flow', 5.0))
    frames = train['mid.latents'].transpose(1, 2).flatten(0, 1)
    x0 = patchify(frames, model.model.patch).repeat(case.told['loss_repeat'], 1, 1)
    level = model.diffusion.level(chance.t, x0)

    close(latents.reshape(train['mid.latents'].shape), train['mid.latents'], 2e-5, 'latents')
    close(condition, train['mid.c_text'], 2e-5, 'condition')
    close(x0, train['mid.target_tokens'], 0.0, 'tokens')
    close(model.diffusion.diffuse(x0, chance.noise, level), train['mid.x_t_tokens'], 2e-5, 'noisy tokens')
    close(level.t, train['mid.decoder_timestep'], 2e-3, 'times, of 1000')


@pytest.mark.parametrize('file', TRAIN, ids=label)
def test_losses_and_gradients_are_the_published_ones(file: Path):
    case, train = Case(file.parent), Case(file.parent).read('train')
    model = case.model()
    network = model.model
    condition = network.condition(case.told_to(network, train), train.get('in.motion_flow', 5.0))

    losses = frame_losses(network, model.diffusion, train['mid.latents'], condition, chance_of(case, train))
    outputs = weighed(losses)
    outputs['loss'].backward()

    assert abs(outputs['loss'].item() - train['out.total'].item()) < 1e-5
    for name in ('loss_t2i', 'loss_i2i'):
        assert (name in outputs) == (f'out.{name}' in train)
        if name in outputs:
            assert abs(outputs[name].item() - train[f'out.{name}'].item()) < 1e-5
    trained = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert trained.keys() == set(case.told['recorded']['train']['trainable'])
    for name, grad in trained.items():
        wanted = train[f'gradnorm.{name}'].item()
        assert grad is not None and abs(grad.norm().item() - wanted) <= 1e-4 * wanted, name
        if f'grad.{name}' in train:
            close(grad, train[f'grad.{name}'], 1e-4 * train[f'grad.{name}'].abs().max().item(), name)


@pytest.mark.parametrize('file', TRAIN, ids=label)
def test_norms_alone_take_no_weight_decay_as_published(file: Path):
    case = Case(file.parent)

    groups = case.model().parameter_groups()

    published = [group for group in case.told['recorded']['train']['param_groups'] if group['weight_decay_override'] == 0]
    assert [group['weight_decay'] for group in groups] == [0.0]
    assert {name.removeprefix('model.') for name in groups[0]['params']} == {name for group in published for name in group['params']}
