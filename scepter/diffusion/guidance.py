"""Guidance: (network, conditionings, scale) becomes one function (x, t) -> out.

With conditionings 0 .. n-1 (0 is the wanted one, n-1 the empty one) and scales g,

    out = out[n-1] + g[n-2] * (out[n-2] - out[n-1]) + ... + g[0] * (out[0] - out[1])

which is a weighted sum of the outputs. n = 2 is classifier-free guidance (arXiv:2207.12598); n = 3 guides by text and by image
(arXiv:2211.09800). Conditionings of weight 0 are not computed, the others in one batched call.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]             # (x [B, ...], t [B]) -> out [B, ...]
Scale = float | Tensor                                   # one number, or [B]: one for each row
GuideScale = Scale | Mapping[str, Scale] | Sequence[Scale]
ModelKwargs = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def guided(model: Callable[..., Tensor], model_kwargs: ModelKwargs | None, guide_scale: GuideScale | None,
           guide_rescale: float, like: Tensor) -> Predict:
    """The network under guidance, as a function of the state and the time alone.

    model_kwargs: [wanted, ..., empty]; or one dict, where there is no guidance.
    guide_scale: None: the wanted one alone. A number, or [B]: one scale. {'image': g, 'text': g}: for [both, image alone, empty].
    A list: one scale less than there are model_kwargs.
    guide_rescale: 0 .. 1, how much of each row's standard deviation is taken from the wanted output (arXiv:2305.08891, section 3.4).
    like: [B, ...], gives rows, device and the type in which outputs are summed.
    Raises ValueError where scales and model_kwargs do not match, and for a scale that is no finite number.
    """
    every = [model_kwargs or {}] if model_kwargs is None or isinstance(model_kwargs, Mapping) else list(model_kwargs)
    weights = _weights(guide_scale, len(every), like)
    if not 0 <= guide_rescale <= 1:
        raise ValueError(f'guide_rescale is {guide_rescale}, expected 0 .. 1')
    kept = [i for i, weight in enumerate(weights) if isinstance(weight, Tensor) or weight != 0 or (i == 0 and guide_rescale)]
    wanted = [every[i] for i in kept]

    if len(kept) == 1:
        only = wanted[0]
        return lambda x, t: shaped_like(x, model(x, t=t, **only), model).to(like.dtype)

    count, weights = len(kept), [weights[i] for i in kept]
    together = batched(wanted, len(like))

    def outputs(x: Tensor, t: Tensor) -> Sequence[Tensor]:
        if together is None:
            return [shaped_like(x, model(x, t=t, **kwargs), model).to(like.dtype) for kwargs in wanted]
        xs = torch.cat([x] * count)
        return shaped_like(xs, model(xs, t=torch.cat([t] * count), **together), model).to(like.dtype).chunk(count)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        outs = outputs(x, t)
        out = weights[0] * outs[0]
        for weight, other in zip(weights[1:], outs[1:]):
            out = out + weight * other
        return rescale(out, outs[0], guide_rescale) if guide_rescale else out
    return predict


def shaped_like(x: Tensor, out: Tensor, model: Callable[..., Tensor]) -> Tensor:
    """A network's output, which has a value for each of x: any other would be broadcast without a word. Raises ValueError."""
    if out.shape != x.shape:
        name = getattr(model, '__name__', type(model).__name__)
        raise ValueError(f'{name} gave {list(out.shape)} for x {list(x.shape)}: expected one value for each of x')
    return out


def rescale(out: Tensor, wanted: Tensor, share: float) -> Tensor:
    """out with `share` of each row's standard deviation replaced by that of the wanted output (arXiv:2305.08891, section 3.4)."""
    rows = tuple(range(1, out.ndim))
    factor = wanted.std(rows, keepdim=True) / out.std(rows, keepdim=True).clamp(min=torch.finfo(out.dtype).tiny)
    return out * (share * factor + (1 - share))


def bounded(x0: Tensor, clamp: float | None, percentile: float | None) -> Tensor:
    """x0 within bounds: each row divided by its own quantile of |x0| where that is over 1 (arXiv:2205.11487, section 2.3), or cut at
    +-clamp. The quantile, where given, takes the place of the cut."""
    if percentile is not None:
        bound = x0.flatten(1).abs().quantile(percentile, dim=1).clamp(min=1).view(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-bound, bound) / bound
    return x0 if clamp is None else x0.clamp(-clamp, clamp)


def batched(trees: Sequence[Any], rows: int) -> Any:
    """Trees of equal form laid one behind the other along the batch, or None where they cannot be.

    Tensors [rows, ...] of equal shape are joined; what is the same in all of them is passed once. Nothing is padded: contexts of
    different length, or anything else that differs, cannot be joined, and the network is then called once for each.
    """
    try:
        return _join(list(trees), rows)
    except _Apart:
        return None


class _Apart(Exception):
    """These trees cannot be joined."""


def _join(nodes: list[Any], rows: int) -> Any:
    first = nodes[0]
    if isinstance(first, Tensor):
        if first.ndim and len(first) == rows and all(isinstance(n, Tensor) and n.shape == first.shape for n in nodes):
            return torch.cat(nodes)
        if all(node is first for node in nodes):
            return first
        raise _Apart
    if isinstance(first, Mapping) and all(isinstance(n, Mapping) and n.keys() == first.keys() for n in nodes):
        return {key: _join([node[key] for node in nodes], rows) for key in first}
    if isinstance(first, tuple) and hasattr(first, '_fields') and all(type(n) is type(first) for n in nodes):    # a NamedTuple
        return type(first)(*(_join(list(group), rows) for group in zip(*nodes)))
    if isinstance(first, list | tuple) and all(type(n) is type(first) and len(n) == len(first) for n in nodes):
        if all(isinstance(leaf, Tensor | Mapping) for node in nodes for leaf in node):
            return type(first)(_join(list(group), rows) for group in zip(*nodes))
        raise _Apart    # a list of words or numbers may be one entry for each row
    if first is None or isinstance(first, bool | int | float | str):
        if all(type(node) is type(first) and node == first for node in nodes):
            return first
    raise _Apart


def _weights(guide_scale: GuideScale | None, count: int, like: Tensor) -> list[Scale]:
    """The factor of each of `count` outputs; a tensor of scales is shaped to the rows of like."""
    if guide_scale is None:
        return [1.0, *[0.0] * (count - 1)]
    if isinstance(guide_scale, Mapping):
        if set(guide_scale) != {'image', 'text'}:
            raise ValueError(f'guide_scale has the keys {sorted(guide_scale)}, expected image and text')
        scales: list[Scale] = [guide_scale['text'], guide_scale['image']]
    else:
        scales = list(guide_scale) if isinstance(guide_scale, Sequence) else [guide_scale]
    if len(scales) != count - 1:
        raise ValueError(f'guide_scale has {len(scales)} number(s) and model_kwargs {count} set(s): expected one scale less than sets, '
                         'e.g. guide_scale=7.5 with model_kwargs=[{...the prompt...}, {...the empty prompt...}]')
    shaped = [_per_row(scale, like) for scale in scales]
    return [shaped[0], *[after - before for before, after in pairwise(shaped)], 1 - shaped[-1]]


def _per_row(scale: Scale, like: Tensor) -> Scale:
    if not torch.as_tensor(scale).isfinite().all():
        raise ValueError(f'guide_scale is {scale}: expected finite numbers')
    if not isinstance(scale, Tensor) or scale.ndim == 0:
        return float(scale)
    if scale.shape != (len(like),):
        raise ValueError(f'guide_scale has shape {list(scale.shape)}, expected [{len(like)}]: one scale for each row')
    return scale.to(like).view(-1, *[1] * (like.ndim - 1))
