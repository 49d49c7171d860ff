"""Imports run one way: the table of docs/design.md, section 1, is read and held."""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'scepter'
HEAVY = {'transformers', 'open_clip', 'torchvision', 'oss2', 'pytorch_lightning', 'lightning', 'diffusers', 'sklearn', 'huggingface_hub',
         'fsspec', 'timm', 'peft', 'matplotlib', 'tensorboard', 'scipy', 'requests'}
MODULES = sorted(PACKAGE.rglob('*.py'))


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


def test_a_circle_is_seen():
    assert circles({'a': {'b'}, 'b': {'c'}, 'c': {'a'}, 'd': {'a'}, 'e': set()}).keys() == {'a', 'b', 'c', 'd'}


@pytest.mark.parametrize('folder', ['core', 'data', 'diffusion', 'hooks', 'solvers'])
def test_no_two_files_of_a_folder_know_each_other_not_even_for_types(folder: str):
    names = {'scepter.' + '.'.join(m.relative_to(PACKAGE).with_suffix('').parts): m for m in MODULES
             if m.stem != '__init__' and folder_of(m) == folder}
    arrows = {name: imports(ast.parse(m.read_text(encoding='utf-8'))) & names.keys() for name, m in names.items()}

    assert len(arrows) > 3 and not circles(arrows)


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
