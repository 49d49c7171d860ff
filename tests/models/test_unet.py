from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from scepter.core.faults import ConfigError
from scepter.core.registry import BACKBONES
from scepter.models.condition import Condition
from tests.models.oracles import REFINER, SD15, SD21, SDXL, diffusers_unet, relative_error, tiny, unet

# two levels, a block each: what is not about the architecture is tested on this
SMALL = tiny(SD15, CHANNEL_MULT=[1, 2], NUM_RES_BLOCKS=1, ATTENTION_RESOLUTIONS=[1, 2])


def inputs(height: int = 8, width: int = 8, channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, channels, height, width, generator=generator), torch.tensor([3, 700]),
            torch.randn(2, 7, 24, generator=generator))


@pytest.mark.parametrize(('config', 'tensors', 'parameters'), [
    (SD15, 686, 859_520_964), (SD21, 686, 865_910_724), (SDXL, 1680, 2_567_463_684), (REFINER, 1220, 2_259_526_660)],
    ids=['sd15', 'sd21', 'sdxl', 'refiner'])
def test_an_architecture_has_its_published_size(config, tensors, parameters):
    with torch.device('meta'):
        network = BACKBONES.build(config)
    assert len(network.state_dict()) == tensors
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize('config', [SD15, SD21, SDXL, REFINER], ids=['sd15', 'sd21', 'sdxl', 'refiner'])
@torch.no_grad()
def test_a_network_is_that_of_diffusers_at_every_size(config):
    ours = unet(tiny(config))
    theirs, y = diffusers_unet(ours), torch.randn(2, 40)
    for height, width in [(16, 16), (8, 24), (13, 9)]:
        x, t, context = inputs(height, width)
        cond = Condition(context, None if ours.NUM_CLASSES is None else y)
        expected = theirs(x, t, context, class_labels=None if ours.NUM_CLASSES is None else y).sample
        assert relative_error(ours(x, t, cond), expected) < 1e-5


@torch.no_grad()
def test_class_labels_are_those_of_diffusers():
    ours = unet({**SMALL, 'NUM_CLASSES': 10})
    x, t, context = inputs()
    labels = torch.tensor([3, 9])
    expected = diffusers_unet(ours)(x, t, context, class_labels=labels).sample
    assert relative_error(ours(x, t, Condition(context, label=labels)), expected) < 1e-5


@torch.no_grad()
def test_scale_shift_and_cross_attention_in_place_of_self_attention_are_those_of_diffusers():
    ours = unet({**SMALL, 'USE_SCALE_SHIFT_NORM': True, 'DISABLE_SELF_ATTENTIONS': [True, False]})
    x, t, context = inputs()
    expected = diffusers_unet(ours, resnet_time_scale_shift='scale_shift', only_cross_attention=[True, False],
                              mid_block_only_cross_attention=False)(x, t, context).sample
    assert relative_error(ours(x, t, context), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize('config', [SD15, SD21, SDXL, REFINER], ids=['sd15', 'sd21', 'sdxl', 'refiner'])
@torch.no_grad()
def test_a_network_of_published_size_is_that_of_diffusers(config):
    ours = unet(config)
    x, t, _ = inputs(16, 24)
    context = torch.randn(2, 77, config['CONTEXT_DIM'])
    vector = torch.randn(2, config['ADM_IN_CHANNELS']) if 'ADM_IN_CHANNELS' in config else None
    expected = diffusers_unet(ours)(x, t, context, class_labels=vector).sample
    assert relative_error(ours(x, t, Condition(context, vector)), expected) < 1e-5


@pytest.mark.parametrize('changes', [{}, {'DISABLE_SELF_ATTENTIONS': [True, False]}], ids=['as published', 'cross attention twice'])
@torch.no_grad()
def test_a_precomputed_context_gives_the_same_without_reading_the_context_again(changes):
    network = unet({**SMALL, **changes})
    x, t, context = inputs()
    expected, cond = network(x, t, context), network.precompute(context)
    for name, p in network.named_parameters():
        if '.attn2.to_k.' in name or '.attn2.to_v.' in name:
            p.fill_(float('nan'))
    torch.testing.assert_close(network(x, t, cond), expected)


@torch.no_grad()
def test_a_precomputed_context_is_sliced_like_any_other():
    network = unet(SMALL)
    x, t, context = inputs()
    cond = network.precompute(context)
    second = cond._replace(context=type(cond.context)(cond.context.of_all_layers[1:]))
    torch.testing.assert_close(network(x[1:], t[1:], second), network(x, t, context)[1:])


@torch.no_grad()
def test_a_concatenated_image_is_the_rest_of_the_channels():
    network = unet({**SMALL, 'IN_CHANNELS': 9})
    x, t, context = inputs(channels=9)
    torch.testing.assert_close(network(x[:, :4], t, Condition(context, beside=x[:, 4:])), network(x, t, context))


@pytest.mark.parametrize('cond', [None, {}, Condition()])
def test_a_network_without_a_context_has_no_cross_attention(cond):
    network = unet({**SMALL, 'CONTEXT_DIM': None})
    x, t, _ = inputs()
    assert not any('attn2' in name for name in network.state_dict())
    assert network(x, t, cond).shape == x.shape


@pytest.mark.parametrize('changes', [{'RESBLOCK_UPDOWN': True}, {'CONV_RESAMPLE': False}, {'TRANSFORMER_DEPTH_MIDDLE': 0},
                                     {'NUM_RES_BLOCKS': [1, 2]}, {'ATTENTION_RESOLUTIONS': []}], ids=str)
@torch.no_grad()
def test_an_option_keeps_the_size_and_uses_every_weight(changes):
    network = unet({**SMALL, **changes})
    x, t, context = inputs(7, 10)
    with torch.enable_grad():
        out = network(x, t, context)
        out.square().sum().backward()
    assert out.shape == x.shape
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(('changes', 'message'), [
    ({'NUM_HEADS_CHANNELS': 16}, 'either NUM_HEADS'),
    ({'NUM_HEADS': None}, 'either NUM_HEADS'),
    ({'NUM_HEADS': 3}, 'NUM_HEADS: 32 channels cannot be shared by 3'),
    ({'NUM_HEADS': None, 'NUM_HEADS_CHANNELS': 48}, 'NUM_HEADS_CHANNELS: 32 channels cannot be cut into heads of 48'),
    ({'CHANNEL_MULT': []}, 'CHANNEL_MULT has 0 entries'),
    ({'MODEL_CHANNELS': 48}, 'MODEL_CHANNELS: expected at least 32, a multiple of 32, got 48'),
    ({'TRANSFORMER_DEPTH': [1]}, 'TRANSFORMER_DEPTH has 1 entries, CHANNEL_MULT 2'),
    ({'NUM_CLASSES': 'sequential', 'ADM_IN_CHANNELS': None}, 'ADM_IN_CHANNELS'),
    ({'CONTEXT_DIM': None, 'DISABLE_MIDDLE_SELF_ATTN': True}, 'CONTEXT_DIM is null')], ids=str)
def test_an_architecture_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        BACKBONES.build({**SMALL, **changes})


@pytest.mark.parametrize(('changes', 'cond', 'message'), [
    ({}, None, 'CONTEXT_DIM is 24, so the condition must have a context'),
    ({'CONTEXT_DIM': None}, torch.zeros(2, 7, 24), 'must have no context'),
    ({}, torch.zeros(2, 7, 25), 'the context is 25 wide'),
    ({}, Condition(torch.zeros(2, 7, 24), torch.zeros(2, 40)), 'must have no vector'),
    ({'NUM_CLASSES': 'sequential'}, torch.zeros(2, 7, 24), 'must have a vector'),
    ({'NUM_CLASSES': 3}, Condition(torch.zeros(2, 7, 24), torch.zeros(2, 3)), 'must have no vector'),
    ({'NUM_CLASSES': 3}, Condition(torch.zeros(2, 7, 24)), 'must have a label'),
    ({}, Condition(torch.zeros(2, 7, 24), mask=torch.ones(2, 8) > 0), r'the mask is torch.bool \[2, 8\], expected bool \[2, 7\]'),
    ({}, Condition(torch.zeros(2, 7, 24), mask=torch.ones(2, 7)), r'the mask is torch.float32 \[2, 7\], expected bool'),
    ({}, Condition(torch.zeros(2, 7, 24), beside=torch.zeros(2, 1, 8, 8)), 'x has 5 channels with what is beside it, but IN_CHANNELS')])
def test_a_condition_that_does_not_fit_is_refused(changes, cond, message):
    x, t, _ = inputs()
    with pytest.raises(ValueError, match=message):
        unet({**SMALL, **changes})(x, t, cond)


def test_a_fresh_network_hears_its_text_and_learns():
    network = BACKBONES.build(SMALL)
    x, t, context = inputs()
    before = network(x, t, context)
    assert not torch.allclose(before, network(x, t, -context), atol=1e-4)    # from zero it would learn to read long after the rest
    (before - x).square().mean().backward()
    torch.optim.SGD(network.parameters(), 0.01).step()
    assert (network(x, t, context) - x).square().mean() < (before - x).square().mean()


@pytest.mark.parametrize('level', [1, 2, 3])
def test_checkpointing_changes_memory_alone(level):
    plain = unet({**SMALL, 'DROPOUT': 0.0})
    saving = unet({**SMALL, 'CHECKPOINTING': level})
    x, t, context = inputs()
    kept = []
    for network in (plain, saving):
        count = [0]

        def pack(tensor: Tensor, count: list[int] = count) -> Tensor:
            count[0] += tensor.numel()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = network(x, t, context).square().sum()
        loss.backward()
        kept.append(count[0])
    assert kept[1] < 0.8 * kept[0]
    for p, q in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


@torch.no_grad()
def test_channels_last_is_the_same_network():
    network = unet(SMALL)
    x, t, context = inputs(16, 16)
    expected = network(x, t, context)
    out = copy.deepcopy(network).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, context)
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('changes', [{}, {'USE_LINEAR_IN_TRANSFORMER': True}], ids=['convolutions', 'linear'])
@torch.no_grad()
def test_the_memory_layout_of_the_input_is_kept_throughout(layout, changes):
    network = unet({**SMALL, **changes}).to(memory_format=layout)
    x, t, context = inputs(16, 16)
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(lambda m, args, out: seen.append(out.is_contiguous(memory_format=layout)))
    seen: list[bool] = []
    assert network(x.to(memory_format=layout), t, context).is_contiguous(memory_format=layout)
    assert len(seen) > 10 and all(seen)


@torch.no_grad()
def test_bfloat16_is_near_float32_and_gives_back_the_type_of_x():
    network = unet(SMALL)
    x, t, context = inputs(16, 16)
    expected = network(x, t, context)
    out = network.to(torch.bfloat16)(x, t, context)
    assert out.dtype == torch.float32
    assert relative_error(out, expected) < 0.03


@pytest.mark.slow
@torch.no_grad()
def test_the_network_compiles_as_one_graph():
    network = unet(SMALL)
    x, t, context = inputs()
    compiled = torch.compile(network, fullgraph=True)
    for cond in (context, network.precompute(context)):
        assert relative_error(compiled(x, t, cond), network(x, t, cond)) < 1e-5
