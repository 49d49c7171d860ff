"""Begin from somebody's weights."""
from __future__ import annotations

from typing import Any

from scepter.core.registry import HOOKS
from scepter.core.schema import param
from scepter.hooks.base import Hook


@HOOKS.register_class()
class PretrainedHook(Hook):
    """Loads weights into the network, or into a part of it, before a fresh run; a resumed run has its own."""

    PRETRAINED_MODEL: str = param(doc='File, folder, URL or hf:// address of the weights.')
    PART: str = param('', "Name of the network's part they belong to, e.g. model; default the whole.")
    IGNORE_KEYS: list[str] = param([], 'Names or globs of keys that may be missing, unexpected or of another shape.')

    def before_solve(self, solver: Any) -> None:
        if not solver.is_resumed:
            solver.model.load_pretrained(self.PRETRAINED_MODEL, self.IGNORE_KEYS, self.PART)
