"""METRICS: what an evaluation measures.    update(results, batch) on each batch, compute() at the end of all"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from scepter.core.env import we
from scepter.core.errors import DataError
from scepter.core.registry import BACKBONES, METRICS
from scepter.core.schema import Component, param, part


class Metric(Component, base=True):
    """A measure over an evaluation: fed with results (one dict per sample) and the batch they came from."""

    def reset(self) -> None:
        raise NotImplementedError

    def update(self, results: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        """The figures over all processes' samples; every process calls it and gets the same."""
        raise NotImplementedError


@METRICS.register_class()
class AccuracyMetric(Metric):
    """Share of samples whose label is among the k likeliest.    results: logits [classes]; batch: label [B]"""

    TOPK: list[int] = param([1], 'One figure for each k: accuracy for 1, accuracy_top5 for 5.', least=1)

    def reset(self) -> None:
        self.hits, self.count = dict.fromkeys(self.TOPK, 0), 0

    def update(self, results: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        logits = torch.stack([r['logits'] for r in results]).float().cpu()
        label = torch.as_tensor(batch['label']).cpu()
        rank = (logits > logits.gather(1, label[:, None])).sum(1)    # how many classes are likelier than the true one
        for k in self.TOPK:
            self.hits[k] += int((rank < k).sum())
        self.count += len(label)

    def compute(self) -> dict[str, float]:
        parts = we.gather((self.hits, self.count))
        total = sum(count for _, count in parts)
        return {'accuracy' if k == 1 else f'accuracy_top{k}': sum(hits[k] for hits, _ in parts) / max(1, total) for k in self.TOPK}


@METRICS.register_class()
class FrechetDistance(Metric):
    """Fréchet distance between the features of drawn and of real images (Heusel et al. 2017).    results: image; batch: image

    With the Inception network of that paper as FEATURES it is the FID; with another network it is comparable to itself alone.
    Needs at least two samples of each kind, and more of them than features to mean much.
    """

    FEATURES: dict = part(BACKBONES, 'Network: images [B, 3, H, W] in -1..1 -> features [B, D] (further axes are averaged).')
    SAVE: str | None = param(None, 'An .npz file for the mean, covariance and count of both kinds.')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.network = BACKBONES.build(self.FEATURES, logger=logger).eval().requires_grad_(False).to(we.device)
        self.reset()

    def reset(self) -> None:
        self.moments = {'real': Moments(), 'drawn': Moments()}

    @torch.no_grad()
    def update(self, results: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        drawn = torch.stack([r['image'] for r in results]).to(we.device).float() * 2 - 1
        for kind, images in (('drawn', drawn), ('real', batch['image'].to(we.device).float())):
            features = self.network(images).double().cpu()
            self.moments[kind] += Moments.of((features.flatten(2).mean(2) if features.ndim > 2 else features).numpy())

    def compute(self) -> dict[str, float]:
        real, drawn = (sum(parts, Moments()) for parts in zip(*we.gather((self.moments['real'], self.moments['drawn']))))
        if min(real.count, drawn.count) < 2:
            raise DataError(f'a Fréchet distance of {real.count} real and {drawn.count} drawn images: EVAL_DATA needs two samples at least')
        if self.SAVE and we.is_main:
            np.savez(self.SAVE, **{f'{kind}_{name}': value for kind, m in (('real', real), ('drawn', drawn))
                                   for name, value in (('mean', m.mean), ('cov', m.cov), ('count', m.count))})
        return {'frechet_distance': frechet_distance(real.mean, real.cov, drawn.mean, drawn.cov)}


class Moments(NamedTuple):
    """Count, mean [D] and centred products [D, D] of features, which add over batches and processes (Chan et al. 1979)."""
    count: int = 0
    mean: np.ndarray | float = 0.0
    products: np.ndarray | float = 0.0

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        centred = features - (mean := features.mean(0))
        return cls(len(features), mean, centred.T @ centred)

    def __add__(self, other: Moments) -> Moments:    # type: ignore[override]
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        step = other.mean - self.mean
        return Moments(count, self.mean + step * (other.count / count),
                       self.products + other.products + np.outer(step, step) * (self.count * other.count / count))

    @property
    def cov(self) -> np.ndarray:
        return self.products / (self.count - 1)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between two Gaussians; the root's trace from eigenvalues of a symmetric form."""
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov2 @ root), 0, None)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)
