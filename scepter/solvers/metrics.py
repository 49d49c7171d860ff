"""METRICS: what an evaluation measures.    sums(results, batch) of each batch, added up over all, figures(**totals) at the end"""
from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scepter.core.config import Config
from scepter.core.env import we
from scepter.core.errors import DataError
from scepter.core.registry import BACKBONES, METRICS
from scepter.core.schema import Component, param, part


class Metric(Component, base=True):
    """A measure over all samples of an evaluation, from sums that each batch adds to.

    It never sees how batches are shared out over processes, and keeps nothing from one evaluation to the next.
    """

    def sums(self, results: list[dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
        """What these samples add: name -> a number, an array, a tensor, or anything else with a + that adds (`Moments`).

        results: what forward_test gave, one dict per sample. batch: what it was given.
        """
        raise NotImplementedError(f'{type(self).__name__} has no sums: return what one batch adds, e.g. {{"total": ..., "count": ...}}')

    def figures(self, **sums: Any) -> dict[str, float]:
        """Name -> figure, from the sums over every sample of every process, under the names that `sums` gave them."""
        raise NotImplementedError(f'{type(self).__name__} has no figures: return {{name: number}} from the totals of its sums')

    @classmethod
    def names(cls, cfg: Config) -> set[str] | None:
        """What `figures` will be called with this config, so that a misspelled SAVE_BEST_BY is found before the run; None: not known."""
        return None


class Totals(dict):
    """Sums over the samples of an evaluation: name -> total.

    Numbers are added without rounding, as fractions, so their total is the same to the bit however batches were shared out; arrays in
    float64, in the order of batches and ranks.
    """

    def add(self, sums: dict[str, Any]) -> None:
        """Add the sums of one batch. Raises TypeError for what cannot be added."""
        for name, value in sums.items():
            value = _addable(name, value)
            self[name] = self[name] + value if name in self else value

    def everywhere(self) -> dict[str, Any]:
        """The totals over all processes, in every process; every process asks."""
        totals = Totals()
        for sums in we.gather(dict(self)):
            totals.add(sums)
        return {name: float(total) if isinstance(total, Fraction) else total for name, total in totals.items()}


def _addable(name: str, value: Any) -> Any:
    """A value in the form in which it is added. Raises TypeError for what + would only string together."""
    if isinstance(value, (str, list, dict)) or type(value) is tuple:
        raise TypeError(f'sums() gave a {type(value).__name__} for {name}: give what adds up, such as a number or an array, '
                        'so that nothing is kept of each sample')
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.item() if value.ndim == 0 else value.double() if value.is_floating_point() else value
    elif isinstance(value, (np.ndarray, np.generic)):
        value = value.item() if value.ndim == 0 else value.astype(np.float64) if value.dtype.kind == 'f' else value
    return Fraction(value) if isinstance(value, float) and math.isfinite(value) else value


@METRICS.register_class()
class AccuracyMetric(Metric):
    """Share of samples whose label is among the k likeliest.    results: logits [classes]; batch: label [B]"""

    TOPK: list[int] = param([1], 'One figure for each k: accuracy for 1, accuracy_top5 for 5.', least=1)

    @classmethod
    def names(cls, cfg: Config) -> set[str]:
        return {_of_top(k) for k in cfg.TOPK}

    def sums(self, results: list[dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
        logits = torch.stack([r['logits'] for r in results]).float().cpu()
        label = torch.as_tensor(batch['label']).cpu()
        rank = (logits > logits.gather(1, label[:, None])).sum(1)    # how many classes are likelier than the true one
        return {'hits': torch.stack([(rank < k).sum() for k in self.TOPK]), 'count': len(label)}

    def figures(self, hits: Tensor, count: int) -> dict[str, float]:    # type: ignore[override]
        return {_of_top(k): hit / count for k, hit in zip(self.TOPK, hits.tolist())}


def _of_top(k: int) -> str:
    return 'accuracy' if k == 1 else f'accuracy_top{k}'


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

    @classmethod
    def names(cls, cfg: Config) -> set[str]:
        return {'frechet_distance'}

    @torch.no_grad()
    def sums(self, results: list[dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
        drawn = torch.stack([r['image'] for r in results]).to(we.device).float() * 2 - 1
        return {kind: self._moments(images) for kind, images in (('drawn', drawn), ('real', batch['image'].to(we.device).float()))}

    def _moments(self, images: Tensor) -> Moments:
        features = self.network(images).double().cpu()
        return Moments.of((features.flatten(2).mean(2) if features.ndim > 2 else features).numpy())

    def figures(self, real: Moments, drawn: Moments) -> dict[str, float]:    # type: ignore[override]
        if min(real.count, drawn.count) < 2:
            raise DataError(f'a Fréchet distance of {real.count} real and {drawn.count} drawn images: it needs two of each at least')
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
        """Those of features [N, D]."""
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
        """The covariance [D, D], unbiased."""
        return self.products / (self.count - 1)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between two Gaussians; the root's trace from eigenvalues of a symmetric form."""
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov2 @ root), 0, None)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)
