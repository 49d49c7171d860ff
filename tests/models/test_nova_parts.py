"""The parts of NOVA that are not networks against the published code: schedulers, guidance, sets, masks, posteriors, the average."""
from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import scepter.components  # noqa: F401
from scepter.core.config import Config
from scepter.core.errors import CheckpointError
from scepter.core.registry import HOOKS, MODELS
from scepter.diffusion.process import Diffusion
from scepter.diffusion.samplers import ddpm, euler
from scepter.models.autoencoder import DiagonalGaussian
from scepter.models.nova.blocks import may_see
from scepter.models.nova.drawing import set_sizes
from scepter.models.nova.encoders import ends_of_frames
from scepter.models.nova.guidance import Guidance
from scepter.models.nova.steps import chains
from scepter.models.process import process_of
from tests.models.nova_cases import close, folders, process_keys


def entries(name: str) -> list:
    """Each entry of specs.json in the folders of this name."""
    found = [(folder, tag) for folder in folders() if folder.name == name
             for tag in json.loads((folder / 'specs.json').read_text(encoding='utf-8'))]
    return [pytest.param(folder, tag, id=tag) for folder, tag in found]


def of_entry(folder: Path, tag: str) -> tuple[Any, dict[str, Tensor]]:
    specs = json.loads((folder / 'specs.json').read_text(encoding='utf-8'))
    tensors = load_file(folder / f'{folder.name}.safetensors')
    return specs[tag], {name.removeprefix(f'{tag}.'): value for name, value in tensors.items() if name.startswith(f'{tag}.')}


def process(keys: dict[str, Any]) -> Diffusion:
    return process_of(MODELS.filled(Config({'NAME': 'NovaModel', 'NETWORK': {}, **keys})))


@pytest.mark.parametrize('folder', folders(), ids=str)
def test_every_folder_of_the_reference_is_of_a_kind_that_is_run(folder: Path):
    has_network = (folder / 'case.json').is_file() or (folder / 'io.safetensors').is_file()
    assert has_network or folder.name in ('schedulers', 'guidance', 'misc', 'records')


@pytest.mark.parametrize('folder, tag', entries('schedulers'))
def test_a_scheduler_trains_and_draws_as_published(folder: Path, tag: str):
    spec, recorded = of_entry(folder, tag)
    keys = process_keys(spec['config'])
    diffusion, is_flow = process(keys), keys['SPACING'] == 'flow'

    level = diffusion.level(999 - recorded['t'] if is_flow else recorded['t'], recorded['x'])
    close(diffusion.diffuse(recorded['x'], recorded['noise'], level), recorded['add_noise'], 2e-6, 'add_noise')
    if is_flow:
        close(level.t, recorded['decoder_timestep'], 2e-4, 'times')
        close(diffusion.sigmas.flip(0), recorded['train_sigmas'], 1e-6, 'sigmas')
    else:
        close(diffusion.alphas ** 2, recorded['alphas_cumprod'], 1e-6, 'alphas')

    found = chains(diffusion, spec['num_inference_steps'], keys['SPACING'], keys.get('STEPS_OFFSET', 0))
    x, states, noises = recorded['step_x0'], [], iter(recorded.get('step_noise', []))
    for now, then in ((a, b) for chain in found for a, b in pairwise(chain)):
        x = (euler if is_flow else ddpm)(lambda xt, level: diffusion.split(0.5 * torch.sin(3 * xt) + 0.1, xt, level), x, [now, then],
                                         fresh=lambda like: next(noises), between=diffusion.between)
        states.append(x)
    close(torch.tensor([level.t for chain in found for level in chain[:-1]]), recorded['timesteps'], 2e-4, 'timesteps')
    close(torch.stack(states), recorded['step_out'], 2e-5 * recorded['step_out'].abs().max().item(), 'steps')


@pytest.mark.parametrize('values, words', [
    ({'_class_name': 'UniPCMultistepScheduler'}, "'UniPCMultistepScheduler', but expected"),
    ({'_class_name': 'DDPMScheduler', 'thresholding': True}, 'says thresholding, which we do not do'),
    ({'_class_name': 'DDPMScheduler', 'variance_type': 'learned'}, 'variance_type'),
    ({'_class_name': 'DDPMScheduler', 'beta_schedule': 'laplace'}, "beta_schedule 'laplace'"),
    ({'_class_name': 'DDPMScheduler', 'prediction_type': 'flow'}, "prediction_type 'flow'")])
def test_a_scheduler_that_would_draw_otherwise_is_refused(values: dict, words: str):
    with pytest.raises(CheckpointError, match=words):
        process_keys(values)


@pytest.mark.parametrize('folder, tag', entries('guidance'))
def test_guidance_asks_and_answers_as_published(folder: Path, tag: str):
    spec, recorded = of_entry(folder, tag)
    if isinstance(spec, list):    # the scales of each set: the tag says of what
        told = {word.split('=')[0]: float(word.split('=')[1]) for word in tag[tag.index('(') + 1:-1].split(',')}
        guidance = Guidance(told['guidance_scale'], min_scale=told['min'])
        assert [guidance.at_set(i, int(told['steps'])).scale for i in range(int(told['steps']))] == spec
        return
    guidance = Guidance(spec['guidance_scale'], spec.get('image_guidance_scale', 0.0), spec.get('spatiotemporal_guidance_scale', 0.0),
                        spec.get('guidance_renorm', 1.0))

    close(guidance.combine(recorded['pred']), recorded['out'], 2e-6, 'out')
    wanted, *empty = recorded['text'].split(len(recorded['out']))
    assert torch.equal(guidance.words(wanted, empty[0] if empty else wanted), recorded['text_expanded'])
    if 'tokens' in recorded:
        assert torch.equal(guidance.frames(recorded['tokens'], recorded['padding']), recorded['tokens_expanded'])


MISC = [folder for folder in folders() if folder.name == 'misc']


@pytest.mark.parametrize('folder', MISC, ids=str)
def test_the_sets_of_tokens_have_the_published_sizes(folder: Path):
    for tag, sizes in json.loads((folder / 'num_preds.json').read_text(encoding='utf-8')).items():
        sets, tokens = (int(word[1:]) for word in tag.split('_'))
        assert set_sizes(sets, tokens) == sizes, tag


@pytest.mark.parametrize('folder', MISC, ids=str)
def test_masks_and_posteriors_are_the_published_ones(folder: Path):
    recorded = load_file(folder / 'mask_and_dist.safetensors')

    assert torch.equal(may_see(ends_of_frames(3, 2, 3)), recorded['attn_mask'] == 0)
    for kind in ('dist_even', 'dist_odd'):
        moments, mean, logvar, noise, sample = (recorded[f'{kind}.{name}'] for name in ('moments', 'mean', 'logvar', 'noise', 'sample'))
        posterior = DiagonalGaussian(moments)
        close(posterior.mean, mean, 0.0, kind)
        close(posterior.logvar, logvar.expand_as(mean), 0.0, kind)
        close(posterior.sample(noise), sample, 1e-6, kind)


@pytest.mark.parametrize('folder', MISC, ids=str)
def test_the_average_of_trained_weights_is_the_published_one(folder: Path):
    recorded = load_file(folder / 'ema.safetensors')
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).bfloat16()
    network[1].requires_grad_(False)
    network.load_state_dict({name: recorded[f'ema.0.{name}'] for name in network.state_dict()})
    hook = HOOKS.build({'NAME': 'ModelEmaHook', 'BETA': 0.9, 'WARMUP': False})
    hook.begin(network)

    for count in (1, 2, 3):
        network.load_state_dict({name: recorded[f'model.{count}.{name}'] for name in network.state_dict()})
        hook.update(count)

        assert hook.average.keys() == {'0.weight', '0.bias'}
        for name, value in hook.average.items():
            close(value, recorded[f'ema.{count}.{name}'], 1e-6, name)
