"""What a key of a config means, what it takes, and where its value came from."""
from __future__ import annotations

import difflib
import textwrap
from dataclasses import dataclass, replace
from typing import Any

from scepter.core.config import Config, masked, plain, split_path
from scepter.core.experiment import Experiment
from scepter.core.faults import NOWHERE, ConfigError, Fault, Origin, did_you_mean
from scepter.core.registry import Registry
from scepter.core.schema import REQUIRED, Param, Schema, registries, schema_of
from scepter.core.yaml import dump


def explain(cfg: Config, path: str) -> str:
    """A few lines about the key at this path, as in --explain SOLVER.MAX_STEPS. Raises ConfigError where there is none."""
    place = Place('', cfg, schema=schema_of(Experiment))
    for step in split_path(path):
        place = place.below(step)
    if place.key is None:
        raise ConfigError('--explain takes the path of a key, such as SOLVER.NAME')
    return place.text()


def needs_no_component(path: str) -> bool:
    """Whether a key lies outside of what components declare, so that it can be explained before any is imported: all of ENV, IMPORTS."""
    param = schema_of(Experiment).get(next(iter(split_path(path)), ''))
    return param is not None and param.registry is None


def template(name: str) -> str:
    """Commented YAML of the component of this name, at its place in a config, from each registry that has one.

    It loads; what is required stands without a value and is marked. Raises ConfigError with the nearest name.
    """
    owners = [r for r in registries() if name in r] or [r for r in registries() if r.offers(name)]
    if not owners:
        raise ConfigError(f'no registry has {name}{did_you_mean(name, (n for r in registries() for n in r))}')
    return '\n'.join(_placed(r, name) for r in owners)


def _placed(registry: Registry, name: str) -> str:
    """A component's keys below the key where it stands, so that the whole is a config to lay over another one (_BASE_)."""
    path, p = _place_of(registry, name)
    schema = registry.schema(name)
    lines = [f'NAME: {name}', *_key_lines(schema.joined(schema_of(p.place)) if p is not None and p.place is not None else schema, {})]
    if p is not None and p.many:
        lines = [('- ' if i == 0 else '  ') + line for i, line in enumerate(lines)]
    for key in reversed(path):
        lines = [f'{key}:', *_indented(lines)]
    return '\n'.join(lines) + '\n'


def _key_lines(schema: Schema, values: dict[str, Any]) -> list[str]:
    """Each key with its meaning above it and its default behind it; sections and default parts are written out."""
    lines = []
    for key, p in schema.items():
        value = values.get(key, p.default)
        lines.append(f'# {" ".join(p.doc.split())} ({p.spell()}{", required" if value is REQUIRED else ""})'.replace('#  (', '# ('))
        if p.nested is not None:
            lines += [f'{key}:', *_indented(_key_lines(p.nested, value or {}))]
        elif p.registry is not None and value is REQUIRED:
            choices = ', '.join(p.registry)
            lines += [f'{key}:', f'  {"- " if p.many else ""}NAME:    # required: one of {choices}']
        elif p.registry is not None and isinstance(value, dict) and value.get('NAME') in p.registry:
            lines += [f'{key}:', f'  NAME: {value["NAME"]}', *_indented(_key_lines(p.registry.schema(value['NAME']), value))]
        elif value is REQUIRED:
            lines.append(f'{key}:    # required')
        else:
            lines.append(f'{key}: ' + dump({'V': plain(value)}, flow=True).strip()[4:-1].replace('\n', ' '))
    return lines


def _indented(lines: list[str]) -> list[str]:
    return [f'  {line}' for line in lines]


def _place_of(registry: Registry, name: str) -> tuple[list[str], Param | None]:
    """The path of a key that takes components of this registry, as near to the top as there is one, and what declares it.

    Of several, the key that is called like the component (ENCODER: Encoder), else the first of the last class that has one; the
    registry's own name where no key takes one, as for samplers, which SAMPLER names.
    """
    level: list[tuple[list[str], Schema]] = [([], schema_of(Experiment))]
    seen: set[str] = set()
    while level:
        found = [([*path, p.name], p) for path, schema in level for p in schema.values() if p.registry is registry]
        if found:
            like = difflib.get_close_matches(name.upper(), [path[-1] for path, _ in found], n=1, cutoff=0.6)
            owner = found[-1][1].owner
            return next((path, p) for path, p in found if (path[-1] in like if like else p.owner is owner))
        below: list[tuple[list[str], Schema]] = []
        for path, schema in level:
            for p in schema.values():
                if p.nested is not None:
                    below.append(([*path, p.name], p.nested))
                elif p.registry is not None and not p.many and p.registry.name not in seen:
                    below += [([*path, p.name], p.registry.schema(n)) for n in p.registry]
        seen |= {p.registry.name for _, schema in level for p in schema.values() if p.registry is not None}
        level = below
    return [registry.name], None


@dataclass
class Place:
    """Where a walk down a config stands."""
    path: str
    value: Any
    param: Param | None = None      # what declares it; None where nothing does
    schema: Schema | None = None    # what its own keys mean
    origin: Origin = NOWHERE
    is_set: bool = True
    key: str | None = None

    def below(self, step: str) -> Place:
        """The place of a key, or of an entry of a list, in this one."""
        p, path = self.param, f'{self.path}.{step}' if self.path else step
        if isinstance(self.value, list) and step.isdigit():
            if int(step) >= len(self.value):
                raise ConfigError([Fault(self.path, f'has {len(self.value)} entries', self.origin)])
            return self._of(f'{self.path}[{step}]', step, self.value[int(step)], p)
        if isinstance(self.value, Config) and p is not None and p.place is not None and 'NAME' not in self.value and step in self.value:
            return self._of(path, step, self.value[step], p)    # a map of named parts
        if p is not None and p.sections is not None and self.schema is None:
            if not isinstance(self.value, Config) or step not in self.value:
                raise ConfigError([Fault(path, f'there is no section {step} here', NOWHERE)], '--explain')
            section = self._of(path, step, self.value[step], p)
            return replace(section, schema=p.sections)
        if step == 'NAME' and p is not None and p.registry is not None and isinstance(self.value, Config):
            name = Param(REQUIRED, f'Which of {p.registry.name} this is: {", ".join(p.registry)}.', name='NAME', hint=str)
            return self._of(path, step, self.value.get('NAME'), name)
        known = self.schema.find(step) if self.schema is not None else None
        if known is not None:
            is_set = isinstance(self.value, Config) and step in self.value
            value = self.value[step] if is_set else None if known.default is REQUIRED else known.default
            return self._of(path, step, value, known, is_set)
        if isinstance(self.value, Config) and step in self.value:
            return self._of(path, step, self.value[step], None)
        raise ConfigError([Fault(path, self._unknown(step), NOWHERE)], '--explain')

    def _of(self, path: str, key: str, value: Any, p: Param | None, is_set: bool = True) -> Place:
        value = Config(value) if isinstance(value, dict) and not isinstance(value, Config) else value
        origin = self.value.origin(key) if isinstance(self.value, Config) and is_set else self.origin
        return Place(path, value, p, _schema_below(value, p), origin, is_set, key)

    def _unknown(self, step: str) -> str:
        if self.schema is not None:
            known = ['NAME', *self.schema, *self.schema.spellings] if self.param is not None else list(self.schema)
            return f'no such parameter{did_you_mean(step, known)}'
        return 'nothing is set here' if self.value is None else f'there are no keys below {self.path}'

    def text(self) -> str:
        """What --explain prints of this place."""
        p, rows = self.param, {}
        if p is not None:
            rows['meaning'] = p.doc or (f'an argument of {p.owner.__module__}.{p.owner.__qualname__}' if p.argument else '')
            rows['type'] = p.spell()
            if p.registry is not None:
                rows['choices'] = ', '.join(p.registry)
            rows['default'] = 'none: it is required' if p.default is REQUIRED else _show(p.default, self.key)
        else:
            rows['meaning'] = 'nothing declares this key; its component reads it itself'
        rows['value'] = _show(self.value, self.key) if self.is_set or p is None or p.default is not REQUIRED else 'missing'
        rows['from'] = str(self.origin) if self.is_set else 'the default'
        if self.schema:
            rows['keys'] = ', '.join(self.schema)
        lines = [self.path]
        for name, text in rows.items():
            if text:
                block = '\n'.join(textwrap.fill(line, 110) for line in text.splitlines())
                lines.append(f'  {name:<9}' + block.replace('\n', '\n' + ' ' * 11))
        return '\n'.join(lines)


def _schema_below(value: Any, p: Param | None) -> Schema | None:
    if p is None:
        return None
    if p.registry is None:
        return p.nested
    if not isinstance(value, Config) or not isinstance(value.get('NAME'), str):
        return None
    own = p.registry.schema(value['NAME'])
    return own.joined(schema_of(p.place)) if p.place is not None else own


def _show(value: Any, key: str | None) -> str:
    shown = masked(value, key or '')
    if isinstance(shown, (dict, list, tuple)) and shown:
        return dump(shown).rstrip()
    return dump({'V': shown}, flow=True).strip()[4:-1]
