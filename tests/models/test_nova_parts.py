"""The parts of NOVA that are not networks against the published code: schedulers, guidance, sets, masks, posteriors, the average."""
from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
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
from tests.models.nova_cases import HERE, close, folders, kind_of, process_keys, with_file
from tests.models.nova_runs import NETWORK


def entries(name: str) -> list:
    """Each entry of specs.json in the folders of this kind."""
    found = [(file.parent, tag) for file in with_file('specs.json', name) for tag in json.loads(file.read_text(encoding='utf-8'))]
    return [pytest.param(folder, tag, id=tag) for folder, tag in found]


def of_entry(folder: Path, tag: str) -> tuple[Any, dict[str, Tensor]]:
    specs = json.loads((folder / 'specs.json').read_text(encoding='utf-8'))
    tensors = load_file(folder / f'{kind_of(folder)}.safetensors')
    return specs[tag], {name.removeprefix(f'{tag}.'): value for name, value in tensors.items() if name.startswith(f'{tag}.')}


def process(keys: dict[str, Any]) -> Diffusion:
    return process_of(MODELS.filled(Config({'NAME': 'NovaModel', 'NETWORK': {}, **keys})))


@pytest.mark.parametrize('folder', folders(), ids=str)
def test_every_folder_of_the_reference_is_run(folder: Path):
    """Tests are made of the files that are there: one that is not must not go unseen."""
    if kind_of(folder) == 'network':
        samples = json.loads((folder / 'case.json').read_text(encoding='utf-8'))['samples']
        names = ('model', 'train', *(f'sample_{tag}' for tag in samples))
        assert not [name for name in names if not (folder / f'{name}.safetensors').is_file()]


def test_folders_that_the_environment_names_are_walked_whatever_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for source, name in ((HERE / 'c2i_abs_ddpm', 'set/another'), (HERE / 'misc', 'alone/more')):
        shutil.copytree(source, tmp_path / name)
    monkeypatch.setenv('NOVA_FIXTURES', os.pathsep.join([str(tmp_path / 'set'), str(tmp_path / 'alone')]))

    further = [path for path in folders() if tmp_path in path.parents]

    assert [(path.name, kind_of(path)) for path in further] == [('another', 'network'), ('more', 'misc')]
    assert tmp_path / 'set' / 'another' / 'train.safetensors' in with_file('train.safetensors')
    (tmp_path / 'set' / 'unknown').mkdir()
    with pytest.raises(ValueError, match='unknown holds nothing that a test knows'):
        with_file('train.safetensors')


@pytest.mark.parametrize('folder, tag', entries('schedulers'))
def test_a_scheduler_trains_and_draws_as_published(folder: Path, tag: str):
    spec, recorded = of_entry(folder, tag)
    keys = process_keys(spec['config'])
    diffusion, is_flow = process(keys), keys['SPACING'] == 'flow'

    level = diffusion.level(diffusion.num_timesteps - 1 - recorded['t'] if is_flow else recorded['t'], recorded['x'])
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
    ({'_class_name': 'DDPMScheduler', 'thresholding': True}, 'thresholding True, but a process of ours has False only'),
    ({'_class_name': 'DDPMScheduler', 'noise': 2}, 'says noise, which we do not do'),
    ({'_class_name': 'DDPMScheduler', 'variance_type': 'learned'}, 'variance_type'),
    ({'_class_name': 'DDPMScheduler', 'beta_schedule': 'laplace'}, "beta_schedule 'laplace'"),
    ({'_class_name': 'DDPMScheduler', 'prediction_type': 'flow'}, "prediction_type 'flow'")])
def test_a_scheduler_that_would_draw_otherwise_is_refused(values: dict, words: str):
    with pytest.raises(CheckpointError, match=words):
        process_keys(values)


@pytest.mark.parametrize('scheduler', [diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
                                       diffusers.DDPMScheduler(beta_schedule='squaredcos_cap_v2', steps_offset=1)])
def test_a_scheduler_as_diffusers_writes_it_says_all_that_it_leaves_undone(tmp_path: Path, scheduler: Any):
    scheduler.save_pretrained(tmp_path)

    keys = process_keys(json.loads((tmp_path / 'scheduler_config.json').read_text(encoding='utf-8')))

    assert keys['SCHEDULE_ARGS'] in ({'NAME': 'flow', 'SHIFT': 3.0}, {'NAME': 'cosine'}) and not list(MODELS.faults(
        Config({'NAME': 'NovaModel', 'NETWORK': NETWORK, **keys}), ''))


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


@pytest.mark.parametrize('file', with_file('num_preds.json', 'misc'), ids=str)
def test_the_sets_of_tokens_have_the_published_sizes(file: Path):
    for tag, sizes in json.loads(file.read_text(encoding='utf-8')).items():
        sets, tokens = (int(word[1:]) for word in tag.split('_'))
        assert set_sizes(sets, tokens) == sizes, tag


@pytest.mark.parametrize('file', with_file('mask_and_dist.safetensors', 'misc'), ids=str)
def test_masks_and_posteriors_are_the_published_ones(file: Path):
    recorded = load_file(file)

    assert torch.equal(may_see(ends_of_frames(3, 2, 3)), recorded['attn_mask'] == 0)
    for kind in ('dist_even', 'dist_odd'):
        moments, mean, logvar, noise, sample = (recorded[f'{kind}.{name}'] for name in ('moments', 'mean', 'logvar', 'noise', 'sample'))
        posterior = DiagonalGaussian(moments)
        close(posterior.mean, mean, 0.0, kind)
        close(posterior.logvar, logvar.expand_as(mean), 0.0, kind)
        close(posterior.sample(noise), sample, 1e-6, kind)


@pytest.mark.parametrize('file', with_file('ema.safetensors', 'misc'), ids=str)
def test_the_average_of_trained_weights_is_the_published_one(file: Path):
    recorded = load_file(file)
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
