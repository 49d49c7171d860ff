"""Condition: what stands in it, what a mask hides, and how it comes through guidance, compilers and checkpoints of activations."""
from __future__ import annotations

import contextlib

import pytest
import torch

import scepter.components  # noqa: F401  (registers)
from scepter.core import streams
from scepter.core.faults import ConfigError
from scepter.core.registry import BACKBONES, EMBEDDERS
from scepter.core.schema import param
from scepter.diffusion.guidance import guided
from scepter.models.base import BaseModel
from scepter.models.condition import Condition, Widths
from tests.models.oracles import relative_error, unet
from tests.models.test_latent_diffusion import CLIP, UNET, draw, network

TOLD = {**UNET, 'CONTEXT_DIM': 24, 'NUM_CLASSES': 'sequential', 'ADM_IN_CHANNELS': 6}
OPEN = {'NAME': 'FrozenOpenCLIPEmbedder', 'ARCH': 'custom', 'WIDTH': 48, 'DEPTH': 2, 'HEADS': 3, 'MAX_LENGTH': 20}
LONG = 'a very long story about a fox ' * 6


def told(rows: int = 2, length: int = 7, seen: int | None = 5) -> Condition:
    """A context [rows, length, 24] of which `seen` tokens may be seen, and a vector."""
    generator = torch.Generator().manual_seed(3)
    mask = None if seen is None else (torch.arange(length) < seen).expand(rows, -1).clone()
    return Condition(torch.randn(rows, length, 24, generator=generator), torch.randn(rows, 6, generator=generator), mask=mask)


def state(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(4)), torch.tensor([3, 700] * rows)[:rows]


# ---------------------------------------------------------------- what it is
def test_a_plain_tensor_is_a_context_and_nothing_is_nothing():
    context = torch.zeros(2, 7, 24)
    assert Condition.of(context).context is context and Condition.of(context)[1:] == (None,) * 4
    assert Condition.of(None) == Condition.of({}) == Condition()
    whole = told()
    assert Condition.of(whole) is whole


def test_a_dict_of_an_earlier_version_is_refused_with_what_its_parts_are_called_now():
    with pytest.raises(TypeError, match=r'got a dict of crossattn, y: what was crossattn is context, y is vector or label'):
        unet(TOLD)(*state(), {'crossattn': torch.zeros(2, 7, 24), 'y': torch.zeros(2, 6)})


@BACKBONES.register_class()
class AsksForY(BaseModel):
    """A network as an earlier version's documents showed it."""

    CHANNELS: int = param(4, 'Channels.')

    def __init__(self, cfg, logger=None):
        super().__init__(cfg, logger=logger)
        self.out = torch.nn.Conv2d(self.CHANNELS, self.CHANNELS, 1)

    def forward(self, x, t, cond):
        return self.out(x) + (cond['y'][:, :1, None, None] if 'y' in cond else 0)


def test_a_network_of_ones_own_that_asks_for_y_does_not_go_on_without_it():
    model = network(DIFFUSION_MODEL={'NAME': 'AsksForY'}, COND_STAGE_MODEL={'NAME': 'LabelEmbedder', 'NUM_CLASSES': 3, 'VECTOR_DIM': 4})
    with pytest.raises(TypeError, match=r'a Condition is no dict: ask for y by its name.* context, vector, label'):
        model.forward_train(image=torch.zeros(2, 3, 16, 16), label=torch.tensor([0, 1]))


def test_widths_that_differ_are_said_in_words():
    assert Widths(24, 6).misfit(Widths(24, 6, mask=True, channels=4)) == ''
    assert 'the context of COND_STAGE_MODEL is 24 wide, but the network expects 32' in Widths(24).misfit(Widths(32))
    assert 'the network expects the vector, 6 wide' in Widths(24).misfit(Widths(24, 6))
    assert 'comes with a mask, which the network does not heed' in Widths(24, mask=True).misfit(Widths(24))


def test_a_mask_for_a_network_that_does_not_heed_it_is_a_fault_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(AsksForY, 'takes', Widths(context=32), raising=False)
    with pytest.raises(ConfigError, match='comes with a mask'):
        network(DIFFUSION_MODEL={'NAME': 'AsksForY'}, COND_STAGE_MODEL={**CLIP, 'MASK_PADDING': True})


# ---------------------------------------------------------------- what a mask hides
@pytest.mark.parametrize('changes', [{}, {'DISABLE_SELF_ATTENTIONS': [True, True]}], ids=['cross', 'both'])
@torch.no_grad()
def test_what_is_masked_is_as_if_it_were_not_there(changes):
    model, (x, t), cond = unet({**TOLD, **changes}), state(), told()
    cut = cond._replace(context=cond.context[:, :5], mask=None)
    noisy = cond._replace(context=cond.context.clone().index_fill_(1, torch.tensor([5, 6]), 100.0))
    for prepare in (lambda cond: cond, model.precompute):
        assert relative_error(model(x, t, prepare(cond)), model(x, t, prepare(cut))) < 1e-5
        assert relative_error(model(x, t, prepare(noisy)), model(x, t, prepare(cut))) < 1e-5
    assert relative_error(model(x, t, noisy._replace(mask=None)), model(x, t, cut)) > 1e-2


@pytest.mark.parametrize(('layout', 'kind', 'checkpointing', 'is_compiled'), [
    (torch.contiguous_format, torch.float32, 2, False), (torch.channels_last, torch.bfloat16, 1, False),
    (torch.channels_last, torch.bfloat16, 2, True)], ids=['checkpointing', 'channels last in bfloat16', 'all of it compiled'])
def test_a_condition_with_a_mask_trains_alike_in_every_layout_type_and_way_to_compute(layout, kind, checkpointing, is_compiled):
    def gradient(model, cond, autocast):
        run, place = model, torch.contiguous_format
        if model is not plain:
            run, place = torch.compile(model, backend='eager', disable=not is_compiled), layout
        with autocast:
            run(x.contiguous(memory_format=place), t, cond).float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    (x, t), cond = state(), told()
    small = {**TOLD, 'CHANNEL_MULT': [1], 'ATTENTION_RESOLUTIONS': [1]}
    plain, model = unet(small), unet({**small, 'CHECKPOINTING': checkpointing}).to(memory_format=layout)
    expected = gradient(plain, cond._replace(context=cond.context[:, :5], mask=None), contextlib.nullcontext())
    autocast = torch.autocast('cpu', kind) if kind != torch.float32 else contextlib.nullcontext()
    assert relative_error(gradient(model, cond, autocast), expected) < (1e-4 if kind == torch.float32 else 0.1)
    torch.compiler.reset()


@torch.no_grad()
def test_guidance_joins_conditions_with_masks_and_calls_apart_what_differs():
    model, (x, t) = unet(TOLD), state()
    wanted, other = told(), told(seen=3)._replace(context=told().context.flip(0))
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    pairs = {'of one form': ((wanted, other), [4]), 'precomputed': ((model.precompute(wanted), model.precompute(other)), [4]),
             'a mask in one alone': ((wanted, other._replace(mask=None)), [2, 2]),
             'another length': ((wanted, told(length=9)), [2, 2])}
    for conds, rows in pairs.values():
        calls.clear()
        out = guided(model, [{'cond': cond} for cond in conds], 3.0, 0.0, x)(x, t)
        assert calls == rows
        one, two = (model(x, t, cond) for cond in conds)
        assert relative_error(out, two + 3 * (one - two)) < 1e-5


# ---------------------------------------------------------------- who gives a mask
@pytest.mark.parametrize('tower', [CLIP, OPEN], ids=['padded by end tokens', 'padded by zeros'])
def test_a_tower_that_masks_its_padding_shows_what_stands_up_to_the_end_of_the_prompt(tower):
    embedder = EMBEDDERS.build({**tower, 'MASK_PADDING': True, 'LONG_PROMPT': 'chunk'})
    cond = embedder(['a fox', '', LONG])
    length, chunks = tower['MAX_LENGTH'], cond.context.shape[1] // tower['MAX_LENGTH']
    assert cond.mask.shape == cond.context.shape[:2] and chunks > 1
    first = cond.mask[:, :length].sum(1).tolist()
    assert first == [4, 2, length]                                  # begin, a, fox, end; begin, end; all
    assert cond.mask[0, length:].sum() == 2 * (chunks - 1)          # an empty chunk: begin and end
    torch.testing.assert_close(cond.context, embedder.encode_both(embedder.tokenize(['a fox', '', LONG]), pooled=False)[0])


def test_weights_in_a_prompt_do_not_move_its_mask():
    plain, weighted = (EMBEDDERS.build({**CLIP, 'MASK_PADDING': True, 'PROMPT_WEIGHTING': w})(['a (fox:1.5)' if w else 'a fox']).mask
                       for w in (False, True))
    assert torch.equal(plain, weighted)


def towers(**changes) -> dict:
    """SDXL's pair, of 12 and of 20 tokens."""
    return {'NAME': 'GeneralConditioner', 'SIZE_DIM': 16, 'EMBEDDERS': [
        {**CLIP, 'LAYER': 'penultimate', **changes}, {**OPEN, 'RETURN_POOLED': True, 'USE_FINAL_LAYER_NORM': False, **changes}]}


def sizes(count: int) -> dict:
    return {name: torch.tensor([[16, 16]] * count) for name in ('original_size', 'crop_top_left', 'target_size')}


@pytest.mark.parametrize('how', ['cut', 'chunk'])
@torch.no_grad()
def test_towers_of_two_lengths_stand_side_by_side_with_zeros_behind_the_shorter(how):
    embedder, prompts = EMBEDDERS.build(towers(LONG_PROMPT=how)), ['a fox', LONG]
    cond, alone = embedder(prompts, **sizes(2)), [tower(prompts) for tower in embedder.embedders]
    longest = max(context.shape[1] for context in alone)
    assert cond.context.shape == (2, longest, 32 + 48) and cond.mask is None
    for context, mine in zip(alone, cond.context.split([32, 48], dim=-1)):
        torch.testing.assert_close(mine[:, :context.shape[1]], context)
        assert not mine[:, context.shape[1]:].any()


@torch.no_grad()
def test_of_towers_side_by_side_the_network_sees_what_any_tower_sees():
    embedder = EMBEDDERS.build(towers(MASK_PADDING=True))
    assert embedder.gives.mask
    assert embedder(['a fox', LONG], **sizes(2)).mask.sum(1).tolist() == [4, 20]
    one_sided = towers(MASK_PADDING=True)
    one_sided['EMBEDDERS'][0]['MASK_PADDING'] = False
    assert EMBEDDERS.build(one_sided)(['a fox', LONG], **sizes(2)).mask.sum(1).tolist() == [12, 20]    # all of the first


@pytest.mark.parametrize('mask', [False, True], ids=['as it is', 'masked'])
@pytest.mark.parametrize('unwanted', ['blurry', LONG], ids=['short', 'long'])
def test_two_lengths_and_long_negative_prompts_are_guided_in_one_call_and_precomputed_alike(mask, unwanted, monkeypatch):
    model = network(COND_STAGE_MODEL=towers(LONG_PROMPT='chunk', MASK_PADDING=mask),
                    DIFFUSION_MODEL={**UNET, 'CONTEXT_DIM': 80, 'NUM_CLASSES': 'sequential', 'ADM_IN_CHANNELS': 48 + 6 * 16})
    rows = []
    model.model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    once = draw(model, ['a', 'a fox'], n_prompt=unwanted, guide_scale=3.0, sample_steps=2)
    assert rows == [4, 4]
    monkeypatch.setattr(type(model.model), 'precompute', lambda self, cond: cond)
    assert torch.allclose(once, draw(model, ['a', 'a fox'], n_prompt=unwanted, guide_scale=3.0, sample_steps=2), atol=1e-5)
    assert not torch.allclose(once, draw(model, ['a', 'a fox'], n_prompt='other', guide_scale=3.0, sample_steps=2), atol=1e-4)

    with streams.current(1, range(2)):
        model.train().forward_train(image=torch.zeros(2, 3, 16, 16), prompt=['a', LONG], **sizes(2))['loss'].backward()
    assert all(p.grad is not None for name, p in model.model.named_parameters())
