"""Open a network that was trained here or published elsewhere, and draw with it.

    import scepter
    pipe = scepter.load('outputs/digits/diffusion')
    pipe('the number three').images[0].save('three.png')

docs/drawing.md tells it from the side of who draws. The command line, run_inference.py, is a parser of flags before this file.
"""
from __future__ import annotations

import hashlib
import inspect
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import scepter
import scepter.components
from scepter import weights
from scepter.config import as_ours, is_published
from scepter.core import streams
from scepter.core.calls import accepted
from scepter.core.config import Config
from scepter.core.disk import atomic, checkpoints
from scepter.core.env import we
from scepter.core.errors import DataError
from scepter.core.experiment import carry_out_imports, load_config, not_carried_out
from scepter.core.faults import NOWHERE, ConfigError, check, did_you_mean
from scepter.core.images import PICTURES, free_path, grid, png_text, save_new, save_png, to_uint8
from scepter.core.logger import get_logger
from scepter.core.registry import FILE_SYSTEMS, MODELS
from scepter.core.schema import default, schema_of
from scepter.core.stores import FS
from scepter.core.stores.client import shown
from scepter.core.stores.mirror import newest_at
from scepter.data.images import UnreadableError, load_image, to_rgb
from scepter.models.base import TrainModule
from scepter.models.restore import config_of, has_config, restore
from scepter.models.unfilled import unfilled
from scepter.solvers.diffusion import SampleArgs
from scepter.solvers.run import file_systems

DEFAULT_CONFIG = 'sd15/sd15_512_full.yaml'
GIVEN = ('image', 'mask', 'first_frame')    # pictures that forward_test may take
ONCE = 16    # pictures drawn at once where nothing else is said
OnStep = Callable[[int, int, Tensor], None]
Picture = str | os.PathLike | Image.Image | Tensor


class Drawn(NamedTuple):
    """What a call of a pipeline gives: results, one dict each (prompt, image [3, H, W] or video [3, T, H, W] in 0..1, settings, ...)."""
    results: list[dict[str, Any]]

    @property
    def images(self) -> list[Image.Image]:
        """The pictures. Saved as PNG they hold their settings."""
        return [Told.of(result) for result in self.results if 'image' in result]

    def save(self, folder: str | os.PathLike = 'outputs/inference', clips: Literal['png', 'mp4'] = 'png') -> list[Path]:
        """Write pictures as PNG, and clips too, animated, or as MP4, each under the next free number of the folder. Answers the files."""
        files = []
        for result in self.results:
            pictures = {suffix.replace('.png', f'.{clips}') if 'video' in key else suffix: result[key]
                        for key, suffix in PICTURES.items() if key in result}
            files += save_new(pictures, Path(folder), result.get('prompt', ''), result['settings'])
        return files

    def save_grid(self, folder: str | os.PathLike = 'outputs/inference', columns: int = 4) -> Path:
        """Write all pictures as one, row by row, under a free name."""
        if not self.images:
            raise DataError(f'{len(self.results)} results, and no picture among them: there is nothing to lay out')
        told = dict(self.results[0]['settings'])
        for key in ('number', 'prompt', 'row_seed'):
            told.pop(key, None)
        told['prompts'] = list(dict.fromkeys(result.get('prompt', '') for result in self.results))
        return save_png(grid([result['image'] for result in self.results], columns), free_path(Path(folder) / 'grid.png'), told)


# ------------------------------------------------------------------------------------------------ opening
def load(path: str | os.PathLike | None = None, cfg: str | os.PathLike | Mapping | None = None, device: str | torch.device | None = None,
         dtype: str = 'auto', ema: bool = True, imports: Sequence[str] = (), overrides: Sequence[str] = (),
         allow_downloads: bool = False) -> Pipeline:
    """A network with its weights, ready to draw.

    path: a checkpoint folder, a run's folder (its newest checkpoint that is whole), a single file, a diffusers folder, or an address
        of one. None: the weights that cfg names.
    cfg: the experiment whose SOLVER.MODEL to build; without it the one that came with the weights, else what the files themselves say.
    dtype: float32, bfloat16, float16; auto is float16 on CUDA and float32 elsewhere.  ema: averaged weights where there are any.
    imports: files or modules with components of yours.  overrides: KEY.PATH=VALUE words.
    allow_downloads: also fetch what a config that came with the weights names, from the public network; what you name yourself is always
        fetched, wherever it lies.
    Raises ConfigError, CheckpointError and DataError.
    """
    path, source = (None, '') if path is None else _place_of(str(path))
    experiment, is_theirs = open_config(path, cfg, overrides, imports)
    refused: AbstractContextManager = nullcontext()
    if path is not None and is_theirs:
        mine = [*_values(overrides), path]
        refused = FS.public_only(but=mine) if allow_downloads else FS.without_requests(
            f'the config that came with {shown(path)} names it, and that may be anybody\'s. If you trust it, --allow_downloads '
            '(allow_downloads=True) fetches it; or name a copy of yours, KEY.PATH.PRETRAINED_MODEL=...', but=mine)
    with refused:
        model, digest = open_model(path, experiment, is_theirs, ema)
    device = we.device if device is None else torch.device(device)
    model.eval().requires_grad_(False).to(device=device, dtype=_dtype(dtype, device))
    model.lay_channels_last()
    return Pipeline(model, experiment, source or str(experiment.file), digest)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    kinds = {'auto': torch.float16 if device.type == 'cuda' else torch.float32, 'float32': torch.float32, 'bfloat16': torch.bfloat16,
             'float16': torch.float16}
    if name not in kinds:
        raise ConfigError(f'dtype {name!r} is not one of {", ".join(kinds)}')
    return kinds[name]


def _place_of(path: str) -> tuple[str, str]:
    """What a path means on this machine, and what to call it: a checkpoint of ours may lie in any store."""
    if '://' not in path:
        path = str(checkpoints.newest_of(path) or path)
        return path, path
    if not path.split('?')[0].endswith(weights.FILES):
        with weights.local_copy(newest_at(path)) as local:
            if (checkpoint := checkpoints.newest_of(local)) is not None:
                return str(checkpoint), path
    return path, path


def open_config(path: str | None, cfg: str | os.PathLike | Mapping | None, overrides: Sequence[str],
                imports: Sequence[str]) -> tuple[Config, bool]:
    """The experiment, and whether it came with the weights, so that anybody may have written it. Checks SOLVER.MODEL and SAMPLE_ARGS."""
    is_theirs = cfg is None and path is not None
    if isinstance(cfg, Mapping):
        experiment = Config.parse(Config.of(cfg).dump())
    elif cfg is not None:
        experiment = load_config(cfg)
        experiment = as_ours(cfg)[0] if is_published(experiment) else experiment
    elif path is not None and has_config(path):
        experiment = config_of(path)
    elif path is None:
        experiment, is_theirs = Config.load(DEFAULT_CONFIG), False
    else:
        experiment, is_theirs = describe(path), False    # no more than numbers and names of ours is read from it
    experiment.override(overrides)
    words, faults = carry_out_imports(Config() if is_theirs else experiment, imports)
    solver = experiment.get('SOLVER') or Config()
    how = solver.get('SAMPLE_ARGS') or Config() if isinstance(solver, Config) else Config()
    for key, node in (('SOLVER', solver), ('SOLVER.SAMPLE_ARGS', how)):
        if not isinstance(node, Config):
            raise ConfigError(f'{experiment.file or "the config"}: {key} is {node!r}, expected keys and values below it')
    faults += MODELS.faults(solver.get('MODEL'), 'SOLVER.MODEL')
    stores = [] if is_theirs else file_systems(solver)
    faults += [fault for node in stores for fault in FILE_SYSTEMS.faults(node, 'SOLVER.FILE_SYSTEM')]
    faults += schema_of(SampleArgs).faults(how, 'SOLVER.SAMPLE_ARGS')
    check([*faults, *(not_carried_out(experiment, words) if faults else [])], experiment.file or 'the config')
    for node in stores:
        FS.init_fs_client(node)
    return experiment, is_theirs


def describe(path: str) -> Config:
    """The experiment that a published model's own files tell; what was taken from where is logged."""
    found = weights.describe(path)
    rows = '\n'.join(f'  {row}' for row in found.taken)
    get_logger().info(f'{path} without a config; taken from its own files:\n{rows}')
    return found.config


def open_model(path: str | None, cfg: Config, is_theirs: bool, ema: bool) -> tuple[TrainModule, Future | None]:
    """The network with its weights, and the digest of their file to come. Raises CheckpointError where a weight came from no file."""
    node = cfg.SOLVER.MODEL
    if path is None:
        model = MODELS.build(node, logger=get_logger())
        weights.refuse_unfilled(model)
        return model, None
    if is_theirs or checkpoints.is_checkpoint(path):
        return restore(path, cfg, use_ema=ema, logger=get_logger()), digest_of(path)
    with weights.local_copy(path) as local:
        digest = digest_of(local)
        weights.read_weights(local)    # first, so that a file that is none is known at once
        # a part that has a file of its own keeps what that gives
        node = Config({**node, 'PRETRAINED_MODEL': None} if 'PRETRAINED_MODEL' in node else node)
        with unfilled(node):
            model = MODELS.build(node, logger=get_logger())
        model.load_pretrained(path, node.get('IGNORE_KEYS', []), use_ema=ema)
        weights.refuse_unfilled(model)
    return model, digest


def digest_of(path: str | os.PathLike) -> Future:
    """The sha256 of weights, worked out while the network is built: of a file, a checkpoint's manifest, a folder's names and sums."""
    def sum_up() -> str:
        place = Path(path)
        if (place / checkpoints.MANIFEST).is_file():
            place = place / checkpoints.MANIFEST
        if place.is_file():
            return atomic.digest(place).sha256
        files = sorted(file for file in place.rglob('*.*') if file.suffix in ('.safetensors', '.bin', '.json'))
        rows = [f'{file.relative_to(place).as_posix()} {atomic.digest(file).sha256}' for file in files]
        return hashlib.sha256('\n'.join(rows).encode()).hexdigest()

    def work() -> None:
        try:
            digest.set_result(sum_up())
        except BaseException as error:    # whoever asks for the digest is told
            digest.set_exception(error)

    digest: Future = Future()
    threading.Thread(target=work, daemon=True).start()    # a daemon, so that a failed start need not wait for 7 GB to be read
    return digest


def _values(words: Sequence[str]) -> list[str]:
    return [word.partition('=')[2] for word in words]


# ------------------------------------------------------------------------------------------------ drawing
class Pipeline:
    """A network that draws.    pipe('a red fox').images[0]

    model: the network.  cfg: the whole experiment.  source: where the weights came from.
    """

    def __init__(self, model: TrainModule, cfg: Config, source: str, digest: Future | None = None):
        self.model, self.cfg, self.source, self._digest = model, cfg, source, digest

    def __call__(self, prompts: str | Sequence[str] | None = None, on_step: OnStep | None = None, **how: Any) -> Drawn:
        """All pictures at once; the arguments are those of `draw`."""
        return Drawn(list(self.draw(prompts, on_step, **how)))

    def draw(self, prompts: str | Sequence[str] | None = None, on_step: OnStep | None = None, num_samples: int = 1,
             batch_size: int | None = None, show_progress: bool = False, **how: Any) -> Iterator[dict[str, Any]]:
        """The pictures one after another, as they come: what forward_test gives of each, its `number` and its `settings`.

        on_step: called as (step, steps, x0) after each step of each batch; what it raises ends the drawing.
        num_samples: pictures of each prompt.  batch_size: drawn at once, 16 at most by itself.
        how: any argument of the network's forward_test, over SAMPLE_ARGS of the config, over forward_test's own defaults. image,
            mask and first_frame are a file, a PIL image or a tensor. Raises ConfigError for one that the network does not take.
        """
        wanted = [prompts] if isinstance(prompts, str) else prompts
        if wanted is not None and not accepted(self.model.forward_test, {'prompt': []}):
            raise ConfigError(f'{type(self.model).__name__}.forward_test does not take a prompt: there is nothing it could draw of one')
        if num_samples < 1 or (wanted is not None and not len(wanted)):
            raise DataError(f'nothing to draw: {0 if wanted is None else len(wanted)} prompts, {num_samples} pictures of each')
        rows = None if wanted is None else [prompt for prompt in wanted for _ in range(num_samples)]
        arguments, named = self._arguments({**how, 'on_step': on_step} if on_step is not None else how)
        arguments['show_progress'] = show_progress
        return self._draw(rows, num_samples if rows is None else len(rows), batch_size or ONCE, arguments, named)

    def _draw(self, prompts: list[str] | None, count: int, batch_size: int, arguments: dict[str, Any],
              named: dict[str, Any]) -> Iterator[dict[str, Any]]:
        seed, told = arguments['seed'], self._told(arguments, named, batch_size)
        row_seeds = streams.row_seeds(seed, count)
        for rows in self._batches(prompts, count, batch_size, arguments.get('n_prompt')):
            here = rows.stop - rows.start
            own: dict[str, Any] = {key: arguments[key].expand(here, -1, -1, -1) for key in GIVEN if key in arguments}
            own |= {key: arguments[key][rows] for key in ('n_prompt', 'label') if isinstance(arguments.get(key), list)}
            own |= {'num_samples': here} if prompts is None else {'prompt': prompts[rows]}
            with torch.no_grad(), streams.current(seed, range(rows.start, rows.stop)), self._seeded(seed, rows.start):
                results = self.model.forward_test(**accepted(self.model.forward_test, {
                    **arguments, **own, 'seed': seed + rows.start, 'row_seeds': row_seeds[rows]}))
            for number, result in enumerate(results, rows.start):
                words = {k: v for k, v in result.items() if not isinstance(v, Tensor)}
                shown = result.get('image', result.get('video'))
                size = {} if shown is None else {'size': list(shown.shape[-2:])}
                key = {'row_seed': words.pop('seed')} if 'seed' in words else {}
                yield {**result, 'number': number, 'settings': {'number': number, **size, **told, **words, **key, 'seed': seed}}

    @contextmanager
    def _seeded(self, seed: int, first: int) -> Iterator[None]:
        """Inside, torch's own generators are keyed as well, for a network that draws from them; afterwards they are what they were."""
        device = next((p.device for p in self.model.parameters()), torch.device('cpu'))
        with torch.random.fork_rng([device] if device.type == 'cuda' else []):
            torch.manual_seed(streams.seed_global(seed, 'draw', first))
            yield

    def _arguments(self, how: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What forward_test is given: what was asked for, else SAMPLE_ARGS; and what stands for the pictures among it in words."""
        takes = inspect.signature(self.model.forward_test).parameters
        function = f'{type(self.model).__name__}.forward_test'
        foreign = [name for name in how if name not in accepted(self.model.forward_test, {'seed': 0, 'row_seeds': 0, **how})
                   and not (name == 'seed' and 'row_seeds' in takes)]
        if foreign:
            raise ConfigError(f'{function} does not take {", ".join(foreign)}{did_you_mean(foreign[0], takes)}; '
                              f'it takes {", ".join(takes)}')
        ranges = schema_of(SampleArgs)
        check([fault for name, value in how.items() if name.upper() in ranges
               for fault in ranges[name.upper()].bounds.faults(value, name, NOWHERE)], 'what was asked for')
        given = SampleArgs(self.cfg.SOLVER.get('SAMPLE_ARGS') or Config()).given()
        if left := [name for name in given if name not in accepted(self.model.forward_test, {'row_seeds': 0, **given}) and name != 'seed']:
            get_logger().info(f'{function} does not take {", ".join(left)}: SAMPLE_ARGS that are left aside')
        arguments, named = {**given, **how}, {}
        own_seed = takes['seed'].default if 'seed' in takes else None
        arguments['seed'] = default(arguments.get('seed'), own_seed if isinstance(own_seed, int) else we.seed)
        if arguments['seed'] < 0:
            arguments['seed'] = random.randrange(2 ** 32)
        for key in GIVEN:
            if arguments.get(key) is None:
                arguments.pop(key, None)
                continue
            named[key] = str(arguments[key]) if isinstance(arguments[key], (str, os.PathLike)) else f'a {type(arguments[key]).__name__}'
        if 'mask' in named and 'image' not in named:
            raise DataError('a mask says which part of the image is made anew: give --image (image=...) too')
        if 'first_frame' in named:
            size = default(arguments.get('image_size'), getattr(self.model, 'drawn_size', None))
            arguments['first_frame'] = read_image(arguments['first_frame'], size)
        if 'image' in named:
            arguments['image'] = read_image(arguments['image'], arguments.get('image_size'))
            if 'mask' in named:
                arguments['mask'] = read_mask(arguments['mask'], arguments['image'].shape[-2:])
            if 'denoising_strength' in takes:
                arguments['denoising_strength'] = default(arguments.get('denoising_strength'), 0.75 if 'mask' not in named else 1.0)
        return arguments, named

    def _told(self, arguments: Mapping[str, Any], named: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
        """What made the pictures, in words: version, weights, every argument and every default that stood."""
        defaults = {name: p.default for name, p in inspect.signature(self.model.forward_test).parameters.items()
                    if isinstance(p.default, (bool, int, float, str, list)) and name != 'show_progress'}
        used = {**defaults, **accepted(self.model.forward_test, arguments)}
        words = {name: value for name, value in used.items() if not isinstance(value, Tensor) and name not in ('show_progress', 'on_step')}
        if 'row_seeds' not in inspect.signature(self.model.forward_test).parameters:
            words['batch_size'] = batch_size    # it has a say in what such a network draws
        return {'version': scepter.__version__, 'model': self.source, **({'weights': self.digest} if self.digest else {}), **words, **named}

    @property
    def digest(self) -> str | None:
        """The sha256 of the file that the weights came from (of a checkpoint: of its manifest); None where a config named them."""
        return None if self._digest is None else self._digest.result()

    def _batches(self, prompts: list[str] | None, count: int, batch_size: int, n_prompt: str | list[str] | None) -> Iterator[slice]:
        """What is drawn at once: contexts of one length, since a prompt of more chunks would lengthen those of the others."""
        tokenize = getattr(getattr(self.model, 'cond_stage_model', None), 'tokenize', None)
        unwanted = n_prompt if isinstance(n_prompt, list) else [default(n_prompt, getattr(self.model, 'default_n_prompt', ''))] * count
        if len(unwanted) != count:
            raise ConfigError(f'{len(unwanted)} negative prompts for {count} pictures: give one, or one for each')
        lengths = [tokenize([prompt, other]).shape[-1] if tokenize is not None else 0 for prompt, other in zip(prompts or [], unwanted)]
        first = 0
        for _, group in itertools.groupby(lengths or [0] * count):
            end = first + len(list(group))
            yield from (slice(i, min(i + batch_size, end)) for i in range(first, end, batch_size))
            first = end


def read_image(picture: Picture, size: int | Sequence[int] | None = None) -> Tensor:
    """[1, 3, H, W] in -1..1, scaled and cut in the middle to a size where one is given. Raises DataError."""
    if isinstance(picture, Tensor):
        picture = picture[None] if picture.ndim == 3 else picture
        if size is None or list(picture.shape[-2:]) == ([size, size] if isinstance(size, int) else list(size)):
            return picture.float()
        image = Image.fromarray(to_uint8(picture[0] / 2 + 0.5))
    elif isinstance(picture, Image.Image):
        image = to_rgb(picture)
    else:
        try:
            image = load_image(os.fspath(picture))
        except (OSError, UnreadableError) as error:
            raise DataError(f'{picture} is no picture that can be read: {error}') from error
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def read_mask(picture: Picture, size: Sequence[int]) -> Tensor:
    """[1, 1, H, W], 1 where a picture is light and 0 where it is dark; a tensor [..., H, W] in 0..1 is taken as it is."""
    if isinstance(picture, Tensor):
        return picture.float().reshape(1, 1, *picture.shape[-2:])
    return (read_image(picture, size).mean(1, keepdim=True) > 0).float()


class Told(Image.Image):
    """A PIL image that, saved as PNG, has its settings inside."""
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Told:
        """The picture of a result, with its settings beside it."""
        image: Any = Image.fromarray(to_uint8(result['image']))
        image.__class__, image.settings = cls, result['settings']    # Pillow has no other way to one of a subclass
        return image

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As in Pillow; a PNG carries the settings inside."""
        super().save(fp, format, **{'pnginfo': png_text(dict(self.settings)), **params})
