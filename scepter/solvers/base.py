"""BaseSolver: the loop that trains any network. The solver owns the step, the network its loss, hooks the side concerns."""
from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from scepter.core import pulse, streams
from scepter.core.config import Config
from scepter.core.disk import checkpoints
from scepter.core.env import Stopped, seed_everything, we
from scepter.core.errors import CheckpointError, DataError
from scepter.core.lock import refusals
from scepter.core.logger import set_up_logging
from scepter.core.registry import DATASETS, METRICS, MODELS, SOLVERS
from scepter.core.stores import FS
from scepter.core.stores.mirror import newest_at
from scepter.data.loader import Loader
from scepter.solvers import caching, console, evaluation, lightning, parallel, state
from scepter.solvers.optim import build_optimizers, rate_function
from scepter.solvers.plan import Plan
from scepter.solvers.run import MODES, Run
from scepter.solvers.saving import Saver
from scepter.solvers.speed import Speed
from scepter.solvers.step import DTYPES, Batches, Outputs, TrainStep, arithmetic

SAVE_FAILED = 1 << 16    # beyond what a stop signal can say


@SOLVERS.register_class()
class BaseSolver(Run, base=True):
    """Trains, evaluates and tests a network; saves and resumes.    set_up() builds, solve() runs"""

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self._loader: Loader | None = None
        self._checkpoint: checkpoints.Checkpoint | None = None    # what the run goes on from
        self._saved_step: int | None = None
        self._saver = Saver(self.ASYNC_SAVE, self.logger)
        self.speed = Speed()

    # ---------------------------------------------------------------- building, in the documents' order
    def set_up(self) -> None:
        """Build everything in the order of the documents. Nothing is written before WORK_DIR is ours."""
        with refusals(self.work_dir):
            if we.is_main:
                self.lock.take()
                if self.mirror is not None:
                    self.mirror.begin(self.RESUME_FROM, self.kept)
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
                         'test': build(self.TEST_DATA) if 'test' in self._mode_set else None}
        for one in self.evaluations.values():
            one.dataset = build(one.DATA)
            if len(one.dataset) == 0:
                raise DataError(f'{one.place} holds no sample')
        if self.datasets['train'] is not None:
            if len(self.datasets['train']) == 0:
                raise DataError('TRAIN_DATA holds no sample')
            self._checkpoint = self._find_checkpoint()
            if self._checkpoint is not None:
                state.check(self._checkpoint)
                if self.RESUME_FROM in ('auto', 'latest') and not self.is_forced:
                    state.refuse_another_run(self, self._checkpoint)
            self.plan = Plan.of(self.cfg, self.datasets['train'].BATCH_SIZE, len(self.datasets['train']), we.world_size,
                                self._checkpoint.state if self._checkpoint is not None else None)

    def construct_model(self) -> None:
        """The network, on the CPU, with the weights that its own config names."""
        self.model = MODELS.build(self.MODEL, logger=self.logger)

    def construct_metrics(self) -> None:
        """What evaluations measure."""
        for one in self.evaluations.values():
            one.metrics = [METRICS.build(c, logger=self.logger) for c in one.METRICS]

    def model_to_device(self) -> None:
        """Move the network, or its share of it, in PARAM_DTYPE and its memory layout, and compile it where that is asked for."""
        self.dtype = arithmetic(self.DTYPE)
        if self.CACHE.FOLDER is not None and 'train' in self._mode_set:
            caching.prepare(self)
        kind = DTYPES[self.PARAM_DTYPE] if self.PARAM_DTYPE != 'float32' else None
        is_sharded = self.PARALLEL == 'fsdp' and we.is_distributed and 'train' in self._mode_set
        self.model.to(device=None if is_sharded else we.device, dtype=kind)    # of shares, no device ever holds the whole
        if self.SYNC_BATCH_NORM and we.is_distributed and 'train' in self._mode_set:
            self.model = parallel.with_shared_statistics(self.model)
        if self.CHANNELS_LAST and not is_sharded:    # a share of a weight has no layout; pictures have it
            self.model.lay_channels_last()
        if self.COMPILE:
            pulse.hear_compiler()
            streams.hide_from_compilers()
            parallel.compile_blocks(self.model) if is_sharded else self.model.compile_network()
        if is_sharded:
            parallel.shard(self.model, self.dtype)

    def init_opti(self) -> None:
        """The optimizers, and the step that uses them."""
        self.optimizers = []
        if 'train' not in self._mode_set:
            return
        self.optimizers = build_optimizers(self.OPTIMIZER, self.model)
        if parallel.is_sharded(self.model):
            parallel.refuse_unfit(self.optimizers)
        rate = rate_function(self.LR_SCHEDULER, self.WARMUP_STEPS, self.max_steps, self.WARMUP_FACTOR)
        self.train_step = TrainStep(self.model, self.optimizers, rate, self.dtype, self.GRADIENT_CLIP, self.to_device)
        if self.COMPILE and len({o.loss for o in self.optimizers}) > 1:
            import torch._functorch.config
            # the graph is gone through once for each loss, so its first pass must not give its memory away
            torch._functorch.config.donated_buffer = False
        self.logger.info(console.sizes(self))

    # ---------------------------------------------------------------- running
    def solve(self) -> None:
        """Run what MODE says, from the checkpoint of RESUME_FROM on; hooks hear of the end also after an error."""
        error, begin = None, time.monotonic()
        with self.mirror or contextlib.nullcontext(), refusals(self.work_dir), contextlib.closing(self.lock):
            try:
                self.before_solve()
                with we.saving_on_stop():
                    if 'train' in self._mode_set:
                        self.run_train()
                        self._saver.wait()
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
        """Load the checkpoint, or the weights to test; then the hooks, which may load others."""
        if self._checkpoint is not None:
            self.load_checkpoint(self._checkpoint)
        elif 'train' not in self._mode_set and 'test' in self._mode_set:
            self.load_tested_weights()
        for mode in MODES:
            self.call_hooks('before_solve', mode)
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
        """The loop. An evaluation that a stop signal cut off comes first."""
        pulse.enter('start')
        self.train_mode()
        self.before_all_iter()
        if self.evals_due:    # a stop signal had cut them off; the checkpoint of this step is written anew, or they would be made twice
            self._saved_step = None
            self.request_save('evaluations')
            self.run_eval()
            self.save_if_requested()
        if we.use_pl:
            lightning.run_steps(self.one_step, lambda: self.step >= self.max_steps, self.work_dir)
        else:
            while self.step < self.max_steps:
                self.one_step()
        self.after_all_iter()

    def one_step(self) -> None:
        """Batches, a step of the optimizers, hooks, the evaluations that are due, a checkpoint where one is asked for."""
        pulse.enter('first_step' if pulse.phase_name == 'start' else 'step')
        pulse.at(self.step)
        self.before_iter()
        self.outputs = self.run_step_train(self.batches)
        self.step, self.samples = self.step + 1, self.samples + self.plan.global_size
        self.after_iter()
        self.evals_due = [name for name, one in self.evaluations.items() if self.step % one.INTERVAL == 0]
        if self.evals_due:
            self.run_eval()
        self.save_if_requested()

    def run_step_train(self, batches: Batches) -> Outputs:
        """One step of the optimizers from ACCU_STEP batches (solvers/step.py)."""
        return self.train_step(batches, self.step, self.speed.own)

    def run_eval(self) -> None:
        """Make the evaluations that are due; where none is, all (solvers/evaluation.py)."""
        evaluation.run_eval(self)

    def run_test(self) -> None:
        """Let the network draw or predict all of TEST_DATA, into WORK_DIR/test_results (solvers/evaluation.py)."""
        evaluation.run_test(self)

    def after_solve(self, error: BaseException | None = None) -> None:
        """End the workers and tell the hooks. error: what ended the run, if anything did."""
        with pulse.phase('saving'):
            self._saver.end(error)
        pulse.enter('end')
        if self._loader is not None:
            self._loader.close()
        for mode in MODES:
            try:
                self.call_hooks('after_solve', mode)
            except Exception as caught:
                if error is None:
                    raise
                if isinstance(caught, OSError) and isinstance(error, OSError) and caught.errno == error.errno:
                    continue    # the same full disk, which is told already
                self.logger.exception('a hook failed while the run was ending after another error')

    # ---------------------------------------------------------------- moments
    def before_all_iter(self) -> None:
        """Begin the stream of samples at self.samples, then the hooks."""
        self._loader = Loader(self.datasets['train'], self.plan.micro, seed=we.seed, rank=we.rank, world_size=we.world_size,
                              first=self.samples, step=self.plan.global_size, skipped_file=self.work_dir / 'skipped.jsonl',
                              logger=self.logger)
        self.call_hooks('before_all_iter', 'train')

    def before_iter(self) -> None:
        """Take the step's batches, then the hooks."""
        seed_everything(we.seed, 'step', we.rank, self.step)    # for code that draws from torch's own generator: dropout, a user's network
        begin = time.monotonic()
        with pulse.phase('data'):
            self.batches = [next(self._loader) for _ in range(self.plan.accu)]
        self.speed.fetched(time.monotonic() - begin)
        self.speed.count(self)
        self.call_hooks('before_iter', 'train')

    def after_iter(self) -> None:
        """Note the speed, then the hooks, then what was logged."""
        for name, value in self.speed.of_step(self, self.train_step.everybody or [self.speed.own]).items():
            self.log(name, value)
        self.call_hooks('after_iter', 'train')
        self.hand_out_log(self.outputs)

    def after_all_iter(self) -> None:
        """The hooks; then save where one asked for it."""
        self.call_hooks('after_all_iter', 'train')
        self.save_if_requested()

    # ---------------------------------------------------------------- checkpoints
    def save_if_requested(self) -> None:
        """The one place that saves. A stop signal saves too, and then ends the run."""
        # of any process; one exchange for all questions
        wish = we.any(SAVE_FAILED * self._saver.has_failed + 2 * we.stop_signal + bool(self._save_reasons))
        if wish >= SAVE_FAILED:
            self._saver.wait()    # raises in all, since they write together
            raise CheckpointError('the last checkpoint was not written, and another process says why')
        stop = wish // 2
        if not stop:
            self.evals_due = []    # a run_eval of a user's own need not keep count
        if wish and self._saved_step != self.step:
            self.save_checkpoint()
        self._save_reasons = []
        if stop:
            self._saver.wait()
            self.logger.warning(f'asked to stop: saved step {self.step}; RESUME_FROM: auto goes on from here')
            raise Stopped(stop)

    def save_checkpoint(self) -> None:
        """Write WORK_DIR/checkpoints/step-<step>; all processes take part."""
        if we.is_main:
            self.lock.check()
            if self.mirror is not None:
                self.mirror.check()
        with pulse.phase('saving'):
            self._saver.save(lambda line: state.to_save(self, self.work_dir / 'checkpoints', line))
        self._saved_step = self.step

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
        resume_from = self.RESUME_FROM
        if we.is_main and resume_from is not None and '://' in resume_from:
            resume_from = FS.get_dir_to_local_dir(newest_at(resume_from))
        found = checkpoints.resolve(self.work_dir, resume_from) if we.is_main else None
        if we.is_main and 'train' in self._mode_set:
            checkpoints.preflight(self.work_dir / 'checkpoints')
        path = we.broadcast(str(found.path) if found is not None else None)
        if path is not None and self.mirror is not None:
            if we.local_rank == 0 and not we.is_main and self.RESUME_FROM in ('auto', 'latest'):
                self.mirror.bring(checkpoints.step_of(Path(path)))      # on another machine
            we.barrier()
        return found if found is not None or path is None else checkpoints.load(path, verify='size')
