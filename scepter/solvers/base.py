"""BaseSolver: the loop that trains any network. The solver owns the step, the network its loss, hooks the side concerns."""
from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scepter.core import checkpoints, streams
from scepter.core.config import Config, ConfigError, Fault, masked, plain
from scepter.core.env import Stopped, seed_everything, we
from scepter.core.errors import CheckpointError, DataError, NonFiniteError
from scepter.core.logger import get_logger, set_up_logging
from scepter.core.registry import DATASETS, HOOKS, LR_SCHEDULERS, METRICS, MODELS, OPTIMIZERS, SOLVERS
from scepter.core.schema import Component, param, part, parts
from scepter.data.loader import Loader
from scepter.solvers import evaluation
from scepter.solvers.optim import NamedOptimizer, OptimizerPlace, build_optimizers, rate_function
from scepter.solvers.parallel import average_gradients

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
MODES = ('train', 'eval', 'test')
PATIENCE = 3     # steps in a row with a loss or gradient that is not finite, before the run gives up
Outputs = dict[str, Any]


@SOLVERS.register_class()
class BaseSolver(Component, base=True):
    """Trains, evaluates and tests a network; saves and resumes.    set_up() builds, solve() runs"""

    WORK_DIR: str = param(doc='Folder of this run: checkpoints, logs, pictures.')
    MODE: list[Literal['train', 'test']] | None = param(None, 'What to do; default train where there is TRAIN_DATA, test where TEST_DATA.')
    MODEL: dict = part(MODELS, 'The network.')
    TRAIN_DATA: dict | None = part(DATASETS, 'What to train on.', default=None)
    EVAL_DATA: dict | None = part(DATASETS, 'What to evaluate on during training.', default=None)
    TEST_DATA: dict | None = part(DATASETS, 'What to draw or predict after training, or alone.', default=None)

    MAX_STEPS: int | None = param(None, 'Steps of the optimizer in all.', least=1)
    MAX_EPOCHS: float | None = param(None, 'A second way to say MAX_STEPS: how often each sample is seen.', above=0)
    ACCU_STEP: int = param(1, 'Batches of each process that make one step of the optimizer.', least=1)
    GLOBAL_BATCH_SIZE: int | None = param(None, 'Samples of one step over all processes; wins over BATCH_SIZE and ACCU_STEP.', least=1)
    OPTIMIZER: dict | None = part(OPTIMIZERS, 'One optimizer, or a map of named ones.', default=None, place=OptimizerPlace)
    LR_SCHEDULER: dict | None = part(LR_SCHEDULERS, 'How the rate changes over the run; default constant.', default=None)
    WARMUP_STEPS: int = param(0, 'Steps over which the rate rises from nothing.', least=0)
    GRADIENT_CLIP: float | None = param(None, 'Largest global norm of the gradient.', above=0)

    DTYPE: Literal['float32', 'bfloat16', 'float16', 'auto'] = param(
        'float32', 'Type of the arithmetic (autocast); auto: bfloat16 where the processor computes in it.')
    PARAM_DTYPE: Literal['float32', 'bfloat16'] = param('float32', 'Type of the weights, and so of gradients and optimizer state.')
    CHANNELS_LAST: bool = param(False, 'Lay images out with channels last, which convolutions like.')
    COMPILE: bool = param(False, 'Compile the network with torch.compile.')

    EVAL_INTERVAL: int = param(0, 'Steps between evaluations; 0 for none.', least=0)
    EVAL_LOSS: bool = param(True, 'In an evaluation, also compute the loss, at fixed levels and noise.')
    METRICS: list = parts(METRICS, 'What an evaluation measures.')
    TRAIN_HOOKS: list = parts(HOOKS, 'Side concerns of training.')
    EVAL_HOOKS: list = parts(HOOKS, 'Side concerns of evaluation.')
    TEST_HOOKS: list = parts(HOOKS, 'Side concerns of testing.')
    RESUME_FROM: str | None = param(None, 'Absent: a fresh run. auto: the newest checkpoint, else fresh. latest: the newest. A path: that.')
    KEEP_CHECKPOINTS: int | None = param(None, 'How many of the newest checkpoints to keep; default all.', least=1)

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        modes = _modes(cfg)
        if not modes:
            yield Fault('', 'nothing to do: give TRAIN_DATA, or TEST_DATA')
        for mode in modes:
            if cfg[f'{mode.upper()}_DATA'] is None:
                yield Fault('MODE', f'has {mode}, but there is no {mode.upper()}_DATA')
        if 'train' not in modes:
            return
        if (cfg.MAX_STEPS is None) == (cfg.MAX_EPOCHS is None):
            how = 'neither is given' if cfg.MAX_STEPS is None else f'they are {cfg.MAX_STEPS} and {cfg.MAX_EPOCHS:g}; null takes one away'
            yield Fault('MAX_STEPS', f'give one of MAX_STEPS and MAX_EPOCHS: {how}')
        if cfg.OPTIMIZER is None:
            yield Fault('OPTIMIZER', 'is needed to train, e.g. {NAME: AdamW, LEARNING_RATE: 1e-4}')
        if cfg.EVAL_INTERVAL and cfg.EVAL_DATA is None:
            yield Fault('EVAL_INTERVAL', f'is {cfg.EVAL_INTERVAL}, but there is no EVAL_DATA to evaluate on')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger or get_logger())
        self.experiment = Config({'SOLVER': cfg})    # the whole file; the door replaces it, so that a checkpoint can rebuild all
        self.work_dir = Path(self.WORK_DIR)
        self._mode_set = _modes(self.cfg)
        self.mode = 'train'
        self.step = 0
        self.outputs: Outputs = {}
        self.eval_outputs: dict[str, float] = {}
        self.batches: list[tuple[dict[str, Any], Tensor]] = []
        self.hooks = {mode: [HOOKS.build(c, logger=self.logger) for c in self.cfg[f'{mode.upper()}_HOOKS']] for mode in MODES}
        self._save_reasons: list[str] = []
        self._saved_step: int | None = None
        self._bad_steps = 0
        self._seconds = {'step': 0.0, 'data': 0.0}

    # ---------------------------------------------------------------- building, in the documents' order
    def set_up(self) -> None:
        set_up_logging(self.work_dir, we.rank, we.debug)
        self.construct_data()
        self.construct_model()
        self.construct_metrics()
        self.model_to_device()
        self.init_opti()

    def construct_data(self) -> None:
        """Datasets of each mode, and how a step is cut into micro-batches and processes."""
        def build(cfg: Config | None) -> Any:
            return None if cfg is None else DATASETS.build(cfg, logger=self.logger)

        self.datasets = {'train': build(self.TRAIN_DATA) if 'train' in self._mode_set else None,
                         'eval': build(self.EVAL_DATA) if 'train' in self._mode_set and self.EVAL_INTERVAL else None,
                         'test': build(self.TEST_DATA) if 'test' in self._mode_set else None}
        if self.datasets['train'] is not None:
            if len(self.datasets['train']) == 0:
                raise DataError('TRAIN_DATA holds no sample')
            self._cut_batch(self.GLOBAL_BATCH_SIZE)
            self.max_steps = self._count_steps()

    def construct_model(self) -> None:
        self.model = MODELS.build(self.MODEL, logger=self.logger)

    def construct_metrics(self) -> None:
        self.metrics = [METRICS.build(c, logger=self.logger) for c in self.METRICS]

    def model_to_device(self) -> None:
        self.model.to(device=we.device, dtype=DTYPES[self.PARAM_DTYPE] if self.PARAM_DTYPE != 'float32' else None)
        if self.CHANNELS_LAST:
            self.model.to(memory_format=torch.channels_last)
        if self.COMPILE:
            self.model.compile_network()
        self.dtype = _best_dtype(we.device) if self.DTYPE == 'auto' else DTYPES[self.DTYPE]

    def init_opti(self) -> None:
        self.optimizers: list[NamedOptimizer] = []
        if 'train' not in self._mode_set:
            return
        self.optimizers = build_optimizers(self.OPTIMIZER, self.model)
        self.factor = rate_function(self.LR_SCHEDULER, self.WARMUP_STEPS, self.max_steps)
        self.scaler = torch.amp.GradScaler(we.device.type, enabled=self.dtype == torch.float16)
        trained = sum(p.numel() for o in self.optimizers for p in o.owned.values())
        total = sum(p.numel() for p in self.model.parameters())
        self.logger.info(f'{type(self.model).__name__}: {total:,} parameters, {trained:,} trained, '
                         f'{self.global_batch_size} samples a step, {self.max_steps} steps on {we.world_size} x {we.device}')

    # ---------------------------------------------------------------- running
    def solve(self) -> None:
        error = None
        try:
            self.before_solve()
            if 'train' in self._mode_set:
                self.run_train()
            if 'test' in self._mode_set:
                self.run_test()
        except BaseException as caught:
            error = caught
            raise
        finally:
            self.after_solve(error)

    def before_solve(self) -> None:
        if 'train' in self._mode_set:
            we_resume = checkpoints.resolve(self.work_dir, self.RESUME_FROM) if we.is_main else None
            path = we.broadcast(str(we_resume.path) if we_resume else None)
            if we.is_main:
                checkpoints.preflight(self.work_dir / 'checkpoints')
            if path is not None:
                self.load_checkpoint(path)
        for mode in MODES:
            self._call('before_solve', mode)

    def run_train(self) -> None:
        self.train_mode()
        self.before_all_iter()
        while self.step < self.max_steps:
            self.before_iter()
            self.outputs = self.run_step_train(self.batches)
            self.step += 1
            self.after_iter()
            if self.EVAL_INTERVAL and self.step % self.EVAL_INTERVAL == 0:
                self.run_eval()
            self.save_if_requested()
        self.after_all_iter()

    def run_step_train(self, batches: list[tuple[dict[str, Any], Tensor]]) -> Outputs:
        """One step of the optimizer from ACCU_STEP batches. A step whose loss or gradient is not finite changes nothing.

        Answers the network's outputs for the last batch, its scalars averaged over batches and processes, plus lr and grad_norm.
        """
        totals: dict[str, Tensor] = {}
        for batch, n in batches:
            with streams.current(we.seed, n, self.step), self.autocast():
                outputs = self.model.forward_train(**self.to_device(batch))
            for key, value in outputs.items():
                if isinstance(value, Tensor) and value.ndim == 0:
                    totals[key] = totals.get(key, 0) + value.detach().float() / len(batches)
            self._backward(outputs, len(batches))
        due = [o for o in self.optimizers if self.step % o.every == 0]
        parameters = [p for o in due for p in o.owned.values()]
        average_gradients(parameters)
        for o in due:
            self.scaler.unscale_(o.optimizer) if self.scaler.is_enabled() else None
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        names = list(totals)
        # the step's one look at the device
        figures = we.all_reduce(torch.stack([*totals.values(), norm.float().to(we.device)]), 'mean').tolist()
        scalars = dict(zip([*names, 'grad_norm'], figures))
        if self._is_finite(scalars):
            self._update(due, parameters, norm, scalars['grad_norm'])
        for o in due:
            o.zero_grad()
        rates = {f'lr_{o.name}' if i else 'lr': o.rate for i, o in enumerate(self.optimizers)}
        return {**{k: v for k, v in outputs.items() if k not in totals}, **scalars, **rates}

    def run_eval(self) -> None:
        """Measure on EVAL_DATA (solvers/evaluation.py)."""
        evaluation.run_eval(self)

    def run_test(self) -> None:
        """Let the network draw or predict all of TEST_DATA, into WORK_DIR/test_results/ (solvers/evaluation.py)."""
        evaluation.run_test(self)

    def test_arguments(self) -> dict[str, Any]:
        """What forward_test is given beside the batch."""
        return {}

    def after_solve(self, error: BaseException | None = None) -> None:
        if self._loader is not None:
            self._loader.close()
        for mode in MODES:
            try:
                self._call('after_solve', mode)
            except Exception:
                if error is None:
                    raise
                self.logger.exception('a hook failed while the run was ending after another error')

    # ---------------------------------------------------------------- moments
    def before_all_iter(self) -> None:
        self._loader = Loader(self.datasets['train'], self.micro_batch_size, seed=we.seed, rank=we.rank, world_size=we.world_size,
                              accu_step=self.accu_step, start_step=self.step, skipped_file=self.work_dir / 'skipped.jsonl',
                              logger=self.logger)
        self._call('before_all_iter', 'train')

    def before_iter(self) -> None:
        self._begin = time.monotonic()
        seed_everything(we.seed, 'step', we.rank, self.step)    # for code that draws from torch's own generator: dropout, a user's network
        self.batches = [next(self._loader) for _ in range(self.accu_step)]
        self._seconds['data'] = time.monotonic() - self._begin
        self._call('before_iter', 'train')

    def after_iter(self) -> None:
        self._seconds['step'] = time.monotonic() - self._begin
        self.outputs['samples_per_sec'] = self.global_batch_size / max(1e-9, self._seconds['step'])
        self.outputs['data_wait'] = self._seconds['data'] / max(1e-9, self._seconds['step'])
        self._call('after_iter', 'train')

    def after_all_iter(self) -> None:
        self._call('after_all_iter', 'train')
        self.save_if_requested()

    def _call(self, moment: str, mode: str) -> None:
        for hook in self.hooks[mode]:
            getattr(hook, moment)(self)

    def train_mode(self) -> None:
        self._set_mode('train')

    def eval_mode(self) -> None:
        self._set_mode('eval')

    def test_mode(self) -> None:
        self._set_mode('test')

    def _set_mode(self, mode: str) -> None:
        self.mode = mode
        self.model.train(mode == 'train')

    # ---------------------------------------------------------------- a step's parts
    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(we.device.type, self.dtype)

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            layout = torch.channels_last if self.CHANNELS_LAST and value.ndim == 4 else torch.preserve_format
            kind = DTYPES[self.PARAM_DTYPE] if self.PARAM_DTYPE != 'float32' and value.is_floating_point() else value.dtype
            return value.to(we.device, kind, non_blocking=True, memory_format=layout)

        return {key: move(value) for key, value in batch.items()}

    def _backward(self, outputs: Outputs, parts: int) -> None:
        followers: dict[str, list[Tensor]] = {}    # one pass for each loss, however many optimizers follow it
        for o in self.optimizers:
            if o.loss not in outputs:
                raise ConfigError(f'the optimizer {o.name} follows {o.loss}, but {type(self.model).__name__}.forward_train gave '
                                  f'{", ".join(outputs)}')
            followers.setdefault(o.loss, []).extend(o.owned.values())
        for i, (name, owned) in enumerate(followers.items()):
            loss = self.scaler.scale(outputs[name] / parts)
            if len(followers) == 1:
                loss.backward()
            elif loss.requires_grad:    # each loss reaches only what its own optimizers own
                loss.backward(inputs=owned, retain_graph=i + 1 < len(followers))

    def _is_finite(self, scalars: dict[str, float]) -> bool:
        losses = [scalars[o.loss] for o in self.optimizers]
        if all(math.isfinite(v) for v in losses) and (math.isfinite(scalars['grad_norm']) or self.scaler.is_enabled()):
            self._bad_steps = 0
            return True
        self._bad_steps += 1
        shown = ', '.join(f'{k} {v:g}' for k, v in scalars.items())
        self.logger.warning(f'step {self.step}: not finite ({shown}); weights, optimizer and EMA stay as they were '
                            f'({self._bad_steps} of {PATIENCE})')
        if self._bad_steps >= PATIENCE:
            numbers = ', '.join(str(int(v)) for _, n in self.batches for v in n[:8])
            raise NonFiniteError(f'{PATIENCE} steps in a row were not finite, the last at step {self.step} (samples {numbers}, ...). '
                                 'Lower the learning rate, set GRADIENT_CLIP, or look at these samples; the last checkpoint is intact')
        return False

    def _update(self, due: list[NamedOptimizer], parameters: list[Tensor], norm: Tensor, norm_value: float) -> None:
        if self.GRADIENT_CLIP is not None and norm_value > self.GRADIENT_CLIP:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.GRADIENT_CLIP, norm, foreach=True)
        for o in self.optimizers:
            o.set_rate(self.factor(self.step))
        for o in due:
            self.scaler.step(o.optimizer) if self.scaler.is_enabled() else o.step()
        if self.scaler.is_enabled():
            self.scaler.update()

    @property
    def is_last_step_finite(self) -> bool:
        """Whether the step that has just run changed the weights."""
        return self._bad_steps == 0

    def ema_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the network has its averaged weights, where a hook keeps some."""
        return evaluation.ema_weights(self)

    # ---------------------------------------------------------------- sizes
    def _cut_batch(self, global_size: int | None) -> None:
        """micro_batch_size (of one process) and accu_step, so that a step covers global_size samples."""
        micro, self.accu_step = self.datasets['train'].BATCH_SIZE, self.ACCU_STEP
        if global_size is None:
            self.micro_batch_size, self.global_batch_size = micro, micro * self.accu_step * we.world_size
            return
        if global_size % we.world_size:
            fitting = [w for w in range(1, 2 * we.world_size) if global_size % w == 0]
            raise ConfigError(f'a global batch of {global_size} cannot be shared by {we.world_size} processes evenly: '
                              f'use {", ".join(map(str, fitting))}')
        share = global_size // we.world_size
        self.accu_step = next(a for a in range(max(1, math.ceil(share / micro)), share + 1) if share % a == 0)
        self.micro_batch_size, self.global_batch_size = share // self.accu_step, global_size

    def _count_steps(self) -> int:
        if self.MAX_STEPS is not None:
            return self.MAX_STEPS
        return math.ceil(len(self.datasets['train']) * self.MAX_EPOCHS / self.global_batch_size)

    # ---------------------------------------------------------------- checkpoints
    def request_save(self, reason: str = 'asked for') -> None:
        """Have the solver save at the end of this step, after all hooks and the evaluation."""
        self._save_reasons.append(reason)

    def save_if_requested(self) -> None:
        """The one place that saves. A stop signal saves too, and then ends the run."""
        stop = we.any(we.stop_signal)
        if (self._save_reasons or stop) and self._saved_step != self.step:
            self.save_checkpoint()
        self._save_reasons = []
        if stop:
            self.logger.warning(f'asked to stop: saved step {self.step}; RESUME_FROM: auto goes on from here')
            raise Stopped(stop)

    def save_checkpoint(self) -> None:
        """Write WORK_DIR/checkpoints/step-<step>; the main process writes, the others wait."""
        if we.is_main:
            begin = time.monotonic()
            groups, state = self.checkpoint_contents()
            path = checkpoints.save(self.work_dir / 'checkpoints', self.step, groups, state, masked(self.experiment).dump(),
                                    keep=self.KEEP_CHECKPOINTS, pinned=self._pinned_steps())
            self.logger.info(f'saved {path} in {time.monotonic() - begin:.1f} s')
        self._saved_step = self.step
        we.barrier()

    def checkpoint_contents(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by group, and the JSON state, of a checkpoint of this moment."""
        groups = {'model': self.model.trained_state(),
                  'optimizer': {f'{o.name}/{key}': value for o in self.optimizers for key, value in o.state_tensors().items()}}
        hooks: dict[str, Any] = {}
        for name, hook in self._named_hooks():
            hooks[name] = hook.state_dict()
            tensors = hook.state_tensors()
            if tensors:
                groups[getattr(hook, 'group', name)] = tensors
        state = {'step': self.step, 'seed': we.seed, 'global_batch_size': self.global_batch_size, 'world_size': we.world_size,
                 'scaler': self.scaler.state_dict() if self.scaler.is_enabled() else {}, 'hooks': hooks, 'sources': self._sources()}
        return groups, state

    def load_checkpoint(self, checkpoint: str | Path) -> None:
        """Go on exactly where a checkpoint was written: weights, optimizer, hooks, place in the data. Raises CheckpointError."""
        loaded = checkpoints.load(checkpoint)
        state = loaded.state
        self.model.load_trained_state(loaded.group('model'), str(loaded.path))
        tensors = loaded.group('optimizer') if 'optimizer' in loaded.groups else {}
        for o in self.optimizers:
            own = {key[len(o.name) + 1:]: value for key, value in tensors.items() if key.startswith(f'{o.name}/')}
            missing = o.load_state_tensors(own)
            if missing and own:
                raise CheckpointError(f'{loaded.path}: the optimizer {o.name} has no state for {", ".join(missing[:5])}'
                                      f'{" ..." if len(missing) > 5 else ""}; this config trains other parameters')
        if self.scaler.is_enabled() and state['scaler']:
            self.scaler.load_state_dict(state['scaler'])
        for name, hook in self._named_hooks():
            group = getattr(hook, 'group', name)
            if name in state['hooks']:
                hook.load_state_dict(state['hooks'][name], loaded.group(group) if group in loaded.groups else {})
        self.step = state['step']
        if we.seed != state['seed']:
            self.logger.warning(f'ENV.SEED is {we.seed}, but {loaded.path} was trained with {state["seed"]}: going on with that one')
            we.seed = state['seed']
        if self.GLOBAL_BATCH_SIZE is None:
            self._cut_batch(state['global_batch_size'])
        now, then = self._sources(), state['sources']
        changed = [name for name in now if name in then and now[name].get('sha256') != then[name].get('sha256')]
        if changed:
            raise CheckpointError(f'{loaded.path} was trained beside other weights than those that are there now: '
                                  + ', '.join(f'{name} from {now[name]["path"]}' for name in changed))
        self._note_changes(Config.parse(loaded.config, environment=False))
        self._saved_step = self.step
        self.logger.info(f'continuing {loaded.path} at step {self.step}')

    def _named_hooks(self) -> list[tuple[str, Any]]:
        """Training hooks under their NAME, and #2, #3, ... where one stands several times."""
        seen: dict[str, int] = {}
        named = []
        for hook in self.hooks['train']:
            name = type(hook).__name__
            seen[name] = seen.get(name, 0) + 1
            named.append((name if seen[name] == 1 else f'{name}#{seen[name]}', hook))
        return named

    def _pinned_steps(self) -> list[int]:
        return [step for hook in self.hooks['train'] for step in getattr(hook, 'pinned_steps', [])]

    def _sources(self) -> dict[str, dict[str, Any]]:
        """The files that frozen parts come from, hashed once a run."""
        if self._known_sources is None:
            self._known_sources = self.model.frozen_sources()
        return self._known_sources

    def _note_changes(self, before: Config) -> None:
        old, new = _leaves(plain(before.get('SOLVER', {}))), _leaves(plain(masked(self.experiment).get('SOLVER', {})))
        changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and not k.startswith('RESUME_FROM'))
        if changed:
            rows = [f'  SOLVER.{k}: {old.get(k, "absent")} -> {new.get(k, "absent")}' for k in changed[:20]]
            self.logger.warning('the config has changed since this checkpoint:\n' + '\n'.join(rows))

    _loader: Loader | None = None
    _known_sources: dict[str, dict[str, Any]] | None = None


def _modes(cfg: Config) -> set[str]:
    """What a run does: what MODE says, else what there is data for."""
    return set(cfg.MODE) if cfg.MODE is not None else {mode for mode in ('train', 'test') if cfg[f'{mode.upper()}_DATA'] is not None}


def _leaves(value: Any, path: str = '') -> dict[str, Any]:
    if isinstance(value, (dict, list)) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, below in entries for k, v in _leaves(below, f'{path}.{key}' if path else str(key)).items()}
    return {path: value}


def _best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes in it; elsewhere it is emulated, and slower than float32."""
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == 'cpu':
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32
    return torch.float32
