"""Published files under all of their names: read, checked, written, and opened again by the library they are meant for."""
from __future__ import annotations

import copy
import json

import pytest
import torch

import scepter.components  # noqa: F401  (registers)
from scepter.commands import tool
from scepter.core.disk.tensors import TensorFile, write_tensors
from scepter.core.errors import CheckpointError
from scepter.core.registry import BACKBONES, EMBEDDERS, MODELS
from scepter.weights import (
    Weights,
    export_diffusers,
    export_single,
    family_of,
    load_into,
    load_pretrained,
    read_weights,
    whole_model,
)
from scepter.weights.families.autoencoder import VAE as VAE_PART
from scepter.weights.families.process import write_config
from scepter.weights.families.sd import BUFFERS, StableDiffusion1
from scepter.weights.families.unet import UNET as UNET_PART
from scepter.weights.tables import OURS, THEIRS
from tiny import CLIP, OPENCLIP, autoencoder, unet

VAE = autoencoder(1, 2)
UNET = unet(1, 2, 2, ATTENTION_RESOLUTIONS=[1, 2])
XL = {'NUM_CLASSES': 'sequential', 'USE_LINEAR_IN_TRANSFORMER': True, 'NUM_HEADS_CHANNELS': 16, 'ATTENTION_RESOLUTIONS': [2, 4],
      'TRANSFORMER_DEPTH': [0, 1, 2]}
POOLED = {'RETURN_POOLED': True, 'USE_FINAL_LAYER_NORM': False}

SHAPES = {
    'sd15': ({**UNET, 'CONTEXT_DIM': 32, 'NUM_HEADS': 4}, CLIP, 'eps'),
    'sd21': ({**UNET, 'CONTEXT_DIM': 48, 'NUM_HEADS_CHANNELS': 16, 'USE_LINEAR_IN_TRANSFORMER': True, 'NUM_RES_BLOCKS': 2}, OPENCLIP, 'v'),
    'sdxl': ({**UNET, **XL, 'CONTEXT_DIM': 80, 'ADM_IN_CHANNELS': 48 + 1536},
             {'NAME': 'GeneralConditioner', 'EMBEDDERS': [{**CLIP, 'LAYER': 'hidden', 'LAYER_IDX': 1}, {**OPENCLIP, **POOLED}]}, 'eps'),
    'refiner': ({**UNET, **XL, 'CONTEXT_DIM': 48, 'ADM_IN_CHANNELS': 48 + 1280, 'ATTENTION_RESOLUTIONS': [2], 'TRANSFORMER_DEPTH': 2},
                {'NAME': 'GeneralConditioner', 'EMBEDDERS': [{**OPENCLIP, **POOLED}],
                 'SIZES': ['original_size', 'crop_top_left', 'aesthetic_score']}, 'eps'),
}


def build(shape, seed=0):
    """A tiny model of this family, every weight random: a zero would hide a wrong name."""
    unet, text, prediction = SHAPES[shape]
    model = MODELS.build({'NAME': 'LatentDiffusion', 'DIFFUSION_MODEL': unet, 'FIRST_STAGE_MODEL': VAE, 'COND_STAGE_MODEL': text,
                          'PARAMETERIZATION': prediction, 'IMAGE_SIZE': 16, 'SIZE_FACTOR': 2})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.1 if p.ndim > 1 else 0.02
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (p.ndim == 1 and name.endswith('weight')))
    return model.eval()


@pytest.fixture(scope='module')
def models():
    return {shape: build(shape) for shape in SHAPES}


def blank(model):
    """The same network, all weights zero."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    return other


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert set(a) == set(b)
    assert not [n for n in a if not torch.equal(a[n], b[n])]


def compvis(model):
    """The names of a published single file, made by hand for SD1."""
    return {('model.diffusion_model.' + n[6:] if n.startswith('model.') else n): t for n, t in model.state_dict().items()}


average_of = StableDiffusion1().average_of


# ---------------------------------------------------------------- names
@pytest.mark.parametrize('shape', SHAPES)
def test_unet_names_go_to_diffusers_and_back(models, shape):
    ours = Weights.of(models[shape].model.state_dict())
    theirs = UNET_PART.to_theirs(ours)
    assert not UNET_PART.table(ours).unknown(ours, OURS) and not UNET_PART.table(theirs).unknown(theirs, THEIRS)
    assert len(theirs) == len(ours)
    assert {n: e.shape for n, e in UNET_PART.to_ours(theirs).entries.items()} == {n: e.shape for n, e in ours.entries.items()}


def test_autoencoder_names_go_to_diffusers_and_back(models):
    ours = Weights.of(models['sd15'].first_stage_model.state_dict())
    back = VAE_PART.to_ours(VAE_PART.to_theirs(ours))
    assert {n: back.shape(n) for n in back} == {n: ours.shape(n) for n in ours}


def test_attention_names_of_old_diffusers_are_known(models):
    model = models['sd15'].first_stage_model
    theirs = dict(VAE_PART.to_theirs(Weights.of(model.state_dict())))
    for new, old in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out.0', 'proj_attn')):
        theirs = {n.replace(f'attentions.0.{new}.', f'attentions.0.{old}.'): t for n, t in theirs.items()}
    back = VAE_PART.to_ours(Weights.of(theirs))
    assert all(torch.equal(back[n], t) for n, t in model.state_dict().items())


PUBLISHED = {
    'sd15': ({'CHANNEL_MULT': [1, 2, 4, 4], 'ATTENTION_RESOLUTIONS': [1, 2, 4], 'NUM_HEADS': 8, 'CONTEXT_DIM': 768},
             {'cross_attention_dim': 768}),
    'sdxl': ({'CHANNEL_MULT': [1, 2, 4], 'ATTENTION_RESOLUTIONS': [2, 4], 'NUM_HEADS_CHANNELS': 64, 'CONTEXT_DIM': 2048,
              'TRANSFORMER_DEPTH': [0, 2, 10], 'USE_LINEAR_IN_TRANSFORMER': True, 'NUM_CLASSES': 'sequential', 'ADM_IN_CHANNELS': 2816},
             {'cross_attention_dim': 2048, 'block_out_channels': (320, 640, 1280), 'attention_head_dim': (5, 10, 20),
              'transformer_layers_per_block': (1, 2, 10), 'use_linear_projection': True, 'addition_embed_type': 'text_time',
              'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
              'up_block_types': ('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
              'addition_time_embed_dim': 256, 'projection_class_embeddings_input_dim': 2816}),
}


@pytest.mark.slow
@pytest.mark.parametrize('shape', PUBLISHED)
def test_every_tensor_of_a_published_unet_has_its_place(shape):
    diffusers = pytest.importorskip('diffusers')
    ours, theirs = PUBLISHED[shape]
    with torch.device('meta'):
        mine = BACKBONES.build({**UNET, 'MODEL_CHANNELS': 320, 'NUM_RES_BLOCKS': 2, **ours})
        other = diffusers.UNet2DConditionModel(**theirs)
    weights = Weights.of(mine.state_dict())
    renamed = UNET_PART.to_theirs(weights)
    assert {n: renamed.shape(n) for n in renamed} == {n: tuple(t.shape) for n, t in other.state_dict().items()}


# ---------------------------------------------------------------- there and back
@pytest.mark.parametrize('shape', SHAPES)
def test_a_diffusers_folder_comes_back_bit_for_bit(models, shape, tmp_path):
    export_diffusers(models[shape], tmp_path)
    other = blank(models[shape])
    load_pretrained(other, tmp_path)
    assert_same(other, models[shape])


def test_a_network_that_a_file_fills_whole_is_built_without_random_numbers(models, tmp_path):
    export_single(models['sd15'], tmp_path / 'model.safetensors')
    before = torch.get_rng_state()
    filled = MODELS.build({**models['sd15'].cfg, 'PRETRAINED_MODEL': str(tmp_path / 'model.safetensors')})
    assert torch.equal(before, torch.get_rng_state())
    assert_same(filled, models['sd15'])


@pytest.mark.parametrize('shape', SHAPES)
def test_a_single_file_comes_back_bit_for_bit(models, shape, tmp_path):
    export_single(models[shape], tmp_path / 'model.safetensors')
    other = blank(models[shape])
    load_pretrained(other, tmp_path / 'model.safetensors')
    assert_same(other, models[shape])


def test_an_exported_file_opens_without_yaml_as_what_no_shape_shows(models, tmp_path):
    import scepter
    export_single(models['sd15'], tmp_path / 'model.safetensors')    # 4 heads, where Stable Diffusion 1 has 8
    pipe = scepter.load(tmp_path / 'model.safetensors', device='cpu')
    assert pipe.model.model.NUM_HEADS == 4 and pipe.model.SIZE_FACTOR == 2
    assert_same(pipe.model, models['sd15'])


@pytest.mark.parametrize('shape', SHAPES)
def test_diffusers_computes_the_same_with_what_we_export(models, shape, tmp_path):
    pytest.importorskip('diffusers')
    export_diffusers(models[shape], tmp_path)
    assert tool('parity').check_export(models[shape], tmp_path) <= 1e-5
    noted = TensorFile(tmp_path / 'unet' / 'diffusion_pytorch_model.safetensors').metadata
    assert 'relative difference to diffusers' in noted['scepter.parity'] and noted['modelspec.sai_model_spec'] == '1.0.1'


@pytest.mark.parametrize('shape', ['sd15', 'sd21', 'sdxl'])
def test_diffusers_computes_the_same_with_a_single_file(models, shape, tmp_path):
    pytest.importorskip('diffusers')
    export_single(models[shape], tmp_path / 'model.safetensors')
    assert tool('parity').check_export(models[shape], tmp_path / 'model.safetensors') <= 1e-5


def test_a_wrong_export_is_noticed(models, tmp_path):
    pytest.importorskip('diffusers')
    export_diffusers(models['sd15'], tmp_path)
    with pytest.raises(CheckpointError, match='something else'):
        tool('parity').check_export(blank(models['sd15']), tmp_path)


@pytest.mark.parametrize(('shape', 'pipeline'), [('sd15', 'StableDiffusionPipeline'), ('sd21', 'StableDiffusionPipeline'),
                                                 ('sdxl', 'StableDiffusionXLPipeline'), ('refiner', 'StableDiffusionXLImg2ImgPipeline')])
def test_the_pipelines_of_diffusers_open_a_folder_and_draw(models, shape, pipeline, tmp_path):
    diffusers = pytest.importorskip('diffusers')
    export_diffusers(models[shape], tmp_path)
    pipe = getattr(diffusers, pipeline).from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    start = {'image': torch.zeros(1, 3, 16, 16), 'strength': 1.0} if shape == 'refiner' else {'height': 16, 'width': 16}
    image = pipe('a cat', num_inference_steps=2, output_type='pt', **start).images
    assert image.shape[-3:] == (3, 16, 16) and image.isfinite().all()


@pytest.mark.parametrize('schedule', ['scaled_linear', 'cosine'])
@pytest.mark.parametrize('zero_snr', [False, True])
def test_the_scheduler_of_a_folder_has_our_levels(models, schedule, zero_snr):
    diffusers = pytest.importorskip('diffusers')
    cfg = {**models['sd21'].cfg, 'SCHEDULE_ARGS': {'NAME': schedule}, 'ZERO_TERMINAL_SNR': zero_snr}
    model = MODELS.build(cfg)
    theirs = diffusers.DDIMScheduler.from_config(write_config(model))
    ours = model.diffusion.alphas ** 2
    assert torch.allclose(theirs.alphas_cumprod.double(), torch.as_tensor(ours), atol=2e-6)
    assert theirs.final_alpha_cumprod == 1


def test_half_precision_halves_the_file(models, tmp_path):
    export_single(models['sd15'], tmp_path / 'full.safetensors')
    export_single(models['sd15'], tmp_path / 'half.safetensors', torch.float16)
    assert (tmp_path / 'half.safetensors').stat().st_size < 0.52 * (tmp_path / 'full.safetensors').stat().st_size
    other = blank(models['sd15'])
    load_pretrained(other, tmp_path / 'half.safetensors')
    assert all(torch.equal(a, b.half().float()) for a, b in zip(other.state_dict().values(), models['sd15'].state_dict().values()))


# ---------------------------------------------------------------- forms in which files are published
@pytest.mark.parametrize('shape', ['sd15', 'sd21', 'sdxl'])
def test_what_published_files_carry_beside_weights_is_known(models, shape, tmp_path):
    export_single(models[shape], tmp_path / 'plain.safetensors')
    tensors = dict(TensorFile(tmp_path / 'plain.safetensors'))
    tensors |= {name: torch.zeros(3) for name in BUFFERS}
    tensors |= {average_of(n): t for n, t in tensors.items() if n.startswith('model.')}
    for tower in ['conditioner.embedders.0.', 'conditioner.embedders.1.'] if shape == 'sdxl' else ['cond_stage_model.']:
        if f'{tower}transformer.text_model.final_layer_norm.weight' in tensors:
            tensors[f'{tower}transformer.text_model.embeddings.position_ids'] = torch.arange(77)[None]
        else:
            tensors |= {f'{tower}model.logit_scale': torch.zeros(()), f'{tower}model.attn_mask': torch.zeros(77, 77)}
    if shape == 'sd21':    # a whole tower: the last block and the projection serve no activation
        last = {n.replace('resblocks.1', 'resblocks.2'): t for n, t in tensors.items() if 'resblocks.1.' in n}
        tensors |= last | {'cond_stage_model.model.text_projection': torch.zeros(48, 48)}
    write_tensors(tmp_path / 'published.safetensors', tensors)
    other = blank(models[shape])
    load_pretrained(other, tmp_path / 'published.safetensors')
    assert_same(other, models[shape])


def test_what_is_not_known_is_an_error_even_if_it_looks_alike(models, tmp_path):
    for name in ('alphas_cumprod_next', 'cond_stage_model.transformer.text_model.position_ids', 'model_ema.other'):
        path = tmp_path / f'{name}.safetensors'
        write_tensors(path, compvis(models['sd15']) | {name: torch.zeros(1)})
        with pytest.raises(CheckpointError, match='1 unexpected'):
            load_pretrained(blank(models['sd15']), path)


def test_averages_of_a_single_file_are_taken_on_request(models, tmp_path):
    plain = compvis(models['sd15'])
    averages = {average_of(n): t + 1 for n, t in plain.items() if n.startswith('model.')}
    write_tensors(tmp_path / 'm.safetensors', plain | averages)
    name = 'model.out.2.bias'
    assert torch.equal(whole_model(read_weights(tmp_path / 'm.safetensors'))[name], models['sd15'].state_dict()[name])
    assert torch.equal(whole_model(read_weights(tmp_path / 'm.safetensors', use_ema=True))[name], models['sd15'].state_dict()[name] + 1)


def test_averages_of_a_diffusers_folder_are_taken_on_request(models, tmp_path):
    export_diffusers(models['sd15'], tmp_path)
    other = blank(models['sd15'])
    export_diffusers(other, tmp_path / 'ema')
    (tmp_path / 'ema' / 'unet').rename(tmp_path / 'unet_ema')
    found = whole_model(read_weights(tmp_path, use_ema=True))
    assert torch.equal(found['model.out.2.bias'], other.model.out[2].bias)
    assert torch.equal(found['first_stage_model.quant_conv.bias'], models['sd15'].first_stage_model.quant_conv.bias)


def test_a_ckpt_of_lightning_is_read_without_its_wrapper(models, tmp_path):
    class ModelCheckpoint:
        __module__ = 'pytorch_lightning.callbacks.model_checkpoint'
        __qualname__ = 'ModelCheckpoint'
    import sys
    import types
    module = types.ModuleType(ModelCheckpoint.__module__)
    module.ModelCheckpoint = ModelCheckpoint
    before = sys.modules.get(ModelCheckpoint.__module__)
    sys.modules[ModelCheckpoint.__module__] = module
    try:
        whole = {'state_dict': compvis(models['sd15']), 'global_step': 7, 'callbacks': {ModelCheckpoint: {'best': 0.1}}}
        torch.save(whole, tmp_path / 'm.ckpt')
    finally:
        if before is None:
            del sys.modules[ModelCheckpoint.__module__]
        else:
            sys.modules[ModelCheckpoint.__module__] = before
    other = blank(models['sd15'])
    load_pretrained(other, tmp_path / 'm.ckpt')
    assert_same(other, models['sd15'])


def test_shards_and_the_half_precision_variant_are_found(models, tmp_path):
    export_diffusers(models['sd15'], tmp_path, torch.float16)
    unet, vae = tmp_path / 'unet', tmp_path / 'vae'
    tensors = dict(TensorFile(unet / 'diffusion_pytorch_model.safetensors'))
    names = sorted(tensors)
    table = {n: f'diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors' for i, n in enumerate(names)}
    for shard in set(table.values()):
        write_tensors(unet / shard, {n: tensors[n] for n in names if table[n] == shard})
    (unet / 'diffusion_pytorch_model.safetensors').unlink()
    (unet / 'diffusion_pytorch_model.safetensors.index.json').write_text(json.dumps({'weight_map': table}))
    (vae / 'diffusion_pytorch_model.safetensors').rename(vae / 'diffusion_pytorch_model.fp16.safetensors')
    other = blank(models['sd15'])
    load_pretrained(other, tmp_path)
    assert torch.equal(other.model.out[2].weight, models['sd15'].model.out[2].weight.half().float())


@pytest.mark.parametrize('shard', ['../secret.safetensors', '/etc/secret.safetensors', '..', '', 'a/b.safetensors', 'a\0b', 'x' * 300])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard):
    write_tensors(tmp_path / 'secret.safetensors', {'a': torch.zeros(1)})
    (tmp_path / 'm').mkdir()
    (tmp_path / 'm' / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': shard}}))
    with pytest.raises(CheckpointError, match='file of the same folder'):
        read_weights(tmp_path / 'm')


@pytest.mark.parametrize('prefix', ['', 'transformer.text_model.', 'transformer.'])
def test_parts_load_from_the_whole_and_from_files_of_their_own(models, tmp_path, prefix):
    model = models['sd15']
    export_diffusers(model, tmp_path / 'folder')
    export_single(model, tmp_path / 'whole.safetensors')
    tower = {prefix + n: t for n, t in model.cond_stage_model.tower.state_dict().items()}
    write_tensors(tmp_path / 'tower.safetensors', tower)
    for registry, cfg, ours, alone in ((BACKBONES, SHAPES['sd15'][0], model.model, 'folder/unet'),
                                       (MODELS, VAE, model.first_stage_model, 'folder/vae'),
                                       (EMBEDDERS, CLIP, model.cond_stage_model, 'tower.safetensors')):
        for source in ('folder', 'whole.safetensors', alone):
            other = registry.build(cfg)
            load_pretrained(other, tmp_path / source)
            assert_same(other, ours)


def test_a_network_that_diffusers_has_not_goes_to_one_file_only(tmp_path):
    cfg = {'NAME': 'LatentDiffusion', 'DIFFUSION_MODEL': {**UNET, 'CONTEXT_DIM': None, 'NUM_HEADS': 4, 'RESBLOCK_UPDOWN': True},
           'FIRST_STAGE_MODEL': VAE, 'PARAMETERIZATION': 'flow', 'SCHEDULE_ARGS': {'NAME': 'shifted'}, 'SIZE_FACTOR': 2}
    model = MODELS.build(cfg)
    with pytest.raises(ValueError, match='diffusers has no'):
        tool('parity').export(model, tmp_path / 'folder')
    assert tool('parity').export(model, tmp_path / 'm.safetensors') is None
    other = blank(model)
    load_pretrained(other, tmp_path / 'm.safetensors')
    assert_same(other, model)


# ---------------------------------------------------------------- tools
@pytest.fixture
def config(tmp_path):
    """The YAML of the tiny SD1.5."""
    from scepter.core.config import Config
    unet, text, _ = SHAPES['sd15']
    model = {'NAME': 'LatentDiffusion', 'DIFFUSION_MODEL': unet, 'FIRST_STAGE_MODEL': VAE, 'COND_STAGE_MODEL': text, 'IMAGE_SIZE': 16,
             'SIZE_FACTOR': 2}
    (tmp_path / 'tiny.yaml').write_text(str(Config({'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MODEL': model}})))
    return str(tmp_path / 'tiny.yaml')


def test_the_tools_take_weights_from_form_to_form(models, tmp_path, config, monkeypatch):
    export_single(models['sd15'], tmp_path / 'a.safetensors')
    convert, export = tool('convert_weights'), tool('export')
    at = lambda name: str(tmp_path / name)
    assert convert.main([at('a.safetensors'), at('b'), '--cfg', config]) == 0
    assert convert.main([at('b'), at('c.safetensors'), '--cfg', config, '--no-check']) == 0
    assert convert.main([at('c.safetensors'), at('d'), '--cfg', config, '--to', 'scepter']) == 0
    assert export.main([at('d/step-00000000'), at('e.safetensors'), '--no-check']) == 0
    first, last = TensorFile(tmp_path / 'a.safetensors'), TensorFile(tmp_path / 'e.safetensors')
    assert set(first) == set(last) and all(torch.equal(first[n], last[n]) for n in first)


def test_the_tools_say_what_they_cannot_tell(models, tmp_path, config, capsys):
    convert = tool('convert_weights')
    export_single(models['sd15'], tmp_path / 'a.safetensors')
    assert convert.main([str(tmp_path / 'a.safetensors'), str(tmp_path / 'b')]) == 2
    assert convert.main([str(tmp_path / 'a.safetensors'), str(tmp_path / 'b'), '--to', 'single', '--cfg', config]) == 2
    assert convert.main([str(tmp_path / 'gone.safetensors'), str(tmp_path / 'b'), '--cfg', config]) == 4


# ---------------------------------------------------------------- what does not fit
def test_everything_that_does_not_fit_is_listed_and_nothing_changes(models):
    model = blank(models['sd15'])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    weights = dict(models['sd15'].state_dict())
    del weights['model.out.0.bias']
    weights['model.out.9.bias'] = torch.zeros(1)
    weights['model.out.2.weight'] = torch.zeros(5, 32, 3, 3)
    with pytest.raises(CheckpointError) as error:
        load_into(model, weights, source='file.ckpt')
    for part in ('file.ckpt', '1 missing', 'model.out.0.bias', '1 unexpected', 'model.out.9.bias',
                 'expected [4, 32, 3, 3], found [5, 32, 3, 3]'):
        assert part in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    load_into(model, weights, ignore_keys=['model.out.0.bias', 'model.out.9.*', '*.out.2.weight'])
    assert torch.equal(model.model.out[2].weight, before['model.out.2.weight'])
    assert torch.equal(model.model.out[2].bias, weights['model.out.2.bias'])


def test_an_ignored_name_is_exact_unless_it_is_a_glob(models):
    weights = dict(models['sd15'].state_dict())
    del weights['model.out.0.bias']
    with pytest.raises(CheckpointError):
        load_into(blank(models['sd15']), weights, ignore_keys=['model.out.0', 'out.0.bias'])


def test_each_tensor_is_read_once_and_only_when_everything_fits(models):
    reads = []
    plain = Weights.of(models['sd15'].state_dict())
    counting = plain.with_entries({n: e._replace(read=lambda n=n, e=e: reads.append(n) or e.read()) for n, e in plain.entries.items()})
    with pytest.raises(CheckpointError):
        load_into(blank(models['sd15']), counting.without(['model.out.0.bias']))
    assert reads == []
    load_into(blank(models['sd15']), counting)
    assert sorted(reads) == sorted(plain)


def test_a_model_on_the_meta_device_takes_its_weights(models):
    with torch.device('meta'):
        model = BACKBONES.build(SHAPES['sd15'][0])
    load_into(model, models['sd15'].model.state_dict())
    assert_same(model, models['sd15'].model)


def test_published_kinds_are_told_by_the_width_of_their_context():
    for width, kind in ((768, 'Stable Diffusion 1'), (1024, 'Stable Diffusion 2'), (2048, 'Stable Diffusion XL'), (99, None)):
        assert family_of(Weights.of({'model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight': torch.zeros(8, width)})) == kind
