"""SOLVER.CACHE: what the frozen parts of a network make of the training data, computed once, before the first step."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scepter.core import pulse
from scepter.core.env import we
from scepter.core.faults import ConfigError
from scepter.core.registry import DATASETS, MODELS
from scepter.data.cache import Cache, CachedDataset, Pictures
from scepter.data.kept import Table, encoder_word
from scepter.data.shards import key_of
from scepter.data.texts import Texts, prompts_of
from scepter.solvers.run import Run
from scepter.solvers.step import DTYPES, arithmetic


def prepare(run: Run) -> None:
    """Fill the cache of a run, let it train from it, and have its encoders rest. Every process calls it, and they share the work.

    The network is whole, on the CPU. Raises ConfigError where there is nothing that a cache could keep, and DataError.
    """
    pictures, texts = open_cache(run)
    fill(run, pictures, texts, run.work_dir / 'skipped.jsonl')
    run.datasets['train'] = CachedDataset(run.datasets['train'], pictures, texts)
    run.model.agree_on_sources()
    for name, table in (('picture', pictures), ('prompt', texts)):
        if table is None:
            continue
        part = run.model.encoders()[name].part
        file = table.folder.parent / 'encoders' / f'{key_of(table.encoder).hex()}.safetensors'
        if not run.model.rest(part, file, we.is_main):
            run.logger.info(f'cache: {part} stays in memory: its weights came from no file, so each checkpoint holds them')
    we.barrier()


def open_alone(run: Run, anew: bool = False) -> tuple[Pictures, Texts | None]:
    """The cache of a run that is built for this alone: its WORK_DIR is not touched."""
    run.datasets = {'train': DATASETS.build(run.TRAIN_DATA, logger=run.logger)}
    run.model, run.dtype = MODELS.build(run.MODEL, logger=run.logger), arithmetic(run.DTYPE)
    return open_cache(run, anew)


def fill_alone(run: Run) -> None:
    """Fill the cache of such a run. Every process calls it."""
    fill(run, *open_alone(run), skipped_file=None)


def open_cache(run: Run, anew: bool = False) -> tuple[Pictures, Texts | None]:
    """What the cache of a run has of its training data, and what is missing. Every process calls it.

    anew: read every source, also those whose stat has not changed.
    """
    encoders = run.model.encoders()
    if 'picture' not in encoders:
        raise ConfigError(f'CACHE: {type(run.model).__name__} has no autoencoder whose moments could be kept: leave CACHE out')
    cache, dataset = Cache(run.CACHE), run.datasets['train']
    how = {'folder': Path(str(cache.FOLDER)), 'dtype': DTYPES.get(str(cache.DTYPE)), 'rows': cache.ROWS, 'logger': run.logger}

    def told(name: str) -> str:
        return encoder_word(run.model.fingerprint(encoders[name].part), run.dtype, run.PARAM_DTYPE)

    encoder = we.broadcast(told('picture') if we.is_main else None)
    found = Pictures(dataset, encoder=encoder, anew=anew, **how) if we.is_main else None
    keys = we.broadcast((found.keys, found.has_key) if found is not None else None)
    pictures = found if found is not None else Pictures(dataset, encoder=encoder, keys=keys, **how)
    if not cache.PROMPTS or 'prompt' not in encoders:
        return pictures, None
    encoder, prompts = we.broadcast((told('prompt'), prompts_of(dataset)) if we.is_main else None)
    if not prompts:
        run.logger.info(f'cache: words of samples differ from draw to draw, so {encoders["prompt"].part} stays in memory to read them')
        return pictures, None
    return pictures, Texts(prompts, encoder=encoder, **how)


def fill(run: Run, pictures: Pictures, texts: Texts | None, skipped_file: Path | None) -> None:
    """Compute what is missing, each shard in one process."""
    encoders, cache = run.model.encoders(), Cache(run.CACHE)
    encode_picture, encode_words = (_on_device(run, encoders[name]) if name in encoders else None for name in ('picture', 'prompt'))
    _complete(run, pictures, 'pictures', lambda parts: pictures.fill(encode_picture, cache.BATCH_SIZE, parts, skipped_file))
    if texts is not None:
        _complete(run, texts, 'prompts', lambda parts: texts.fill(encode_words, cache.BATCH_SIZE, parts))


def _on_device(run: Run, encoder: Any) -> Callable[[Any], Any]:
    """An encoder as the training would use it: on the device, in the types of its arithmetic and weights."""
    run.model.get_submodule(encoder.part).to(we.device, DTYPES[run.PARAM_DTYPE])

    def encode(given: Any) -> Any:
        pulse.beat()
        with torch.no_grad(), run.autocast():
            return encoder.encode(run.to_device({'given': given})['given'])

    return encode


def _complete(run: Run, table: Table, what: str, compute: Callable[[list[list[int]]], None]) -> None:
    parts = table.missing()
    for fault in table.faults:
        run.logger.warning(f'cache: {fault.file}: {fault.what}; what is lost is computed again')
    there, missing = int((table.numbers >= 0).sum()), sum(map(len, parts))
    run.logger.info(f'cache {table.folder.parent}: {there:,} of {len(table.keys):,} {what} are there, {missing:,} {what} to encode')
    we.barrier()    # all have looked before anybody writes
    with pulse.phase('caching'):
        compute(parts[we.rank::we.world_size])
    if we.is_main:
        table.restore_indices()
    we.barrier()
    table.look()
