"""Keyed randomness: a draw is a function of (seed, use, n) alone, and its numbers are as random as they claim to be."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from scepter.core import streams


def draws(n: list[int], seed: int = 7, use: str = 'noise', step: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with streams.current(seed, n=n, step=step):
        return streams.normal(use, torch.empty(len(n), 3, 5)), streams.uniform(use, len(n)), streams.integers(use, 1000, len(n))


def test_a_row_is_the_same_in_every_batch_order_and_step():
    whole = draws(list(range(100, 132)))
    for n in ([131, 100], [117], list(range(131, 99, -1))):
        for all_rows, rows in zip(whole, draws(n, step=9)):
            assert torch.equal(rows, all_rows[[i - 100 for i in n]])


def test_seed_use_and_number_each_change_the_draw():
    base = draws([1])
    for other in (draws([1], seed=8), draws([1], use='other'), draws([2]), draws([-1]), draws([2 ** 62])):
        assert not torch.equal(base[0], other[0]) and base[1] != other[1]


def test_nothing_is_consumed_and_the_global_generator_is_untouched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = draws([5]), draws([5])

    assert all(torch.equal(a, b) for a, b in zip(first, second)) and torch.equal(before, torch.get_rng_state())


def test_outside_of_a_context_the_global_generator_draws():
    def three() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [streams.normal('a', torch.empty(2, 2)), streams.uniform('a', 3), streams.integers('a', 10, 3)]

    assert all(torch.equal(a, b) for a, b in zip(three(), three()))
    assert not torch.equal(streams.uniform('a', 3), streams.uniform('a', 3))


def test_contexts_nest_and_end_after_an_error():
    with streams.current(1, [1, 2]):
        with pytest.raises(ZeroDivisionError), streams.current(2, [1]):
            raise ZeroDivisionError
        assert torch.equal(streams.uniform('a', 2), streams.uniform('a', 2))
        with pytest.raises(ValueError, match=r"3 rows of 'a' in a batch of 2"):
            streams.uniform('a', 3)


def test_the_numbers_of_earlier_runs_are_still_the_same():
    with streams.current(7, n=[0, 5, 2 ** 40], step=3):
        noise, u, t = streams.normal('noise', torch.empty(3, 2)), streams.uniform('u', 3), streams.integers('t', 1000, 3)

    assert noise.tolist() == [[1.4013326168060303, -0.3160632252693176], [-0.13590461015701294, -0.061519816517829895],
                              [1.4230353832244873, 0.9132716655731201]]
    assert u.tolist() == [0.35259807109832764, 0.17789942026138306, 0.5018131732940674] and t.tolist() == [587, 749, 31]
    assert streams.row_seeds(5, 2) == [6775576434412153118, 14742398466460560828]
    assert streams.normal_rows([1, 2], 'a', (2,)).tolist() == [[-0.28372856974601746, -0.7085917592048645],
                                                               [-1.4925726652145386, 0.8841422200202942]]
    assert streams.permuted(7, np.arange(12), 5).tolist() == [1, 3, 2, 4, 0, 4, 2, 0, 3, 1, 0, 4]


# ------------------------------------------------------------------------------------------------ tokens and permutations
def token_draws(n: list[int], tokens: int | torch.Tensor, seed: int = 7, use: str = 'head') -> tuple[torch.Tensor, ...]:
    length = tokens if isinstance(tokens, int) else tokens.shape[-1]
    with streams.current(seed, n=n):
        return (streams.normal(use, torch.empty(len(n), length, 3), tokens), streams.uniform(use, len(n), tokens),
                streams.integers(use, 1000, len(n), tokens))


def test_a_token_is_the_same_in_every_batch_and_in_every_choice_of_tokens():
    whole = token_draws([100, 101, 102, 103], 64)
    for all_rows, some in zip(whole, token_draws([103, 101], torch.tensor([[63, 0, 7], [5, 5, 62]]))):
        assert torch.equal(some[0], all_rows[3, [63, 0, 7]]) and torch.equal(some[1], all_rows[1, [5, 5, 62]])
    for all_rows, some in zip(whole, token_draws([102], torch.tensor([9, 8]))):
        assert torch.equal(some[0], all_rows[2, [9, 8]])


def test_seed_use_number_and_token_each_change_a_tokens_draw():
    base = token_draws([1], 2)
    assert not torch.equal(base[0][0, 0], base[0][0, 1]) and base[1][0, 0] != base[1][0, 1]
    for other in (token_draws([1], 2, seed=8), token_draws([1], 2, use='other'), token_draws([2], 2)):
        assert not torch.equal(base[0], other[0]) and not torch.equal(base[1], other[1])


def test_normals_of_tokens_have_the_moments_of_a_normal_and_neither_rows_nor_tokens_nor_entries_go_together():
    with streams.current(11, np.arange(64)):
        x = streams.normal('head', torch.empty(64, 256, 17), tokens=256).double()

    count = x.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x ** power).mean() - moment) < 5 * (spread / count) ** 0.5
    for a, b in ((x[:-1], x[1:]), (x[:, :-1], x[:, 1:]), (x[..., :-1], x[..., 1:]), (x[..., ::2][..., :8].square(), x[..., 1::2].square())):
        assert abs(((a - a.mean()) * (b - b.mean())).mean()) < 5 * (a.var() * b.var() / a.numel()).sqrt()
    histogram = np.bincount(np.clip((torch.special.ndtr(x).numpy() * 64).astype(int).ravel(), 0, 63), minlength=64)
    assert abs(chi_square(histogram)) < 5


def test_tokens_of_sampling_are_keyed_by_the_seed_of_their_row():
    seeds = streams.row_seeds(5, 4)
    whole = streams.normal_rows(seeds, 'head', (3,), tokens=16)
    assert whole.shape == (4, 16, 3)
    assert torch.equal(streams.normal_rows(seeds[2:3], 'head', (3,), tokens=torch.tensor([15, 4]))[0], whole[2, [15, 4]])


def test_every_row_of_a_permutation_is_one_and_depends_on_its_number_alone():
    with streams.current(7, n=[10, 11, 12]):
        whole = streams.permutation('mask', 3, 64)
    with streams.current(7, n=[12]):
        alone = streams.permutation('mask', 1, 64)

    assert whole.dtype == torch.int64 and torch.equal(whole.sort(1).values, torch.arange(64).expand(3, 64))
    assert torch.equal(alone[0], whole[2]) and not torch.equal(whole[0], whole[1])


def test_every_permutation_comes_equally_often():
    with streams.current(3, n=np.arange(24_000)):
        found = streams.permutation('mask', 24_000, 4)

    _, counts = torch.unique(found @ torch.tensor([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == 24 and abs(chi_square(counts.numpy())) < 5


def test_outside_of_a_context_tokens_and_permutations_come_from_the_global_generator():
    def four() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [streams.normal('a', torch.empty(2, 4, 2), 4), streams.uniform('a', 2, 4), streams.integers('a', 9, 2, torch.arange(4)),
                streams.permutation('a', 2, 4)]

    assert [list(x.shape) for x in four()] == [[2, 4, 2], [2, 4], [2, 4], [2, 4]]
    assert all(torch.equal(a, b) for a, b in zip(four(), four()))
    assert not torch.equal(streams.permutation('a', 9, 9), streams.permutation('a', 9, 9))


def test_tokens_that_do_not_fit_the_rows_are_refused():
    with streams.current(1, [1, 2]), pytest.raises(ValueError, match=r'tokens of shape \[3, 4\] for 2 rows'):
        streams.uniform('a', 2, torch.zeros(3, 4, dtype=torch.int64))
    with streams.current(1, [1, 2]), pytest.raises(ValueError, match=r'their numbers are \[5\] or \[2, 5\]'):
        streams.normal('a', torch.empty(2, 5, 3), tokens=4)


# ------------------------------------------------------------------------------------------------ how random
def chi_square(counts: np.ndarray) -> float:
    """In standard deviations from what independent even draws give."""
    expected = counts.sum() / len(counts)
    return ((counts - expected) ** 2 / expected).sum() / np.sqrt(2 * len(counts)) - np.sqrt(len(counts) / 2)


@pytest.mark.parametrize('seed', [0, 1, 2023, 2 ** 63])
def test_uniform_numbers_are_even_over_consecutive_samples_seeds_and_uses(seed: int):
    n = np.arange(200_000)
    by_sample = streams.bits(seed, 'timestep', n)
    by_seed = np.array([streams.bits(seed + i, 'timestep', np.array([0]))[0] for i in range(5_000)], np.uint64)
    by_use = np.array([streams.bits(seed, f'use {i}', np.array([0]))[0] for i in range(5_000)], np.uint64)

    for draw in (by_sample, by_seed, by_use):
        for shift in (0, 24, 56):
            counts = np.bincount((draw >> np.uint64(shift) & np.uint64(255)).astype(int), minlength=256)
            assert abs(chi_square(counts)) < 5


def test_uniform_is_in_its_range_and_integers_reach_every_value():
    with streams.current(0, np.arange(100_000)):
        u, t = streams.uniform('a', 100_000), streams.integers('t', 10, 100_000)

    assert u.dtype == torch.float32 and 0 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    assert abs(chi_square(torch.bincount(t, minlength=10).numpy())) < 5 and t.dtype == torch.int64


def test_normals_have_the_moments_of_a_normal_and_rows_are_independent():
    with streams.current(11, np.arange(4000)):
        x = streams.normal('noise', torch.empty(4000, 64)).double()

    count = x.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x ** power).mean() - moment) < 5 * (spread / count) ** 0.5
    correlation = (x[:-1] * x[1:]).mean(), (x[:, :-1] * x[:, 1:]).mean(), (x[:2000] * x[2000:]).mean()
    assert max(abs(c) for c in correlation) < 5 / (count / 2) ** 0.5
    histogram = np.bincount(np.clip((torch.special.ndtr(x).numpy() * 64).astype(int).ravel(), 0, 63), minlength=64)
    assert abs(chi_square(histogram)) < 5


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_normals_take_type_and_shape_from_what_they_are_like(dtype: torch.dtype):
    with streams.current(1, [4, 5]):
        x = streams.normal('a', torch.empty(2, 3, 1, 2, dtype=dtype))

    assert x.shape == (2, 3, 1, 2) and x.dtype == dtype


# ------------------------------------------------------------------------------------------------ sampling
def test_row_i_of_a_seed_does_not_depend_on_the_batch_it_is_drawn_in():
    whole = streams.normal_rows(streams.row_seeds(5, 8), 'start', (4, 2))
    halves = [streams.normal_rows(streams.row_seeds(5, 4, first), 'start', (4, 2)) for first in (0, 4)]

    assert torch.equal(whole, torch.cat(halves)) and len(set(streams.row_seeds(5, 1000) + streams.row_seeds(6, 1000))) == 2000


def test_a_seed_for_each_row_is_taken_as_it_is_and_counted():
    assert streams.row_seeds([3, 4], 2) == [3, 4] and streams.normal_rows([], 'a', (2,)).shape == (0, 2)
    with pytest.raises(ValueError, match='2 seeds for 3 rows'):
        streams.row_seeds([3, 4], 3)


# ------------------------------------------------------------------------------------------------ orders
@pytest.mark.parametrize('size', [1, 2, 3, 5, 64, 65, 1797, 10 ** 9 + 7])
@pytest.mark.parametrize('seed', [0, 7, -1, 2 ** 63 + 5])
def test_many_places_of_an_order_are_those_that_one_by_one_give(size: int, seed: int):
    n = np.concatenate([np.arange(200), np.arange(200) * 10 ** 7 + 3])

    assert streams.permuted(seed, n, size).tolist() == [streams.permute(seed, *divmod(int(i), size), size) for i in n]


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 1797])
def test_an_order_is_a_bijection_of_every_size(size: int):
    for epoch in range(3):
        assert sorted(streams.permute(1, epoch, place, size) for place in range(size)) == list(range(size))


def test_a_place_of_a_huge_order_costs_no_more_than_a_small_one():
    size = 10 ** 12
    places = {streams.permute(1, 0, place, size) for place in range(1000)}

    assert len(places) == 1000 and max(places) < size and np.mean(list(places)) == pytest.approx(size / 2, rel=0.1)


def test_epochs_and_seeds_give_other_orders():
    orders = {tuple(streams.permute(seed, epoch, place, 50) for place in range(50)) for seed in range(5) for epoch in range(5)}

    assert len(orders) == 25


@pytest.mark.parametrize('size', [3, 10, 16])
def test_each_index_comes_first_equally_often_and_so_does_each_pair(size: int):
    first, second = (np.array([streams.permute(seed, 0, place, size) for seed in range(8000)]) for place in (0, 1))
    pairs = np.bincount(first * size + second, minlength=size * size).reshape(size, size)

    assert abs(chi_square(np.bincount(first, minlength=size))) < 5
    assert pairs.trace() == 0 and abs(chi_square(pairs[~np.eye(size, dtype=bool)])) < 5


def test_a_global_seed_is_made_of_all_its_words():
    seeds = {streams.seed_global(*words) for words in [(1, 2), (2, 1), (1, 2, 0), (1,), ('a', 1), (1, 'a'), ('b', 1)]}

    assert len(seeds) == 7 and all(0 <= s < 2 ** 63 for s in seeds)
