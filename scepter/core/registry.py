"""Registries: names in YAML, components in Python.

    @BACKBONES.register_class()
    class TinyUNet(BaseModel): ...

    model = BACKBONES.build(cfg.SOLVER.MODEL, logger=logger)

Registration is an import, nothing cleverer. A registry takes classes of ours (`Component`), plain typed functions, and foreign
classes; for the last two the signature is the schema.
"""
from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from scepter.core.config import NOWHERE, Config, ConfigError, Fault, Origin, did_you_mean
from scepter.core.schema import Component, Schema, dict_to_yaml, registries, schema_of
from scepter.core.values import Bounds, shown

LIBRARIES = ('torch', 'torchvision')    # whose classes are offered under their own names


class Registry:
    """Names of components, and the way to build one from its config.

    given: arguments of plain functions and foreign classes that the program passes, so that no config may.
    aliases: the user's words for arguments of foreign classes (LEARNING_RATE -> lr).
    bounds: the numbers that arguments of foreign classes take, by the argument's name.
    trial: makes stand-ins for the given arguments: a check then calls a library's class once with them, and what its constructor
    says against its arguments is a fault of the config.
    base: the public name of the class on which every class here is built.
    """

    def __init__(self, name: str, given: tuple[str, ...] = (), aliases: dict[str, str] | None = None,
                 bounds: dict[str, Bounds] | None = None, trial: Callable[[], dict[str, Any]] | None = None, base: str | None = None):
        self.name, self.given, self.aliases, self.bounds, self.trial, self.base = name, given, aliases or {}, bounds or {}, trial, base
        self._reserved: dict[str, str] = {}
        self._entries: dict[str, Any] = {}
        self._libraries: list[Callable[[], dict[str, Any]]] = []
        self._schemas: dict[str, Schema] = {}
        registries().append(self)

    # ---------------------------------------------------------------- filling
    def register_class(self, name: str | None = None) -> Callable[[Any], Any]:
        """Decorator: enter a class or a plain typed function under its own name, or under `name`.

        A user's class replaces the shipped one of the same name, and one line says so. Two of the package, or two of the user's,
        are a KeyError that names both modules. Raises ConfigError for a class without this registry's base, and for an option whose
        name is reserved.
        """
        def register(obj: Any) -> Any:
            key = name or obj.__name__
            self._refuse_baseless(key, obj)
            self._refuse_reserved(key, obj)
            old = self._entries.get(key)
            if old is not None and (old.__module__, old.__qualname__) != (obj.__module__, obj.__qualname__):
                if _is_shipped(old) == _is_shipped(obj):
                    raise KeyError(f'{self.name} already has a {key}, from {old.__module__}; '
                                   f'the one in {obj.__module__} needs another name')
                if _is_shipped(obj):    # the user's own came first
                    return obj
                from scepter.core.logger import get_logger
                get_logger().info(f'{self.name}: {key} of {obj.__module__} replaces the shipped one')
            self._entries[key] = obj
            self._schemas.pop(key, None)
            if isinstance(obj, type) and issubclass(obj, Component):
                obj.registry_name = self.name
            return obj
        return register

    register_function = register_class

    def reserve(self, function: Callable) -> None:
        """Refuse entries with an option that is called like an argument of this function: both would be meant by one word."""
        for name in inspect.signature(function).parameters:
            if name not in self.given:
                self._reserved.setdefault(name, function.__qualname__)
        for key, obj in self._entries.items():
            self._refuse_reserved(key, obj)

    def _refuse_reserved(self, key: str, obj: Any) -> None:
        taken = [name for name in inspect.signature(obj).parameters if name in self._reserved] if self._reserved else []
        if taken:
            raise ConfigError(f'{self.name}.{key} ({obj.__module__}) has an option {taken[0]}, which is an argument of '
                              f'{self._reserved[taken[0]]}: give it another name, e.g. {key}_{taken[0]}')

    def _refuse_baseless(self, key: str, obj: Any) -> None:
        if self.base is not None and isinstance(obj, type) and not issubclass(obj, Component):
            raise ConfigError(f'{self.name}.{key} ({obj.__module__}) is a class on {obj.__mro__[1].__name__}: derive it from '
                              f'scepter.{self.base}, whose constructor is (cfg, logger=None) and which reads and checks its keys')

    def add_library(self, find: Callable[[], dict[str, Any]]) -> None:
        """Offer the classes of a third party, imported when a name is looked up that the registry itself has not."""
        self._libraries.append(find)

    @property
    def has_libraries(self) -> bool:
        """Whether there are more names than those registered."""
        return bool(self._libraries)

    # ---------------------------------------------------------------- reading
    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def offers(self, name: str) -> bool:
        """Whether `get` finds this name, here or in a third party's library."""
        try:
            self.get(name)
        except (KeyError, ImportError):
            return False
        return True

    def get(self, name: str) -> Any:
        """The class or function of this name. Raises KeyError with the nearest name, and the question of IMPORTS."""
        if name in self._entries:
            return self._entries[name]
        offered: dict[str, Any] = {}
        for find in self._libraries:
            offered |= find()
        if name in offered:
            return offered[name]
        nearest = did_you_mean(name, [*self._entries, *offered])
        raise KeyError(f'{self.name} has no {shown(name)[1:-1]}{nearest} (is its file listed under IMPORTS?)')

    def schema(self, name: str) -> Schema:
        """What the component of this name takes."""
        obj = self.get(name)
        if isinstance(obj, type) and issubclass(obj, Component):
            return schema_of(obj)
        if name not in self._schemas:
            self._schemas[name] = Schema.of_callable(obj, self.given, self.aliases, self.bounds)
        return self._schemas[name]

    def faults(self, cfg: Any, where: str, origin: Origin = NOWHERE, beside: Schema | None = None) -> Iterator[Fault]:
        """Every fault in a component's config, and in those below it. beside: further keys that its place allows."""
        if not isinstance(cfg, dict) or not isinstance(cfg.get('NAME'), str):
            got = shown(cfg, where)
            if isinstance(cfg, dict) and 'NAME' not in cfg:
                typo = next((key for key in cfg if did_you_mean(key, ['NAME'])), None)
                got = f'one without; {typo}: did you mean NAME?' if typo else 'one without'
            yield Fault(where, f'expected a component of {self.name} with a NAME, got {got}', origin)
            return
        try:
            schema = self.schema(cfg['NAME'])
        except (KeyError, ImportError) as error:    # ImportError: the library that may have this name is not installed
            yield Fault(f'{where}.NAME', str(error.args[0]), Config.of(cfg).origin('NAME'))
            return
        node = Config.of(cfg)
        found = list((schema.joined(beside) if beside is not None else schema).faults(node, where))
        yield from found or self._trial_faults(node, where, beside or Schema())

    def _trial_faults(self, node: Config, where: str, beside: Schema) -> Iterator[Fault]:
        """What a library's class says itself against its arguments. A user's own is not built before its time."""
        name, obj = node['NAME'], self.get(node['NAME'])
        if self.trial is None or _home(obj) not in LIBRARIES:
            return
        own = Config({key: value for key, value in node.items() if key not in beside})
        try:
            obj(**self.schema(name).arguments(own), **self.trial())
        except (ValueError, TypeError, RuntimeError) as error:
            yield Fault(where, f'{name}: {error}', node.origin('NAME'))

    def filled(self, cfg: dict) -> Config:
        """A node with its component's defaults in place: for rules about a part. Raises KeyError where no component has its NAME."""
        return self.schema(cfg['NAME']).fill(Config.of(cfg))

    # ---------------------------------------------------------------- building
    def build(self, cfg: dict, logger: Any = None, **given: Any) -> Any:
        """Build the component that cfg.NAME names; `given` are run-time objects that no file can hold.

        Raises ConfigError where the config does not fit. Any other error is the component's own, with a note that names the node.
        """
        node, obj = self._checked(cfg)
        try:
            if isinstance(obj, type) and issubclass(obj, Component):
                return obj(node, logger=logger, **given)
            return obj(**self.schema(node.NAME).arguments(node), **given)
        except Exception as error:
            add_note(error, f'while building {self.name}.{node.NAME}{_place(node)}')
            raise

    def function(self, cfg: dict) -> Callable[..., Any]:
        """A registered function with the config's arguments filled in; the program passes the given ones on each call."""
        node, function = self._checked(cfg)
        return partial(function, **self.schema(node.NAME).arguments(node))

    def _checked(self, cfg: dict) -> tuple[Config, Any]:
        """The node, and what its NAME means. Raises ConfigError with all faults in it."""
        node = Config.of(cfg)
        faults = list(self.faults(node, self.name))
        if faults:
            raise ConfigError(faults)
        return node, self.get(node.NAME)

    def get_config_template(self, name: str) -> str:
        """Commented YAML of a component's parameters."""
        return dict_to_yaml(self.name, name, self.schema(name).para_dict(), set_name=True)


def _is_shipped(obj: Any) -> bool:
    return _home(obj) in ('scepter', *LIBRARIES) and not obj.__module__.startswith('scepter.examples.')


def _home(obj: Any) -> str:
    return obj.__module__.split('.')[0]


def _place(cfg: Config) -> str:
    origin = cfg.origin('NAME')
    return '' if origin == NOWHERE else f' ({origin})'


def add_note(error: BaseException, note: str) -> None:
    """PEP 678's add_note, also where Python is 3.10."""
    vars(error).setdefault('__notes__', []).append(note)


def need(module: str, extra: str) -> Any:
    """Import a heavy third party where it is needed. Raises ImportError that says which extra installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split('.')[0] == module.split('.')[0]:
            raise ImportError(f'{module} is not installed: pip install -e ".[{extra}]" in the checkout', name=error.name) from error
        raise


MODELS = Registry('MODELS', base='TrainModule')
BACKBONES = Registry('BACKBONES', base='BaseModel')
EMBEDDERS = Registry('EMBEDDERS', base='BaseEmbedder')
LOSSES = Registry('LOSSES')
SOLVERS = Registry('SOLVERS', base='BaseSolver')
HOOKS = Registry('HOOKS', base='Hook')
DATASETS = Registry('DATASETS')
TRANSFORMS = Registry('TRANSFORMS', trial=dict)
METRICS = Registry('METRICS')
OPTIMIZERS = Registry('OPTIMIZERS', given=('params',), aliases={'LEARNING_RATE': 'lr'}, bounds={
    'lr': Bounds(least=0), 'eps': Bounds(least=0), 'weight_decay': Bounds(least=0), 'betas': Bounds(least=0, below=1),
    'momentum': Bounds(least=0, below=1), 'rho': Bounds(least=0, most=1), 'lr_decay': Bounds(least=0), 'lambd': Bounds(least=0)})
LR_SCHEDULERS = Registry('LR_SCHEDULERS', given=('step', 'max_steps'))
FILE_SYSTEMS = Registry('FILE_SYSTEMS')
SCHEDULES = Registry('SCHEDULES', given=('n',))
SAMPLERS = Registry('SAMPLERS', given=('denoise', 'x', 'levels', 'fresh', 'between'))
