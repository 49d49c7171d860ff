"""Imports run one way (the table of docs/design.md, section 1, is read and held), in no circle; files and functions stay readable."""
from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from scepter.run_train import main as run_train
from tests.twins import three_images, twin

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'scepter'
HEAVY = {'transformers', 'open_clip', 'torchvision', 'oss2', 'pytorch_lightning', 'lightning', 'diffusers', 'sklearn', 'huggingface_hub',
         'fsspec', 'timm', 'peft', 'matplotlib', 'tensorboard', 'scipy', 'requests'}
MODULES = sorted(PACKAGE.rglob('*.py'))
LONG = {'core/schema.py': 420}    # lines; what a reader wants in one piece


def table() -> dict[str, set[str]]:
    """folder -> the folders it may import from, as the document says."""
    rows = {}
    text = (ROOT / 'docs' / 'design.md').read_text(encoding='utf-8')
    for folders, allowed in re.findall(r'^\| ([^|]+) \| ([^|]+) \|$', text[text.index('may import from scepter'):], re.MULTILINE):
        if folders.startswith('--'):
            continue
        for folder in re.findall(r'[a-z]+(?:_\*)?', folders.replace('`', '')):
            words = re.findall(r'[a-z]+', re.sub(r'\(.*?\)', '', allowed))
            rows[folder] = {'*'} if 'everything' in words else {w for w in words if (PACKAGE / w).is_dir()} | {folder}
        if 'everything' in allowed:
            break
    return rows


def folder_of(module: Path) -> str:
    relative = module.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'relative imports hide where an arrow goes'
            found |= {node.module or ''} | {f'{node.module}.{alias.name}' for alias in node.names}
    return found


def broken_arrows(folder: str, names: set[str], rows: dict[str, set[str]]) -> list[str]:
    allowed = rows.get(folder) or rows.get(re.sub('_.*', '_*', folder)) or set()
    targets = {name: name.split('.')[1] for name in names if name.startswith('scepter.')}
    return [] if '*' in allowed else sorted(n for n, t in targets.items() if t not in allowed and ((PACKAGE / t).is_dir() or
                                                                                                   (PACKAGE / f'{t}.py').is_file()))


def test_the_table_says_what_we_think_it_says():
    rows = table()

    assert rows['core'] == {'core'} and rows['diffusion'] == {'core', 'diffusion'} and rows['solvers'] == {'core', 'data', 'solvers'}
    assert rows['models'] == {'core', 'diffusion', 'weights', 'models'} and rows['run_*'] == {'*'} and rows['components'] == {'*'}


def test_a_broken_arrow_is_seen():
    names = imports(ast.parse('def f():\n    from scepter.models import base\nimport scepter.core.config'))

    assert broken_arrows('core', names, table()) == ['scepter.models', 'scepter.models.base']
    assert not broken_arrows('run_train', names, table())


@pytest.mark.parametrize('module', MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_no_file_imports_against_the_table(module: Path):
    assert broken_arrows(folder_of(module), imports(ast.parse(module.read_text(encoding='utf-8'))), table()) == []


def circles(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left of the arrows when whoever points at nobody has been taken away, again and again."""
    left = dict(arrows)
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    return left


def graph(files: dict[str, str]) -> dict[str, set[str]]:
    """module -> the modules of the package that its text imports, anywhere in it, also by importlib."""
    found = {}
    for name, text in files.items():
        nodes = list(ast.walk(ast.parse(text)))
        words = {part.value for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).endswith('import_module')
                 for part in ast.walk(node) if isinstance(part, ast.Constant)}
        words |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        words |= {full if (full := f'{node.module}.{alias.name}') in files else node.module
                  for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        found[name] = words & files.keys() - {name, 'scepter'}
    return found


def test_a_circle_is_seen_wherever_the_import_stands():
    hidden = {'scepter.a': 'def f():\n    from scepter import b', 'scepter.b': 'if TYPE_CHECKING:\n    from scepter.c import C',
              'scepter.c': "importlib.import_module('scepter.a')", 'scepter.d': 'import scepter.a', 'scepter': ''}

    assert circles(graph(hidden)).keys() == {'scepter.a', 'scepter.b', 'scepter.c', 'scepter.d'}    # d leads into it


def test_no_import_goes_in_a_circle():
    files = {'.'.join(('scepter', *m.relative_to(PACKAGE).with_suffix('').parts)).removesuffix('.__init__'): m for m in MODULES}
    texts = {name: module.read_text(encoding='utf-8') for name, module in files.items()}

    assert len(texts) > 80 and not circles(graph(texts))


def lengths(tree: ast.AST) -> dict[str, int]:
    """Lines of each function, its docstring left out."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = node.body[0] if ast.get_docstring(node) else None
            found[node.name] = node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)
    return found


@pytest.mark.parametrize('module', MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_functions_have_60_lines_at_most_and_files_400(module: Path):
    text = module.read_text(encoding='utf-8')

    assert {name: n for name, n in lengths(ast.parse(text)).items() if n > 60} == {}
    assert len(text.splitlines()) <= LONG.get(str(module.relative_to(PACKAGE)), 400)


@pytest.mark.parametrize('module', MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_needed_only(module: Path):
    tree = ast.parse(module.read_text(encoding='utf-8'))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]

    assert not {name.split('.')[0] for name in imports(ast.Module(top, []))} & HEAVY


def test_no_module_directly_in_the_package_bears_a_standard_name():
    assert not {m.stem for m in PACKAGE.glob('*.py')} & set(sys.stdlib_module_names)


def test_every_file_that_registers_is_imported_by_components():
    files = {'scepter.' + '.'.join(m.relative_to(PACKAGE).with_suffix('').parts).removesuffix('.__init__'): m for m in MODULES}
    registers = re.compile(r'^@[A-Z_]+\.register_|^\s*[A-Z_]+\.(register_\w+|add_library)\(', re.MULTILINE)
    reached, todo = set(), {'scepter.components'}
    while todo:
        name = todo.pop()
        reached.add(name)
        todo |= imports(ast.parse(files[name].read_text(encoding='utf-8'))) & files.keys() - reached

    assert {name for name, m in files.items() if registers.search(m.read_text(encoding='utf-8'))} <= reached


def test_the_package_alone_imports_nothing_heavy_and_every_public_name_resolves():
    code = """import sys, scepter
light = not {'torch', 'yaml'} & set(sys.modules)
values = [getattr(scepter, name) for name in scepter.__all__]
print(light, scepter.we.world_size, 'LatentDiffusion' in scepter.MODELS)"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)

    assert done.stdout.split() == ['True', '1', 'True'], done.stderr


def without_words(name: str) -> list[str]:
    """Public names of a module, and of its classes, that nothing explains: neither a docstring of their own nor that of what they override.

    A brick's forward is explained by the shapes in its class's docstring.
    """
    module = importlib.import_module(name)
    members = [(f'{name}.{key}', None, value) for key, value in vars(module).items() if getattr(value, '__module__', None) == name]
    for path, _, owner in [*members]:
        if inspect.isclass(owner):
            members += [(f'{path}.{key}', owner, value) for key, value in vars(owner).items()]
    return [path for path, owner, value in members
            if '._' not in path and is_ours(value) and not is_explained(owner, path.rpartition('.')[2], value)]


def is_ours(value: object) -> bool:
    return inspect.isclass(value) or inspect.isfunction(inspect.unwrap(getattr(value, 'fget', getattr(value, '__func__', value))))


def is_explained(owner: type | None, name: str, value: object) -> bool:
    if owner is None:
        return bool(value.__doc__) and not value.__doc__.startswith(f'{value.__name__}(')    # what a dataclass writes by itself
    if name == 'forward' and issubclass(owner, torch.nn.Module):
        return '->' in (value.__doc__ or '') + (owner.__doc__ or '')
    return any(getattr(vars(base).get(name), '__doc__', None) for base in owner.__mro__)


@pytest.mark.parametrize('module', MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_whatever_is_public_is_explained(module: Path):
    assert without_words('.'.join(('scepter', *module.relative_to(PACKAGE).with_suffix('').parts)).removesuffix('.__init__')) == []


class Stacks(TorchFunctionMode):
    """Notes the files of the package, outermost first, that are on the stack at each product of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[str]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            files = [Path(frame.filename) for frame in traceback.extract_stack()]
            self.seen.append([f.relative_to(PACKAGE).as_posix() for f in files if f.is_relative_to(PACKAGE)])
        return func(*args, **(kwargs or {}))


def test_the_way_from_the_command_to_the_attention_is_the_seven_stops_of_the_design(tmp_path: Path):
    text = (ROOT / 'docs' / 'design.md').read_text(encoding='utf-8')
    stops = re.findall(r'^ {4}\d  (\S+\.py) ', text[text.index('in seven stops'):], re.MULTILINE)
    cfg = twin('sd15/sd15_512_full', tmp_path / 'tiny.yaml', images=three_images(tmp_path / 'images'), MAX_STEPS=1, TRAIN_HOOKS=[])

    with Stacks() as stacks:
        assert run_train(['--cfg', cfg.file]) == 0

    assert len(stops) == 7
    of_unet = [seen for seen in stacks.seen if 'models/unet.py' in seen]
    for seen in of_unet:
        way = iter(seen)
        assert all(stop in way for stop in stops), seen    # in this order, with what else there is between them
    assert len(of_unet) > 10
