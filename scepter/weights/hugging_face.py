"""The one place that knows the layouts of Hugging Face's CLIPTextModel.

transformers 4 names its weights text_model.embeddings..., transformers 5 embeddings...; published files have the first. The towers of this
package always have the first, so only a text model that somebody else's embedder holds ever needs this.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn

PARTS = ('embeddings.', 'encoder.', 'final_layer_norm.')


def give_both_names(model: Any) -> None:
    """Let `model.text_model` be the text model itself where transformers 5 has no such part, so that code for 4 runs on both."""
    if isinstance(model, nn.Module) and text_models(model)[:1] == [('', False)]:
        model.__dict__['text_model'] = model    # not a submodule: the state dict knows nothing of it


def text_models(module: nn.Module) -> list[tuple[str, bool]]:
    """(name with its dot, whether its weights are named text_model.*) of every CLIP text model of transformers inside."""
    found = []
    for name, child in module.named_modules():
        if type(child).__name__ in ('CLIPTextModel', 'CLIPTextModelWithProjection') and type(child).__module__.startswith('transformers.'):
            found.append((f'{name}.' if name else '', 'text_model' in child._modules))
    return found


def in_layout_of(module: nn.Module, weights: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """The same weights under the names that the text models inside `module` have with the transformers at hand."""
    models = text_models(module)
    return {_rename(name, prefix, models): value for name, value in weights.items()} if models else weights


def accept_both_layouts(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A load_state_dict hook: rename in place what comes in the other layout."""
    renamed = in_layout_of(module, state, prefix)
    if renamed is not state:
        state.clear()
        state.update(renamed)


def _rename(name: str, prefix: str, models: list[tuple[str, bool]]) -> str:
    for path, is_nested in models:
        head = prefix + path
        if not name.startswith(head):
            continue
        rest = name[len(head):]
        if is_nested and rest.startswith(PARTS):
            return f'{head}text_model.{rest}'
        if not is_nested and rest.startswith(tuple(f'text_model.{part}' for part in PARTS)):
            return head + rest[len('text_model.'):]
    return name
