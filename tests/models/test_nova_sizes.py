"""The sizes that a config of NOVA can say, the published ones among them, and what it may not say."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import scepter.components  # noqa: F401
from scepter.core.config import Config
from scepter.core.errors import CheckpointError
from scepter.core.registry import BACKBONES
from scepter.models.nova.blocks import Size, patchify, unpatchify
from scepter.weights.families.nova import read_network, write_network
from scepter.weights.said import values_of
from tests.models.nova_cases import Case, label, with_file

TINY: dict[str, Any] = {'NAME': 'NovaTransformer', 'IMAGE_DIM': 4, 'IMAGE_SIZE': 64, 'IMAGE_STRIDE': 8,
                        'ARCH': ['vit_d2w32h2', 'vit_d2w32h2', 'mlp_d1w16']}
IMAGE = {**TINY, 'IMAGE_SIZE': 1024, 'IMAGE_BASE_SIZE': [64, 64], 'VIDEO_BASE_SIZE': [1, 32, 32],
         'TEXT_TOKEN_DIM': 2560, 'TEXT_TOKEN_LEN': 256}
CLIP = {**IMAGE, 'IMAGE_SIZE': [480, 768], 'IMAGE_BASE_SIZE': [30, 48], 'VIDEO_BASE_SIZE': [16, 15, 24], 'VIDEO_MIXER_RANK': 24}


@pytest.mark.parametrize('config, arch, millions', [
    (IMAGE, 'vit_d16w768 vit_d32w768 mlp_d6w768', 363.9),
    (IMAGE, 'vit_d16w1024 vit_d32w1024 mlp_d6w1024', 645.7),
    (IMAGE, 'vit_d16w1536 vit_d32w1536 mlp_d6w1536', 1449.8),
    (CLIP, 'vit_d16w1024 vit_d32w1024 mlp_d3w1280', 644.2)])
def test_the_published_sizes_have_the_published_parameters(config: dict, arch: str, millions: float):
    with torch.device('meta'):
        network = BACKBONES.build(Config({**config, 'ARCH': arch.split()}))

    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def test_a_size_says_depth_width_and_heads():
    assert Size.of('vit_d16w768', 'vit') == (16, 768, 12) and Size.of('vit_d16w1536', 'vit') == (16, 1536, 16)
    assert Size.of('vit_d3w192', 'vit') == (3, 192, 3) and Size.of('vit_d3w192h6', 'vit').heads == 6
    with pytest.raises(ValueError, match='expected mlp_d<depth>w<width>'):
        Size.of('mlp_d2w64h2', 'mlp')
    for name in ('vit_d16', 'mlp_d6w768', 'vit_d0w64', 'vit_d2w64h3'):
        with pytest.raises(ValueError, match=name):
            Size.of(name, 'vit')


@pytest.mark.parametrize('changes, key, words', [
    ({'ARCH': ['vit_d2w32', 'vit_d2w64', 'mlp_d1w16']}, 'ARCH', '32 wide, but the image encoder 64'),
    ({'ARCH': ['vit_d2w32', 'vit_d2', 'mlp_d1w16']}, 'ARCH', "'vit_d2' is no size"),
    ({'ROTARY_POS_EMBED': True}, 'ARCH', 'heads of 16'),
    ({'TEXT_TOKEN_DIM': 24}, 'TEXT_TOKEN_LEN', 'give both'),
    ({'IMAGE_SIZE': 80}, 'IMAGE_SIZE', 'multiples of 32 pixels'),
    ({'IMAGE_BASE_SIZE': [4, 5]}, 'IMAGE_BASE_SIZE', '4 rows and 4 columns'),
    ({'VIDEO_BASE_SIZE': [1, 4, 4]}, 'VIDEO_BASE_SIZE', '2 rows and 2 columns')])
def test_a_config_that_would_draw_nonsense_is_refused(changes: dict, key: str, words: str):
    faults = [str(fault) for fault in BACKBONES.faults(Config({**TINY, **changes}), 'MODEL')]

    assert len(faults) == 1 and f'MODEL.{key}' in faults[0] and words in faults[0]


def test_latents_of_another_size_than_the_positions_are_refused():
    network = BACKBONES.build(Config(TINY))

    with pytest.raises(ValueError, match='8x12, but the positions of this network are for 8x8'):
        network(torch.zeros(1, 4, 1, 8, 12), network.condition(torch.tensor([3])), torch.arange(24)[None], 4)


@pytest.mark.parametrize('name', ['safetensors', 'bin'])
def test_a_published_folder_comes_back_with_every_weight(tmp_path: Path, name: str):
    from safetensors.torch import save_file
    network = BACKBONES.build(Config({**TINY, 'VIDEO_BASE_SIZE': [4, 2, 2], 'VIDEO_MIXER_RANK': 3,
                                     'TEXT_TOKEN_DIM': 24, 'TEXT_TOKEN_LEN': 6}))
    state = network.state_dict()
    torch.save(state, tmp_path / 'diffusion_pytorch_model.bin') if name == 'bin' else \
        save_file(state, tmp_path / 'diffusion_pytorch_model.safetensors')

    again = BACKBONES.build(Config({**values_of(read_network(write_network(network), 'a')), 'PRETRAINED_MODEL': str(tmp_path)}))

    assert {n: v.tolist() for n, v in again.state_dict().items()} == {n: v.tolist() for n, v in state.items()}


def test_a_mixer_that_the_weights_lack_is_refused(tmp_path: Path):
    from safetensors.torch import save_file
    config = Config({**TINY, 'VIDEO_BASE_SIZE': [4, 2, 2]})
    save_file(BACKBONES.build(config).state_dict(), tmp_path / 'diffusion_pytorch_model.safetensors')

    with pytest.raises(CheckpointError, match=r'missing:\n  video_encoder.mixer.lora.weight'):
        BACKBONES.build(Config({**config, 'VIDEO_MIXER_RANK': 3, 'PRETRAINED_MODEL': str(tmp_path)}))


def test_a_config_json_of_something_else_is_refused():
    for values, words in (({'_class_name': 'UNet2D'}, 'UNet2D'), ({'image_dims': 4}, 'image_dims')):
        with pytest.raises(CheckpointError, match=words):
            read_network(values, 'a folder')


@pytest.mark.parametrize('file', with_file('case.json'), ids=label)
def test_a_published_config_says_the_same_as_ours(file: Path):
    case = Case(file.parent)

    read = values_of(read_network(case.told['transformer'], 'a folder'))

    assert {**read, 'ARCH': None} == {**{k: v for k, v in case.config().items() if v is not None}, 'ARCH': None}


@pytest.mark.parametrize('changes', [{'NUM_CLASSES': 10}, {'TEXT_TOKEN_DIM': 24, 'TEXT_TOKEN_LEN': 6, 'VIDEO_MIXER_RANK': -1}, {}])
def test_a_config_json_that_we_write_reads_as_it_was(changes: dict):
    network = BACKBONES.build(Config({**TINY, 'VIDEO_BASE_SIZE': [4, 2, 2], **changes}))

    written = write_network(network)
    again = BACKBONES.build(Config(values_of(read_network(json.loads(json.dumps(written)), 'a folder'))))

    assert again.cfg == network.cfg and ('num_classes' in written) == ('NUM_CLASSES' in changes)


def test_a_width_of_nothing_is_a_network_of_classes():
    values = {'image_dim': 4, 'image_size': 64, 'image_stride': 8, 'text_token_dim': 0, 'text_token_len': 256, 'video_mixer_rank': 0,
              'arch': TINY['ARCH']}

    assert BACKBONES.build(Config(values_of(read_network(values, 'a folder')))).is_told_class


def test_patches_come_back():
    x = torch.randn(2, 4, 6, 8)

    assert torch.equal(unpatchify(patchify(x, 2), 2, (3, 4)), x)
    assert torch.equal(patchify(x, 2)[0, 1], x[0, :, :2, 2:4].permute(1, 2, 0).flatten())
