from __future__ import annotations

import pytest
import torch
from torch import nn

from scepter.core import streams
from scepter.core.faults import ConfigError
from scepter.core.registry import MODELS
from scepter.models.autoencoder import DiagonalGaussian, in_tiles
from tests.models.oracles import KL_F8, autoencoder, diffusers_autoencoder, relative_error


def image(batch: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_architecture_has_its_published_size():
    with torch.device('meta'):
        network = MODELS.build(KL_F8)
    assert len(network.state_dict()) == 248
    assert sum(p.numel() for p in network.parameters()) == 83_653_863


@pytest.mark.parametrize('changes', [{}, {'NUM_RES_BLOCKS': 2, 'CH_MULT': [1, 2, 1, 3]}], ids=str)
@torch.no_grad()
def test_encoding_and_decoding_are_those_of_diffusers(changes):
    ours = autoencoder(**changes)
    theirs = diffusers_autoencoder(ours)
    for height, width in [(16, 16), (24, 40), (32, 8)]:
        x = image(2, height, width)
        posterior, expected = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
        z = posterior.mode()
        assert relative_error(posterior.parameters, expected.parameters) < 1e-5
        assert relative_error(ours.decode(z), theirs.decode(z).sample) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_the_published_size_is_that_of_diffusers():
    ours = autoencoder(CH=128, CH_MULT=[1, 2, 4, 4], NUM_RES_BLOCKS=2)
    theirs, x = diffusers_autoencoder(ours), image(1, 64, 96)
    z = ours.encode(x).latent_dist.mode()
    assert relative_error(z, theirs.encode(x).latent_dist.mode()) < 1e-5
    assert relative_error(ours.decode(z), theirs.decode(z).sample) < 1e-5


def test_the_posterior_is_an_independent_normal():
    parameters = torch.randn(2, 8, 3, 3)
    posterior = DiagonalGaussian(parameters)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    unit = torch.distributions.Normal(torch.zeros_like(posterior.mean), 1.0)
    torch.testing.assert_close(posterior.kl(), torch.distributions.kl_divergence(normal, unit).flatten(1).sum(1))
    noise = torch.randn_like(posterior.mean)
    torch.testing.assert_close(posterior.sample(noise), normal.loc + normal.scale * noise)
    assert torch.equal(posterior.mode(), parameters[:, :4])


def test_log_variances_are_clamped():
    assert DiagonalGaussian(torch.tensor([0.0, 0.0, 99.0, -99.0]).view(1, 4, 1, 1)).logvar.flatten().tolist() == [20.0, -30.0]


def test_a_posterior_draw_depends_on_its_sample_alone():
    posterior = DiagonalGaussian(torch.randn(3, 8, 2, 2))
    with streams.current(7, n=[10, 11, 12]):
        together = posterior.sample()
    with streams.current(7, n=[11]):
        alone = DiagonalGaussian(posterior.parameters[1:2]).sample()
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize(('height', 'width', 'near'), [(18, 16, '16x16'), (16, 3, '16x4'), (35, 30, '36x32')])
def test_a_size_that_cannot_be_halved_is_refused_with_the_nearest(height, width, near):
    with pytest.raises(ValueError, match=f'image is {height}x{width}.*multiples of 4, e.g. {near}'):
        autoencoder().encode(image(1, height, width))


@torch.no_grad()
def test_a_few_rows_at_a_time_are_all_rows():
    network, x = autoencoder(), image(5)
    z = network.encode(x).latent_dist.mode()
    decoded = network.decode(z)
    network.cfg.BATCH_SIZE = 2
    torch.testing.assert_close(network.encode(x).latent_dist.mode(), z)
    torch.testing.assert_close(network.decode(z), decoded)


@pytest.mark.parametrize(('height', 'width', 'tile'), [(16, 16, 16), (17, 40, 16), (64, 21, 12)])
def test_tiles_that_see_the_same_put_the_image_together_again(height, width, tile):
    x = image(2, height, width)
    torch.testing.assert_close(in_tiles(lambda part: part, x, tile, 1), x)
    enlarged = nn.functional.interpolate(x, scale_factor=4, mode='nearest')
    torch.testing.assert_close(in_tiles(lambda part: nn.functional.interpolate(part, scale_factor=4.0), x, tile, 4), enlarged)
    torch.testing.assert_close(in_tiles(lambda part: nn.functional.avg_pool2d(part, 4), enlarged, tile, 1 / 4), x)


@torch.no_grad()
def test_tiled_decoding_sees_no_more_than_a_tile():
    network, seen = autoencoder(), []
    network.cfg.TILE_SIZE = 32
    network.decoder.conv_in.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[2:])))
    out = network.decode(torch.randn(1, 4, 20, 8))
    assert out.shape == (1, 3, 80, 32)
    assert len(seen) == 3 and set(seen) == {(8, 8)}


def test_a_tile_that_the_autoencoder_cannot_halve_is_refused():
    with pytest.raises(ConfigError, match='TILE_SIZE is 100: use a multiple of 8'):
        MODELS.build({**KL_F8, 'TILE_SIZE': 100})


@pytest.mark.parametrize(('part', 'changes', 'place'), [
    ('ENCODER', {'CH_MULT': []}, 'ENCODER.CH_MULT'), ('DECODER', {'CH_MULT': [1, 2]}, 'DECODER.CH_MULT'),
    ('DECODER', {'Z_CHANNELS': 8}, 'DECODER.Z_CHANNELS'), ('ENCODER', {'DOUBLE_Z': False}, 'ENCODER.DOUBLE_Z'),
    ('ENCODER', {'CH': 48}, 'ENCODER.CH')])
def test_halves_that_do_not_fit_together_are_refused_before_they_are_built(part: str, changes: dict, place: str):
    assert place in [fault.path for fault in MODELS.faults({**KL_F8, part: {**KL_F8[part], **changes}}, '')]


@torch.no_grad()
def test_a_decode_that_overflows_in_float16_is_done_again_in_float32():
    network, z = autoencoder(), torch.randn(1, 4, 4, 4)
    network.decoder.conv_in.weight.fill_(6e4)    # the next norm takes it back
    expected = network.half().float().decode(z)
    network.half()
    assert not network.decoder(network.post_quant_conv(z.half())).isfinite().all()
    assert relative_error(network.decode(z), expected) < 1e-2


@torch.no_grad()
def test_an_encode_that_overflows_in_float16_is_done_again_in_float32():
    network, x = autoencoder(), image()
    network.encoder.conv_in.weight.fill_(6e4)
    expected = network.half().float().encode(x).latent_dist.parameters
    network.half()
    assert not network.encoder(x.half()).isfinite().all()
    assert relative_error(network.encode(x).latent_dist.parameters, expected) < 1e-2


@torch.no_grad()
def test_bfloat16_and_channels_last_are_near_float32():
    network, x = autoencoder(), image(2, 32, 32)
    z = network.encode(x).latent_dist.mode()
    expected = network.decode(z)
    network.to(memory_format=torch.channels_last)
    assert relative_error(network.decode(z.to(memory_format=torch.channels_last)), expected) < 1e-5
    assert relative_error(network.to(torch.bfloat16).decode(z), expected) < 0.05


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_the_memory_layout_of_the_input_is_kept(layout):
    network = autoencoder().to(memory_format=layout)
    posterior = network.encode(image(2, 32, 32).to(memory_format=layout)).latent_dist
    assert posterior.parameters.is_contiguous(memory_format=layout)
    z = posterior.sample()
    assert z.is_contiguous(memory_format=layout)
    assert network.decode(z).is_contiguous(memory_format=layout)


def test_training_makes_reconstructions_better():
    torch.manual_seed(0)
    net = {'CH': 32, 'CH_MULT': [1, 1], 'NUM_RES_BLOCKS': 1}
    network = MODELS.build({'NAME': 'AutoencoderKL', 'ENCODER': {**net, 'NAME': 'Encoder'}, 'DECODER': {**net, 'NAME': 'Decoder'}})
    optimizer, x = torch.optim.AdamW(network.parameters(), 2e-3), image(4, 16, 16)
    losses = []
    for _ in range(30):
        out = network(image=x, prompt=['unused'] * 4)
        optimizer.zero_grad()
        out['loss'].backward()
        optimizer.step()
        losses.append(out['rec_loss'].item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_loss_is_the_error_per_pixel_and_the_divergence_per_latent_value():
    network, x = autoencoder(), image()
    network.cfg.KL_WEIGHT = 0.25
    with streams.current(3, n=[0, 1]):
        out = network.forward_train(x)
        posterior = network.encode(x).latent_dist
        decoded = network.decode(posterior.sample())
    expected = (decoded - x).abs().mean() + 0.25 * posterior.kl().mean() / (4 * 4 * 4)
    torch.testing.assert_close(out['loss'], expected)
    assert out['probe_data']['reconstruction'].shape == x.shape


def test_a_test_gives_one_reconstruction_per_image_in_pixels():
    results = autoencoder().forward_test(image(3), label=torch.zeros(3))
    assert len(results) == 3
    assert results[0]['image'].shape == (3, 16, 16)
    assert 0 <= results[0]['image'].min() and results[0]['image'].max() <= 1


def test_checkpointing_from_level_3_changes_memory_alone():
    plain, saving = autoencoder(), autoencoder(CHECKPOINTING=3)
    kept = []
    for network in (plain, saving):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t):
            loss = network.decode(network.encode(image()).latent_dist.mode()).square().sum()
        loss.backward()
        kept.append(sum(sizes))
    assert kept[1] < 0.8 * kept[0]
    for p, q in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


# -------------------------------------------------------------------------------------------- with a discriminator
def adversarial(**changes: object) -> nn.Module:
    net = {'CH': 32, 'CH_MULT': [1, 1], 'NUM_RES_BLOCKS': 1}
    return MODELS.build({'NAME': 'AutoencoderKL', 'ENCODER': {**net, 'NAME': 'Encoder'}, 'DECODER': {**net, 'NAME': 'Decoder'},
                         'DISCRIMINATOR': {'NAME': 'PatchDiscriminator', 'CH': 32, 'NUM_LAYERS': 2}, **changes})


@pytest.mark.parametrize(('loss', 'taught', 'spared'), [
    ('loss', 'decoder.', 'discriminator.'), ('disc_loss', 'discriminator.', 'decoder.')])
def test_each_loss_teaches_its_own_network(loss, taught, spared):
    network = adversarial()
    network.forward_train(image())[loss].backward()
    weights = [p for name, p in network.named_parameters() if name.startswith(taught) and name.endswith('weight')]
    assert all(p.grad is not None and p.grad.any() for p in weights)
    assert all(p.grad is None for name, p in network.named_parameters() if name.startswith(spared))


def test_the_discriminator_is_silent_until_it_starts():
    network = adversarial(DISC_START=2, KL_WEIGHT=0.0)
    outputs = [network.forward_train(image()) for _ in range(4)]
    heard = [not torch.equal(out['loss'].detach(), out['rec_loss']) for out in outputs]
    learns = [out['disc_loss'].item() > 0 for out in outputs]
    assert heard == learns == [False, False, True, True]


def test_the_discriminator_learns_to_tell_images_from_reconstructions():
    torch.manual_seed(0)
    network = adversarial()
    optimizer = torch.optim.Adam(network.discriminator.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        out = network.forward_train(image())
        optimizer.zero_grad()
        out['disc_loss'].backward()
        optimizer.step()
        losses.append(out['disc_loss'].item())
    assert losses[-1] < 0.7 * losses[0]


@torch.no_grad()
def test_a_validation_loss_does_not_count_as_training():
    network = adversarial().eval()
    network.forward_train(image())
    assert network.disc_batches == 0


def test_the_weights_of_an_autoencoder_without_a_discriminator_are_the_published_ones_alone():
    assert not any('disc' in name for name in autoencoder().state_dict())
