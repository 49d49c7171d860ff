"""Text embedders. Importing the folder registers them."""
from scepter.models.embedders.base import BaseEmbedder
from scepter.models.embedders.clip import FrozenCLIPEmbedder

__all__ = ['BaseEmbedder', 'FrozenCLIPEmbedder']
