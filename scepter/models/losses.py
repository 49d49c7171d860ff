"""Errors of single values, for networks to weigh and average."""
from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scepter.core.registry import LOSSES
from scepter.core.schema import Component, param


@LOSSES.register_class()
class ReconstructLoss(Component, nn.Module):
    """How far an output is from its target, value by value.    out, target [...]  ->  [...]"""

    LOSS_TYPE: Literal['l1', 'l2', 'huber'] = param(
        'l2', 'l1 = |e|; l2 = e^2; huber = e^2 / 2 up to HUBER_DELTA and HUBER_DELTA * (|e| - HUBER_DELTA / 2) beyond.')
    HUBER_DELTA: float = param(1.0, 'The error at which huber turns from a square into a line.', above=0)

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        if self.LOSS_TYPE == 'l1':
            return F.l1_loss(out, target, reduction='none')
        if self.LOSS_TYPE == 'l2':
            return F.mse_loss(out, target, reduction='none')
        return F.huber_loss(out, target, reduction='none', delta=self.HUBER_DELTA)


@LOSSES.register_class()
class CrossEntropy(Component, nn.Module):
    """Surprise at the right class, in nats.    logits [B, C], labels [B] int64  ->  [B]"""

    LABEL_SMOOTHING: float = param(0.0, 'Share of the target spread evenly over all classes.', least=0, below=1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction='none', label_smoothing=self.LABEL_SMOOTHING)
