"""When to save."""
from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from typing import Any

from scepter.core.config import Config
from scepter.core.disk.tensors import Stored
from scepter.core.faults import ConfigError, Fault, did_you_mean
from scepter.core.registry import HOOKS
from scepter.core.schema import param
from scepter.hooks.base import Hook


@HOOKS.register_class()
class CheckpointHook(Hook):
    """Asks for a checkpoint every INTERVAL steps, at the end, and when a figure of the evaluation is the best so far."""

    INTERVAL: int = param(1000, 'Steps between checkpoints; 0 for none but the last.', least=0)
    SAVE_LAST: bool = param(True, 'Save when the run is done.')
    SAVE_BEST_BY: str | None = param(None, "Keep the checkpoint with the best of this figure: '+accuracy' the highest, '-loss' the lowest, "
                                           "'-quick/loss' that of the evaluation quick.")

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if cfg.SAVE_BEST_BY is not None and (cfg.SAVE_BEST_BY[:1] not in ('+', '-') or not cfg.SAVE_BEST_BY[1:]):
            yield Fault('SAVE_BEST_BY', f'is {cfg.SAVE_BEST_BY!r}: begin with + (the highest is best) or - (the lowest), then the '
                                        "figure's name, e.g. -loss")

    @classmethod
    def check_beside(cls, cfg: Config, figures: Mapping[str, set[str] | None]) -> Iterator[Fault]:
        yield from super().check_beside(cfg, figures)
        key = (cfg.SAVE_BEST_BY or '')[1:]
        if key and not figures:
            yield Fault('SAVE_BEST_BY', f'is {cfg.SAVE_BEST_BY}, but nothing is evaluated: give EVAL_DATA and EVAL_INTERVAL, or EVALS')
        elif key and not _may_give(figures, key):
            known = sorted(name for names in figures.values() for name in names or ())
            yield Fault('SAVE_BEST_BY', f'is {cfg.SAVE_BEST_BY}, but the evaluations give no {key}{did_you_mean(key, known)} '
                                        f'({", ".join(known)})')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.best: float | None = None
        self.best_step: int | None = None

    @property
    def pinned_steps(self) -> list[int]:
        """Steps that KEEP_CHECKPOINTS must not remove."""
        return [] if self.best_step is None else [self.best_step]

    def after_iter(self, solver: Any) -> None:
        if self.INTERVAL and solver.step % self.INTERVAL == 0:
            solver.request_save('interval')

    def after_eval(self, solver: Any) -> None:
        if self.SAVE_BEST_BY is None:
            return
        sign, key = self.SAVE_BEST_BY[0], self.SAVE_BEST_BY[1:]
        if _evaluation(solver.evaluations, key) != solver.evaluation.name:
            return
        if key not in solver.eval_outputs:
            raise ConfigError(f'SAVE_BEST_BY: the evaluation gives {", ".join(solver.eval_outputs)}, not {key}')
        value = solver.eval_outputs[key]
        if math.isfinite(value) and (self.best is None or (value > self.best if sign == '+' else value < self.best)):
            self.best, self.best_step = value, solver.step
            solver.request_save(f'best {key}')

    def after_all_iter(self, solver: Any) -> None:
        if self.SAVE_LAST:
            solver.request_save('last')

    def state_dict(self) -> dict[str, Any]:
        return {'best': self.best, 'best_step': self.best_step, 'best_by': self.SAVE_BEST_BY}

    def load_state_dict(self, state: dict[str, Any], tensors: Stored) -> None:
        if state.get('best_by', self.SAVE_BEST_BY) == self.SAVE_BEST_BY:    # else it is the best of another figure
            self.best, self.best_step = state['best'], state['best_step']


def _evaluation(names: Container[str], key: str) -> str:
    """The evaluation that a figure of this name is of; '' is the one without a name."""
    name, slash, _ = key.partition('/')
    return name if slash and name in names else ''


def _may_give(figures: Mapping[str, set[str] | None], key: str) -> bool:
    names = figures.get(_evaluation(figures, key), set())
    return names is None or key in names
