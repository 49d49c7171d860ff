from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from scepter.diffusion.guidance import batched, guided

X, T = torch.arange(12.0).view(3, 4) / 10, torch.tensor([7, 7, 7])


class Network:
    """out = x * c, and the number of calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert len(x) == len(t)
        self.calls += 1
        return x * c.flatten(1).mean(1, keepdim=True)


def conditioning(*values: float, length: int = 5) -> list[dict[str, Tensor]]:
    return [{'c': torch.full((3, length), v)} for v in values]


@pytest.mark.parametrize(('values', 'scale', 'factor'), [
    ((2.0, 5.0), 7.5, 5 + 7.5 * (2 - 5)),
    ((2.0, 5.0), [7.5], 5 + 7.5 * (2 - 5)),
    ((2.0, 3.0, 5.0), {'image': 1.5, 'text': 7.0}, 5 + 1.5 * (3 - 5) + 7 * (2 - 3)),
    ((2.0, 3.0, 5.0), [7.0, 1.5], 5 + 1.5 * (3 - 5) + 7 * (2 - 3)),
    ((2.0, 3.0, 4.0, 9.0), [2.0, 3.0, 4.0], 9 + 4 * (4 - 9) + 3 * (3 - 4) + 2 * (2 - 3)),
])
def test_guidance_is_one_batched_call(values, scale, factor):
    network = Network()
    out = guided(network, conditioning(*values), scale, 0.0, X)(X, T)
    torch.testing.assert_close(out, factor * X)
    assert network.calls == 1


@pytest.mark.parametrize(('scale', 'factor'), [(None, 2.0), (1.0, 2.0), (0.0, 5.0)])
def test_a_conditioning_of_weight_zero_is_not_computed(scale, factor):
    seen = []

    def network(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        seen.append(len(x))
        return x * c[:, :1]
    out = guided(network, conditioning(2.0, 5.0), scale, 0.0, X)(X, T)
    torch.testing.assert_close(out, factor * X)
    assert seen == [3]


def test_a_scale_for_each_row():
    out = guided(Network(), conditioning(2.0, 5.0), torch.tensor([0.0, 1.0, 3.0]), 0.0, X)(X, T)
    torch.testing.assert_close(out, X * torch.tensor([[5.0], [2.0], [-4.0]]))


def test_contexts_of_different_length_are_called_one_by_one_with_the_same_result():
    network = Network()
    out = guided(network, [*conditioning(2.0), *conditioning(5.0, length=9)], 3.0, 0.0, X)(X, T)
    torch.testing.assert_close(out, (5 + 3 * (2 - 5)) * X)
    assert network.calls == 2


def test_rescale_gives_each_row_the_deviation_of_the_wanted_output():
    wanted, guidance = guided(Network(), conditioning(2.0, 5.0), None, 0.0, X), guided(Network(), conditioning(2.0, 5.0), 4.0, 1.0, X)
    torch.testing.assert_close(guidance(X, T).std(1), wanted(X, T).std(1))


def test_half_a_rescale_is_the_mean_of_both():
    none, half, whole = (guided(Network(), conditioning(2.0, 5.0), 4.0, share, X)(X, T) for share in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (none + whole) / 2)


def test_rescale_with_scale_one_changes_nothing():
    out = guided(Network(), conditioning(2.0, 5.0), 1.0, 0.5, X)(X, T)
    torch.testing.assert_close(out, 2 * X)


def test_rescale_of_a_constant_output_is_finite():
    out = guided(lambda x, t, c: 0 * x, conditioning(2.0, 5.0), 4.0, 0.5, X)(X, T)
    assert torch.equal(out, torch.zeros_like(X))


@pytest.mark.parametrize(('kwargs', 'scale'), [({'c': torch.ones(3, 1)}, 7.5), (conditioning(1.0, 2.0, 3.0), 7.5),
                                               (conditioning(1.0, 2.0), [1.0, 2.0]), (conditioning(1.0, 2.0), {'image': 1., 'text': 2.})])
def test_scales_that_do_not_match_the_conditionings_are_refused(kwargs, scale):
    with pytest.raises(ValueError, match='one scale less than sets'):
        guided(Network(), kwargs, scale, 0.0, X)


def test_misnamed_scales_are_refused():
    with pytest.raises(ValueError, match='expected image and text'):
        guided(Network(), conditioning(1.0, 2.0, 3.0), {'img': 1.0, 'text': 2.0}, 0.0, X)


def test_scales_for_another_number_of_rows_are_refused():
    with pytest.raises(ValueError, match='one scale for each row'):
        guided(Network(), conditioning(1.0, 2.0), torch.ones(2), 0.0, X)


class Told(NamedTuple):
    context: Any
    vector: Any = None
    mask: Any = None


def test_named_tuples_in_one_another_are_joined_part_by_part_and_none_stays_none():
    a, b = torch.zeros(3, 2), torch.ones(3, 2)
    tree = batched([{'cond': Told(Told(a), a)}, {'cond': Told(Told(b), b)}], rows=3)
    joined = torch.cat([a, b])
    assert type(tree['cond']) is Told and tree['cond'].mask is None and tree['cond'].context.vector is None
    assert torch.equal(tree['cond'].context.context, joined) and torch.equal(tree['cond'].vector, joined)


@pytest.mark.parametrize('pair', [(Told(torch.ones(3, 2), mask=torch.ones(3, 2) > 0), Told(torch.ones(3, 2))),
                                  (Told(torch.ones(3, 2)), Told(torch.ones(3, 4))),
                                  (Told(torch.ones(3, 2)), (torch.ones(3, 2), None, None))],
                         ids=['a mask in one alone', 'another length', 'another kind'])
def test_named_tuples_of_another_form_are_not_padded_and_not_joined(pair):
    assert batched([{'cond': cond} for cond in pair], rows=3) is None


def test_trees_are_joined_along_the_batch_and_what_is_the_same_is_passed_once():
    shared, a, b = torch.ones(7, 2), torch.zeros(3, 2), torch.ones(3, 2)
    tree = batched([{'cond': {'crossattn': a, 'y': [a, b]}, 'rope': shared, 'hint': None, 'scale': 0.5},
                    {'cond': {'crossattn': b, 'y': [b, b]}, 'rope': shared, 'hint': None, 'scale': 0.5}], rows=3)
    assert torch.equal(tree['cond']['crossattn'], torch.cat([a, b])) and torch.equal(tree['cond']['y'][1], torch.cat([b, b]))
    assert tree['rope'] is shared and tree['hint'] is None and tree['scale'] == 0.5


@pytest.mark.parametrize('pair', [({'a': 1}, {'a': 2}), ({'a': torch.ones(3)}, {'b': torch.ones(3)}), ({'a': None}, {'a': torch.ones(3)}),
                                  ({'p': ['x', 'y', 'z']}, {'p': ['', '', '']}), ({'p': ['x'] * 3}, {'p': ['x'] * 3}),
                                  ({'a': torch.ones(2)}, {'a': torch.zeros(2)}), ({'a': 1}, {'a': True})])
def test_trees_that_differ_in_anything_but_tensors_are_not_joined(pair):
    assert batched(list(pair), rows=3) is None


def test_outputs_of_half_precision_are_summed_in_full():
    out = guided(lambda x, t, c: (x * c[:, :1]).bfloat16(), conditioning(2.0, 5.0), 3.0, 0.0, X)(X, T)
    assert out.dtype == torch.float32


@pytest.mark.parametrize('scale', [float('nan'), float('inf'), [float('nan')], torch.tensor([1.0, float('nan')])])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match=r'guide_scale is .*: expected finite numbers'):
        guided(lambda x, t: x, [{}, {}], scale, 0.0, torch.zeros(2, 3))
