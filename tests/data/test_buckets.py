"""Pictures of many shapes: the sizes they are cut to, and steps of one size each, however the steps are cut."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scepter.core.config import Config
from scepter.core.errors import DataError
from scepter.core.registry import DATASETS
from scepter.data.buckets import bucket_sizes, nearest
from scepter.data.folders import ImageTextFolderDataset
from scepter.data.images import size_of_image
from scepter.data.loader import Loader, OrderedLoader

SHAPES = [(64, 64)] * 5 + [(96, 48)] * 6 + [(50, 110)] * 4 + [(200, 40)]    # height, width; each picture is of a gray of its own
CROP = {'NAME': 'RecordedCrop', 'RANDOM': True, 'FLIP': 0.5}


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    for i, (height, width) in enumerate(SHAPES):
        Image.new('RGB', (width, height), (10 * i,) * 3).save(tmp_path / f'{i:02d}.png')
    return tmp_path


def build(folder: Path, **options: Any) -> ImageTextFolderDataset:
    return DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(folder), 'BUCKETS': 64, 'BUCKET_STEP': 16,
                           'TRANSFORMS': [CROP], **options})


def draws(dataset: ImageTextFolderDataset, count: int, *, micro: int, world: int = 1, **options: Any) -> dict[int, tuple]:
    """number -> (picture, its prompt's place in the batch is not told): what `count` samples over all processes are."""
    found = {}
    for rank in range(world):
        loader = Loader(dataset, micro, seed=7, rank=rank, world_size=world, **options)
        for _ in range(count // (micro * world)):
            batch, n = next(loader)
            assert (batch['target_size'] == np.array(batch['image'].shape[-2:])).all()
            for i, number in enumerate(n.tolist()):
                found[number] = (batch['image'][i].numpy().tobytes(), *batch['original_size'][i].tolist(),
                                 *batch['crop_top_left'][i].tolist(), *batch['target_size'][i].tolist())
        loader.close()
    return dict(sorted(found.items()))


def size_of(draw: tuple) -> tuple:
    return draw[-2:]


# ------------------------------------------------------------------------------------------------ sizes
@pytest.mark.parametrize(('side', 'longest', 'count'), [(512, 1024, 17), (1024, 1024, 25), (1024, 2048, 41)])
def test_there_are_as_many_sizes_as_others_train_with(side, longest, count):
    sizes = bucket_sizes(side, 64, 256, longest)
    assert len(sizes) == count and (side, side) in sizes
    for height, width in sizes:
        assert height * width <= side * side and height % 64 == width % 64 == 0
        assert 256 <= min(height, width) and max(height, width) <= longest
        assert (width, height) in sizes


def test_a_picture_goes_where_it_is_cut_least_and_turned_into_the_turned_size():
    sizes = bucket_sizes(512, 64, 256, 1024)
    heights, widths = np.random.default_rng(5).integers(100, 3000, (2, 300))
    found, turned = nearest(sizes, heights, widths), nearest(sizes, widths, heights)
    for h, w, i in zip(heights, widths, found):
        kept = [min(h * W, H * w) / max(h * W, H * w) for H, W in sizes]    # of the picture's area, when the size is just covered
        assert kept[i] == pytest.approx(max(kept))
    assert [sizes[i] for i in found] == [sizes[i][::-1] for i in turned]


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp'])
def test_the_header_tells_the_size_of_the_upright_picture(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', (20, 10)).save(tmp_path / f'x.{suffix}', exif=exif)
    assert size_of_image(str(tmp_path / f'x.{suffix}')) == ((10, 20) if orientation < 5 else (20, 10))


# ------------------------------------------------------------------------------------------------ samples
def test_a_sample_is_of_its_buckets_size_and_says_so(shapes):
    dataset = build(shapes)
    samples = [dataset[i] for i in (0, 5, 11, 15)]
    assert [sample['target_size'] for sample in samples] == [(64, 64), (80, 48), (48, 80), (128, 32)]
    assert [tuple(sample['image'].shape[-2:]) for sample in samples] == [sample['target_size'] for sample in samples]
    assert [sample['original_size'] for sample in samples] == [(64, 64), (96, 48), (50, 110), (200, 40)]
    for sample, (height, width) in zip(samples, [(64, 64), (96, 48), (48, 106), (160, 32)]):    # scaled until the size is just covered
        (top, left), (h, w) = sample['crop_top_left'], sample['target_size']
        assert 0 <= top <= height - h and 0 <= left <= width - w


@pytest.mark.parametrize(('options', 'message'), [
    ({'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': 64}]}, r'TRANSFORMS\[0\]: has a SIZE, which would undo the BUCKETS'),
    ({'BUCKETS': None}, r'TRANSFORMS\[0\]: needs a SIZE, as there are no BUCKETS'),
    ({'BUCKETS': 32, 'BUCKET_STEP': 64}, 'BUCKETS: no size of 32 pixels squared'),
    ({'BUCKET_SIDE': [1, 2]}, 'did you mean BUCKET_SIDES'),
])
def test_buckets_that_cannot_be_are_found_by_the_check(shapes, options, message):
    node = Config({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': 'x', 'BUCKETS': 64, 'BUCKET_STEP': 16, 'TRANSFORMS': [CROP], **options})
    assert [fault for fault in DATASETS.faults(node, 'DATA') if re.search(message, f'{fault.path}: {fault.message}')]


def test_transforms_that_do_not_cut_to_the_bucket_are_an_error_that_says_how(shapes):
    with pytest.raises(DataError, match=r'is \(200, 40\) after TRANSFORMS, but its bucket is \(128, 32\).*RecordedCrop'):
        build(shapes, TRANSFORMS=[])[15]


# ------------------------------------------------------------------------------------------------ steps
CUTS = [{'micro': 4}, {'micro': 2}, {'micro': 2, 'world': 2}, {'micro': 1, 'world': 4}, {'micro': 1, 'world': 2}]


@pytest.mark.parametrize(('cut', 'workers'), [*((cut, 0) for cut in CUTS[1:]), (CUTS[2], 2)])
def test_a_step_is_of_one_bucket_and_the_same_however_it_is_cut(shapes, cut, workers):
    dataset = build(shapes)
    alone, found = draws(dataset, 64, step=4, **CUTS[0]), draws(dataset, 64, step=4, num_workers=workers, **cut)
    assert found == alone and len(alone) == 64
    sizes = [{size_of(alone[4 * s + i]) for i in range(4)} for s in range(16)]
    assert all(len(size) == 1 for size in sizes) and len(set.union(*sizes)) == 4


@pytest.mark.parametrize('first', [24, 26, 28])
def test_to_begin_at_any_number_is_to_have_run_to_it(shapes, first):
    """At the border of two steps, and in the midst of one, where a run with GLOBAL_BATCH_SIZE 2 may have been stopped."""
    dataset = build(shapes)
    whole = draws(dataset, 48, micro=2, step=2)
    assert list(draws(dataset, 48 - first, micro=2, step=2, first=first).items()) == list(whole.items())[first:]


@pytest.mark.parametrize('first', [24, 25, 27])
def test_another_global_batch_begins_its_steps_where_the_run_goes_on_and_resumes_from_there(shapes, first):
    dataset = build(shapes)
    whole = draws(dataset, 40, micro=4, step=4, first=first)
    assert all(len({size_of(whole[first + 4 * s + i]) for i in range(4)}) == 1 for s in range(10))
    assert list(draws(dataset, 24, micro=2, world=2, step=4, first=first + 16).items()) == list(whole.items())[16:]


def test_an_unreadable_file_gives_way_to_one_of_its_bucket(shapes, said):
    damaged = (shapes / '05.png').read_bytes()
    (shapes / '05.png').write_bytes(damaged[:60])      # its header is whole
    (shapes / '06.png').write_bytes(b'')               # not even that: it stands in the largest bucket until its turn comes
    dataset = build(shapes, BUCKET_SIDES=[32, 128])
    found = draws(dataset, 64, micro=4)
    assert all(len({size_of(found[4 * s + i]) for i in range(4)}) == 1 for s in range(16))
    assert sum('another sample takes its place' in m for m in said) == 2
    assert draws(dataset, 32, micro=2, world=2, first=32) == {n: draw for n, draw in found.items() if n >= 32}


def test_a_file_that_is_alone_in_its_bucket_cannot_be_replaced_and_is_named(shapes):
    (shapes / '15.png').write_bytes((shapes / '15.png').read_bytes()[:60])
    with pytest.raises(DataError, match=r'15\.png cannot be read, and neither can any that may take its place'):
        draws(build(shapes), 64, micro=4)


def test_buckets_smaller_than_a_step_are_told(shapes, said):
    build(shapes).order(7, 5)
    assert [m for m in said if 'buckets with fewer samples than a step of 5 takes: 48x80 (4), 128x32 (1)' in m]
    assert [m for m in said if 'images by height x width of their bucket: 48x80 (4), 64x64 (5), 80x48 (6), 128x32 (1)' in m]


def test_a_pass_for_evaluation_has_each_sample_once_in_batches_of_one_bucket(shapes):
    dataset = build(shapes, REPEATS=2)
    seen = [[n.tolist() for _, n in OrderedLoader(dataset, 4, rank=rank, world_size=2)] for rank in range(2)]
    numbers = [n for batches in seen for batch in batches for n in batch]
    assert sorted(numbers) == list(range(32)) and max(len(batch) for batches in seen for batch in batches) == 4
