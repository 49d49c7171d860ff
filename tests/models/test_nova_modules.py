"""NOVA's networks against the published code: every module that was recorded, under its published name."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scepter.models.nova.blocks import may_see, patchify
from scepter.models.nova.encoders import ends_of_frames, rotations_of
from scepter.models.nova.transformer import NovaTransformer
from tests.models.nova_cases import Case, close, label, with_file

PREDICTION = 2e-5


@pytest.mark.parametrize('file', with_file('model.safetensors'), ids=label)
def test_names_and_shapes_are_the_published_ones(file: Path):
    case = Case(file.parent)

    assert {name: list(value.shape) for name, value in case.network().state_dict().items()} == case.told['state_dict']


@pytest.mark.parametrize('file', with_file('modules.safetensors'), ids=label)
@torch.no_grad()
def test_every_module_answers_as_published(file: Path):
    case, recorded = Case(file.parent), {}
    network, train = case.network(), case.read('train')
    for name, value in case.read('modules').items():
        path, _, slot = name.partition('|')
        recorded.setdefault(path, {})[slot] = value

    for path, slots in recorded.items():
        out = answer(network, case, path, slots, train)
        wanted = [slots[slot] for slot in ('out', 'out.0', 'out.1.0', 'out.1') if slot in slots]
        assert len(out) == len(wanted), path
        for ours, theirs in zip(out, wanted):
            close(ours, theirs, PREDICTION, path)


@pytest.mark.parametrize('file', with_file('train.safetensors'), ids=label)
@torch.no_grad()
def test_what_may_be_seen_and_turned_is_as_published(file: Path):
    case = Case(file.parent)
    network, train, frames = case.network(), case.read('train'), case.told['frames']
    latents, prefix = train['mid.latents'], train['mid.c_text'].shape[1]
    rows, columns = network.video_grid_of(latents)

    if frames > 1:
        assert torch.equal(may_see(ends_of_frames(frames, rows * columns, prefix)), train['mid.attn_mask'] == 0)
    if 'rope.video' in train:
        _, video = network.with_positions(torch.zeros(1, frames, rows * columns, 1), (rows, columns), prefix)
        image = network.image_rotations((rows, columns))
        seen = rotations_of(image, train['rand.prev_ids'].squeeze(-1), rows * columns)
        for ours, name in ((video, 'rope.video'), (image, 'rope.image_full'), (seen, 'rope.image_visible')):
            cos, sin = ours[:, None].unbind(-1)
            close(torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2)), train[name], 1e-6, name)


def answer(network: NovaTransformer, case: Case, path: str, slots: dict[str, Tensor], train: dict[str, Tensor]) -> list[Tensor]:
    """What our module gives for the recorded input; where ours takes something else, that is made of the record."""
    given = [slots[f'in.{i}'] for i in range(3) if f'in.{i}' in slots]
    module = network.get_submodule(path) if not (path == 'video_pos_embed' and network.ROTARY_POS_EMBED) else None
    prefix, (rows, columns) = train['mid.c_text'].shape[1], network.video_grid_of(train['mid.latents'])
    image = network.image_rotations((rows, columns))
    if path.startswith('video_encoder') and (path == 'video_encoder' or path.endswith('.attn') or path.split('.')[-2] == 'blocks'):
        empty = torch.zeros(1, case.told['frames'], rows * columns, 1)
        turns = network.with_positions(empty, (rows, columns), prefix)[1] if network.ROTARY_POS_EMBED else None
        return [module(*given, turns, ends_of_frames(case.told['frames'], rows * columns, prefix))]
    if path.startswith('image_encoder.blocks.') and (path.endswith('.attn') or path.split('.')[-2] == 'blocks'):
        is_whole = given[0].shape[1] == rows * columns + network.image_grid[0] * network.image_grid[1]
        seen = train['rand.prev_ids'].squeeze(-1)
        return [module(*given, image if is_whole or image is None else rotations_of(image, seen, rows * columns))]
    if path == 'image_encoder':
        return [module(slots['in.0.0'], slots['in.1'], slots['in.0.1'].squeeze(-1), image)]
    if path == 'image_decoder':
        return [module(patchify(given[0], network.patch), *given[1:])]
    if path == 'mask_embed':
        return [module(given[0], train['rand.mask']), train['rand.prev_ids']]
    if path == 'motion_embed':
        return [module(train['in.motion_flow'], torch.full_like(train['in.motion_flow'], 12.0))]
    if path == 'text_embed':
        return [module(case.texts(train))]
    if path == 'label_embed':
        return [module(case.labels(train))]
    if module is None:    # rotations are not added: the tokens stay
        return [network.with_positions(given[0], (rows, columns), prefix)[0]]
    out = module(*given)
    return [part for part in (out if isinstance(out, tuple) else (out,)) if part is not None]
