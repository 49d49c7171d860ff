"""The video autoencoder against the published code, and what it says of clips."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import scepter.components  # noqa: F401
from scepter.core.config import Config
from scepter.core.registry import MODELS
from scepter.models.autoencoder_video import VideoAutoencoderKL
from scepter.models.latent import LatentSpace
from tests.models.nova_cases import close, folders, kind_of

FOLDERS = [folder for folder in folders() if kind_of(folder) == 'autoencoder']
TINY = {'NAME': 'VideoAutoencoderKL', 'BLOCK_OUT_CHANNELS': [32, 64, 32, 32], 'LAYERS_PER_BLOCK': 1}


def build(folder: Path | None = None, **keys: Any) -> VideoAutoencoderKL:
    torch.manual_seed(0)
    told = {} if folder is None else json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    names = ('latent_channels', 'block_out_channels', 'layers_per_block', 'down_block_types')
    config = Config({**TINY, **{name.upper(): told[name] for name in names if name in told}, **keys})
    assert not list(MODELS.faults(config, ''))
    return MODELS.build(config)


@pytest.mark.parametrize('folder', FOLDERS, ids=str)
@torch.no_grad()
def test_clips_and_images_go_in_and_come_out_as_published(folder: Path):
    network, recorded = build(folder), load_file(folder / 'io.safetensors')
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == \
        json.loads((folder / 'config.json').read_text(encoding='utf-8'))['state_dict']
    network.load_state_dict({name: value.float() for name, value in load_file(folder / 'model.safetensors').items()})

    for tag in sorted({name.split('.')[0] for name in recorded}):
        x, moments, decoded = (recorded[f'{tag}.{name}'] for name in ('x', 'moments', 'decoded'))
        posterior = network.encode(x.float()).latent_dist
        close(posterior.parameters, moments, 2e-5 * moments.abs().max().item(), tag)
        # what was kept of the longest clip was rounded to halves
        tolerance = 5e-3 if decoded.dtype == torch.float16 else 2e-5 * decoded.abs().max().item()
        close(network.decode(moments.chunk(2, 1)[0]).to(decoded.dtype), decoded, tolerance, tag)


@torch.no_grad()
def test_a_clip_keeps_its_tail_whatever_its_length():
    network = build()
    x = torch.randn(1, 3, 21, 16, 16)

    latents = network.encode(x).latent_dist.mode()

    assert list(latents.shape) == [1, 4, 6, 2, 2] and list(network.decode(latents).shape) == [1, 3, 21, 16, 16]
    changed = torch.cat([x[:, :, :-1], x[:, :, -1:] + 1], 2)
    assert not torch.equal(network.encode(changed).latent_dist.mode()[:, :, -1], latents[:, :, -1])


@torch.no_grad()
def test_an_image_is_a_clip_of_one_frame():
    network, x = build(), torch.randn(2, 3, 16, 24)

    image, clip = network.encode(x).latent_dist.mode(), network.encode(x.unsqueeze(2)).latent_dist.mode()

    assert torch.equal(image, clip.squeeze(2)) and torch.equal(network.decode(image), network.decode(clip).squeeze(2))


@torch.no_grad()
def test_the_latent_space_knows_its_clips():
    space = LatentSpace.of(build(), 0.5, 0.1, 8, 4)

    assert space.misfit() == '' and space.shape(16, 24, 9) == (4, 3, 2, 3)
    latents = space.encode(torch.randn(1, 3, 9, 16, 24), is_drawn=False)
    assert list(latents.shape) == [1, 4, 3, 2, 3] and list(space.decode(latents).shape) == [1, 3, 9, 16, 24]


@pytest.mark.parametrize('shape, words', [((1, 3, 6, 16, 16), r'6 frames of 16x16 .* e\.g\. 5'), ((1, 3, 5, 16, 20), '5 frames of 16x20')])
def test_a_clip_that_it_cannot_make_is_refused(shape: tuple, words: str):
    with pytest.raises(ValueError, match=words):
        build().encode(torch.zeros(shape))


@pytest.mark.parametrize('keys, words', [
    ({'DOWN_BLOCK_TYPES': ['DownEncoderBlock2D']}, 'has 1 entries, BLOCK_OUT_CHANNELS 4'),
    ({'DOWN_BLOCK_TYPES': ['DownEncoderBlock3D', *['DownEncoderBlock2D'] * 3]}, 'a 2D level behind a 3D one')])
def test_levels_that_do_not_fit_are_refused(keys: dict, words: str):
    assert [words in str(fault) for fault in MODELS.faults(Config({**TINY, **keys}), '')] == [True]
