"""scepter.load: every way to name weights opens what was meant, or says why not; what it draws tells how."""
from __future__ import annotations

import hashlib
import http.server
import logging
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import scepter
from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.disk.tensors import write_tensors
from scepter.core.errors import CheckpointError
from scepter.core.faults import ConfigError
from scepter.core.images import read_settings
from scepter.run_inference import main
from tests.models.oracles import randomize
from tests.twins import network, publish, twin


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """A tiny SD1.5: a run's folder, a published file, and the file of another autoencoder."""
    place = tmp_path_factory.mktemp('drawing')
    cfg = twin('sd15/sd15_512_full', place / 'tiny.yaml')
    model = network(cfg)
    for step in (1, 2):
        checkpoints.save(place / 'run' / 'checkpoints', step, {'model': model.state_dict()}, {'left_out': []}, cfg.dump())
    publish(model, place / 'sd15.safetensors')
    randomize(model.first_stage_model, seed=5)
    save_file(model.first_stage_model.state_dict(), place / 'vae.safetensors')
    return place


@pytest.fixture(scope='module')
def pipe(place):
    return scepter.load(place / 'run')


def said(function, caplog) -> str:
    with caplog.at_level(logging.INFO, logger='scepter'):
        logging.getLogger('scepter').addHandler(caplog.handler)
        try:
            function()
        finally:
            logging.getLogger('scepter').removeHandler(caplog.handler)
    return caplog.text


# ---------------------------------------------------------------- the door for Python
def test_three_lines_of_python_draw_a_picture_that_tells_how_it_was_made(pipe, tmp_path):
    pipe('a three').images[0].save(tmp_path / 'a.png')
    told = read_settings(tmp_path / 'a.png')
    assert Image.open(tmp_path / 'a.png').size == (64, 64)
    assert (told['prompt'], told['sample_steps'], told['seed'], told['sampler']) == ('a three', 2, 2023, 'ddim')    # 2: its SAMPLE_ARGS


def test_python_and_the_command_line_draw_the_same(pipe, place, tmp_path):
    mine = pipe('a fox', num_samples=2, seed=7, sampler='euler_ancestral').images
    words = ['--prompt', 'a fox', '--num_samples', '2', '--seed', '7', '--sampler', 'euler_ancestral', '--save_folder', str(tmp_path)]
    assert main(['--pretrained_model', str(place / 'run' / 'checkpoints' / 'step-00000002'), *words]) == 0
    for a, b in zip(mine, sorted(tmp_path.glob('*.png'))):
        assert np.array_equal(np.array(a), np.array(Image.open(b)))


def test_a_list_of_prompts_and_an_argument_of_forward_test_and_a_tensor(pipe, tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    kept = pipe(['a', 'b'], image=photo, denoising_strength=0.0, guide_scale=1.0)
    assert [r['prompt'] for r in kept.results] == ['a', 'b'] and torch.equal(kept.results[0]['image'], kept.results[1]['image'])
    tensor = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 127.5 - 1
    again = pipe('a', image=tensor, denoising_strength=0.0, guide_scale=1.0)
    assert torch.allclose(kept.results[0]['image'], again.results[0]['image'], atol=1e-4)
    with pytest.raises(ConfigError, match=r'does not take guide_scal; did you mean guide_scale\?'):
        pipe('a', guide_scal=3)
    for how in ({'guide_scale': float('nan')}, {'guide_scale': [1.0, float('inf')]}, {'sample_steps': 0}, {'denoising_strength': 2}):
        with pytest.raises(ConfigError, match=f'in what was asked for\n +{next(iter(how))}.*: expected .*at least'):
            pipe('a', **how)


def test_each_step_is_told_and_a_callback_that_raises_ends_the_drawing(pipe):
    seen = []
    pipe('a', sample_steps=3, on_step=lambda step, steps, x0: seen.append((step, steps, tuple(x0.shape))))
    assert seen == [(1, 3, (1, 4, 8, 8)), (2, 3, (1, 4, 8, 8)), (3, 3, (1, 4, 8, 8))]

    def stop(step, steps, x0):
        raise InterruptedError('enough')
    with pytest.raises(InterruptedError, match='enough'):
        pipe('a', on_step=stop)


# ---------------------------------------------------------------- what was meant
def test_a_runs_folder_means_its_newest_checkpoint_that_is_whole(place, tmp_path, caplog):
    shutil.copytree(place / 'run', tmp_path / 'run')
    (tmp_path / 'run' / 'checkpoints' / 'step-00000002' / 'model.safetensors').write_bytes(b'half')
    with caplog.at_level(logging.INFO):
        assert scepter.load(tmp_path / 'run').source == str(tmp_path / 'run' / 'checkpoints' / 'step-00000001')
    with pytest.raises(CheckpointError, match='nowhere'):
        scepter.load(tmp_path / 'nowhere')
    with pytest.raises(ConfigError, match=r'dtype .float8. is not one of auto, float32'):
        scepter.load(place / 'run', dtype='float8')


def test_a_checkpoint_in_a_store_is_opened_as_one_on_the_disk_is(place, pipe, tmp_path, monkeypatch):
    monkeypatch.setenv('SCEPTER_CACHE', str(tmp_path / 'cache'))
    for file in (place / 'run' / 'checkpoints' / 'step-00000002').iterdir():
        with scepter.FS.put_to(f'memory://drawn/step-00000002/{file.name}') as local:
            shutil.copy(file, local)
    far = scepter.load('memory://drawn/step-00000002')
    assert far.source == 'memory://drawn/step-00000002'
    assert torch.equal(far('a').results[0]['image'], pipe('a').results[0]['image'])


def test_a_single_file_of_ours_is_drawn_by_the_config_that_it_carries(place, pipe, tmp_path):
    text = checkpoints.load(place / 'run' / 'checkpoints' / 'step-00000002').config
    own = text.replace('PRETRAINED_MODEL: null', 'PRETRAINED_MODEL: /gone/with/the/run.safetensors') + 'IMPORTS: [boom.py]\n'
    assert '/gone/with/the/run.safetensors' in own
    (tmp_path / 'boom.py').write_text('raise SystemExit(99)')
    write_tensors(tmp_path / 'one.safetensors', pipe.model.state_dict(), {'format': 'pt', 'step': '2', 'config': own})
    one = scepter.load(tmp_path / 'one.safetensors')
    assert torch.equal(one('a').results[0]['image'], pipe('a').results[0]['image'])


def test_a_folder_of_diffusers_opens_without_a_config_which_can_be_kept(pipe, tmp_path, caplog):
    from scepter.weights import export_diffusers
    export_diffusers(pipe.model, tmp_path / 'folder')
    found = []
    text = said(lambda: found.append(scepter.load(tmp_path / 'folder')), caplog)
    how = {'sample_steps': 2, 'guide_rescale': 0.5, 'guide_scale': 7.5, 'sampler': 'ddim', 'discretization': 'trailing'}
    assert torch.allclose(found[0]('a', **how).results[0]['image'], pipe('a', **how).results[0]['image'], atol=1e-4)
    assert re.search(r'SOLVER.MODEL.SCALE_FACTOR = 0.18215 +vae/config.json', text)

    words = ['--pretrained_model', str(tmp_path / 'folder'), '--prompt', 'a', '--sample_steps', '1', '--num_samples', '1', '--save_folder']
    assert main([*words, str(tmp_path / 'out'), '--save_cfg', str(tmp_path / 'kept.yaml')]) == 0
    kept = Config.load(tmp_path / 'kept.yaml')
    assert (kept.SOLVER.MODEL.SCALE_FACTOR, kept.SOLVER.MODEL.PRETRAINED_MODEL) == (0.18215, str(tmp_path / 'folder'))
    assert torch.equal(scepter.load(cfg=tmp_path / 'kept.yaml').model.model.out[2].weight, pipe.model.model.out[2].weight)


@pytest.mark.parametrize('ignored', ['[]', '["first_stage_model.*"]'])
def test_a_parts_own_file_wins_over_the_whole_and_a_line_says_so(place, caplog, ignored):
    words = [f'SOLVER.MODEL.FIRST_STAGE_MODEL.PRETRAINED_MODEL={place / "vae.safetensors"}', f'SOLVER.MODEL.IGNORE_KEYS={ignored}']
    loaded = []
    text = said(lambda: loaded.append(scepter.load(place / 'sd15.safetensors', place / 'tiny.yaml', overrides=words)), caplog)
    own, whole = load_file(place / 'vae.safetensors'), load_file(place / 'sd15.safetensors')
    model = loaded[0].model
    assert torch.equal(model.first_stage_model.decoder.conv_in.weight, own['decoder.conv_in.weight'])
    assert torch.equal(model.model.out[2].weight, whole['model.diffusion_model.out.2.weight'])
    assert f'first_stage_model keeps the weights of {place / "vae.safetensors"}' in text


def test_what_no_file_filled_is_an_error_whatever_may_be_ignored(place, tmp_path):
    tensors = load_file(place / 'sd15.safetensors')
    save_file({n: t for n, t in tensors.items() if not n.startswith('first_stage_model.')}, tmp_path / 'bare.safetensors')
    half = load_file(place / 'vae.safetensors')
    save_file({n: t for n, t in half.items() if not n.startswith('decoder.')}, tmp_path / 'half.safetensors')
    ignored = 'SOLVER.MODEL.IGNORE_KEYS=["first_stage_model.*"]'
    with pytest.raises(CheckpointError, match=r'in no file that was named:\n  first_stage_model\.encoder'):
        scepter.load(tmp_path / 'bare.safetensors', place / 'tiny.yaml', overrides=[ignored])
    part = 'SOLVER.MODEL.FIRST_STAGE_MODEL'
    words = [ignored, f'{part}.PRETRAINED_MODEL={tmp_path / "half.safetensors"}', f'{part}.IGNORE_KEYS=["decoder.*"]']
    with pytest.raises(CheckpointError, match=r'in no file that was named:\n  first_stage_model\.decoder'):
        scepter.load(tmp_path / 'bare.safetensors', place / 'tiny.yaml', overrides=words)
    scepter.load(place / 'sd15.safetensors', place / 'tiny.yaml', overrides=words)    # what one file lacks the other gives


def test_a_config_without_weights_anywhere_draws_nothing(place, tmp_path, capsys):
    words = ['--cfg', str(place / 'tiny.yaml'), '--prompt', 'x', '--save_folder', str(tmp_path / 'out')]
    assert main(words) == 4
    assert 'are in no file that was named' in capsys.readouterr().err and not (tmp_path / 'out').exists()
    assert main([*words, f'SOLVER.MODEL.FIRST_STAGE_MODEL.PRETRAINED_MODEL={place / "vae.safetensors"}']) == 4
    assert main([*words, '--num_samples', '1', f'SOLVER.MODEL.PRETRAINED_MODEL={place / "sd15.safetensors"}']) == 0


def test_the_config_that_is_drawn_with_can_be_kept(place, tmp_path):
    words = ['--pretrained_model', str(place / 'run'), '--prompt', 'x', '--num_samples', '1', '--save_folder', str(tmp_path)]
    assert main([*words, '--save_cfg', str(tmp_path / 'kept.yaml'), 'SOLVER.MODEL.SCALE_FACTOR=0.3']) == 0
    assert Config.load(tmp_path / 'kept.yaml').SOLVER.MODEL.SCALE_FACTOR == 0.3


# ---------------------------------------------------------------- strangers
def test_nothing_is_fetched_for_a_config_that_came_with_the_weights_unless_it_is_allowed(place, tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(404)
        do_GET = do_HEAD
        log_message = print
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_address[1]}/vae.safetensors'
    try:
        cfg = Config.load(place / 'tiny.yaml', [f'SOLVER.MODEL.FIRST_STAGE_MODEL.PRETRAINED_MODEL={address}'])
        model = checkpoints.load(place / 'run' / 'checkpoints' / 'step-00000002').group('model')
        name = 'first_stage_model.quant_conv.weight'
        source = {'said': address, 'path': '/nowhere/vae.safetensors', 'address': address, 'files': [], 'size': 1, 'sha256': '0' * 64,
                  'near': '../vae.safetensors', 'part': 'first_stage_model', 'names': {name: list(model.pop(name).shape)},
                  'is_needed': False}
        stranger = checkpoints.save(tmp_path, 1, {'model': model}, {'left_out': [source]}, cfg.dump())
        with pytest.raises(CheckpointError, match=r'vae.safetensors was not fetched: the config that came with .*--allow_downloads'):
            scepter.load(stranger)
        assert asked == []
        with pytest.raises(CheckpointError, match=r'127.0.0.1, which is not of the public network'):
            scepter.load(stranger, allow_downloads=True)
        assert asked == []
        with pytest.raises(CheckpointError, match='404'):
            scepter.load(stranger, overrides=[f'SOLVER.MODEL.FIRST_STAGE_MODEL.PRETRAINED_MODEL={address}'])
        assert asked
        asked.clear()
        with pytest.raises(CheckpointError, match=r"was not fetched: .*anybody's word"):
            scepter.load(cfg=place / 'tiny.yaml', overrides=[f'SOLVER.MODEL.PRETRAINED_MODEL={stranger}'])    # as a training begins
        assert asked == []
    finally:
        server.shutdown()
        server.server_close()


# ---------------------------------------------------------------- what is kept
def test_no_picture_is_ever_overwritten(place, tmp_path):
    words = ['--pretrained_model', str(place / 'run'), '--prompt', 'a fox', '--num_samples', '2', '--grid', '--save_folder', str(tmp_path)]
    assert main(words) == main([*words, '--seed', '1']) == 0
    files = sorted(tmp_path.glob('0*.png'))
    assert [file.name[:5] for file in files] == ['00000', '00001', '00002', '00003']
    assert [read_settings(file)['seed'] for file in files] == [2023, 2023, 1, 1]
    assert sorted(file.name for file in tmp_path.glob('grid*')) == ['grid-2.png', 'grid.png']
    assert read_settings(tmp_path / 'grid-2.png')['seed'] == 1


def test_several_that_write_to_one_folder_lose_nothing(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from scepter.core.images import save_new
    (tmp_path / '00007-theirs.png').touch()
    pictures = {'.png': torch.zeros(3, 2, 2), '-train_n.png': torch.ones(3, 2, 2)}
    with ThreadPoolExecutor(4) as pool:
        files = [file for pair in pool.map(lambda i: save_new(pictures, tmp_path, 'a fox', {'i': i}), range(12)) for file in pair]
    assert len(set(files)) == 24 and min(int(file.name[:5]) for file in files) == 8
    assert sorted(read_settings(file)['i'] for file in files) == sorted([*range(12), *range(12)])


def test_other_programs_read_how_a_picture_was_made(pipe, place, tmp_path):
    prompt = 'a fox, "red": yes 日本'
    pipe(prompt, n_prompt='blurry', sampler='dpmpp_2m_karras', seed=7, guide_scale=3.5).images[0].save(tmp_path / 'a.png')
    *words, last = Image.open(tmp_path / 'a.png').text['parameters'].split('\n')
    assert words == [prompt, 'Negative prompt: blurry']
    # their own expression for one entry of the last line
    told = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    manifest = place / 'run' / 'checkpoints' / 'step-00000002' / 'MANIFEST.json'
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert told == {'Steps': '2', 'Sampler': 'DPM++ 2M', 'Schedule type': 'Karras', 'CFG scale': '3.5', 'Seed': '7', 'Size': '64x64',
                    'Model hash': digest[:10], 'Model': 'step-00000002', 'CFG Rescale': '0.5', 'Picture': '0',
                    'Version': f'scepter {scepter.__version__}'}
    assert read_settings(tmp_path / 'a.png')['weights'] == digest


# ---------------------------------------------------------------- networks of one's own
def test_a_network_that_draws_from_torchs_own_generator_obeys_the_seed(monkeypatch):
    from scepter import MODELS, TrainModule

    class Dice(TrainModule):
        def forward_test(self, num_samples=1, image_size=4):
            assert not torch.is_grad_enabled()
            return [{'image': torch.rand(3, image_size, image_size)} for _ in range(num_samples)]
    monkeypatch.setitem(MODELS._entries, 'Dice', Dice)
    pipe = scepter.load(cfg={'SOLVER': {'MODEL': {'NAME': 'Dice'}, 'SAMPLE_ARGS': {'SEED': 5, 'SAMPLER': 'ddim'}}})    # nothing to load
    before = torch.get_rng_state()
    one, two = pipe(num_samples=3).results, pipe(num_samples=3).results
    assert all(torch.equal(a['image'], b['image']) for a, b in zip(one, two)) and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(one[0]['image'], one[1]['image'])
    with pytest.raises(ConfigError, match='does not take a prompt'):
        pipe('a three')
