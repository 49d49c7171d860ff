"""NovaModel as a solver sees it: what is keyed, what meets in a run, and what is refused."""
from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scepter
import scepter.components
from pairs import Crash, Stop, differences, outcome, train
from scepter.core import streams
from scepter.core.calls import accepted
from scepter.core.config import Config
from scepter.core.faults import ConfigError
from scepter.core.launch import launch
from scepter.core.registry import MODELS
from scepter.data.records import RecordWriter
from scepter.models.nova.model import NovaModel
from tests.models.nova_runs import CLIP, DDPM, NETWORK, TEXT, experiment, moments, run, write_clips

AUTOENCODER = {'NAME': 'VideoAutoencoderKL', 'BLOCK_OUT_CHANNELS': [32] * 4, 'LAYERS_PER_BLOCK': 1, 'LATENT_CHANNELS': 2}
CODER = {'CH': 32, 'CH_MULT': [1, 1, 1, 1], 'NUM_RES_BLOCKS': 1, 'Z_CHANNELS': 2}
IMAGES = {'NAME': 'AutoencoderKL', 'ENCODER': {'NAME': 'Encoder', **CODER}, 'DECODER': {'NAME': 'Decoder', **CODER}, 'EMBED_DIM': 2}


def build(network: dict = NETWORK, **keys: Any) -> NovaModel:
    torch.manual_seed(0)
    return MODELS.build(Config({'NAME': 'NovaModel', 'NETWORK': network, 'SCALE_FACTOR': 1.0, **keys}))


def batch_of(network: dict, count: int, frames: int = 0) -> dict[str, Any]:
    texts, labels = [torch.full((i % 4, 12), float(i)) for i in range(count)], torch.arange(count)
    told = {'prompt': texts} if 'TEXT_TOKEN_DIM' in network else {'label': labels}
    return {'moments': moments(count, frames), **told, **({'motion_flow': torch.arange(count) + 1.0} if frames else {})}


def part_of(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value[rows] for name, value in batch.items()}


@pytest.mark.parametrize('network, frames', [(NETWORK, 0), (TEXT, 0), (CLIP, 3), (CLIP, 2), (CLIP, 0)])
@pytest.mark.parametrize('process', [{}, DDPM], ids=['flow', 'ddpm'])
def test_two_halves_of_a_batch_have_the_loss_of_the_whole(network: dict, frames: int, process: dict):
    model, batch, n = build(network, **process), batch_of(network, 4, frames), torch.tensor([7, 3, 12, 5])

    with streams.current(1, n, step=9):
        whole = model.forward_train(**batch)
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        with streams.current(1, n[rows], step=9):
            halves.append(model.forward_train(**part_of(batch, rows)))

    for name in {'loss', 'loss_t2i', 'loss_i2i'} if frames > 1 else {'loss'}:
        torch.testing.assert_close(whole[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-5, atol=1e-6)
    whole['loss'].backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking or (network is CLIP and frames < 2)    # one frame asks nothing of what joins frames


@pytest.mark.parametrize('level', [1, 2, 3])
def test_checkpointing_changes_no_gradient(level: int):
    def gradients(level: int) -> list[Tensor]:
        model = build({**CLIP, 'CHECKPOINTING': level})
        with streams.current(1, torch.arange(2), step=1):
            model.forward_train(**batch_of(CLIP, 2, 3))['loss'].backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, again = gradients(0), gradients(level)

    assert len(plain) == len(again) and all(torch.equal(a, b) for a, b in zip(plain, again))


@pytest.mark.parametrize('how', [{}, {'image_guide_scale': 1.5}, {'guide_renorm': 0.7, 'guide_trunc': 300.0}, {'guide_scale': 1.0},
                                 {'min_guide_scale': 1.0}])
@pytest.mark.parametrize('process', [{}, DDPM], ids=['flow', 'ddpm'])
def test_a_clip_does_not_depend_on_the_batch_it_is_drawn_in(how: dict, process: dict):
    model, texts = build(CLIP, **process), [torch.full((i + 1, 12), float(i)) for i in range(3)]

    together = model.forward_test(prompt=texts, length=3, sets=4, sample_steps=3, seed=5, **how)
    alone = model.forward_test(prompt=texts[1:2], length=3, sets=4, sample_steps=3, row_seeds=[together[1]['seed']], **how)

    assert list(together[0]['latent'].shape) == [2, 3, 8, 8] and not torch.equal(together[0]['latent'], together[1]['latent'])
    torch.testing.assert_close(alone[0]['latent'], together[1]['latent'], rtol=1e-4, atol=1e-4)


def test_drawing_and_training_do_not_disturb_each_other():
    model, batch = build(CLIP), batch_of(CLIP, 2, 2)

    def loss(frames: int) -> float:
        with streams.current(1, torch.arange(2), step=1):
            return model.forward_train(**batch_of(CLIP, 2, frames))['loss'].item()

    first = [loss(3), loss(2)]
    with torch.inference_mode():
        drawn = model.forward_test(prompt=batch['prompt'], length=2, sets=3, sample_steps=2)
    assert [loss(3), loss(2)] == first
    assert torch.equal(model.forward_test(prompt=batch['prompt'], length=2, sets=3, sample_steps=2)[0]['latent'], drawn[0]['latent'])


def test_the_share_that_is_hidden_is_a_normal_about_one_cut_at_seven_tenths():
    from scepter.models.nova.training import visible_tokens
    counts = []
    for step in range(4000):
        with streams.current(0, torch.arange(1), step):
            counts.append(visible_tokens(1000, 0.7, 0.25))

    shares = 1 - np.array(counts) / 1000
    assert shares.min() >= 0.7 and shares.max() <= 1.0
    assert abs(shares.mean() - 0.8664) < 0.004 and abs(np.quantile(shares, 0.5) - 0.8738) < 0.006    # of the truncated normal


def test_dropped_captions_are_a_tenth():
    model = build(NETWORK)
    with streams.current(3, torch.arange(4000), 0):
        told = model._told_in_training(None, torch.zeros(4000, dtype=torch.int64), 4000)

    assert set(told.tolist()) == {0, 10} and 320 < (told == 10).sum().item() < 480


@pytest.mark.parametrize('changes, words', [
    ({'LATENT_CHANNELS': 4}, '4 channels, but the network draws 2'),
    ({'BLOCK_OUT_CHANNELS': [32] * 2, 'DOWN_BLOCK_TYPES': ['DownEncoderBlock2D'] * 2}, '2 times smaller')])
def test_an_autoencoder_of_other_latents_is_refused(changes: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        build(CLIP, FIRST_STAGE_MODEL={**AUTOENCODER, **changes})


def test_a_text_that_is_too_long_is_cut_and_of_another_width_refused(caplog: pytest.LogCaptureFixture):
    model, text = build(TEXT), torch.randn(7, 12)
    model.logger = logging.getLogger('a run')

    assert torch.equal(model.features([text])[0], text[:5]) and torch.equal(model.features([text, ''])[0], text[:5])
    assert caplog.text.count('a text has 7 tokens, and those beyond 5') == 1
    with pytest.raises(ValueError, match=r'\[3, 1\], expected \[L, 12\]'):
        model.features([torch.randn(3, 1)])


def test_what_a_network_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match='no label'):
        build(NETWORK).forward_train(moments=moments(1), prompt=['a'])
    with pytest.raises(ValueError, match='no prompt'):
        build(TEXT).forward_train(moments=moments(1), label=torch.tensor([1]))
    with pytest.raises(ValueError, match="'a bird' is words, but COND_STAGE_MODEL is null"):
        build(TEXT).forward_test(prompt=['', 'a bird'])
    with pytest.raises(ValueError, match='told a class, not a prompt: give a label, 0 to 9'):
        build(NETWORK).forward_test(prompt=['a bird'])
    with pytest.raises(ValueError, match='no flow'):
        build(NETWORK, **DDPM).forward_test(label=1, flow_shift=2.0)


@pytest.fixture(scope='module')
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp('clips'), [3] * 5)


@pytest.mark.parametrize('settings', [{}, {'DTYPE': 'bfloat16', 'ACCU_STEP': 2}, {'PARAM_DTYPE': 'bfloat16'},
                                      {'CHANNELS_LAST': True, 'EVAL_INTERVAL': 4}],
                         ids=lambda settings: '-'.join(settings) or 'plain')
def test_five_steps_and_five_more_are_ten_to_the_bit(tmp_path: Path, clips: Path, settings: dict):
    train(experiment(tmp_path / 'whole', clips, **settings))
    with pytest.raises(Crash):
        train(experiment(tmp_path / 'halves', clips, **settings), Stop({}))
    train(experiment(tmp_path / 'halves', clips, **settings))

    assert not differences(outcome(tmp_path / 'whole'), outcome(tmp_path / 'halves'))


def test_a_clip_begins_with_the_picture_that_is_given():
    model, (a, b) = build(CLIP, FIRST_STAGE_MODEL=AUTOENCODER, SCALE_FACTOR=0.5), torch.rand(2, 1, 3, 64, 64) * 2 - 1

    how = {'num_frames': 5, 'sets': 2, 'sample_steps': 2}
    first, again, other = (model.forward_test(prompt=[''], first_frame=x, **how)[0]['video'] for x in (a, a, b))

    assert list(first.shape) == [3, 5, 64, 64] and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
    with torch.no_grad():
        torch.testing.assert_close(model._first_frame(a, (64, 64), 2, 1), 0.5 * model.first_stage_model.encode(a).latent_dist.mode())


@pytest.mark.parametrize('autoencoder', [AUTOENCODER, IMAGES], ids=['of clips', 'of images'])
def test_one_frame_is_an_image(autoencoder: dict):
    model = build(NETWORK, FIRST_STAGE_MODEL=autoencoder)

    result = model.forward_test(label=[3, 4], sets=2, sample_steps=2)

    assert [list(r['image'].shape) for r in result] == [[3, 64, 64]] * 2 and [r['label'] for r in result] == [3, 4]
    with streams.current(1, torch.arange(2), step=1):
        assert model.forward_train(image=torch.rand(2, 3, 64, 64), label=torch.tensor([1, 2]))['loss'].isfinite()


def test_a_picture_of_an_evaluation_is_no_first_frame():
    """A batch of pictures has an `image`; a clip that began with it would be measured against itself."""
    assert accepted(build(CLIP).forward_test, {'image': 1, 'video': 2, 'moments': 3, 'first_frame': 4}) == {'first_frame': 4}


def test_a_batch_of_an_evaluation_is_drawn_as_it_is():
    model, batch = build(CLIP), batch_of(CLIP, 2, 3)
    how = {'length': 2, 'sets': 2, 'sample_steps': 2, 'row_seeds': [1, 2]}

    together = model.forward_test(**accepted(model.forward_test, {**batch, **how}))
    alone = model.forward_test(prompt=batch['prompt'][1:], motion_flow=2.0, **{**how, 'row_seeds': [2]})

    torch.testing.assert_close(together[1]['latent'], alone[0]['latent'], rtol=1e-4, atol=1e-4)


def test_an_autoencoder_of_pictures_serves_clips_frame_by_frame():
    torch.manual_seed(0)
    model, clip = build(CLIP, FIRST_STAGE_MODEL=IMAGES), torch.rand(2, 3, 3, 64, 64) * 2 - 1

    with streams.current(1, torch.tensor([4, 9]), step=1):
        both = model.encode_first_stage(clip)
        assert model.forward_train(video=clip, prompt=batch_of(CLIP, 2)['prompt'])['loss'].isfinite()
    with streams.current(1, torch.tensor([9]), step=1):
        alone = model.encode_first_stage(clip[1:])
    drawn = model.forward_test(prompt=[''], num_frames=3, sets=2, sample_steps=2)[0]['video']

    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)
    assert both.shape == (2, 2, 3, 8, 8) and drawn.shape == (3, 3, 64, 64)


def test_one_with_rotations_draws_other_sizes_and_one_with_sines_does_not():
    rotary = {**CLIP, 'ROTARY_POS_EMBED': True, 'ARCH': ['vit_d2w32h1', 'vit_d2w32h1', 'mlp_d1w16']}

    drawn = build(rotary).forward_test(prompt=[''], image_size=(64, 96), length=2, sets=2, sample_steps=2)[0]['latent']

    assert drawn.shape == (2, 2, 8, 12)
    with pytest.raises(ValueError, match=r'72x96 cannot be drawn: sides are multiples of 32, e\.g\. 64x96'):
        build(rotary).forward_test(prompt=[''], image_size=(72, 96))
    with pytest.raises(ValueError, match=r'64x96 cannot be drawn: the positions of this network fit 64x64 alone'):
        build(CLIP).forward_test(prompt=[''], image_size=(64, 96))


@pytest.mark.parametrize('how, words', [({'length': 4}, 'up to 3 of latents'), ({'num_frames': 4}, 'up to 3 of latents'),
                                        ({'length': 0}, '0 frames of latents cannot be drawn')])
def test_a_clip_that_is_longer_than_the_network_was_made_for_is_refused(how: dict, words: str):
    with pytest.raises(ValueError, match=words):
        build(CLIP).forward_test(prompt=[''], **how)


def test_progress_counts_the_sets_of_all_frames(capsys: pytest.CaptureFixture[str]):
    seen: list[tuple[int, int]] = []

    def look(number: int, count: int, tokens: Tensor) -> None:
        seen.append((number, count))
        time.sleep(0.02)      # a bar shows itself ten times a second at most

    build(CLIP).forward_test(prompt=[''], length=3, sets=4, sample_steps=2, show_progress=True, on_step=look)

    assert seen == [(i, 12) for i in range(1, 13)] and '/12 [' in capsys.readouterr().err


def test_spatiotemporal_guidance_changes_nothing_and_says_so(caplog: pytest.LogCaptureFixture):
    model, how = build(CLIP), {'prompt': [''], 'sets': 2, 'sample_steps': 2}
    model.logger = logging.getLogger('a run')

    with caplog.at_level(logging.INFO):
        guided = model.forward_test(spatiotemporal_guide_scale=2.0, **how)[0]['latent']

    assert torch.equal(guided, model.forward_test(**how)[0]['latent']) and 'changes nothing' in caplog.text


@pytest.mark.parametrize('how', [{}, pytest.param({'PARALLEL': 'fsdp'}, marks=pytest.mark.slow)], ids=['plain', 'fsdp'])
def test_two_processes_learn_what_one_does_from_clips_of_several_lengths(tmp_path: Path, how: dict):
    (tmp_path / 'data').mkdir()
    data = write_clips(tmp_path / 'data', [3, 2, 3, 3, 2, 1])
    train(experiment(tmp_path / 'one', data))
    launch(Config({**experiment(tmp_path / 'two', data, GLOBAL_BATCH_SIZE=2, **how),
                   'ENV': {'NPROC': 2, 'DEVICE': 'cpu', 'THREADS': 1}}), run)

    one, two = (outcome(tmp_path / name)['log'] for name in ('one', 'two'))
    losses = [[row['train/loss'] for row in log if 'train/loss' in row] for log in (one, two)]
    assert len(losses[0]) == len(losses[1]) > 2 and np.allclose(losses[0], losses[1], rtol=1e-4), losses


@pytest.mark.slow
def test_a_compiled_network_learns_the_same():
    def loss(is_compiled: bool) -> Tensor:
        model = build(CLIP)
        if is_compiled:
            for part in (model.model.image_encoder, model.model.image_decoder):
                part.compile(backend='aot_eager')
        with streams.current(1, torch.arange(2), step=1):
            return model.forward_train(**batch_of(CLIP, 2, 3))['loss']

    torch.testing.assert_close(loss(True), loss(False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_checkpoint_is_opened_and_drawn_from(tmp_path: Path, dtype: str):
    data = tmp_path / 'data'
    data.mkdir()
    with RecordWriter(data, {'moments': 'bytes', 'shape': ['int64'], 'label': 'int64'}) as writer:
        for i, x in enumerate(moments(4).numpy()):
            writer.write({'moments': x.tobytes(), 'shape': x.shape, 'label': i})
    train(experiment(tmp_path / 'run', data, MAX_STEPS=2, MODEL={
        'NAME': 'NovaModel', 'NETWORK': NETWORK, 'SCALE_FACTOR': 1.0, 'FIRST_STAGE_MODEL': AUTOENCODER}))

    pipe = scepter.load(tmp_path / 'run', dtype=dtype)
    drawn = pipe(label=7, num_samples=2, sets=3, sample_steps=2, seed=1)
    again = pipe(label=7, num_samples=2, sets=3, sample_steps=2, seed=1, batch_size=1)

    assert [result['label'] for result in drawn.results] == [7, 7] and drawn.images[0].size == (64, 64)
    for one, other in zip(drawn.results, again.results):
        assert one['image'].isfinite().all()
        torch.testing.assert_close(one['image'], other['image'], rtol=0, atol=1e-4 if dtype == 'float32' else 0.1)
