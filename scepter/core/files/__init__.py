"""Files wherever they are: `FS` is the one front, with one client per store behind it."""

from scepter.core.files import generic, http, hub, local  # noqa: F401  (registers the clients)
from scepter.core.files.front import FS

__all__ = ['FS']
