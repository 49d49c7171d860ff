"""What the keys of NOVA's own program become: a config of ours, and a row for every key.

scepter/config.py has their names, types and defaults. The network, its process, its autoencoder and its text encoder are what the
published folder says (weights/families/nova.py).
"""
from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scepter.core.config import Config, plain
from scepter.core.errors import CheckpointError
from scepter.core.faults import ConfigError, Fault, Origin, check, did_you_mean
from scepter.models.nova.model import FROZEN
from scepter.weights import describe, read_json
from scepter.weights.families import nova
from scepter.weights.family import family_of_folder
from scepter.weights.said import short, values_of

KINDS = {'nova_train_t2i': 'image', 'nova_train_t2v': 'clip', 'nova_train_c2i': 'class'}
HOOKS = 'SOLVER.TRAIN_HOOKS.'
PARTS = {'transformer': 'NETWORK', 'vae': 'FIRST_STAGE_MODEL', 'text_encoder': 'COND_STAGE_MODEL'}


class Row(NamedTuple):
    """A key of theirs, its value, what it is here (path -> value; nothing where there is no such thing), and why."""
    key: str
    value: Any
    ours: Mapping[str, Any]
    why: str = ''

    def __str__(self) -> str:
        became = ', '.join(f'{path} {short(value)}' for path, value in self.ours.items()) or 'left out'
        return f'{self.key} {short(self.value) if self.value != "" else "(empty)"}  ->  {became}{f"  ({self.why})" if self.why else ""}'


def translate(theirs: Config) -> tuple[Config, list[Row]]:
    """A filled config of NOVA's own program as ours, and what each of its keys became.

    Raises ConfigError for what is not trained here, and CheckpointError for a folder of weights that is not of NOVA.
    """
    if theirs.PIPELINE.TYPE not in KINDS:
        raise ConfigError([Fault('PIPELINE.TYPE', f'is {theirs.PIPELINE.TYPE!r}, expected one of {", ".join(KINDS)}; to draw, give '
                                 'MODEL.WEIGHTS to run_inference.py', theirs.PIPELINE.origin('TYPE'))], theirs.file or 'the config')
    for path in ('MODEL.WEIGHTS', 'TRAIN.DATASET'):
        section, key = path.split('.')
        if not theirs[section][key]:
            raise ConfigError([Fault(path, 'is needed to train', theirs[section].origin(key))], theirs.file or 'the config')
    ours = _assembled(theirs) if theirs.PIPELINE.MODULES else describe(theirs.MODEL.WEIGHTS).config
    if theirs.MODEL.CONFIG:
        place = ours.SOLVER.MODEL.NETWORK.get('PRETRAINED_MODEL')
        _take(ours.SOLVER.MODEL, 'transformer', theirs.MODEL.CONFIG, 'MODEL.CONFIG')
        ours.SOLVER.MODEL.NETWORK.update({} if place is None else {'PRETRAINED_MODEL': place})
    rows = [*_model(theirs, ours.SOLVER.MODEL), *_machine(theirs), *_data(theirs.TRAIN), *_steps(theirs.SOLVER), *_rates(theirs.SOLVER),
            *_average(theirs)]
    for row in rows:
        section, _, key = row.key.rpartition('.')
        origin = (theirs[section] if section else theirs).origin(key)    # so that a fault names the line of their file
        for path, value in row.ours.items():
            _put(ours, path, value, origin)
    ours.SOLVER.TRAIN_HOOKS = [{'NAME': name, **node} for name, node in ours.SOLVER.TRAIN_HOOKS.items()]
    object.__setattr__(ours, 'file', theirs.file)
    return ours, rows


def _assembled(theirs: Config) -> Config:
    """What is described of parts that lie in several folders: those of PIPELINE.MODULES, else of MODEL.WEIGHTS."""
    model, modules = Config({'NAME': 'NovaModel'}), theirs.PIPELINE.MODULES
    check(_module_faults(theirs.PIPELINE), theirs.file or 'the config')
    for part in (*PARTS, 'scheduler'):
        place = modules.get(part, f'{theirs.MODEL.WEIGHTS}/{part}')
        file = Path(place) / ('scheduler_config.json' if part == 'scheduler' else 'config.json')
        if place and (part in modules or part != 'text_encoder' or file.is_file()):
            _take(model, part, read_json(file), str(place))
            if part in PARTS:
                model[PARTS[part]].PRETRAINED_MODEL = str(place)
    if 'COND_STAGE_MODEL' in model:
        model.COND_STAGE_MODEL.TOKENIZER_PATH = modules.get('tokenizer', f'{theirs.MODEL.WEIGHTS}/tokenizer')
        model.COND_STAGE_MODEL.MAX_LENGTH = model.NETWORK.TEXT_TOKEN_LEN
    return Config({'SOLVER': {'NAME': 'LatentDiffusionSolver', 'MODEL': model}})


def _module_faults(pipeline: Config) -> Iterator[Fault]:
    names, needed = (*PARTS, 'scheduler', 'tokenizer', 'model_index'), ('transformer', 'vae', 'scheduler')
    for name, place in pipeline.MODULES.items():
        if name not in names:
            yield Fault(f'PIPELINE.MODULES.{name}', f'no such part{did_you_mean(name, names)}', pipeline.origin('MODULES'))
        elif not place and name in needed:
            yield Fault(f'PIPELINE.MODULES.{name}', 'is taken away, but training needs it: name its folder', pipeline.origin('MODULES'))


def _take(model: Config, part: str, values: Mapping[str, Any], name: str) -> None:
    """Let a part of the network be as its published config says."""
    told = {'transformer': {'_class_name': nova.NETWORK_CLASS}, 'vae': values if part == 'vae' else {'_class_name': 'AutoencoderKL'}}
    family = family_of_folder(told)
    if family is None:
        raise CheckpointError(f'{name}: no autoencoder that NOVA has, but {values.get("_class_name")!r}')
    for key, value in values_of(family.said({part: values}, name)).items():
        model[key] = value


def _model(theirs: Config, described: Config) -> Iterator[Row]:
    kind, network = KINDS[theirs.PIPELINE.TYPE], described.NETWORK
    is_told_class, is_for_clips = network.get('TEXT_TOKEN_DIM') is None, (network.get('VIDEO_BASE_SIZE') or [1])[0] > 1
    if is_told_class != (kind == 'class') or (kind == 'clip' and not is_for_clips):
        found = 'is told a class' if is_told_class else f'is for {"clips" if is_for_clips else "images"} and told a text'
        raise ConfigError([Fault('PIPELINE.TYPE', f'is {theirs.PIPELINE.TYPE}, but the network in {theirs.MODEL.WEIGHTS} {found}',
                                 theirs.PIPELINE.origin('TYPE'))], theirs.file or 'the config')
    frozen = {'SOLVER.MODEL.FREEZE': FROZEN['image']} if kind == 'image' and is_for_clips else {}
    yield Row('PIPELINE.TYPE', theirs.PIPELINE.TYPE, {'SOLVER.MODEL.NAME': 'NovaModel', **frozen})
    places = {f'SOLVER.MODEL.{key}.PRETRAINED_MODEL': described[key].PRETRAINED_MODEL for key in PARTS.values()
              if theirs.PIPELINE.MODULES and described.get(key)}
    yield Row('PIPELINE.MODULES', theirs.PIPELINE.MODULES, places, '' if places else 'all parts are those of MODEL.WEIGHTS')
    yield Row('MODEL.TYPE', theirs.MODEL.TYPE, {}, 'the transformer is what is trained')
    yield Row('MODEL.CONFIG', theirs.MODEL.CONFIG, {'SOLVER.MODEL.NETWORK': plain(network)} if theirs.MODEL.CONFIG else {},
              '' if theirs.MODEL.CONFIG else 'the transformer has its own')
    yield Row('MODEL.WEIGHTS', theirs.MODEL.WEIGHTS, {} if places else {'SOLVER.MODEL.PRETRAINED_MODEL': theirs.MODEL.WEIGHTS},
              'with NETWORK, FIRST_STAGE_MODEL, COND_STAGE_MODEL and the process as its files say')
    yield Row('MODEL.PRECISION', theirs.MODEL.PRECISION, {'SOLVER.DTYPE': theirs.MODEL.PRECISION, 'SOLVER.PARAM_DTYPE': 'float32'},
              'weights, gradients and averages are float32')


def _machine(theirs: Config) -> Iterator[Row]:
    yield Row('NUM_GPUS', theirs.NUM_GPUS, {'ENV.NPROC': theirs.NUM_GPUS}, 'torchrun says it where it starts them')
    yield Row('GPU_ID', theirs.GPU_ID, {}, 'CUDA_VISIBLE_DEVICES says which devices are taken')
    yield Row('RNG_SEED', theirs.RNG_SEED, {'ENV.SEED': theirs.RNG_SEED})


def _data(train: Config) -> Iterator[Row]:
    data = 'SOLVER.TRAIN_DATA.'
    yield Row('TRAIN.LOADER', train.LOADER, {f'{data}NAME': 'LatentRecordDataset'})
    yield Row('TRAIN.DATASET', train.DATASET, {f'{data}DATA_FOLDER': train.DATASET})
    yield Row('TRAIN.DATASET2', train.DATASET2, {f'{data}SECOND_FOLDER': train.DATASET2} if train.DATASET2 else {},
              '' if train.DATASET2 else 'there is none')
    yield Row('TRAIN.NUM_THREADS', train.NUM_THREADS, {f'{data}NUM_WORKERS': train.NUM_THREADS}, 'processes that read ahead')
    yield Row('TRAIN.BATCH_SIZE', train.BATCH_SIZE, {f'{data}BATCH_SIZE': train.BATCH_SIZE}, 'of each process')
    yield Row('TRAIN.LOSS_REPEAT', train.LOSS_REPEAT, {'SOLVER.MODEL.LOSS_REPEAT': train.LOSS_REPEAT})
    yield Row('TRAIN.CHECKPOINTING', train.CHECKPOINTING, {'SOLVER.MODEL.NETWORK.CHECKPOINTING': train.CHECKPOINTING})


def _steps(solver: Config) -> Iterator[Row]:
    yield Row('SOLVER.MAX_STEPS', solver.MAX_STEPS, {'SOLVER.MAX_STEPS': solver.MAX_STEPS})
    yield Row('SOLVER.ACCUM_STEPS', solver.ACCUM_STEPS, {'SOLVER.ACCU_STEP': solver.ACCUM_STEPS})
    yield Row('SOLVER.DISPLAY', solver.DISPLAY, {f'{HOOKS}LogHook.LOG_INTERVAL': solver.DISPLAY})
    yield Row('SOLVER.SNAPSHOT_EVERY', solver.SNAPSHOT_EVERY, {f'{HOOKS}CheckpointHook.INTERVAL': solver.SNAPSHOT_EVERY})
    yield Row('SOLVER.SNAPSHOT_PREFIX', solver.SNAPSHOT_PREFIX,
              {'SOLVER.WORK_DIR': f'outputs/{solver.SNAPSHOT_PREFIX}', 'SOLVER.RESUME_FROM': 'auto'}, 'a run that was cut off goes on')


def _rates(solver: Config) -> Iterator[Row]:
    """LR as published: the warm-up rises to BASE_LR whatever the policy, and cosine_decay begins behind it."""
    optimizer, schedule, floor = 'SOLVER.OPTIMIZER.', 'SOLVER.LR_SCHEDULER.', solver.MIN_LR / solver.BASE_LR if solver.BASE_LR else 0.0
    takes = inspect.signature(getattr(torch.optim, solver.OPTIMIZER, torch.optim.AdamW)).parameters
    yield Row('SOLVER.OPTIMIZER', solver.OPTIMIZER, {f'{optimizer}NAME': solver.OPTIMIZER})
    yield Row('SOLVER.BASE_LR', solver.BASE_LR, {f'{optimizer}LEARNING_RATE': solver.BASE_LR})
    yield Row('SOLVER.WEIGHT_DECAY', solver.WEIGHT_DECAY, {f'{optimizer}WEIGHT_DECAY': solver.WEIGHT_DECAY}, 'norms take none')
    yield Row('SOLVER.ADAM_BETA2', solver.ADAM_BETA2, {f'{optimizer}BETAS': [0.9, solver.ADAM_BETA2]} if 'betas' in takes else {},
              '' if 'betas' in takes else f'{solver.OPTIMIZER} has none')
    yield Row('SOLVER.WARM_UP_STEPS', solver.WARM_UP_STEPS, {'SOLVER.WARMUP_STEPS': solver.WARM_UP_STEPS})
    yield Row('SOLVER.WARM_UP_FACTOR', solver.WARM_UP_FACTOR, {'SOLVER.WARMUP_FACTOR': solver.WARM_UP_FACTOR})
    is_cosine, is_stepped = solver.LR_POLICY == 'cosine_decay', solver.LR_POLICY == 'steps_with_decay'
    name = 'CosineAfter' if is_cosine else 'Step' if is_stepped else 'Constant'
    begin = {f'{schedule}BEGIN': solver.WARM_UP_STEPS} if is_cosine else {}
    yield Row('SOLVER.LR_POLICY', solver.LR_POLICY, {f'{schedule}NAME': name, **begin})
    unused = 'the rate stays' if name == 'Constant' else 'the cosine needs none'
    yield Row('SOLVER.MIN_LR', solver.MIN_LR, {f'{schedule}FINAL': floor} if name != 'Constant' else {},
              'as a share of BASE_LR' if name != 'Constant' else unused)
    if is_stepped:    # one within the warm-up is heard at its end
        steps: dict[str, Any] = {f'{schedule}MILESTONES': [max(step, solver.WARM_UP_STEPS, 1) for step in solver.DECAY_STEPS]}
    else:
        steps = {f'{schedule}EVERY': solver.DECAY_STEPS[0]} if is_cosine and solver.DECAY_STEPS else {}
    yield Row('SOLVER.DECAY_STEPS', solver.DECAY_STEPS, steps, '' if steps else unused)
    yield Row('SOLVER.DECAY_GAMMA', solver.DECAY_GAMMA, {f'{schedule}GAMMA': solver.DECAY_GAMMA} if is_stepped else {},
              '' if is_stepped else unused)


def _average(theirs: Config) -> Iterator[Row]:
    train, hook = theirs.TRAIN, f'{HOOKS}ModelEmaHook.'
    device = 'cpu' if train.DEVICE_EMA == 'cpu' else 'model'
    for key, value, ours in (('TRAIN.MODEL_EMA', train.MODEL_EMA, {f'{hook}BETA': train.MODEL_EMA, f'{hook}WARMUP': False}),
                             ('SOLVER.EMA_EVERY', theirs.SOLVER.EMA_EVERY, {f'{hook}EVERY': theirs.SOLVER.EMA_EVERY}),
                             ('TRAIN.DEVICE_EMA', train.DEVICE_EMA, {f'{hook}DEVICE': device})):
        yield Row(key, value, ours if train.MODEL_EMA else {}, '' if train.MODEL_EMA else 'no average is kept')


def _put(cfg: Config, path: str, value: Any, origin: Origin) -> None:
    *above, last = path.split('.')
    for key in above:
        cfg = cfg.setdefault(key, {})
    cfg.put(last, value, origin)
