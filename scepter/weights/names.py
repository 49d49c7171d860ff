"""One weight, several names: CompVis and SGM single files, diffusers folders, CLIP in the spelling of Hugging Face and of OpenCLIP.

Inside, networks have the CompVis names. The block structure is read off the names themselves, so no config is needed for any of this.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from scepter.weights.files import Entry, Weights

RESNET = {'in_layers.0': 'norm1', 'in_layers.2': 'conv1', 'emb_layers.1': 'time_emb_proj', 'out_layers.0': 'norm2', 'out_layers.3': 'conv2',
          'skip_connection': 'conv_shortcut'}
UNET = {'time_embed.0': 'time_embedding.linear_1', 'time_embed.2': 'time_embedding.linear_2', 'label_emb.0.0': 'add_embedding.linear_1',
        'label_emb.0.2': 'add_embedding.linear_2', 'input_blocks.0.0': 'conv_in', 'out.0': 'conv_norm_out', 'out.2': 'conv_out'}
VAE = {'mid.block_1': 'mid_block.resnets.0', 'mid.block_2': 'mid_block.resnets.1', 'mid.attn_1': 'mid_block.attentions.0',
       'norm_out': 'conv_norm_out'}
VAE_ATTENTION = {'norm': 'group_norm', 'q': 'to_q', 'k': 'to_k', 'v': 'to_v', 'proj_out': 'to_out.0'}
OLD_VAE_ATTENTION = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}    # diffusers before 0.18
CLIP = {'embeddings.token_embedding.weight': 'token_embedding.weight', 'embeddings.position_embedding.weight': 'positional_embedding',
        'final_layer_norm.weight': 'ln_final.weight', 'final_layer_norm.bias': 'ln_final.bias'}
CLIP_BLOCK = {'layer_norm1': 'ln_1', 'layer_norm2': 'ln_2', 'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj',
              'self_attn.out_proj': 'attn.out_proj'}
# OpenCLIP's published towers: name -> (width, depth, heads, width of the pooled vector)
ARCHITECTURES = {'ViT-L-14': (768, 12, 12, 768), 'ViT-H-14': (1024, 24, 16, 1024), 'ViT-bigG-14': (1280, 32, 20, 1280)}
# what a file of the whole CLIP holds beside its text side
PICTURE_SIDE = ('visual.', 'vision_model.', 'visual_projection.', 'logit_scale', 'logit_bias')


# ---------------------------------------------------------------- UNet
def unet_to_diffusers(names: Iterable[str]) -> dict[str, str]:
    """CompVis name -> diffusers name. What has no counterpart is left out."""
    names = list(names)
    return _rename(names, {**UNET, **dict(unet_blocks(names))}, RESNET)


def unet_from_diffusers(names: Iterable[str]) -> dict[str, str]:
    """diffusers name -> CompVis name. What has no counterpart is left out."""
    names = list(names)
    blocks = {theirs: ours for ours, theirs in diffusers_unet_blocks(names)}
    return _rename(names, {**_turned(UNET), **blocks}, _turned(RESNET))


def unet_blocks(names: list[str]) -> list[tuple[str, str]]:
    """(ours, theirs) for every block, walked through as data meets them: a level ends where the resolution changes."""
    found: list[tuple[str, str]] = []
    level = place = 0
    for n in _numbers(names, 'input_blocks')[1:]:
        kids = _children(names, f'input_blocks.{n}')
        if any(name.startswith(f'input_blocks.{n}.0.op.') for name in names):
            found.append((f'input_blocks.{n}.0.op', f'down_blocks.{level}.downsamplers.0.conv'))
            level, place = level + 1, 0
            continue
        found.append((f'input_blocks.{n}.0', f'down_blocks.{level}.resnets.{place}'))
        if '1' in kids:
            found.append((f'input_blocks.{n}.1', f'down_blocks.{level}.attentions.{place}'))
        place += 1
    found += middle_blocks(bool(_children(names, 'middle_block.2')))
    level = place = 0
    for n in _numbers(names, 'output_blocks'):
        found.append((f'output_blocks.{n}.0', f'up_blocks.{level}.resnets.{place}'))
        ends = False
        for kid in sorted(_children(names, f'output_blocks.{n}') - {'0'}):
            if any(name.startswith(f'output_blocks.{n}.{kid}.conv.') for name in names):
                found.append((f'output_blocks.{n}.{kid}.conv', f'up_blocks.{level}.upsamplers.0.conv'))
                ends = True
            else:
                found.append((f'output_blocks.{n}.{kid}', f'up_blocks.{level}.attentions.{place}'))
        level, place = (level + 1, 0) if ends else (level, place + 1)
    return found


def diffusers_unet_blocks(names: list[str]) -> list[tuple[str, str]]:
    """The same pairs, read off the names of diffusers."""
    found: list[tuple[str, str]] = []
    n = 1
    for level in _numbers(names, 'down_blocks'):
        block = f'down_blocks.{level}'
        attentions = _numbers(names, f'{block}.attentions')
        for place in _numbers(names, f'{block}.resnets'):
            found.append((f'input_blocks.{n}.0', f'{block}.resnets.{place}'))
            if place in attentions:
                found.append((f'input_blocks.{n}.1', f'{block}.attentions.{place}'))
            n += 1
        if 'downsamplers' in _children(names, block):
            found.append((f'input_blocks.{n}.0.op', f'{block}.downsamplers.0.conv'))
            n += 1
    found += middle_blocks('attentions' in _children(names, 'mid_block'))
    n = 0
    for level in _numbers(names, 'up_blocks'):
        block = f'up_blocks.{level}'
        attentions, places = _numbers(names, f'{block}.attentions'), _numbers(names, f'{block}.resnets')
        for place in places:
            found.append((f'output_blocks.{n}.0', f'{block}.resnets.{place}'))
            if place in attentions:
                found.append((f'output_blocks.{n}.1', f'{block}.attentions.{place}'))
            if place == places[-1] and 'upsamplers' in _children(names, block):
                found.append((f'output_blocks.{n}.{2 if place in attentions else 1}.conv', f'{block}.upsamplers.0.conv'))
            n += 1
    return found


def middle_blocks(has_attention: bool) -> list[tuple[str, str]]:
    """The middle: two residual blocks, perhaps with a transformer between them."""
    attention = [('middle_block.1', 'mid_block.attentions.0')] if has_attention else []
    return [('middle_block.0', 'mid_block.resnets.0'), *attention, (f'middle_block.{2 if has_attention else 1}', 'mid_block.resnets.1')]


# ---------------------------------------------------------------- autoencoder
def vae_to_diffusers(weights: Weights) -> Weights:
    """An autoencoder under diffusers' names; its 1x1 convolutions of the attention become linear layers."""
    renames = {name: _vae_name_to_diffusers(name, weights) for name in weights}
    return weights.with_entries({renames[n]: _flat(e) if 'attentions' in renames[n] else e for n, e in weights.entries.items()})


def vae_from_diffusers(weights: Weights) -> Weights:
    """An autoencoder under the CompVis names; the linear layers of its attention become 1x1 convolutions."""
    entries = {}
    for name, entry in weights.entries.items():
        new = _vae_name_from_diffusers(name, weights)
        is_matrix = 'attn' in new and new.endswith('weight') and len(entry.shape) == 2
        entries[new] = _reshaped(entry, (*entry.shape, 1, 1)) if is_matrix else entry
    return weights.with_entries(entries)


def _vae_name_to_diffusers(name: str, names: Iterable[str]) -> str:
    match = re.fullmatch(r'(encoder|decoder)\.(.+)\.(weight|bias)', name)
    if not match:
        return name
    side, module, leaf = match.groups()
    level = re.match(r'(?:down|up)\.(\d+)\.', module)
    if level:
        n = int(level[1]) if side == 'encoder' else max(_numbers(names, 'decoder.up')) - int(level[1])
        module = f'{"down" if side == "encoder" else "up"}_blocks.{n}.' + module[level.end():]
        module = re.sub(r'\.block\.(\d+)', r'.resnets.\1', module)
        module = re.sub(r'\.attn\.(\d+)', r'.attentions.\1', module)
        module = module.replace('downsample.conv', 'downsamplers.0.conv').replace('upsample.conv', 'upsamplers.0.conv')
    module = _swap_start(module, VAE).replace('nin_shortcut', 'conv_shortcut')
    head, _, tail = module.rpartition('.')
    if re.search(r'attentions\.\d+$', head):
        module = f'{head}.{VAE_ATTENTION.get(tail, tail)}'
    return f'{side}.{module}.{leaf}'


def _vae_name_from_diffusers(name: str, names: Iterable[str]) -> str:
    match = re.fullmatch(r'(encoder|decoder)\.(.+)\.(weight|bias)', name)
    if not match:
        return name
    side, module, leaf = match.groups()
    attention = re.match(r'(.+attentions\.\d+)\.(.+)', module)
    if attention:
        theirs = OLD_VAE_ATTENTION.get(attention[2], attention[2])
        module = f'{attention[1]}.{_turned(VAE_ATTENTION).get(theirs, theirs)}'
    level = re.match(r'(?:down|up)_blocks\.(\d+)\.', module)
    if level:
        n = int(level[1]) if side == 'encoder' else max(_numbers(names, 'decoder.up_blocks')) - int(level[1])
        module = f'{"down" if side == "encoder" else "up"}.{n}.' + module[level.end():]
        module = re.sub(r'\.resnets\.(\d+)', r'.block.\1', module)
        module = re.sub(r'\.attentions\.(\d+)', r'.attn.\1', module)
        module = module.replace('downsamplers.0.conv', 'downsample.conv').replace('upsamplers.0.conv', 'upsample.conv')
    return f'{side}.{_swap_start(module, _turned(VAE)).replace("conv_shortcut", "nin_shortcut")}.{leaf}'


# ---------------------------------------------------------------- text towers
def openclip_from_hf(weights: Weights) -> Weights:
    """A text tower of Hugging Face under OpenCLIP's names: q, k and v in one matrix, the projection transposed."""
    entries: dict[str, Entry] = {}
    tower = clip_text_section(weights)
    for name, entry in tower.entries.items():
        block = re.fullmatch(r'encoder\.layers\.(\d+)\.(.+)\.(weight|bias)', name)
        if name == 'text_projection.weight':
            entries['text_projection'] = entry._replace(shape=entry.shape[::-1], read=lambda e=entry: e.read().T.contiguous())
        elif not block:
            entries[CLIP.get(name, name)] = entry
        elif block[2] in CLIP_BLOCK:
            entries[f'transformer.resblocks.{block[1]}.{CLIP_BLOCK[block[2]]}.{block[3]}'] = entry
        elif block[2] == 'self_attn.q_proj':
            three = [name.replace('q_proj', f'{c}_proj') for c in 'qkv']
            entries[f'transformer.resblocks.{block[1]}.attn.in_proj_{block[3]}'] = _joined(tower, three, entry)
        elif block[2] not in ('self_attn.k_proj', 'self_attn.v_proj'):
            entries[name] = entry
    return weights.with_entries(entries)


def openclip_to_hf(weights: Weights) -> Weights:
    """OpenCLIP's text tower under the names text_model.* of Hugging Face."""
    entries: dict[str, Entry] = {}
    modules, top = _turned(CLIP_BLOCK), _turned(CLIP)
    for name, entry in weights.entries.items():
        block = re.fullmatch(r'transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)', name)
        if name == 'text_projection':
            entries['text_projection.weight'] = entry._replace(shape=entry.shape[::-1], read=lambda e=entry: e.read().T.contiguous())
        elif not block:
            entries[f'text_model.{top.get(name, name)}'] = entry
        elif block[2] == 'attn.in_proj':
            width = entry.shape[0] // 3
            for part, c in enumerate('qkv'):
                entries[f'text_model.encoder.layers.{block[1]}.self_attn.{c}_proj.{block[3]}'] = entry._replace(
                    shape=(width, *entry.shape[1:]), read=lambda e=entry, p=part, w=width: e.read()[p * w:(p + 1) * w].contiguous())
        else:
            entries[f'text_model.encoder.layers.{block[1]}.{modules.get(block[2], block[2])}.{block[3]}'] = entry
    return weights.with_entries(entries)


def clip_text_section(weights: Weights) -> Weights:
    """The text side of any file of CLIP, without the prefix text_model."""
    names = {n: n.removeprefix('text_model.') for n in weights if not n.startswith(PICTURE_SIDE)}
    return weights.with_entries({new: weights.entries[n] for n, new in names.items() if new != 'embeddings.position_ids'})


# ---------------------------------------------------------------- bricks
def _rename(names: list[str], modules: Mapping[str, str], inside_resnet: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name in names:
        words = name.split('.')
        for cut in range(len(words) - 1, 0, -1):    # the longest module that has a counterpart
            module, rest = '.'.join(words[:cut]), '.'.join(words[cut:])
            if module in modules:
                inner, _, leaf = rest.rpartition('.')
                is_resnet = 'resnets' in module or 'resnets' in modules[module]
                if inner and is_resnet:
                    if inner not in inside_resnet:
                        break
                    inner = inside_resnet[inner]
                found[name] = '.'.join(p for p in (modules[module], inner, leaf) if p)
                break
    return found


def _numbers(names: Iterable[str], prefix: str) -> list[int]:
    return sorted(int(kid) for kid in _children(names, prefix) if kid.isdigit())


def _children(names: Iterable[str], prefix: str) -> set[str]:
    head = prefix + '.'
    return {n[len(head):].split('.', 1)[0] for n in names if n.startswith(head)}


def _turned(table: Mapping[str, str]) -> dict[str, str]:
    return {b: a for a, b in table.items()}


def _swap_start(module: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if module == old or module.startswith(old + '.'):
            return new + module[len(old):]
    return module


def _flat(entry: Entry) -> Entry:
    return _reshaped(entry, entry.shape[:2]) if entry.shape[2:] == (1, 1) else entry


def _reshaped(entry: Entry, shape: tuple[int, ...]) -> Entry:
    return entry._replace(shape=shape, read=lambda: entry.read().reshape(shape))


def _joined(weights: Weights, names: list[str], like: Entry) -> Entry:
    """Several tensors stacked along their first side. Raises KeyError on reading where one is absent."""
    def read() -> Tensor:
        return torch.cat([weights[n] for n in names])
    parts = [weights.entries[n] for n in names if n in weights]
    files = tuple({file for e in parts for file in e.files})
    return like._replace(shape=(sum(e.shape[0] for e in parts), *like.shape[1:]), read=read, files=files)
