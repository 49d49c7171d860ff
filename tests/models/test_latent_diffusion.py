"""LatentDiffusion: what it trains on, what it draws, and what it refuses."""
from __future__ import annotations

import pytest
import torch

import scepter.components  # noqa: F401
from scepter.core import streams
from scepter.core.config import Config, ConfigError
from scepter.core.registry import MODELS

CODER = {'CH': 32, 'CH_MULT': [1, 1], 'NUM_RES_BLOCKS': 1, 'Z_CHANNELS': 4}
VAE = {'NAME': 'AutoencoderKL', 'EMBED_DIM': 4, 'ENCODER': {'NAME': 'Encoder', **CODER}, 'DECODER': {'NAME': 'Decoder', **CODER}}
UNET = {'NAME': 'DiffusionUNet', 'IN_CHANNELS': 4, 'OUT_CHANNELS': 4, 'MODEL_CHANNELS': 32, 'CHANNEL_MULT': [1, 1], 'NUM_RES_BLOCKS': 1,
        'ATTENTION_RESOLUTIONS': [2], 'NUM_HEADS': 2, 'CONTEXT_DIM': 32}
CLIP = {'NAME': 'FrozenCLIPEmbedder', 'WIDTH': 32, 'DEPTH': 1, 'HEADS': 2, 'MAX_LENGTH': 12}


def network(**settings):
    torch.manual_seed(0)
    model = MODELS.build({'NAME': 'LatentDiffusion', 'DIFFUSION_MODEL': UNET, 'FIRST_STAGE_MODEL': VAE, 'COND_STAGE_MODEL': CLIP,
                          'SIZE_FACTOR': 2, 'IMAGE_SIZE': 16, 'SCALE_FACTOR': 1.0, **settings})
    generator = torch.Generator().manual_seed(1)
    for p in model.model.parameters():
        if not p.any():         # what begins at zero would make the network deaf to all that it is told
            torch.nn.init.normal_(p, std=0.1, generator=generator)
    return model.eval()


def draw(model, prompts=('a', 'b', 'c'), **arguments):
    results = model.forward_test(prompt=list(prompts), **{'sample_steps': 3, **arguments})
    return torch.stack([r['image'] for r in results])


@pytest.fixture(scope='module')
def model():
    return network()


def test_a_picture_does_not_depend_on_the_batch_it_was_drawn_in(model):
    seeds = streams.row_seeds(5, 3)
    together = draw(model, seed=5, sampler='euler_ancestral')
    alone = torch.cat([draw(model, [p], row_seeds=[s], sampler='euler_ancestral') for p, s in zip('abc', seeds)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_the_prompt_and_the_negative_prompt_and_the_scale_have_a_say(model):
    plain = draw(model, guide_scale=3.0)
    assert not torch.allclose(plain, draw(model, ('x', 'y', 'z'), guide_scale=3.0), atol=1e-4)
    assert not torch.allclose(plain, draw(model, n_prompt=['q'] * 3, guide_scale=3.0), atol=1e-4)
    assert not torch.allclose(plain, draw(model, guide_scale=1.0), atol=1e-4)
    assert torch.allclose(draw(model, guide_scale=1.0), draw(model, n_prompt='q', guide_scale=1.0))


def test_contexts_computed_once_give_the_picture_of_contexts_computed_each_step(model, monkeypatch):
    once = draw(model)
    monkeypatch.setattr(type(model.model), 'precompute', lambda self, cond: cond)
    assert torch.allclose(once, draw(model), atol=1e-5)


def test_image_to_image_keeps_more_the_weaker_it_is(model):
    image = torch.rand(1, 3, 16, 16).mul(2).sub(1)
    latent = model.encode_first_stage(image, is_drawn=False)
    kept = (model.decode_first_stage(latent) / 2 + 0.5).clamp(0, 1)
    changes = [(draw(model, ['a'], image=image, denoising_strength=s, sample_steps=10, guide_scale=1.0) - kept).abs().mean()
               for s in (0.1, 0.5, 1.0)]
    assert changes[0] < changes[1] < changes[2]


def test_inpainting_leaves_the_latent_outside_the_mask(model, monkeypatch):
    latents = []
    monkeypatch.setattr(model, 'decode_first_stage', lambda z: latents.append(z) or torch.zeros(len(z), 3, 16, 16))
    image = torch.rand(1, 3, 16, 16).mul(2).sub(1)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    x = model.encode_first_stage(image, is_drawn=False)
    draw(model, ['a'], image=image, mask=mask)
    assert torch.allclose(latents[0][..., 4:], x[..., 4:], atol=1e-5)
    assert not torch.allclose(latents[0][..., :4], x[..., :4], atol=1e-2)


def test_what_a_mask_leaves_is_the_image_itself(model):
    image = torch.rand(1, 3, 16, 16).mul(2).sub(1)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    drawn = draw(model, ['a'], image=image, mask=mask)
    assert torch.allclose(drawn[..., 8:], image[..., 8:] / 2 + 0.5, atol=1e-6)
    assert not torch.allclose(drawn[..., :8], image[..., :8] / 2 + 0.5, atol=1e-2)


def test_a_network_of_nine_channels_fills_in_what_diffusers_does(tmp_path):
    import diffusers

    from scepter.models.weights import describe
    from tests.models.strangers import pipeline
    pipe = diffusers.StableDiffusionInpaintPipeline(**pipeline('sd15', tmp_path, unet={'in_channels': 9}).components,
                                                    requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():    # an exact posterior: they draw from it, we take its mean
        pipe.vae.quant_conv.weight[4:] = 0
        pipe.vae.quant_conv.bias[4:] = -30
    pipe.save_pretrained(tmp_path / 'folder')
    model = MODELS.build(describe(tmp_path / 'folder').config.SOLVER.MODEL).eval()

    image, mask = torch.rand(1, 3, 16, 16).mul(2).sub(1), torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, :8] = 1
    noise = streams.normal_rows(streams.row_seeds(7, 1), 'start', (4, 8, 8))
    theirs = pipe('a fox', negative_prompt='grey', image=image, mask_image=mask, height=16, width=16, num_inference_steps=4, latents=noise,
                  strength=1.0, guidance_scale=5.0, output_type='pt').images
    ours = draw(model, ['a fox'], n_prompt='grey', image=image, mask=mask, seed=7, sample_steps=4, guide_scale=5.0, guide_rescale=0.0)
    assert (ours - theirs)[mask.expand(1, 3, -1, -1) == 1].abs().max() < 1e-3
    assert torch.allclose(ours[..., 8:], image[..., 8:] / 2 + 0.5, atol=1e-6)
    with pytest.raises(ValueError, match='9 input channels, so it fills in what a mask leaves open'):
        draw(model, ['a fox'])


def test_a_size_that_cannot_work_is_refused_with_the_nearest_that_does(model):
    with pytest.raises(ValueError, match=r'17x30 cannot be made: sides are multiples of 2, e.g. 16x30'):
        draw(model, image_size=[17, 30])


def test_a_size_need_not_be_square(model):
    assert draw(model, ['a'], image_size=[12, 20]).shape == (1, 3, 12, 20)


def test_dropped_prompts_are_replaced_by_the_training_prompt():
    model = network(P_ZERO=0.5, TRAIN_N_PROMPT='nothing').train()
    with streams.current(3, range(64)):
        seen = model.forward_train(image=torch.zeros(64, 3, 16, 16), prompt=['a cat'] * 64)['probe_data']['prompt']
    assert set(seen) == {'a cat', 'nothing'} and 20 < seen.count('nothing') < 44


def test_run_train_n_draws_once_more_with_the_training_prompt():
    model = network(TRAIN_N_PROMPT='nothing')
    result = model.forward_test(prompt=['a'], sample_steps=2, run_train_n=True)[0]
    assert result['train_n_prompt'] == 'nothing'
    assert not torch.equal(result['image'], result['train_n_image'])


def test_cached_moments_train_as_the_image_does(model):
    image = torch.rand(4, 3, 16, 16).mul(2).sub(1)
    moments = model.first_stage_model.encode(image).latent_dist.parameters
    losses = []
    for entry in ({'image': image}, {'moments': moments}):
        with streams.current(1, range(4)):
            losses.append(model.forward_train(**entry, prompt=['a'] * 4)['loss'])
    assert torch.allclose(*losses, rtol=1e-4)


def test_the_loss_is_the_configs_own():
    image = torch.rand(4, 3, 16, 16).mul(2).sub(1)
    losses = []
    for loss in (None, {'NAME': 'ReconstructLoss', 'LOSS_TYPE': 'l1'}):
        with streams.current(1, range(4)):
            losses.append(network(LOSS=loss).forward_train(image=image, prompt=['a'] * 4)['loss'].item())
    assert losses[0] != pytest.approx(losses[1], rel=0.05)


def test_only_what_training_changed_is_in_the_state_that_is_saved():
    names = set(network().trained_state())
    assert any(n.startswith('first_stage_model') for n in names)      # frozen, but no file could give it back
    frozen = network(FREEZE=['model.input_blocks.*'])
    assert not any(p.requires_grad for n, p in frozen.named_parameters() if n.startswith('model.input_blocks'))


def test_zero_terminal_snr_refuses_eps_as_a_fault_of_the_config():
    with pytest.raises(ConfigError, match='eps'):
        network(ZERO_TERMINAL_SNR=True)
    network(ZERO_TERMINAL_SNR=True, PARAMETERIZATION='v')


@pytest.mark.parametrize('prompt', ['', '🎨🖌️', 'word ' * 2000, 'مرحبا بالعالم', 'a\x00b\nc'])
def test_any_prompt_works(model, prompt):
    assert torch.isfinite(draw(model, [prompt], sample_steps=1)).all()


def test_a_network_without_prompts_draws_a_number_of_pictures():
    model = network(COND_STAGE_MODEL=None, DIFFUSION_MODEL={**UNET, 'CONTEXT_DIM': None})
    assert len(model.forward_test(num_samples=2, sample_steps=2)) == 2
    assert Config(model.cfg).DIFFUSION_MODEL.CONTEXT_DIM is None


@pytest.mark.parametrize(('unet', 'words'), [
    ({'CONTEXT_DIM': 48}, 'the text context is 32 wide, but the network expects 48'),
    ({'OUT_CHANNELS': 8}, 'the autoencoder gives 4 channels .* but the network predicts 8')], ids=['context', 'channels'])
def test_parts_that_do_not_fit_are_refused_before_anything_is_computed(unet, words):
    with pytest.raises(ConfigError, match=words):
        network(DIFFUSION_MODEL={**UNET, **unet})


def test_a_vector_of_another_width_than_the_network_takes_is_refused():
    tower = {'NAME': 'FrozenOpenCLIPEmbedder', 'ARCH': 'custom', 'WIDTH': 32, 'DEPTH': 1, 'HEADS': 2, 'RETURN_POOLED': True}
    unet = {**UNET, 'NUM_CLASSES': 'sequential', 'ADM_IN_CHANNELS': 32 + 5 * 256}
    with pytest.raises(ConfigError, match=r'1568 wide, but the network expects 1312 \(ADM_IN_CHANNELS\)'):
        network(DIFFUSION_MODEL=unet, COND_STAGE_MODEL={'NAME': 'GeneralConditioner', 'EMBEDDERS': [tower]})
