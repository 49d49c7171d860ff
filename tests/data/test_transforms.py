from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scepter.core.errors import DataError
from scepter.core.faults import ConfigError
from scepter.core.registry import DATASETS, TRANSFORMS
from scepter.data.images import to_mask, to_tensor
from scepter.data.loader import OrderedLoader


def crop(**options: Any) -> Callable[[dict], dict]:
    return TRANSFORMS.build({'NAME': 'RecordedCrop', **options})


def gradient(height: int, width: int) -> Image.Image:
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, rows * 0], -1))


def test_a_crop_records_what_was_done_to_the_file():
    found = crop(SIZE=[16, 32])({'image': gradient(64, 64), 'prompt': 'p'})
    assert found['image'].size == (32, 16)
    assert {k: v for k, v in found.items() if k != 'image'} == {
        'prompt': 'p', 'original_size': (64, 64), 'crop_top_left': (8, 0), 'target_size': (16, 32)}


def test_the_original_size_is_that_of_the_file_even_after_another_transform(folder):
    transforms = [{'NAME': 'Resize', 'SIZE': 8}, {'NAME': 'RecordedCrop', 'SIZE': 6}]
    dataset = DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(folder), 'TRANSFORMS': transforms})
    batch, _ = next(iter(OrderedLoader(dataset, 2)))
    assert batch['image'].shape == (2, 3, 6, 6)
    assert batch['original_size'].tolist() == [[10, 12]] * 2
    assert batch['target_size'].tolist() == [[6, 6]] * 2


@pytest.mark.parametrize('random', [False, True])
@pytest.mark.parametrize('size', [(20, 30), (30, 20), (24, 24), (100, 7)])
def test_the_record_says_where_the_cut_is(random, size):
    """Where nothing is scaled, the pixel at the corner of the result is the recorded one of the source."""
    target = min(size)
    found = crop(SIZE=target, RANDOM=random)({'image': gradient(*size)})
    top, left = found['crop_top_left']
    assert found['image'].getpixel((0, 0))[:2] == (left, top)
    assert found['image'].getpixel((target - 1, target - 1))[:2] == (left + target - 1, top + target - 1)


def test_small_images_are_enlarged_to_the_size():
    assert crop(SIZE=64)({'image': gradient(5, 7)})['image'].size == (64, 64)


@pytest.mark.parametrize('kind', ['pil', 'tensor'])
def test_a_mask_is_cut_and_mirrored_with_its_image(kind):
    image = np.zeros((40, 60, 3), np.uint8)
    image[5:30, 10:22] = 255
    mask = Image.fromarray(image[..., 0]) if kind == 'pil' else torch.from_numpy(image[..., 0].copy())
    seen = set()
    for _ in range(30):
        found = crop(SIZE=40, RANDOM=True, FLIP=0.5)({'image': Image.fromarray(image), 'mask': mask})
        seen.add(found['crop_top_left'])
        assert torch.equal((to_tensor(found['image'])[:1] + 1) / 2, to_mask(found['mask']))
    assert len(seen) > 5


@pytest.mark.parametrize('kind', ['pil', 'tensor'])
def test_a_scaled_mask_keeps_its_two_values(kind):
    image = gradient(40, 40)
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[..., 20:] = 255
    found = crop(SIZE=10)({'image': image, 'mask': mask if kind == 'tensor' else Image.fromarray(mask[0].numpy())})['mask']
    assert torch.equal(to_mask(found)[0, 0], torch.tensor([0.0] * 5 + [1.0] * 5))


def test_a_crop_of_a_tensor_says_what_to_do():
    with pytest.raises(DataError, match='put it before what makes tensors'):
        crop(SIZE=8)({'image': torch.zeros(3, 9, 9)})


def test_torchvisions_transforms_are_there_by_their_names():
    resize = TRANSFORMS.build({'NAME': 'Resize', 'SIZE': [6, 9], 'INTERPOLATION': 'bicubic'})
    found = resize({'image': gradient(12, 12), 'prompt': 'p'})
    assert found['image'].size == (9, 6) and found['prompt'] == 'p'


def test_a_typo_in_a_transform_is_found():
    with pytest.raises(ConfigError, match='did you mean RandomHorizontalFlip'):
        TRANSFORMS.build({'NAME': 'RandomHorizontlFlip'})
    with pytest.raises(ConfigError, match='did you mean SIZE'):
        TRANSFORMS.build({'NAME': 'Resize', 'SIZ': 8})


def test_a_random_transform_is_keyed_by_the_sample(folder):
    transforms = [{'NAME': 'RandomCrop', 'SIZE': 6}, {'NAME': 'RandomHorizontalFlip'}, {'NAME': 'RecordedCrop', 'SIZE': 4, 'RANDOM': True}]
    dataset = DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(folder), 'TRANSFORMS': transforms})
    alone = {int(n): batch['image'] for batch, n in OrderedLoader(dataset, 1)}
    for batch, n in OrderedLoader(dataset, 4, num_workers=2):
        assert torch.equal(batch['image'], torch.cat([alone[i] for i in n.tolist()]))
