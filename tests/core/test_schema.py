"""A parameter is declared once: its key, default, type, check, documentation and suggestion come from one line."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest

from scepter.core.config import Config
from scepter.core.faults import ConfigError, Fault
from scepter.core.registry import Registry
from scepter.core.schema import Component, default, param, part, parts, schema_of
from scepter.core.values import Bounds
from scepter.core.yaml import dict_to_yaml

PARTS = Registry('TEST_PARTS')
OPTIONS = Registry('TEST_OPTIONS', given=('x',), aliases={'LEARNING_RATE': 'lr'})


class Section(Component):
    SEED: int = param(1, 'A number.')


class Place(Component):
    EVERY: int = param(1, 'How often.')


@OPTIONS.register_function()
def curve(x: float, lr: float = 1e-3, kind: Literal['a', 'b'] = 'a', betas: tuple[float, float] = (0.9, 0.99)) -> float:
    return x * lr


@PARTS.register_class()
class Leaf(Component):
    """Declares one of each type."""
    WIDTH: int = param(doc='Channels.')
    SCALE: float = param(1.0, 'Multiplies.')
    MAYBE: str | None = param(None, 'A word.')
    FLAG: bool = param(False, 'On or off.')
    ACT: Literal['silu', 'gelu'] = param('silu', 'The activation.')
    SIZES: list[int] = param([1, 2], 'Sizes.')
    PAIR: tuple[float, float] = param((0.0, 1.0), 'Two.')
    SIZE: int | tuple[int, int] = param(8, 'One or two.')
    FREE: Any = param(None, 'Anything.')
    MAP: dict = param({}, 'Free keys.')
    PART: Section = param({}, 'A section.')


@PARTS.register_class()
class Branch(Component):
    FIRST: dict = part(PARTS, 'One below.')
    SECOND: dict | None = part(PARTS, 'Another, or none.', default=None)
    REST: list = parts(PARTS, 'Many below.')
    CURVE: dict | None = part(OPTIONS, 'A function.', default=None, place=Place)


@PARTS.register_class()
class Open(Component):
    """Declares nothing, and reads cfg.get itself."""


LEAF = {'NAME': 'Leaf', 'WIDTH': 4}


def faults(**keys: object) -> list[tuple[str, str]]:
    return [(f.path, f.message) for f in PARTS.faults(Config({**LEAF, **keys}), 'AT')]


@pytest.mark.parametrize(('key', 'value', 'read'), [
    ('SCALE', 3, 3.0), ('MAYBE', None, None), ('FLAG', 'on', True), ('FLAG', 'No', False), ('FLAG', True, True), ('ACT', 'gelu', 'gelu'),
    ('SIZES', [], []), ('PAIR', [1, 2], [1.0, 2.0]), ('SIZE', 3, 3), ('SIZE', [3, 4], [3, 4]), ('FREE', {'A': [1]}, {'A': [1]}),
    ('MAP', {'A': 'b'}, {'A': 'b'}), ('PART', {'SEED': 5}, {'SEED': 5}), ('PART', {}, {'SEED': 1}), ('SCALE', float('inf'), float('inf')),
])
def test_a_value_that_fits_is_read_in_its_parameters_own_type(key: str, value: object, read: object):
    leaf = PARTS.build({**LEAF, key: value})

    assert faults(**{key: value}) == []
    assert getattr(leaf, key) == read and type(getattr(leaf, key)) is type(Config({'V': read}).V)


@pytest.mark.parametrize(('key', 'value', 'expected'), [
    ('WIDTH', 'four', 'int'), ('WIDTH', 1.0, 'int'), ('WIDTH', True, 'int'), ('SCALE', '1', 'float'),
    ('SCALE', True, 'float'), ('SCALE', float('nan'), 'float'), ('MAYBE', 3, 'str or null'), ('FLAG', 'maybe', 'bool'), ('FLAG', 1, 'bool'),
    ('ACT', 'relu', 'one of silu, gelu'), ('SIZES', 3, 'list of int'), ('SIZES', [1, 'x'], 'list of int'),
    ('PAIR', [1.0], '[float, float]'),
    ('SIZE', [1], 'int or [int, int]'), ('MAP', [1], 'dict'), ('PART', 3, 'Section'),
])
def test_a_value_that_does_not_fit_is_told_what_is_expected(key: str, value: object, expected: str):
    (path, message), = faults(**{key: value})

    assert path == f'AT.{key}' and message.startswith(f'expected {expected}, got ')


def test_an_unknown_key_is_told_the_nearest_one():
    assert faults(SCALA=1) == [('AT.SCALA', 'no such parameter; did you mean SCALE?')]
    assert faults(scale=1) == [('AT.scale', 'no such parameter; did you mean SCALE?')]
    assert faults(PART={'SEDE': 1}) == [('AT.PART.SEDE', 'no such parameter; did you mean SEED?')]
    assert faults(XYZZY=1) == [('AT.XYZZY', 'no such parameter')]


def test_a_typo_five_levels_down_is_reported_before_anything_is_built():
    cfg = Config({**LEAF, 'SCAL': 1})
    for _ in range(5):
        cfg = Config({'NAME': 'Branch', 'FIRST': cfg})

    with pytest.raises(ConfigError, match=r'FIRST\.FIRST\.FIRST\.FIRST\.FIRST\.SCAL: no such parameter; did you mean SCALE'):
        PARTS.build(cfg)


def test_all_faults_of_a_tree_come_at_once_each_with_its_line():
    cfg = Config.parse('NAME: Branch\nFIRST: {NAME: Leaff, WIDTH: 3}\nREST:\n  - NAME: Leaf\n    WIDTH: x\n  - {WIDTH: 1}\n'
                       '  - 3\nSECOND: [1]\nCURVE: {NAME: curve, LR: hi, EVERI: 2}\n')

    found = {f.path: (f.message, f.origin.line) for f in PARTS.faults(cfg, 'S')}

    assert {path: line for path, (_, line) in found.items()} == {
        'S.FIRST.NAME': 2, 'S.REST[0].WIDTH': 5, 'S.REST[1]': 3, 'S.REST[2]': 3, 'S.SECOND': 8, 'S.CURVE.LR': 9, 'S.CURVE.EVERI': 9}
    assert 'did you mean Leaf?' in found['S.FIRST.NAME'][0] and 'did you mean EVERY?' in found['S.CURVE.EVERI'][0]


def test_a_required_key_that_is_missing_is_named_with_its_meaning():
    assert [(f.path, f.message) for f in PARTS.faults(Config({'NAME': 'Leaf'}), '')] == [('WIDTH', 'required, but missing (Channels.)')]
    assert faults(WIDTH=None) == [('AT.WIDTH', 'required, but without a value (Channels.)')]


@pytest.mark.parametrize('node', [3, 'Leaf', None, [], {}, {'NAME': 3}, {'WIDTH': 1}])
def test_what_is_no_component_is_refused(node: object):
    with pytest.raises(ConfigError, match='expected a component of TEST_PARTS with a NAME'):
        PARTS.build(node)


def test_a_parameter_is_read_only_and_needs_the_constructor():
    class Late(Leaf):
        def __init__(self, cfg: dict, logger: object = None):
            self.width = self.WIDTH

    with pytest.raises(AttributeError, match='set it in the config'):
        PARTS.build(LEAF).WIDTH = 3
    with pytest.raises(RuntimeError, match=r'Late.WIDTH is read before super'):
        Late(LEAF)


def test_a_default_is_never_shared():
    PARTS.build(LEAF).SIZES.append(99)

    assert PARTS.build(LEAF).SIZES == [1, 2]


def test_a_class_that_declares_nothing_is_open_but_its_parts_are_checked():
    assert not list(PARTS.faults(Config({'NAME': 'Open', 'ANY': 1}), ''))
    assert [f.path for f in PARTS.faults(Config({'NAME': 'Open', 'ANY': [{'DEEP': {**LEAF, 'SCALA': 1}}]}), '')] == ['ANY[0].DEEP.SCALA']


def test_a_subclass_inherits_and_overrides_declarations():
    class Twig(Leaf):
        WIDTH: int = param(7, 'Channels of a twig.')

    assert Twig({'NAME': 'Twig'}).WIDTH == 7 and Twig.para_dict['SCALE']['value'] == 1.0
    with pytest.raises(AttributeError):
        Twig({}).MAYBE = 'x'


def test_an_own_para_dict_declares_too():
    class Old(Component):
        para_dict = {'DIM': {'value': 3, 'description': 'Channels.'}}

    assert Old({}).DIM == 3 and Old.para_dict['DIM']['description'] == 'Channels.'


def test_an_environment_variable_is_read_in_the_type_of_its_parameter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('SCEPTER_WIDTH', '12')
    cfg = Config.parse('{NAME: Leaf, WIDTH: "${SCEPTER_WIDTH}", MAYBE: "${SCEPTER_WIDTH}", SIZE: "${SCEPTER_WIDTH}"}')
    leaf = PARTS.build(cfg)

    assert leaf.WIDTH == 12 and leaf.MAYBE == '12' and leaf.SIZE == 12
    with pytest.raises(ConfigError, match='expected bool'):
        PARTS.build({**cfg, 'FLAG': cfg['WIDTH']})


# ------------------------------------------------------------------------------------------------ signatures
def test_a_signature_is_a_schema_in_any_case_and_by_the_users_words():
    for word in ('LR', 'lr', 'LEARNING_RATE'):
        assert OPTIONS.function(Config({'NAME': 'curve', word: 0.5}))(x=2.0) == 1.0

    cfg = Config({'NAME': 'curve', 'LR': 1, 'LEARNING_RATE': 2, 'x': 3, 'KIND': 'c', 'BETAS': [1]})
    found = [f.message for f in OPTIONS.faults(cfg, '')]
    assert found == ['says again what LR says', 'no such parameter', "expected one of a, b, got 'c'", 'expected [float, float], got [1]']


def test_a_foreign_type_beside_a_plain_one_takes_no_word():
    import torch
    library = Registry('TEST_OPTIMIZERS', given=('params',))
    library.register_class('Foreign')(torch.optim.AdamW)

    assert [f.path for f in library.faults(Config({'NAME': 'Foreign', 'LR': 'hi'}), '')] == ['LR']
    assert not list(library.faults(Config({'NAME': 'Foreign', 'LR': 1e-3, 'FUSED': None, 'BETAS': [0.9, 0.95]}), ''))


def test_a_place_may_hold_one_part_or_a_map_of_named_ones_each_with_the_places_keys():
    one = Config({'NAME': 'Branch', 'FIRST': LEAF, 'CURVE': {'NAME': 'curve', 'EVERY': 2}})
    two = Config({**one, 'CURVE': {'a': {'NAME': 'curve', 'EVERY': 'x'}, 'b': {'NAME': 'curv'}}})
    typo = Config({**one, 'CURVE': {'NAMEE': 'curve', 'EVERY': 2}})

    assert not list(PARTS.faults(one, ''))
    assert [f.path for f in PARTS.faults(two, '')] == ['CURVE.a.EVERY', 'CURVE.b.NAME']
    assert [f.message for f in PARTS.faults(typo, '')] == [
        'expected a component of TEST_OPTIONS with a NAME, got one without; NAMEE: did you mean NAME?']


# ------------------------------------------------------------------------------------------------ templates
def test_a_template_is_yaml_that_loads_to_the_defaults_with_a_comment_for_each_key():
    text = Leaf.get_config_template()
    node = Config.parse(text).TEST_PARTS

    assert node.pop('NAME') == 'Leaf' and node.pop('WIDTH') is None
    assert node == {k: v['value'] for k, v in Leaf.para_dict.items() if k != 'WIDTH'}
    assert '# Channels. (int, required)\n  WIDTH:\n' in text and '# The activation. (one of silu, gelu)' in text


def test_dict_to_yaml_takes_the_documents_own_call():
    text = dict_to_yaml('MODELS', 'Mine', {'EPS': {'value': 1e-8, 'description': 'Small.\nVery.'}}, set_name=True)

    assert text == 'MODELS:\n  NAME: Mine\n  # Small. Very. (float)\n  EPS: 1e-08\n'
    assert Config.parse(text).MODELS.EPS == 1e-8


def test_default_is_the_fallback_only_for_none():
    assert default(None, 3) == 3 and default(0, 3) == 0 and default('', 'x') == ''


# ------------------------------------------------------------------------------------------------ ranges, and rules over several keys
@PARTS.register_class()
class Ranged(Component):
    """Takes some numbers and not others, and has a rule over two keys."""
    COUNT: int | None = param(None, 'How many.', least=1)
    SHARE: float = param(0.5, 'A share.', least=0, most=1)
    RATE: float = param(0.1, 'A rate.', above=0)
    BETAS: list[float] = param([0.9], 'Some.', least=0, below=1)
    SCALES: float | dict = param(1.0, 'One, or one per part.', least=0)
    LOW: int = param(1, 'The lower end.')
    HIGH: int = param(2, 'The upper end.')
    BELOW: dict | None = part(PARTS, 'One below.', default=None)

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if cfg.LOW >= cfg.HIGH:
            yield Fault('LOW', f'is {cfg.LOW}, but HIGH is {cfg.HIGH}')
        if cfg.BELOW is not None and cfg.BELOW.WIDTH == 13:
            yield Fault('BELOW.WIDTH', 'brings bad luck')


@OPTIONS.register_function()
def bounded(x: float, power: Annotated[float, Bounds(above=0)] = 1.0) -> float:
    return x ** power


@pytest.mark.parametrize(('key', 'value', 'message'), [
    ('COUNT', 0, 'expected at least 1, got 0'), ('SHARE', 1.5, 'expected at least 0, at most 1, got 1.5'), ('SHARE', -1, None),
    ('RATE', 0, 'expected above 0, got 0'), ('RATE', float('inf'), 'expected a finite number, above 0, got inf'), ('RATE', 1e-9, ''),
    ('COUNT', None, ''), ('COUNT', 1, ''), ('SHARE', 0, ''), ('SHARE', 1, ''), ('BETAS', [0, 0.999], ''), ('SCALES', {'A': 2}, ''),
])
def test_a_number_out_of_its_range_is_a_fault(key: str, value: object, message: str | None):
    found = [(f.path, f.message) for f in PARTS.faults(Config({'NAME': 'Ranged', key: value}), 'AT')]

    assert [path for path, _ in found] == ([] if message == '' else [f'AT.{key}'])
    assert not message or found[0][1] == message


def test_each_number_of_a_list_or_map_is_in_the_range():
    cfg = Config({'NAME': 'Ranged', 'BETAS': [0.9, 1.0, -1], 'SCALES': {'A': 1, 'B': -2, 'C': float('nan')}})

    assert [f.path for f in PARTS.faults(cfg, '')] == ['BETAS[1]', 'BETAS[2]', 'SCALES.B', 'SCALES.C']


def test_a_range_holds_for_what_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('SCEPTER_COUNT', '0')

    assert [f.path for f in PARTS.faults(Config.parse('{NAME: Ranged, COUNT: "${SCEPTER_COUNT}"}'), '')] == ['COUNT']


def test_a_range_stands_in_a_signature_and_in_the_reference():
    assert [f.path for f in OPTIONS.faults(Config({'NAME': 'bounded', 'POWER': 0}), '')] == ['POWER']
    assert OPTIONS.schema('bounded')['POWER'].spell() == 'float, above 0'
    assert Ranged.para_dict['SHARE']['type'] == 'float, at least 0, at most 1'
    assert OPTIONS.function(Config({'NAME': 'bounded', 'POWER': 2}))(x=3.0) == 9.0


def test_a_rule_over_several_keys_is_found_with_its_line_and_the_other_keys_defaults():
    cfg = Config.parse('NAME: Ranged\nHIGH: 0\nBELOW:\n  NAME: Leaf\n  WIDTH: 13\n')

    assert [(f.path, f.message, f.origin.line) for f in PARTS.faults(cfg, 'AT')] == [
        ('AT.LOW', 'is 1, but HIGH is 0', 1), ('AT.BELOW.WIDTH', 'brings bad luck', 5)]
    with pytest.raises(ConfigError, match='LOW: is 1, but HIGH is 0'):
        PARTS.build(cfg)


def test_a_rule_is_not_asked_about_keys_of_its_own_that_are_wrong_nor_fails_over_faults_below():
    assert [f.path for f in PARTS.faults(Config({'NAME': 'Ranged', 'LOW': 'x'}), '')] == ['LOW']
    assert [f.path for f in PARTS.faults(Config({'NAME': 'Ranged', 'HIGH': 0, 'BELOW': {'NAME': 'Leaf'}}), '')] == ['BELOW.WIDTH', 'LOW']
    with pytest.raises(AttributeError):    # its own mistake is not hidden
        list(PARTS.faults(Config({'NAME': 'Ranged', 'BELOW': {'NAME': 'Open'}}), ''))


def test_a_foreign_class_says_itself_what_it_refuses():
    import torch
    library = Registry('TEST_TRIED', given=('params',), trial=lambda: {'params': [torch.zeros(2, 2, requires_grad=True)]})
    library.register_class('SGD')(torch.optim.SGD)
    node = Config.parse('NAME: SGD\nNESTEROV: true\nEVERY: 2\n')

    assert [(f.path, f.origin.line) for f in library.faults(node, 'AT', beside=schema_of(Place))] == [('AT', 1)]
    assert not list(library.faults(Config({**node, 'MOMENTUM': 0.9}), 'AT', beside=schema_of(Place)))


def test_a_whole_number_beyond_all_floats_is_a_fault_and_no_overflow():
    assert [f.path for f in PARTS.faults(Config({'NAME': 'Ranged', 'RATE': 10 ** 400, 'COUNT': 10 ** 400}), '')] == ['RATE', 'COUNT']


def test_the_values_of_a_typed_map_are_converted_like_any_other():
    @PARTS.register_class()
    class Mapped(Component):
        SWITCHES: dict[str, bool] = param({}, 'Names and whether they are on.')
        RATES: dict[str, list[float]] = param({}, 'Names and rates.')

    built = PARTS.build(Config.parse('{NAME: Mapped, SWITCHES: {a: on, b: No, c: true}, RATES: {x: [1, 2.5]}}'))

    assert built.SWITCHES == {'a': True, 'b': False, 'c': True} and all(type(v) is bool for v in built.SWITCHES.values())
    assert [type(v) for v in built.RATES.x] == [float, float]
    assert [f.path for f in PARTS.faults(Config({'NAME': 'Mapped', 'SWITCHES': {'a': 'maybe'}}), '')] == ['SWITCHES']
