"""The 1,797 handwritten digits that come with scikit-learn, with captions: how a user brings in a dataset of his own."""
from __future__ import annotations

from typing import Any, Literal

import torch

from scepter.core.registry import DATASETS, need
from scepter.core.schema import param
from scepter.data.datasets import BaseDataset

WORDS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
WORDINGS = ('a handwritten digit {}', 'the number {}', 'a {} written by hand', 'a picture of the digit {}')
HELD_OUT = 5     # every fifth digit is never trained on; it tests the reader of examples/digits/demo.py


@DATASETS.register_class()
class DigitsDataset(BaseDataset):
    """Digits in 32x32 RGB.    image [3, 32, 32] in -1..1, prompt in one of several wordings, label 0..9"""

    SPLIT: Literal['train', 'test', 'all'] = param('train', 'train leaves out every fifth digit, test is those.')
    IMAGE_SIZE: int = param(32, 'Side of the picture; the originals are 8x8.', least=1)
    COUNT: int | None = param(None, 'Only the first so many.', least=1)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.images, self.labels = (values[:self.COUNT] for values in load_digits(self.SPLIT, self.IMAGE_SIZE))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = int(self.labels[index])
        wording = WORDINGS[torch.randint(len(WORDINGS), ()).item()]     # torch's generator is keyed by the sample while it is read
        return {'image': self.images[index], 'prompt': wording.format(WORDS[label]), 'label': label}


@DATASETS.register_class()
class DigitPromptsDataset(BaseDataset):
    """Each digit in each wording, COPIES times, to draw.    prompt, label 0..9"""

    COPIES: int = param(15, 'Pictures of each digit in each wording.', least=1)

    def __len__(self) -> int:
        return len(WORDS) * len(WORDINGS) * self.COPIES

    def __getitem__(self, index: int) -> dict[str, Any]:
        label, wording = index % len(WORDS), index // len(WORDS) % len(WORDINGS)
        return {'prompt': WORDINGS[wording].format(WORDS[label]), 'label': label}


def load_digits(split: str = 'all', size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 3, size, size] float32 in -1..1 and labels [N]."""
    digits = need('sklearn.datasets', 'data').load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(images, size=(size, size), mode='bicubic', align_corners=False).clamp(-1, 1)
    labels = torch.tensor(digits.target)
    held_out = torch.arange(len(labels)) % HELD_OUT == 0
    kept = {'train': ~held_out, 'test': held_out, 'all': torch.ones_like(held_out)}[split]
    return images[kept].expand(-1, 3, -1, -1).contiguous(), labels[kept]
