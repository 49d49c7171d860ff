"""run_inference: every flag does what it says, and what cannot be drawn is refused with a message and the promised exit code."""
from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.images import read_settings
from scepter.models.unfilled import unfilled
from scepter.run_inference import main
from tests.models.oracles import randomize
from tests.twins import EXAMPLES, network, publish, twin

ROOT = EXAMPLES.parent


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """What `draw` draws with: a checkpoint of the tiny SD1.5 whose averaged weights are others, and published files."""
    folder = tmp_path_factory.mktemp('inference')
    cfg = twin('sd15/sd15_512_full', folder / 'tiny.yaml')
    model = network(cfg)
    average = randomize(copy.deepcopy(model.model), seed=1)
    groups = {'model': model.state_dict(), 'ema': {f'model.{name}': p for name, p in average.named_parameters()}}
    checkpoints.save(folder, 0, groups, {'left_out': []}, cfg.dump())
    publish(model, folder / 'sd15.safetensors')
    publish(network(twin('sdxl/sdxl_1024', folder / 'xl.yaml')), folder / 'sdxl.safetensors')
    noise = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 72), Image.Resampling.BICUBIC).save(folder / 'photo.png')
    mask = Image.new('L', (64, 72))
    mask.paste(255, (0, 0, 32, 72))
    mask.save(folder / 'mask.png')
    return folder


@pytest.fixture
def draw(folder, tmp_path, capsys):
    """draw('--flag', value, ...) -> the pictures' files. A checkpoint, a prompt and one picture unless the words say otherwise."""
    def run(*words: object) -> list[Path]:
        flags = {'--pretrained_model': folder / 'step-00000000', '--num_samples': 1, '--save_folder': tmp_path / 'out'}
        if '--prompt' not in words and '--prompt_file' not in words:
            flags['--prompt'] = 'a red fox'
        given = [word for flag, value in flags.items() if flag not in words for word in (flag, value)]
        assert main([str(word) for word in (*given, *words)]) == 0, capsys.readouterr().err
        return [Path(line) for line in capsys.readouterr().out.splitlines()]
    return run


def pixels(file: Path) -> np.ndarray:
    return np.array(Image.open(file)).astype(int)


def difference(a: Path, b: Path) -> int:
    """The largest, of 255."""
    return np.abs(pixels(a) - pixels(b)).max()


@pytest.fixture
def other(draw, tmp_path):
    """other(words) -> how far the first picture of these words is from that of none."""
    plain = draw('--save_folder', tmp_path / 'plain')[0]
    return lambda *words: difference(plain, draw(*words)[0])


# ---------------------------------------------------------------- what to draw
def test_each_prompt_of_a_file_is_drawn_so_many_times_behind_the_flags_own(draw, tmp_path):
    (tmp_path / 'prompts.txt').write_text('\ufeffein Fuchs\n\n  日本 🎨 \n', encoding='utf-8')
    files = draw('--prompt', 'a fox', '--prompt_file', tmp_path / 'prompts.txt', '--num_samples', 2)
    assert [read_settings(file)['prompt'] for file in files] == ['a fox'] * 2 + ['ein Fuchs'] * 2 + ['日本 🎨'] * 2
    assert [int(file.name[:5]) for file in files] == list(range(6))


def test_a_grid_has_a_row_for_each_prompt(draw, tmp_path):
    (tmp_path / 'prompts.txt').write_text('a\nb\n')
    *files, grid = draw('--prompt_file', tmp_path / 'prompts.txt', '--num_samples', 3, '--grid', '--image_size', '64,72')
    assert len(files) == 6 and grid.name == 'grid.png'
    assert pixels(grid).shape == (2 * 66, 3 * 74, 3)
    assert np.array_equal(pixels(grid)[67:131, 75:147], pixels(files[4]))    # second row, second column
    assert read_settings(grid)['prompts'] == ['a', 'b']


@pytest.mark.parametrize('words', [
    ['--n_prompt', 'blurry'], ['--sampler', 'euler_ancestral'], ['--sample_steps', 3], ['--discretization', 'leading'], ['--seed', 1],
    ['--guide_scale', 2.0], ['--guide_rescale', 0.0], ['--prompt', 'a lighthouse'], ['--ema', 'off'], ['SOLVER.MODEL.SCALE_FACTOR=0.3']],
    ids=lambda words: words[0])
def test_a_flag_has_a_say(other, words):
    assert other(*words) > 1


@pytest.mark.parametrize('words', [
    ['--n_prompt', ''], ['--sampler', 'ddim'], ['--sample_steps', 2], ['--discretization', 'trailing'], ['--seed', 2023],
    ['--guide_scale', 7.5], ['--guide_rescale', 0.5], ['--image_size', 64], ['--ema', 'on'], ['--dtype', 'float32'], ['--batch_size', 1]],
    ids=lambda words: words[0])
def test_a_flag_that_says_what_is_so_changes_nothing(other, words):
    assert other(*words) == 0


def test_a_flag_that_is_not_given_never_overrides_what_the_config_says(draw):
    asked = {'sampler': 'euler', 'sample_steps': 3, 'seed': 5, 'guide_scale': 1.5, 'guide_rescale': 0.0, 'discretization': 'leading',
             'image_size': [64, 72]}
    settings = read_settings(draw(*(f'SOLVER.SAMPLE_ARGS.{key.upper()}={value}' for key, value in asked.items()))[0])
    assert {key: settings[key] for key in asked} == asked
    assert settings['size'] == [64, 72]


def test_what_neither_a_flag_nor_the_config_says_is_left_to_the_network_and_told(draw):
    settings = read_settings(draw('SOLVER.SAMPLE_ARGS={SAMPLE_STEPS: 1}', 'SOLVER.MODEL.DEFAULT_N_PROMPT=grey')[0])
    assert (settings['sampler'], settings['guide_scale'], settings['discretization']) == ('ddim', 7.5, 'trailing')
    assert (settings['n_prompt'], settings['size']) == ('grey', [64, 64])


def test_a_picture_tells_how_to_draw_it_again(draw, folder, tmp_path):
    first = draw('--num_samples', 3, '--seed', -1, '--n_prompt', 'grey', '--sampler', 'euler_ancestral')[2]
    told = read_settings(first)
    assert (told['prompt'], told['n_prompt'], told['number'], told['model']) == ('a red fox', 'grey', 2, str(folder / 'step-00000000'))
    again = draw('--num_samples', 3, '--seed', told['seed'], '--n_prompt', told['n_prompt'], '--sampler', told['sampler'],
                 '--save_folder', tmp_path / 'again')[2]
    assert difference(first, again) == 0 and read_settings(again) == told


def test_the_picture_with_the_negative_prompt_of_training_stands_beside_it(draw):
    words = ['SOLVER.SAMPLE_ARGS.RUN_TRAIN_N=true', 'SOLVER.MODEL.TRAIN_N_PROMPT=a grey wall']
    plain, other = draw(*words)
    assert other.name == plain.stem + '-train_n.png' and difference(plain, other) > 1
    assert read_settings(other)['train_n_prompt'] == 'a grey wall'
    assert difference(other, draw('--n_prompt', 'a grey wall')[0]) == 0


def test_a_seed_below_zero_is_another_each_time(draw, tmp_path):
    seeds = [read_settings(draw('--seed', -1, '--save_folder', tmp_path / str(i))[0])['seed'] for i in range(2)]
    assert seeds[0] != seeds[1] and min(seeds) >= 0


# ---------------------------------------------------------------- how it is drawn
def test_the_size_of_the_batch_has_no_part_in_the_pictures(draw, tmp_path):
    words = ['--num_samples', 3, '--sampler', 'euler_ancestral']
    together = draw(*words)
    for a, b in zip(together, draw(*words, '--batch_size', 2, '--save_folder', tmp_path / 'apart')):
        assert difference(a, b) <= 1
    assert difference(*together[:2]) > 1


def test_a_long_prompt_in_the_same_file_has_no_part_in_the_others(draw, tmp_path):
    chunked = 'SOLVER.MODEL.COND_STAGE_MODEL.LONG_PROMPT=chunk'
    (tmp_path / 'prompts.txt').write_text('a red fox\n' + 'a very long story ' * 30)
    files = draw('--prompt_file', tmp_path / 'prompts.txt', chunked)
    assert difference(files[0], draw(chunked, '--save_folder', tmp_path / 'alone')[0]) <= 1
    assert difference(files[1], draw('--prompt_file', tmp_path / 'prompts.txt', '--save_folder', tmp_path / 'cut')[1]) > 1


def test_bfloat16_is_near_float32(other):
    assert 0 < other('--dtype', 'bfloat16', '--sampler', 'euler') < 255


def test_a_published_file_is_drawn_as_the_checkpoint_of_the_same_weights(draw, folder, tmp_path):
    file = draw('--cfg', folder / 'tiny.yaml', '--pretrained_model', folder / 'sd15.safetensors')[0]
    assert difference(file, draw('--ema', 'off', '--save_folder', tmp_path / 'own')[0]) == 0


@pytest.mark.parametrize('weights', ['step-00000000', 'sd15.safetensors'])
def test_no_random_number_is_drawn_for_weights_that_a_file_holds(draw, folder, weights):
    state = torch.get_rng_state()
    draw('--pretrained_model', folder / weights, '--cfg', folder / 'tiny.yaml')
    assert torch.equal(state, torch.get_rng_state())


def test_what_may_be_left_as_it_was_built_is_built_in_full():
    layers = [network_of(ignored) for ignored in ([], ['out.*'])]
    assert not layers[0].any() and layers[1].all()


def network_of(ignored: list[str]) -> torch.Tensor:
    """The weight of a layer over memory of zeros, inside what a config with these IGNORE_KEYS is built in."""
    layer = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(layer.weight)
    with unfilled({'MODEL': [{'IGNORE_KEYS': ignored}]}):
        layer.reset_parameters()
    return layer.weight


# ---------------------------------------------------------------- a picture to begin with
def changes(file: Path, photo: Path) -> float:
    return np.abs(pixels(file) - pixels(photo)).mean()


def test_an_image_is_kept_the_more_the_weaker_it_is_changed(draw, folder, tmp_path):
    photo = ['--image', folder / 'photo.png', '--image_size', '72,64', '--sample_steps', 8, '--guide_scale', 1]
    kept, weak, strong = (draw(*photo, '--denoising_strength', s, '--save_folder', tmp_path / str(s))[0] for s in (0.0, 0.25, 1.0))
    assert 0 < changes(weak, kept) < changes(strong, kept)
    default = draw(*photo)[0]
    assert read_settings(default)['denoising_strength'] == 0.75
    assert changes(weak, kept) < changes(default, kept)


def test_only_what_the_mask_has_white_is_made_anew(draw, folder, tmp_path):
    photo = ['--image', folder / 'photo.png', '--image_size', '72,64', '--sample_steps', 4, '--sampler', 'euler_ancestral']

    def masked(colour: int) -> Path:
        Image.new('L', (64, 72), colour).save(tmp_path / 'mask.png')
        return draw(*photo, '--mask', tmp_path / 'mask.png', '--save_folder', tmp_path / str(colour))[0]
    kept = draw(*photo, '--denoising_strength', 0.0)[0]
    anew = draw(*photo, '--denoising_strength', 1.0, '--save_folder', tmp_path / 'anew')[0]
    assert difference(masked(0), folder / 'photo.png') == 0 and difference(masked(255), anew) <= 1 < difference(kept, anew)
    half, grid = draw(*photo, '--mask', folder / 'mask.png', '--save_folder', tmp_path / 'half', '--grid')
    moved = np.abs(pixels(half) - pixels(folder / 'photo.png'))
    assert moved[:, :32].mean() > 1 and not moved[:, 32:].any()
    for told in map(read_settings, (half, grid)):
        assert (told['denoising_strength'], told['image'], told['mask']) == (1.0, str(folder / 'photo.png'), str(folder / 'mask.png'))


def test_an_image_is_not_at_the_mercy_of_the_batch_or_of_torchs_generator(draw, folder, tmp_path):
    words = ['--image', folder / 'photo.png', '--num_samples', 3]
    together = draw(*words)
    torch.manual_seed(99)
    for a, b in zip(together, draw(*words, '--batch_size', 1, '--save_folder', tmp_path / 'apart')):
        assert difference(a, b) <= 1


def test_an_image_gives_the_size_where_nothing_else_does(draw, folder):
    words = ['SOLVER.SAMPLE_ARGS={SAMPLE_STEPS: 1}', '--dtype', 'bfloat16']
    assert pixels(draw('--image', folder / 'photo.png', *words)[0]).shape == (72, 64, 3)


def test_an_image_is_scaled_and_cut_to_a_size_that_is_asked_for(draw, folder):
    assert pixels(draw('--image', folder / 'photo.png', '--image_size', '64,128')[0]).shape == (64, 128, 3)


# ---------------------------------------------------------------- what is not touched
def test_nothing_of_training_is_imported(folder, tmp_path):
    script = ('import sys\nfrom scepter.run_inference import main\n'
              'code = main(sys.argv[1:])\nprint(code, *sorted({name.split(".")[0] for name in sys.modules}))')
    words = ['--pretrained_model', str(folder / 'step-00000000'), '--prompt', 'x', '--num_samples', '1', '--save_folder', str(tmp_path),
             'SOLVER.TRAIN_DATA.DATA_FOLDER=/nowhere', 'SOLVER.OPTIMIZER.NAME=NoSuchOptimizer']
    done = subprocess.run([sys.executable, '-c', script, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == '0', done.stderr
    assert not {'torchvision', 'pytorch_lightning', 'lightning', 'tensorboard', 'sklearn', 'skimage', 'transformers', 'open_clip',
                'diffusers'} & set(modules)


# ---------------------------------------------------------------- what cannot be
REFUSED = {
    'a size that the networks cannot make': (2, ['--image_size', '100,64'], '100x64 cannot be made: sides are multiples of 8, e.g. 96x64'),
    'a sampler with a typo': (2, ['--sampler', 'dpmp_2m'], 'dpmpp_2m'),
    'more steps than levels': (2, ['--sample_steps', '2000'], '2000'),
    'a strength over 1': (2, ['--image', 'photo.png', '--denoising_strength', '1.5'], 'at most 1, got 1.5'),
    'a strength without an image': (2, ['--denoising_strength', '0.5'], 'image'),
    'a key with a typo': (2, ['SOLVER.MODEL.SCALE_FACTR=1'], 'SCALE_FACTOR'),
    'an image that is not there': (3, ['--image', 'gone.png'], 'gone.png'),
    'an image that is none': (3, ['--image', 'tiny.yaml'], 'tiny.yaml'),
    'an image that is too small': (2, ['--image', 'dot.png', 'SOLVER.SAMPLE_ARGS={}'], '3x3'),
    'a mask without an image': (3, ['--mask', 'mask.png'], '--image'),
    'a file of prompts that is not there': (3, ['--prompt_file', 'gone.txt'], 'gone.txt'),
    'no picture of each': (3, ['--num_samples', '0'], '0 pictures'),
    'weights that are not there': (4, ['--pretrained_model', 'gone.safetensors'], 'gone.safetensors'),
    'weights of another architecture': (4, ['--pretrained_model', 'sdxl.safetensors', '--cfg', 'tiny.yaml'],
                                        'sdxl.safetensors does not fit LatentDiffusion'),
    'weights whose heads no shape tells': (4, ['--pretrained_model', 'sdxl.safetensors'], 'not the usual ones of 64 channels: give a YAML'),
    'a LoRA': (4, ['--pretrained_model', 'lora.safetensors'], 'lora.safetensors is a LoRA'),
    'a file that is no weights': (4, ['--pretrained_model', 'photo.png', '--cfg', 'tiny.yaml'], 'photo.png'),
    'a context that the text tower does not give': (2, ['SOLVER.MODEL.DIFFUSION_MODEL.CONTEXT_DIM=48', '--cfg', 'tiny.yaml'], '48'),
    'an autoencoder with other channels': (2, [
        '--cfg', 'tiny.yaml', 'SOLVER.MODEL.FIRST_STAGE_MODEL.EMBED_DIM=8', 'SOLVER.MODEL.FIRST_STAGE_MODEL.ENCODER.Z_CHANNELS=8',
        'SOLVER.MODEL.FIRST_STAGE_MODEL.DECODER.Z_CHANNELS=8'], '8'),
    'a text tower of another width than the file': (4, [
        '--pretrained_model', 'sd15.safetensors', '--cfg', 'tiny.yaml', 'SOLVER.MODEL.COND_STAGE_MODEL.WIDTH=64',
        'SOLVER.MODEL.DIFFUSION_MODEL.CONTEXT_DIM=64'], 'expected'),
    'an autoencoder of another width than the checkpoint': (4, ['SOLVER.MODEL.FIRST_STAGE_MODEL.DECODER.CH=64'], 'expected'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_drawn_is_refused_with_its_code_and_a_message(case, folder, tmp_path, capsys):
    Image.new('RGB', (3, 3)).save(folder / 'dot.png')
    save_file({'lora_unet_mid_block.lora_down.weight': torch.zeros(1, 1)}, folder / 'lora.safetensors')
    code, words, said = REFUSED[case]
    words = [str(folder / word) if (folder / word).is_file() else word for word in words]
    if '--cfg' not in words and '--pretrained_model' not in words:
        words += ['--pretrained_model', str(folder / 'step-00000000')]
    assert main(['--prompt', 'x', '--num_samples', '1', '--save_folder', str(tmp_path / 'out'), *words]) == code
    told = capsys.readouterr().err
    assert said in told and 'Traceback' not in told
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('words', [
    [], ['--prompt', 'x', '--image_size', '64by64'], ['--prompt', 'x', '--dtype', 'float8'], ['--prmpt', 'x']], ids=len)
def test_a_command_line_that_says_nothing_sensible_ends_with_2(words, capsys):
    with pytest.raises(SystemExit, match='2'):
        main(words)
    assert 'usage:' in capsys.readouterr().err


def test_a_checkpoint_of_a_users_own_component_says_which_flag_brings_it_in(folder, tmp_path, capsys):
    cfg = Config.load(folder / 'tiny.yaml', ['IMPORTS=[mine.py]', 'SOLVER.MODEL.DIFFUSION_MODEL={NAME: MyOwnNetwork}'])
    checkpoints.save(tmp_path, 0, {'model': {'x': torch.zeros(1)}}, {'left_out': []}, cfg.dump())
    assert main(['--prompt', 'x', '--pretrained_model', str(tmp_path / 'step-00000000')]) == 2
    told = capsys.readouterr().err
    assert 'BACKBONES has no MyOwnNetwork' in told and 'name the files with --imports' in told
