"""Tiny twins of the shipped recipes: the YAML itself with smaller sizes on top, and weights in the layout that is published."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import scepter.components  # noqa: F401  (registers)
from scepter.core.config import Config
from scepter.core.registry import MODELS
from tests.models.oracles import randomize
from tiny import CLIP, OPENCLIP

EXAMPLES = Path(__file__).resolve().parents[1] / 'examples'
CODER = {'CH': 32, 'CH_MULT': [1, 1, 1, 1], 'NUM_RES_BLOCKS': 1}
UNET = {'MODEL_CHANNELS': 32, 'NUM_RES_BLOCKS': 1}

# recipe -> (sizes of its UNet, sizes of its text towers)
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'sd15/sd15_512_full': ({'NUM_HEADS': 4, 'CONTEXT_DIM': 32}, CLIP),
    'sd15/sd15_buckets': ({'NUM_HEADS': 4, 'CONTEXT_DIM': 32}, CLIP),
    'sd21/sd21_512': ({'NUM_HEADS_CHANNELS': 16, 'CONTEXT_DIM': 48}, OPENCLIP),
    'sd21/sd21_768_v': ({'NUM_HEADS_CHANNELS': 16, 'CONTEXT_DIM': 48}, OPENCLIP),
    'sdxl/sdxl_1024': ({'NUM_HEADS_CHANNELS': 16, 'CONTEXT_DIM': 32 + 48, 'ADM_IN_CHANNELS': 48 + 6 * 256, 'TRANSFORMER_DEPTH': [0, 1, 2]},
                       {'EMBEDDERS': [CLIP, OPENCLIP]}),
    'sdxl/sdxl_refiner': ({'NUM_HEADS_CHANNELS': 16, 'CONTEXT_DIM': 48, 'ADM_IN_CHANNELS': 48 + 5 * 256, 'TRANSFORMER_DEPTH': 1},
                          {'EMBEDDERS': [OPENCLIP]}),
}


def twin(recipe: str, file: Path, weights: Path | None = None, images: Path | None = None, **solver: Any) -> Config:
    """Write a recipe of 64 pixels and a few thousand weights over the shipped one, and load it.

    weights: its PRETRAINED_MODEL.  images: its data.  solver: further keys of SOLVER.
    """
    unet, text = SIZES[recipe]
    shipped = Config.load(EXAMPLES / f'{recipe}.yaml').SOLVER
    if 'EMBEDDERS' in text:    # a list is replaced whole, so it says again what the recipe does
        text = {'EMBEDDERS': [{**theirs, **ours} for theirs, ours in zip(shipped.MODEL.COND_STAGE_MODEL.EMBEDDERS, text['EMBEDDERS'])]}
    data: dict[str, Any] = {'DATA_FOLDER': str(images), 'BATCH_SIZE': 2, 'NUM_WORKERS': 0}
    if shipped.TRAIN_DATA.get('BUCKETS') is not None:
        data |= {'BUCKETS': 64, 'BUCKET_STEP': 16}
    else:
        data['TRANSFORMS'] = [{**t, 'SIZE': 64} for t in shipped.TRAIN_DATA.TRANSFORMS]
    file.write_text(str(Config({
        '_BASE_': str(EXAMPLES / f'{recipe}.yaml'), 'ENV': {'DEVICE': 'cpu'},
        'SOLVER': {
            'WORK_DIR': str(file.parent / 'work'), 'DTYPE': 'float32', 'SAMPLE_ARGS': {'IMAGE_SIZE': 64, 'SAMPLE_STEPS': 2},
            'MODEL': {'PRETRAINED_MODEL': weights and str(weights), 'IMAGE_SIZE': 64, 'DIFFUSION_MODEL': {**UNET, **unet},
                      'FIRST_STAGE_MODEL': {'ENCODER': CODER, 'DECODER': CODER}, 'COND_STAGE_MODEL': text},
            'TRAIN_DATA': data, **solver}})), 'utf-8')
    return Config.load(file)


def network(cfg: Config) -> nn.Module:
    """The network of a twin without a file, all of its weights random: a zero would hide a wrong name."""
    return randomize(MODELS.build({**cfg.SOLVER.MODEL, 'PRETRAINED_MODEL': None}))


def publish(model: nn.Module, file: Path) -> None:
    """Write a network as its makers do: under their names, with the buffers of their training code, and all of OpenCLIP's tower."""
    is_xl = hasattr(model.cond_stage_model, 'embedders')
    names = {'model.': 'model.diffusion_model.', 'cond_stage_model.': 'conditioner.' if is_xl else 'cond_stage_model.'}
    tensors = {}
    for name, value in model.state_dict().items():
        prefix = name.split('.', 1)[0] + '.'
        tensors[names.get(prefix, prefix) + name[len(prefix):]] = value.clone()
    if is_xl:
        tensors |= {'denoiser.sigmas': torch.zeros(1000), 'conditioner.embedders.1.model.logit_scale': torch.zeros(())}
    else:
        tensors |= {name: torch.zeros(1000) for name in ('betas', 'alphas_cumprod', 'sqrt_alphas_cumprod', 'posterior_variance')}
    if 'cond_stage_model.model.ln_final.weight' in tensors:
        blocks = {name: value for name, value in tensors.items() if '.resblocks.0.' in name}
        last = f'.resblocks.{model.cond_stage_model.DEPTH - 1}.'    # it never runs, but it is in the file
        tensors |= {name.replace('.resblocks.0.', last): torch.zeros_like(value) for name, value in blocks.items()}
        tensors['cond_stage_model.model.text_projection'] = torch.zeros(48, 48)
    save_file(tensors, file)


def three_images(folder: Path) -> Path:
    """A folder of pictures with captions; their sizes differ, and none is that of the network."""
    folder.mkdir()
    for i, (colour, size) in enumerate({'red': (80, 64), 'green': (64, 100), 'blue': (128, 96)}.items()):
        Image.new('RGB', size, colour).save(folder / f'{i}.png')
        (folder / f'{i}.txt').write_text(f'a {colour} wall')
    return folder
