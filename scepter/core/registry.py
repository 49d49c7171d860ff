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
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from scepter.core.config import Config
from scepter.core.faults import NOWHERE, ConfigError, Fault, Origin, did_you_mean
from scepter.core.schema import Component, Schema, registries, schema_of
from scepter.core.values import NO_BOUNDS, Bounds, shown
from scepter.core.yaml import dict_to_yaml

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
        self._words: dict[str, str] | None = None
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

    def also_called(self, words: dict[str, str]) -> None:
        """What else the entries are called, in the form of `fold`. Names then hold in any case and spacing, and no other is guessed at:
        the nearest word is another entry, and that would do something else."""
        self._words = words

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

    def canonical(self, name: str) -> str:
        """The entry's own name, where `also_called` said what else it is called; any other name as it is."""
        if self._words is None or name in self._entries:
            return name
        wanted = fold(self._words.get(fold(name), name))
        return next((entry for entry in self._entries if fold(entry) == wanted), name)

    def get(self, name: str) -> Any:
        """The class or function of this name. Raises KeyError with the nearest name, or all where none is guessed at."""
        name = self.canonical(name)
        if name in self._entries:
            return self._entries[name]
        if self._words is not None:
            raise KeyError(f'{self.name} has no {shown(name)[1:-1]}; '
                           f'it has {", ".join(self)} (is its file listed under IMPORTS?)')
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
        if all(key == 'NAME' or ((p := self.schema(name).find(key)) is not None and p.bounds != NO_BOUNDS)
               for key in own):
            return      # its ranges say it all; torch's optimizers import a compiler, a second of it, when they are built
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


def fold(name: str) -> str:
    """A name without what people spell differently: case, spaces, hyphens, underscores, and + for p."""
    return re.sub(r'[\s_-]+', '', name).casefold().replace('+', 'p')


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
METRICS = Registry('METRICS', base='Metric')
OPTIMIZERS = Registry('OPTIMIZERS', given=('params',), aliases={'LEARNING_RATE': 'lr'}, bounds={
    'lr': Bounds(least=0), 'eps': Bounds(least=0), 'weight_decay': Bounds(least=0), 'betas': Bounds(least=0, below=1),
    'momentum': Bounds(least=0, below=1), 'rho': Bounds(least=0, most=1), 'lr_decay': Bounds(least=0), 'lambd': Bounds(least=0)})
LR_SCHEDULERS = Registry('LR_SCHEDULERS', given=('step', 'max_steps'))
FILE_SYSTEMS = Registry('FILE_SYSTEMS')
SCHEDULES = Registry('SCHEDULES', given=('n',))
LEVELS = Registry('LEVELS', given=('use', 'n', 'count', 'tokens'))
SAMPLERS = Registry('SAMPLERS', given=('denoise', 'x', 'levels', 'fresh', 'between'))
# what other programs call our samplers, folded: without case, spaces, hyphens and underscores, + as p. An algorithm that we do not have
# stands here under no name of one that we have.
SAMPLERS.also_called({
    'ddimscheduler': 'ddim', 'ddpmscheduler': 'ddpm', 'lcmscheduler': 'lcm', 'keuler': 'euler', 'eulerdiscretescheduler': 'euler',
    'eulera': 'euler_ancestral', 'keulera': 'euler_ancestral', 'keulerancestral': 'euler_ancestral',
    'eulerancestraldiscretescheduler': 'euler_ancestral', 'kheun': 'heun', 'heundiscretescheduler': 'heun', 'klms': 'lms',
    'lmsdiscretescheduler': 'lms', 'kdpm2': 'dpm2', 'kdpm2discretescheduler': 'dpm2', 'dpm2a': 'dpm2_ancestral', 'kdpm2a': 'dpm2_ancestral',
    'kdpm2ancestral': 'dpm2_ancestral', 'kdpm2ancestraldiscretescheduler': 'dpm2_ancestral', 'dpmpp2sa': 'dpmpp_2s_ancestral',
    'kdpmpp2sa': 'dpmpp_2s_ancestral', 'kdpmpp2m': 'dpmpp_2m', 'dpmsolvermultistepscheduler': 'dpmpp_2m', 'kdpmppsde': 'dpmpp_sde',
    'dpmsolversdescheduler': 'dpmpp_sde', 'kdpmpp2msde': 'dpmpp_2m_sde', 'unipcmultistepscheduler': 'unipc'})


def sampler_named(name: str) -> tuple[str, bool]:
    """(the sampler, whether its levels are to be Karras's), by the names that people write: 'DPM++ 2M Karras' -> dpmpp_2m, True.

    A name of no sampler is handed on as it is.
    """
    if SAMPLERS.offers(name):
        return SAMPLERS.canonical(name), False
    bare = re.sub(r'[\s_-]*karras$', '', name, flags=re.IGNORECASE)
    return SAMPLERS.canonical(bare), bare != name
