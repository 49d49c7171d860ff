"""Reading weights that somebody else wrote: lazily, and without running anything that is in them."""
from __future__ import annotations

import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scepter.core.disk.tensors import TensorFile
from scepter.core.errors import CheckpointError
from scepter.core.stores import FS
from scepter.core.stores.local import missing

PICKLES = ('.ckpt', '.pth', '.pt', '.bin')
FILES = ('.safetensors', *PICKLES)
# what a folder of one model calls its weights, in order of preference; the half-precision variant serves where the full one is absent
STEMS = ('diffusion_pytorch_model', 'model', 'pytorch_model', 'open_clip_model', 'open_clip_pytorch_model')
INERT = 'pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint'    # see _Inert
INVERSION = ('a textual inversion: vectors for a new word. It is no model, and no text tower here takes new words: give the model that it '
             'was made for')
Configs = Mapping[str, Mapping[str, Any]]    # of read_configs


class Entry(NamedTuple):
    """One tensor that can be read when it is needed."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    files: tuple[Path, ...] = ()    # where it lies
    origin: Any = None              # where it really comes from, for what a checkpoint of ours left out (weights/records.py)
    rows: Callable[[int, int], Tensor] | None = None    # reads some of its rows alone, where it lies as it is


class Weights(Mapping[str, Tensor]):
    """Names and shapes at once, each tensor when it is asked for, so a model never stands twice in memory.

    `source` says where they come from, for messages; `settings` holds the JSON files of a diffusers folder (read_configs), or that of one
    model's folder as '', or the metadata of a .safetensors.
    """

    def __init__(self, entries: Mapping[str, Entry], source: str = 'the weights', settings: Mapping[str, dict] | None = None):
        self.entries, self.source, self.settings = dict(entries), source, dict(settings or {})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], source: str = 'the weights') -> Weights:
        """From tensors that are there already, or from a TensorFile, of which nothing is read yet."""
        if isinstance(tensors, Weights):
            return tensors
        if isinstance(tensors, TensorFile):
            entries = {n: Entry(s.shape, s.dtype, partial(tensors.__getitem__, n), (tensors.path,), None, partial(tensors.rows, n))
                       for n, s in tensors.slots.items()}
            return cls(entries, str(tensors.path), {'metadata': tensors.metadata})
        files = (Path(source),) if Path(source).is_file() else ()
        return cls({n: Entry(tuple(t.shape), t.dtype, partial(tensors.__getitem__, n), files) for n, t in tensors.items()}, source)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor of this name, which is not read for it."""
        return self.entries[name].shape

    def with_entries(self, entries: Mapping[str, Entry]) -> Weights:
        """Other entries of the same source."""
        return Weights(entries, self.source, self.settings)

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """The same tensors; a name that `names` does not know stays."""
        return self.with_entries({names.get(n, n): e for n, e in self.entries.items()})

    def section(self, prefix: str) -> Weights:
        """What is under a prefix, without it."""
        return self.with_entries({n[len(prefix):]: e for n, e in self.entries.items() if n.startswith(prefix)})

    def under(self, prefix: str) -> Weights:
        """The same with a prefix before each name."""
        return self.with_entries({prefix + n: e for n, e in self.entries.items()})

    def without(self, names: Iterable[str]) -> Weights:
        """The same tensors but these."""
        gone = set(names)
        return self.with_entries({n: e for n, e in self.entries.items() if n not in gone})


@contextmanager
def local_copy(path: str | Path) -> Iterator[Path]:
    """The file or folder at a path of any store, on this machine."""
    path = str(path)
    if Path(path).exists():
        yield Path(path)
    elif '://' not in path:
        raise CheckpointError(f'no weights: {missing(Path(path))}')
    else:
        fetch = FS.get_from if path.split('?')[0].endswith(FILES) else FS.get_dir_to_local_dir
        with fetch(path, wait_finish=True) as local:
            yield Path(local)


def read_configs(folder: Path, parts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The configs of a pipeline's folder that are there: model_index, scheduler, and those of its parts."""
    files = {'model_index': 'model_index.json', 'scheduler': 'scheduler/scheduler_config.json',
             **{part: f'{part}/config.json' for part in parts}}
    return {part: read_json(folder / file) for part, file in files.items() if (folder / file).is_file()}


def read_model_folder(folder: Path) -> Weights:
    """One model's folder: its shards by their index, or its single file."""
    config = folder / 'config.json'
    settings = {'': read_json(config)} if config.is_file() else {}
    for stem in STEMS:
        for variant in ('', '.fp16'):
            for suffix in FILES:
                index = folder / f'{stem}{suffix}.index{variant}.json'
                index = index if index.is_file() else folder / f'{stem}{suffix}.index.json'
                single = folder / f'{stem}{variant}{suffix}'
                if single.is_file():
                    return Weights(read_file(single).entries, str(single), settings)
                if index.is_file():
                    return Weights(read_shards(index), str(folder), settings)
    here = sorted(p.name for p in folder.iterdir())[:8]
    raise CheckpointError(f'{folder}: no weights here; expected e.g. {STEMS[0]}.safetensors, found {", ".join(here) or "nothing"}')


def carried_config(metadata: Mapping[str, str]) -> str | None:
    """The YAML that a single file of ours carries in its header (tools/checkpoint.py to-single, tools/export.py); None for any other."""
    return metadata.get('config') if metadata.keys() & {'step', 'scepter.parity'} else None


def read_shards(index: Path) -> dict[str, Entry]:
    """The tensors that an index names, each from its shard. A shard is a file of the same folder, nothing else."""
    table = read_json(index).get('weight_map')
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f'{index}: expected a weight_map of tensor names and file names')
    shards: dict[str, Weights] = {}
    for shard in sorted(set(table.values())):
        if shard in ('', '.', '..') or not re.fullmatch(r'[\w.-]{1,200}', shard):
            raise CheckpointError(f'{index}: a shard must be a file of the same folder, found {shard!r}')
        shards[shard] = read_file(index.parent / shard)
    lacking = [n for n, shard in table.items() if n not in shards[shard]]
    if lacking:
        raise CheckpointError(f'{index}: {lacking[0]} and {len(lacking) - 1} more are not in the shard that the index names')
    entries = {name: shards[shard].entries[name] for name, shard in table.items()}
    return {name: entry._replace(files=(*entry.files, index)) for name, entry in entries.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f'{path}: expected JSON ({error})') from error
    if not isinstance(found, dict):
        raise CheckpointError(f'{path}: expected a JSON object, found {type(found).__name__}')
    return found


def read_file(path: Path) -> Weights:
    """The tensors of one file, without the wrapper that a trainer put round them."""
    if not path.is_file():
        raise CheckpointError(f'{path}: no such file')
    if path.suffix == '.safetensors':
        return Weights.of(TensorFile(path))
    if path.suffix not in PICKLES:
        raise CheckpointError(f'{path}: expected one of {", ".join(FILES)}')
    tensors = unwrap(read_pickle(path), path)
    return Weights.of(tensors, str(path))


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, by the loader that builds tensors and plain containers and nothing else.

    The archive is checked before: entries stored as they are, and together no larger than the file, or a few kilobytes could unpack to
    all of the memory.
    """
    refuse_what_is_no_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f'{path}: not a whole archive of torch.save: half a download? ({error})') from error
    if any('/code/' in e.filename or e.filename.endswith('constants.pkl') for e in entries):
        raise CheckpointError(f'{path}: a TorchScript program, expected weights')
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size]
    if packed or sum(e.file_size for e in entries) > path.stat().st_size:
        raise CheckpointError(f'{path}: its entries unpack to more than the file holds ({(packed or ["overlapping"])[0]}); torch.save '
                              'stores each as it is')
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Inert, INERT)]):
            warnings.simplefilter('ignore', UserWarning)    # about the protocol of what is then refused
            return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:    # whatever a hostile file makes the restricted loader raise, it is a bad file
        if foreign := foreign_names(path):
            raise CheckpointError(f'{path}: holds more than weights: it asks for {", ".join(foreign[:3])}, which could run code. '
                                  'Get it as .safetensors') from None
        known = re.search(r'Unsupported operand \d+|failed [a-z ]+', str(error))    # its whole text advises to switch the protection off
        raise CheckpointError(f'{path}: cannot be read as weights ({known[0] if known else type(error).__name__})') from None


def foreign_names(path: Path) -> list[str]:
    """What the pickle of an archive asks for beside tensors and containers, read off its opcodes without running any; for messages only."""
    names, words = [], ['', '']
    try:
        with zipfile.ZipFile(path) as archive:
            data = next(archive.read(name) for name in archive.namelist() if name.endswith('data.pkl'))
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ('GLOBAL', 'INST'):
                names.append(str(argument).replace(' ', '.'))
            elif opcode.name == 'STACK_GLOBAL':
                names.append('.'.join(words))
            elif isinstance(argument, str):
                words = [words[1], argument]
    except (ValueError, StopIteration, OSError, zipfile.BadZipFile, RuntimeError):
        pass    # a damaged pickle: what was found so far
    return [name for name in names if not re.fullmatch(r'torch\.\w+|torch\._utils\.\w+|collections\.OrderedDict', name)]


class _Inert:
    """Stands for the callback class that Lightning used as a key in the published .ckpt files of Stable Diffusion 1."""


def refuse_what_is_no_archive(path: Path) -> None:
    """Name what is often found in the place of weights."""
    try:
        with open(path, 'rb') as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read: {error.strerror}') from error
    if start.startswith(b'PK\x03\x04'):
        return
    if not start:
        found = 'an empty file'
    elif start.startswith(b'version https://git-lfs'):
        found = 'a Git LFS pointer, not the file itself: run `git lfs pull`'
    elif start.lstrip()[:1] == b'<':
        found = 'a web page: the download did not return the file'
    elif start[:1] == b'\x80' or start[257:262] == b'ustar' or start[:1] in b'(c]}':
        found = 'a bare pickle or a tar, as torch.save wrote them before 1.6; these cannot be checked: save it again as .safetensors'
    else:
        found = f'bytes {start[:8]!r}'
    raise CheckpointError(f'{path}: expected an archive of torch.save, found {found}')


def unwrap(found: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside what a trainer saved."""
    for wrapper in ('state_dict', 'model', 'module', 'params_ema', 'params'):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
            break
    if not isinstance(found, dict):
        raise CheckpointError(f'{path}: expected a dict of tensors, found {type(found).__name__}')
    if {'string_to_param', 'string_to_token'} & found.keys():
        raise CheckpointError(f'{path} is {INVERSION}')
    if {'image_proj', 'ip_adapter'} <= found.keys():
        raise CheckpointError(f'{path} is an IP-Adapter, which works beside a model: give the model itself')
    tensors = {n: t for n, t in found.items() if isinstance(n, str) and isinstance(t, Tensor)}
    others = [n for n, t in found.items() if n not in tensors and isinstance(t, (dict, list, tuple, Tensor))]
    if others or not tensors:
        raise CheckpointError(f'{path}: expected a dict of tensors, found {len(tensors)} tensors and {len(found) - len(tensors)} others'
                              f'{f", e.g. {others[0]!r}" if others else ""}')
    odd = [n for n, t in tensors.items() if t.layout != torch.strided or t.is_meta or t.is_quantized]
    if odd:
        raise CheckpointError(f'{path}: {odd[0]} is a sparse, quantized or empty tensor; expected plain ones')
    return {n: t.detach() for n, t in tensors.items()}
