"""What benchmarks of training share: a recipe without weights from files, its solver, and the update of a bare loop."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).resolve().parents[1] / 'examples'


def recipe(name: str, folder: str) -> Any:
    """An example's config, with no hook but its average of the weights; autoencoder and text tower are random, and nothing is cached."""
    import scepter.components  # noqa: F401
    from scepter.core.config import Config
    from scepter.core.experiment import carry_out_imports
    cfg = Config.load(EXAMPLES / name, [f'SOLVER.WORK_DIR={folder}'])
    cfg.SOLVER.TRAIN_HOOKS = [hook for hook in cfg.SOLVER.TRAIN_HOOKS if hook.NAME == 'ModelEmaHook']
    carry_out_imports(cfg)
    del cfg.SOLVER.MODEL.FIRST_STAGE_MODEL['PRETRAINED_MODEL'], cfg.SOLVER['CACHE']
    return cfg


def built(cfg: Any) -> Any:
    """Its solver, ready to train, with the same weights each time."""
    from scepter.core.registry import SOLVERS
    torch.manual_seed(0)
    solver = SOLVERS.build(cfg.SOLVER)
    solver.set_up()
    solver.train_mode()
    return solver


def stepping(solver: Any, steps: int) -> Callable[[], None]:
    """So many steps of its own loop, each time."""
    solver.before_solve()
    solver.before_all_iter()

    def solve() -> None:
        for _ in range(steps):
            solver.one_step()
    return solve


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


class Update:
    """Backward, clip, optimizer, and an average of what is trained where `beta` says so."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, beta: float | None = None):
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer, self.beta = optimizer, beta
        self.average = [p.detach().clone() for p in self.trained] if beta is not None else []

    def __call__(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.beta is not None:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.trained], 1 - self.beta)
        loss.item()
