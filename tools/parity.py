"""Opening what we wrote with the other library, and how near its numbers come to ours."""
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scepter.core.errors import CheckpointError
from scepter.core.registry import need
from scepter.weights.export import export_diffusers, export_single, note_parity
from scepter.weights.families import autoencoder, unet
from scepter.weights.families.sd import StableDiffusion, write_json
from scepter.weights.families.sdxl import StableDiffusionXL
from scepter.weights.family import family_of_network

PROMPTS = ['a photo of a cat', '']


def export(model: nn.Module, target: str | Path, dtype: torch.dtype | None = None, is_checked: bool = True) -> float | None:
    """Write a network as one file (a target that ends in .safetensors) or as a folder, and check it where diffusers knows its kind.

    dtype: of the file; the model's own weights are rounded to it, so that both stay the same network. Answers as check_export, or None.
    Raises ValueError where diffusers has no such network, CheckpointError where it computes something else.
    """
    target = Path(target)
    is_checked = is_checked and isinstance(family_of_network(model.state_dict()), StableDiffusion)
    if dtype is not None:
        own = next(model.parameters()).dtype
        model.to(dtype).to(own)
    if target.suffix != '.safetensors':
        export_diffusers(model, target, dtype)
        return check_export(model, target) if is_checked else None
    export_single(model, target, dtype)
    try:
        return check_export(model, target) if is_checked and model.cond_stage_model is not None else None
    except ValueError:    # one file holds any network; diffusers does not know this one
        return None


def check_export(model: nn.Module, path: str | Path, limit: float = 1e-4) -> float:
    """Open an exported folder or single file with diffusers, compare one forward, and note the figure in the files' metadata.

    The figure is the largest difference over the largest value, of the predicted noise (prompts through the text towers and the UNet) and
    of the decoded picture, in float32. Raises CheckpointError where it is above `limit`: such a file is not what we meant to write.
    """
    path = Path(path)
    diffusers = need('diffusers', 'dev')
    dtype = next(model.parameters()).dtype
    model.float()
    try:
        figure = max(relative(a, b) for a, b in zip(their_forward(model, open_with_diffusers(model, path)), our_forward(model)))
    finally:
        model.to(dtype)
    if not figure <= limit:
        raise CheckpointError(f'{path}: diffusers {diffusers.__version__} computes something else with it: it differs by {figure:.2g}')
    for file in [path] if path.is_file() else sorted(path.glob('*/*.safetensors')):
        note_parity(file, f'{figure:.1e} largest relative difference to diffusers {diffusers.__version__}, float32')
    return figure


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|"""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def open_with_diffusers(model: nn.Module, path: Path) -> dict[str, Any]:
    """The parts of a folder or single file, each opened by diffusers or transformers: unet, vae, and text towers of a folder."""
    diffusers, transformers = need('diffusers', 'dev'), need('transformers', 'clip')
    classes = {'unet': diffusers.UNet2DConditionModel, 'vae': diffusers.AutoencoderKL, 'text_encoder': transformers.CLIPTextModel,
               'text_encoder_2': transformers.CLIPTextModelWithProjection}
    if path.is_dir():
        return {part: kind.from_pretrained(path / part, torch_dtype=torch.float32).eval() for part, kind in classes.items()
                if (path / part / 'config.json').is_file()}
    with tempfile.TemporaryDirectory() as folder:
        configs = {'unet': unet.write_config(model), 'vae': autoencoder.write_config(model, model.IMAGE_SIZE, model.size_factor)}
        for part, config in configs.items():
            write_json(Path(folder) / part / 'config.json', config)
        return {part: classes[part].from_single_file(str(path), config=folder, subfolder=part, torch_dtype=torch.float32).eval()
                for part in ('unet', 'vae')}


def is_sdxl(model: nn.Module) -> bool:
    return isinstance(family_of_network(model.state_dict()), StableDiffusionXL)


def inputs(model: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Noise, times and sizes that stay the same from run to run."""
    channels, size = model.model.IN_CHANNELS, 2 ** (len(model.model.CHANNEL_MULT) + 1)
    noise = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    sizes = {name: torch.tensor([[512, 768], [640, 512]])[:, :count] for name, count in
             (('original_size', 2), ('crop_top_left', 2), ('target_size', 2), ('aesthetic_score', 1))}
    return noise, torch.tensor([1, model.TIMESTEPS - 1]), sizes


@torch.no_grad()
def our_forward(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(prediction, picture)"""
    noise, t, sizes = inputs(model)
    embedder = model.cond_stage_model
    cond = embedder(PROMPTS, **sizes) if is_sdxl(model) else embedder(PROMPTS)
    return model.model(noise, t, cond), model.first_stage_model.decode(noise[:1, :model.first_stage_model.EMBED_DIM])


@torch.no_grad()
def their_forward(model: nn.Module, parts: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same with the parts of the other library; what it could not open of a single file, the text towers, is ours."""
    noise, t, sizes = inputs(model)
    embedder = model.cond_stage_model
    tokens = embedder.tokenize(PROMPTS)
    picture = parts['vae'].decode(noise[:1, :model.first_stage_model.EMBED_DIM]).sample
    if not is_sdxl(model):
        context = parts['text_encoder'](input_ids=tokens).last_hidden_state if 'text_encoder' in parts else embedder.encode_text(tokens)
        return parts['unet'](noise, t, encoder_hidden_states=context).sample, picture
    ours = embedder.encode_text(tokens, **sizes)
    width = ours.vector.shape[1] - embedder.SIZE_DIM * sum(sizes[name].shape[1] for name in embedder.SIZES)
    context, pooled = ours.context, ours.vector[:, :width]
    towers = [parts[part] for part in ('text_encoder', 'text_encoder_2') if part in parts]
    if towers:
        outs = [tower(input_ids=tokens[:, i], output_hidden_states=True) for i, tower in enumerate(towers)]
        context, pooled = torch.cat([out.hidden_states[-2] for out in outs], dim=-1), outs[-1].text_embeds
        if embedder.ZERO_EMPTY:    # their pipeline does it, not their towers
            empty = [not prompt for prompt in PROMPTS]
            context[empty], pooled[empty] = 0, 0
    time_ids = torch.cat([sizes[name].float() for name in embedder.SIZES], dim=1)
    added = {'text_embeds': pooled, 'time_ids': time_ids}
    return parts['unet'](noise, t, encoder_hidden_states=context, added_cond_kwargs=added).sample, picture
