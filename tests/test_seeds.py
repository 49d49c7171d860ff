"""The quick start works as written: its Python blocks run unedited, train, and sample; so do its commands."""
from __future__ import annotations

import functools
import itertools
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import scepter
import scepter.components
from scepter.core.config import Config
from scepter.core.images import read_settings
from scepter.core.registry import EMBEDDERS, MODELS, SOLVERS
from tiny import autoencoder, unet

ROOT = Path(__file__).resolve().parents[1]
UNET, VAE = unet(1, 1, NUM_HEADS=2, CONTEXT_DIM=32), autoencoder(1, 1, 1, 1)


@pytest.fixture(scope='module')
def clip_folder(tmp_path_factory) -> Path:
    """A tiny CLIP text model and tokenizer in the published layout, in the place of the pretrained one."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from scepter.weights.vocabulary import Vocabulary
    folder = tmp_path_factory.mktemp('clip')
    Vocabulary.shipped().save(folder)
    CLIPTextModel(CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                 vocab_size=49408, bos_token_id=49406, eos_token_id=49407)).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def document():
    """The document's classes: its blocks as they stand, the loose methods joined to the first block's class."""
    text = (ROOT / 'docs' / 'quick_start.md').read_text(encoding='utf-8')
    blocks = [textwrap.dedent(b) for b in re.findall(r'```python\n(.*?)```', text, re.DOTALL)]
    assert len(blocks) == 5
    shipped = MODELS.get('LatentDiffusion'), EMBEDDERS.get('FrozenCLIPEmbedder'), SOLVERS.get('LatentDiffusionSolver')
    names: dict = {name: getattr(scepter, name) for name in scepter.__all__}
    from transformers import CLIPTextModel, CLIPTokenizer
    names |= {'random': random, 'torch': torch, 'CLIPTextModel': CLIPTextModel, 'CLIPTokenizer': CLIPTokenizer}
    names['__name__'] = 'quick_start'
    loose: list[dict] = []
    try:
        for block in blocks:
            before = dict(names)
            exec(compile(block, 'quick_start.md', 'exec'), names)  # noqa: S102  the document itself is the test
            loose.append({k: v for k, v in names.items() if before.get(k) is not v and k != '__builtins__'})
        network, embedder, solver = names['LatentDiffusion'], names['FrozenCLIPEmbedder'], names['LatentDiffusionSolver']
        methods = {k: v for found in loose[1:3] for k, v in found.items() if callable(v)}
        assert set(methods) == {'forward_train', 'forward_test'}
        # what '# Other module definition.' leaves out comes from the shipped class, which stands behind the document's
        joined = type('LatentDiffusion', (network, shipped[0]), methods)
        assert MODELS.get('LatentDiffusion') is network and EMBEDDERS.get('FrozenCLIPEmbedder') is embedder
        yield joined, embedder, solver
    finally:
        for registry, obj in zip((MODELS, EMBEDDERS, SOLVERS), shipped):
            registry._entries[obj.__name__] = obj


def model_config(clip_folder: Path) -> Config:
    return Config({'NAME': 'LatentDiffusion', 'DIFFUSION_MODEL': UNET, 'FIRST_STAGE_MODEL': VAE, 'P_ZERO': 0.5,
                   'COND_STAGE_MODEL': {'NAME': 'FrozenCLIPEmbedder', 'PRETRAINED_MODEL': str(clip_folder)},
                   'LOSS': {'NAME': 'ReconstructLoss'}})


def test_the_documents_network_trains_two_steps_and_samples(document, clip_folder):
    network, embedder, _ = document
    torch.manual_seed(0)
    model = network(model_config(clip_folder))
    assert type(model.cond_stage_model) is embedder
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-3)
    before = model.model.out[2].weight.detach().clone()
    for _ in range(2):
        result = model.forward_train(image=torch.rand(2, 3, 64, 64) * 2 - 1, prompt=['a woman', 'a man'])
        result['loss'].backward()
        optimizer.step()
    assert set(result['probe_data']['prompt']) <= {'a woman', 'a man', ''}
    assert not torch.equal(before, model.model.out[2].weight)
    drawn = model.eval().forward_test(prompt=['a woman'], sample_steps=2)
    assert drawn[0]['image'].shape == (3, 512, 512)
    assert (drawn[0]['prompt'], drawn[0]['n_prompt']) == ('a woman', '')
    assert 0 <= drawn[0]['image'].min() <= drawn[0]['image'].max() <= 1


def test_the_documents_embedder_agrees_with_the_shipped_one(document, clip_folder):
    _, embedder, _ = document
    cfg = {'NAME': 'FrozenCLIPEmbedder', 'PRETRAINED_MODEL': str(clip_folder)}
    from scepter.models.embedders.clip import FrozenCLIPEmbedder as Shipped
    theirs, ours = embedder(Config(cfg)), Shipped(Config(cfg))
    prompts = ['a woman', 'Ünïcode, 日本 and 🎨', '']
    assert torch.equal(theirs.tokenize(prompts), ours.tokenize(prompts))
    assert torch.allclose(theirs.encode(prompts), ours.encode(prompts), atol=1e-5)
    assert not any(p.requires_grad for p in theirs.parameters())
    assert 'NAME: FrozenCLIPEmbedder' in embedder.get_config_template()


def test_the_documents_solver_solves(document, clip_folder, tmp_path):
    solver = document[2](Config({'NAME': 'LatentDiffusionSolver', 'WORK_DIR': str(tmp_path), 'MODE': [],
                                 'MODEL': model_config(clip_folder)}))
    solver.set_up()
    solver.solve()
    assert type(solver.model).__name__ == 'LatentDiffusion'


def test_the_documents_sampling_code_runs_in_every_door(document, clip_folder, tmp_path, monkeypatch, capsys):
    """Two steps with probes and an evaluation that draws, of the shipped recipe shrunken; then run_inference draws from what was saved."""
    from scepter.run_inference import main as draw
    from scepter.run_train import main as train
    from tests.twins import three_images
    drawn = []

    class Watched(document[0]):
        def forward_test(self, *args, **kwargs):
            results = super().forward_test(*args, **kwargs)
            drawn.append((kwargs, results))
            return results
    functools.update_wrapper(Watched.forward_test, document[0].forward_test)
    monkeypatch.setitem(MODELS._entries, 'LatentDiffusion', Watched)
    monkeypatch.setitem(SOLVERS._entries, 'LatentDiffusionSolver', scepter.solvers.diffusion.LatentDiffusionSolver)
    images = three_images(tmp_path / 'images')
    data = {'DATA_FOLDER': str(images), 'BATCH_SIZE': 2, 'NUM_WORKERS': 0, 'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': 64}]}
    (tmp_path / 'tiny.yaml').write_text(str(Config({
        '_BASE_': str(ROOT / 'examples' / 'sd15' / 'sd15_512_full.yaml'), 'ENV': {'DEVICE': 'cpu'},
        'SOLVER': {'WORK_DIR': str(tmp_path / 'work'), 'MAX_STEPS': 2, 'DTYPE': 'float32', 'PARAM_DTYPE': 'float32', 'EVAL_INTERVAL': 2,
                   'SAMPLE_ARGS': {'SAMPLE_STEPS': 1, 'IMAGE_SIZE': 64, 'GUIDE_SCALE': 2.0},
                   'TRAIN_HOOKS': [{'NAME': 'ProbeDataHook', 'INTERVAL': 2, 'PROMPTS': ['a red wall', 'a blue wall']},
                                   {'NAME': 'CheckpointHook', 'INTERVAL': 2}],
                   'EVAL_HOOKS': [{'NAME': 'ProbeDataHook'}],
                   'MODEL': {**model_config(clip_folder), 'IMAGE_SIZE': 64, 'PRETRAINED_MODEL': None},
                   'TRAIN_DATA': data, 'EVAL_DATA': {'NAME': 'ImageTextFolderDataset', **data, 'BATCH_SIZE': 1}}})), encoding='utf-8')
    assert train(['--cfg', str(tmp_path / 'tiny.yaml')]) == 0, capsys.readouterr().err
    asked = [kwargs for kwargs, _ in drawn]
    assert asked[0]['prompt'] == ['a red wall', 'a blue wall'] and len(asked) == 1 + 3
    assert all(a.keys() <= {'prompt', 'seed', 'sample_steps', 'guide_scale', 'sampler', 'guide_rescale', 'discretization'} for a in asked)
    assert all(isinstance(a['prompt'], list) and type(a['seed']) is int for a in asked)

    words = ['--pretrained_model', str(tmp_path / 'work'), '--prompt', 'a woman', '--n_prompt', '', '--save_folder', str(tmp_path / 'out')]
    assert draw([*words, '--num_samples', '3', '--batch_size', '2', '--seed', '5']) == 0, capsys.readouterr().err
    asked = [kwargs for kwargs, _ in drawn[4:]]
    assert [(a['prompt'], a['n_prompt'], a['seed']) for a in asked] == [(['a woman'] * 2, [''] * 2, 5), (['a woman'], [''], 7)]
    assert [a['guide_scale'] for a in asked] == [2.0, 2.0]
    files = sorted((tmp_path / 'out').glob('*.png'))
    assert [read_settings(f)['sample_steps'] for f in files] == [1, 1, 1]
    pictures = [r['image'] for _, results in drawn[4:] for r in results]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(pictures, 2))

    assert draw([*words, '--image_size', '64']) == 2
    assert 'forward_test does not take image_size' in capsys.readouterr().err and len(files) == len(list((tmp_path / 'out').iterdir()))


# ------------------------------------------------------------------------------------------------ the commands
@pytest.fixture(scope='module')
def trained(tmp_path_factory, clip_folder) -> Path:
    """The shipped Stable Diffusion 1.5 recipe, shrunken, trained for two steps by the document's command in spawn mode."""
    from PIL import Image
    folder = tmp_path_factory.mktemp('run')
    (folder / 'images').mkdir()
    for i, colour in enumerate(('red', 'green', 'blue')):
        Image.new('RGB', (80, 64), colour).save(folder / 'images' / f'{i}.png')
        (folder / 'images' / f'{i}.txt').write_text(f'a {colour} wall')
    (folder / 'tiny.yaml').write_text(str(Config({
        '_BASE_': str(ROOT / 'examples' / 'sd15' / 'sd15_512_full.yaml'),
        'ENV': {'NPROC': 2, 'DEVICE': 'cpu', 'THREADS': 1},
        'SOLVER': {'WORK_DIR': str(folder / 'work'), 'MAX_STEPS': 2, 'DTYPE': 'float32', 'PARAM_DTYPE': 'float32',
                   'SAMPLE_ARGS': {'IMAGE_SIZE': 64, 'SAMPLE_STEPS': 2},
                   'MODEL': {'DIFFUSION_MODEL': UNET, 'FIRST_STAGE_MODEL': VAE, 'IMAGE_SIZE': 64, 'PRETRAINED_MODEL': None,
                             'COND_STAGE_MODEL': {'PRETRAINED_MODEL': str(clip_folder)}},
                   'TRAIN_DATA': {'DATA_FOLDER': str(folder / 'images'), 'BATCH_SIZE': 1, 'NUM_WORKERS': 0,
                                  'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': 64}]}}})), encoding='utf-8')
    done = command('run_train.py', '--cfg', str(folder / 'tiny.yaml'))
    assert done.returncode == 0, done.stderr
    return folder / 'work' / 'checkpoints' / 'step-00000002'


def command(script: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-W', 'ignore', f'scepter/{script}', *words], cwd=ROOT, capture_output=True, text=True,
                          timeout=240)


def test_the_training_command_leaves_a_checkpoint_of_what_was_trained(trained):
    from scepter.core.disk import checkpoints
    loaded = checkpoints.load(trained)
    names = set(loaded.tensors('model'))
    assert any(n.startswith('model.input_blocks') for n in names)
    assert loaded.state['world_size'] == 2
    assert not any(n.startswith('cond_stage_model') for n in names)     # frozen, and its own folder has it


def test_the_inference_command_takes_that_checkpoint_without_further_flags(trained, tmp_path):
    done = command('run_inference.py', '--prompt', 'a woman', '--n_prompt', '', '--num_samples', '4', '--pretrained_model', str(trained),
                   '--save_folder', str(tmp_path))
    assert done.returncode == 0, done.stderr
    files = sorted(tmp_path.glob('*.png'))
    assert len(files) == 4 and done.stdout.splitlines() == [str(f) for f in files]
    settings = read_settings(files[2])
    assert settings['prompt'] == 'a woman' and settings['number'] == 2 and settings['size'] == [64, 64]
    assert settings['sample_steps'] == 2      # from SAMPLE_ARGS: a flag that was not given overrides nothing


def test_a_picture_does_not_depend_on_its_batch(trained, tmp_path):
    from PIL import Image, ImageChops
    words = ('--prompt', 'a wall', '--num_samples', '3', '--pretrained_model', str(trained), '--save_folder')
    assert command('run_inference.py', *words, str(tmp_path / 'all')).returncode == 0
    assert command('run_inference.py', *words, str(tmp_path / 'one'), '--batch_size', '1', '--ema', 'off').returncode == 0
    for a, b in zip(sorted((tmp_path / 'all').iterdir()), sorted((tmp_path / 'one').iterdir())):
        assert a.name == b.name
        assert max(high for _, high in ImageChops.difference(Image.open(a), Image.open(b)).getextrema()) <= 1
