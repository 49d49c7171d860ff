"""Foreign files, read and written: CompVis and SGM single files, diffusers folders, Hugging Face text towers, our checkpoints."""
from scepter.weights.compare import refuse_contradictions
from scepter.weights.describe import Description, describe
from scepter.weights.export import export_diffusers, export_single
from scepter.weights.families.text import text_tower_weights
from scepter.weights.family import FAMILIES, Family, Part, family_of, register, weights_for, whole_model
from scepter.weights.files import FILES, Weights, carried_config, local_copy, read_json
from scepter.weights.loading import load_into
from scepter.weights.marks import refuse_unfilled
from scepter.weights.records import read_weights
from scepter.weights.said import Taken
from scepter.weights.sources import load_pretrained
from scepter.weights.tables import Row

__all__ = ['FAMILIES', 'FILES', 'Description', 'Family', 'Part', 'Row', 'Taken', 'Weights', 'carried_config', 'describe',
           'export_diffusers', 'export_single', 'family_of', 'load_into', 'load_pretrained', 'local_copy', 'read_json', 'read_weights',
           'refuse_contradictions', 'refuse_unfilled', 'register', 'text_tower_weights', 'weights_for', 'whole_model']
