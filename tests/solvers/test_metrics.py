"""Figures of an evaluation against their definitions."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from scepter.core.registry import BACKBONES, METRICS
from scepter.models.base import BaseModel
from scepter.solvers.metrics import Moments, Totals, frechet_distance


def test_accuracy_counts_the_k_likeliest_over_all_batches():
    metric = METRICS.build({'NAME': 'AccuracyMetric', 'TOPK': [1, 2]})
    totals = Totals()
    for logits, label in (([[3.0, 2, 1], [1.0, 3, 2]], [0, 2]), ([[1.0, 2, 3]], [0])):
        totals.add(metric.sums([{'logits': torch.tensor(row)} for row in logits], {'label': torch.tensor(label)}))
    assert metric.figures(**totals.everywhere()) == {'accuracy': pytest.approx(1 / 3), 'accuracy_top2': pytest.approx(2 / 3)}


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form():
    scipy_linalg = pytest.importorskip('scipy.linalg')
    rng = np.random.default_rng(0)
    a, b = (m @ m.T for m in rng.normal(size=(2, 5, 5)))
    mean = rng.normal(size=5)
    expected = (mean ** 2).sum() + np.trace(a + b - 2 * np.real(scipy_linalg.sqrtm(a @ b)))
    assert frechet_distance(np.zeros(5), a, mean, b) == pytest.approx(expected)
    assert frechet_distance(mean, a, mean, a) == pytest.approx(0, abs=1e-8)


def test_a_feature_network_measures_drawn_against_real_images(tmp_path):
    @BACKBONES.register_class()
    class MeanColour(BaseModel):
        def forward(self, x: Tensor) -> Tensor:
            return x

    metric = METRICS.build({'NAME': 'FrechetDistance', 'FEATURES': {'NAME': 'MeanColour'}, 'SAVE': str(tmp_path / 'features.npz')})
    real = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def measure(shift: float) -> float:
        totals = Totals()
        for part in real.split(20):
            totals.add(metric.sums([{'image': image + shift} for image in part], {'image': part * 2 - 1}))
        return metric.figures(**totals.everywhere())['frechet_distance']

    assert measure(0.0) == pytest.approx(0, abs=1e-6)
    assert measure(0.25) == pytest.approx(3 * 0.5 ** 2, rel=1e-4)      # features are in -1..1
    assert np.load(tmp_path / 'features.npz')['real_count'] == 32


def test_moments_of_parts_add_up_to_those_of_the_whole():
    features = np.random.default_rng(0).normal(size=(50, 6)) + 1e4      # far from nought, where plain sums of squares would fail
    parts = sum((Moments.of(part) for part in np.split(features, [1, 20, 21])), Moments())
    assert parts.count == 50
    assert np.allclose(parts.mean, features.mean(0), rtol=1e-12)
    assert np.allclose(parts.cov, np.cov(features, rowvar=False), rtol=1e-9)
