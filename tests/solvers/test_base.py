"""The loop, resuming, bad steps, sizes, named optimizers, evaluation and testing."""
from __future__ import annotations

import json
import math
import signal

import pytest
import torch

from scepter.core.env import Stopped, we
from scepter.core.errors import CheckpointError, NonFiniteError
from scepter.core.faults import ConfigError
from scepter.core.registry import MODELS, SOLVERS
from scepter.hooks.base import Hook
from tiny import TinyDenoiser, config, groups, run, same


@pytest.mark.parametrize('dropout', [0.0, 0.5])
@pytest.mark.parametrize('cut', [1, 5, 9])
def test_ten_steps_equal_some_and_resume_and_the_rest(tmp_path, cut, dropout):
    model = {'NAME': 'TinyDenoiser', 'DROPOUT': dropout}
    whole = run(config(tmp_path / 'whole', MODEL=model))
    hooks = [{'NAME': 'ModelEmaHook', 'BETA': 0.9}, {'NAME': 'CheckpointHook', 'INTERVAL': cut, 'SAVE_LAST': False}]
    first = run(config(tmp_path / 'cut', MODEL=model, TRAIN_HOOKS=hooks))
    for later in first.work_dir.glob('checkpoints/step-*'):     # as if it had been killed after the first save
        if int(later.name[5:]) > cut:
            for file in later.iterdir():
                file.unlink()
            later.rmdir()
    second = run(config(tmp_path / 'cut', MODEL=model, RESUME_FROM='latest'))
    assert same(groups(tmp_path / 'whole', 10), groups(tmp_path / 'cut', 10))
    assert second.model.numbers == whole.model.numbers[cut:]


def test_resuming_twice_in_one_epoch_changes_nothing(tmp_path):
    run(config(tmp_path / 'whole'))
    for stop in (2, 4, 10):
        run(config(tmp_path / 'cut', steps=stop, LR_SCHEDULER=None, RESUME_FROM='auto'))
    run(config(tmp_path / 'plain', LR_SCHEDULER=None))
    assert same(groups(tmp_path / 'plain', 10), groups(tmp_path / 'cut', 10))
    assert not same(groups(tmp_path / 'whole', 10), groups(tmp_path / 'plain', 10))    # the comparison can fail


def test_an_epoch_holds_every_sample_once(tmp_path):
    solver = run(config(tmp_path, steps=8, TRAIN_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 4}))
    seen = [n for batch in solver.model.numbers for n in batch]
    assert sorted(seen[:16]) == sorted(seen[16:]) == list(range(16))
    assert seen[:16] != seen[16:]


def test_an_evaluation_and_a_probe_do_not_disturb_training(tmp_path):
    run(config(tmp_path / 'plain'))
    hooks = [{'NAME': 'ModelEmaHook', 'BETA': 0.9}, {'NAME': 'CheckpointHook', 'INTERVAL': 0},
             {'NAME': 'ProbeDataHook', 'INTERVAL': 2}, {'NAME': 'LogHook', 'LOG_INTERVAL': 3}]
    looked = run(config(tmp_path / 'looked', TRAIN_HOOKS=hooks, EVAL_INTERVAL=2, EVAL_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 5}))
    assert same(groups(tmp_path / 'plain', 10), groups(tmp_path / 'looked', 10))     # what the network counts in its passes, too
    assert math.isfinite(looked.eval_outputs['loss'])
    assert json.loads((tmp_path / 'looked' / 'probes' / 'step-00000002' / 'probe.json').read_text())['number']


def test_the_validation_loss_is_the_same_each_time_it_is_computed(tmp_path):
    solver = run(config(tmp_path, steps=2, EVAL_INTERVAL=2, EVAL_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 5}))
    first = solver.eval_outputs['loss']
    solver.run_eval()
    assert solver.eval_outputs['loss'] == first


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    run(config(tmp_path / 'one', TRAIN_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 8}))
    run(config(tmp_path / 'four', TRAIN_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 2}, ACCU_STEP=4))
    one, four = groups(tmp_path / 'one', 10)['model'], groups(tmp_path / 'four', 10)['model']
    assert all(torch.allclose(one[k].float(), four[k].float(), atol=1e-5) for k in one)


def test_a_global_batch_wins_over_batch_size(tmp_path):
    solver = run(config(tmp_path, steps=1, GLOBAL_BATCH_SIZE=12, TRAIN_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 5}))
    assert solver.plan[:3] == (4, 3, 12)


def test_epochs_are_a_second_way_to_say_steps(tmp_path):
    solver = run(config(tmp_path, steps=None, MAX_EPOCHS=2, TRAIN_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 4}))
    assert solver.step == 8


def test_a_bad_step_changes_nothing_to_the_bit(tmp_path):
    class Watch(Hook):
        def before_all_iter(self, solver):
            self.states = []

        def after_iter(self, solver):
            ema = next(h for h in solver.hooks['train'] if hasattr(h, 'average'))
            self.states.append([v.clone() for v in (*solver.model.parameters(), *ema.average.values(),
                                                    *solver.optimizers[0].state_tensors().values())])

    we.seed = 7
    cfg = config(tmp_path, steps=4, MODEL={'NAME': 'TinyDenoiser', 'NAN_AT': [2]})
    solver = SOLVERS.build(cfg.SOLVER)
    watch = Watch({})
    solver.hooks['train'].append(watch)
    solver.set_up()
    solver.solve()
    assert all(torch.equal(a, b) for a, b in zip(watch.states[1], watch.states[2]))
    assert not all(torch.equal(a, b) for a, b in zip(watch.states[2], watch.states[3]))


def test_three_bad_steps_in_a_row_end_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match='3 steps in a row') as error:
        run(config(tmp_path, MODEL={'NAME': 'TinyDenoiser', 'NAN_AT': [1, 2, 3]}))
    assert error.value.exit_code == 6


def test_two_bad_steps_with_a_good_one_between_do_not(tmp_path):
    assert run(config(tmp_path, MODEL={'NAME': 'TinyDenoiser', 'NAN_AT': [1, 2, 4, 5]})).step == 10


def test_the_gradient_is_clipped_by_its_global_norm(tmp_path):
    cfg = config(tmp_path, steps=1, GRADIENT_CLIP=1e-3, OPTIMIZER={'NAME': 'SGD', 'LR': 1.0}, LR_SCHEDULER=None, WARMUP_STEPS=0)
    solver = SOLVERS.build(cfg.SOLVER)
    solver.set_up()
    before = torch.cat([p.detach().flatten().clone() for p in solver.model.parameters()])
    solver.solve()
    moved = torch.cat([p.detach().flatten() for p in solver.model.parameters()]) - before
    assert solver.outputs['grad_norm'] > 1e-3
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


@MODELS.register_class()
class TwoLosses(TinyDenoiser):
    """The first layer follows one loss, the last layer another one that also depends on the first."""

    def forward_train(self, image, number, **batch):
        hidden = self.net[0](torch.cat([image, image[:, :1]], 1))
        return {'loss': hidden.square().mean(), 'other_loss': (self.net[3](hidden) - 1).square().mean()}


TWO = {'first': {'NAME': 'SGD', 'LR': 0.1, 'PARAMS': ['net.0.*']},
       'last': {'NAME': 'AdamW', 'LEARNING_RATE': 0.1, 'PARAMS': ['net.3.*'], 'LOSS': 'other_loss', 'EVERY': 2}}


def test_a_named_loss_reaches_only_what_its_own_optimizer_owns(tmp_path):
    solver = SOLVERS.build(config(tmp_path, MODEL={'NAME': 'TwoLosses'}, OPTIMIZER=TWO).SOLVER)
    solver.set_up()
    batch = {'image': torch.randn(4, 2), 'number': torch.arange(4)}
    first, last = solver.model.net[0].weight, solver.model.net[3].weight
    outputs = solver.model.forward_train(**batch)
    expected = torch.autograd.grad(outputs['loss'], first)[0], torch.autograd.grad(outputs['other_loss'], last)[0]
    solver.train_step._backward(solver.model.forward_train(**batch), solver.optimizers, 1)
    assert torch.allclose(first.grad, expected[0])
    assert torch.allclose(last.grad, expected[1])


def test_optimizers_that_follow_one_loss_share_one_backward_pass(tmp_path):
    both = {name: {'NAME': 'SGD', 'LR': 0.1, 'PARAMS': [f'{name}.*']} for name in ('net.0', 'net.3')}
    solver = SOLVERS.build(config(tmp_path, OPTIMIZER=both).SOLVER)
    solver.set_up()
    passes = []
    outputs = solver.model.forward_train(image=torch.randn(4, 2), number=torch.arange(4))
    outputs['loss'].register_hook(passes.append)
    solver.train_step._backward(outputs, solver.optimizers, 1)
    assert len(passes) == 1
    assert all(p.grad is not None for p in solver.model.parameters())


def test_a_named_optimizer_steps_at_its_own_pace(tmp_path):
    hooks = [{'NAME': 'CheckpointHook', 'INTERVAL': 1}]
    run(config(tmp_path, steps=3, MODEL={'NAME': 'TwoLosses'}, OPTIMIZER=TWO, TRAIN_HOOKS=hooks, LR_SCHEDULER=None))
    first = [groups(tmp_path, step)['model']['net.0.weight'] for step in (1, 2, 3)]
    last = [groups(tmp_path, step)['model']['net.3.weight'] for step in (1, 2, 3)]
    assert not torch.equal(first[0], first[1])
    assert torch.equal(last[0], last[1])
    assert not torch.equal(last[1], last[2])


def test_a_parameter_in_no_optimizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r'in no optimizer: net\.3\.weight'):
        run(config(tmp_path, OPTIMIZER={'a': {'NAME': 'SGD', 'LR': 0.1, 'PARAMS': ['net.0.*']}}))


def test_a_second_fresh_run_in_one_folder_is_refused(tmp_path):
    run(config(tmp_path, steps=2))
    with pytest.raises(CheckpointError, match='RESUME_FROM: auto'):
        run(config(tmp_path, steps=2))


def test_a_checkpoint_of_another_network_is_refused_by_name_and_shape(tmp_path):
    run(config(tmp_path, steps=2))
    with pytest.raises(CheckpointError, match=r'net.0.weight: shape \[8, 3\] expected, \[16, 3\] found'):
        run(config(tmp_path, steps=4, MODEL={'NAME': 'TinyDenoiser', 'WIDTH': 8}, RESUME_FROM='auto'), force=True)


def test_a_changed_config_is_told_on_resume(tmp_path, caplog):
    import logging
    logging.getLogger('scepter').propagate = True
    run(config(tmp_path, steps=2))
    run(config(tmp_path, steps=3, WARMUP_STEPS=1, RESUME_FROM='auto'), force=True)
    logging.getLogger('scepter').propagate = False
    assert 'SOLVER.WARMUP_STEPS: 3 -> 1' in caplog.text


@pytest.mark.parametrize(('changed', 'row'), [
    ({'MODEL': {'NAME': 'TinyDenoiser', 'DROPOUT': 0.5}}, 'SOLVER.MODEL.DROPOUT: absent -> 0.5'),
    ({'TRAIN_DATA': {'NAME': 'TinyPoints', 'BATCH_SIZE': 6, 'COUNT': 12}}, 'SOLVER.TRAIN_DATA.COUNT: absent -> 12'),
    ({'OPTIMIZER': {'NAME': 'AdamW', 'LEARNING_RATE': 1e-3}}, 'SOLVER.OPTIMIZER.LEARNING_RATE: 0.01 -> 0.001')])
def test_a_folder_of_another_run_is_refused_until_that_is_meant(tmp_path, changed, row):
    run(config(tmp_path, steps=2))
    with pytest.raises(CheckpointError, match='holds another run, up to step-00000002') as refused:
        run(config(tmp_path, steps=4, RESUME_FROM='auto', **changed))
    assert row in str(refused.value) and '--force' in str(refused.value)

    assert run(config(tmp_path, steps=4, RESUME_FROM='auto', **changed), force=True).step == 4


def test_what_makes_no_other_training_of_it_changes_freely(tmp_path):
    run(config(tmp_path, steps=2))
    data = {'NAME': 'TinyPoints', 'BATCH_SIZE': 3, 'NUM_WORKERS': 1, 'MAX_BAD_FRACTION': 0.5}
    free = {'TRAIN_DATA': data, 'KEEP_CHECKPOINTS': 5, 'EVAL_DATA': data, 'EVAL_INTERVAL': 3, 'TRAIN_HOOKS': [], 'GRADIENT_CLIP': None}

    assert run(config(tmp_path, steps=3, RESUME_FROM='auto', **free)).step == 3


def test_a_stop_signal_saves_the_step_and_ends_with_its_number(tmp_path):
    class StopAt4(Hook):
        def after_iter(self, solver):
            if solver.step == 4:
                signal.raise_signal(signal.SIGTERM)

    from scepter.core.signals import listening
    we.seed, we.stop_signal = 7, 0
    solver = SOLVERS.build(config(tmp_path).SOLVER)
    solver.hooks['train'].append(StopAt4({}))
    solver.set_up()
    try:
        with listening(), pytest.raises(Stopped) as stop:
            solver.solve()
    finally:
        we.stop_signal = 0
    assert stop.value.signal == signal.SIGTERM
    assert [p.name for p in (tmp_path / 'checkpoints').glob('step-*')] == ['step-00000004']


def test_hooks_run_in_list_order_at_their_moments(tmp_path):
    calls = []

    class Recorder(Hook):
        def __init__(self, name):
            super().__init__({})
            self.name = name

        def __getattribute__(self, name):
            if name.startswith(('before_', 'after_')):
                return lambda solver: calls.append((object.__getattribute__(self, 'name'), name))
            return object.__getattribute__(self, name)

    data = {'NAME': 'TinyPoints', 'BATCH_SIZE': 16}
    solver = SOLVERS.build(config(tmp_path, steps=2, EVAL_INTERVAL=2, EVAL_DATA=data, TRAIN_HOOKS=[]).SOLVER)
    solver.hooks['train'] = [Recorder('a'), Recorder('b')]
    solver.set_up()
    solver.solve()
    moments = [m for name, m in calls if name == 'a']
    assert moments == ['before_solve', 'before_all_iter', 'before_iter', 'after_iter', 'before_iter', 'after_iter',
                       'before_eval', 'after_eval', 'after_all_iter', 'after_solve']
    assert [name for name, _ in calls] == ['a', 'b'] * len(moments)


def test_after_solve_runs_also_after_an_error(tmp_path):
    ended = []

    class Fails(Hook):
        def after_iter(self, solver):
            raise RuntimeError('on purpose')

        def after_solve(self, solver):
            ended.append(True)

    solver = SOLVERS.build(config(tmp_path).SOLVER)
    solver.hooks['train'].append(Fails({}))
    solver.set_up()
    with pytest.raises(RuntimeError, match='on purpose'):
        solver.solve()
    assert ended == [True]


def test_the_best_checkpoint_and_every_nth_are_kept_when_others_go(tmp_path):
    hooks = [{'NAME': 'CheckpointHook', 'INTERVAL': 1, 'SAVE_BEST_BY': '-loss'}]
    solver = run(config(tmp_path, steps=8, TRAIN_HOOKS=hooks, KEEP_CHECKPOINTS=2, KEEP_EVERY=5, EVAL_INTERVAL=1,
                        OPTIMIZER={'NAME': 'SGD', 'LR': 1.6}, WARMUP_STEPS=0, LR_SCHEDULER=None,
                        EVAL_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 16}))
    kept = sorted(int(p.name[5:]) for p in (tmp_path / 'checkpoints').glob('step-*'))
    best = solver.hooks['train'][0].best_step
    assert kept == sorted({best, 5, 7, 8})


def test_a_test_run_writes_one_result_per_sample(tmp_path):
    run(config(tmp_path, steps=1, TEST_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 5}))
    rows = [json.loads(line) for line in (tmp_path / 'test_results' / 'results.jsonl').read_text().splitlines()]
    assert [r['number'] for r in rows] == list(range(16))


def test_logs_have_the_agreed_names(tmp_path):
    hooks = [{'NAME': 'LogHook', 'LOG_INTERVAL': 2}, {'NAME': 'TensorboardLogHook', 'LOG_INTERVAL': 2}]
    run(config(tmp_path, steps=4, TRAIN_HOOKS=hooks, EVAL_INTERVAL=4, EVAL_DATA={'NAME': 'TinyPoints', 'BATCH_SIZE': 16}))
    rows = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert {'train/loss', 'train/lr', 'train/grad_norm', 'perf/throughput', 'perf/data_wait', 'perf/memory'} <= rows[0].keys()
    assert 'val/loss' in rows[-1]
    assert list((tmp_path / 'tensorboard').glob('events*'))


def test_the_rate_of_each_optimizer_is_logged_as_it_is_and_not_as_a_mean(tmp_path):
    run(config(tmp_path, steps=4, MODEL={'NAME': 'TwoLosses'}, OPTIMIZER=TWO, TRAIN_HOOKS=[{'NAME': 'LogHook', 'LOG_INTERVAL': 4}],
               LR_SCHEDULER={'NAME': 'Linear', 'FINAL': 0.2}, WARMUP_STEPS=0))
    row, = (json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines())
    assert {k: v for k, v in row.items() if k.startswith('train/lr')} == pytest.approx({'train/lr': 0.02, 'train/lr_last': 0.02})


def test_bfloat16_weights_train_and_resume(tmp_path):
    settings = {'PARAM_DTYPE': 'bfloat16', 'LR_SCHEDULER': None}
    run(config(tmp_path / 'whole', steps=6, **settings))
    run(config(tmp_path / 'cut', steps=3, **settings))
    run(config(tmp_path / 'cut', steps=6, RESUME_FROM='auto', **settings))
    assert same(groups(tmp_path / 'whole', 6), groups(tmp_path / 'cut', 6))
    assert groups(tmp_path / 'whole', 6)['model']['net.0.weight'].dtype == torch.bfloat16
    assert groups(tmp_path / 'whole', 6)['ema']['net.0.weight'].dtype == torch.float32


def test_autocast_bfloat16_keeps_float32_weights(tmp_path):
    run(config(tmp_path, steps=2, DTYPE='bfloat16'))
    assert groups(tmp_path, 2)['model']['net.0.weight'].dtype == torch.float32
