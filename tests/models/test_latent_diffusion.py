"""LatentDiffusion: what it trains on, what it draws, and what it refuses."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

import scepter
import scepter.components
import tiny
from scepter.core import streams
from scepter.core.config import Config
from scepter.core.errors import DataError
from scepter.core.faults import ConfigError
from scepter.core.registry import BACKBONES, MODELS
from scepter.core.schema import param
from scepter.models.autoencoder import DiagonalGaussian, EncoderOutput
from scepter.models.base import BaseModel, TrainModule
from scepter.run_inference import main as run_inference
from scepter.run_train import main as run_train
from tiny import autoencoder, unet

VAE, UNET, CLIP = autoencoder(1, 1), unet(1, 1, NUM_HEADS=2, CONTEXT_DIM=32), {**tiny.CLIP, 'DEPTH': 1, 'MAX_LENGTH': 12}


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

    from scepter.weights import describe
    from tests.weights.strangers import pipeline
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
    ({'CONTEXT_DIM': 48}, 'the context of COND_STAGE_MODEL is 32 wide, but the network expects 48'),
    ({'OUT_CHANNELS': 8}, 'the autoencoder gives 4 channels .* but the network predicts 8')], ids=['context', 'channels'])
def test_parts_that_do_not_fit_are_refused_before_anything_is_computed(unet, words):
    with pytest.raises(ConfigError, match=words):
        network(DIFFUSION_MODEL={**UNET, **unet})


def test_a_vector_of_another_width_than_the_network_takes_is_refused():
    tower = {'NAME': 'FrozenOpenCLIPEmbedder', 'ARCH': 'custom', 'WIDTH': 32, 'DEPTH': 1, 'HEADS': 2, 'RETURN_POOLED': True}
    unet = {**UNET, 'NUM_CLASSES': 'sequential', 'ADM_IN_CHANNELS': 32 + 5 * 256}
    with pytest.raises(ConfigError, match=r'1568 wide, but the network expects 1312 \(ADM_IN_CHANNELS\)'):
        network(DIFFUSION_MODEL=unet, COND_STAGE_MODEL={'NAME': 'GeneralConditioner', 'EMBEDDERS': [tower]})


# ------------------------------------------------------------------------------------------------ labels, pixels, parts of one's own
LABELLED = {'DIFFUSION_MODEL': {**UNET, 'CONTEXT_DIM': None, 'NUM_CLASSES': 4},
            'COND_STAGE_MODEL': {'NAME': 'LabelEmbedder', 'NUM_CLASSES': 3}}
PIXELS = {'FIRST_STAGE_MODEL': None, 'SIZE_FACTOR': 1, 'IMAGE_SIZE': 8, 'COND_STAGE_MODEL': None,
          'DIFFUSION_MODEL': {**UNET, 'CONTEXT_DIM': None, 'IN_CHANNELS': 3, 'OUT_CHANNELS': 3}}


@pytest.mark.parametrize(('unet', 'widths'), [
    ({'CONTEXT_DIM': None, 'NUM_CLASSES': 4}, {}),
    ({'CONTEXT_DIM': 32}, {'CONTEXT_DIM': 32}),
    ({'CONTEXT_DIM': None, 'NUM_CLASSES': 'sequential', 'ADM_IN_CHANNELS': 24}, {'VECTOR_DIM': 24}),
    ({'NUM_CLASSES': 'sequential', 'ADM_IN_CHANNELS': 24}, {'CONTEXT_DIM': 32, 'VECTOR_DIM': 24})],
    ids=['number', 'context', 'vector', 'both'])
def test_labels_from_the_config_train_and_draw_in_every_form_a_network_takes_them(unet, widths):
    # scale and shift: with one channel in each group of a norm, what is added before it is subtracted again
    model = network(DIFFUSION_MODEL={**UNET, 'USE_SCALE_SHIFT_NORM': True, **unet}, P_ZERO=0.5,
                    COND_STAGE_MODEL={'NAME': 'LabelEmbedder', 'NUM_CLASSES': 3, **widths})
    batch = {'image': torch.rand(6, 3, 16, 16), 'label': torch.tensor([0, 1, 2, 0, 1, 2]), 'prompt': ['a caption that is not read'] * 6}
    with streams.current(3, range(6)):
        out = model.train().forward_train(**batch)
    out['loss'].backward()
    assert 3 in out['probe_data']['label'] and {0, 1, 2} & set(out['probe_data']['label'].tolist())    # some are dropped, some are not
    assert all(p.grad is not None and p.grad.any() for p in model.cond_stage_model.parameters())

    results = model.eval().forward_test(num_samples=4, sample_steps=2, guide_scale=2.0)
    assert [r['label'] for r in results] == [0, 1, 2, 0]    # nothing asked for: one class after another
    one, two = (model.forward_test(label=label, sample_steps=2, guide_scale=2.0)[0]['image'] for label in (1, 2))
    assert not torch.allclose(one, two, atol=1e-4)
    assert torch.equal(one, draw(model, ['1'], sample_steps=2, guide_scale=2.0)[0])    # as a prompt: a number


def test_a_class_may_be_called_by_its_name_and_what_is_none_is_an_error():
    model = network(**LABELLED | {'COND_STAGE_MODEL': {'NAME': 'LabelEmbedder', 'NUM_CLASSES': 3, 'NAMES': ['cat', 'dog', 'cow']}})
    assert model.tokenizer(['dog', '2', '']).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match="'horse' is no class: expected a number from 0 to 2, one of cat, dog, cow"):
        draw(model, ['horse'])
    with pytest.raises(DataError, match='labels are 0 to 7, expected 0 to 2'):
        model.forward_train(image=torch.zeros(2, 3, 16, 16), label=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match='LabelEmbedder reads the label of each sample, but the batch has only image'):
        model.forward_train(image=torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize(('settings', 'words'), [
    (LABELLED | {'COND_STAGE_MODEL': None}, 'the network expects the label, 4 classes.*but COND_STAGE_MODEL gives none'),
    (LABELLED | {'COND_STAGE_MODEL': {'NAME': 'LabelEmbedder', 'NUM_CLASSES': 4}},
     r'is 5 classes.*but the network expects 4 \(NUM_CLASSES\)'),
    ({'COND_STAGE_MODEL': {'NAME': 'LabelEmbedder', 'NUM_CLASSES': 4, 'VECTOR_DIM': 8}}, 'the network expects the context, 32 wide'),
    (PIXELS | {'SIZE_FACTOR': 2}, 'SIZE_FACTOR: is 2, but without FIRST_STAGE_MODEL the network draws pixels'),
    (PIXELS | {'SCALE_FACTOR': 0.5}, 'SCALE_FACTOR: is 0.5, but without FIRST_STAGE_MODEL'),
    ({'FIRST_STAGE_MODEL': {'NAME': 'Shrink', 'BY': 4}}, 'makes pictures 4 times smaller, but SIZE_FACTOR is 2')])
def test_what_a_network_is_told_and_draws_in_is_held_against_it_before_anything_is_computed(settings, words):
    with pytest.raises(ConfigError, match=words):
        network(**settings)


def test_pixels_are_diffused_without_an_autoencoder():
    model = network(**PIXELS)
    image = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.encode_first_stage(image), image) and torch.equal(model.decode_first_stage(image), image)
    assert model.forward_train(image=image)['loss'].isfinite()
    assert [r['image'].shape for r in model.forward_test(num_samples=2, sample_steps=2)] == [(3, 8, 8)] * 2


@MODELS.register_class()
class Shrink(TrainModule):
    """An autoencoder of one's own, as docs/extend.md asks for it."""

    BY: int = param(2, 'How many times smaller.')
    TELLS: bool = param(True, 'Whether it says so.')
    EMBED_DIM = 4

    def __init__(self, cfg, logger=None):
        super().__init__(cfg, logger=logger)
        if self.TELLS:
            self.size_factor = self.BY

    def encode(self, x):
        latent = torch.nn.functional.avg_pool2d(x, self.BY)
        return EncoderOutput(DiagonalGaussian(torch.cat([latent, latent[:, :1], torch.full_like(latent, -30), latent[:, :1]], 1)))

    def decode(self, z):
        return torch.nn.functional.interpolate(z[:, :3], scale_factor=float(self.BY))


def test_an_autoencoder_of_ones_own_that_draws_another_size_is_found_out():
    assert draw(network(FIRST_STAGE_MODEL={'NAME': 'Shrink'}), ['a']).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r'Shrink decodes to 32x32, but 16x16 was expected .* set SIZE_FACTOR to 4'):
        draw(network(FIRST_STAGE_MODEL={'NAME': 'Shrink', 'BY': 4, 'TELLS': False}), ['a'])


@BACKBONES.register_class()
class Misshapen(BaseModel):
    """Gives what broadcasts against x: the mean over its channels."""

    def __init__(self, cfg, logger=None):
        super().__init__(cfg, logger=logger)
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond):
        return self.weight * x.mean(1, keepdim=True)


def test_a_network_whose_output_has_another_shape_is_named():
    model = network(DIFFUSION_MODEL={'NAME': 'Misshapen'})
    words = r'Misshapen gave \[2, 1, 8, 8\] for x \[2, 4, 8, 8\]: expected one value for each of x'
    with pytest.raises(ValueError, match=words):
        model.forward_train(image=torch.zeros(2, 3, 16, 16), prompt=['a', 'b'])
    with pytest.raises(ValueError, match=words):
        draw(model, ['a', 'b'], guide_scale=1.0)


def test_labels_and_pixels_work_through_a_config_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = Path(__file__).resolve().parents[2] / 'examples' / 'digits' / 'digits_data.py'
    Path('train.yaml').write_text(str(Config({'IMPORTS': [str(digits)], 'SOLVER': {
        'NAME': 'LatentDiffusionSolver', 'WORK_DIR': 'run', 'MAX_STEPS': 2, 'DTYPE': 'float32',
        'OPTIMIZER': {'NAME': 'AdamW', 'LEARNING_RATE': 1e-3}, 'SAMPLE_ARGS': {'SAMPLE_STEPS': 1, 'GUIDE_SCALE': 2.0},
        'MODEL': {'NAME': 'LatentDiffusion', **PIXELS, 'SCALE_FACTOR': 1.0, 'P_ZERO': 0.1,
                  'DIFFUSION_MODEL': {**PIXELS['DIFFUSION_MODEL'], 'NUM_CLASSES': 11},
                  'COND_STAGE_MODEL': {'NAME': 'LabelEmbedder', 'NUM_CLASSES': 10}},
        'TRAIN_DATA': {'NAME': 'DigitsDataset', 'IMAGE_SIZE': 8, 'BATCH_SIZE': 4},
        'TRAIN_HOOKS': [{'NAME': 'CheckpointHook', 'INTERVAL': 2}, {'NAME': 'ProbeDataHook', 'INTERVAL': 2, 'PROMPTS': ['3', '7']}]}})))
    assert run_train(['--cfg', 'train.yaml']) == 0
    assert Path('run/probes/step-00000002/samples.png').is_file()
    assert run_inference(['--pretrained_model', 'run', '--imports', str(digits), '--prompt', '3', '--num_samples', '3', '--save_folder',
                          'drawn']) == 0
    assert len([*Path('drawn').glob('*.png')]) == 3

    pipe = scepter.load('run', imports=[str(digits)])
    listed = pipe(label=[4, 2], num_samples=2, batch_size=1).results
    assert [r['label'] for r in listed] == [4, 2] == [r['settings']['label'] for r in listed]
    assert torch.equal(listed[1]['image'], pipe(['4', '2'], batch_size=1).results[1]['image'])
