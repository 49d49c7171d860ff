"""What an installation holds: the package with its types, the examples, the tools, and one command that reaches them all."""
from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

import scepter
from scepter import commands

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def setup() -> dict:
    """What setup.py hands to setuptools."""
    said: dict = {}
    real, setuptools.setup = setuptools.setup, lambda **words: said.update(words)
    try:
        runpy.run_path(str(ROOT / 'setup.py'))
    finally:
        setuptools.setup = real
    return said


def test_the_wheel_holds_every_module_that_a_command_runs(setup):
    assert setup['entry_points']['console_scripts'] == ['scepter = scepter.commands:main']
    for name, (module, _) in commands.COMMANDS.items():
        package, _, file = module.rpartition('.')
        folder = ROOT / setup['package_dir'].get(package, package.replace('.', '/'))
        assert package in setup['packages'] and (folder / f'{file}.py').is_file(), name


def test_the_wheel_holds_types_examples_and_what_the_readme_says(setup):
    assert setup['version'] == scepter.__version__
    assert setup['long_description'] == (ROOT / 'README.md').read_text(encoding='utf-8')
    assert (setup['long_description_content_type'], setup['package_data']['scepter']) == ('text/markdown', ['py.typed'])
    assert (ROOT / 'scepter' / 'py.typed').is_file() and 'scepter.examples.digits' in setup['packages']
    assert all(any(p.startswith(f'scepter.{folder}') for p in setup['packages']) for folder in ('core', 'models', 'solvers', 'hooks'))


@pytest.mark.parametrize('command', commands.COMMANDS)
def test_every_command_says_how_it_is_used_under_its_own_name(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['scepter'])
    with pytest.raises(SystemExit, match='0'):
        commands.main([command, '--help'])
    assert f'usage: scepter {command} ' in capsys.readouterr().out


def test_the_command_tells_what_there_is_and_what_there_is_not(capsys):
    assert commands.main([]) == 2 and commands.main(['--help']) == 0
    told = capsys.readouterr().out
    assert all(f'  {name} ' in told for name in commands.COMMANDS)
    assert commands.main(['--version']) == 0 and capsys.readouterr().out.strip() == scepter.__version__
    assert commands.main(['paint']) == 2 and "no command 'paint'; there is train, draw" in capsys.readouterr().err


@pytest.mark.slow
def test_an_installed_wheel_runs_its_tools_from_anywhere(tmp_path):
    source = tmp_path / 'source'
    for name in ('scepter', 'examples', 'tools', 'requirements'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q', '-w', str(tmp_path), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob('scepter-*.whl'))
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    shutil.rmtree(source)
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path / 'site')}

    def run(*words: str) -> subprocess.CompletedProcess:
        script = 'import sys; from scepter.commands import main; sys.exit(main(sys.argv[1:]))'
        return subprocess.run([sys.executable, '-c', script, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)

    for command in commands.COMMANDS:
        assert f'usage: scepter {command} ' in run(command, '--help').stdout, run(command, '--help').stderr
    assert run('docs', '--schema', 'config.schema.json').returncode == 0 and (tmp_path / 'config.schema.json').is_file()
    assert run('train', '--cfg', 'sd15.yaml', '--check').returncode == 0
    assert run('checkpoint', 'ls', 'nowhere').returncode == 4
