"""The documentation is true: the reference is not stale, blocks run, command lines parse, links lead somewhere."""
from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest

from scepter import run_inference, run_train
from scepter.core.config import Config, plain
from tests.test_ranges import RIGHT

ROOT = Path(__file__).resolve().parents[1]
GIVEN = {'quick_start.md', 'training_guide.md', 'design.md'}    # the documents that came first; other tests hold them
NOT_RUN = {'weights.md', 'drawing.md', 'README.md'}     # two read weights, the third shows a class without its imports
PAGES = sorted({*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('examples/*/README.md')})
OURS = [p for p in PAGES if p.name not in GIVEN]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', page.read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope='module')
def make_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location('make_docs', ROOT / 'tools' / 'make_docs.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_components_is_not_stale(make_docs: ModuleType):
    assert make_docs.PAGE.read_text(encoding='utf-8') == make_docs.components_page(), 'run: make docs'


def test_the_schema_for_editors_takes_what_is_right_and_refuses_what_is_wrong(make_docs: ModuleType):
    schema = json.loads(json.dumps(make_docs.json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    cfg = plain(Config.load(ROOT / 'examples' / 'sd15' / 'sd15_512_full.yaml'))

    assert not list(validator.iter_errors(cfg))
    for path, value in [('SOLVER.MAX_STEPZ', 3), ('SOLVER.MAX_STEPS', 'many'), ('SOLVER.MODEL.NAME', 'Nope'), ('SOLVER.TRAIN_HOOKS', 3),
                        ('SOLVER.MODEL.PARAMETERIZATION', 'epz'), ('ENV.DEVICE', 'gpu'), ('SOLVER.SAMPLE_ARGS.SAMPLR', 'ddim')]:
        wrong = Config(cfg)
        wrong.override([f'{path}={value}'])
        assert list(validator.iter_errors(plain(wrong))), path


def test_the_schema_for_editors_refuses_what_is_out_of_range(make_docs: ModuleType):
    validator = jsonschema.Draft202012Validator(make_docs.json_schema())
    right = Config.parse(RIGHT)
    assert not list(validator.iter_errors(plain(right)))
    for word in ('MAX_STEPS=0', 'OPTIMIZER.BETAS=[2, 2]', 'MODEL.P_ZERO=1.5', 'MODEL.DIFFUSION_MODEL.MODEL_CHANNELS=40'):
        wrong = right.copy()
        wrong.override([f'SOLVER.{word}'])

        assert list(validator.iter_errors(plain(wrong))), word


def test_python_blocks_run_page_by_page_from_top_to_bottom(tmp_path: Path):
    script = ['import warnings; warnings.simplefilter("ignore")']
    for page in OURS:
        for text in blocks(page, 'python'):
            ast.parse(text)
        if page.name not in NOT_RUN:
            script.append(f'exec(compile({chr(10).join(blocks(page, "python"))!r}, {page.name!r}, "exec"), {{"__name__": "__main__"}})')
    (tmp_path / 'pages.py').write_text('\n'.join(script), encoding='utf-8')
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, 'pages.py'], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('page', [p for p in OURS if blocks(p, 'yaml')], ids=name_of)
def test_yaml_blocks_are_configs(page: Path):
    for text in blocks(page, 'yaml'):
        Config.parse(text, page.name, environment=False)


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_command_lines_parse(page: Path):
    text = page.read_text(encoding='utf-8').replace('\\\n', ' ')
    for line in re.findall(r'^ *(?:torchrun .*|python .*?)(scepter/run_(?:train|inference)\.py .*)$', text, re.MULTILINE):
        script, *words = shlex.split(re.split(r'\s{3,}|\s+#', line)[0])
        parser = (run_train if 'run_train' in script else run_inference).command_line()
        parser.parse_intermixed_args(words)     # ends with SystemExit where a flag is unknown


@pytest.mark.parametrize('page', OURS, ids=name_of)
def test_links_lead_to_files(page: Path):
    for target in re.findall(r'\]\(([^)#\s]+)', page.read_text(encoding='utf-8')):
        if '://' not in target:
            assert (page.parent / target).exists(), target
