"""The families that come along: importing them registers them."""
from scepter.weights.families import sd, sdxl

__all__ = ['sd', 'sdxl']
