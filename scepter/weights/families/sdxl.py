"""Stable Diffusion XL: the base, with two text towers side by side, and the refiner, with the second alone; both are told sizes."""
from __future__ import annotations

from typing import Any

from torch import nn

from scepter.core.errors import CheckpointError
from scepter.weights.families import autoencoder, text, unet
from scepter.weights.families.sd import SHARED, SPARE, TOWER_SPARE, StableDiffusion, index_of, single_rows, towers_of
from scepter.weights.family import register
from scepter.weights.files import Configs
from scepter.weights.said import Node, Said, Shapes

SIZES = {6: ['original_size', 'crop_top_left', 'target_size'], 5: ['original_size', 'crop_top_left', 'aesthetic_score']}
FIRST, SECOND = 'cond_stage_model.embedders.0.', 'cond_stage_model.embedders.1.'


class StableDiffusionXL(StableDiffusion):
    """What base and refiner share."""

    spare = SPARE | {f'conditioner.embedders.{n}.{name}' for n in range(2) for name in TOWER_SPARE}
    single = single_rows('cond_stage_model.embedders.{n}', 'conditioner.embedders.{n}')
    implementation = 'https://github.com/Stability-AI/generative-models'
    pipelines = tuple(f'StableDiffusionXL{kind}Pipeline' for kind in ('', 'Img2Img', 'Inpaint'))
    scale_factor, guide_scale, pixels = 0.13025, 5.0, 1024

    def accepts(self, settings: Configs) -> bool:
        pipeline = settings.get('model_index', {}).get('_class_name')
        is_xl = pipeline in self.pipelines or (pipeline is None and 'text_encoder_2' in towers_of(settings))
        return is_xl and self._has_towers(towers_of(settings))

    def _has_towers(self, towers: list[str]) -> bool:
        return len(towers) == len(self.towers)

    def _text_of_folder(self, settings: Configs, name: str, network: Node | None) -> Node:
        """The towers side by side; the sizes that the network is told follow from the width of its vector."""
        if network is None:
            return {}
        parts = towers_of(settings)
        towers = [text.read_config(settings[part], name, part, 'last' if part == parts[-1] else 'beside') for part in parts]
        kind, size_dim = (settings['unet'].get(key) for key in ('addition_embed_type', 'addition_time_embed_dim'))
        if kind is None or type(size_dim) is not int or size_dim < 1:
            raise CheckpointError(f'{name}: unet/config.json has addition_embed_type {kind!r} and addition_time_embed_dim {size_dim!r}, '
                                  'but the UNet of Stable Diffusion XL is told sizes by text_time')
        zero_empty = bool(settings.get('model_index', {}).get('force_zeros_for_empty_prompt', True))
        return {'COND_STAGE_MODEL': conditioner(
            towers, towers[-1]['WIDTH'].value, network['ADM_IN_CHANNELS'], Said(size_dim, 'unet/config.json: addition_time_embed_dim'),
            Said(zero_empty, 'model_index.json: force_zeros_for_empty_prompt'), name)}

    def _text_of_file(self, shapes: Shapes, network: Node) -> Node:
        count = len(self.towers)
        towers = [text.read_shapes(shapes, f'embedders.{i}.', 'last' if i == count - 1 else 'beside') for i in range(count)]
        if 'ADM_IN_CHANNELS' not in network:
            raise shapes.refusal('embedders', 'give a vector, but the UNet has no label_emb that takes it')
        projection = f'embedders.{count - 1}.model.text_projection'
        pooled = shapes.size(projection, 1).value
        if pooled != shapes.size(projection, 0).value:
            raise shapes.refusal(projection, f'is not square, {shapes.weights.shape(projection)}, as those of the towers here are')
        kind = "Stable Diffusion XL's base" if count > 1 else self.name
        return conditioner(towers, pooled, network['ADM_IN_CHANNELS'], Said(256, 'the convention of Stable Diffusion XL', True),
                           Said(count > 1, f'the convention of {kind}', True), shapes.file)


@register
class Base(StableDiffusionXL):
    """Both text towers, side by side: a context 2048 wide."""

    name = 'Stable Diffusion XL'
    tells = (*SHARED, 'model.label_emb.0.0.weight', f'{FIRST}transformer.text_model.final_layer_norm.weight',
             f'{SECOND}model.ln_final.weight')
    parts = (unet.UNET, autoencoder.VAE, text.clip(FIRST), text.openclip(SECOND, 'text_encoder_2'))
    width = ('attn2.to_k.weight', 2048)

    def _index(self, model: nn.Module) -> dict[str, Any]:
        return {'_class_name': 'StableDiffusionXLPipeline', **index_of(['text_encoder', 'text_encoder_2']),
                'feature_extractor': [None, None], 'image_encoder': [None, None],
                'force_zeros_for_empty_prompt': model.cond_stage_model.ZERO_EMPTY}

    def _architecture(self, model: nn.Module) -> str:
        return 'stable-diffusion-xl-v1-base'


@register
class Refiner(StableDiffusionXL):
    """OpenCLIP's larger text tower alone, a context 1280 wide."""

    name = "Stable Diffusion XL's refiner"
    tells = (*SHARED, 'model.label_emb.0.0.weight', f'{FIRST}model.ln_final.weight')
    parts = (unet.UNET, autoencoder.VAE, text.openclip(FIRST, 'text_encoder_2'))
    width = ('attn2.to_k.weight', 1280)

    def _index(self, model: nn.Module) -> dict[str, Any]:
        return {'_class_name': 'StableDiffusionXLImg2ImgPipeline', **index_of(['text_encoder_2']), 'text_encoder': [None, None],
                'tokenizer': [None, None], 'requires_aesthetics_score': True, 'force_zeros_for_empty_prompt': False}

    def _architecture(self, model: nn.Module) -> str:
        return 'stable-diffusion-xl-v1-refiner'


def conditioner(towers: list[Node], pooled: int, vector: Said, size_dim: Said, zero_empty: Said, name: str) -> Node:
    """A GeneralConditioner whose pooled vector and sizes are as wide together as the network's vector."""
    count, rest = divmod(vector.value - pooled, size_dim.value)
    if rest or count not in SIZES:
        raise CheckpointError(f'{name}: the UNet takes a vector of {vector.value} ({vector.source}); expected the pooled {pooled} and '
                              f'{size_dim.value} for each of 6 numbers (base) or 5 (refiner)')
    return {'NAME': 'GeneralConditioner', 'SIZES': Said(SIZES[count], vector.source), 'SIZE_DIM': size_dim, 'ZERO_EMPTY': zero_empty,
            'EMBEDDERS': towers}
