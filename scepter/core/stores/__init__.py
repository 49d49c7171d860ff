"""Files wherever they are: `FS` is the one front, with one client per store behind it."""

from scepter.core.stores import generic, http, hub, local, modelscope, oss  # noqa: F401  (registers the clients)
from scepter.core.stores.front import FS

__all__ = ['FS']
