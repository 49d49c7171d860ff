"""SOLVER.CACHE: what the frozen parts of a network make of the training data, computed once, before the first step."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scepter.core.env import we
from scepter.core.faults import ConfigError
from scepter.data.cache import Cache, CachedDataset, Pictures
from scepter.solvers.run import Run
from scepter.solvers.step import DTYPES


def prepare(run: Run) -> None:
    """Fill the cache of a run, let it train from it, and have its encoders rest. Every process calls it, and they share the work.

    The network is whole, on the CPU. Raises ConfigError where there is nothing that a cache could keep, and DataError.
    """
    pictures = pictures_of(run)
    part, encode = run.model.encoders()['picture']
    module = run.model.get_submodule(part)
    module.to(we.device, DTYPES[run.PARAM_DTYPE])
    fill(run, pictures, encode)
    run.datasets['train'] = CachedDataset(run.datasets['train'], pictures)
    run.model.agree_on_sources()
    file = pictures.folder.parent / 'encoders' / f'{pictures.encoder[:32]}.safetensors'
    if not run.model.rest(part, file, we.is_main):
        run.logger.info(f'cache: {part} stays in memory: its weights came from no file, so each checkpoint holds them')
    we.barrier()


def pictures_of(run: Run, anew: bool = False) -> Pictures:
    """What the cache of a run has of its training data, and what is missing. Every process calls it."""
    encoders = run.model.encoders()
    if 'picture' not in encoders:
        raise ConfigError(f'CACHE: {type(run.model).__name__} has no autoencoder whose moments could be kept: leave CACHE out')
    cache, dataset = Cache(run.CACHE), run.datasets['train']
    told = [run.model.fingerprint(encoders['picture'].part), str(run.dtype), run.PARAM_DTYPE] if we.is_main else None
    encoder = ' '.join(we.broadcast(told))

    def open_cache(**keys: Any) -> Pictures:
        return Pictures(dataset, Path(str(cache.FOLDER)), encoder, DTYPES.get(str(cache.DTYPE)), cache.ROWS, logger=run.logger, **keys)

    found = open_cache(anew=anew) if we.is_main else None
    keys = we.broadcast((found.keys, found.has_key) if found is not None else None)
    return found if found is not None else open_cache(keys=keys)


def fill(run: Run, pictures: Pictures, encode: Callable[[Tensor], Tensor]) -> None:
    """Compute what is missing, each shard in one process."""
    parts = pictures.missing()
    for fault in pictures.faults:
        run.logger.warning(f'cache: {fault.file}: {fault.what}; what is lost is computed again')
    there, missing = int((pictures.numbers >= 0).sum()), sum(map(len, parts))
    run.logger.info(f'cache {pictures.folder.parent}: moments of {there:,} of {len(pictures.keys):,} samples are there, '
                    f'{missing:,} pictures to encode')
    we.barrier()    # all have looked before anybody writes
    cache = Cache(run.CACHE)
    with torch.no_grad(), run.autocast():
        pictures.fill(lambda x: encode(run.to_device({'x': x})['x']), cache.BATCH_SIZE, parts[we.rank::we.world_size],
                      run.work_dir / 'skipped.jsonl')
    if we.is_main:
        pictures.restore_indices()
    we.barrier()
    pictures.look()
