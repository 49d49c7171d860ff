"""LatentSpace: scale, shift and sizes of pictures and clips, and a latent diffusion of clips from training to the file."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import scepter
from scepter.core import streams
from scepter.core.config import Config
from scepter.core.faults import ConfigError
from scepter.core.images import read_settings
from scepter.core.registry import BACKBONES, DATASETS, MODELS
from scepter.core.schema import param
from scepter.data.datasets import BaseDataset
from scepter.models.autoencoder import DiagonalGaussian, EncoderOutput
from scepter.models.base import BaseModel, TrainModule
from scepter.models.condition import Condition, Widths
from scepter.models.latent import LatentSpace
from scepter.models.layers import timestep_embedding
from scepter.run_inference import main as run_inference
from scepter.run_train import main as run_train
from tests.models.test_latent_diffusion import PIXELS, UNET, VAE, draw, network


@MODELS.register_class()
class ClipCoder(TrainModule):
    """An autoencoder of clips: half the frames, half the sides.    [B, 3, T, H, W]  <->  [B, 2, t, H/2, W/2]"""

    CAUSAL: bool = param(True, 'Whether the first frame is a latent of its own.')
    EMBED_DIM = 2
    size_factor = 2
    time_factor = 2

    def __init__(self, cfg, logger=None):
        super().__init__(cfg, logger=logger)
        self.is_causal = self.CAUSAL
        self.encoder, self.decoder = nn.Conv3d(3, 4, 2, 2), nn.ConvTranspose3d(2, 3, 2, 2)

    def encode(self, x):
        return EncoderOutput(DiagonalGaussian(self.encoder(torch.cat([x[:, :, :1], x], 2) if self.is_causal else x)))

    def decode(self, z):
        return self.decoder(z)[:, :, int(self.is_causal):]


@BACKBONES.register_class()
class ClipNet(BaseModel):
    """A network of clips.    x [B, C, T, H, W], t [B], cond a Condition with a vector  ->  [B, C, T, H, W]"""

    CHANNELS: int = param(2, 'Channels of x.')
    BESIDE: int | None = param(None, 'Channels beside x.')

    def __init__(self, cfg, logger=None):
        super().__init__(cfg, logger=logger)
        self.takes = Widths(vector=8, channels=self.CHANNELS, beside=self.BESIDE)
        self.into = nn.Conv3d(self.CHANNELS + (self.BESIDE or 0), 16, 3, padding=1)
        self.told = nn.Linear(16 + 8, 16)
        self.out = nn.Conv3d(16, self.CHANNELS, 3, padding=1)

    def forward(self, x, t, cond):
        cond = Condition.of(cond)
        told = self.told(torch.cat([timestep_embedding(t, 16).to(x.dtype), cond.vector.to(x.dtype)], 1))
        x = x if cond.beside is None else torch.cat([x, cond.beside.to(x.dtype)], 1)
        return self.out(nn.functional.silu(self.into(x) + told[:, :, None, None, None]))


@DATASETS.register_class()
class Clips(BaseDataset):
    """Squares that grow.    video [3, 5, 8, 8], label 0..2"""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        clip = torch.full((3, 5, 8, 8), -1.0)
        for frame in range(5):
            clip[index % 3, frame, :frame + 2, :frame + 2] = 1.0
        return {'video': clip, 'label': index % 3}


CLIPS = {'NAME': 'LatentDiffusion', 'FIRST_STAGE_MODEL': {'NAME': 'ClipCoder'}, 'DIFFUSION_MODEL': {'NAME': 'ClipNet'},
         'COND_STAGE_MODEL': {'NAME': 'LabelEmbedder', 'NUM_CLASSES': 3, 'VECTOR_DIM': 8}, 'SCALE_FACTOR': 0.5, 'SHIFT_FACTOR': 0.1,
         'IMAGE_SIZE': 8, 'NUM_FRAMES': 5}


def clips(**settings):
    torch.manual_seed(0)
    return MODELS.build({**CLIPS, **settings})


def moving(rows: int = 2) -> torch.Tensor:
    return torch.stack([Clips(Config({}))[i]['video'] for i in range(rows)])


# ---------------------------------------------------------------- clips
@pytest.mark.parametrize(('is_causal', 'frames'), [(True, 5), (False, 4)])
def test_an_autoencoder_and_a_network_of_ones_own_train_on_clips_and_draw_them(is_causal, frames):
    model = clips(FIRST_STAGE_MODEL={'NAME': 'ClipCoder', 'CAUSAL': is_causal}, NUM_FRAMES=frames).train()
    before = model.model.out.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(2):
        with streams.current(1, range(2 * step, 2 * step + 2)):
            model.forward_train(video=moving()[:, :, :frames], label=torch.tensor([0, 1]))['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.model.out.weight, before)

    results = model.eval().forward_test(label=[0, 2], num_samples=2, sample_steps=2, guide_scale=2.0)
    assert [r['video'].shape for r in results] == [(3, frames, 8, 8)] * 2 and 'image' not in results[0]
    assert [r['label'] for r in results] == [0, 2] and 0 <= results[0]['video'].min() <= results[0]['video'].max() <= 1
    alone = model.forward_test(label=[2], row_seeds=[results[1]['seed']], num_samples=1, sample_steps=2, guide_scale=2.0)
    torch.testing.assert_close(alone[0]['video'], results[1]['video'])
    assert model.forward_test(label=0, sample_steps=1, num_frames=2 * frames - is_causal)[0]['video'].shape[1] == 2 * frames - is_causal


def test_a_still_of_an_autoencoder_of_clips_is_a_picture():
    model = clips(NUM_FRAMES=None)
    with streams.current(1, range(2)):
        assert model.forward_train(image=moving()[:, :, 0], label=torch.tensor([0, 1]))['loss'].isfinite()
    assert model.forward_test(label=0, sample_steps=1)[0]['image'].shape == (3, 8, 8)


def test_cached_moments_of_clips_train_as_the_clips_do_scale_and_shift_included():
    model, losses = clips(), []
    moments = model.first_stage_model.encode(moving()).latent_dist.parameters.detach()
    for entry in ({'video': moving()}, {'moments': moments}):
        with streams.current(1, range(2)):
            losses.append(model.forward_train(**entry, label=torch.tensor([0, 1]))['loss'])
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match='the moments have 8 channels, expected 4, twice those of a latent of ClipCoder'):
        model.forward_train(moments=moments.repeat(1, 2, 1, 1, 1), label=torch.tensor([0, 1]))


def test_what_a_mask_leaves_of_a_clip_is_the_clip_itself_in_every_frame():
    model, video, mask = clips(), moving(1), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    drawn = model.forward_test(label=0, sample_steps=2, video=video, mask=mask)[0]['video']
    torch.testing.assert_close(drawn[..., 4:], video[0, ..., 4:] / 2 + 0.5)
    assert not torch.allclose(drawn[..., :4], video[0, ..., :4] / 2 + 0.5, atol=1e-2)
    changes = [(model.forward_test(label=0, sample_steps=10, video=video, denoising_strength=s, guide_scale=1.0)[0]['video']
                - model.forward_test(label=0, sample_steps=10, video=video, denoising_strength=0.0)[0]['video']).abs().mean()
               for s in (0.1, 0.5, 1.0)]
    assert changes[0] < changes[1] < changes[2]
    with pytest.raises(ValueError, match=r'latents of \[2, 3, 4, 4\] are to be drawn, but that of the given image is \[2, 1, 4, 4\]'):
        model.forward_test(label=0, image=video[:, :, 0], num_frames=5, denoising_strength=0.5)


def test_a_network_of_clips_that_fills_in_reads_the_mask_and_what_it_leaves():
    model, seen = clips(DIFFUSION_MODEL={'NAME': 'ClipNet', 'BESIDE': 3}), []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs['cond']), with_kwargs=True)
    video, mask = moving(1), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    assert model.forward_test(label=[0, 1], num_samples=2, sample_steps=1, video=video, mask=mask)[1]['video'].shape == (3, 5, 8, 8)
    hole, known = seen[0].beside[:, :1], seen[0].beside[:, 1:]
    assert hole.shape == (4, 1, 3, 4, 4) and hole[..., :2].all() and not hole[..., 2:].any()    # wanted and unwanted, two rows of each
    torch.testing.assert_close(known[:1], model.encode_first_stage(video * (1 - mask[:, :, None]), is_drawn=False))


def test_frames_that_cannot_be_are_refused_with_the_nearest_that_can():
    with pytest.raises(ValueError, match=r'a clip of 4 frames cannot be made: their number is 1 more than a multiple of 2, e\.g\. 5'):
        clips().forward_test(label=0, num_frames=4)
    with pytest.raises(ValueError, match=r'a clip of 5 frames cannot be made: their number is a multiple of 2, e\.g\. 4'):
        clips(FIRST_STAGE_MODEL={'NAME': 'ClipCoder', 'CAUSAL': False}).forward_test(label=0)
    with pytest.raises(ValueError, match='makes pictures, but a clip of 5 frames was asked for'):
        draw(network(), ['a'], num_frames=5)
    with pytest.raises(ValueError, match=r'AutoencoderKL takes pictures .* but got a clip'):
        network().encode_first_stage(moving())


def test_clips_go_through_every_door(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('train.yaml').write_text(str(Config({'SOLVER': {
        'NAME': 'LatentDiffusionSolver', 'WORK_DIR': 'run', 'MAX_STEPS': 2, 'DTYPE': 'bfloat16', 'CHANNELS_LAST': True,
        'OPTIMIZER': {'NAME': 'AdamW', 'LEARNING_RATE': 1e-3}, 'SAMPLE_ARGS': {'SAMPLE_STEPS': 1, 'GUIDE_SCALE': 2.0}, 'MODEL': CLIPS,
        'TRAIN_DATA': {'NAME': 'Clips', 'BATCH_SIZE': 4}, 'EVAL_INTERVAL': 1, 'EVAL_DATA': {'NAME': 'Clips', 'BATCH_SIZE': 4},
        'TRAIN_HOOKS': [{'NAME': 'ModelEmaHook'}, {'NAME': 'CheckpointHook', 'INTERVAL': 2},
                        {'NAME': 'ProbeDataHook', 'INTERVAL': 2, 'PROMPTS': ['0', '2']}]}})))
    assert run_train(['--cfg', 'train.yaml']) == 0
    pipe = scepter.load('run')
    drawn = pipe(['0', '2'])
    file = drawn.save('drawn')[1]
    with Image.open(file) as clip:
        assert clip.is_animated and clip.size == (8, 8)
        clip.seek(clip.n_frames - 1)
        last = torch.from_numpy(np.array(clip.convert('RGB'))).permute(2, 0, 1)
    torch.testing.assert_close(last, (drawn.results[1]['video'][:, -1] * 255).round().to(torch.uint8))
    assert read_settings(file)['prompt'] == '2' and read_settings(file)['size'] == [8, 8]

    assert run_inference(['--pretrained_model', 'run', '--prompt', '1', '--num_samples', '1', '--num_frames', '9',
                          '--save_folder', 'longer']) == 0
    with Image.open(next(Path('longer').glob('*.png'))) as clip:
        assert clip.n_frames > 1


# ---------------------------------------------------------------- scale, shift, sizes
@torch.no_grad()
def test_latents_are_shifted_then_scaled_and_back():
    z = torch.randn(2, 4, 8, 8)
    model, plain = network(SCALE_FACTOR=0.3, SHIFT_FACTOR=0.1), network()
    torch.testing.assert_close(model.decode_first_stage((z - 0.1) * 0.3), plain.decode_first_stage(z))
    image = torch.rand(2, 3, 16, 16)
    expected = (plain.encode_first_stage(image, is_drawn=False) - 0.1) * 0.3
    torch.testing.assert_close(model.encode_first_stage(image, is_drawn=False), expected)
    space = LatentSpace(scale=2.0, shift=0.5)
    torch.testing.assert_close(space.decode(space.encode(image)), image)


def test_the_size_factor_follows_from_the_autoencoder():
    assert network(SIZE_FACTOR=None).size_factor == 2 and network(SIZE_FACTOR=None, FIRST_STAGE_MODEL={'NAME': 'Shrink'}).size_factor == 2
    assert network(**PIXELS | {'SIZE_FACTOR': None}).size_factor == 1
    assert draw(network(SIZE_FACTOR=None), ['a'], image_size=[12, 20]).shape == (1, 3, 12, 20)
    with pytest.raises(ConfigError, match=r'Shrink does not say how many times smaller .*give it a size_factor, or set SIZE_FACTOR'):
        network(SIZE_FACTOR=None, FIRST_STAGE_MODEL={'NAME': 'Shrink', 'TELLS': False})


def test_a_contradiction_is_a_fault_before_anything_is_built_where_the_config_tells():
    def faults(**settings):
        return [str(fault) for fault in MODELS.faults(Config.of({
            'NAME': 'LatentDiffusion', 'DIFFUSION_MODEL': UNET, 'FIRST_STAGE_MODEL': VAE, 'IMAGE_SIZE': 16, **settings}), 'MODEL')]
    assert faults() == faults(SIZE_FACTOR=2) == []
    assert 'the autoencoder makes pictures 2 times smaller' in faults(SIZE_FACTOR=4)[0]
    assert 'multiples of 2' in faults(IMAGE_SIZE=17)[0]
    assert 'SHIFT_FACTOR' in faults(FIRST_STAGE_MODEL=None, SCALE_FACTOR=1.0, SHIFT_FACTOR=0.1)[0]


def test_a_size_to_draw_that_cannot_be_is_a_fault_though_the_config_has_no_size_factor(tmp_path):
    config = {'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MAX_STEPS': 1, 'OPTIMIZER': {'NAME': 'SGD', 'LEARNING_RATE': 0.1},
                         'WORK_DIR': str(tmp_path / 'run'), 'SAMPLE_ARGS': {'IMAGE_SIZE': 17},
                         'MODEL': {'NAME': 'LatentDiffusion', 'DIFFUSION_MODEL': UNET, 'FIRST_STAGE_MODEL': VAE, 'IMAGE_SIZE': 16},
                         'TRAIN_DATA': {'NAME': 'Clips', 'BATCH_SIZE': 2}}}
    (tmp_path / 'train.yaml').write_text(str(Config(config)))
    assert run_train(['--cfg', str(tmp_path / 'train.yaml'), '--check']) == 2
    assert run_train(['--cfg', str(tmp_path / 'train.yaml'), '--check', 'SOLVER.SAMPLE_ARGS.IMAGE_SIZE=18']) == 0
