"""What is installed: the package, the examples as scepter.examples, the tools as scepter.tools, and the command `scepter`."""
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def needed(name: str) -> list[str]:
    lines = (HERE / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith('#')]


version = re.search(r"^__version__ = '(.+)'$", (HERE / 'scepter' / '__init__.py').read_text(encoding='utf-8'), re.MULTILINE)[1]
extras = {name: needed(name) for name in ('clip', 'vision', 'lightning', 'oss', 'data', 'video', 'dev')}
extras['all'] = sorted({line for lines in extras.values() for line in lines})
examples = {'.'.join(('scepter', *folder.relative_to(HERE).parts)): str(folder.relative_to(HERE))
            for folder in (HERE / 'examples', *(HERE / 'examples').rglob('*')) if folder.is_dir() and folder.name != '__pycache__'}
beside = {**examples, 'scepter.tools': 'tools'}    # folders beside the package that are installed inside it

setup(
    name='scepter',
    version=version,
    description='Train and sample diffusion models that a YAML file describes',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    author='The scepter authors',
    python_requires='>=3.10',
    packages=[*find_packages(include=['scepter', 'scepter.*']), *beside],
    package_dir=beside,
    package_data={'': ['*.yaml', '*.md', '*.txt'], 'scepter': ['py.typed']},
    install_requires=needed('base'),
    extras_require={'core': [], **extras},
    entry_points={'console_scripts': ['scepter = scepter.commands:main']},
)
