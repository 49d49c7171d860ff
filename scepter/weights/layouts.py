"""The layouts of published models, under the names of our own networks: CompVis and SGM single files, diffusers folders, text towers."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from scepter.weights.files import Weights, ema_name, read_model_folder
from scepter.weights.names import clip_text_section, openclip_from_hf, unet_from_diffusers, vae_from_diffusers

# what published single files hold beside weights, name by name: the schedule's buffers, which follow from the config
BUFFERS = frozenset({
    'alphas_cumprod', 'alphas_cumprod_prev', 'betas', 'log_one_minus_alphas_cumprod', 'posterior_log_variance_clipped',
    'posterior_mean_coef1', 'posterior_mean_coef2', 'posterior_variance', 'sqrt_alphas_cumprod', 'sqrt_one_minus_alphas_cumprod',
    'sqrt_recip_alphas_cumprod', 'sqrt_recipm1_alphas_cumprod', 'logvar', 'lvlb_weights', 'scale_factor', 'denoiser.sigmas',
    'model_ema.decay', 'model_ema.num_updates'})
MARKERS = frozenset({'v_pred', 'ztsnr'})    # tensors without content, whose presence says something (shapes.py)
# ... and what their text towers hold beside what any activation needs
TOWER_BUFFERS = frozenset({
    'transformer.text_model.embeddings.position_ids', 'transformer.embeddings.position_ids', 'model.attn_mask', 'model.logit_scale'})
TRAINING_LOSS = 'first_stage_model.loss.'    # the discriminator of the autoencoder's own training

UNET, VAE, TEXT = 'model.', 'first_stage_model.', 'cond_stage_model.'


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
        if name in BUFFERS or name in MARKERS or name in averages or name.startswith(TRAINING_LOSS):
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


def weights_for(model: nn.Module | Iterable[str], weights: Weights) -> Weights:
    """The weights under the names of this network (or these names), which may be a whole LatentDiffusion or any one part of it."""
    wanted = set(model.state_dict() if isinstance(model, nn.Module) else model)
    if any(n.startswith(VAE) for n in wanted):
        return whole_model(weights)
    whole = whole_model(weights)
    candidates = [weights, weights.renamed(unet_from_diffusers(weights)), vae_from_diffusers(weights),
                  text_tower(weights, is_openclip=True), text_tower(weights, is_openclip=False),
                  text_tower(weights.section('transformer.'), is_openclip=False)]
    prefixes = {UNET, VAE, TEXT, *(f'{TEXT}embedders.{n}.' for n in range(2))}
    candidates += [whole.section(prefix) for prefix in prefixes if any(n.startswith(prefix) for n in whole)]
    return max(candidates, key=lambda c: len(wanted & set(c)))    # the first of equals: the names as they are


def _with_text_model(name: str) -> str:
    """A tower that was saved without its prefix text_model., as newer transformers call it."""
    for part in ('embeddings.', 'encoder.', 'final_layer_norm.'):
        name = name.replace(f'.transformer.{part}', f'.transformer.text_model.{part}')
    return name
