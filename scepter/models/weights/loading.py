"""Weights into networks: which names a network of ours wants, and an error for each that does not fit."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from scepter.core.errors import CheckpointError
from scepter.models.weights.files import Weights, ema_name, local_copy, read_model_folder, read_weights
from scepter.models.weights.hugging_face import in_layout_of
from scepter.models.weights.names import clip_text_section, openclip_from_hf, unet_from_diffusers, vae_from_diffusers

# what published single files hold beside weights, name by name: the schedule's buffers, which follow from the config
BUFFERS = frozenset({
    'alphas_cumprod', 'alphas_cumprod_prev', 'betas', 'log_one_minus_alphas_cumprod', 'posterior_log_variance_clipped',
    'posterior_mean_coef1', 'posterior_mean_coef2', 'posterior_variance', 'sqrt_alphas_cumprod', 'sqrt_one_minus_alphas_cumprod',
    'sqrt_recip_alphas_cumprod', 'sqrt_recipm1_alphas_cumprod', 'logvar', 'lvlb_weights', 'scale_factor', 'denoiser.sigmas',
    'model_ema.decay', 'model_ema.num_updates'})
# ... and what their text towers hold beside what any activation needs
TOWER_BUFFERS = frozenset({
    'transformer.text_model.embeddings.position_ids', 'transformer.embeddings.position_ids', 'model.attn_mask', 'model.logit_scale'})
TRAINING_LOSS = 'first_stage_model.loss.'    # the discriminator of the autoencoder's own training

# width of the UNet's text context -> whose it is
KINDS = {768: 'Stable Diffusion 1', 1024: 'Stable Diffusion 2', 2048: 'Stable Diffusion XL', 1280: "Stable Diffusion XL's refiner"}
UNET, VAE, TEXT = 'model.', 'first_stage_model.', 'cond_stage_model.'


def load_pretrained(model: nn.Module, path: str | Path, ignore_keys: Sequence[str] = (), use_ema: bool = False) -> None:
    """Load a whole model or any part of one from any place that FS knows, whatever names the file uses.

    Missing, unexpected and mis-shaped keys are a CheckpointError unless ignore_keys (exact names or globs) names them.
    """
    with local_copy(path) as local:
        is_ours = (local / 'MANIFEST.json').is_file() and hasattr(model, 'trained_state')
        # a checkpoint of ours leaves out the frozen parts that come from files of their own
        absent = set(model.state_dict()) - set(model.trained_state()) if is_ours else ()
        load_into(model, weights_for(model, read_weights(local, use_ema)), [*ignore_keys, *absent], source=str(path))


def latent_diffusion_weights(path: str | Path, use_ema: bool = False) -> Weights:
    """The weights of a whole Stable Diffusion under the names of LatentDiffusion: model.*, first_stage_model.*, cond_stage_model.*

    path: a local CompVis or SGM single file, a diffusers folder, or a checkpoint of ours. Raises CheckpointError.
    """
    return whole_model(read_weights(path, use_ema))


def whole_model(weights: Weights) -> Weights:
    """Weights of a whole model, in any of the known namings, under ours; known buffers and averages are left out."""
    if any(n.startswith(('unet.', 'text_encoder.', 'text_encoder_2.')) for n in weights):
        return from_diffusers(weights)
    if any(n.startswith('model.diffusion_model.') for n in weights):
        return from_compvis(weights)
    return weights


def from_compvis(weights: Weights) -> Weights:
    """model.diffusion_model.* -> model.*, conditioner.embedders.N.* -> cond_stage_model.embedders.N.*"""
    averages = {ema_name(n) for n in weights if n.startswith('model.')}
    entries = {}
    for name, entry in weights.entries.items():
        if name in BUFFERS or name in averages or name.startswith(TRAINING_LOSS):
            continue
        for theirs, ours in (('model.diffusion_model.', UNET), ('conditioner.', TEXT)):
            if name.startswith(theirs):
                name = ours + name[len(theirs):]
        if name.startswith(TEXT):
            name = _with_text_model(name)
            inner = name.split('.', 3)[3] if name.startswith(f'{TEXT}embedders.') and name.count('.') > 2 else name[len(TEXT):]
            if inner in TOWER_BUFFERS:
                continue
        entries[name] = entry
    return weights.with_entries(entries)


def from_diffusers(weights: Weights) -> Weights:
    """The parts of a pipeline folder; a second text tower makes both part of a conditioner, the first and only of SD2 is OpenCLIP's."""
    unet, vae = weights.section('unet.'), weights.section('vae.')
    found = {**unet.renamed(unet_from_diffusers(unet)).under(UNET).entries, **vae_from_diffusers(vae).under(VAE).entries}
    towers = [part for part in ('text_encoder', 'text_encoder_2') if any(n.startswith(f'{part}.') for n in weights)]
    for n, part in enumerate(towers):
        tower = text_tower(weights.section(f'{part}.'), is_openclip=weights.settings.get(part, {}).get('hidden_act') == 'gelu')
        found |= tower.under(f'{TEXT}embedders.{n}.' if 'text_encoder_2' in towers else TEXT).entries
    return weights.with_entries(found)


def text_tower(weights: Weights, is_openclip: bool) -> Weights:
    """A text tower of Hugging Face under the names of FrozenCLIPEmbedder or FrozenOpenCLIPEmbedder."""
    if is_openclip:
        return openclip_from_hf(weights).under('model.')
    return clip_text_section(weights).without(['text_projection.weight']).under('transformer.text_model.')


def text_tower_weights(folder: str | Path) -> Weights:
    """The weights of a Hugging Face CLIP folder under ClipText's names: embeddings.*, encoder.*, final_layer_norm.*"""
    return clip_text_section(read_model_folder(Path(folder))).without(['text_projection.weight', 'logit_scale'])


def weights_for(model: nn.Module, weights: Weights) -> Weights:
    """The weights under the names of this network, which may be a whole LatentDiffusion or any one part of it."""
    wanted = set(model.state_dict())
    if any(n.startswith(VAE) for n in wanted):
        return whole_model(weights)
    whole = whole_model(weights)
    candidates = [weights, weights.renamed(unet_from_diffusers(weights)), vae_from_diffusers(weights),
                  text_tower(weights, is_openclip=True), text_tower(weights, is_openclip=False),
                  text_tower(weights.section('transformer.'), is_openclip=False)]
    prefixes = {UNET, VAE, TEXT, *(f'{TEXT}embedders.{n}.' for n in range(2))}
    candidates += [whole.section(prefix) for prefix in prefixes if any(n.startswith(prefix) for n in whole)]
    return max(candidates, key=lambda c: len(wanted & set(c)))    # the first of equals: the names as they are


def load_into(model: nn.Module, weights: Mapping[str, Tensor], ignore_keys: Sequence[str] = (), source: str | None = None) -> None:
    """Copy weights into a network, one tensor at a time; nothing changes unless all of them fit.

    Missing, unexpected and mis-shaped keys are a CheckpointError that lists them, unless ignore_keys (exact names or globs) names them.
    A 1x1 convolution and a linear layer are the same. A parameter on the meta device comes to be on the CPU.
    """
    weights = Weights.of(weights)
    source = source or weights.source
    weights = weights.with_entries(in_layout_of(model, weights.entries))
    targets = model.state_dict(keep_vars=True)
    spare = {f'{name}.{key}' if name else key for name, module in model.named_modules() for key in getattr(module, 'spare_weights', ())}

    def is_ignored(name: str) -> bool:
        return any(name == key or fnmatchcase(name, key) for key in ignore_keys)

    missing = [n for n in targets if n not in weights and not is_ignored(n)]
    unexpected = [n for n in weights if n not in targets and n not in spare and not is_ignored(n)]
    shared = [n for n in targets if n in weights]
    misshaped = [n for n in shared if not _same_shape(targets[n].shape, weights.shape(n))]
    refused = [n for n in misshaped if not is_ignored(n)]
    if missing or unexpected or refused:
        shapes = [f'{n}: expected {list(targets[n].shape)}, found {list(weights.shape(n))}' for n in refused]
        rows = [f'{len(names)} {kind}:{_some(names)}' for kind, names in
                (('missing', missing), ('unexpected', unexpected), ('of another shape', shapes)) if names]
        raise CheckpointError(f'{source} does not fit {type(model).__name__}, which has {len(targets)} tensors; the file has {len(weights)}'
                              f'{_kind_of(weights)}\n' + '\n'.join(rows) + '\nName in IGNORE_KEYS what may be left as it is.')
    for name in shared:
        if name not in misshaped:
            _put(model, name, targets[name], weights[name])


@torch.no_grad()
def _put(model: nn.Module, name: str, target: Tensor, value: Tensor) -> None:
    if not target.is_meta:
        target.copy_(value.reshape(target.shape))
        return
    owner = model.get_submodule(name.rpartition('.')[0])
    value = value.reshape(target.shape).to(target.dtype)
    leaf = name.rpartition('.')[2]
    if isinstance(target, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(value.clone() if value._is_view() else value, requires_grad=target.requires_grad))
    else:
        setattr(owner, leaf, value)


def describe(weights: Iterable[str] | Weights) -> str | None:
    """What a published model these weights are of, by the width of the UNet's context and its label embedding; None where unknown."""
    for name in weights:
        if name.endswith('attn2.to_k.weight') and isinstance(weights, Weights):
            return KINDS.get(weights.shape(name)[-1])
    return None


def _with_text_model(name: str) -> str:
    """A tower that was saved without its prefix text_model., as newer transformers call it."""
    for part in ('embeddings.', 'encoder.', 'final_layer_norm.'):
        name = name.replace(f'.transformer.{part}', f'.transformer.text_model.{part}')
    return name


def _kind_of(weights: Weights) -> str:
    kind = describe(weights)
    return f' and is of {kind}' if kind else ''


def _same_shape(ours: Sequence[int], theirs: Sequence[int]) -> bool:
    def core(shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
    return core(ours) == core(theirs)


def _some(names: list[str], limit: int = 12) -> str:
    return ''.join(f'\n  {n}' for n in names[:limit]) + (f'\n  ... and {len(names) - limit} more' if len(names) > limit else '')
