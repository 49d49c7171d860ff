"""How a run goes on: the state of optimizers, the clock, several optimizers, float16."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scepter.core.config import Config
from scepter.core.errors import CheckpointError, NonFiniteError
from scepter.core.faults import ConfigError
from scepter.core.registry import MODELS, OPTIMIZERS, SOLVERS
from scepter.core.schema import param
from scepter.models.base import TrainModule
from scepter.solvers.plan import Plan
from tiny import config, groups, memory_for, run, same


@MODELS.register_class()
class TinyConvs(TrainModule):
    """Two convolutions whose weights have two layouts, a part that gets no gradient, and two losses."""

    GROWTH: float = param(0.0, 'How much larger the loss is made at each forward pass.')
    FREEZE: bool = param(False, 'Leave the second convolution as it is.')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.first, self.second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3)
        self.idle = nn.Linear(2, 2)
        self.second.requires_grad_(not self.FREEZE)

    def forward_train(self, image: Tensor, number: Tensor, **batch: Any) -> dict[str, Any]:
        x = image[:, None, :, None] * image[:, None, None, :]
        x = nn.functional.interpolate(x, (8, 8))
        out = self.second(self.first(x).tanh())
        loss = (out - number.view(-1, 1, 1, 1) / 16).square().mean()
        return {'loss': loss * 10 ** self.GROWTH, 'other': out.abs().mean()}


MODEL = {'NAME': 'TinyConvs'}
TWO = {'A': {'NAME': 'AdamW', 'PARAMS': ['first.*'], 'LEARNING_RATE': 1e-2},
       'B': {'NAME': 'SGD', 'PARAMS': ['*'], 'LEARNING_RATE': 1e-2, 'MOMENTUM': 0.9, 'EVERY': 3}}


def interrupted(folder: Path, at: int, steps: int = 10, **more: Any) -> tuple[dict, dict]:
    """Checkpoints of the last step: of a run, and of one that was stopped and begun again."""
    run(config(folder / 'whole', steps=steps, **more))
    run(config(folder / 'cut', steps=at, **{**more, 'LR_SCHEDULER': None}))
    run(config(folder / 'cut', steps=steps, RESUME_FROM='latest', **more))
    return groups(folder / 'whole', steps), groups(folder / 'cut', steps)


def test_the_moments_of_a_fused_optimizer_come_back_in_the_layout_of_their_weights(tmp_path):
    more = {'MODEL': MODEL, 'CHANNELS_LAST': True, 'LR_SCHEDULER': None}
    whole, cut = interrupted(tmp_path, 5, **more)
    assert same(whole, cut)

    solver = run(config(tmp_path / 'cut', steps=10, RESUME_FROM='latest', **more))
    weight = solver.model.second.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert solver.optimizers[0].optimizer.param_groups[0]['fused']
    assert all(v.stride() == weight.stride() for v in solver.optimizers[0].optimizer.state[weight].values() if v.ndim)


@pytest.mark.parametrize('at', [4, 5, 6])
def test_an_optimizer_that_steps_every_third_time_resumes_at_any_step(tmp_path, at):
    whole, cut = interrupted(tmp_path, at, MODEL=MODEL, OPTIMIZER=TWO, LR_SCHEDULER=None)
    assert same(whole, cut)


def test_an_optimizer_with_every_takes_the_gradient_of_its_own_step(tmp_path):
    """So its steps 0, 3, 6 are those of a run that has only these samples."""
    solver = run(config(tmp_path, steps=2, MODEL=MODEL, OPTIMIZER={**TWO, 'B': {**TWO['B'], 'MOMENTUM': 0.0}}, WARMUP_STEPS=0))
    assert all(p.grad is None for p in solver.model.parameters())
    before = solver.model.second.weight.detach().clone()
    solver.train_mode()
    solver.before_all_iter()
    solver.plan = solver.plan._replace(max_steps=4)
    solver.one_step()       # step 2: not due
    assert torch.equal(solver.model.second.weight, before)
    solver.before_iter()
    loss = solver.model('train', **solver.to_device(solver.batches[0][0]))['loss']
    gradient, = torch.autograd.grad(loss, solver.model.second.weight)
    solver.run_step_train(solver.batches)
    assert torch.equal(solver.model.second.weight, before.add(gradient, alpha=-solver.optimizers[1].rate))


def test_every_and_float16_go_together(tmp_path):
    solver = run(config(tmp_path, steps=5, MODEL=MODEL, DTYPE='float16', OPTIMIZER={'NAME': 'AdamW', 'LEARNING_RATE': 1e-2, 'EVERY': 2}))
    assert solver.step == 5


def test_a_float16_run_whose_gradients_are_never_finite_ends(tmp_path):
    with pytest.raises(NonFiniteError, match='3 steps in a row'):
        run(config(tmp_path, steps=200, MODEL={**MODEL, 'GROWTH': 36.0}, DTYPE='float16'))


@pytest.mark.parametrize(('before', 'after'), [
    ({'NAME': 'AdamW'}, {'NAME': 'SGD'}), ({'NAME': 'SGD'}, {'NAME': 'AdamW'}), ({'A': {'NAME': 'AdamW'}}, {'B': {'NAME': 'AdamW'}}),
], ids=['AdamW to SGD', 'SGD to AdamW', 'renamed'])
def test_state_is_never_given_to_another_optimizer(tmp_path, before, after):
    run(config(tmp_path, steps=2, MODEL=MODEL, OPTIMIZER=before))
    with pytest.raises(CheckpointError, match=r'was trained with the optimizers .*; this config has .*begin a new run from the weights'):
        run(config(tmp_path, steps=4, MODEL=MODEL, OPTIMIZER=after, RESUME_FROM='latest'), force=True)


def test_a_parameter_that_never_had_a_gradient_does_not_hinder_a_resume_but_a_new_one_does(tmp_path):
    run(config(tmp_path, steps=2, MODEL={**MODEL, 'FREEZE': True}))
    run(config(tmp_path, steps=3, MODEL={**MODEL, 'FREEZE': True}, RESUME_FROM='latest'))
    with pytest.raises(CheckpointError, match=r'has no state for second\.weight'):
        run(config(tmp_path, steps=4, MODEL=MODEL, RESUME_FROM='latest', TRAIN_HOOKS=[]), force=True)


def test_optimizers_that_cannot_train_here_are_not_offered():
    assert 'LBFGS' not in OPTIMIZERS and 'SparseAdam' not in OPTIMIZERS and 'AdamW' in OPTIMIZERS


@MODELS.register_class()
class TwelveMatrices(TrainModule):
    """Four megabytes each."""

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.matrices = nn.ParameterList(torch.randn(1024, 1024) for _ in range(12))

    def forward_train(self, **batch: Any) -> dict[str, Any]:
        return {'loss': sum(matrix.square().mean() for matrix in self.matrices)}


@pytest.mark.skipif(sys.platform != 'linux', reason='asks /proc for the peak of memory')
def test_a_resume_reads_one_tensor_after_the_other(tmp_path):
    hooks = [{'NAME': 'ModelEmaHook'}, {'NAME': 'CheckpointHook'}]
    run(config(tmp_path, steps=1, MODEL={'NAME': 'TwelveMatrices'}, TRAIN_HOOKS=hooks))
    solver = SOLVERS.build(config(tmp_path, steps=2, MODEL={'NAME': 'TwelveMatrices'}, RESUME_FROM='latest', TRAIN_HOOKS=hooks).SOLVER)
    solver.set_up()

    def go_on() -> None:
        solver.before_solve()
        solver.before_all_iter()

    grown = memory_for(go_on) >> 20
    solver.after_solve()
    assert grown < 48 * 3 + 16, grown     # two moments and an average of 48 MB, and what is being read


# ------------------------------------------------------------------------------------------------ the clock
def plan(batch: int, world: int = 1, state: dict | None = None, **keys: Any) -> Plan:
    cfg = Config({'GLOBAL_BATCH_SIZE': None, 'ACCU_STEP': 1, 'MAX_STEPS': None, 'MAX_EPOCHS': None, **keys})
    return Plan.of(cfg, batch, 100, world, state)


def test_epochs_count_samples_whatever_the_size_of_the_steps_was():
    state = {'step': 10, 'samples': 80, 'global_batch_size': 8}
    assert plan(8, MAX_EPOCHS=2).max_steps == 25
    assert plan(8, state=state, MAX_EPOCHS=2)[:4] == (8, 1, 8, 25)
    assert plan(4, 2, state, MAX_EPOCHS=2)[:4] == (4, 1, 8, 25)              # on two processes
    assert plan(5, state=state, MAX_EPOCHS=2)[:4] == (4, 2, 8, 25)           # the checkpoint's own size wins over another BATCH_SIZE
    assert plan(4, state=state, MAX_EPOCHS=2, GLOBAL_BATCH_SIZE=24)[:4] == (4, 6, 24, 15)     # 120 samples are left
    assert plan(8, state={**state, 'samples': 400}, MAX_EPOCHS=2).max_steps == 10


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ConfigError, match='a global batch of 8 cannot be shared by 3 processes evenly: use 1, 2, 4'):
        plan(8, 3, {'step': 1, 'samples': 8, 'global_batch_size': 8}, MAX_STEPS=4)


def test_max_epochs_resumed_with_another_batch_size_sees_each_sample_as_often(tmp_path):
    hooks = [{'NAME': 'CheckpointHook', 'INTERVAL': 2, 'SAVE_LAST': False}]
    run(config(tmp_path, steps=2, LR_SCHEDULER=None, TRAIN_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 4}, TRAIN_HOOKS=hooks))
    solver = run(config(tmp_path, steps=None, MAX_EPOCHS=2, RESUME_FROM='auto', GLOBAL_BATCH_SIZE=8, TRAIN_HOOKS=[]), force=True)
    assert (solver.step, solver.samples) == (2 + 3, 32)
    assert sorted(n for batch in solver.model.numbers for n in batch) == sorted([*range(16), *missing(solver)])


def missing(solver: Any) -> list[int]:
    """What of the first epoch the first two steps had not seen."""
    from scepter.core import streams
    from scepter.core.env import we
    return [streams.permute(we.seed, 0, place, 16) for place in range(8, 16)]


# ------------------------------------------------------------------------------------------------ the module's call
def test_compile_acts_on_every_network(tmp_path):
    """The solver calls the module, which is what torch.compile, DDP and FSDP2 take hold of."""
    calls = []
    solver = run(config(tmp_path, steps=1, MODEL=MODEL))
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    solver.model.register_forward_pre_hook(lambda module, args: calls.append(args))
    torch._dynamo.reset()
    solver.model.compile(backend=backend)
    solver.plan = solver.plan._replace(max_steps=2)
    solver.run_train()
    assert compiled and calls == [('train',)]


def test_an_average_is_taken_only_where_an_optimizer_has_stepped(tmp_path):
    hooks = [{'NAME': 'ModelEmaHook', 'BETA': 0.5, 'WARMUP': False}]
    optimizer = {'NAME': 'SGD', 'LEARNING_RATE': 1e-1, 'EVERY': 4}
    one, two = (run(config(tmp_path / str(steps), steps=steps, MODEL=MODEL, OPTIMIZER=optimizer, LR_SCHEDULER=None, TRAIN_HOOKS=hooks))
                for steps in (1, 4))
    averages = [solver.hooks['train'][0].average['first.weight'] for solver in (one, two)]
    assert torch.equal(*averages) and not torch.equal(averages[0], one.model.first.weight)
