"""Networks whose weights come from a file, built without the random numbers that the file would replace."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

DRAWS = {'normal_', 'uniform_', 'trunc_normal_', 'kaiming_normal_', 'kaiming_uniform_', 'xavier_normal_', 'xavier_uniform_', 'orthogonal_'}


def unfilled(cfg: Mapping[str, Any]) -> AbstractContextManager:
    """Inside, a network of this config is built with parameters as memory holds them: 0.5 s instead of 6 for Stable Diffusion 1.5.

    For loading that leaves nothing out. Where IGNORE_KEYS allows that something is left as it was built, nothing changes.
    """
    return nullcontext() if _has_ignored_keys(cfg) else _Unfilled()


class _Unfilled(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get('tensor')
        if isinstance(target, nn.Parameter) and getattr(func, '__name__', '') in DRAWS:
            return target
        return func(*args, **kwargs)


def _has_ignored_keys(node: Any) -> bool:
    if isinstance(node, list):
        return any(map(_has_ignored_keys, node))
    return isinstance(node, Mapping) and (bool(node.get('IGNORE_KEYS')) or any(map(_has_ignored_keys, node.values())))
