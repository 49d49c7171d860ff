"""MANIFEST.json, which makes a folder a checkpoint: the length and sha256 of each of its files, closed by a sha256 of its own."""
from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from scepter.core.disk import atomic
from scepter.core.errors import CheckpointError

FORMAT = 2
MANIFEST = 'MANIFEST.json'
MANIFEST_LIMIT = 1 << 24    # bytes
STEP = re.compile(r'step-(\d{8,})')


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's one spelling, closed by its own sha256, so that a changed byte shows wherever it lies."""
    body = json.dumps(dict(manifest), indent=1, sort_keys=True)
    return json.dumps({**manifest, 'sha256': hashlib.sha256(body.encode()).hexdigest()}, indent=1, sort_keys=True).encode() + b'\n'


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError where there is none, or it is damaged, forged, or of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f'{folder} is no checkpoint of ours: it has no {MANIFEST}')
    try:
        with open(path, 'rb') as file:
            text = file.read(MANIFEST_LIMIT)
        manifest = json.loads(text)
        seal = manifest.pop('sha256')
        if manifest['format'] != FORMAT and sealed(manifest) == text:
            older = isinstance(manifest['format'], int) and manifest['format'] < FORMAT
            raise CheckpointError(f'{path}: format {manifest["format"]}, but this version of scepter reads format {FORMAT}: '
                                  + ('take the version that wrote it; this one cannot tell what it leaves out' if older else 'upgrade it'))
        expected = sealed(manifest)
        if text != expected:
            raise CheckpointError(f'{path}: damaged: sha256 {seal} expected, {json.loads(expected)["sha256"]} found')
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read: {error.strerror}') from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f'{path}: damaged: {path.stat().st_size} bytes that are not a manifest ({type(error).__name__})') from error
    if step_of(folder) not in (-1, manifest['step']):
        raise CheckpointError(f'{path}: this manifest is of step {manifest["step"]}, but the folder is {folder.name}')
    _check_shape(path, manifest)
    return manifest


def _check_shape(path: Path, manifest: Mapping[str, Any]) -> None:
    """A sealed manifest can still be a forged one: its names may not lead out of the folder, its groups only to its files."""
    try:
        for name, file in manifest['files'].items():
            if '/' in name or name.startswith('.') or name == MANIFEST:
                raise ValueError(f'{name!r} is not the name of a file in this folder')
            atomic.safe_join(path.parent, name)
            if type(file['size']) is not int or type(file['sha256']) is not str:
                raise ValueError(f'{name!r} has no size and sha256')
        if not {'state.json', 'config.yaml'} | {name for names in manifest['groups'].values() for name in names} <= set(manifest['files']):
            raise ValueError('its groups name files that it does not list')
        for names in manifest['groups'].values():
            index = [name for file in names for name in manifest['index'][file]] if len(names) != 1 else []
            if not all(type(name) is str for name in index) or len(index) != len({*index}) or not names:
                raise ValueError('its index does not say which file holds which tensor')
        if type(manifest['step']) is not int or manifest['step'] < 0:
            raise ValueError(f'its step is {manifest["step"]!r}')
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f'{path}: refused: {error}') from error


def compare(folder: Path, files: Mapping[str, Mapping[str, Any]], verify: Literal['full', 'size']) -> None:
    """Raises CheckpointError where the files of a folder are not those that its manifest lists: names and sizes, or each byte."""
    # hidden names are the file system's own (.nfs..., .DS_Store); ours never begin with a dot
    found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder) if not entry.name.startswith('.')}
    extra = sorted(found.keys() - files.keys() - {MANIFEST})
    if extra:
        raise CheckpointError(f'{folder / extra[0]}: not a file of this checkpoint: its manifest does not list it')
    for name, expected in files.items():
        if name not in found:
            raise CheckpointError(f'{folder / name}: missing; {expected["size"]} bytes expected')
        if not stat.S_ISREG(found[name].st_mode):
            raise CheckpointError(f'{folder / name}: a plain file expected, a link or something else found')
        if found[name].st_size != expected['size']:
            raise CheckpointError(f'{folder / name}: {expected["size"]} bytes expected, {found[name].st_size} found')
    if verify == 'size':
        return
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            digests = dict(zip(files, pool.map(lambda name: atomic.digest(folder / name), files)))
        except OSError as error:
            raise CheckpointError(f'{folder}: cannot be read: {error.strerror}') from error
    for name, expected in files.items():
        if digests[name] != (expected['size'], expected['sha256']):
            raise CheckpointError(f'{folder / name}: damaged: sha256 {expected["sha256"]} expected, {digests[name].sha256} found')


def step_of(folder: Path) -> int:
    """The step that a checkpoint folder's name tells, or -1."""
    match = STEP.fullmatch(folder.name)
    return int(match[1]) if match else -1
