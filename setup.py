"""What is installed: the package, the examples as scepter.examples, and the two commands."""
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def needed(name: str) -> list[str]:
    lines = (HERE / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith('#')]


extras = {name: needed(name) for name in ('clip', 'vision', 'lightning', 'oss', 'data', 'dev')}
extras['all'] = sorted({line for lines in extras.values() for line in lines})
examples = {'.'.join(('scepter', *folder.relative_to(HERE).parts)): str(folder.relative_to(HERE))
            for folder in (HERE / 'examples', *(HERE / 'examples').rglob('*')) if folder.is_dir() and folder.name != '__pycache__'}

setup(
    name='scepter',
    version='0.1.0',
    description='Train and sample diffusion models that a YAML file describes',
    license='Apache-2.0',
    author='The scepter authors',
    python_requires='>=3.10',
    packages=[*find_packages(include=['scepter', 'scepter.*']), *examples],
    package_dir=examples,
    package_data={'': ['*.yaml', '*.md', '*.txt']},
    install_requires=needed('base'),
    extras_require={'core': [], **extras},
    entry_points={'console_scripts': ['scepter-train = scepter.run_train:main', 'scepter-infer = scepter.run_inference:main']},
)
