"""Foreign files, read and written: CompVis and SGM single files, diffusers folders, Hugging Face text towers, our checkpoints."""
from scepter.models.weights.export import export_diffusers, export_single
from scepter.models.weights.files import Weights, local_copy, read_json, read_weights
from scepter.models.weights.loading import (
    describe,
    latent_diffusion_weights,
    load_into,
    load_pretrained,
    text_tower_weights,
    weights_for,
    whole_model,
)

__all__ = ['Weights', 'describe', 'export_diffusers', 'export_single', 'latent_diffusion_weights', 'load_into',
           'load_pretrained', 'local_copy', 'read_json', 'read_weights', 'text_tower_weights', 'weights_for', 'whole_model']
