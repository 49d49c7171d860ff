from __future__ import annotations

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from scepter.core import streams
from scepter.models import cpu
from scepter.models.layers import GroupNorm32, SiLU, attention, checkpoint, timestep_embedding, to_image, to_tokens, upsample_conv
from tests.models.oracles import relative_error


def qkv(n: int, m: int, heads: int = 3, dim: int = 8, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, heads, dim, generator=generator).to(dtype).requires_grad_() for length in (n, m, m)]


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum('bnhd,bmhd->bhnm', q, k) / q.shape[-1] ** 0.5
    return torch.einsum('bhnm,bmhd->bnhd', scores.softmax(-1), v)


def test_attention_is_the_softmax_of_scaled_products():
    q, k, v = qkv(20, 30)
    torch.testing.assert_close(attention(q, k, v), by_hand(q, k, v))


def test_a_mask_hides_tokens():
    q, k, v = qkv(20, 30)
    mask = torch.arange(30) < 11
    torch.testing.assert_close(attention(q, k, v, mask.expand(2, 3, 20, 30)), by_hand(q, k[:, :11], v[:, :11]))


@pytest.mark.parametrize('block', [10, 100, 1000, 10 ** 6])
def test_attention_in_blocks_is_the_same_attention(block, monkeypatch):
    monkeypatch.setattr(cpu, 'BLOCK', block)
    q, k, v = qkv(20, 30)
    weight = torch.randn(2, 20, 3, 8)
    ours = torch.autograd.grad((cpu.attention(q, k, v) * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((by_hand(q, k, v) * weight).sum(), (q, k, v))
    torch.testing.assert_close(cpu.attention(q, k, v), by_hand(q, k, v))
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():    # in memory that is used again for each block
        torch.testing.assert_close(cpu.attention(q, k, v), by_hand(q, k, v))


@pytest.mark.parametrize('recorded', [True, False])
@pytest.mark.parametrize('dim', [8, 16, 40])
def test_bfloat16_attention_is_as_good_as_bfloat16(dim, recorded):
    q, k, v = qkv(64, 64, dim=dim, dtype=torch.bfloat16)
    with torch.set_grad_enabled(recorded):
        assert relative_error(attention(q, k, v), by_hand(q.double(), k.double(), v.double())) < 2 ** -7


def test_the_timestep_embedding_is_that_of_the_published_weights():
    from diffusers.models.embeddings import get_timestep_embedding
    t = torch.tensor([0, 1, 500, 999])
    torch.testing.assert_close(timestep_embedding(t, 320), get_timestep_embedding(t, 320, flip_sin_to_cos=True, downscale_freq_shift=0))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_group_norm_in_half_precision_errs_by_its_rounding_alone(dtype, layout):
    norm = GroupNorm32(64)
    x = (3 + 5 * torch.randn(2, 64, 32, 32)).to(dtype).to(memory_format=layout)
    out = norm(x)
    assert out.dtype == dtype
    assert relative_error(out, F.group_norm(x.double(), 32)) < torch.finfo(dtype).eps


def test_group_norm_keeps_the_type_under_autocast():
    with torch.autocast('cpu', torch.bfloat16):
        assert GroupNorm32(32)(torch.randn(1, 32, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_group_norm_names_the_channels_it_cannot_group():
    with pytest.raises(ValueError, match='48 channels cannot be normalised in 32 groups'):
        GroupNorm32(48)


def test_silu_overwrites_its_input_only_where_no_gradient_needs_it():
    x = torch.randn(5)
    kept = x.clone()
    out = SiLU()(x)
    torch.testing.assert_close(out, F.silu(kept))
    assert torch.equal(x, kept)
    with torch.no_grad():
        SiLU()(x)
    assert torch.equal(x, out)


def test_what_compilers_call_is_the_same_attention():
    q, k, v = (torch.randn(2, 9, 3, 40).bfloat16() for _ in range(3))
    with torch.no_grad():
        assert torch.equal(torch.ops.scepter.attention(q, k, v), attention(q, k, v))
        torch.library.opcheck(torch.ops.scepter.attention.default, (q, k, v))    # its strides too


def test_tokens_of_a_channels_last_image_are_a_view():
    x = torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last)
    assert to_tokens(x).data_ptr() == x.data_ptr()
    image = to_image(to_tokens(x), x)
    assert image.data_ptr() == x.data_ptr() and torch.equal(image, x)


def test_an_image_of_tokens_lies_in_memory_like_the_one_it_came_from():
    x = torch.randn(2, 8, 3, 5)
    image = to_image(to_tokens(x), x)
    assert image.is_contiguous() and torch.equal(image, x)


@pytest.mark.parametrize('shape', [(4, 5, 17, 19), (1, 5, 3, 2)])    # one transposed convolution, and two steps
def test_enlarging_and_convolving_at_once_is_doing_one_after_the_other(shape):
    conv, x = nn.Conv2d(5, 7, 3, padding=1), torch.randn(shape, requires_grad=True)
    expected = conv(F.interpolate(x, scale_factor=2, mode='nearest'))
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((upsample_conv(x, conv) * weight).sum(), [x, *conv.parameters()])
    torch.testing.assert_close(upsample_conv(x, conv), expected)
    for gradient, other in zip(ours, torch.autograd.grad((expected * weight).sum(), [x, *conv.parameters()])):
        assert relative_error(gradient, other) < 1e-5


def test_enlarging_to_an_odd_size_follows_that_size():
    conv, x = nn.Conv2d(5, 7, 3, padding=1), torch.randn(4, 5, 17, 19)
    torch.testing.assert_close(upsample_conv(x, conv, (33, 38)), conv(F.interpolate(x, size=(33, 38), mode='nearest')))


# ------------------------------------------------------------------------------------------------ computed again
def gradient(run, backward_inside: bool, in_thread: bool) -> Tensor:
    """Of a weight that keyed noise multiplies, through `run`, which may forget and compute again."""
    weight = torch.ones(3, 4, requires_grad=True)

    def noisy(w: Tensor) -> Tensor:
        noise = streams.normal('inner', w) * (1 + streams.uniform('gate', len(w)) + streams.integers('pick', 9, len(w)))[:, None]
        noise = noise * streams.uniform('token', len(w), tokens=4) + streams.normal('tokens', w, tokens=4)
        return (w * noise.gather(1, streams.permutation('order', len(w), 4))).sin()

    def backward(loss: Tensor) -> None:
        if in_thread:    # a GPU's backward runs in one, where no context variable is set
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()

    with streams.current(3, [10, 11, 12]):
        loss = run(noisy, weight).sum()
        if backward_inside:
            backward(loss)
    if not backward_inside:
        with streams.current(4, [1, 2, 3]):    # what another batch, or a probe, does before
            streams.uniform('gate', 3)
        backward(loss)
    return weight.grad


def plain(run, *args):
    return run(*args)


@pytest.mark.parametrize('in_thread', [False, True])
def test_a_block_that_is_computed_again_draws_the_same_numbers_again(in_thread):
    expected = gradient(plain, True, False)
    assert torch.equal(gradient(checkpoint, False, in_thread), expected)
    assert torch.equal(gradient(checkpoint, True, in_thread), expected)
    own = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    assert torch.equal(gradient(own, True, in_thread), expected)


def test_a_compiled_block_that_is_computed_again_draws_the_same_numbers_again():
    streams.hide_from_compilers()
    torch._dynamo.reset()

    def compiled(noisy, w: Tensor) -> Tensor:
        return torch.compile(lambda w: checkpoint(noisy, w * 2), backend='aot_eager')(w)

    for in_thread in (False, True):
        assert torch.equal(gradient(compiled, True, in_thread), gradient(lambda noisy, w: noisy(w * 2), True, False))
    with pytest.raises(RuntimeError, match=r'call backward\(\) inside of'):
        gradient(compiled, False, False)


def test_a_draw_whose_keys_are_gone_in_the_backward_pass_is_an_error_not_another_number():
    with pytest.raises(RuntimeError, match=r'scepter\.models\.layers\.checkpoint'):
        gradient(functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False), False, False)


def test_without_keys_a_block_that_is_computed_again_repeats_the_generators_numbers():
    weight = torch.ones(3, 4, requires_grad=True)
    torch.manual_seed(0)
    loss = checkpoint(lambda w: w * streams.normal('inner', w), weight).sum()
    torch.manual_seed(1)
    loss.backward()
    torch.manual_seed(0)
    assert torch.equal(weight.grad, torch.randn(3, 4))
