"""The Stable Diffusion recipes are of the published sizes; tiny twins load published files, train, draw, export, and open in diffusers."""
from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from scepter.commands import tool
from scepter.core.config import Config
from scepter.core.disk.tensors import TensorFile
from scepter.core.images import read_settings
from scepter.core.registry import MODELS
from scepter.models.restore import restore, without_weights
from scepter.run_inference import main as run_inference
from scepter.run_train import main as run_train
from tests.twins import EXAMPLES, SIZES, network, publish, three_images, twin

inputs, relative = tool('parity').inputs, tool('parity').relative
ROOT = EXAMPLES.parent
# recipe -> parameters of the UNet and of the text towers; the autoencoder is the same in all
PUBLISHED = {'sd15/sd15_512_full': (859_520_964, 123_060_480), 'sd15/sd15_buckets': (859_520_964, 123_060_480),
             'sd21/sd21_512': (865_910_724, 340_387_840),
             'sd21/sd21_768_v': (865_910_724, 340_387_840), 'sdxl/sdxl_1024': (2_567_463_684, 123_060_480 + 694_659_840),
             'sdxl/sdxl_refiner': (2_259_526_660, 694_659_840)}


@pytest.mark.parametrize('recipe', PUBLISHED)
def test_a_recipe_is_without_faults_and_of_its_published_size(recipe):
    assert run_train(['--cfg', f'{recipe}.yaml', '--check']) == 0
    with torch.device('meta'):
        model = MODELS.build(without_weights(Config.load(f'{recipe}.yaml').SOLVER.MODEL))
    parts = (model.model, model.cond_stage_model, model.first_stage_model)
    assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == (*PUBLISHED[recipe], 83_653_863)


def test_every_recipe_is_counted_here_and_has_a_twin():
    shipped = {path.relative_to(EXAMPLES).with_suffix('').as_posix() for path in EXAMPLES.glob('sd*/*.yaml')} - {'sd15/sd15'}
    assert shipped == set(PUBLISHED) == set(SIZES)


@pytest.mark.parametrize('recipe', ['sd15/sd15_512_full', 'sd21/sd21_768_v', 'sdxl/sdxl_1024'])
def test_a_twin_loads_a_published_file_and_trains_and_draws_and_exports_and_opens_in_diffusers(recipe, tmp_path, capsys):
    file = tmp_path / 'published.safetensors'
    publish(network(twin(recipe, tmp_path / 'bare.yaml')), file)
    twin(recipe, tmp_path / 'tiny.yaml', file, three_images(tmp_path / 'images'), MAX_STEPS=2)

    assert run_train(['--cfg', str(tmp_path / 'tiny.yaml')]) == 0
    checkpoint = tmp_path / 'work' / 'checkpoints' / 'step-00000002'
    before, after = TensorFile(file), TensorFile(checkpoint / 'model.safetensors')
    weight = 'input_blocks.1.0.in_layers.2.weight'
    change = relative(after[f'model.{weight}'], before[f'model.diffusion_model.{weight}'])
    assert 0 < change < 1e-3    # it began with the file's, and learnt
    assert not any(name.startswith(('first_stage_model', 'cond_stage_model')) for name in after)    # the file has them

    words = ['--pretrained_model', str(checkpoint), '--prompt', 'a red wall', '--num_samples', '2', '--save_folder', str(tmp_path)]
    assert run_inference(words) == 0
    drawn = read_settings(sorted(tmp_path.glob('*.png'))[1])
    assert (drawn['prompt'], drawn['number'], drawn['size'], drawn['sample_steps']) == ('a red wall', 1, [64, 64], 2)

    assert tool('export')([str(checkpoint), str(tmp_path / 'exported')]) == 0
    assert 'diffusers differs by' in capsys.readouterr().out
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / 'exported')
    model = restore(checkpoint)
    with torch.no_grad():
        assert relative(*one_forward(model, pipeline)) < 1e-5


def one_forward(model, pipeline):
    """(theirs, ours): what both predict for a prompt, from the prompt on."""
    noise, t, sizes = inputs(model)
    found = pipeline.encode_prompt('a red wall', device='cpu', num_images_per_prompt=2, do_classifier_free_guidance=False)
    added = None
    if hasattr(model.cond_stage_model, 'embedders'):
        added = {'text_embeds': found[2], 'time_ids': torch.cat([sizes[name].float() for name in model.cond_stage_model.SIZES], dim=1)}
    theirs = pipeline.unet(noise, t, encoder_hidden_states=found[0], added_cond_kwargs=added).sample
    return theirs, model.model(noise, t, model.condition(['a red wall'] * 2, **sizes))


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_names_of_recipes_are_those_that_the_tools_look_for():
    text = (ROOT / 'tools' / 'convert_weights.py').read_text()
    named = {word for recipe in PUBLISHED for word in (f'{recipe}.yaml',) if word in text}
    assert named == {'sd15/sd15_512_full.yaml', 'sd21/sd21_512.yaml', 'sd21/sd21_768_v.yaml', 'sdxl/sdxl_1024.yaml'}
    assert all(Path(EXAMPLES / word).is_file() for word in named)
