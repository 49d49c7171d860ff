"""BaseSolver: the loop that trains any network. The solver owns the step, the network its loss, hooks the side concerns."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scepter.core import streams
from scepter.core.config import Config, masked
from scepter.core.disk import checkpoints
from scepter.core.env import Stopped, seed_everything, we
from scepter.core.errors import DataError
from scepter.core.faults import Fault
from scepter.core.images import is_figure, is_picture
from scepter.core.lock import WorkDirLock, refusals
from scepter.core.logger import get_logger, set_up_logging
from scepter.core.registry import DATASETS, HOOKS, LR_SCHEDULERS, METRICS, MODELS, OPTIMIZERS, SOLVERS
from scepter.core.schema import Component, param, part, parts
from scepter.data.loader import Loader
from scepter.solvers import console, evaluation, state
from scepter.solvers.optim import NamedOptimizer, OptimizerPlace, build_optimizers, rate_function
from scepter.solvers.state import Plan
from scepter.solvers.step import DTYPES, Batches, Outputs, TrainStep, best_dtype

MODES = ('train', 'eval', 'test')


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
        if (cfg.DTYPE, cfg.PARAM_DTYPE) == ('float16', 'bfloat16'):
            yield Fault('DTYPE', 'is float16, but PARAM_DTYPE is bfloat16: no kernel takes both; write DTYPE: bfloat16')
        if cfg.EVAL_INTERVAL and cfg.EVAL_DATA is None:
            yield Fault('EVAL_INTERVAL', f'is {cfg.EVAL_INTERVAL}, but there is no EVAL_DATA to evaluate on')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger or get_logger())
        self.experiment = Config({'SOLVER': cfg})    # the whole file; the door replaces it, so that a checkpoint can rebuild all
        self.work_dir = Path(self.WORK_DIR)
        self.lock = WorkDirLock(self.work_dir)
        self._mode_set = _modes(self.cfg)
        self.mode = 'train'
        self.step = 0        # steps of the optimizer
        self.samples = 0     # the clock: the number of the next sample in the endless stream
        self.is_resumed = False
        self.outputs: Outputs = {}
        self.eval_outputs: dict[str, float] = {}
        self.is_eval_due = False      # the evaluation of this step was cut off by a stop signal
        self.batches: Batches = []
        self.hooks = {mode: [HOOKS.build(c, logger=self.logger) for c in self.cfg[f'{mode.upper()}_HOOKS']] for mode in MODES}
        self.imports: Sequence[str] = ()    # the user's files that came along, for the command that draws
        self._logged: dict[str, Any] = {}
        self._save_reasons: list[str] = []
        self._saved_step: int | None = None
        self._seconds = {'step': 0.0, 'data': 0.0}

    # ---------------------------------------------------------------- building, in the documents' order
    def set_up(self) -> None:
        with refusals(self.work_dir):
            if we.is_main:
                self.lock.take()
            we.barrier()    # nobody writes into a folder that is not ours
            set_up_logging(self.work_dir, we.rank, we.debug)
            self.construct_data()
            self.logger.info(console.greeting(self))
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
            self._checkpoint = self._find_checkpoint()
            if self._checkpoint is not None:
                state.check(self._checkpoint)
            self.plan = Plan.of(self.cfg, self.datasets['train'].BATCH_SIZE, len(self.datasets['train']), we.world_size,
                                self._checkpoint.state if self._checkpoint is not None else None)

    def construct_model(self) -> None:
        self.model = MODELS.build(self.MODEL, logger=self.logger)

    def construct_metrics(self) -> None:
        self.metrics = [METRICS.build(c, logger=self.logger) for c in self.METRICS]

    def model_to_device(self) -> None:
        self.model.to(device=we.device, dtype=DTYPES[self.PARAM_DTYPE] if self.PARAM_DTYPE != 'float32' else None)
        if self.CHANNELS_LAST:
            self.model.to(memory_format=torch.channels_last)
        if self.COMPILE:
            streams.hide_from_compilers()
            self.model.compile_network()
        self.dtype = best_dtype(we.device) if self.DTYPE == 'auto' else DTYPES[self.DTYPE]

    def init_opti(self) -> None:
        self.optimizers: list[NamedOptimizer] = []
        if 'train' not in self._mode_set:
            return
        self.optimizers = build_optimizers(self.OPTIMIZER, self.model)
        self.train_step = TrainStep(self.model, self.optimizers, rate_function(self.LR_SCHEDULER, self.WARMUP_STEPS, self.max_steps),
                                    self.dtype, self.GRADIENT_CLIP, self.to_device)
        if self.COMPILE and len({o.loss for o in self.optimizers}) > 1:
            import torch._functorch.config
            # the graph is gone through once for each loss, so its first pass must not give its memory away
            torch._functorch.config.donated_buffer = False
        self.logger.info(console.sizes(self))

    # ---------------------------------------------------------------- running
    def solve(self) -> None:
        error, begin = None, time.monotonic()
        with refusals(self.work_dir), contextlib.closing(self.lock):
            try:
                self.before_solve()
                with we.saving_on_stop():
                    if 'train' in self._mode_set:
                        self.run_train()
                    if 'test' in self._mode_set:
                        self.run_test()
            except BaseException as caught:
                error = caught
                raise
            finally:
                self.after_solve(error)
        if we.is_main:
            self.logger.info(console.farewell(self, time.monotonic() - begin))

    def before_solve(self) -> None:
        if self._checkpoint is not None:
            self.load_checkpoint(self._checkpoint)
        elif 'train' not in self._mode_set and 'test' in self._mode_set:
            self.load_tested_weights()
        for mode in MODES:
            self._call('before_solve', mode)
        if 'train' not in self._mode_set and 'test' in self._mode_set and not self.is_resumed:
            self.model.refuse_unfilled()
        elif 'train' in self._mode_set and we.is_main:
            self.model.left_out()    # hashes the files that checkpoints will rely on, while they are the ones that were read

    def load_tested_weights(self) -> None:
        """For a run that only tests: the weights of RESUME_FROM, averaged where there are averages. Without one, those of files."""
        loaded = self._find_checkpoint()
        if loaded is None:
            return
        self.model.agree_on_sources()
        self.model.load_trained_state(loaded, use_ema=True)
        self.step, self.is_resumed = loaded.step, True
        self.logger.info(f'testing {loaded.path}, {"averaged" if "ema" in loaded.groups else "plain"} weights')

    def run_train(self) -> None:
        self.train_mode()
        self.before_all_iter()
        if self.is_eval_due and self.EVAL_INTERVAL:
            self.run_eval()
            self.save_if_requested()
        while self.step < self.max_steps:
            self.one_step()
        self.after_all_iter()

    def one_step(self) -> None:
        """Batches, a step of the optimizers, hooks, an evaluation where it is due, a checkpoint where one is asked for."""
        self.before_iter()
        self.outputs = self.run_step_train(self.batches)
        self.step, self.samples = self.step + 1, self.samples + self.plan.global_size
        self.after_iter()
        if self.EVAL_INTERVAL and self.step % self.EVAL_INTERVAL == 0:
            self.run_eval()
        self.save_if_requested()

    def run_step_train(self, batches: Batches) -> Outputs:
        """One step of the optimizers from ACCU_STEP batches (solvers/step.py)."""
        return self.train_step(batches, self.step)

    def run_eval(self) -> None:
        """Measure on EVAL_DATA (solvers/evaluation.py)."""
        evaluation.run_eval(self)

    def run_test(self) -> None:
        """Let the network draw or predict all of TEST_DATA, into WORK_DIR/test_results (solvers/evaluation.py)."""
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
            except Exception as caught:
                if error is None:
                    raise
                if isinstance(caught, OSError) and isinstance(error, OSError) and caught.errno == error.errno:
                    continue    # the same full disk, which is told already
                self.logger.exception('a hook failed while the run was ending after another error')

    # ---------------------------------------------------------------- moments
    def before_all_iter(self) -> None:
        self._loader = Loader(self.datasets['train'], self.plan.micro, seed=we.seed, rank=we.rank, world_size=we.world_size,
                              first=self.samples, skipped_file=self.work_dir / 'skipped.jsonl',
                              logger=self.logger)
        self._call('before_all_iter', 'train')

    def before_iter(self) -> None:
        self._begin = time.monotonic()
        seed_everything(we.seed, 'step', we.rank, self.step)    # for code that draws from torch's own generator: dropout, a user's network
        self.batches = [next(self._loader) for _ in range(self.plan.accu)]
        self._seconds['data'] = time.monotonic() - self._begin
        self._call('before_iter', 'train')

    def after_iter(self) -> None:
        self._seconds['step'] = time.monotonic() - self._begin
        self.log('perf/samples_per_sec', self.plan.global_size / max(1e-9, self._seconds['step']))
        self.log('perf/data_wait', self._seconds['data'] / max(1e-9, self._seconds['step']))
        self._call('after_iter', 'train')
        self.hand_out_log(self.outputs)

    def after_all_iter(self) -> None:
        self._call('after_all_iter', 'train')
        self.save_if_requested()

    def _call(self, moment: str, mode: str) -> None:
        for hook in self.hooks[mode]:
            getattr(hook, moment)(self)

    def log(self, name: str, value: Any) -> None:
        """Have hooks that write down what happens (LogHook, TensorboardLogHook, any with read_log) take this in.

        A figure (a number, a tensor of one element) or a picture ([3, H, W] in 0..1, or [H, W, 3] uint8), under `train/<name>`, in an
        evaluation under `val/<name>`; a name with a slash stays as it is. It is handed out when all hooks of the moment have run.
        """
        if not is_figure(value) and not is_picture(value):
            found = f'{type(value).__name__}{list(value.shape) if hasattr(value, "shape") else ""}'
            raise TypeError(f'log({name!r}, ...): {found} is neither a figure (a number, or a tensor of one element, such as a mean) nor a '
                            'picture ([3, H, W] in 0..1, or [H, W, 3] uint8)')
        prefix = 'val' if self.mode == 'eval' else self.mode
        self._logged[name if '/' in name else f'{prefix}/{name}'] = value.detach() if isinstance(value, Tensor) else value

    def hand_out_log(self, outputs: Outputs) -> None:
        """Show the training hooks every number of these outputs, and what was logged."""
        of_hooks, self._logged = self._logged, {}
        for name, value in outputs.items():
            if isinstance(value, (int, float)):
                self.log(name, value)
        logged, self._logged = {**self._logged, **of_hooks}, {}
        for hook in self.hooks['train']:
            hook.read_log(self, logged)

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

    @property
    def is_last_step_finite(self) -> bool:
        """Whether the step that has just run changed the weights."""
        return self.train_step.has_changed

    def ema_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the network has its averaged weights, where a hook keeps some."""
        return evaluation.ema_weights(self)

    @property
    def max_steps(self) -> int:
        """Steps in all; a hook that ends the run sets it to solver.step."""
        return self.plan.max_steps

    @max_steps.setter
    def max_steps(self, steps: int) -> None:
        self.plan = self.plan._replace(max_steps=steps)

    # ---------------------------------------------------------------- checkpoints
    def request_save(self, reason: str = 'asked for') -> None:
        """Have the solver save at the end of this step, after all hooks and the evaluation."""
        self._save_reasons.append(reason)

    def save_if_requested(self) -> None:
        """The one place that saves. A stop signal saves too, and then ends the run."""
        wish = we.any(2 * we.stop_signal + bool(self._save_reasons))    # of any process; one exchange for both questions
        stop = wish // 2
        if wish and self._saved_step != self.step:
            self.save_checkpoint()
        self._save_reasons = []
        if stop:
            self.logger.warning(f'asked to stop: saved step {self.step}; RESUME_FROM: auto goes on from here')
            raise Stopped(stop)

    def save_checkpoint(self) -> None:
        """Write WORK_DIR/checkpoints/step-<step>; the main process writes, the others wait."""
        if we.is_main:
            self.lock.check()
            begin = time.monotonic()
            groups, state = self.checkpoint_contents()
            path = checkpoints.save(self.work_dir / 'checkpoints', self.step, groups, state, masked(self.experiment).dump(),
                                    keep=self.KEEP_CHECKPOINTS, pinned=self._pinned_steps())
            self.logger.info(f'saved {path} in {time.monotonic() - begin:.1f} s')
        self._saved_step = self.step
        we.barrier()

    def checkpoint_contents(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by group, and the JSON state, of a checkpoint of this moment."""
        return state.contents(self)

    def load_checkpoint(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Go on exactly where a checkpoint was written: weights, optimizer, hooks, place in the data. Raises CheckpointError."""
        state.restore(self, checkpoint)
        self._saved_step, self.is_resumed = self.step, True
        self.logger.info(f'continuing {checkpoint.path} at step {self.step}')

    def _find_checkpoint(self) -> checkpoints.Checkpoint | None:
        """What RESUME_FROM means, in every process; the main one has read every byte of it, so that the others need not."""
        found = checkpoints.resolve(self.work_dir, self.RESUME_FROM) if we.is_main else None
        if we.is_main and 'train' in self._mode_set:
            checkpoints.preflight(self.work_dir / 'checkpoints')
        path = we.broadcast(str(found.path) if found is not None else None)
        return found if found is not None or path is None else checkpoints.load(path, verify='size')

    def _pinned_steps(self) -> list[int]:
        return [step for hook in self.hooks['train'] for step in hook.pinned_steps]

    _loader: Loader | None = None
    _checkpoint: checkpoints.Checkpoint | None = None
    _known_sources: dict[str, dict[str, Any]] | None = None


def _modes(cfg: Config) -> set[str]:
    """What a run does: what MODE says, else what there is data for."""
    return set(cfg.MODE) if cfg.MODE is not None else {mode for mode in ('train', 'test') if cfg[f'{mode.upper()}_DATA'] is not None}
