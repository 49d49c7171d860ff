"""Stable Diffusion 1 and 2: a UNet, an autoencoder and one text tower, CLIP's or OpenCLIP's.

What follows from the kind alone is marked as a convention: Stable Diffusion 1 (1x1 convolutions around its transformers) has 8 heads on
every level, 2 and XL (linear layers) have heads of 64 channels. 1 predicts eps; of 2 no name and no shape tells whether it predicts eps
(published at 512 pixels) or v (at 768), but inpainting, with its nine channels, is eps.
"""
from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from scepter.core.errors import CheckpointError
from scepter.weights.families import autoencoder, process, text, unet
from scepter.weights.family import Family, Part, register
from scepter.weights.files import Configs, Weights
from scepter.weights.said import Node, Said, Shapes
from scepter.weights.tables import Row
from scepter.weights.vocabulary import Vocabulary

# what published single files hold beside weights: the schedule's buffers, which follow from the config, and counters of averages
BUFFERS = frozenset({
    'alphas_cumprod', 'alphas_cumprod_prev', 'betas', 'log_one_minus_alphas_cumprod', 'posterior_log_variance_clipped',
    'posterior_mean_coef1', 'posterior_mean_coef2', 'posterior_variance', 'sqrt_alphas_cumprod', 'sqrt_one_minus_alphas_cumprod',
    'sqrt_recip_alphas_cumprod', 'sqrt_recipm1_alphas_cumprod', 'logvar', 'lvlb_weights', 'scale_factor', 'denoiser.sigmas',
    'model_ema.decay', 'model_ema.num_updates'})
# ... markers (process.py), and the discriminator of the autoencoder's own training
SPARE = BUFFERS | {'v_pred', 'ztsnr', 'first_stage_model.loss.'}
TOWER_SPARE = ('transformer.text_model.embeddings.position_ids', 'transformer.embeddings.position_ids', 'model.attn_mask',
               'model.logit_scale')
SHARED = ('model.time_embed.0.weight', 'first_stage_model.decoder.conv_in.weight')    # tells of a UNet and of an autoencoder
BESIDE_LATENT = {8: 'InstructPix2Pix', 5: 'depth to image', 7: 'the upscaler'}    # channels of networks that do not open here


def single_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """Our names <-> those of CompVis and SGM. ours, theirs: where the text towers are."""
    clip = [Row(f'{ours}.transformer.text_model.{m}', f'{theirs}.transformer.{prefix}{m}')
            for prefix in ('text_model.', '') for m in text.MODULES]
    return (Row('model', 'model.diffusion_model'), Row('first_stage_model', 'first_stage_model'),
            Row(f'{ours}.model', f'{theirs}.model'), *clip)


class StableDiffusion(Family):
    """What the families of Stable Diffusion share."""

    spare = SPARE | {f'cond_stage_model.{name}' for name in TOWER_SPARE}
    implementation = 'https://github.com/CompVis/stable-diffusion'
    pipelines = tuple(f'StableDiffusion{kind}Pipeline' for kind in ('', 'Img2Img', 'Inpaint'))
    scale_factor, guide_scale, pixels = 0.18215, 7.5, 512

    @property
    def towers(self) -> tuple[Part, ...]:
        """The text towers among its parts."""
        return self.parts[2:]

    def average_of(self, name: str) -> str | None:
        """model.diffusion_model.out.2.bias -> model_ema.diffusion_modelout2bias"""
        return 'model_ema.' + name.removeprefix('model.').replace('.', '') if name.startswith('model.') else None

    # ---------------------------------------------------------------- theirs as ours
    def accepts(self, settings: Configs) -> bool:
        pipeline = settings.get('model_index', {}).get('_class_name')
        return pipeline in self.pipelines or (pipeline is None and 'transformer' not in settings
                                               and not settings.keys().isdisjoint(part.folder for part in self.parts))

    def read_folder(self, settings: Configs, folder: Path, name: str) -> Node:
        model = self.said(settings, name)
        lacking = [part for part in (unet.UNET, autoencoder.VAE, self.towers[0]) if part.key not in model]
        if lacking:
            raise CheckpointError(f'{name}: no {lacking[0].folder}/config.json; a folder that opens without YAML has '
                                  'unet, vae and text_encoder')
        if 'PARAMETERIZATION' not in model:
            model['PARAMETERIZATION'] = Said('eps', f'no {process.SCHEDULER}: what most published models predict', True)
        levels = len(model['FIRST_STAGE_MODEL']['ENCODER']['CH_MULT'].value)
        model['SIZE_FACTOR'] = Said(2 ** (levels - 1), 'vae/config.json: block_out_channels')
        model['IMAGE_SIZE'] = self._size_of_folder(settings['unet'], model['SIZE_FACTOR'].value)
        for part, tower in zip(towers_of(settings), towers_in(model['COND_STAGE_MODEL'])):
            _give_tokenizer(tower, folder / part.replace('text_encoder', 'tokenizer'), name)
        return {'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MODEL': check_whole(model, name),
                           'SAMPLE_ARGS': self._sample_args(settings, name, model)}}

    def said(self, settings: Configs, name: str, left_out: Collection[str] = ()) -> Node:
        model: Node = {'NAME': 'LatentDiffusion'}
        if 'scheduler' in settings and 'SCHEDULE_ARGS' not in left_out:
            model |= process.read_config(settings['scheduler'], name)
        if 'unet' in settings and 'DIFFUSION_MODEL' not in left_out:
            model['DIFFUSION_MODEL'] = unet.read_config(settings['unet'], name)
        if 'vae' in settings and 'FIRST_STAGE_MODEL' not in left_out:
            model |= autoencoder.latent(settings['vae'], name)
            model['FIRST_STAGE_MODEL'] = autoencoder.read_config(settings['vae'], name)
        if towers_of(settings) and 'COND_STAGE_MODEL' not in left_out:
            model |= self._text_of_folder(settings, name, model.get('DIFFUSION_MODEL'))
        return model

    def _text_of_folder(self, settings: Configs, name: str, network: Node | None) -> Node:
        part = towers_of(settings)[0]
        return {'COND_STAGE_MODEL': text.read_config(settings[part], name, part)}

    def _size_of_folder(self, config: Mapping[str, Any], size_factor: int) -> Said:
        size = config.get('sample_size')
        sides = size if isinstance(size, list) else [size, size]
        if len(sides) == 2 and all(type(side) is int and side > 0 for side in sides):
            pixels = [side * size_factor for side in sides]
            return Said(pixels[0] if pixels[0] == pixels[1] else pixels, 'unet/config.json: sample_size')
        return Said(self.pixels, 'no sample_size in unet/config.json: the usual size', True)

    def _sample_args(self, settings: Configs, name: str, model: Node) -> Node:
        """What the folder's scheduler and pipeline draw with."""
        node = process.sampling(settings['scheduler'], name) if 'scheduler' in settings else {}
        pipeline = f"the default of {settings.get('model_index', {}).get('_class_name', self.pipelines[0])}"
        zero_snr = model.get('ZERO_TERMINAL_SNR', Said(False, '')).value
        return {**node, 'SAMPLE_STEPS': Said(50, pipeline, True), 'GUIDE_SCALE': Said(self.guide_scale, pipeline, True),
                'GUIDE_RESCALE': Said(0.7, 'usual with zero terminal SNR (2305.08891)', True) if zero_snr else Said(0.0, pipeline, True),
                'IMAGE_SIZE': model['IMAGE_SIZE']}

    # ---------------------------------------------------------------- a single file as ours
    def read_single(self, weights: Weights, whole: Weights, name: str) -> Node:
        network = unet.read_shapes(Shapes(whole.section('model.'), name))
        words = self._text_of_file(Shapes(whole.section('cond_stage_model.'), name), network)
        model: Node = {'NAME': 'LatentDiffusion', **process.read_markers(weights), 'DIFFUSION_MODEL': network,
                       'FIRST_STAGE_MODEL': autoencoder.read_shapes(Shapes(whole.section('first_stage_model.'), name)),
                       'COND_STAGE_MODEL': words}
        model.setdefault('PARAMETERIZATION', self._prediction(network))
        model.setdefault('SCALE_FACTOR', Said(self.scale_factor, f'the convention of {self.name}', True))
        model['SIZE_FACTOR'] = Said(2 ** (len(model['FIRST_STAGE_MODEL']['ENCODER']['CH_MULT'].value) - 1), 'the levels of its autoencoder')
        spoken = re.fullmatch(r'(\d{2,5})x(\d{2,5})', weights.settings.get('metadata', {}).get('modelspec.resolution', ''))
        model['IMAGE_SIZE'] = Said(self._pixels(model['PARAMETERIZATION'].value), f'the convention of {self.name}', True)
        if spoken:
            width, height = int(spoken[1]), int(spoken[2])
            model['IMAGE_SIZE'] = Said(width if width == height else [height, width], 'modelspec.resolution')
        return {'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MODEL': check_whole(model, name),
                           'SAMPLE_ARGS': {'IMAGE_SIZE': model['IMAGE_SIZE']}}}

    def _text_of_file(self, shapes: Shapes, network: Node) -> Node:
        return text.read_shapes(shapes, '', 'alone')

    def _prediction(self, network: Node) -> Said:
        return Said('eps', f'no marker in the file; the convention of {self.name}', True)

    def _pixels(self, prediction: str) -> int:
        return self.pixels

    # ---------------------------------------------------------------- ours as theirs
    def write_configs(self, model: nn.Module, folder: Path) -> None:
        parts = dict(self.embedders(model))
        configs = {'unet': unet.write_config(model), 'vae': autoencoder.write_config(model, model.IMAGE_SIZE, model.size_factor),
                   **{part.folder: text.write_config(embedder, part.folder) for part, embedder in parts.items()}}
        for part, config in configs.items():
            write_json(folder / part / 'config.json', config)
        for tower, embedder in parts.items():
            embedder.tokenizer.vocabulary.save(folder / tower.folder.replace('text_encoder', 'tokenizer'), embedder.MAX_LENGTH)
        write_json(folder / 'scheduler' / 'scheduler_config.json', process.write_config(model))
        write_json(folder / 'model_index.json', self._index(model))

    def embedders(self, model: nn.Module) -> Iterator[tuple[Part, nn.Module]]:
        """The towers of a network, each with its part. Raises ValueError where one is not CLIP's or OpenCLIP's."""
        for part in self.towers:
            embedder = model.get_submodule(part.ours[:-1]) if model.cond_stage_model is not None else None
            if not hasattr(embedder, 'tower'):
                raise ValueError(f'diffusers has no text tower like {type(embedder).__name__}; export to one file')
            yield part, embedder

    def read_there(self, model: nn.Module, weights: Weights) -> Weights:
        """Without the blocks after the one that diffusers would read."""
        late = []
        for part, embedder in self.embedders(model):
            block = re.compile(re.escape(part.ours) + r'(?:.+\.layers|.+\.resblocks)\.(\d+)\.')
            depth = text.hf_depth(embedder)
            late += [n for n in weights if (match := block.match(n)) and int(match[1]) >= depth]
        return weights.without(late)

    def _index(self, model: nn.Module) -> dict[str, Any]:
        """What is in the folder, and which pipeline opens it."""
        return {'_class_name': self.pipelines[0], **index_of([part.folder for part in self.towers]),
                'feature_extractor': [None, None], 'image_encoder': [None, None], 'safety_checker': [None, None],
                'requires_safety_checker': False}

    def modelspec(self, model: nn.Module) -> dict[str, str]:
        size = model.IMAGE_SIZE if isinstance(model.IMAGE_SIZE, list) else [model.IMAGE_SIZE] * 2
        prediction = process.THEIR_PREDICTIONS.get(model.PARAMETERIZATION, model.PARAMETERIZATION)
        return {'architecture': self._architecture(model) if model.cond_stage_model is not None else 'latent-diffusion',
                'implementation': self.implementation, 'resolution': f'{size[1]}x{size[0]}',
                'prediction_type': prediction.removesuffix('_prediction')}

    def _architecture(self, model: nn.Module) -> str:
        return 'stable-diffusion-v1'


@register
class StableDiffusion1(StableDiffusion):
    """CLIP's text tower, a context 768 wide."""

    name = 'Stable Diffusion 1'
    tells = (*SHARED, 'cond_stage_model.transformer.text_model.final_layer_norm.weight')
    single = single_rows('cond_stage_model', 'cond_stage_model')
    parts = (unet.UNET, autoencoder.VAE, text.clip())
    width = ('attn2.to_k.weight', 768)

    def accepts(self, settings: Configs) -> bool:
        return super().accepts(settings) and 'text_encoder_2' not in towers_of(settings) and not is_openclip(settings)


@register
class StableDiffusion2(StableDiffusion):
    """OpenCLIP's text tower, a context 1024 wide."""

    name = 'Stable Diffusion 2'
    tells = (*SHARED, 'cond_stage_model.model.ln_final.weight')
    single = single_rows('cond_stage_model', 'cond_stage_model')
    parts = (unet.UNET, autoencoder.VAE, text.openclip())
    width = ('attn2.to_k.weight', 1024)

    def accepts(self, settings: Configs) -> bool:
        return super().accepts(settings) and 'text_encoder_2' not in towers_of(settings) and is_openclip(settings)

    def _prediction(self, network: Node) -> Said:
        if network['IN_CHANNELS'].value != network['OUT_CHANNELS'].value:
            return super()._prediction(network)
        return Said('v', f'no marker in the file; the convention of {self.name}: published at 768 pixels it predicts v, at 512 eps '
                         '(PARAMETERIZATION: eps and IMAGE_SIZE: 512, if the picture is noise)', True)

    def _pixels(self, prediction: str) -> int:
        return 768 if prediction == 'v' else 512

    def _architecture(self, model: nn.Module) -> str:
        return 'stable-diffusion-v2-768-v' if model.PARAMETERIZATION == 'v' else 'stable-diffusion-v2-512'


# ---------------------------------------------------------------- bricks
def towers_of(settings: Configs) -> list[str]:
    """The folders of text towers that a pipeline uses."""
    index = settings.get('model_index', {})
    return [part for part in ('text_encoder', 'text_encoder_2') if part in settings and index.get(part, part) not in (None, [None, None])]


def is_openclip(settings: Configs) -> bool:
    """Whether the first text tower is OpenCLIP's: names do not tell, both are saved as transformers call them."""
    config = settings.get('text_encoder', {})
    return (config.get('text_config') or config).get('hidden_act') == 'gelu'


def towers_in(words: Node) -> list[Node]:
    """The nodes of the text towers in COND_STAGE_MODEL."""
    return list(words.get('EMBEDDERS', [words]))


def check_whole(model: Node, name: str) -> Node:
    """The node, of parts that belong together. The network reads the latent alone, or beside it a mask and what the mask leaves."""
    latent, network = model['FIRST_STAGE_MODEL']['EMBED_DIM'], model['DIFFUSION_MODEL']
    takes, gives = network['IN_CHANNELS'], network['OUT_CHANNELS']
    if takes.value not in (latent.value, 2 * latent.value + 1):
        kind = f' ({BESIDE_LATENT[takes.value]})' if takes.value in BESIDE_LATENT and latent.value == 4 else ''
        raise CheckpointError(f'{name}: {takes.source} is {takes.value}{kind}, but a latent has {latent.value} channels; networks that '
                              f'open here take these, or {2 * latent.value + 1} for inpainting')
    if gives.value != latent.value:
        raise CheckpointError(f'{name}: {gives.source} is {gives.value}, but a latent has {latent.value} channels')
    return model


def _give_tokenizer(tower: Node, folder: Path, name: str) -> None:
    """Give a tower the tokenizer of its folder where that is not the one we have anyway."""
    if folder.is_dir() and Vocabulary.from_folder(folder) != Vocabulary.shipped(pad=0 if 'ARCH' in tower else None):
        if '://' in name:
            raise CheckpointError(f'{name}: its {folder.name} is not the usual one of CLIP: download the folder and give its path')
        tower['TOKENIZER_PATH'] = Said(str(Path(name) / folder.name), f'{folder.name}: not the usual vocabulary')


def index_of(towers: Iterable[str]) -> dict[str, Any]:
    """The parts of a folder and the classes that open them; of the usual text towers, None where one is not there."""
    found: dict[str, Any] = {'unet': ['diffusers', 'UNet2DConditionModel'], 'vae': ['diffusers', 'AutoencoderKL'],
                             'scheduler': ['diffusers', 'DDIMScheduler']}
    for part in towers:
        found[part] = ['transformers', 'CLIPTextModelWithProjection' if part == 'text_encoder_2' else 'CLIPTextModel']
        found[part.replace('text_encoder', 'tokenizer')] = ['transformers', 'CLIPTokenizer']
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a config of diffusers, and the folder that it stands in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + '\n', 'utf-8')
