"""What forward_test is handed: what its signature names, in the document's types, and nothing through **kwargs."""
from __future__ import annotations

import torch

from scepter.core.calls import accepted


def of_the_document(prompt=None, n_prompt=None, seed=2023, guide_scale=7.5, **kwargs):
    return kwargs


def of_ours(prompt, seed=2023, row_seeds=None, *, mask=None):
    pass


def test_only_what_a_signature_names_arrives_and_nothing_through_its_kwargs():
    assert accepted(of_the_document, {'prompt': ['a'], 'guide_scale': 3.0, 'image': torch.zeros(1), 'show_progress': True}) == {
        'prompt': ['a'], 'guide_scale': 3.0}
    assert accepted(of_ours, {'mask': 1, 'label': 2}) == {'mask': 1}


def test_the_names_are_read_through_the_decorators_of_the_document():
    decorated = torch.no_grad()(torch.autocast('cpu', dtype=torch.bfloat16)(of_the_document))
    assert accepted(decorated, {'prompt': ['a'], 'image': 1}) == {'prompt': ['a']}


def test_a_function_that_names_nothing_gets_everything():
    assert accepted(lambda **batch: None, {'image': 1, 'label': 2}) == {'image': 1, 'label': 2}


def test_prompts_are_lists_and_a_seed_is_a_number():
    assert accepted(of_the_document, {'prompt': 'a', 'n_prompt': 'b', 'seed': 3}) == {'prompt': ['a'], 'n_prompt': ['b'], 'seed': 3}
    assert accepted(of_the_document, {'prompt': ['a', 'c'], 'n_prompt': 'b', 'seed': [7, 8]}) == {
        'prompt': ['a', 'c'], 'n_prompt': ['b', 'b'], 'seed': 7}


def test_a_seed_for_each_picture_reaches_a_network_that_names_it():
    assert accepted(of_ours, {'seed': [7, 8]}) == {'seed': 7, 'row_seeds': [7, 8]}
    assert accepted(of_ours, {'seed': 5, 'row_seeds': [7, 8]}) == {'seed': 5, 'row_seeds': [7, 8]}
