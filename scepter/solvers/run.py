"""What a run is: its parameters, its parts, its state and its words. Who moves it on is the solver (solvers/base.py)."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from scepter.core import pulse
from scepter.core.config import Config
from scepter.core.disk.writing import Kept
from scepter.core.env import we
from scepter.core.errors import DataError
from scepter.core.faults import Fault
from scepter.core.images import is_figure, is_picture
from scepter.core.lock import WorkDirLock
from scepter.core.logger import get_logger
from scepter.core.registry import DATASETS, FILE_SYSTEMS, HOOKS, LR_SCHEDULERS, METRICS, MODELS, OPTIMIZERS
from scepter.core.schema import Component, param, part, parts
from scepter.core.stores import FS
from scepter.core.stores.mirror import Mirror
from scepter.data.cache import Cache
from scepter.solvers.optim import NamedOptimizer, OptimizerPlace
from scepter.solvers.parallel import gathered
from scepter.solvers.plan import Plan
from scepter.solvers.step import DTYPES, Batches, Outputs, TrainStep, buffers_kept

MODES = ('train', 'eval', 'test')


class Evaluation(Component):
    """What is measured in training, on what and how often: one of EVALS, or the one without a name that EVAL_DATA describes."""

    DATA: dict = part(DATASETS, 'What to evaluate on.')
    METRICS: list = parts(METRICS, 'What to measure.')
    INTERVAL: int = param(doc='Steps between evaluations.', least=1)
    LOSS: bool = param(True, 'Also compute the loss, at fixed levels and noise.')

    dataset: Any
    metrics: list[Any]

    def __init__(self, name: str, cfg: dict):
        super().__init__(cfg)
        self.name = name
        self.place = f'EVALS.{name}.DATA' if name else 'EVAL_DATA'    # of its data in the config

    def called(self, figure: str) -> str:
        """What hooks call a figure of it: loss of the one without a name, quick/loss of `quick`."""
        return f'{self.name}/{figure}' if self.name else figure


class Run(Component, base=True):
    """What evaluations, checkpoints, hooks and the words of the console know of a run. It is built and moved by a solver."""

    WORK_DIR: str = param(doc='Folder of this run: checkpoints, logs, pictures. An address (oss://bucket/run) follows a folder here.')
    FILE_SYSTEM: dict | list | None = param(None, 'How stores are reached: one of FILE_SYSTEMS, or a list of them.')
    MODE: list[Literal['train', 'test']] | None = param(None, 'What to do; default train where there is TRAIN_DATA, test where TEST_DATA.')
    MODEL: dict = part(MODELS, 'The network.')
    TRAIN_DATA: dict | None = part(DATASETS, 'What to train on.', default=None)
    EVAL_DATA: dict | None = part(DATASETS, 'What to evaluate on during training.', default=None)
    TEST_DATA: dict | None = part(DATASETS, 'What to draw or predict after training, or alone.', default=None)

    CACHE: Cache = param({}, 'Encode TRAIN_DATA once, before the first step, and train from that: the autoencoder is then in memory only '
                             'while it draws.')

    MAX_STEPS: int | None = param(None, 'Steps of the optimizer in all.', least=1)
    MAX_EPOCHS: float | None = param(None, 'A second way to say MAX_STEPS: how often each sample is seen.', above=0)
    ACCU_STEP: int = param(1, 'Batches of each process that make one step of the optimizer.', least=1)
    GLOBAL_BATCH_SIZE: int | None = param(None, 'Samples of one step over all processes; wins over BATCH_SIZE and ACCU_STEP.', least=1)
    OPTIMIZER: dict | None = part(OPTIMIZERS, 'One optimizer, or a map of named ones.', default=None, place=OptimizerPlace)
    LR_SCHEDULER: dict | None = part(LR_SCHEDULERS, 'How the rate changes over the run; default constant.', default=None)
    WARMUP_STEPS: int = param(0, 'Steps over which the rate rises from nothing.', least=0)
    WARMUP_FACTOR: float = param(0.0, 'Share of the rate that it rises from instead.', least=0, most=1)
    GRADIENT_CLIP: float | None = param(None, 'Largest global norm of the gradient.', above=0)

    DTYPE: Literal['float32', 'bfloat16', 'float16', 'auto'] = param(
        'float32', 'Type of the arithmetic (autocast); auto: bfloat16 where the processor computes in it.')
    PARAM_DTYPE: Literal['float32', 'bfloat16'] = param('float32', 'Type of the weights, and so of gradients and optimizer state.')
    PARALLEL: Literal['ddp', 'fsdp'] = param('ddp', 'Of several processes, each has the whole network (ddp), or a share of every weight, '
                                             'gradient and state of the optimizer (fsdp: FSDP2).')
    SYNC_BATCH_NORM: bool = param(False, 'Batch normalisation over the samples of all processes, on CUDA; without, over those of its own.')
    CHANNELS_LAST: bool = param(False, 'Lay images out with channels last, which convolutions like.')
    COMPILE: bool = param(False, 'Compile the network with torch.compile.')

    EVAL_INTERVAL: int = param(0, 'Steps between evaluations on EVAL_DATA; 0 for none.', least=0)
    EVAL_LOSS: bool = param(True, 'In an evaluation, also compute the loss, at fixed levels and noise.')
    METRICS: list = parts(METRICS, 'What an evaluation measures.')
    EVALS: dict[str, Evaluation] = param({}, 'Further evaluations, each under a name that its figures then bear, as in val/quick/loss.')
    TRAIN_HOOKS: list = parts(HOOKS, 'Side concerns of training.')
    EVAL_HOOKS: list = parts(HOOKS, 'Side concerns of evaluation.')
    TEST_HOOKS: list = parts(HOOKS, 'Side concerns of testing.')
    RESUME_FROM: str | None = param(None, 'Absent: a fresh run. auto: the newest checkpoint, else fresh. latest: the newest. A path: that.')
    KEEP_CHECKPOINTS: int | None = param(None, 'How many of the newest checkpoints to keep; default all.', least=1)
    KEEP_EVERY: int | None = param(None, 'Beside those, keep the checkpoints whose step is a multiple of this.', least=1)
    SHARD_SIZE: float = param(2.0, 'Gigabytes of one file of a checkpoint: what is larger is written in several, by all processes in turn.',
                              above=0)
    ASYNC_SAVE: bool = param(False, 'Write checkpoints beside the loop, which waits only while the state is copied to memory of the CPU.')

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        for i, node in enumerate(file_systems(cfg)):
            yield from FILE_SYSTEMS.faults(node, f'FILE_SYSTEM[{i}]' if isinstance(cfg.FILE_SYSTEM, list) else 'FILE_SYSTEM')
        try:
            if not FS.can_write(cfg.WORK_DIR):
                yield Fault('WORK_DIR', f'{cfg.WORK_DIR.partition(":")[0]}:// can only be read: give a folder, or an address of a store '
                                        'that takes files (oss://, s3://, ...)')
        except DataError as error:
            yield Fault('WORK_DIR', str(error))
        modes = modes_of(cfg)
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
            return
        yield from cls._check_evaluations(cfg)

    @classmethod
    def _check_evaluations(cls, cfg: Config) -> Iterator[Fault]:
        for name in cfg.EVALS:
            if not name or '/' in name:
                yield Fault('EVALS', f'has {name!r}: the name of an evaluation is a word without a slash, which its figures are called by')
        if cfg.METRICS and cfg.EVALS and not cfg.EVAL_INTERVAL:
            yield Fault('METRICS', 'belong to the evaluation on EVAL_DATA, which EVAL_INTERVAL 0 leaves out: give each of EVALS its own')
        given = cls.figures_of(cfg)
        for i, node in enumerate(cfg.TRAIN_HOOKS):
            if not list(HOOKS.faults(node, '')):    # else that is told already
                for path, *rest in HOOKS.get(node.NAME).check_beside(HOOKS.filled(node), given):
                    yield Fault(f'TRAIN_HOOKS[{i}].{path}', *rest)

    @classmethod
    def figures_of(cls, cfg: Config) -> dict[str, set[str] | None]:
        """By the names of the evaluations, those of their figures as hooks find them; None where a metric does not tell.

        A solver that measures in a run_eval of its own says here what.
        """
        given: dict[str, set[str] | None] = {}
        for name, evaluation in evaluations_of(cfg).items():
            told = [METRICS.get(m.NAME).names(METRICS.filled(m)) for m in evaluation.METRICS]
            known = {'loss'} if evaluation.LOSS else set()
            given[name] = None if None in told else {evaluation.called(figure) for figure in known.union(*told)}
        return given

    datasets: dict[str, Any]        # of training and testing; None where there is none
    model: Any
    optimizers: list[NamedOptimizer]
    train_step: TrainStep
    plan: Plan
    dtype: torch.dtype              # of the arithmetic

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger or get_logger())
        self.experiment = Config({'SOLVER': cfg})    # the whole file; the door replaces it, so that a checkpoint can rebuild all
        self.imports: Sequence[str] = ()    # the user's files that came along, for the command that draws
        if self.cfg.FILE_SYSTEM is not None and not file_systems(self.cfg):
            self.logger.warning('FILE_SYSTEM is not carried out, since it stands in a checkpoint or came from an address')
        for node in file_systems(self.cfg):
            FS.init_fs_client(node, logger=self.logger)
        self.work_dir, self.mirror = Mirror.of(self.WORK_DIR)
        self.lock = WorkDirLock(self.work_dir)
        self.hooks = {mode: [HOOKS.build(c, logger=self.logger) for c in self.cfg[f'{mode.upper()}_HOOKS']] for mode in MODES}
        self._mode_set = modes_of(self.cfg)
        self.mode = 'train'
        self.step = 0        # steps of the optimizer
        self.samples = 0     # the clock: the number of the next sample in the endless stream
        self.is_resumed = False
        self.is_forced = False    # whether to go on with a run of another network, other samples or another optimizer
        self.batches: Batches = []
        self.outputs: Outputs = {}
        self.eval_outputs: dict[str, float] = {}
        self.evaluations = evaluations_of(self.cfg) if 'train' in self._mode_set else {}
        self.evaluation: Evaluation | None = None    # the one that is going on, or was the last
        self.evals_due: list[str] = []               # those of this step that are not done yet, by name
        self._logged: dict[str, Any] = {}
        self._save_reasons: list[str] = []

    # ---------------------------------------------------------------- what hooks are told, and tell
    def call_hooks(self, moment: str, mode: str) -> None:
        """One moment (hooks/base.py) of all hooks of a mode, in list order."""
        for hook in self.hooks[mode]:
            getattr(hook, moment)(self)
            pulse.beat()

    def request_save(self, reason: str = 'asked for') -> None:
        """Have the solver save at the end of this step, after all hooks and the evaluation."""
        self._save_reasons.append(reason)

    def log(self, name: str, value: Any) -> None:
        """Have hooks that write down what happens (LogHook, TensorboardLogHook, any with read_log) take this in.

        A figure (a number, a tensor of one element) or a picture ([3, H, W] in 0..1, or [H, W, 3] uint8), under `train/<name>`, in an
        evaluation under `val/<name>` (`val/quick/<name>` in that called quick); a name with a slash stays as it is. It is handed out when
        all hooks of the moment have run.
        """
        if not is_figure(value) and not is_picture(value):
            found = f'{type(value).__name__}{list(value.shape) if hasattr(value, "shape") else ""}'
            raise TypeError(f'log({name!r}, ...): {found} is neither a figure (a number, or a tensor of one element, such as a mean) nor a '
                            'picture ([3, H, W] in 0..1, or [H, W, 3] uint8)')
        if self.mode == 'eval' and self.evaluation is not None:
            full = f'val/{self.evaluation.called(name)}'
        else:
            full = f'{self.mode}/{name}'
        self._logged[name if '/' in name else full] = value.detach() if isinstance(value, Tensor) else value

    def hand_out_log(self, outputs: Outputs) -> None:
        """Show the training hooks every number of these outputs, and what was logged."""
        of_hooks, self._logged = self._logged, {}
        for name, value in outputs.items():
            if isinstance(value, (int, float)):
                self.log(name, value)
        logged, self._logged = {**self._logged, **of_hooks}, {}
        for hook in self.hooks['train']:
            hook.read_log(self, logged)

    def kept(self) -> Kept:
        """Which checkpoints stay."""
        pinned = tuple(step for hook in self.hooks['train'] for step in hook.pinned_steps)
        return Kept(self.KEEP_CHECKPOINTS, pinned, self.KEEP_EVERY)

    def train_mode(self) -> None:
        """The network learns: dropout, statistics, the training hooks."""
        self.set_mode('train')

    def eval_mode(self) -> None:
        """The network is measured."""
        self.set_mode('eval')

    def test_mode(self) -> None:
        """The network draws or predicts."""
        self.set_mode('test')

    def set_mode(self, mode: str) -> None:
        """train, eval or test: the figures that are logged, and whether the network learns."""
        self.mode = mode
        self.model.train(mode == 'train')

    # ---------------------------------------------------------------- what the network is given, and in what it computes
    def test_arguments(self) -> dict[str, Any]:
        """What forward_test is given beside the batch."""
        return {}

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the network computes in DTYPE."""
        return contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(we.device.type, self.dtype)

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch where the network is, in its memory layout and PARAM_DTYPE."""
        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            layouts = {4: torch.channels_last, 5: torch.channels_last_3d} if self.CHANNELS_LAST else {}
            layout = layouts.get(value.ndim, torch.preserve_format)
            kind = DTYPES[self.PARAM_DTYPE] if self.PARAM_DTYPE != 'float32' and value.is_floating_point() else value.dtype
            return value.to(we.device, kind, non_blocking=True, memory_format=layout)

        return {key: move(value) for key, value in batch.items()}

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, the network has the averaged weights of the first training hook that keeps some; its own where none does. Each process
        has the whole of them, so that it may draw as often as it has samples; all enter and leave together. Parts that rest are awake.
        What the network counts inside is forgotten."""
        kept = (hook.swapped(self.model) for hook in self.hooks['train'])
        swapped = next((context for context in kept if context is not None), contextlib.nullcontext())
        with swapped, gathered(self.model), self.model.awake(), buffers_kept(self.model):
            yield

    # ---------------------------------------------------------------- how long it goes
    @property
    def is_last_step_finite(self) -> bool:
        """Whether the step that has just run changed the weights."""
        return self.train_step.has_changed

    @property
    def max_steps(self) -> int:
        """Steps in all; a hook that ends the run sets it to solver.step."""
        return self.plan.max_steps

    @max_steps.setter
    def max_steps(self, steps: int) -> None:
        self.plan = self.plan._replace(max_steps=steps)


def evaluations_of(cfg: Config) -> dict[str, Evaluation]:
    """By name, what a filled config says is evaluated; '' is the name of the short form."""
    short = {'DATA': cfg.EVAL_DATA, 'METRICS': cfg.METRICS, 'INTERVAL': cfg.EVAL_INTERVAL, 'LOSS': cfg.EVAL_LOSS}
    nodes = {**({'': short} if cfg.EVAL_INTERVAL else {}), **cfg.EVALS}
    return {name: Evaluation(name, node) for name, node in nodes.items()}


def file_systems(cfg: Config) -> list[Config]:
    """What FILE_SYSTEM holds, as a list; nothing where it came from elsewhere: it could send the user's keys to an address of its own."""
    found = cfg.get('FILE_SYSTEM')
    if found is None or cfg.origin('FILE_SYSTEM').is_foreign:
        return []
    return found if isinstance(found, list) else [found]


def modes_of(cfg: Config) -> set[str]:
    """What a run does: what MODE says, else what there is data for."""
    return set(cfg.MODE) if cfg.MODE is not None else {mode for mode in ('train', 'test') if cfg[f'{mode.upper()}_DATA'] is not None}
