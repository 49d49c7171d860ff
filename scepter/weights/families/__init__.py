"""The families that come along: importing them registers them."""
from scepter.weights.families import nova, sd, sdxl

__all__ = ['nova', 'sd', 'sdxl']
