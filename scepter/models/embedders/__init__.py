"""Embedders of prompts and labels. Importing the folder registers them."""
from scepter.models.embedders.base import BaseEmbedder
from scepter.models.embedders.clip import FrozenCLIPEmbedder
from scepter.models.embedders.conditioner import GeneralConditioner
from scepter.models.embedders.labels import LabelEmbedder
from scepter.models.embedders.openclip import FrozenOpenCLIPEmbedder
from scepter.models.embedders.phi import FrozenPhiEmbedder

__all__ = ['BaseEmbedder', 'FrozenCLIPEmbedder', 'FrozenOpenCLIPEmbedder', 'FrozenPhiEmbedder', 'GeneralConditioner',
           'LabelEmbedder']
