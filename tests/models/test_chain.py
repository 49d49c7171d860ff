"""From the prompt to the picture: ours and the pipelines of diffusers, with the same weights, levels, start and injected noise."""
from __future__ import annotations

import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_euler_ancestral_discrete
from torch import Tensor

from scepter.core import streams
from scepter.core.config import Config
from scepter.core.images import to_uint8
from scepter.weights import export_diffusers
from tests.models.oracles import relative_error
from tests.twins import network, twin

PROMPTS, STEPS, SEED, SIZE = ['a red fox in the snow', 'an oil painting of a lighthouse'], 10, 7, [64, 72]
GUIDANCE = {'guide_scale': 4.0, 'guide_rescale': 0.5}
# sampler -> (their scheduler, our options, options of their call)
SAMPLERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    'ddim': ('DDIMScheduler', {'eta': 0.5}, {'eta': 0.5}), 'euler': ('EulerDiscreteScheduler', {}, {}),
    'euler_ancestral': ('EulerAncestralDiscreteScheduler', {}, {}), 'dpmpp_2m': ('DPMSolverMultistepScheduler', {}, {})}


RECIPES = ['sd15/sd15_512_full', 'sd21/sd21_768_v', 'sdxl/sdxl_1024']
# SDXL's twice in float32 would take 28 GB; its parts are compared at published size in their own tests
WHOLE = [pytest.param(f'whole {recipe}', marks=[pytest.mark.slow, pytest.mark.timeout(900)]) for recipe in RECIPES[:2]]


@pytest.fixture(scope='module', params=[*RECIPES, *WHOLE])
def pair(request, tmp_path_factory):
    """A network with random weights, tiny or of its published size, and the pipeline that opens its export."""
    folder, recipe = tmp_path_factory.mktemp('chain'), request.param.removeprefix('whole ')
    is_tiny = recipe == request.param
    model = network(twin(recipe, folder / 'tiny.yaml') if is_tiny else Config.load(f'{recipe}.yaml'))
    export_diffusers(model, folder / 'exported')
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / 'exported')
    pipeline.set_progress_bar_config(disable=True)
    return model, pipeline


def fresh(rows: list[int]):
    """The noise that our samplers draw, one after the other, in the place of theirs."""
    count = itertools.count()
    return lambda shape, **kwargs: streams.normal_rows(rows, f'fresh {next(count)}', shape[1:], torch.device('cpu'), torch.float32)


def our_draw(model, monkeypatch, sampler: str, n_prompt: str, options: dict[str, Any]) -> tuple[Tensor, list[np.ndarray]]:
    """(latents, PNG pixels)"""
    seen, decode = [], model.decode_first_stage
    monkeypatch.setattr(model, 'decode_first_stage', lambda latents: seen.append(latents) or decode(latents))
    results = model.forward_test(prompt=PROMPTS, n_prompt=n_prompt, sampler=sampler, sample_steps=STEPS, seed=SEED, image_size=SIZE,
                                 sampler_args=options, **GUIDANCE)
    return seen[0], [to_uint8(result['image']) for result in results]


def their_draw(pipeline, monkeypatch, scheduler: str, n_prompt: str | None, options: dict[str, Any]) -> tuple[Tensor, list[np.ndarray]]:
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, timestep_spacing='trailing')
    pipeline.scheduler.set_timesteps(STEPS)
    rows = streams.row_seeds(SEED, len(PROMPTS))
    for module in (scheduling_ddim, scheduling_euler_ancestral_discrete):
        monkeypatch.setattr(module, 'randn_tensor', fresh(rows))
    start = streams.normal_rows(rows, 'start', (4, SIZE[0] // 8, SIZE[1] // 8), torch.device('cpu'), torch.float32)
    # schedulers of sigma/alpha begin with sigma/alpha times the noise, ours with its hypotenuse to 1: the same state, told apart by a scale
    theirs = pipeline.scheduler.scale_model_input(start * pipeline.scheduler.init_noise_sigma, pipeline.scheduler.timesteps[0])
    pipeline.scheduler.set_timesteps(STEPS)
    unit = (theirs.norm() / start.norm()).item()
    latents = pipeline(PROMPTS, negative_prompt=n_prompt and [n_prompt] * len(PROMPTS), num_inference_steps=STEPS, height=SIZE[0],
                       width=SIZE[1], guidance_scale=GUIDANCE['guide_scale'], guidance_rescale=GUIDANCE['guide_rescale'],
                       latents=start / unit, output_type='latent', **options).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return latents, [np.array(image) for image in pipeline.image_processor.postprocess(decoded)]


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_ten_guided_steps_and_the_picture_are_those_of_the_pipeline(pair, sampler, monkeypatch):
    scheduler, ours, theirs = SAMPLERS[sampler]
    latents, pictures = our_draw(pair[0], monkeypatch, sampler, 'blurry', ours)
    their_latents, their_pictures = their_draw(pair[1], monkeypatch, scheduler, 'blurry', theirs)
    assert relative_error(latents, their_latents) < 1e-4
    for picture, other in zip(pictures, their_pictures):
        assert picture.shape == other.shape == (64, 72, 3) and picture.std() > 10
        assert np.abs(picture.astype(int) - other).max() <= 1


def test_without_a_negative_prompt_too(pair, monkeypatch):
    """SDXL's pipeline then guides away from zeros, the others from the code of an empty text."""
    latents, _ = our_draw(pair[0], monkeypatch, 'ddim', '', {})
    assert relative_error(latents, their_draw(pair[1], monkeypatch, 'DDIMScheduler', None, {})[0]) < 1e-4


@pytest.mark.parametrize('recipe', ['sd15/sd15_512_full', 'sdxl/sdxl_1024'])
def test_chunked_prompts_of_unlike_length_are_guided_in_one_call(recipe, tmp_path):
    cfg = twin(recipe, tmp_path / 'tiny.yaml')
    text = 'SOLVER.MODEL.COND_STAGE_MODEL'
    cfg.override([f'{text}.LONG_PROMPT=chunk'] if 'sd15' in recipe else [f'{text}.EMBEDDERS[{i}].LONG_PROMPT=chunk' for i in range(2)])
    model, rows = network(cfg), []
    model.model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model.forward_test(prompt=['a very long story ' * 30, 'a fox'], n_prompt='blurry', sample_steps=2, image_size=64)
    assert rows == [4, 4]
