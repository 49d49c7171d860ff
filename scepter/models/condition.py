"""Condition: what a network is told beside x and t. Widths: how much of it an embedder gives, and a network takes."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Condition(NamedTuple):
    """What a network is told beside x and t; None where it is not told such a thing.

    An embedder that gives a context alone may give the plain tensor: `of` is the one place where that becomes a Condition, and a network
    that reads more than a context calls it first. Each tensor has a row for each of x.
    """
    context: Any = None              # [B, L, D], for attention; or what the network's own `precompute` made of it
    vector: Tensor | None = None     # [B, D], added to the time
    label: Tensor | None = None      # int64 [B], the class, for a network with a table of its own
    mask: Tensor | None = None       # bool [B, L], True where the context may be seen; None: everywhere
    beside: Tensor | None = None     # [B, C', ...], further channels of x

    @classmethod
    def of(cls, cond: Any) -> Condition:
        """A Condition as it is, a tensor [B, L, D] as its context, None or an empty dict as nothing. Raises TypeError for all else."""
        if isinstance(cond, cls):
            return cond
        if isinstance(cond, Tensor):
            return cls(cond)
        if cond is None or (isinstance(cond, Mapping) and not cond):
            return cls()
        given = f'a dict of {", ".join(map(str, cond))}' if isinstance(cond, Mapping) else f'a {type(cond).__name__}'
        raise TypeError(f'a condition is a tensor [B, L, D] or a Condition({", ".join(cls._fields)}), but got {given}: '
                        'what was crossattn is context, y is vector or label, concat is beside')

    def __contains__(self, part: object) -> bool:
        """Raises TypeError: `'y' in cond`, the question for a dict, would be answered by False."""
        raise TypeError(f'a Condition is no dict: ask for {part} by its name, cond.{part} is not None; it has {", ".join(self._fields)}')


class Widths(NamedTuple):
    """How much of each part of a Condition an embedder `gives` and a network `takes`; None where there is none of it.

    A network also says with it what x is: `channels`, which its prediction has too, and the channels that it reads `beside` them.
    """
    context: int | None = None     # D
    vector: int | None = None      # D
    classes: int | None = None     # of the label, with the one that stands for none
    mask: bool = False             # given: contexts come with one; taken: it is heeded
    channels: int | None = None
    beside: int | None = None

    def misfit(self, takes: Widths) -> str:
        """What is wrong between what is given and what the network takes; empty where they fit."""
        kinds = (('the context', 'wide', 'CONTEXT_DIM', self.context, takes.context),
                 ('the vector', 'wide', 'ADM_IN_CHANNELS', self.vector, takes.vector),
                 ('the label', 'classes, with the one that stands for none', 'NUM_CLASSES', self.classes, takes.classes))
        for what, unit, key, given, taken in kinds:
            if given is None and taken is not None:
                return f'the network expects {what}, {taken} {unit} ({key}), but COND_STAGE_MODEL gives none'
            if given != taken:
                expected = 'takes none' if taken is None else f'expects {taken}'
                return f'{what} of COND_STAGE_MODEL is {given} {unit}, but the network {expected} ({key})'
        if self.mask and not takes.mask:
            return 'the context of COND_STAGE_MODEL comes with a mask, which the network does not heed: it would look at the padding'
        return ''
