"""A hook receives the solver at fixed moments and minds one side concern. A run without any hook trains."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from scepter.core.config import Config
from scepter.core.disk.tensors import Stored
from scepter.core.faults import Fault
from scepter.core.schema import Component

if TYPE_CHECKING:
    from torch import Tensor, nn


class Hook(Component, base=True):
    """Overwrite the moments you need. Each mode calls only its own list (TRAIN_HOOKS, EVAL_HOOKS, TEST_HOOKS), in list order.

    A hook that wants a checkpoint calls solver.request_save(); the solver saves at one place, after all hooks and the evaluation.
    """

    group: str = ''        # what its tensors are called in a checkpoint, <group>.safetensors; default its NAME

    @classmethod
    def check_beside(cls, cfg: Config, figures: Mapping[str, set[str] | None]) -> Iterator[Fault]:
        """Rules between this hook's filled config and the evaluations of the run, found before anything is built.

        figures: of each evaluation, by its name ('' for that of EVAL_DATA), the names of its figures as solver.eval_outputs has them;
        None where one of its metrics does not tell beforehand.
        """
        yield from ()

    @property
    def pinned_steps(self) -> list[int]:
        """Steps whose checkpoints KEEP_CHECKPOINTS must not remove."""
        return []

    def swapped(self, model: nn.Module) -> contextlib.AbstractContextManager[None] | None:
        """A context in which the network has other weights to draw with; None where this hook keeps none."""
        return None

    def before_solve(self, solver: Any) -> None:
        """Everything is built, the checkpoint of RESUME_FROM is loaded, nothing has run."""

    def before_all_iter(self, solver: Any) -> None:
        """The loop of this mode begins."""

    def before_iter(self, solver: Any) -> None:
        """A step begins; solver.step counts the finished ones, solver.batches holds its batches."""

    def after_iter(self, solver: Any) -> None:
        """A step is done; solver.outputs holds what it gave."""

    def before_eval(self, solver: Any) -> None:
        """In training: solver.evaluation begins; the network is in evaluation mode."""

    def after_eval(self, solver: Any) -> None:
        """In training: solver.evaluation is done; solver.eval_outputs holds its figures: loss, or quick/loss in that called quick."""

    def read_log(self, solver: Any, logged: dict[str, Any]) -> None:
        """In training: all hooks have run after a step, or (solver.mode is eval) after an evaluation. `logged` holds every figure (a
        number or a tensor of one element) and every picture of it under its name in logs: what the network gave and solver.log was told."""

    def after_all_iter(self, solver: Any) -> None:
        """The loop of this mode has ended."""

    def after_solve(self, solver: Any) -> None:
        """The run ends; also called after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values."""
        return {}

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, as tensors. The main process's are saved; more than a file of them (SHARD_SIZE) any process may write,
        so these must be alike in all."""
        return {}

    def load_state_dict(self, state: dict[str, Any], tensors: Stored) -> None:
        """Take back what state_dict and state_tensors gave. Each tensor is read from the disk when it is asked for."""
