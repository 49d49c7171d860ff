"""Registries: names, suggestions, who may replace whom, and errors that keep their cause."""
from __future__ import annotations

import traceback

import pytest

import scepter.components  # noqa: F401
from scepter.core.config import Config
from scepter.core.faults import NOWHERE, ConfigError
from scepter.core.registry import SAMPLERS, Registry, need
from scepter.core.schema import REQUIRED, Component, param, registries, value_faults

SHIPPED = [r for r in registries() if not r.name.startswith('TEST_') and list(r)]


def names(registry: Registry) -> list[str]:
    """What the package ships; other tests may have registered components of a user's."""
    return [name for name in registry if registry.get(name).__module__.split('.')[0] in ('scepter', 'torch')]


def ids(registry: Registry) -> str:
    return registry.name


@pytest.mark.parametrize('registry', [r for r in SHIPPED if r is not SAMPLERS], ids=ids)    # of samplers the nearest is another algorithm
def test_an_unknown_name_is_told_the_nearest_or_to_look_at_imports(registry: Registry):
    for name in names(registry):
        with pytest.raises(KeyError) as error:
            registry.get(name + '_')
        assert f'did you mean {name}? (is its file listed under IMPORTS?)' in str(error.value)
    with pytest.raises(KeyError, match='listed under IMPORTS'):
        registry.get('Qqqqqqqqqqqqqqqqq')


@pytest.mark.parametrize('registry', SHIPPED, ids=ids)
def test_each_component_has_a_schema_a_docstring_and_a_template_that_loads(registry: Registry):
    for name in names(registry):
        node = Config.parse(registry.get_config_template(name))[registry.name]

        assert node.NAME == name
        assert (registry.get(name).__doc__ or '').strip(), f'{registry.name}.{name} has no docstring'
        assert set(node) - {'NAME'} == set(registry.schema(name))


@pytest.mark.parametrize('registry', SHIPPED, ids=ids)
def test_each_default_fits_its_own_declaration(registry: Registry):
    for name in names(registry):
        if registry.get(name).__module__.startswith('torch'):
            continue
        node = Config.parse(registry.get_config_template(name))[registry.name]
        with_default = [p for p in registry.schema(name).values() if p.default is not REQUIRED]

        faults = [f for p in with_default for f in value_faults(node[p.name], p, p.name, NOWHERE)]
        assert not faults, (name, faults)


def test_each_declared_key_says_what_it_means():
    silent = [f'{r.name}.{name}.{key}' for r in SHIPPED for name in names(r)
              for key, p in r.schema(name).items() if not p.argument and not p.doc]

    assert not silent


def registered_by(module: str, registry: Registry, name: str = 'Thing', **body: object) -> type:
    return registry.register_class()(type(name, (Component,), {'__module__': module, **body}))


def test_two_of_the_package_or_two_of_the_user_are_an_error_that_names_both_modules():
    for first, second in (('scepter.models.a', 'scepter.models.b'), ('mine', 'yours')):
        registry = Registry('TEST_TWICE')
        registered_by(first, registry)

        with pytest.raises(KeyError, match=f'already has a Thing, from {first}; the one in {second}'):
            registered_by(second, registry)


@pytest.mark.parametrize('order', [('scepter.models.a', 'mine'), ('mine', 'scepter.models.a'), ('torch.optim', 'mine')])
def test_a_users_component_replaces_the_shipped_one_in_either_order(order: tuple[str, str]):
    registry = Registry('TEST_REPLACE')
    made = {module: registered_by(module, registry) for module in order}

    assert registry.get('Thing') is made['mine']


def test_a_replacement_is_said_in_one_line(capsys: pytest.CaptureFixture):
    registry = Registry('TEST_SAID')
    registered_by('scepter.models.a', registry)
    registered_by('mine', registry)

    assert 'TEST_SAID: Thing of mine replaces the shipped one' in capsys.readouterr().err


def test_registering_the_same_thing_again_is_nothing():
    registry = Registry('TEST_AGAIN')
    thing = registered_by('mine', registry)

    assert registry.register_class()(thing) is thing and registry.register_class('Other')(thing) is thing
    assert list(registry) == ['Other', 'Thing']


def test_a_constructors_error_stays_itself_and_tells_the_node_it_came_from():
    registry = Registry('TEST_ERROR')

    @registry.register_class()
    class Broken(Component):
        DEPTH: int = param(1)

        def __init__(self, cfg: dict, logger: object = None):
            super().__init__(cfg, logger=logger)
            raise ZeroDivisionError('the cause')

    cfg = Config.parse('A:\n  NAME: Broken\n', name='my.yaml').A
    with pytest.raises(ZeroDivisionError, match='the cause') as error:
        registry.build(cfg)

    assert error.value.__notes__ == ['while building TEST_ERROR.Broken (my.yaml, line 2)']
    assert 'the cause' in ''.join(traceback.format_exception(error.value))


def test_a_library_is_asked_only_for_names_the_registry_has_not():
    registry, asked = Registry('TEST_LIBRARY'), []
    registered_by('mine', registry)
    registry.add_library(lambda: asked.append(1) or {'dict': dict})

    assert registry.get('Thing') and not asked
    assert registry.get('dict') is dict and asked
    with pytest.raises(KeyError, match='did you mean dict'):
        registry.get('dikt')


def test_a_library_that_is_not_installed_is_a_fault_that_names_the_extra():
    registry = Registry('TEST_ABSENT')
    registry.add_library(lambda: need('no_such_package', 'vision'))

    with pytest.raises(ConfigError, match=r'no_such_package is not installed: pip install -e "\.\[vision\]"'):
        registry.build({'NAME': 'Resize'})


def test_a_build_takes_what_no_file_can_hold():
    registry = Registry('TEST_GIVEN', given=('params',))
    registry.register_class('F')(lambda params, scale=2: [p * scale for p in params])

    assert registry.build({'NAME': 'F', 'SCALE': 3}, params=[1, 2]) == [3, 6]
    with pytest.raises(ConfigError, match='no such parameter'):
        registry.build({'NAME': 'F', 'PARAMS': [1]})


@pytest.mark.parametrize(('registry', 'base'), [('MODELS', 'TrainModule'), ('BACKBONES', 'BaseModel'), ('EMBEDDERS', 'BaseEmbedder')])
def test_a_network_on_torchs_own_module_is_told_its_base(registry: str, base: str):
    from torch import nn

    class Net(nn.Module):
        def __init__(self, cfg: dict, logger: object = None):
            super().__init__()

    owner = next(r for r in registries() if r.name == registry)
    with pytest.raises(ConfigError, match=rf'{registry}\.Net \(.*test_registry\) is a class on Module: derive it from scepter\.{base}'):
        owner.register_class()(Net)
    assert 'Net' not in owner


@pytest.mark.parametrize(('option', 'owner'), [('steps', 'Diffusion.sample'), ('seed', 'Diffusion.sample'), ('clamp', 'Diffusion.sample'),
                                               ('image_size', 'LatentDiffusion.forward_test')])
def test_a_sampler_may_have_no_option_that_is_called_like_an_argument_of_the_program(option: str, owner: str):
    from scepter import SAMPLERS

    names: dict[str, object] = {}
    exec(f'def mine(denoise, x, levels, *, fresh, between, {option}=1): return x', names)  # noqa: S102
    with pytest.raises(ConfigError, match=rf'SAMPLERS\.mine .* has an option {option}, which is an argument of {owner}: .*mine_{option}'):
        SAMPLERS.register_function()(names['mine'])
    assert 'mine' not in SAMPLERS


def test_a_name_that_is_reserved_later_is_still_found():
    def early(x: float, steps: int = 1) -> float:
        return x

    registry = Registry('TEST_RESERVED', given=('x',))
    registry.register_function()(early)

    with pytest.raises(ConfigError, match='early'):
        registry.reserve(lambda x, steps: x)
