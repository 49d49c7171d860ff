"""examples/nova: its recipes train and draw, shrunken; its figures tell right from wrong; those for GPUs are of the published sizes."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import scepter
from scepter import run_train
from scepter.core.config import Config
from scepter.core.experiment import carry_out_imports
from scepter.core.images import save_png
from scepter.core.registry import BACKBONES, DATASETS, METRICS, MODELS
from scepter.models.restore import without_weights

NOVA = Path(__file__).resolve().parents[1] / 'examples' / 'nova'
TINY = ['SOLVER.MODEL.NETWORK.ARCH=[vit_d2w64,vit_d2w64,mlp_d1w64]', 'SOLVER.TRAIN_DATA.BATCH_SIZE=4']


@pytest.fixture(scope='module')
def demo(demo_of: Callable[[str], ModuleType]) -> ModuleType:
    return demo_of('nova')


@pytest.fixture(scope='module')
def moving() -> Config:
    """The recipe of the clips, with what it imports registered."""
    cfg = Config.load(NOVA / 'moving_digits.yaml')
    carry_out_imports(cfg)
    return cfg


def train_both(out: Path, stage1: str, stage2: str, *words: str) -> Path:
    """The run of the second stage, after two steps of each."""
    for name, more in ((stage1, ['SOLVER.TRAIN_DATA.BATCH_SIZE=4']), (stage2, [
            *TINY, f'SOLVER.MODEL.FIRST_STAGE_MODEL.PRETRAINED_MODEL={out / stage1}', *words])):
        assert run_train.main(['--cfg', str(NOVA / f'{name}.yaml'), '--max_steps', '2', f'SOLVER.WORK_DIR={out / name}', *more]) == 0
    return out / stage2


def test_the_digits_are_trained_and_drawn_in_as_many_sets_as_are_asked_for(tmp_path):
    pipe = scepter.load(train_both(tmp_path, 'autoencoder', 'digits_nova'))
    seen = []
    drawn = pipe('the number three', on_step=lambda number, total, tokens: seen.append((number, total)), sets=4, sample_steps=2)
    assert drawn.images[0].size == (64, 64) and drawn.results[0]['image'].isfinite().all()
    assert seen == [(number, 4) for number in range(1, 5)]


def test_the_clips_are_trained_and_measured_and_drawn(demo, tmp_path):
    words = ['SOLVER.EVAL_INTERVAL=2', 'SOLVER.EVAL_DATA.COUNT=4', 'SOLVER.SAMPLE_ARGS.SAMPLE_STEPS=2', 'SOLVER.SAMPLE_ARGS.SETS=2',
             'SOLVER.TRAIN_DATA.COUNT=8']
    run = train_both(tmp_path, 'moving_autoencoder', 'moving_digits', *words)
    rows = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    assert [0 <= row['val/direction'] <= 1 for row in rows if 'val/direction' in row] == [True]
    demo.plot_losses(tmp_path / 'loss.png', tmp_path / 'moving_autoencoder', run)    # lines of evaluations have no loss
    clip = scepter.load(run)('two and six move up').results[0]['video']
    assert clip.shape == (3, 5, 64, 64) and clip.isfinite().all()


def test_clips_that_move_as_they_were_told_are_told_from_all_others(moving, demo):
    dataset = DATASETS.build({'NAME': 'MovingDigitsDataset', 'SPLIT': 'test', 'COUNT': 40})
    clips = [{'video': clip['video'] / 2 + 0.5, 'prompt': clip['prompt']} for clip in map(dataset.__getitem__, range(40))]
    backwards = [{**clip, 'video': clip['video'].flip(1)} for clip in clips]
    still = [{**clip, 'video': clip['video'][:, :1].expand(-1, 5, -1, -1)} for clip in clips]
    dark = [{**clip, 'video': torch.zeros(3, 5, 64, 64)} for clip in clips]
    metric = METRICS.build(moving.SOLVER.METRICS[0])

    figures = [metric.figures(**metric.sums(results, {})) for results in (clips, backwards, still, dark)]

    assert [figure['direction'] for figure in figures] == [1, 0, 0, 0]
    assert metric.names(moving) == set(figures[0])
    judged = demo.judge_clips(clips + backwards)
    assert (judged['direction'], judged['clips'], {*judged['of_way'].values()}) == (0.5, 80, {0.5})


def test_digits_are_read_where_they_should_be_and_nowhere_else(moving, demo):
    dataset = DATASETS.build({'NAME': 'MovingDigitsDataset', 'SPLIT': 'test', 'COUNT': 40})
    clips = [{'video': clip['video'] / 2 + 0.5, 'prompt': clip['prompt']} for clip in map(dataset.__getitem__, range(40))]
    late = [{**clip, 'video': clip['video'].roll(1, 1)} for clip in clips]    # the last frame first, and each other one too late

    assert min(demo.judge_clips(clips)['read_in_frame']) > 0.95
    assert max(demo.judge_clips(late)['read_in_frame']) < 0.5


def test_a_clip_follows_from_its_number_and_moves_by_steps_of_one_size(moving):
    import moving_digits
    dataset = DATASETS.build({'NAME': 'MovingDigitsDataset', 'FRAMES': 3, 'COUNT': 8})
    clips = [dataset[index] for index in range(len(dataset))]
    for index, clip in enumerate(clips):
        assert torch.equal(clip['video'], dataset[index]['video']) and dataset.beside(index) == {'prompt': clip['prompt']}
        assert not any(torch.equal(clip['video'], other['video']) for other in clips[:index])
        way = torch.tensor(moving_digits.WAYS[clip['prompt'].split()[-1]])
        steps = moving_digits.centroids_of(clip['video'] / 2 + 0.5).diff(dim=0)
        torch.testing.assert_close(steps, (moving_digits.STEP * way.float()).expand(2, -1), rtol=0, atol=1e-3)


def test_training_never_sees_the_pairs_of_the_test(moving):
    seen, tested = ({tuple(dataset.beside(i)['prompt'].split()[:3:2]) for i in range(len(dataset))} for dataset in (
        DATASETS.build({'NAME': 'MovingDigitsDataset', 'SPLIT': split, 'COUNT': 2000}) for split in ('train', 'test')))
    assert (len(seen), len(tested), seen & tested) == (90, 10, set())


def test_the_demo_reads_pictures_of_its_size_and_shows_a_column_for_each_word(demo, tmp_path):
    from digits_data import WORDINGS, WORDS, load_digits
    images, labels = load_digits('test', 64)
    order = labels.argsort(stable=True)[:360]
    for place, i in enumerate(order.tolist()):
        save_png(images[i] / 2 + 0.5, tmp_path / f'{place:05d}.png', {'prompt': WORDINGS[place % 4].format(WORDS[labels[i]])})

    judged = demo.judge(tmp_path, pixels=64)
    shown = demo.first_of_each(tmp_path, rows=2)
    demo.save_sheet([demo.small(picture) for picture in shown], 10, tmp_path / 'sheet.png')

    assert judged['prompt_accuracy'] > 0.95 and 0.85 < judged['diversity'] < 1.15
    assert len(shown) == 20 and np.array(Image.open(tmp_path / 'sheet.png')).shape == (2 * 34, 10 * 34)
    table = demo.table([{'sets': sets, 'sample_seconds': 3.2, **judged} for sets in demo.SETS])
    assert [line.split()[0] for line in table.split('\n')[2:]] == ['1', '2', '4', '8'] and f'{judged["diversity"]:.2f}' in table


@pytest.mark.parametrize(('recipe', 'millions'), [('t2i_0.6b_1024', 645.7), ('t2v_0.6b_480', 644.2)])
def test_a_recipe_for_gpus_is_without_faults_and_of_its_published_size(recipe, millions):
    assert run_train.main(['--cfg', str(NOVA / f'{recipe}.yaml'), '--check']) == 0
    node = without_weights(Config.load(NOVA / f'{recipe}.yaml').SOLVER.MODEL)
    with torch.device('meta'):
        model = MODELS.build(Config({**node, 'COND_STAGE_MODEL': None}))
        network = BACKBONES.build(node.NETWORK)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions
    assert model.first_stage_model.size_factor == network.IMAGE_STRIDE == 8
    assert node.COND_STAGE_MODEL.MAX_LENGTH == network.TEXT_TOKEN_LEN


def test_every_recipe_of_the_example_is_run_or_counted_here():
    tested = {'autoencoder', 'digits_nova', 'moving_autoencoder', 'moving_digits', 't2i_0.6b_1024', 't2v_0.6b_480'}
    assert {path.stem for path in NOVA.glob('*.yaml')} == tested
