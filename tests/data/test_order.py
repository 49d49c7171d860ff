"""Orders: each sample as often as it should come, everything in one group of one kind, and any window the same as the whole."""
from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepter.core import streams
from scepter.data.order import MIXED_WITHIN, Bucketed, Mixed, Order, Sequential, Shuffled


def buckets_of(sizes: list[int]) -> list[np.ndarray]:
    """Each index once, those of one bucket not in a row."""
    return np.split(np.random.default_rng(3).permutation(sum(sizes)), np.cumsum(sizes)[:-1])


ORDERS = {'sequential': Sequential(11), 'shuffled': Shuffled(7, 11), 'bucketed': Bucketed(7, buckets_of([5, 11, 1, 30]), 4),
          'mixed': Mixed(7, [Shuffled(1, 11), Shuffled(2, 1), Shuffled(3, 200)], [0.7, 0.1, 2], [0, 11, 12]),
          'mixed of bucketed': Mixed(7, [Bucketed(1, buckets_of([5, 9]), 4), Shuffled(2, 9)], [1, 1], [0, 14])}


@pytest.mark.parametrize('name', ORDERS)
def test_any_draws_in_any_pieces_are_those_of_the_whole(name):
    order: Order = ORDERS[name]
    n = np.concatenate([np.arange(4096), np.arange(10 ** 9, 10 ** 9 + 300)])
    whole = order.indices(n)
    chosen = np.random.default_rng(1).permutation(len(n))[:60]
    assert [int(order.indices(n[i:i + 1])[0]) for i in chosen] == whole[chosen].tolist()
    assert np.array_equal(order.indices(n[chosen]), whole[chosen])


def test_the_shuffled_order_is_that_of_earlier_runs():
    assert Shuffled(7, 5).indices(np.arange(12)).tolist() == [1, 3, 2, 4, 0, 4, 2, 0, 3, 1, 0, 4]
    key = streams.seed_global(7, 'replace')
    assert list(Shuffled(7, 5).instead(9, 2)) == [streams.permute(key, 9, place, 5) for place in range(5)]


# ------------------------------------------------------------------------------------------------ buckets
SIZES = st.lists(st.integers(1, 23), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, together=st.integers(1, 9), seed=st.integers(0, 2 ** 40))
def test_every_group_is_of_one_bucket_and_after_each_epoch_only_tails_are_behind(sizes, together, seed):
    buckets = buckets_of(sizes)
    order, bucket_of = Bucketed(seed, buckets, together), {int(i): b for b, bucket in enumerate(buckets) for i in bucket}
    groups = sum(c * 5 // together for c in sizes)
    found = order.indices(np.arange(groups * together)).reshape(groups, together)
    assert all(len({bucket_of[i] for i in group}) == 1 for group in found.tolist())
    for epochs in range(1, 6):
        seen = np.bincount(found[:sum(c * epochs // together for c in sizes)].ravel(), minlength=sum(sizes))
        for bucket in buckets:
            assert seen[bucket].sum() == len(bucket) * epochs // together * together
            assert set(seen[bucket]) <= ({epochs, epochs - 1} if len(bucket) >= together else set(range(epochs + 1)))


def test_groups_of_an_epoch_are_shuffled_among_themselves_and_otherwise_in_the_next():
    order = Bucketed(7, buckets_of([40, 40]), 4)
    first, second = (order.indices(np.arange(80 * e, 80 * (e + 1), 4)) for e in range(2))
    kinds = [[int(i in order.buckets[0]) for i in epoch] for epoch in (first, second)]
    assert sum(kinds[0]) == sum(kinds[1]) == 10 and kinds[0] != kinds[1]
    assert 4 < np.count_nonzero(np.diff(kinds[0])) < 16     # neither one bucket after the other nor in turn
    assert set(first) != set(second)


def test_a_replacement_is_of_the_same_bucket_and_each_of_them_is_tried():
    order = Bucketed(7, buckets_of([5, 11, 1, 30]), 4)
    for bucket in order.buckets:
        assert sorted(order.instead(12, int(bucket[0]))) == sorted(bucket.tolist())


# ------------------------------------------------------------------------------------------------ mixtures
@settings(max_examples=150, deadline=None)
@given(weights=st.lists(st.sampled_from([0.0, 0.001, 0.1, 1 / 3, 0.5, 0.7, 1.0, 2.5, 100.0]), min_size=1, max_size=5).filter(any),
       first=st.integers(0, 10 ** 9), length=st.integers(1, 600), seed=st.integers(0, 2 ** 40))
def test_in_any_window_each_part_has_its_share(weights, first, length, seed):
    order = Mixed(seed, [Shuffled(i, 7) for i in range(len(weights))], weights, [7 * i for i in range(len(weights))])
    counts = np.bincount(order.indices(np.arange(first, first + length)) // 7, minlength=len(weights))
    for weight, count in zip(weights, counts):
        share = Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights)
        assert abs(count - length * share) < 2 * (len(weights) + MIXED_WITHIN / 4)
        assert weight or not count


def test_each_part_goes_through_shuffled_epochs_of_its_own():
    order = Mixed(7, [Shuffled(1, 11), Shuffled(2, 3)], [1, 3], [0, 11])
    found = order.indices(np.arange(400))
    assert found[found < 11].tolist() == Shuffled(1, 11).indices(np.arange(100)).tolist()
    assert (found[found >= 11] - 11).tolist() == Shuffled(2, 3).indices(np.arange(300)).tolist()


def test_what_comes_every_second_step_sees_every_part():
    order = Mixed(7, [Shuffled(1, 11), Shuffled(2, 3)], [1, 1], [0, 11])
    assert 0.4 < np.mean(order.indices(np.arange(0, 4000, 2)) < 11) < 0.6


def test_a_mixture_with_buckets_gives_whole_groups_to_a_part():
    order = ORDERS['mixed of bucketed']
    for group in order.indices(np.arange(4000)).reshape(-1, 4):
        assert len({min(order.offsets, key=lambda o: (o > i, -o)) for i in group}) == 1
    assert set(order.instead(3, 20)) <= set(range(14, 23)) and set(order.instead(3, 2)) < set(range(14))
