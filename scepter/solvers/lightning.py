"""ENV.USE_PL: PyTorch Lightning's Trainer turns the loop. What a step is, and all that is saved, said and stopped, stays the solver's."""
from __future__ import annotations

import importlib.util
import itertools
import logging
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scepter.core.env import we
from scepter.core.faults import ConfigError


def require() -> None:
    """Raise ConfigError where Lightning is not installed: before anything is built, and without the seconds that its import takes."""
    if importlib.util.find_spec('pytorch_lightning') is None:
        raise ConfigError('ENV.USE_PL is true, but PyTorch Lightning is not installed: pip install -e ".[lightning]", '
                          'or ENV.USE_PL=false, which trains the same')


def run_steps(one_step: Callable[[], None], is_done: Callable[[], bool], folder: Path) -> None:
    """Call one_step() until is_done(), from within a pl.Trainer with manual optimization. Raises what one_step raises.

    Processes are the launcher's (core/launch.py) and have met before: `we` alone says which one this is. To Lightning each is a training
    on one device; told of the others, it would exchange a flag of its own before every step, and not notice a rank that is gone.
    """
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.environments import LightningEnvironment
    from pytorch_lightning.strategies import SingleDeviceStrategy
    logging.getLogger('pytorch_lightning').setLevel(logging.WARNING)
    warnings.filterwarnings('ignore', module='pytorch_lightning')    # its own dealings with newer versions of torch
    trainer = pl.Trainer(
        accelerator=we.device.type, devices=[we.device.index] if we.device.type == 'cuda' else 1, strategy=SingleDeviceStrategy(we.device),
        plugins=[LightningEnvironment()],    # whatever scheduler it would believe to have found
        max_epochs=1, limit_val_batches=0, num_sanity_val_steps=0, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)
    try:
        trainer.fit(_steps(one_step, is_done), itertools.count())
    except SystemExit as end:    # what Lightning makes of Ctrl-C
        raise (end.__context__ if isinstance(end.__context__, KeyboardInterrupt) else end) from None
    assert is_done(), 'Lightning has ended the training by itself'


def _steps(one_step: Callable[[], None], is_done: Callable[[], bool]) -> Any:
    import pytorch_lightning as pl

    class Steps(pl.LightningModule):
        """Has no weights: the solver has put the network on its device, and Lightning would take it off again at the end."""

        automatic_optimization = False

        def configure_optimizers(self) -> list:
            return []

        def on_train_start(self) -> None:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)    # Lightning has put one of its own in front

        def on_train_batch_start(self, batch: int, batch_idx: int) -> int | None:
            return -1 if is_done() else None

        def training_step(self, batch: int, batch_idx: int) -> None:
            one_step()

    handler = signal.getsignal(signal.SIGTERM)
    return Steps()
