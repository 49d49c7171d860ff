"""A checkpoint knows what it leaves out: every way to name weights x {resume, draw, train further, file replaced, folder moved}."""
from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import scepter
import scepter.components
from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.env import seed_everything, we
from scepter.core.errors import CheckpointError
from scepter.core.faults import ConfigError
from scepter.core.registry import EMBEDDERS, MODELS, SOLVERS
from scepter.models.embedders.base import BaseEmbedder
from scepter.models.restore import restore
from scepter.weights import export_diffusers, marks
from tests.models.oracles import randomize
from tests.twins import three_images
from tiny import CLIP, autoencoder, unet

MODEL = {'NAME': 'LatentDiffusion', 'IMAGE_SIZE': 8, 'SIZE_FACTOR': 2, 'DIFFUSION_MODEL': unet(1, NUM_HEADS=1, CONTEXT_DIM=32),
         'FIRST_STAGE_MODEL': autoencoder(1, 1), 'COND_STAGE_MODEL': {**CLIP, 'DEPTH': 1, 'HEADS': 1}}


def config(work_dir: Path, model: dict[str, Any] | None = None, **solver: Any) -> Config:
    cfg = Config({'ENV': {'DEVICE': 'cpu'}, 'SOLVER': {
        'NAME': 'LatentDiffusionSolver', 'WORK_DIR': str(work_dir), 'MAX_STEPS': 1, 'MODEL': MODEL,
        'OPTIMIZER': {'NAME': 'AdamW', 'LEARNING_RATE': 1e-2},
        'TRAIN_DATA': {'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(IMAGES), 'BATCH_SIZE': 1, 'NUM_WORKERS': 0,
                       'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': 8}]},
        'TRAIN_HOOKS': [{'NAME': 'CheckpointHook', 'INTERVAL': 0}], **solver}})
    for path, word in (model or {}).items():
        cfg.override([f'SOLVER.MODEL.{path}={word}'])
    return cfg


def run(cfg: Config, force: bool = False) -> Any:
    """The solver after its run, in this process."""
    we.seed, we.stop_signal = 7, 0
    seed_everything(7, 'start')
    solver = SOLVERS.build(cfg.SOLVER)
    solver.experiment, solver.is_forced = cfg, force
    solver.set_up()
    solver.solve()
    return solver


def network(seed: int = 0) -> nn.Module:
    return randomize(MODELS.build(Config(MODEL)), seed=seed)


def save_whole(model: nn.Module, file: Path) -> None:
    save_file({name: value.clone() for name, value in model.state_dict().items()}, file)


def save_tower(model: nn.Module, folder: Path) -> None:
    """A text model and its tokenizer."""
    export_diffusers(model, folder.with_name('whole'))
    shutil.copytree(folder.with_name('whole') / 'text_encoder', folder)
    shutil.copytree(folder.with_name('whole') / 'tokenizer', folder, dirs_exist_ok=True)


def save_shards(model: nn.Module, folder: Path) -> None:
    """The autoencoder in two files and their index."""
    export_diffusers(model, folder.with_name('whole'))
    shutil.copytree(folder.with_name('whole') / 'vae', folder)
    file = folder / 'diffusion_pytorch_model.safetensors'
    tensors = load_file(file)
    file.unlink()
    shards = {f'diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors': dict(list(tensors.items())[i::2]) for i in range(2)}
    for name, part in shards.items():
        save_file(part, folder / name)
    table = {name: shard for shard, part in shards.items() for name in part}
    (folder / f'{file.name}.index.json').write_text(json.dumps({'weight_map': table}))


def save_vae(model: nn.Module, file: Path) -> None:
    save_whole(model.first_stage_model, file)


def save_checkpoint(model: nn.Module, folder: Path) -> None:
    """In several files."""
    path = checkpoints.save(folder / 'checkpoints', 5, {'model': model.state_dict()}, {'left_out': []}, config(folder).dump(), limit=2e5)
    assert (path / 'model-00002.safetensors').exists()


def save_chain(model: nn.Module, folder: Path) -> None:
    """A run that began from a file and leaves its frozen parts there: the file is what the next run relies on."""
    save_whole(model, folder.with_name('base.safetensors'))
    if not folder.exists():
        run(config(folder, {'PRETRAINED_MODEL': folder.with_name('base.safetensors')}))


def save_single(model: nn.Module, file: Path) -> None:
    from tools.checkpoint import main
    save_checkpoint(model, file.with_name('full'))
    assert main(['to-single', str(file.with_name('full')), str(file)]) == 0


@dataclass
class Way:
    """How a config names weights: what is written for it, the words, and the file that then holds what is left out."""
    save: Callable[[nn.Module, Path], None]
    name: str                                       # what `save` writes to
    keys: tuple[str, ...] = ('PRETRAINED_MODEL',)
    hook: dict[str, Any] | None = None
    relies_on: str = ''                             # default: name
    prefix: str = ''                                # of the address of a server

    @property
    def file(self) -> str:
        return self.relies_on or self.name


VAE, TEXT = 'FIRST_STAGE_MODEL.PRETRAINED_MODEL', 'COND_STAGE_MODEL.PRETRAINED_MODEL'
WAYS = {
    'a single file': Way(save_whole, 'base.safetensors'),
    'a diffusers folder': Way(export_diffusers, 'base'),
    'a sharded folder of a part': Way(save_shards, 'vae', (VAE,)),
    "a part's own file": Way(save_vae, 'vae.safetensors', (VAE,)),
    'a folder of a text tower': Way(save_tower, 'clip', (TEXT,)),
    'a checkpoint': Way(save_checkpoint, 'full', relies_on='full/checkpoints/step-00000005'),
    "a run's folder": Way(save_checkpoint, 'full'),
    'a checkpoint that leaves parts out': Way(save_chain, 'chain', relies_on='base.safetensors'),
    'a part out of a checkpoint that leaves it out': Way(save_chain, 'chain', (VAE,), relies_on='base.safetensors'),
    'a file of to-single': Way(save_single, 'single.safetensors'),
    'a hook': Way(save_whole, 'base.safetensors', hook={}),
    'a hook for a part': Way(save_vae, 'vae.safetensors', hook={'PART': 'first_stage_model'}),
    'an http address': Way(save_whole, 'base.safetensors', prefix='http'),
    'a repository of the hub': Way(save_whole, 'base.safetensors', prefix='hub'),
}


@dataclass
class Run:
    """A run that has made one step, with all weights it ended with; words are relative to its folder, which is the working one."""
    root: Path
    way: Way
    config: Callable[..., Config]
    weights: dict[str, Tensor]

    @property
    def checkpoint(self) -> Path:
        return self.root / 'run' / 'checkpoints' / 'step-00000001'


@pytest.fixture(scope='module', autouse=True)
def images(tmp_path_factory) -> None:
    global IMAGES
    IMAGES = three_images(tmp_path_factory.mktemp('data') / 'images')


@pytest.fixture(scope='module')
def store(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A folder and its address on this machine's loopback."""
    folder = tmp_path_factory.mktemp('store')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


# the code of these is that of other rows
ALIKE = ("a run's folder", 'a file of to-single', 'a hook')


ROWS = [pytest.param(way, id=name, marks=pytest.mark.slow if name in ALIKE else ()) for name, way in WAYS.items()]
# an address is relative to nothing, and does not move
in_a_folder = pytest.mark.parametrize('done', [row for row in ROWS if not row.values[0].prefix], indirect=True)


@pytest.fixture(scope='module', params=ROWS)
def done(request, tmp_path_factory, store) -> Iterator[Run]:
    way, root = request.param, tmp_path_factory.mktemp('way') / 'project'
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv('SCEPTER_CACHE', str(root / 'cache'))
        place, word = root, way.name
        if way.prefix == 'http':
            place, word = store[0], f'{store[1]}/{way.name}'
        elif way.prefix == 'hub':
            place, word = hub_snapshot(root, patch), f'hf://org/model@{way.name}'
        way.save(network(), place / way.name)
        hooks = [{'NAME': 'CheckpointHook', 'INTERVAL': 0}]
        if way.hook is not None:
            hooks += [{'NAME': 'PretrainedHook', 'PRETRAINED_MODEL': word, **way.hook}]
        words = dict.fromkeys(way.keys if way.hook is None else (), word)

        def of_run(work_dir: str = 'run', **solver: Any) -> Config:
            return config(Path(work_dir), words, TRAIN_HOOKS=hooks, **solver)

        solver = run(of_run())
        yield Run(root, way, of_run, {name: value.clone() for name, value in solver.model.state_dict().items()})


def hub_snapshot(root: Path, patch: pytest.MonkeyPatch) -> Path:
    """The folder of one revision in the hub's own cache, without a network."""
    constants = pytest.importorskip('huggingface_hub.constants')
    patch.setattr(constants, 'HF_HUB_CACHE', str(root / 'hub'))
    patch.setattr(constants, 'HF_HUB_OFFLINE', True)
    model, revision = root / 'hub' / 'models--org--model', 'a' * 40
    (model / 'refs').mkdir(parents=True)
    (model / 'refs' / 'main').write_text(revision)
    (model / 'snapshots' / revision).mkdir(parents=True)
    return model / 'snapshots' / revision


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


# ---------------------------------------------------------------- the table
def test_what_is_left_out_is_recorded_and_the_rest_is_saved(done):
    checkpoint = checkpoints.load(done.checkpoint)
    left_out = [name for source in checkpoint.state['left_out'] for name in source['names']]
    held = set(checkpoint.tensors('model'))
    assert left_out and held.isdisjoint(left_out) and held | set(left_out) == done.weights.keys()
    assert all(len(source['sha256']) == 64 and Path(source['path']).is_absolute() for source in checkpoint.state['left_out'])


def test_a_resume_has_every_weight_again(done, tmp_path):
    shutil.copytree(done.root / 'run', tmp_path / 'run')
    solver = run(done.config(str(tmp_path / 'run'), RESUME_FROM='auto'))
    assert same(solver.model, done.weights)


def test_it_is_drawn_from_any_folder(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same(restore(done.checkpoint), done.weights)
    assert same(restore(done.root / 'run'), done.weights)


@in_a_folder
def test_another_file_at_the_same_relative_place_is_not_mistaken_for_it(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done.way.save(network(seed=1), tmp_path / done.way.name)
    assert same(restore(done.checkpoint), done.weights)
    shutil.copytree(done.root / 'run', tmp_path / 'run')
    assert same(run(done.config(RESUME_FROM='auto')).model, done.weights)


def test_it_is_where_the_next_run_begins(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {TEXT: done.root / done.way.name} if TEXT in done.way.keys else {}
    further = run(config(tmp_path / 'further', {**sizes, 'PRETRAINED_MODEL': done.checkpoint}))
    frozen = [name for name in done.weights if not name.startswith('model.')]
    assert all(torch.equal(further.model.state_dict()[name], done.weights[name]) for name in frozen)
    assert same(restore(tmp_path / 'further'), further.model.state_dict())


def test_another_file_in_its_place_is_an_error_with_both_digests(done, replaced, tmp_path):
    sources = [source for source in checkpoints.load(done.checkpoint).state['left_out'] if source['names']]
    with pytest.raises(CheckpointError, match='to-single') as drawn:
        restore(done.checkpoint)
    shutil.copytree(done.root / 'run', tmp_path / 'run')
    with pytest.raises(CheckpointError, match='to-single') as resumed:
        run(done.config(str(tmp_path / 'run'), RESUME_FROM='auto'))
    for error in (drawn, resumed):
        assert any(f'sha256 {source["sha256"]} expected' in str(error.value) for source in sources)
        assert 'another file, sha256 ' in str(error.value)


@pytest.fixture
def replaced(done, store) -> Iterator[None]:
    """Weights of other values where those of the run's beginning were."""
    place = {'': done.root, 'http': store[0], 'hub': done.root / 'hub' / 'models--org--model' / 'snapshots' / ('a' * 40)}[done.way.prefix]
    kept, cache = done.root / 'kept', done.root / 'cache'
    moved = {place / done.way.file: kept, **({cache: done.root / 'old-cache'} if cache.exists() else {})}
    for path, aside in moved.items():
        path.rename(aside)
    done.way.save(network(seed=1), place / done.way.name)
    from scepter.core.stores import FS
    FS._fetched.clear()
    yield
    for path, aside in moved.items():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        aside.rename(path)


@in_a_folder
def test_a_project_that_moved_is_drawn_and_resumed(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = done.root.with_name('moved')
    done.root.rename(moved)
    try:
        assert same(restore(moved / 'run'), done.weights)
        monkeypatch.chdir(moved)
        shutil.copytree('run', 'again')
        assert same(run(done.config('again', RESUME_FROM='auto')).model, done.weights)
        shutil.rmtree('again')
    finally:
        monkeypatch.chdir(tmp_path)
        moved.rename(done.root)


# ---------------------------------------------------------------- one file of all
@pytest.mark.parametrize('way', ['a single file', 'a folder of a text tower', "a part's own file", 'a hook'])
def test_a_single_file_needs_no_other_and_is_drawn_by_the_config_that_it_carries(way, tmp_path, monkeypatch):
    from tools.checkpoint import main
    monkeypatch.chdir(tmp_path)
    Path('files').mkdir()
    WAYS[way].save(network(), tmp_path / 'files' / WAYS[way].name)
    word = f'files/{WAYS[way].name}'
    hooks = [{'NAME': 'CheckpointHook', 'INTERVAL': 0}, {'NAME': 'PretrainedHook', 'PRETRAINED_MODEL': word}][:2 - (way != 'a hook')]
    solver = run(config(Path('run'), {} if way == 'a hook' else dict.fromkeys(WAYS[way].keys, word), TRAIN_HOOKS=hooks))
    assert main(['to-single', 'run', 'one.safetensors']) == 0
    shutil.rmtree('files')
    shutil.rmtree('run')
    drawn = scepter.load('one.safetensors')
    assert same(drawn.model, solver.model.state_dict())
    assert drawn.model.tokenizer(['a red wall']).equal(solver.model.tokenizer(['a red wall']))
    further = run(config(Path('further'), {'PRETRAINED_MODEL': 'one.safetensors'}))
    assert torch.equal(further.model.state_dict()[NAME], solver.model.state_dict()[NAME])


# ---------------------------------------------------------------- what is held after all
@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    """A file of the whole network, in the working folder."""
    monkeypatch.chdir(tmp_path)
    save_whole(network(), tmp_path / 'base.safetensors')
    return tmp_path / 'base.safetensors'


def held(run_dir: Path) -> set[str]:
    return set(checkpoints.load(run_dir).tensors('model'))


def built(model: dict[str, Any], **solver: Any) -> nn.Module:
    return MODELS.build(config(Path('run'), model, **solver).SOLVER.MODEL)


NAME = 'first_stage_model.encoder.conv_in.weight'


def test_what_was_written_to_after_it_was_loaded_is_held(base):
    model = built({'PRETRAINED_MODEL': base})
    assert NAME in model.left_out()
    model.first_stage_model.load_state_dict(network(seed=1).first_stage_model.state_dict())
    assert not any(name.startswith('first_stage_model') for name in model.left_out())


def test_another_parameter_in_the_place_of_one_that_was_loaded_is_held(base):
    model = built({'PRETRAINED_MODEL': base})
    layer = model.first_stage_model.encoder.conv_in
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    layer.weight.add_(1).mul_(2)    # written to as often as the one before
    assert NAME not in model.left_out() and 'first_stage_model.encoder.conv_in.bias' in model.left_out()


def test_other_types_and_layouts_of_the_weights_are_left_out_and_restored_alike(base):
    how = {'PARAM_DTYPE': 'bfloat16', 'CHANNELS_LAST': True}
    solver = run(config(Path('run'), {'PRETRAINED_MODEL': base}, **how))
    assert NAME not in held(Path('run'))
    resumed = run(config(Path('run'), {'PRETRAINED_MODEL': base}, RESUME_FROM='auto', **how))
    assert same(resumed.model, solver.model.state_dict())
    assert torch.equal(restore('run').state_dict()[NAME], load_file(base)[NAME])


def test_what_was_trained_is_held_though_it_is_frozen_now(base):
    cfg = {'PRETRAINED_MODEL': base, 'FREEZE': '[model.out.*]'}
    run(config(Path('run'), {'PRETRAINED_MODEL': base}))
    resumed = run(config(Path('run'), cfg, RESUME_FROM='auto', MAX_STEPS=2, OPTIMIZER={'NAME': 'AdamW', 'LEARNING_RATE': 1e-2}), force=True)
    assert 'model.out.2.weight' in held(Path('run')) and same(restore('run'), resumed.model.state_dict())
    model = built({'PRETRAINED_MODEL': base})
    model.left_out()
    model.model.requires_grad_(False)    # in the middle of a run: a fused optimizer tells nobody that it wrote
    assert not any(name.startswith('model.') for name in model.left_out())


def test_what_ignore_keys_left_as_it_was_built_is_held(base):
    tensors = load_file(base)
    save_file({name: value for name, value in tensors.items() if name != NAME}, base)
    solver = run(config(Path('run'), {'PRETRAINED_MODEL': base, 'IGNORE_KEYS': f'[{NAME}]'}))
    assert NAME in held(Path('run')) and same(restore('run'), solver.model.state_dict())


def test_a_file_that_was_replaced_before_the_first_checkpoint_is_not_relied_on(base, caplog):
    model = built({'PRETRAINED_MODEL': base})
    save_whole(network(seed=1), base)
    assert model.left_out() == {}
    assert NAME in model.trained_state() and model.sources('run') == []


def test_big_files_are_hashed_once_by_a_run(base, monkeypatch):
    run(config(Path('run'), {'PRETRAINED_MODEL': base}))
    hashed = []
    digest = marks.atomic.digest
    monkeypatch.setattr(marks.atomic, 'digest', lambda file: hashed.append(Path(file).name) or digest(file))
    marks.known_digests.clear()
    run(config(Path('run'), {'PRETRAINED_MODEL': base}, RESUME_FROM='auto', MAX_STEPS=3,
               TRAIN_HOOKS=[{'NAME': 'CheckpointHook', 'INTERVAL': 1}]))
    assert hashed.count('base.safetensors') == 1


def test_another_word_in_the_config_is_refused_on_a_resume_and_taken_for_a_drawing(base):
    run(config(Path('run'), {'PRETRAINED_MODEL': base}))
    save_vae(network(seed=1), Path('vae.safetensors'))
    other = config(Path('run'), {'PRETRAINED_MODEL': base, VAE: 'vae.safetensors'}, RESUME_FROM='auto')
    with pytest.raises(CheckpointError, match=r'beside other weights .* sha256 \w{64}, and comes from vae.safetensors, sha256 \w{64}'):
        run(other)
    drawn = restore('run', other)
    assert torch.equal(drawn.state_dict()[NAME], load_file('vae.safetensors')[NAME.removeprefix('first_stage_model.')])


def test_a_parts_own_file_wins_over_that_of_the_whole_also_after_a_resume(base):
    save_vae(network(seed=1), Path('vae.safetensors'))
    cfg = {'PRETRAINED_MODEL': base, VAE: 'vae.safetensors'}
    solver = run(config(Path('run'), cfg))
    assert torch.equal(solver.model.state_dict()[NAME], load_file('vae.safetensors')[NAME.removeprefix('first_stage_model.')])
    assert same(restore('run'), solver.model.state_dict())
    assert same(run(config(Path('run'), cfg, RESUME_FROM='auto')).model, solver.model.state_dict())


def test_no_value_of_the_environment_stands_in_a_checkpoint(base, monkeypatch):
    monkeypatch.setenv('PLACE', str(base.parent))
    Path('run.yaml').write_text(str(config(Path('run'), {'PRETRAINED_MODEL': 'BASE'})).replace('BASE', '${PLACE}/base.safetensors'))
    run(Config.load('run.yaml'))
    source, = checkpoints.load('run').state['left_out']
    assert source['said'] == '${PLACE}/base.safetensors' and NAME in source['names']
    monkeypatch.delenv('PLACE')
    assert NAME in restore('run').state_dict()


def test_an_unknown_part_of_a_hook_is_named(base):
    hook = {'NAME': 'PretrainedHook', 'PRETRAINED_MODEL': str(base), 'PART': 'first_stage_modle'}
    with pytest.raises(ConfigError, match='has no part first_stage_modle; did you mean first_stage_model'):
        run(config(Path('run'), TRAIN_HOOKS=[hook]))


@pytest.mark.parametrize('place', ['run', 'run/checkpoints'])
def test_a_lost_file_is_found_beside_the_checkpoint_and_half_of_one_is_not(base, place, tmp_path_factory):
    solver = run(config(Path('run'), {'PRETRAINED_MODEL': base}))
    whole = tmp_path_factory.mktemp('alone')
    shutil.move('run', whole)
    shutil.move(base, whole / place)
    assert same(restore(whole / 'run'), solver.model.state_dict())
    (whole / place / base.name).write_bytes((whole / place / base.name).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match='another file, sha256'):
        restore(whole / 'run')


class OwnReader(BaseEmbedder):
    """Reads its file by itself, as the quick start's embedder does: nobody knows what of it came from there."""

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.table = nn.Embedding(8, 32)
        self.table.load_state_dict(torch.load(cfg.PRETRAINED_MODEL))
        self.freeze()

    def tokenize(self, prompts: list[str]) -> Tensor:
        return torch.zeros(len(prompts), 4, dtype=torch.int64)

    def encode_text(self, tokens: Tensor, tokenizer: Any = None, append_sentence_embedding: bool = False) -> Tensor:
        return self.table(tokens)


def test_a_part_that_reads_its_file_by_itself_is_held_and_finds_the_file_from_any_folder(base, monkeypatch, tmp_path_factory):
    monkeypatch.setitem(EMBEDDERS._entries, 'OwnReader', OwnReader)
    torch.save(nn.Embedding(8, 32).state_dict(), 'table.pt')
    cfg = config(Path('run'))
    cfg.SOLVER.MODEL.COND_STAGE_MODEL = {'NAME': 'OwnReader', 'PRETRAINED_MODEL': 'table.pt'}
    solver = run(cfg)
    assert 'cond_stage_model.table.weight' in held(Path('run'))
    monkeypatch.chdir(tmp_path_factory.mktemp('elsewhere'))
    assert same(restore(base.parent / 'run'), solver.model.state_dict())


# ---------------------------------------------------------------- test runs
def drawn_in_a_test_run(**solver: Any) -> Any:
    cfg = config(Path('test'), MODE=['test'], SAMPLE_ARGS={'IMAGE_SIZE': 8, 'SAMPLE_STEPS': 1}, **solver)
    cfg.SOLVER.TEST_DATA = cfg.SOLVER.TRAIN_DATA
    return run(cfg).model


def test_a_test_run_has_the_weights_of_resume_from_averaged_ones_where_there_are(base):
    hooks = [{'NAME': 'CheckpointHook', 'INTERVAL': 0}, {'NAME': 'ModelEmaHook', 'BETA': 0.5}]
    run(config(Path('run'), {'PRETRAINED_MODEL': base}, TRAIN_HOOKS=hooks, MAX_STEPS=2))
    checkpoint = checkpoints.load('run')
    weights = drawn_in_a_test_run(RESUME_FROM='run').state_dict()
    assert torch.equal(weights['model.out.2.weight'], checkpoint.tensors('ema')['model.out.2.weight'])
    assert not torch.equal(weights['model.out.2.weight'], checkpoint.tensors('model')['model.out.2.weight'])
    assert torch.equal(weights[NAME], load_file(base)[NAME])


@pytest.mark.parametrize('words, message', [({}, 'in no file that was named'), ({'RESUME_FROM': 'auto'}, 'in no file that was named'),
                                            ({'RESUME_FROM': 'latest'}, 'holds no checkpoint'),
                                            ({'RESUME_FROM': '/nowhere'}, '/nowhere does not exist')])
def test_a_test_run_without_weights_draws_nothing(base, words, message):
    with pytest.raises(CheckpointError, match=message) as error:
        drawn_in_a_test_run(**words)
    assert error.value.exit_code == 4 and not Path('test/test_results').exists()


@pytest.mark.parametrize('resume_from', [None, 'auto'])
def test_a_test_run_takes_the_files_that_the_config_names(base, resume_from):
    model = config(Path('run'), {'PRETRAINED_MODEL': base}).SOLVER.MODEL
    assert same(drawn_in_a_test_run(MODEL=model, RESUME_FROM=resume_from), load_file(base))
