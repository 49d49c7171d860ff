"""What a stranger's model is, found out without a YAML: the config that builds it, and where each value was taken from.

    describe(path: str | Path) -> Description
        .config   Config {'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MODEL': {...}, 'SAMPLE_ARGS': {...}}}
                  MODEL.PRETRAINED_MODEL is the path, so MODELS.build(config.SOLVER.MODEL) is the network with its weights; the config
                  can be saved, and trained from
        .taken    list of Taken(key, value, source, is_convention); str() of one is the line to print

path: a diffusers folder or a single file, or any place of one that FS knows. A checkpoint of ours has a config of its own
(models/restore.py), and so has a single file that tools/checkpoint.py made.
Raises CheckpointError: for what is no whole model, with its name and what to do, and for what no network of ours can be, with the key.
"""
from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scepter.core.config import Config
from scepter.core.errors import CheckpointError
from scepter.weights import configs
from scepter.weights.configs import Node, Said
from scepter.weights.files import local_copy, read_file, read_settings
from scepter.weights.shapes import describe_single
from scepter.weights.vocabulary import Vocabulary

PIPELINES = {f'StableDiffusion{kind}Pipeline': 'XL' in kind for kind in
             ('', 'Img2Img', 'Inpaint', 'XL', 'XLImg2Img', 'XLInpaint')}    # class of model_index.json -> whether it is SDXL's

Settings = Mapping[str, Mapping[str, Any]]    # of read_settings


class Taken(NamedTuple):
    """One value of a description. is_convention: no file says it; published models of this kind are so."""
    key: str    # e.g. SOLVER.MODEL.SCALE_FACTOR
    value: Any
    source: str
    is_convention: bool = False

    def __str__(self) -> str:
        return f'{self.key} = {short(self.value)}    {"assumed: " if self.is_convention else ""}{self.source}'


class Description(NamedTuple):
    """A model that opens without YAML."""
    config: Config
    taken: list[Taken]


def describe(path: str | Path) -> Description:
    """The config of the model at a path, and where each of its values was taken from. Raises CheckpointError; see the top of this file."""
    with local_copy(path) as local:
        node = describe_single(read_file(local), str(path)) if local.is_file() else describe_folder(local, str(path))
    check_whole(node['SOLVER']['MODEL'], str(path))
    node['SOLVER']['MODEL'] = {'PRETRAINED_MODEL': str(path), **node['SOLVER']['MODEL']}
    return Description(Config(values_of(node)), list(taken_of(node)))


# ---------------------------------------------------------------- a diffusers folder
def describe_folder(folder: Path, name: str) -> Node:
    """The node of a diffusers folder. name: what to call it in messages."""
    if (folder / 'MANIFEST.json').is_file():
        raise CheckpointError(f'{name} is a checkpoint of ours: its own config.yaml says what it is')
    settings = read_settings(folder)
    pipeline = settings.get('model_index', {}).get('_class_name')
    if pipeline is not None and pipeline not in [*PIPELINES]:
        raise CheckpointError(f'{name} is a {pipeline} of diffusers; those that open here are {", ".join(PIPELINES)}')
    model = said_of(settings, name)
    lacking = [part for part, key in (('unet', 'DIFFUSION_MODEL'), ('vae', 'FIRST_STAGE_MODEL'), ('text_encoder', 'COND_STAGE_MODEL'))
               if key not in model]
    if lacking:
        raise CheckpointError(f'{name}: no {lacking[0]}/config.json; a folder that opens without YAML has unet, vae and text_encoder')
    is_xl = 'EMBEDDERS' in model['COND_STAGE_MODEL']
    if 'PARAMETERIZATION' not in model:
        model['PARAMETERIZATION'] = Said('eps', f'no {configs.SCHEDULER}: what most published models predict', True)
    levels = len(model['FIRST_STAGE_MODEL']['ENCODER']['CH_MULT'].value)
    model['SIZE_FACTOR'] = Said(2 ** (levels - 1), 'vae/config.json: block_out_channels')
    model['IMAGE_SIZE'] = _image_size(settings['unet'], model['SIZE_FACTOR'].value, is_xl)
    for part, tower in zip(_towers(settings), model['COND_STAGE_MODEL']['EMBEDDERS'] if is_xl else [model['COND_STAGE_MODEL']]):
        _give_tokenizer(tower, folder / part.replace('text_encoder', 'tokenizer'), name)
    return {'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MODEL': model, 'SAMPLE_ARGS': _sample_args(settings, name, model, is_xl)}}


def said_of(settings: Settings, name: str, left_out: Collection[str] = ()) -> Node:
    """What the configs of a folder say of a LatentDiffusion: the keys for the parts that are there.

    left_out: sections that are not looked at, e.g. DIFFUSION_MODEL. Raises CheckpointError for what no network of ours can be.
    """
    index = settings.get('model_index', {})
    pipeline, towers = index.get('_class_name'), _towers(settings)
    is_xl = PIPELINES[pipeline] if pipeline in [*PIPELINES] else 'text_encoder_2' in towers
    model: Node = {'NAME': 'LatentDiffusion'}
    if 'scheduler' in settings and 'SCHEDULE_ARGS' not in left_out:
        model |= configs.process(settings['scheduler'], name)
    if 'unet' in settings and 'DIFFUSION_MODEL' not in left_out:
        model['DIFFUSION_MODEL'] = configs.unet(settings['unet'], name)
    if 'vae' in settings and 'FIRST_STAGE_MODEL' not in left_out:
        model |= configs.latent(settings['vae'], name)
        model['FIRST_STAGE_MODEL'] = configs.vae(settings['vae'], name)
    if towers and 'COND_STAGE_MODEL' not in left_out:
        if not is_xl:
            model['COND_STAGE_MODEL'] = configs.text_tower(settings[towers[0]], name, towers[0])
        elif 'DIFFUSION_MODEL' in model:
            model['COND_STAGE_MODEL'] = _conditioner(settings, towers, model['DIFFUSION_MODEL'], name)
    return model


def _towers(settings: Settings) -> list[str]:
    index = settings.get('model_index', {})
    return [part for part in ('text_encoder', 'text_encoder_2') if part in settings and index.get(part, part) not in (None, [None, None])]


def _image_size(unet: Mapping[str, Any], size_factor: int, is_xl: bool) -> Said:
    size = unet.get('sample_size')
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) == 2 and all(type(side) is int and side > 0 for side in sides):
        pixels = [side * size_factor for side in sides]
        return Said(pixels[0] if pixels[0] == pixels[1] else pixels, 'unet/config.json: sample_size')
    return Said(1024 if is_xl else 512, 'no sample_size in unet/config.json: the usual size', True)


def _conditioner(settings: Settings, parts: list[str], unet: Node, name: str) -> Node:
    """SDXL's towers side by side; the sizes that the network is told follow from the width of its vector."""
    towers = [configs.text_tower(settings[part], name, part, 'last' if part == parts[-1] else 'beside') for part in parts]
    kind, size_dim = (settings['unet'].get(key) for key in ('addition_embed_type', 'addition_time_embed_dim'))
    if kind is None or type(size_dim) is not int or size_dim < 1:
        raise CheckpointError(f'{name}: unet/config.json has addition_embed_type {kind!r} and addition_time_embed_dim {size_dim!r}, but '
                              'the UNet of Stable Diffusion XL is told sizes by text_time')
    zero_empty = bool(settings.get('model_index', {}).get('force_zeros_for_empty_prompt', True))
    return configs.conditioner(towers, towers[-1]['WIDTH'].value, unet['ADM_IN_CHANNELS'],
                               Said(size_dim, 'unet/config.json: addition_time_embed_dim'),
                               Said(zero_empty, 'model_index.json: force_zeros_for_empty_prompt'), name)


def _give_tokenizer(tower: Node, folder: Path, name: str) -> None:
    """Give a tower the tokenizer of its folder where that is not the one we have anyway."""
    if not folder.is_dir():
        return
    if Vocabulary.from_folder(folder) != Vocabulary.shipped(pad=0 if 'ARCH' in tower else None):
        if '://' in name:
            raise CheckpointError(f'{name}: its {folder.name} is not the usual one of CLIP: download the folder and give its path')
        tower['TOKENIZER_PATH'] = Said(str(Path(name) / folder.name), f'{folder.name}: not the usual vocabulary')


def _sample_args(settings: Settings, name: str, model: Node, is_xl: bool) -> Node:
    """What the folder's scheduler and pipeline draw with."""
    node = configs.sampling(settings['scheduler'], name) if 'scheduler' in settings else {}
    usual = 'StableDiffusionXLPipeline' if is_xl else 'StableDiffusionPipeline'
    pipeline = f"the default of {settings.get('model_index', {}).get('_class_name', usual)}"
    zero_snr = model.get('ZERO_TERMINAL_SNR', Said(False, '')).value
    return {**node, 'SAMPLE_STEPS': Said(50, pipeline, True), 'GUIDE_SCALE': Said(5.0 if is_xl else 7.5, pipeline, True),
            'GUIDE_RESCALE': Said(0.7, 'usual with zero terminal SNR (2305.08891)', True) if zero_snr else Said(0.0, pipeline, True),
            'IMAGE_SIZE': model['IMAGE_SIZE']}


# ---------------------------------------------------------------- bricks
def check_whole(model: Node, name: str) -> None:
    """Refuse parts that do not belong together. The network reads the latent alone, or beside it a mask and what the mask leaves."""
    latent, unet = model['FIRST_STAGE_MODEL']['EMBED_DIM'], model['DIFFUSION_MODEL']
    takes, gives = unet['IN_CHANNELS'], unet['OUT_CHANNELS']
    known = {8: 'InstructPix2Pix', 5: 'depth to image', 7: 'the upscaler'}
    if takes.value not in (latent.value, 2 * latent.value + 1):
        kind = f' ({known[takes.value]})' if takes.value in known and latent.value == 4 else ''
        raise CheckpointError(f'{name}: {takes.source} is {takes.value}{kind}, but a latent has {latent.value} channels; networks that '
                              f'open here take these, or {2 * latent.value + 1} for inpainting')
    if gives.value != latent.value:
        raise CheckpointError(f'{name}: {gives.source} is {gives.value}, but a latent has {latent.value} channels')


def values_of(node: Any) -> Any:
    """A node without its sources."""
    if isinstance(node, Said):
        return node.value
    if isinstance(node, dict):
        return {key: values_of(value) for key, value in node.items()}
    return [values_of(value) for value in node] if isinstance(node, list) else node


def taken_of(node: Any, key: str = '') -> Iterator[Taken]:
    """The rows of a node, in its order."""
    if isinstance(node, Said):
        yield Taken(key, *node)
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from taken_of(value, f'{key}.{name}' if key else name)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from taken_of(value, f'{key}[{i}]')


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f'{text[:60]} ...'
