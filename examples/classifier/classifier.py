"""Image classification, with no diffusion anywhere: a network, and nothing else of one's own."""
from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from scepter.core.registry import LOSSES, MODELS
from scepter.core.schema import param, part
from scepter.models.base import TrainModule


@MODELS.register_class()
class Classifier(TrainModule):
    """A small convolutional network.    image [B, 3, H, W] in -1..1, label [B]  ->  loss; logits [classes] per sample"""

    WIDTH: int = param(32, 'Channels of the first layer.', least=1)
    NUM_CLASSES: int = param(10, 'Classes to tell apart.', least=2)
    DROPOUT: float = param(0.2, 'Share of features dropped in training.', least=0, below=1)
    LOSS: dict = part(LOSSES, 'Error of the logits.', default={'NAME': 'CrossEntropy'})

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        widths = [3, self.WIDTH, 2 * self.WIDTH, 4 * self.WIDTH]
        self.features = nn.Sequential(*(Block(a, b) for a, b in pairwise(widths)), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(self.DROPOUT), nn.Linear(4 * widths[-1], self.NUM_CLASSES))
        self.loss = LOSSES.build(self.LOSS, logger=logger)

    def forward_train(self, image: Tensor, label: Tensor, **batch: Any) -> dict[str, Any]:
        logits = self.head(self.features(image))
        accuracy = (logits.argmax(1) == label).float().mean()
        return {'loss': self.loss(logits, label).mean(), 'accuracy': accuracy, 'probe_data': {'image': image / 2 + 0.5}}

    def forward_test(self, image: Tensor, label: Tensor | None = None, **batch: Any) -> list[dict[str, Any]]:
        logits = self.head(self.features(image)).float()
        return [{'logits': row, 'prediction': int(row.argmax())} for row in logits]


class Block(nn.Sequential):
    """Halves the size.    [B, C_in, H, W] -> [B, C_out, H/2, W/2]"""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(),
                         nn.MaxPool2d(2))
