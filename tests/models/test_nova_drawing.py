"""NOVA's drawings against the published code: sets, levels, order and noise as recorded, all the way to the latents."""
from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scepter.core.config import Config
from scepter.core.registry import BACKBONES
from scepter.diffusion.process import Diffusion
from scepter.diffusion.samplers import ddpm, euler
from scepter.diffusion.schedules import cosine, flow
from scepter.models.layers import attention
from scepter.models.nova.blocks import causal_by_parts, may_see, patchify
from scepter.models.nova.drawing import KeyedDraws, Painter, set_sizes
from scepter.models.nova.encoders import ends_of_frames
from scepter.models.nova.guidance import Guidance
from scepter.models.nova.model import NovaModel
from scepter.models.nova.steps import chains
from tests.models.nova_cases import Case, close, label, with_file
from tests.models.nova_runs import CLIP

SAMPLES = with_file('sample_*.safetensors')


class Recorded:
    """The draws of a recorded drawing, and what was seen of it on the way."""

    def __init__(self, recorded: dict[str, Tensor], model: NovaModel):
        self.recorded, self.patch, self.begun, self.count = recorded, model.model.patch, 0, 0
        self.names = sorted((name for name in recorded if name.endswith('.noise') and name.startswith('mid.')), key=place_of)

    def order(self) -> Tensor:
        return self.recorded['rand.pred_order'].squeeze(-1)

    def start(self, frame: int, number: int) -> Tensor:
        name = self.names[self.begun]
        assert place_of(name)[0] == frame
        # theirs also draws before its last step, where the noise is multiplied by 1e-10
        self.begun, self.count = self.begun + 1, self.begun * int((self.recorded['sched.timesteps'] > 0).sum())
        return patchify(self.recorded[name], self.patch)

    def fresh(self, frame: int, number: int, count: int) -> Tensor:
        self.count += 1
        return patchify(self.recorded['rand.ddpm_noise'][self.count - 1], self.patch)


def place_of(name: str) -> list[int]:
    """mid.f1.s2.noise -> [1, 2]"""
    return [int(word[1:]) for word in name.split('.')[1:3]]


def guidance_of(told: dict[str, Any]) -> Guidance:
    names = {'guidance_scale': 'scale', 'image_guidance_scale': 'image_scale', 'spatiotemporal_guidance_scale': 'perturbed_scale',
             'guidance_renorm': 'renorm', 'guidance_trunc': 'trunc', 'min_guidance_scale': 'min_scale'}
    return Guidance(**{ours: told[theirs] for theirs, ours in names.items() if told.get(theirs) is not None})


@pytest.mark.parametrize('file', SAMPLES, ids=label)
def test_sets_and_levels_are_the_published_ones(file: Path):
    case = Case(file.parent)
    model, recorded, told = case.model(), case.read(file.stem), case.told['samples'][file.stem.removeprefix('sample_')]
    rows, columns = model.model.image_grid

    levels = [level for chain in chains_of(model, told) for level in chain[:-1]]

    sizes = set_sizes(told.get('num_inference_steps', 64), rows * columns)
    assert [size for size in sizes if size] == [size for size in recorded['sched.num_preds'].tolist() if size]
    close(torch.tensor([level.t for level in levels]), recorded['sched.timesteps'], 2e-4, 'timesteps')
    if 'sched.sigmas' in recorded:
        close(torch.tensor([*(level.sigma for level in levels), 0.0]), recorded['sched.sigmas'], 1e-6, 'sigmas')


@pytest.mark.parametrize('file', SAMPLES, ids=label)
@torch.no_grad()
def test_a_drawing_comes_to_the_published_latents(file: Path):
    case = Case(file.parent)
    model, recorded, told = case.model(), case.read(file.stem), case.told['samples'][file.stem.removeprefix('sample_')]
    network, seen = model.model, {}

    def on_set(number: int, count: int, tokens: Tensor) -> None:
        seen[len(seen)] = tokens

    wanted = network.condition(case.told_to(network, recorded), told.get('motion_flow', 5.0))
    nothing = [network.nothing()] * len(wanted)
    empty = network.condition(torch.stack(nothing) if network.is_told_class else nothing, told.get('motion_flow', 5.0))
    painter = Painter(network, model.diffusion, chains_of(model, told), model.sampler(), guidance_of(told), Recorded(recorded, model),
                      told.get('num_inference_steps', 64), on_set)
    latents = painter.draw(wanted, empty, told.get('max_latent_length', 1), recorded.get('in.first_latent'))

    sets = sorted((name for name in recorded if name.endswith('.denoised')), key=place_of)
    assert len(seen) == len(sets)
    for tokens, name in zip(seen.values(), sets):
        ids = recorded[name.replace('denoised', 'pred_ids')][:len(tokens)].expand(-1, -1, tokens.shape[-1])
        near(tokens.gather(1, ids), recorded[name].gather(1, ids), name)
    near(latents, recorded['out.latents'], 'latents')


def chains_of(model: NovaModel, told: dict[str, Any]) -> list:
    return chains(model.diffusion, told.get('num_diffusion_steps', 25), model.SPACING, model.STEPS_OFFSET, told.get('flow_shift'))


def near(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Within 2e-5 of the largest."""
    close(ours, theirs, 2e-5 * theirs.abs().max().item(), what)


@pytest.mark.parametrize('prefix, tokens', [(6, 16), (6, 128)], ids=['by a mask', 'one by one'])
def test_parts_see_themselves_and_what_is_before_them(prefix: int, tokens: int):
    torch.manual_seed(0)
    ends = ends_of_frames(3, tokens, prefix)
    q, k, v = (torch.randn(2, ends[-1], 2, 8, dtype=torch.float64).requires_grad_() for _ in range(3))

    ours, wanted = causal_by_parts(q, k, v, ends), attention(q, k, v, may_see(ends))

    torch.testing.assert_close(ours, wanted)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, wanted))):
        torch.testing.assert_close(a, b)


def test_all_sets_of_a_frame_share_noise_that_is_drawn_once():
    draws = KeyedDraws([1, 2], 16, 8, torch.device('cpu'))

    first = [draws.start(0, number) for number in range(3)] + [draws.fresh(0, number, 1) for number in range(3)]
    later = [draws.start(1, 0), draws.fresh(1, 0, 1)]

    assert all(noise is first[0] for noise in first[:3]) and all(noise is first[3] for noise in first[3:])    # not only equal: not drawn
    kinds = [first[0], first[3], *later]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(kinds, 2))
    assert torch.equal(KeyedDraws([2], 16, 8, torch.device('cpu')).fresh(1, 5, 1)[0], later[1][1])


class Watched(TorchDispatchMode):
    """Notes every operation, by its name."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._schema.name.removeprefix('aten::'))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('how', [{}, {'renorm': 0.5, 'trunc': 300.0, 'image_scale': 1.0}])
def test_no_set_asks_the_device_for_a_number(how: dict):
    """A GPU would have to finish all that it was given before it answers, 64 times a frame."""
    network = BACKBONES.build(Config(CLIP))
    diffusion = Diffusion(*cosine(100), prediction='eps')
    draws = KeyedDraws([1], 16, 8, torch.device('cpu'))
    painter = Painter(network, diffusion, chains(diffusion, 3, 'leading'), ddpm, Guidance(**how), draws, 4)
    told, order = torch.randn(painter.guidance.passes, 4, 32), torch.randperm(16)[None]

    with torch.no_grad(), Watched() as watched:
        painter._frame(0, told, order)

    assert 'native_layer_norm' in watched.seen and not watched.seen & {'_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'unique'}


@torch.no_grad()
def test_what_is_known_about_a_token_is_worked_out_once():
    torch.manual_seed(0)
    decoder = BACKBONES.build(Config(CLIP)).image_decoder
    x, t, z = torch.randn(2, 5, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 32)

    assert torch.equal(decoder(x, t, z), decoder(x, t, known=decoder.knows(z)))


@pytest.mark.parametrize('changes', [{}, {'ROTARY_POS_EMBED': True, 'ARCH': ['vit_d2w32h1', 'vit_d2w32h1', 'mlp_d1w16']}],
                         ids=['sines', 'rotary'])
@torch.no_grad()
def test_frames_one_by_one_are_told_what_all_at_once_are(changes: dict):
    torch.manual_seed(0)
    network = BACKBONES.build(Config({**CLIP, **changes}))
    latents, condition = torch.randn(2, 2, 3, 8, 8), network.condition([torch.randn(3, 12), torch.randn(5, 12)])
    draws = KeyedDraws([1, 2], 16, 8, latents.device)
    painter = Painter(network, Diffusion(*flow(10), prediction='flow'), [], euler, Guidance(scale=1.0), draws)

    caches, found = network.caches(3, condition.shape[1] + 3 * 4), []
    for number in range(3):
        told = painter._indicator(latents[:, :, number - 1] if number else None, number, 3, condition, caches, 2)
        found.append(network.video_encoder.mix(found[0], told) if found else told)

    close(torch.stack(found, 1), network.indicators(latents, condition), 1e-5, 'indicators')
