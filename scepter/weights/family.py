"""A family of published models: its names read both ways, how it is told, and the other library's configs both ways.

A new family is one file: a subclass of Family, decorated by `register` (docs/weights.md, "A family of your own").
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import nn

from scepter.core.errors import CheckpointError
from scepter.weights.files import Configs, Weights
from scepter.weights.said import Node
from scepter.weights.tables import OURS, THEIRS, Row, Table


@dataclass(frozen=True)
class Part:
    """One part of a network: a folder of the other library, and the names under a prefix with us.

    rows: their inner names; a function of the names (in either naming) where they follow from how many blocks there are.
    what, key, pattern: in words, the section of our config, and what only the names of such a part match, in any naming.
    spare: beginnings of names in such a folder that are no weights of the part.  stem: of the file that we write.
    """
    folder: str
    ours: str = ''
    rows: tuple[Row, ...] | Callable[[Collection[str]], Iterable[Row]] = ()
    what: str = ''
    key: str = ''
    pattern: str = '^$'
    spare: tuple[str, ...] = ()
    stem: str = 'diffusion_pytorch_model'

    def table(self, names: Iterable[str]) -> Table:
        """The rows that these names need, since some depend on how many blocks there are."""
        return Table(self.rows(list(names)) if callable(self.rows) else self.rows)

    def to_ours(self, weights: Weights) -> Weights:
        """The weights of such a folder under the names that our part has inside."""
        weights = weights.without([n for n in weights if n.startswith(self.spare)]) if self.spare else weights
        return self.table(weights).to_ours(weights)

    def to_theirs(self, weights: Weights) -> Weights:
        """The weights of our part under the names of such a folder; what it has no place for keeps its name."""
        return self.table(weights).to_theirs(weights)


class Family:
    """Names and configs of one family. Only name, tells and the names, single or parts, must be given.

    tells: weights that every model of the family has and no other, under our names.
    single: ours <-> the names of the published single file.  parts: of the other library's folder.
    spare: what single files hold beside weights: exact names, or beginnings that end in a dot.
    width: where names do not suffice, (end of a weight's name, its last side as it is published).
    solver: that trains it and draws with it.
    pipelines: what the model_index.json of a folder may call itself; the first is what we write.
    """

    name = ''
    tells: tuple[str, ...] = ()
    single: tuple[Row, ...] = ()
    parts: tuple[Part, ...] = ()
    spare: frozenset[str] = frozenset()
    width: tuple[str, int] | None = None
    solver = 'LatentDiffusionSolver'
    pipelines: tuple[str, ...] = ()

    # ---------------------------------------------------------------- configs, both ways
    def accepts(self, settings: Configs) -> bool:
        """Whether the configs of a folder are of this family."""
        pipeline = settings.get('model_index', {}).get('_class_name')
        return pipeline in self.pipelines if pipeline is not None else all(part.folder in settings for part in self.parts)

    def read_folder(self, settings: Configs, folder: Path, name: str) -> Node:
        """Their configs as {'SOLVER': {..}} of ours, each leaf `Said` or plain. Raises CheckpointError."""
        raise CheckpointError(f'{name} is of {self.name}, which does not open without a config of ours: give one by --cfg')

    def read_single(self, weights: Weights, whole: Weights, name: str) -> Node:
        """The same of a single file. weights: as they were read; whole: under our names. Raises CheckpointError."""
        raise CheckpointError(f'{name} is of {self.name}, which does not open without a config of ours: give one by --cfg')

    def said(self, settings: Configs, name: str, left_out: Collection[str] = ()) -> Node:
        """What the configs of a folder say of MODEL, without these sections: held against a config (compare.py)."""
        return {}

    def write_configs(self, model: nn.Module, folder: Path) -> None:
        """Write all of a folder but the weights. Raises ValueError where the other library has no such network."""
        raise ValueError(f'{self.name} has no folder here; export to one file instead')

    def modelspec(self, model: nn.Module) -> dict[str, str]:
        """What github.com/Stability-AI/ModelSpec says of such a model beside its title and date."""
        return {'architecture': self.name}

    # ---------------------------------------------------------------- names, both ways
    def average_of(self, name: str) -> str | None:
        """What the average of a weight is called in a single file."""
        return None

    def read_there(self, model: nn.Module, weights: Weights) -> Weights:
        """Of ours, what the other library's folder has a use for."""
        return weights

    @cached_property
    def table(self) -> Table:
        """The rows of its single files."""
        return Table(self.single)

    def kept(self, weights: Weights) -> Weights:
        """A single file without what is known to be no weight."""
        gone = {self.average_of(name) for name in weights} | self.spare
        spare = tuple(name for name in self.spare if name.endswith('.'))
        return weights.without([n for n in weights if n in gone or n.startswith(spare)])

    def from_folder(self, weights: Weights) -> Weights:
        """The parts of a folder, each under the folder's name, under our names."""
        found = {n: e for n, e in weights.entries.items() if not n.startswith(tuple(f'{part.folder}.' for part in self.parts))}
        for part in self.parts:
            found |= part.to_ours(weights.section(f'{part.folder}.')).under(part.ours).entries
        return weights.with_entries(found)

    def to_folder(self, weights: Weights) -> dict[str, Weights]:
        """Ours as the parts of a folder. Raises ValueError that names what the other library has no place for."""
        found, lost = {}, [n for n in weights if not n.startswith(tuple(part.ours for part in self.parts))]
        for part in self.parts:
            inner = weights.section(part.ours)
            table = part.table(inner)
            lost += [part.ours + n for n in table.unknown(inner, OURS)]
            found[part.folder] = table.to_theirs(inner)
        if lost:
            raise ValueError(f'diffusers has no place for {lost[0]} and {len(lost) - 1} more; export to one file instead')
        return {folder: inner for folder, inner in found.items() if inner}

    def called(self, name: str, form: str) -> str:
        """One of our names as it is in a form (ours, single or folder)."""
        part = next((p for p in self.parts if name.startswith(p.ours)), None)
        if form == 'single':
            found = self.table.find(name, OURS)
            return found.on(THEIRS)[0] if found else name
        if form == 'folder' and part is not None:
            found = part.table([name.removeprefix(part.ours)]).find(name.removeprefix(part.ours), OURS)
            return f'{part.folder}.{found.on(THEIRS)[0] if found else name.removeprefix(part.ours)}'
        return name


FAMILIES: list[Family] = []
F = TypeVar('F', bound=type[Family])


def register(kind: F) -> F:
    """Let a family be known to all that reads and writes; it takes the place of one of the same name."""
    FAMILIES[:] = [*(family for family in FAMILIES if family.name != kind.name), kind()]
    return kind


def parts() -> list[Part]:
    """The parts of all families, each once."""
    return list(dict.fromkeys(part for family in FAMILIES for part in family.parts))


# ---------------------------------------------------------------- telling them
class Match(NamedTuple):
    """How far weights are of a family in one of its forms: ours, single or folder."""
    family: Family
    form: str
    whole: Weights           # under our names
    missing: list[str]       # tells that it lacks, as they are called in the form
    left_over: list[str]     # names that the form does not know

    @property
    def distance(self) -> tuple[float, int]:
        """How far the weights are from the family: the share of its tells that they lack, then the names that it does not know."""
        return len(self.missing) / len(self.family.tells), len(self.left_over)

    def __str__(self) -> str:
        form = {'single': 'as a single file', 'folder': 'as a folder', 'ours': 'under our names'}[self.form]
        lacks = f'lacks {", ".join(self.missing)}' if self.missing else 'all that tells it is there'
        more = f'; does not know {len(self.left_over)} names, e.g. {self.left_over[0]}' if self.left_over else ''
        return f'{self.family.name} {form}: {lacks}{more}'


def matches(weights: Weights) -> list[Match]:
    """Every family in every form of which weights have at least one tell, the nearest first."""
    found = []
    for family in FAMILIES:
        for form, whole, left_over in _forms(family, weights):
            missing = [family.called(tell, form) for tell in family.tells if tell not in whole]
            if len(missing) < len(family.tells):
                found.append(Match(family, form, whole, missing, left_over))
    return sorted(found, key=lambda match: match.distance)


def _forms(family: Family, weights: Weights) -> Iterator[tuple[str, Weights, list[str]]]:
    """(form, the weights under our names if they are in it, names that it does not know)"""
    folders, ours = tuple(f'{part.folder}.' for part in family.parts), tuple(part.ours for part in family.parts)
    if family.single:
        kept = family.kept(weights)
        yield 'single', family.table.to_ours(kept), family.table.unknown(kept, THEIRS)
    if folders and any(n.startswith(folders) for n in weights) and may_be(family, weights.settings):
        yield 'folder', family.from_folder(weights), [n for n in weights if not n.startswith(folders)]
    yield 'ours', weights, [n for n in weights if not n.startswith(ours)]


def may_be(family: Family, configs: Configs) -> bool:
    """Whether the configs of a folder speak against a family, whatever pipeline it is for."""
    index = {key: value for key, value in configs.get('model_index', {}).items() if key != '_class_name'}
    return configs.keys().isdisjoint(part.folder for part in parts()) or family.accepts({**configs, 'model_index': index})


def nearest(found: list[Match]) -> str:
    """A line for each of the two nearest families: what they are told by that is not there, and what is there beside."""
    by_name: dict[str, Match] = {}
    for match in found:
        by_name.setdefault(match.family.name, match)
    return ''.join(f'\n  {match}' for match in list(by_name.values())[:2])


def told(weights: Weights, name: str) -> Match:
    """The family and form of a whole model. Raises CheckpointError that names the two nearest families, and why it is neither."""
    found = matches(weights)
    complete = [match for match in found if not match.missing]
    complete = [match for match in complete if not match.left_over] or complete
    several = sorted({match.family.name for match in complete})
    if len(several) == 1:
        return complete[0]
    problem = f'it holds the weights of several models, {" and ".join(several)}' if several else \
        f'its names, e.g. {next(iter(weights), "none")}, are of no model that opens here'
    known = ', '.join(family.name for family in FAMILIES)
    near = f'\nThe nearest:{nearest(found)}' if found else ''
    raise CheckpointError(f'{name}: {problem} (known: {known}).{near}\n'
                          'Give one whole model as it was published, or describe its family (docs/weights.md, "A family of your own")')


def whole_model(weights: Weights) -> Weights:
    """Weights of a whole model in any form of any family, or of parts of one, under our names; a stranger's stay as they are."""
    return next((match.whole for match in matches(weights)), weights)


def weights_for(model: nn.Module | Iterable[str], weights: Weights) -> Weights:
    """The weights under the names of this network (or these names), which may be a whole model or any one part of it."""
    wanted = set(model.state_dict() if isinstance(model, nn.Module) else model)
    if wanted <= weights.entries.keys():
        return weights
    whole = whole_model(weights)
    candidates = [weights, whole]
    for part in parts():
        candidates += [part.to_ours(weights), whole.section(part.ours)]
    for family in FAMILIES:
        if len(family.parts) == 1:    # its folder alone is the whole model
            candidates.append(family.parts[0].to_ours(weights).under(family.parts[0].ours))
    return max(candidates, key=lambda c: len(wanted & c.entries.keys()))    # the first of equals: the names as they are


def family_of(weights: Weights) -> str | None:
    """What published model weights are of, by the sides that tell them; None where that is unknown."""
    for name in weights:
        for family in FAMILIES:
            if family.width is not None and name.endswith(family.width[0]) and weights.shape(name)[-1:] == (family.width[1],):
                return family.name
    return None


def family_of_network(names: Iterable[str]) -> Family | None:
    """The family of which a network with these names has most tells: its text tower may be another. None for one of an own kind."""
    wanted = set(names)
    shares = {family: len(wanted.intersection(family.tells)) / len(family.tells) for family in FAMILIES}
    best = max(FAMILIES, key=lambda family: shares[family])
    return best if shares[best] > 0.5 else None


def family_of_folder(configs: Configs) -> Family | None:
    """The family whose folder has these configs; None where there is none."""
    return next((family for family in FAMILIES if family.accepts(configs)), None)
