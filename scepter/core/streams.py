"""Keyed randomness: every draw is a function of (seed, use, n), never of what was drawn before.

`n` is a sample's draw number in the one endless stream of samples. Nothing depends on the rank, the number of processes or
workers, or the order of calls, so a resume needs only the step, and no two ranks can share noise by accident.

    with streams.current(seed, n=n, step=step):        # the solver does this around each forward pass
        noise = streams.normal('noise', x0)            # row i is keyed by n[i]
        t = streams.integers('timestep', 1000, len(x0))
        level = streams.uniform('level', len(x0), tokens=64)    # [B, 64], entry (i, j) keyed by (n[i], j)
        mask = streams.permutation('mask', len(x0), 64)         # [B, 64], row i a permutation keyed by n[i]

Outside of such a context the same calls draw from torch's global generator, so a network also works on its own. A block that is computed
again in the backward pass draws again: `models.layers.checkpoint` gives it the keys that it had. torch's own checkpoint finds them where
backward() is called inside of the context, as the solver does.
Normals of rows come from Philox (Salmon et al. 2011) with (seed, use) as its key and n as its counter; single numbers, and all that is
keyed by tokens, from SplitMix64, which takes thousands of keys at once.
"""
from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MASK = (1 << 64) - 1
# made once: to make a scalar takes numpy as long as to work on a small array
GOLDEN, ONE, THREE, HALF = (np.uint64(number) for number in (0x9E3779B97F4A7C15, 1, 3, 32))
SHIFTS = tuple(np.uint64(places) for places in (30, 27, 31))
FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
TURNS = tuple(np.uint64(turn) for turn in range(8))
Tokens = int | Tensor | None    # the tokens of each row that are drawn for: the first so many, or those of these numbers, [L] or [B, L]


class Keys(NamedTuple):
    """What the draws of a moment are keyed by."""

    seed: int
    n: np.ndarray     # [B] int64, the draw number of each row
    step: int


NO_CONTEXT = Keys(0, np.empty(0, np.int64), -1)    # stands for: drawn from torch's generator, on purpose

_keys: ContextVar[Keys | None] = ContextVar('keys', default=None)
_entered: list[Keys] = []    # the contexts of all threads that have not ended, and
_has_ended = False           # whether any has


@contextmanager
def current(seed: int, n: Tensor | Sequence[int], step: int = 0) -> Iterator[None]:
    """Inside, the draws of this module are keyed by `seed` and by n [B], the draw numbers of the batch's rows."""
    global _has_ended
    keys = Keys(seed, np.asarray(n, dtype=np.int64), step)
    _entered.append(keys)
    try:
        with restored(keys):
            yield
    finally:
        _entered[:] = [other for other in _entered if other is not keys]
        _has_ended = True


def captured() -> Keys:
    """The keys of now, for `restored` to bring back where a part of the network is computed again."""
    return _current() or NO_CONTEXT


@contextmanager
def restored(keys: Keys) -> Iterator[None]:
    """Inside, draws have these keys, in whatever thread this is."""
    token = _keys.set(keys)
    try:
        yield
    finally:
        _keys.reset(token)


def _current() -> Keys | None:
    """The keys of now; None outside of any context.

    Backward passes of a GPU run in threads of their own, which know no context: there the latest one that has been entered holds.
    Raises RuntimeError where a draw of a backward pass may belong to a context that has ended: any number would make a wrong gradient.
    """
    keys = _keys.get()
    if keys is None and torch._C._current_graph_task_id() != -1:
        if _entered:
            return _entered[-1]
        if _has_ended:
            raise RuntimeError('a keyed draw in a backward pass, whose keys are gone: this part of the network is computed again by '
                               'torch.utils.checkpoint. Use scepter.models.layers.checkpoint, or call backward() inside of streams.current')
    return None if keys is NO_CONTEXT else keys


def normal(use: str, like: Tensor, tokens: Tokens = None) -> Tensor:
    """Standard normals of the shape, type and device of like [B, ...]; row i depends on n[i] alone.

    With tokens, like is [B, L, ...], and entry (i, j) depends on n[i] and the number of that token alone.
    """
    keys = _current()
    if keys is None:
        return torch.randn_like(like)
    _check_rows(keys, len(like), use)
    if tokens is None:
        return _rows(keys.seed, use, keys.n, like.shape[1:], like.device, like.dtype)
    return _token_normals(_token_bits(bits(keys.seed, use, keys.n), tokens, like.shape[1]), like.shape[2:], like.device, like.dtype)


def uniform(use: str, count: int, tokens: Tokens = None) -> Tensor:
    """[count], or with tokens [count, L], float32 in [0, 1), on the CPU; entry i depends on n[i] (and its token's number) alone."""
    found = _numbers(use, count, tokens)
    if isinstance(found, tuple):
        return torch.rand(found)
    return torch.from_numpy((found >> np.uint64(40)).astype(np.float32) * np.float32(2 ** -24))


def integers(use: str, high: int, count: int, tokens: Tokens = None) -> Tensor:
    """[count], or with tokens [count, L], int64 in 0 .. high-1, on the CPU; entry i depends on n[i] (and its token's number) alone."""
    found = _numbers(use, count, tokens)
    if isinstance(found, tuple):
        return torch.randint(0, high, found)
    return torch.from_numpy((found % np.uint64(high)).astype(np.int64))


def permutation(use: str, count: int, size: int) -> Tensor:
    """int64 [count, size], on the CPU: row i is a permutation of 0 .. size-1 that depends on n[i] alone."""
    found = _numbers(use, count, size)
    if isinstance(found, tuple):
        return torch.rand(found, dtype=torch.float64).argsort(1)
    return torch.from_numpy(found.argsort(1, kind='stable'))


def hide_from_compilers() -> None:
    """Have torch.compile step over the draws of this module. It would make tensors of their 64-bit integers, which cannot do without
    a sign what numpy's can."""
    for draw in (normal, uniform, integers, permutation, row_seeds, normal_rows):
        if not hasattr(draw, '_torchdynamo_disable'):
            globals()[draw.__name__] = torch.compiler.disable(draw)


def row_seeds(seed: int | Sequence[int], count: int, first: int = 0) -> list[int]:
    """One 64-bit seed per row. Row i of seed s is hash(s, first + i), so it does not depend on the batch it is drawn in.

    A sequence is taken as it is. Raises ValueError where its length is not count.
    """
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise ValueError(f'{len(seed)} seeds for {count} rows: give one number, or one seed for each row')
        return [int(s) for s in seed]
    return [int(b) for b in bits(seed, 'row', np.arange(first, first + count))]


def normal_rows(seeds: Sequence[int], use: str, shape: Sequence[int], device: torch.device | str = 'cpu',
                dtype: torch.dtype = torch.float32, tokens: Tokens = None) -> Tensor:
    """Standard normals [len(seeds), *shape]; row i depends on seeds[i] and `use` alone, to the bit, on every device.

    With tokens [len(seeds), L, *shape]; entry (i, j) depends on seeds[i], `use` and the number of that token alone.
    """
    if tokens is not None:
        words = np.array([s & MASK for s in seeds], np.uint64)
        return _token_normals(_token_bits(_mixed(words, np.array([zlib.crc32(use.encode())], np.uint64)), tokens), shape, device, dtype)
    rows = [_rows(s, use, np.zeros(1, np.int64), shape, torch.device('cpu'), dtype) for s in seeds]
    return torch.cat(rows).to(device) if rows else torch.empty((0, *shape), device=device, dtype=dtype)


def permute(seed: int, epoch: int, place: int, size: int) -> int:
    """The index that stands at `place` in the shuffled order of this epoch: a keyed bijection of 0 .. size-1.

    A Feistel network on the next even number of bits, walked until it lands inside (Black & Rogaway 2002). With four rounds the
    pairs of neighbours in an order of 10 were 60 standard deviations from even; with eight they are even for every size tried.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = _mix(seed & MASK, epoch + 1)
    value = place
    while True:
        left, right = value >> half, value & mask
        for turn in range(8):
            left, right = right, left ^ (_mix(key, right << 3 | turn) >> 32 & mask)
        value = left << half | right
        if value < size:
            return value


def permuted(seed: int, n: np.ndarray, size: int) -> np.ndarray:
    """`permute` of many draws at once: int64 [B], numbers in the endless stream of shuffled epochs -> int64 [B], indices."""
    epoch, place = np.divmod(np.asarray(n, np.int64), size)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = _mixed(np.uint64(seed & MASK), (epoch + 1).astype(np.uint64))
    value = place.astype(np.uint64)
    walking = np.arange(len(value))
    while len(walking):
        now, keys = value[walking], key[walking]
        left, right = now >> half, now & mask
        for turn in TURNS:
            left, right = right, left ^ (_mixed(keys, right << THREE | turn) >> HALF & mask)
        value[walking] = now = left << half | right
        walking = walking[now >= size]
    return value.astype(np.int64)


def bits(seed: int, use: str, n: np.ndarray) -> np.ndarray:
    """uint64 [len(n)]: 64 even bits for each of n, by SplitMix64's finalizer applied to the key, then to each n."""
    key = _mix(seed & MASK, zlib.crc32(use.encode()))
    with np.errstate(over='ignore'):
        z = np.asarray(n).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        return z ^ (z >> np.uint64(31))


def seed_global(*words: int | str) -> int:
    """A 63-bit seed made of words, for torch.manual_seed and its like."""
    return _state(words) >> 1


def seeds_global(*words: int | str, n: np.ndarray) -> list[int]:
    """`seed_global(*words, n)` of many numbers at once: int64 [B] -> B seeds."""
    return (_mixed(np.uint64(_state(words)), np.asarray(n, np.int64).astype(np.uint64)) >> np.uint64(1)).tolist()


def _state(words: Sequence[int | str]) -> int:
    """One 64-bit word out of many."""
    state = 0
    for word in words:
        state = _mix(state, zlib.crc32(word.encode()) if isinstance(word, str) else word & MASK)
    return state


def _mix(a: int, b: int) -> int:
    """One 64-bit word out of two (SplitMix64's finalizer), in plain integers."""
    z = (a + (b + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def _mixed(a: np.ndarray | np.uint64, b: np.ndarray) -> np.ndarray:
    """`_mix` of many words at once."""
    z = a + (b + ONE) * GOLDEN
    z = (z ^ z >> SHIFTS[0]) * FACTORS[0]
    z = (z ^ z >> SHIFTS[1]) * FACTORS[1]
    return z ^ z >> SHIFTS[2]


def _rows(seed: int, use: str, n: np.ndarray, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    kind = np.float64 if dtype == torch.float64 else np.float32
    out = np.empty((len(n), math.prod(shape)), kind)
    philox = np.random.Philox(key=[seed & MASK, zlib.crc32(use.encode())])
    state, draw = philox.state, np.random.Generator(philox).standard_normal
    for row, counter in zip(out, n.tolist()):
        # the counter's low word counts within the row, its second word is the row's own number
        state['state']['counter'][:] = (0, counter & MASK, 0, 0)
        state['buffer_pos'], state['has_uint32'] = 4, 0
        philox.state = state
        draw(out=row, dtype=kind)
    return torch.from_numpy(out).reshape(len(n), *shape).to(device=device, dtype=dtype)


def _numbers(use: str, count: int, tokens: Tokens) -> np.ndarray | tuple[int, ...]:
    """64 even bits for each entry, uint64 [count] or [count, L]; where there is no context, the shape alone."""
    keys = _current()
    if keys is None:
        return (count,) if tokens is None else (count, tokens if isinstance(tokens, int) else tokens.shape[-1])
    _check_rows(keys, count, use)
    words = bits(keys.seed, use, keys.n)
    return words if tokens is None else _token_bits(words, tokens)


def _token_bits(rows: np.ndarray, tokens: int | Tensor, length: int | None = None) -> np.ndarray:
    """uint64 [B], and the numbers of L tokens  ->  uint64 [B, L]. Raises ValueError where they do not fit the B rows of `length`."""
    numbers = np.arange(tokens) if isinstance(tokens, int) else tokens.detach().cpu().numpy()
    if numbers.shape[:-1] not in ((), (len(rows),)) or (length is not None and numbers.shape[-1] != length):
        wanted = '[L] or [B, L]' if length is None else f'[{length}] or [{len(rows)}, {length}]'
        raise ValueError(f'tokens of shape {list(numbers.shape)} for {len(rows)} rows: their numbers are {wanted}')
    return _mixed(rows[:, None], np.broadcast_to(numbers.astype(np.uint64), (len(rows), numbers.shape[-1])))


def _token_normals(keys: np.ndarray, shape: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """uint64 [B, L]  ->  standard normals [B, L, *shape] (Box & Muller 1958), two out of each 64 bits.

    In float64 whatever the type: so another processor's last digits of log and cos are rounded off.
    """
    count = math.prod(shape)
    words = _mixed(keys[..., None], np.arange((count + 1) // 2, dtype=np.uint64))
    radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)).astype(np.float64) + 1) * 2 ** -32))    # of (0, 1]: no infinity
    angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2 * np.pi * 2 ** -32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(*keys.shape, -1)[..., :count]
    kind = np.float64 if dtype == torch.float64 else np.float32
    return torch.from_numpy(pairs.astype(kind)).reshape(*keys.shape, *shape).to(device=device, dtype=dtype)


def _check_rows(keys: Keys, count: int, use: str) -> None:
    if len(keys.n) != count:
        raise ValueError(f'{count} rows of {use!r} in a batch of {len(keys.n)} samples: draw for the whole batch and select, '
                         'or pass the noise explicitly')
