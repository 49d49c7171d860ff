"""What a network's forward_test is handed out of all that there is: what its signature names, in the types that it may count on."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function takes by name; all of them where it names none and has **kwargs.

    Its **kwargs catch nothing else: a network may hand them on to where a batch's picture or a setting of another network is an error.
    prompt and n_prompt come as lists, and seed as one number: of several, one for each picture, they are `row_seeds`, for a network
    that names it, and the first of them is the seed of one that does not.
    """
    arguments = dict(arguments)
    if isinstance(arguments.get('prompt'), str):
        arguments['prompt'] = [arguments['prompt']]
    if isinstance(arguments.get('n_prompt'), str) and arguments.get('prompt') is not None:
        arguments['n_prompt'] = [arguments['n_prompt']] * len(arguments['prompt'])
    if isinstance(arguments.get('seed'), (list, tuple)):
        seeds = [int(seed) for seed in arguments['seed']]
        arguments |= {'row_seeds': seeds, 'seed': seeds[0]}
    names = {p.name for p in inspect.signature(function).parameters.values() if p.kind in NAMED}
    return {name: value for name, value in arguments.items() if name in names} if names else arguments
