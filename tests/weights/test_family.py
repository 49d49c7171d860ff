"""A family of one's own is one file of names: a toy goes there and back through every form, and what is of no family is told why."""
from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import scepter.components  # noqa: F401  (registers)
from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.disk.tensors import TensorFile
from scepter.core.errors import CheckpointError
from scepter.core.registry import MODELS
from scepter.core.schema import param
from scepter.models.base import TrainModule
from scepter.models.restore import restore
from scepter.weights import (
    FAMILIES,
    Family,
    Part,
    Row,
    Weights,
    describe,
    export_diffusers,
    export_single,
    load_pretrained,
    read_weights,
    register,
    weights_for,
)
from scepter.weights.tables import OURS, THEIRS, Table
from tests.weights.test_weights import assert_same, blank, build, compvis


# ---------------------------------------------------------------- the network, and the thirty lines that let its files in and out
class ToyNet(TrainModule):
    """Two blocks with q, k and v apart.    [B, L, D] -> [B, L, D]"""

    WIDTH: int = param(8, 'Channels.', least=1)
    DEPTH: int = param(2, 'Blocks.', least=1)
    PRETRAINED_MODEL: str | None = param(None, 'Its weights.')

    def __init__(self, cfg, logger=None):
        super().__init__(cfg, logger=logger)
        self.stem = nn.Linear(3, self.WIDTH)
        self.blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(self.WIDTH, self.WIDTH) for name in ('q', 'k', 'v', 'out')})
                                    for _ in range(self.DEPTH))
        self.proj = nn.Parameter(torch.randn(self.WIDTH, 5))
        if self.PRETRAINED_MODEL is not None:
            self.load_pretrained(self.PRETRAINED_MODEL)


class Toy(Family):
    name = 'Toy'
    tells = ('stem.weight', 'blocks.0.q.weight', 'proj')
    single = (
        Row('stem', 'net.embed'), Row('proj', 'net.head.weight', 'transposed'), Row('blocks.{n}.out', 'net.layers.{n}.proj_out'),
        *(Row(tuple(f'blocks.{{n}}.{c}.{leaf}' for c in 'qkv'), f'net.layers.{{n}}.qkv.{leaf}') for leaf in ('weight', 'bias')))
    parts = (Part('transformer', '', (
        Row('stem', 'x_embedder'), Row('proj', 'proj_out.weight', 'transposed'), Row('blocks.{n}.out', 'transformer_blocks.{n}.to_out.0'),
        *(Row(f'blocks.{{n}}.{c}', f'transformer_blocks.{{n}}.to_{c}') for c in 'qkv'))),)
    pipelines = ('ToyPipeline',)

    def read_folder(self, configs, folder, name):
        model = {'NAME': 'ToyNet', 'WIDTH': configs['transformer']['hidden_size'], 'DEPTH': configs['transformer']['num_layers']}
        return {'SOLVER': {'NAME': self.solver, 'MODEL': model}}

    def read_single(self, weights, whole, name):
        depth = sum(n.endswith('.q.weight') for n in whole)
        return {'SOLVER': {'NAME': self.solver, 'MODEL': {'NAME': 'ToyNet', 'WIDTH': whole.shape('stem.weight')[0], 'DEPTH': depth}}}

    def write_configs(self, model, folder):
        (folder / 'transformer').mkdir(parents=True)
        (folder / 'transformer' / 'config.json').write_text(json.dumps({'hidden_size': model.WIDTH, 'num_layers': model.DEPTH}))
        (folder / 'model_index.json').write_text(json.dumps({'_class_name': 'ToyPipeline'}))


@pytest.fixture(scope='module', autouse=True)
def known():
    before = list(FAMILIES)
    register(Toy)
    MODELS.register_class()(ToyNet)
    yield
    FAMILIES[:] = before


@pytest.fixture
def toy():
    return toy_of(WIDTH=16, DEPTH=3)


def toy_of(**sizes):
    torch.manual_seed(0)
    return MODELS.build({'NAME': 'ToyNet', **sizes}).eval()


def bits(model):
    return {name: value.half().float() for name, value in model.state_dict().items()}


def shard(folder, file):
    """Part a file of a folder in three, with the index that names them."""
    tensors = load_file(folder / file)
    names, stem = sorted(tensors), file.removesuffix('.safetensors')
    table = {name: f'{stem}-{i % 3}.safetensors' for i, name in enumerate(names)}
    for shard in set(table.values()):
        save_file({n: tensors[n] for n in names if table[n] == shard}, folder / shard)
    (folder / f'{file}.index.json').write_text(json.dumps({'weight_map': table}))
    (folder / file).unlink()


# ---------------------------------------------------------------- there and back
def test_a_single_file_has_the_published_names_and_comes_back_bit_for_bit(toy, tmp_path):
    export_single(toy, tmp_path / 'm.safetensors')
    file = TensorFile(tmp_path / 'm.safetensors')

    assert set(file) == {'net.embed.weight', 'net.embed.bias', 'net.head.weight',
                         *(f'net.layers.{i}.{m}.{leaf}' for i in range(3) for m in ('qkv', 'proj_out') for leaf in ('weight', 'bias'))}
    assert file.slots['net.layers.2.qkv.weight'].shape == (48, 16) and file.slots['net.head.weight'].shape == (5, 16)
    assert torch.equal(file['net.head.weight'], toy.proj.T)
    assert torch.equal(file['net.layers.1.qkv.weight'], torch.cat([toy.blocks[1][c].weight for c in 'qkv']))
    save_file(dict(file), tmp_path / 'bare.safetensors')    # as a stranger publishes it: without the config that ours carries
    for path in (tmp_path / 'm.safetensors', tmp_path / 'bare.safetensors'):
        other = blank(toy)
        load_pretrained(other, path)
        assert_same(other, toy)
    assert_same(restore(tmp_path / 'm.safetensors'), toy)
    assert_same(MODELS.build(describe(tmp_path / 'bare.safetensors').config.SOLVER.MODEL), toy)


@pytest.mark.parametrize('is_sharded', [False, True])
def test_a_folder_comes_back_bit_for_bit_and_opens_without_a_config(toy, is_sharded, tmp_path):
    export_diffusers(toy, tmp_path)
    if is_sharded:
        shard(tmp_path / 'transformer', 'diffusion_pytorch_model.safetensors')
    for path in (tmp_path, tmp_path / 'transformer'):    # the whole, and its one part alone
        other = blank(toy)
        load_pretrained(other, path)
        assert_same(other, toy)
    assert_same(MODELS.build(describe(tmp_path).config.SOLVER.MODEL), toy)


@pytest.mark.parametrize('form', ['single', 'folder', 'sharded'])
def test_half_precision_comes_back_as_the_rounded_weights(toy, form, tmp_path):
    path = tmp_path / 'm.safetensors' if form == 'single' else tmp_path / 'm'
    (export_single if form == 'single' else export_diffusers)(toy, path, torch.float16)
    if form == 'sharded':
        shard(path / 'transformer', 'diffusion_pytorch_model.safetensors')
    other = blank(toy)
    load_pretrained(other, path)

    assert all(torch.equal(value, bits(toy)[name]) for name, value in other.state_dict().items())


def test_a_checkpoint_of_ours_holds_it_and_is_exported_and_opened_again(toy, tmp_path):
    cfg = Config({'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MODEL': {'NAME': 'ToyNet', 'WIDTH': 16, 'DEPTH': 3}}})
    checkpoints.save(tmp_path / 'run', 0, {'model': toy.state_dict()}, {'left_out': []}, cfg.dump())
    first = restore(tmp_path / 'run')
    export_diffusers(first, tmp_path / 'folder')
    second = MODELS.build({'NAME': 'ToyNet', 'WIDTH': 16, 'DEPTH': 3, 'PRETRAINED_MODEL': str(tmp_path / 'folder')})
    export_single(second, tmp_path / 'm.safetensors')

    assert_same(first, toy)
    assert_same(restore(tmp_path / 'm.safetensors'), toy)


def test_what_the_other_library_has_no_place_for_is_refused(toy, tmp_path):
    toy.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r'no place for extra.weight and 1 more'):
        export_diffusers(toy, tmp_path)


def test_a_network_of_no_family_keeps_its_names_in_one_file_and_has_no_folder(toy, tmp_path, monkeypatch):
    monkeypatch.setattr('scepter.weights.family.FAMILIES', [family for family in FAMILIES if family.name != 'Toy'])
    export_single(toy, tmp_path / 'm.safetensors')

    assert set(TensorFile(tmp_path / 'm.safetensors')) == set(toy.state_dict())
    assert_same(restore(tmp_path / 'm.safetensors'), toy)
    with pytest.raises(ValueError, match='diffusers has no ToyNet'):
        export_diffusers(toy, tmp_path / 'folder')


def test_the_docs_show_this_very_family():
    docs = Path(__file__).parents[2] / 'docs' / 'weights.md'

    assert f'@register\n{inspect.getsource(Toy)}```' in docs.read_text('utf-8') and len(inspect.getsource(Toy).splitlines()) <= 30


# ---------------------------------------------------------------- tables
def test_a_table_reads_both_ways_and_the_longest_row_wins():
    table = Table([Row('a', 'x'), Row('a.{n}.b', 'y.{n}'), Row('old', 'new'), Row('old', 'newer')])
    weights = Weights.of({name: torch.zeros(1) for name in ('a.w', 'a.3.b.w', 'a.3.c.w', 'old.w', 'other')})
    there = table.to_theirs(weights)

    assert list(there) == ['x.w', 'y.3.w', 'x.3.c.w', 'new.w', 'other']
    assert list(table.to_ours(there)) == list(weights)
    assert list(table.to_ours(Weights.of({'newer.w': torch.zeros(1)}))) == ['old.w']
    assert table.unknown(weights, OURS) == ['other'] and table.unknown(['x.w', 'y.b', 'xx'], THEIRS) == ['y.b', 'xx']


def test_stacked_names_of_which_one_is_absent_are_a_wrong_shape_not_a_guess(toy, tmp_path):
    export_diffusers(build('sd21'), tmp_path)
    file = tmp_path / 'text_encoder' / 'model.safetensors'
    lost = 'text_model.encoder.layers.0.self_attn.k_proj.weight'
    save_file({n: t for n, t in load_file(file).items() if n != lost}, file)
    with pytest.raises(CheckpointError, match=r'in_proj_weight: expected \[144, 48\], found \[96, 48\]'):
        load_pretrained(build('sd21'), tmp_path)


# ---------------------------------------------------------------- recognition
def test_each_shipped_family_is_told_by_its_names_in_every_form(tmp_path):
    from scepter.weights.family import told
    for shape, name in (('sd15', 'Stable Diffusion 1'), ('sd21', 'Stable Diffusion 2'), ('sdxl', 'Stable Diffusion XL'),
                        ('refiner', "Stable Diffusion XL's refiner")):
        model = build(shape)
        export_single(model, tmp_path / f'{shape}.safetensors')
        export_diffusers(model, tmp_path / shape)
        forms = {'single': read_weights(tmp_path / f'{shape}.safetensors'), 'folder': read_weights(tmp_path / shape),
                 'ours': Weights.of(model.state_dict())}
        assert {form: (match.family.name, match.form) for form, w in forms.items() if (match := told(w, shape))} == \
            {form: (name, form) for form in forms}


def test_a_file_of_no_family_is_told_the_two_nearest_and_what_they_lack(tmp_path):
    tensors = {name.replace('cond_stage_model.', 'words.'): t for name, t in compvis(build('sd15')).items()}
    tensors |= {f'text_encoder.{name}': t for name, t in {'stem.weight': torch.zeros(1)}.items()}    # passes for a text tower
    save_file(tensors, tmp_path / 'm.safetensors')
    with pytest.raises(CheckpointError) as error:
        describe(tmp_path / 'm.safetensors')
    said = str(error.value)

    assert 'of no model that opens here' in said and 'A family of your own' in said
    assert 'Stable Diffusion 1 as a single file: lacks cond_stage_model.transformer.text_model.final_layer_norm.weight; ' in said
    assert 'Stable Diffusion 2 as a single file: lacks cond_stage_model.model.ln_final.weight; ' in said
    assert 'names, e.g. text_encoder.stem.weight' in said and said.count('lacks') == 2


def test_two_models_in_one_file_are_refused_by_both_names(tmp_path):
    save_file(compvis(build('sd15')) | dict(_single(build('sdxl'), tmp_path)), tmp_path / 'glued.safetensors')
    with pytest.raises(CheckpointError, match='several models, Stable Diffusion 1 and Stable Diffusion XL'):
        describe(tmp_path / 'glued.safetensors')
    with pytest.raises(CheckpointError, match='unexpected'):
        load_pretrained(build('sd15'), tmp_path / 'glued.safetensors')


def test_weights_of_another_family_are_called_by_its_name(toy, tmp_path):
    _single(build('sd21'), tmp_path)
    with pytest.raises(CheckpointError, match='nearest to:\n  Stable Diffusion 2 as a single file: all that tells it is there'):
        load_pretrained(toy, tmp_path / 'published.safetensors')


def test_a_family_takes_the_place_of_one_of_its_name():
    before = len(FAMILIES)
    register(Toy)
    assert len(FAMILIES) == before and sum(family.name == 'Toy' for family in FAMILIES) == 1


def test_a_truncated_file_is_refused_and_nothing_changes(toy, tmp_path):
    export_single(toy, tmp_path / 'm.safetensors')
    whole = (tmp_path / 'm.safetensors').read_bytes()
    (tmp_path / 'm.safetensors').write_bytes(whole[:-7])
    other = blank(toy)
    with pytest.raises(CheckpointError, match=r'm\.safetensors'):
        load_pretrained(other, tmp_path / 'm.safetensors')
    assert not any(value.any() for name, value in other.state_dict().items())


# ---------------------------------------------------------------- pairs
@pytest.mark.parametrize('shape', ['sd21', 'sdxl'])
def test_half_precision_in_shards_with_averages_fills_a_network_and_a_part(shape, tmp_path):
    model, averaged = build(shape), build(shape, seed=1)
    export_diffusers(model, tmp_path / 'm', torch.float16)
    export_diffusers(averaged, tmp_path / 'ema', torch.float16)
    shutil.move(tmp_path / 'ema' / 'unet', tmp_path / 'm' / 'unet_ema')
    ema = tmp_path / 'm' / 'unet_ema' / 'diffusion_pytorch_model.safetensors'
    save_file({n: t for n, t in load_file(ema).items() if not n.startswith('conv_out.')}, ema)
    for part, file in (('unet', 'diffusion_pytorch_model'), ('unet_ema', 'diffusion_pytorch_model'), ('text_encoder_2', 'model')):
        if (tmp_path / 'm' / part).is_dir():
            shard(tmp_path / 'm' / part, f'{file}.safetensors')
    whole, part = blank(model), blank(model).model
    with pytest.raises(CheckpointError, match='2 missing'):
        load_pretrained(whole, tmp_path / 'm', use_ema=True)
    load_pretrained(whole, tmp_path / 'm', ['model.out.2.*'], use_ema=True)
    load_pretrained(part, tmp_path / 'm')
    expected = {name: (averaged if name.startswith('model.') else model).state_dict()[name].half().float() for name in whole.state_dict()}
    expected |= {f'model.out.2.{leaf}': torch.zeros_like(expected[f'model.out.2.{leaf}']) for leaf in ('weight', 'bias')}

    assert all(torch.equal(value, expected[name]) for name, value in whole.state_dict().items())
    assert all(torch.equal(value, bits(model.model)[name]) for name, value in part.state_dict().items())


def test_averages_of_a_single_file_stand_for_the_weights_of_a_part_too(tmp_path):
    plain = compvis(build('sd15'))
    averages = {f'model_ema.{name[6:].replace(".", "")}': t + 1 for name, t in plain.items() if name.startswith('model.')}
    save_file(plain | averages, tmp_path / 'm.safetensors')
    part = blank(build('sd15')).model
    load_pretrained(part, tmp_path / 'm.safetensors', use_ema=True)

    assert torch.equal(part.out[2].bias, plain['model.diffusion_model.out.2.bias'] + 1)


def test_a_frozen_part_that_a_folder_gave_is_left_out_and_found_again(toy, tmp_path):
    export_diffusers(toy, tmp_path / 'published', torch.float16)
    cfg = Config({'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MODEL': {
        'NAME': 'ToyNet', 'WIDTH': 16, 'DEPTH': 3, 'PRETRAINED_MODEL': str(tmp_path / 'published')}}})
    model = MODELS.build(cfg.SOLVER.MODEL)
    model.blocks.requires_grad_(False)
    state = {'left_out': model.sources(tmp_path / 'run')}
    checkpoints.save(tmp_path / 'run', 0, {'model': model.trained_state()}, state, cfg.dump())

    assert set(model.trained_state()) == {'stem.weight', 'stem.bias', 'proj'}
    assert_same(restore(tmp_path / 'run'), model)
    other = blank(toy)
    load_pretrained(other, tmp_path / 'run')
    assert_same(other, model)
    shutil.move(tmp_path / 'published', tmp_path / 'elsewhere')
    with pytest.raises(CheckpointError, match='leaves out'):
        restore(tmp_path / 'run')


def test_names_that_fit_as_they_are_stay():
    ours = Weights.of(blank(build('sdxl')).state_dict())
    assert set(weights_for(list(ours), ours)) == set(ours)


def _single(model, tmp_path):
    """Its published names, and a file of them without our config."""
    export_single(model, tmp_path / 'carrying.safetensors')
    tensors = dict(TensorFile(tmp_path / 'carrying.safetensors'))
    save_file(tensors, tmp_path / 'published.safetensors')
    return tensors
