"""Samples of one batch, as the network gets them."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scepter.core.errors import DataError


def collate(samples: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Tensors, arrays, numbers and tuples of numbers stacked, the rest in lists.

    Raises DataError, with two of the names, where they have not the same keys or shapes.
    """
    for i, sample in enumerate(samples):
        if sample.keys() != samples[0].keys():
            raise DataError(f'samples of one batch need the same keys: {names[0]} has {", ".join(samples[0])}; '
                            f'{names[i]} has {", ".join(sample)}')
    return {key: _stack(key, [sample[key] for sample in samples], names) for key in samples[0]}


def _stack(key: str, values: list[Any], names: Sequence[str]) -> Any:
    if isinstance(values[0], (bool, int, float)):
        return torch.tensor(values)
    if not _is_numeric(values[0]):
        return values
    tensors = [torch.as_tensor(v) for v in values]
    for i, tensor in enumerate(tensors):
        if tensor.shape != tensors[0].shape:
            raise DataError(f'{key} has shape {list(tensors[0].shape)} in {names[0]}, but {list(tensor.shape)} in {names[i]}: samples of '
                            'one batch need one shape; give the dataset a transform that makes it, '
                            'e.g. TRANSFORMS: [{NAME: RecordedCrop, SIZE: 512}]')
    return torch.stack(tensors)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, (bool, int, float)) for v in value)
    return isinstance(value, (Tensor, np.ndarray, np.generic))
