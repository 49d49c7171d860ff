"""A parameter is declared once; its YAML key, default, check, documentation and did-you-mean all come from that line.

    class FrozenCLIPEmbedder(BaseEmbedder):
        PRETRAINED_MODEL: str | None = param(None, 'Folder, URL or hf:// address of a Hugging Face CLIP text model.')
        MAX_LENGTH: int = param(77, 'Tokens per prompt; longer ones are cut, shorter ones padded.')

Capitals mean: this comes from the config. A plain function or a foreign class declares by its signature.
"""
from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin, get_type_hints

from scepter.core.config import Config, plain, split_path
from scepter.core.faults import NOWHERE, Fault, Origin, did_you_mean
from scepter.core.values import NO_BOUNDS, Bounds, converted, fits, shown, spell
from scepter.core.yaml import dict_to_yaml

REQUIRED: Any = type('REQUIRED', (), {'__repr__': lambda self: 'required', '__bool__': lambda self: False,
                                      '__copy__': lambda self: self, '__deepcopy__': lambda self, memo: self,
                                      '__reduce__': lambda self: 'REQUIRED'})()


class Parts(Protocol):
    """What a schema asks of the registry (core/registry.py) that a part of a component comes from."""
    name: str

    def __contains__(self, name: object) -> bool:
        """Whether a component of this name is registered."""

    def faults(self, cfg: Any, where: str, origin: Origin = NOWHERE, beside: Schema | None = None) -> Iterator[Fault]:
        """What is wrong with the config of a part."""

    def schema(self, name: str) -> Schema:
        """The parameters of one of its components."""


@dataclass(eq=False)
class Param:
    """One key that a component reads. As a class attribute it hands out the value from self.cfg."""
    default: Any = REQUIRED
    doc: str = ''
    registry: Parts | None = None       # the value is itself a component of this registry
    many: bool = False                  # ... or a list of them
    name: str = ''
    owner: Any = field(default=None, repr=False)
    hint: Any = Any
    argument: str = ''                  # the argument's own name, where a signature declares
    place: Any = None                   # a Component class of further keys that a node takes in this place; such a part may be named
    bounds: Bounds = NO_BOUNDS

    def __set_name__(self, owner: Any, name: str) -> None:
        if self.owner is None:
            self.owner, self.name = owner, name
            self.hint = vars(owner).get('__annotations__', {}).get(name, Any)

    @property
    def type(self) -> Any:
        """The annotation, resolved on first use, when all that it may name has been imported."""
        if isinstance(self.hint, str):
            names = {**vars(types), **vars(sys.modules[self.owner.__module__]), 'Any': Any, 'Literal': Literal}
            self.hint = eval(self.hint, names)  # noqa: S307  an annotation in our or the user's source, as typing.get_type_hints does
        return self.hint

    @property
    def nested(self) -> Schema | None:
        """The schema of a section without a NAME, where the annotation is a component class itself."""
        return schema_of(self.type) if isinstance(self.type, type) and issubclass(self.type, Component) else None

    @property
    def sections(self) -> Schema | None:
        """The schema of each section, where the annotation is a map of them by names of the user's own: dict[str, a component class]."""
        kinds = get_args(self.type) if get_origin(self.type) is dict else ()
        return schema_of(kinds[1]) if kinds and isinstance(kinds[1], type) and issubclass(kinds[1], Component) else None

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        try:
            return instance.__dict__['cfg'][self.name]
        except KeyError:
            raise RuntimeError(f'{type(instance).__name__}.{self.name} is read before super().__init__(cfg, logger=logger)') from None

    def __set__(self, instance: Any, value: Any) -> None:
        raise AttributeError(f'{self.name} is a parameter of {type(instance).__name__}: set it in the config')

    def spell(self) -> str:
        """What the reference says is expected, in words."""
        if self.sections is not None:
            return 'map of named sections'
        if self.registry is None:
            return spell(self.type) + (f', {self.bounds}' if self.bounds != NO_BOUNDS else '')
        kind = f'list of {self.registry.name} components' if self.many else f'{self.registry.name} component'
        return f'{kind}, or a map of named ones' if self.place is not None else kind


def param(default: Any = REQUIRED, doc: str = '', *, least: float | None = None, most: float | None = None,
          above: float | None = None, below: float | None = None, multiple: int | None = None) -> Any:
    """Declare a key with its default and one line of documentation; without a default it is required.

    A number, and each number of a list, is then at least `least` and at most `most`, more than `above` and less than `below`, and a
    multiple of `multiple`.
    """
    return Param(default, doc, bounds=Bounds(least, most, above, below, multiple))


def part(registry: Parts, doc: str = '', default: Any = REQUIRED, place: Any = None) -> Any:
    """Declare a key that holds the config of another component (default=None: it may be left out).

    place: a Component class of further keys that the node may hold; the key then also takes a map of named nodes.
    """
    return Param(default, doc, registry, place=place)


def parts(registry: Parts, doc: str = '', default: Any = ()) -> Any:
    """Declare a key that holds a list of component configs."""
    return Param(default if default is REQUIRED else list(default), doc, registry, many=True)


class Component:
    """Whatever a registry builds from a config node. Its parameters, declared in the class body, are read as self.NAME_OF_KEY.

    `base=True` in the class statement marks a base class of the framework: a subclass that declares nothing of its own is open.
    """
    registry_name = 'COMPONENT'
    is_framework_base = True
    para_dict: dict[str, dict[str, Any]] = {}
    cfg: Config
    logger: Any

    def __init_subclass__(cls, base: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.is_framework_base = base
        for name, entry in vars(cls).get('para_dict', {}).items():    # the documents' older spelling declares too
            if name not in vars(cls) and isinstance(entry, dict) and 'value' in entry:
                declared = Param(entry['value'], entry.get('description', ''))
                setattr(cls, name, declared)
                declared.__set_name__(cls, name)
        cls.para_dict = _ParaDict()

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__()
        # straight into __dict__: nn.Module's own __setattr__ looks through all of its tables first
        self.__dict__['cfg'] = schema_of(type(self)).fill(Config.of(cfg))
        self.__dict__['logger'] = logger

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        """Rules over several keys, found before anything is built: yield Fault(key, what is wrong and what to do) for each broken one.

        cfg holds this component's own keys, all of them, of the declared types and within their bounds; parts stand as written.
        A subclass with rules of its own begins with `yield from super().check(cfg)`.
        """
        yield from ()

    @classmethod
    def get_config_template(cls) -> str:
        """Commented YAML of this component's parameters, ready to paste."""
        return dict_to_yaml(cls.registry_name, cls.__name__, cls.para_dict, set_name=True)


class _ParaDict(dict):
    """para_dict is worked out on first use: annotations may name what is imported later."""

    def __get__(self, instance: Any, owner: type) -> dict[str, dict[str, Any]]:
        return schema_of(owner).para_dict()


_schemas: dict[type[Component], Schema] = {}


def schema_of(owner: type[Component]) -> Schema:
    """The schema of a component class; worked out once."""
    if owner not in _schemas:
        _schemas[owner] = Schema.of_component(owner)
    return _schemas[owner]


_registries: list[Any] = []


def registries() -> list[Any]:
    """All registries, in the order in which they were made: each one enters itself."""
    return _registries


class Schema(dict):
    """name -> Param, as a class or a function declares them.

    open: an unknown key is not a fault. Such a class reads cfg.get itself, in the style of the quick start.
    """

    def __init__(self, params: Iterable[Param] = (), open: bool = False, spellings: dict[str, str] | None = None, any_case: bool = False):
        super().__init__((p.name, p) for p in params)
        self.open = open
        self.spellings = spellings or {}    # how a key may also be spelled: LEARNING_RATE -> LR
        self.any_case = any_case            # a signature declares: betas and BETAS are the same key
        self.checks: list[Callable[[Config], Iterable[Fault]]] = []    # rules over several keys, on a filled config

    # ---------------------------------------------------------------- where a schema comes from
    @classmethod
    def of_component(cls, owner: type[Component]) -> Schema:
        """The parameters of a class and its ancestors. Strict when it, or an ancestor other than the framework's bases, declares."""
        params: dict[str, Param] = {}
        strict = False
        for base in reversed(owner.__mro__):
            declared = {n: v for n, v in vars(base).items() if isinstance(v, Param)}
            params.update(declared)
            strict |= bool(declared) and not vars(base).get('is_framework_base', False)
        schema = cls(params.values(), open=not strict and not vars(owner).get('is_framework_base', False))
        schema.checks.append(owner.check)
        return schema

    @classmethod
    def of_callable(cls, fn: Callable, given: Iterable[str] = (), aliases: dict[str, str] | None = None,
                    bounds: Mapping[str, Bounds] | None = None) -> Schema:
        """The signature of a plain function or a foreign class is its schema; what the program itself passes is left out.

        bounds: for arguments whose annotation has none.
        """
        try:
            target: Any = fn
            hints = get_type_hints(target.__init__ if isinstance(fn, type) else fn, include_extras=True)
        except (NameError, TypeError, AttributeError):    # a third party's annotations may name what is not there
            hints = {}
        schema, given = cls(any_case=True), {g.lower() for g in given}
        for name, p in inspect.signature(fn).parameters.items():
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                schema.open |= p.kind is p.VAR_KEYWORD
            elif name.lower() not in given:
                default = REQUIRED if p.default is p.empty else p.default
                hint, said = _without_bounds(hints.get(name, Any), (bounds or {}).get(name, NO_BOUNDS))
                schema[name.upper()] = Param(default, name=name.upper(), owner=fn, hint=hint, argument=name, bounds=said)
        schema.spellings = {alias: name.upper() for alias, name in (aliases or {}).items() if name.upper() in schema}
        return schema

    # ---------------------------------------------------------------- checking and filling
    def find(self, key: str) -> Param | None:
        """The parameter that a key of a config means."""
        key = key.upper() if self.any_case else key
        return self.get(self.spellings.get(key, key))

    def joined(self, other: Schema) -> Schema:
        """Both schemas' keys as one."""
        both = Schema([*self.values(), *other.values()], self.open, self.spellings, self.any_case)
        both.checks = [*self.checks, *other.checks]
        return both

    def faults(self, cfg: Config, where: str) -> Iterator[Fault]:
        """Every fault in cfg and in the component configs below it, each with its place."""
        have: dict[str, str] = {}
        own: list[Fault] = []
        below: list[Fault] = []
        for key, value in cfg.items():
            if key == 'NAME':
                continue
            p, path, origin = self.find(key), f'{where}.{key}' if where else key, cfg.origin(key)
            if p is not None:
                if have.setdefault(p.name, key) != key:
                    own.append(Fault(path, f'says again what {have[p.name]} says', origin))
                (own if p.registry is None else below).extend(value_faults(value, p, path, origin))
            elif self.open:
                below.extend(loose_faults(value, path))
            else:
                own.append(Fault(path, f'no such parameter{did_you_mean(key, [*self, *self.spellings])}', origin))
        for name, p in self.items():
            if p.default is REQUIRED and name not in have:
                path = f'{where}.{name}' if where else name
                own.append(Fault(path, f'required, but missing{f" ({p.doc})" if p.doc else ""}', cfg.origin('NAME')))
        yield from (*own, *below)
        if not own:
            yield from self._broken_rules(cfg, where, bool(below))

    def _broken_rules(self, cfg: Config, where: str, is_faulty_below: bool) -> Iterator[Fault]:
        """What the component's rules over several keys say."""
        filled = self.fill(cfg)
        for rule in self.checks:
            try:
                for path, message, origin in rule(filled):
                    yield Fault('.'.join(filter(None, (where, path))), message, _origin_of(cfg, path) if origin == NOWHERE else origin)
            except Exception:
                if not is_faulty_below:    # else it has stumbled over what is reported already
                    raise

    def fill(self, cfg: Config) -> Config:
        """A copy of cfg with every default in place and every value of its parameter's own type."""
        filled = cfg.copy() if isinstance(cfg, Config) else Config(cfg)
        for name, p in self.items():
            if name in filled:
                dict.__setitem__(filled, name, convert(filled[name], p))
            elif p.default is not REQUIRED:
                filled[name] = convert(_fresh(p.default), p)
        return filled

    def arguments(self, cfg: Config) -> dict[str, Any]:
        """The keyword arguments that cfg means for a plain function or a foreign class."""
        values: dict[str, Any] = {}
        for key, value in cfg.items():
            if key != 'NAME':
                p = self.find(key)
                values[p.argument if p is not None else key.lower()] = convert(value, p) if p is not None else value
        return values

    def para_dict(self) -> dict[str, dict[str, Any]]:
        """The same declarations in the documents' spelling."""
        return {n: {'value': None if p.default is REQUIRED else plain(p.default), 'description': p.doc,
                    'type': p.spell(), 'required': p.default is REQUIRED} for n, p in self.items()}


def _without_bounds(hint: Any, bounds: Bounds) -> tuple[Any, Bounds]:
    """An argument's plain annotation, and the bounds that it carries (else those given)."""
    if get_origin(hint) is not Annotated:
        return hint, bounds
    return get_args(hint)[0], next((extra for extra in get_args(hint)[1:] if isinstance(extra, Bounds)), bounds)


def _origin_of(cfg: Config, path: str) -> Origin:
    """Where the deepest key of a path that is there came from."""
    origin, node = cfg.origin('NAME'), cfg
    for step in split_path(path):
        if isinstance(node, Config) and step in node:
            origin, node = node.origin(step), node[step]
        elif isinstance(node, list) and step.isdigit() and int(step) < len(node):
            node = node[int(step)]
        else:
            break
    return origin


def value_faults(value: Any, p: Param, path: str, origin: Any) -> Iterator[Fault]:
    """What is wrong with one value, or with the config of a part, at a path."""
    if p.registry is None:
        if p.nested is not None and isinstance(value, dict):
            yield from p.nested.faults(Config.of(value), path)
        elif p.sections is not None and isinstance(value, dict):
            yield from _section_faults(Config.of(value), p.sections, path)
        elif isinstance(value, Config) and 'NAME' in value and p.type in (Any, dict):
            yield from loose_faults(value, path)
        elif value is None and p.default is REQUIRED and not fits(None, p.type):
            yield Fault(path, f'required, but without a value{f" ({p.doc})" if p.doc else ""}', origin)
        elif not fits(value, p.type):
            yield Fault(path, f'expected {p.spell()}, got {shown(value, path)}', origin)
        else:
            yield from p.bounds.faults(value, path, origin)
    elif value is None and p.default is None:
        return
    elif p.place is not None and isinstance(value, Config):
        is_map = 'NAME' not in value and value and all(isinstance(v, Config) for v in value.values())
        named = {f'{path}.{k}': v for k, v in value.items()} if is_map else {path: value}
        for where, node in named.items():
            yield from p.registry.faults(node, where, origin, schema_of(p.place))
    elif p.many:
        if not isinstance(value, list):
            yield Fault(path, f'expected a {p.spell()}, got {shown(value, path)}', origin)
            return
        for i, node in enumerate(value):
            yield from p.registry.faults(node, f'{path}[{i}]', origin)
    else:
        yield from p.registry.faults(value, path, origin)


def _section_faults(named: Config, schema: Schema, path: str) -> Iterator[Fault]:
    """Faults of each section of a map; null takes one away that a base has."""
    for name, section in named.items():
        if isinstance(section, dict):
            for fault in schema.faults(Config.of(section), f'{path}.{name}'):
                yield fault if fault.origin != NOWHERE else fault._replace(origin=named.origin(name))
        elif section is not None:
            yield Fault(f'{path}.{name}', f'expected a section ({", ".join(schema)}), got {shown(section, name)}', named.origin(name))


def split_node(node: Any, place: Any) -> tuple[Any, tuple[Schema, Config]]:
    """A node's own keys, and those that belong to the place where it stands (with their schema)."""
    schema, own, beside = schema_of(place), Config(), Config()
    if not isinstance(node, Config):
        return node, (schema, beside)
    for key, value in node.items():
        (beside if key in schema else own).put(key, value, node.origin(key))
    return own, (schema, beside)


def loose_faults(value: Any, path: str) -> Iterator[Fault]:
    """In an open node, every dict with a NAME that exactly one registry knows is still checked."""
    if isinstance(value, list):
        for i, v in enumerate(value):
            yield from loose_faults(v, f'{path}[{i}]')
    elif isinstance(value, dict):
        owners = [r for r in registries() if isinstance(value.get('NAME'), str) and value['NAME'] in r]
        if len(owners) == 1:
            yield from owners[0].faults(value, path)
        else:
            for k, v in value.items():
                yield from loose_faults(v, f'{path}.{k}')


def convert(value: Any, p: Param) -> Any:
    """A value that fits, in its parameter's own type: 3 -> 3.0 for a float, 'on' -> True for a bool, '${N}' -> a number."""
    if p.registry is not None or value is None:
        return value
    if p.nested is not None:
        return p.nested.fill(value)
    if p.sections is not None:
        return Config({name: p.sections.fill(Config.of(section)) for name, section in value.items() if section is not None})
    return converted(value, p.type)


def _fresh(default: Any) -> Any:
    return Config(default).copy() if isinstance(default, dict) else list(default) if isinstance(default, list) else default


def default(value: Any, fallback: Any) -> Any:
    """The value, or the fallback where it is None."""
    return fallback if value is None else value
