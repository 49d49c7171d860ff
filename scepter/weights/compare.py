"""What a file says of its model, held against the config that it is loaded under.

Shapes are compared when weights are loaded. This is about what no shape shows: a network that was taught to predict v draws noise where it
is taken for one that predicts eps, and nothing else would tell.
"""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from scepter.core.config import Config
from scepter.core.errors import CheckpointError
from scepter.core.registry import BACKBONES, EMBEDDERS, MODELS, SCHEDULES, Registry
from scepter.core.schema import Component, schema_of
from scepter.weights.families import autoencoder, nova, process, text, unet
from scepter.weights.family import FAMILIES, may_be
from scepter.weights.files import Weights
from scepter.weights.said import Node, short, taken_of, values_of

# section of a LatentDiffusion -> (its registry, keys that a component like ours has): what a user wrote in its place is not looked at
SECTIONS: dict[str, tuple[Registry, set[str]]] = {
    'DIFFUSION_MODEL': (BACKBONES, {'NUM_HEADS_CHANNELS'}), 'FIRST_STAGE_MODEL': (MODELS, {'ENCODER'}),
    'COND_STAGE_MODEL': (EMBEDDERS, {'EMBEDDERS', 'LAYER', 'ROTARY_SHARE'})}


class Contradiction(NamedTuple):
    """One key of the config, its value there, and what the file says."""
    key: str
    ours: str
    theirs: str
    source: str

    def __str__(self) -> str:
        return f'{self.key}: the config has {self.ours}, but {self.source} says {self.theirs}'


def refuse_contradictions(model: nn.Module, weights: Weights, ignore_keys: Collection[str] = (), source: str | None = None) -> None:
    """Raise a CheckpointError with both values of all that the file of these weights says otherwise than the model's config.

    weights: as they were read. model: a LatentDiffusion, or one part of it. ignore_keys: names or globs of keys of its config (weights
    are named there too) that may differ; a section named there, e.g. DIFFUSION_MODEL, or with a PRETRAINED_MODEL of its own, is not
    looked at.
    """
    name = source or weights.source
    said, cfg = said_beside(model, weights, ignore_keys, name)
    found = [c for c in compare(said, cfg) if not _is_named(c.key, ignore_keys)]
    if found:
        keys = ', '.join(c.key for c in found)
        raise CheckpointError(f'{name} is not what the config says:\n' + ''.join(f'  {c}\n' for c in found) +
                              f'Correct the config; where it is meant to differ, say so: IGNORE_KEYS: [{keys}]')


def latent_beside(weights: Weights) -> dict[str, float]:
    """SCALE_FACTOR and SHIFT_FACTOR as they stand beside weights, of an autoencoder or of a whole; empty where nothing does."""
    values = weights.settings.get('vae', weights.settings.get('', {}))
    said = autoencoder.latent(values, weights.source) if 'scaling_factor' in values else {}
    return {key: value.value for key, value in said.items()}


def said_beside(model: nn.Module, weights: Weights, ignore_keys: Collection[str], name: str) -> tuple[Node, Mapping[str, Any]]:
    """(what stands beside these weights of the model, the model's config), both as of a LatentDiffusion with these keys alone."""
    settings = weights.settings
    cfg = getattr(model, 'cfg', {})
    if 'FIRST_STAGE_MODEL' in cfg:
        own = {key for key in SECTIONS if (cfg.get(key) or {}).get('PRETRAINED_MODEL') or _is_named(key, ignore_keys)}
        own |= {key for key, (registry, marks) in SECTIONS.items() if not marks & _filled(registry, cfg.get(key)).keys()}
        has_unet = (cfg.get('DIFFUSION_MODEL') or {}).get('PRETRAINED_MODEL') is None
        if not has_unet or _is_named('SCHEDULE_ARGS', ignore_keys):    # the process is that of the network's file
            own.add('SCHEDULE_ARGS')
        if settings.keys() & {'unet', 'vae'}:
            family = next((family for family in FAMILIES if may_be(family, settings)), None)
            return (family.said(settings, name, own) if family is not None else {}), cfg
        gone = {'SCALE_FACTOR', 'SHIFT_FACTOR'} if 'FIRST_STAGE_MODEL' in own else set()
        said = process.read_markers(weights)
        return {key: said[key] for key in said if key not in gone and (key == 'SCALE_FACTOR' or 'SCHEDULE_ARGS' not in own)}, cfg
    alone = settings.get('', {})
    if 'NUM_HEADS_CHANNELS' in cfg and (values := settings.get('unet', alone)):
        return {'DIFFUSION_MODEL': unet.read_config(values, name)}, {'DIFFUSION_MODEL': cfg}
    if {'ENCODER', 'DECODER'} <= cfg.keys() and (values := settings.get('vae', alone)):
        return {'FIRST_STAGE_MODEL': autoencoder.read_config(values, name)}, {'FIRST_STAGE_MODEL': cfg}
    if 'ROTARY_SHARE' in cfg and alone:
        return {'COND_STAGE_MODEL': nova.read_text(alone, name)}, {'COND_STAGE_MODEL': {**cfg, 'PRETRAINED_MODEL': None}}
    if 'HEADS' in cfg and alone:    # which state is handed on is for the embedder to say
        sizes = {key: value for key, value in text.read_config(alone, name).items() if not key.startswith('LAYER')}
        return {'COND_STAGE_MODEL': sizes}, {'COND_STAGE_MODEL': {**cfg, 'PRETRAINED_MODEL': None}}
    return {}, {}


def compare(said: Node, cfg: Mapping[str, Any]) -> Iterator[Contradiction]:
    """Every key of a LatentDiffusion of which a file says otherwise than a config, both with the keys that they have."""
    ours, theirs = facts(cfg), facts(values_of(said))
    rows = {row.key: row for row in taken_of(said)}
    for key, fact in theirs.items():
        row = next((rows[name] for name in (key, *fact.read_from) if name in rows), None)
        if key in ours and row is not None and not row.is_convention and not fact.equals(ours[key]):
            yield Contradiction(key, ours[key].shown, fact.shown, row.source)


# ---------------------------------------------------------------- what no shape shows
class Fact(NamedTuple):
    """A value in a form that can be compared. read_from: the keys that it was read from, where that is not its own name."""
    value: Any
    shown: str
    read_from: tuple[str, ...] = ()

    def equals(self, other: Fact) -> bool:
        """Whether both say the same; tables to 1e-5."""
        if isinstance(self.value, torch.Tensor):    # of another length: TIMESTEPS says it
            return len(self.value) != len(other.value) or torch.allclose(self.value, other.value, atol=1e-5)
        return bool(self.value == other.value)


def facts(model: Mapping[str, Any]) -> dict[str, Fact]:
    """key -> what the config of a LatentDiffusion, or a part of one, says that shapes do not show."""
    plain = ('PARAMETERIZATION', 'TIMESTEPS', 'ZERO_TERMINAL_SNR', 'SCALE_FACTOR', 'SHIFT_FACTOR')
    found = {key: Fact(model[key], repr(model[key])) for key in plain if key in model}
    if 'SCHEDULE_ARGS' in model:
        alphas, _, *times = SCHEDULES.build(Config.of(model['SCHEDULE_ARGS']), n=model.get('TIMESTEPS', 1000))
        told = times[0] if times else torch.arange(len(alphas))
        found['SCHEDULE_ARGS'] = Fact(torch.stack([alphas, told / len(alphas)], 1), short(model['SCHEDULE_ARGS']), ('SCHEDULE_ARGS.NAME',))
    if (heads := _heads(_filled(BACKBONES, model.get('DIFFUSION_MODEL')))) is not None:
        found['DIFFUSION_MODEL.NUM_HEADS'] = heads
    for half in ('ENCODER', 'DECODER'):
        coder = _filled(BACKBONES, (model.get('FIRST_STAGE_MODEL') or {}).get(half))
        if 'NORM_GROUPS' in coder:
            found[f'FIRST_STAGE_MODEL.{half}.NORM_GROUPS'] = Fact(coder['NORM_GROUPS'], repr(coder['NORM_GROUPS']))
    words = model.get('COND_STAGE_MODEL') or {}
    words = _filled(EMBEDDERS, words) if 'EMBEDDERS' in words else words
    for key in ('SIZES', 'SIZE_DIM', 'ZERO_EMPTY'):
        if key in words:
            found[f'COND_STAGE_MODEL.{key}'] = Fact(words[key], repr(words[key]))
    towers = {f'COND_STAGE_MODEL.EMBEDDERS[{i}]': tower for i, tower in enumerate(words['EMBEDDERS'])} if 'EMBEDDERS' in words \
        else {'COND_STAGE_MODEL': words}
    for key, tower in towers.items():
        found |= {f'{key}.{name}': fact for name, fact in _tower(tower).items()}
    return found


def _heads(network: Mapping[str, Any]) -> Fact | None:
    """The attention heads of every level that has some, and of the middle; None for a network of another kind."""
    if not {'NUM_HEADS', 'NUM_HEADS_CHANNELS', 'CHANNEL_MULT', 'ATTENTION_RESOLUTIONS'} <= network.keys():
        return None
    widths = [m * network['MODEL_CHANNELS'] for m in network['CHANNEL_MULT']]
    used = [w for i, w in enumerate(widths) if 2 ** i in network['ATTENTION_RESOLUTIONS'] or i == len(widths) - 1]
    heads = [network['NUM_HEADS'] or w // network['NUM_HEADS_CHANNELS'] for w in used]
    return Fact(heads, f'{", ".join(map(str, heads))} heads', ('DIFFUSION_MODEL.NUM_HEADS', 'DIFFUSION_MODEL.NUM_HEADS_CHANNELS'))


def _tower(tower: Mapping[str, Any]) -> dict[str, Fact]:
    """Kind, heads and handed-on state of a text tower of ours; nothing where a file of its own says them."""
    if tower.get('NAME') == 'FrozenPhiEmbedder' and tower.get('PRETRAINED_MODEL') is None:
        tower = _filled(EMBEDDERS, tower)
        return {key: Fact(tower[key], str(tower[key])) for key in ('HEADS', 'ROTARY_SHARE')}
    if tower.get('NAME') not in ('FrozenCLIPEmbedder', 'FrozenOpenCLIPEmbedder') or tower.get('PRETRAINED_MODEL') is not None:
        return {}
    tower = _filled(EMBEDDERS, tower)
    sizes = text.ARCHITECTURES.get(tower.get('ARCH', 'custom'))
    depth, heads = (tower['DEPTH'], tower['HEADS']) if sizes is None else sizes[1:3]
    state = {'last': depth, 'penultimate': depth - 1, 'pooled': depth}.get(tower['LAYER'])
    if state is None:
        state = tower['LAYER_IDX'] if tower['LAYER_IDX'] >= 0 else depth + 1 + tower['LAYER_IDX']
    normed = tower['LAYER'] in ('last', 'pooled') or tower['USE_FINAL_LAYER_NORM']
    return {'NAME': Fact(tower['NAME'], tower['NAME']), 'HEADS': Fact(heads, f'{heads} heads'),
            'LAYER': Fact((state, normed), f'the state after {state} blocks{", normed" if normed else ", not normed"}')}


def _is_named(key: str, ignore_keys: Collection[str]) -> bool:
    return any(key == name or fnmatchcase(key, name) for name in ignore_keys)


def _filled(registry: Registry, node: Any) -> Mapping[str, Any]:
    """A node with the defaults of its component; empty where there is none, as it stands where it is no component of ours."""
    if not isinstance(node, Mapping) or 'NAME' not in node:
        return {}
    kind = registry.get(node['NAME'])
    return schema_of(kind).fill(Config.of(node)) if isinstance(kind, type) and issubclass(kind, Component) else node
