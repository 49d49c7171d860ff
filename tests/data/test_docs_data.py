from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scepter.core.config import Config
from scepter.core.registry import DATASETS

PAGE = (Path(__file__).parents[2] / 'docs' / 'data.md').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def page(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The page's Python, imported as a user's file would be."""
    file = tmp_path_factory.mktemp('page') / 'data_page.py'
    file.write_text('\n'.join(re.findall(r'```python\n(.*?)```', PAGE, re.S)), encoding='utf-8')
    spec = importlib.util.spec_from_file_location('data_page', file)
    module = sys.modules['data_page'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_python_of_the_page_runs(page):
    assert page.batch['image'].shape == (8, 3, 32, 32) and page.n.tolist() == list(range(8))


@pytest.mark.parametrize('yaml', re.findall(r'```yaml\n(.*?)```', PAGE, re.S))
def test_the_yaml_of_the_page_passes_the_check(yaml, page):
    cfg = Config.parse(yaml)
    nodes = [node[key] for node in (cfg, cfg.get('SOLVER', {})) for key in ('TRAIN_DATA', 'TEST_DATA') if key in node]
    assert nodes and not [fault for node in nodes for fault in DATASETS.faults(node, 'DATA')]


def test_the_keys_of_the_page_have_their_defaults():
    rows = dict(re.findall(r'^\| `([A-Z_]+)` \| ([\w.]+) \|', PAGE, re.M))
    declared = DATASETS.schema('PromptListDataset')
    assert len(rows) == 8
    spelled = {key: 'null' if declared[key].default is None else f'{declared[key].default}'.removesuffix('.0').lower() for key in rows}
    assert rows == spelled
