"""Write docs/components.md, and a JSON Schema for editors, from the declarations.

    python tools/make_docs.py                               docs/components.md
    python tools/make_docs.py --schema config.schema.json   and then, at the top of a config, for editors that know YAML's language server:
                                                            # yaml-language-server: $schema=config.schema.json
    python tools/make_docs.py --schema config.schema.json --imports my_backbone.py      with components of yours
"""
from __future__ import annotations

import argparse
import inspect
import json
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
if not __package__:    # run as a file
    sys.path.insert(0, str(ROOT))

import scepter.components  # noqa: E402, F401  fills the registries
from scepter.core.config import plain  # noqa: E402
from scepter.core.env import Env  # noqa: E402
from scepter.core.experiment import Experiment, import_user_code  # noqa: E402
from scepter.core.registry import Registry  # noqa: E402
from scepter.core.schema import REQUIRED, Component, Param, Schema, registries, schema_of  # noqa: E402
from scepter.core.values import NO_BOUNDS, Bounds, is_foreign  # noqa: E402
from scepter.core.yaml import dump  # noqa: E402

PAGE = (ROOT / 'docs' if (ROOT / 'docs').is_dir() else Path()) / 'components.md'    # an installation has no docs: here, then
HEAD = '''# Components

Everything that a `NAME` in a config can mean, and the keys it takes. Written by `make docs` from the declarations in the source; for one
component as commented YAML: `python scepter/run_train.py --template NAME`. Components of your own: [extend.md](extend.md).
'''
SAID = {
    'MODELS': 'Networks that are trained or used whole: `SOLVER.MODEL`, `FIRST_STAGE_MODEL`.',
    'BACKBONES': 'Networks inside a model.',
    'EMBEDDERS': 'Prompts and other conditions into what a network reads: `COND_STAGE_MODEL`.',
    'LOSSES': 'How an output is compared with its target: `LOSS`.',
    'SOLVERS': 'Who runs the training, evaluation and test: `SOLVER`.',
    'HOOKS': 'Side concerns of a run: `TRAIN_HOOKS`, `EVAL_HOOKS`, `TEST_HOOKS`.',
    'DATASETS': 'Where samples come from: `TRAIN_DATA`, `EVAL_DATA`, `TEST_DATA`.',
    'TRANSFORMS': 'What is done to a sample. Also every transform of [torchvision.transforms.v2]'
                  '(https://pytorch.org/vision/stable/transforms.html), by its own name, with its own arguments in capitals.',
    'METRICS': 'What an evaluation measures: `METRICS`.',
    'OPTIMIZERS': 'All of [torch.optim](https://pytorch.org/docs/stable/optim.html) by its own names, with its own arguments in capitals; '
                  '`LEARNING_RATE` says `LR`. Beside these, the keys of the place: see [OPTIMIZER](#optimizer).',
    'LR_SCHEDULERS': 'Functions `(step, max_steps, ...) -> factor` of the learning rate, without state: `LR_SCHEDULER`.',
    'FILE_SYSTEMS': 'Stores that a path may point to.',
    'SCHEDULES': 'Functions `n -> (alphas, sigmas)`, or with the times that the network is told: `SCHEDULE_ARGS`.',
    'LEVELS': 'Functions `(use, n, count, tokens) -> indices`: how often training draws each level, `TIMESTEP_DENSITY`.',
    'SAMPLERS': 'Functions that draw: `SAMPLER`, with their options under `SAMPLER_ARGS` ([diffusion.md](diffusion.md)).',
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: this process's)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--schema', metavar='FILE', help='write a JSON Schema of config files instead')
    parser.add_argument('--imports', metavar='FILE', action='append', default=[], help='a file or module with components of yours')
    args = parser.parse_args(argv)
    for word in args.imports:
        import_user_code(str(Path(word).resolve()) if word.endswith('.py') else word)
    if args.schema:
        Path(args.schema).write_text(json.dumps(json_schema(), indent=1) + '\n', encoding='utf-8')
    else:
        PAGE.write_text(components_page(), encoding='utf-8')
    print(args.schema or PAGE)
    return 0


# ------------------------------------------------------------------------------------------------ docs/components.md
def components_page() -> str:
    lines = [HEAD, '## The file', '', *table(schema_of(Experiment)), '', *section(Env, 'ENV')]
    told: set[str] = set()    # maps of sections, which a class hands down
    for registry in shipped():
        lines += ['', f'## {registry.name}', '', SAID[registry.name], '']
        foreign = [name for name in names(registry) if not is_ours(registry.get(name))]
        if foreign:
            lines += [', '.join(f'`{name}`' for name in foreign), '']
        for name in names(registry):
            component, schema = registry.get(name), registry.schema(name)
            if is_ours(component):
                lines += [f'### {name}', '', *prose(component), '', *table(schema), '']
                for key, p in schema.items():
                    if p.nested is not None and p.owner is component:
                        lines += section(p.type, key)
                    elif p.sections is not None and key not in told:
                        told.add(key)
                        lines += section(get_args(p.type)[1], key)
        for key, place in places_of(registry).items():
            lines += section(place, key)
    return '\n'.join(lines).replace('\n\n\n', '\n\n').rstrip() + '\n'


def places_of(registry: Registry) -> dict[str, type]:
    """key -> the section of further keys that this registry's nodes take where they stand under that key."""
    params = (p for r in shipped() for name in names(r) for p in r.schema(name).values())
    return {p.name: p.place for p in params if p.registry is registry and p.place is not None}


def section(owner: type, key: str) -> list[str]:
    return [f'### {key}', '', *prose(owner), '', *table(schema_of(owner)), '']


def prose(obj: Any) -> list[str]:
    """A docstring; the layout that stands behind a wide gap, or alone, as code."""
    lines = []
    for paragraph in inspect.cleandoc(obj.__doc__).split('\n\n'):
        sentence, _, layout = paragraph.partition('    ') if '\n' not in paragraph else (paragraph, '', '')
        if not layout and '->' in sentence and '\n' not in sentence and not sentence.endswith('.'):
            sentence, layout = '', sentence
        lines += [*([sentence] if sentence else []), *(['', f'    {layout}'] if layout else []), '']
    return lines[:-1]


def table(schema: Schema) -> list[str]:
    if not schema:
        return ['No keys.' if not schema.open else 'Any keys.']
    rows = [f'| `{name}` | {kind_of(p)} | {default_of(p)} | {cell(p.doc)} |' for name, p in schema.items()]
    if any(p.doc for p in schema.values()):
        return ['| key | type | default | |', '|---|---|---|---|', *rows]
    return ['| key | type | default |', '|---|---|---|', *(row.removesuffix('  |') for row in rows)]


def kind_of(p: Param) -> str:
    """The type, with a link to what a component may be."""
    if p.sections is not None:
        return f'map of named [sections](#{p.name.lower()})'
    if p.nested is not None:
        return f'[section](#{p.name.lower()})'
    text = cell(p.spell())
    return text.replace(p.registry.name, f'[{p.registry.name}](#{p.registry.name.lower()})') if p.registry is not None else text


def default_of(p: Param) -> str:
    if p.default is REQUIRED:
        return '**required**'
    text = dump({'V': plain(p.default)}, flow=True).strip()[4:-1].replace('\n', ' ')
    return f'`{cell(text)}`'


def cell(text: str) -> str:
    return ' '.join(text.split()).replace('|', '\\|')


def shipped() -> list[Registry]:
    return [r for r in registries() if r.name in SAID]


def names(registry: Registry) -> list[str]:
    """What the package ships; a process may hold a user's components too."""
    return [name for name in registry if registry.get(name).__module__.split('.')[0] in ('scepter', 'torch')]


def is_ours(obj: Any) -> bool:
    return obj.__module__.startswith('scepter.')


# ------------------------------------------------------------------------------------------------ JSON Schema
def json_schema() -> dict[str, Any]:
    """Draft 2020-12. Nothing is required, for what is missing may stand in a _BASE_; every key and value that is there is checked."""
    definitions: dict[str, Any] = {}
    for registry, place in {(p.registry, p.place) for schema in all_schemas() for p in schema.values() if p.registry is not None}:
        definitions[node_name(registry, place)] = node(registry, place)
    top = section_schema(schema_of(Experiment))
    top['properties']['_BASE_'] = {'anyOf': [{'type': 'string'}, {'type': 'array', 'items': {'type': 'string'}}],
                                   'description': 'File, or files, to lay underneath.'}
    return {'$schema': 'https://json-schema.org/draft/2020-12/schema', 'title': 'scepter config', **top,
            '$defs': dict(sorted(definitions.items()))}


def all_schemas() -> Iterator[Schema]:
    yield schema_of(Experiment)
    for registry in registries():
        for name in registry:
            yield registry.schema(name)
            yield from (below for p in registry.schema(name).values() if (below := p.nested or p.sections) is not None)


def node_name(registry: Registry, place: type | None) -> str:
    return f'{registry.name}.{place.__name__}' if place else registry.name


def node(registry: Registry, place: type | None) -> dict[str, Any]:
    """A component's config: its NAME decides which keys it takes."""
    beside = schema_of(place) if place else Schema()
    name: dict[str, Any] = {'type': 'string', 'description': f'Which of {registry.name} this is.'}
    if not registry.has_libraries:
        name['enum'] = list(registry)
    branches = [{'if': {'properties': {'NAME': {'const': n}}, 'required': ['NAME']},
                 'then': section_schema(registry.schema(n).joined(beside), named=True)} for n in registry]
    return {'type': 'object', 'properties': {'NAME': name}, 'allOf': branches}


def section_schema(schema: Schema, named: bool = False) -> dict[str, Any]:
    properties: dict[str, Any] = {'NAME': True} if named else {}
    for name, p in schema.items():
        properties[name] = {**value(p), **({'description': p.doc} if p.doc else {})}
        if p.default is not REQUIRED and p.default is not None:
            properties[name]['default'] = plain(p.default)
    properties |= {alias: properties[name] for alias, name in schema.spellings.items()}
    return {'type': 'object', 'properties': properties, 'additionalProperties': schema.open}


def value(p: Param) -> dict[str, Any]:
    if p.registry is not None:
        one = {'$ref': f'#/$defs/{node_name(p.registry, p.place)}'}
        several = {'type': 'array', 'items': one} if p.many else one
        return several if p.default is not None else {'anyOf': [several, {'type': 'null'}]}
    if p.sections is not None:
        return {'type': 'object', 'additionalProperties': {'anyOf': [section_schema(p.sections), {'type': 'null'}]}}
    return section_schema(p.nested) if p.nested is not None else or_environment(kind(p.type, p.bounds))


def or_environment(schema: dict[str, Any]) -> dict[str, Any]:
    """A value may also be written as ${NAME}."""
    if not schema or schema.get('type') in ('string', 'object', 'array'):
        return schema
    return {'anyOf': [*schema.get('anyOf', [schema]), {'type': 'string', 'pattern': r'\$\{\w+\}'}]}


def kind(type_: Any, bounds: Bounds = NO_BOUNDS) -> dict[str, Any]:
    """An annotation; the numbers in it within the bounds."""
    origin, args = get_origin(type_), get_args(type_)
    if origin is Literal:
        return {'enum': list(args)}
    if origin in (Union, types.UnionType):
        return {'anyOf': [kind(a, bounds) for a in [a for a in args if not is_foreign(a) or a is types.NoneType] or args]}
    if origin is tuple and Ellipsis not in args:
        return {'type': 'array', 'prefixItems': [kind(a, bounds) for a in args], 'minItems': len(args), 'maxItems': len(args)}
    if origin in (list, tuple):
        return {'type': 'array', 'items': kind(args[0], bounds)}
    if isinstance(type_, type) and issubclass(type_, Component):
        return section_schema(schema_of(type_))
    if type_ in (int, float):
        return {'type': 'integer' if type_ is int else 'number', **limits(bounds)}
    plain_kinds: dict[Any, dict[str, Any]] = {
        bool: {'type': 'boolean'}, str: {'type': 'string'}, list: {'type': 'array'}, tuple: {'type': 'array'}, dict: {'type': 'object'},
        types.NoneType: {'type': 'null'}}
    return plain_kinds.get(origin or type_, {})


def limits(bounds: Bounds) -> dict[str, float]:
    said = {'minimum': bounds.least, 'maximum': bounds.most, 'exclusiveMinimum': bounds.above, 'exclusiveMaximum': bounds.below,
            'multipleOf': bounds.multiple}
    return {word: bound for word, bound in said.items() if bound is not None}


if __name__ == '__main__':
    sys.exit(main())
