"""The config object of NOVA's training guide: keys, defaults and text are those of NOVA's own program.

    from scepter.config import cfg
    cfg.SOLVER.BASE_LR = 1e-4
    open('./nova_d48w1024_1024px.yml', 'w').write(str(cfg))

`python scepter/run_train.py --cfg` takes such a file as it is; models/nova/guide.py says what each key becomes.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from scepter.core.config import Config
from scepter.core.experiment import load_config
from scepter.core.faults import ConfigError, Fault, check, did_you_mean
from scepter.core.schema import Component, convert, param, schema_of, value_faults
from scepter.core.yaml import dump


class Pipeline(Component):
    """PIPELINE: what is trained, out of which folders."""
    TYPE: Literal['', 'nova_train_t2i', 'nova_train_t2v', 'nova_train_c2i', 'nova', 'nova_c2i'] = param('', 'What is trained or drawn.')
    MODULES: dict[str, str] = param({}, 'Folders of parts in the place of those in MODEL.WEIGHTS; an empty one takes the part away.')


class Model(Component):
    """MODEL: the network and its precision."""
    TYPE: Literal['transformer'] = param('transformer', 'The part that is trained.')
    CONFIG: dict = param({}, "In the place of the transformer's whole config.json.")
    WEIGHTS: str = param('', 'A published folder, with model_index.json.')
    PRECISION: Literal['bfloat16', 'float16', 'float32'] = param('bfloat16', 'Type of the arithmetic.')


class Train(Component):
    """TRAIN: the data, and what is done with a batch."""
    DATASET: str = param('', 'Folder of record files.')
    DATASET2: str = param('', 'Records of the same samples, whose features go over the first.')
    LOADER: Literal['vae_train'] = param('vae_train', 'How they are read.')
    NUM_THREADS: int = param(4, 'Processes that read ahead.', least=0)
    BATCH_SIZE: int = param(1, 'Samples of each process.', least=1)
    MODEL_EMA: float = param(0.99, 'How much of the average of the weights stays; 0: there is none.', least=0, below=1)
    DEVICE_EMA: Literal['gpu', 'cuda', 'cpu'] = param('gpu', 'Where it is kept.')
    LOSS_REPEAT: int = param(4, 'How often each token is learnt from in a pass.', least=1)
    CHECKPOINTING: int = param(2, 'How much is computed again in the backward pass.', least=0, most=3)


class Solver(Component):
    """SOLVER: steps, rates and intervals."""
    DISPLAY: int = param(20, 'Steps between lines of the log.', least=1)
    EMA_EVERY: int = param(100, 'Steps between averagings.', least=1)
    SNAPSHOT_EVERY: int = param(5000, 'Steps between checkpoints.', least=1)
    SNAPSHOT_PREFIX: str = param('model', 'What they are called.')
    MAX_STEPS: int = param(2147483647, 'Steps of the optimizer.', least=1)
    BASE_LR: float = param(0.0001, 'Highest learning rate.', least=0)
    MIN_LR: float = param(0.0, 'Lowest one, of the policies that fall.', least=0)
    DECAY_STEPS: list[int] = param([], 'Where steps_with_decay falls.', least=1)
    DECAY_GAMMA: float = param(0.5, 'By how much.', least=0)
    WARM_UP_STEPS: int = param(250, 'Steps over which the rate rises.', least=0)
    WARM_UP_FACTOR: float = param(0.001, 'Share of it that it rises from.', least=0, most=1)
    OPTIMIZER: str = param('AdamW', 'A class of torch.optim.')
    ADAM_BETA2: float = param(0.95, "Decay of the optimizer's second moment; the first has 0.9.", least=0, below=1)
    LR_POLICY: Literal['', 'cosine_decay', 'steps_with_decay'] = param('', 'How the rate falls; empty: it does not.')
    ACCUM_STEPS: int = param(1, 'Batches of one step.', least=1)
    WEIGHT_DECAY: float = param(0.02, 'Of all but norms.', least=0)


class NovaConfig(Component):
    """The whole file."""
    NUM_GPUS: int = param(1, 'Processes.', least=1)
    RNG_SEED: int = param(3, 'Seed of every draw.', least=0)
    GPU_ID: int = param(0, 'Device of a single process.', least=0)
    PIPELINE: Pipeline = param({}, 'What is trained, out of which folders.')
    MODEL: Model = param({}, 'The network and its precision.')
    TRAIN: Train = param({}, 'The data, and what is done with a batch.')
    SOLVER: Solver = param({}, 'Steps, rates and intervals.')


class Section(Config):
    """A part of the config object. Setting an unknown key, or a value of another type, raises ConfigError that says what is expected."""
    __slots__ = ('place', 'schema')

    def __init__(self, kind: type[Component], place: str = ''):
        super().__init__()
        object.__setattr__(self, 'schema', schema_of(kind))
        object.__setattr__(self, 'place', place)
        for key, value in self.schema.fill(Config()).items():
            declared = self.schema[key]
            dict.__setitem__(self, key, Section(declared.type, f'{place}{key}.') if declared.nested else value)

    def __setitem__(self, key: str, value: Any) -> None:
        declared = self.schema.get(key)
        if declared is None:
            raise ConfigError([Fault(self.place + key, f'no such parameter{did_you_mean(key, self.schema)}')], 'cfg')
        if declared.nested and isinstance(value, Mapping):
            for below, entry in value.items():
                self[key][below] = entry
            return
        check(value_faults(value, declared, self.place + key, self.origin(key)), 'cfg')
        super().__setitem__(key, convert(Config.of(value), declared))

    __setattr__ = __setitem__

    def __delitem__(self, key: str) -> None:
        raise ConfigError(f'{self.place}{key} stays: the text needs all keys; set it to its default instead')

    def __str__(self) -> str:
        """The text that NOVA's own program writes: all keys, sorted."""
        return '\n'.join(_lines(self))

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)


def _lines(node: Mapping[str, Any], indent: str = '') -> Iterator[str]:
    for key in sorted(node):
        value = node[key]
        if isinstance(value, dict) and value:
            yield f'{indent}{key}:'
            yield from _lines(value, indent + '  ')
        elif value == '' and isinstance(node, Section):
            yield f'{indent}{key}: '    # which `read` takes for the empty string that it is
        else:
            yield f'{indent}{key}: {_word(value)}'


def _word(value: Any) -> str:
    if not isinstance(value, str):
        return dump({'V': value}, flow=True).strip()[len('{V: '):-1].replace('\n', ' ')
    try:
        is_plain = Config.parse(f'V: {value}', environment=False)['V'] == value
    except ConfigError:
        is_plain = False
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def is_published(cfg: Config) -> bool:
    """Whether a config is one of NOVA's own program, by its PIPELINE.TYPE."""
    return isinstance(cfg.get('PIPELINE'), Config) and 'TYPE' in cfg.PIPELINE


def knows(path: str) -> bool:
    """Whether a dotted path is a key of NOVA's own program."""
    whole = schema_of(NovaConfig)
    section, _, key = path.rpartition('.')
    if not section:
        return key in whole and whole[key].nested is None
    return key in ((whole[section].nested if section in whole else None) or ())


def read(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """A file of NOVA's own program, with all its keys. Raises ConfigError with every fault and its line."""
    cfg = load_config(path, overrides)
    schema = schema_of(NovaConfig)
    for key, node in [(key, cfg[key]) for key in schema if isinstance(cfg.get(key), Config)]:
        nested = schema[key].nested
        for name in list(node):
            if node[name] is None and nested is not None and name in nested and nested[name].default == '':
                node.put(name, '', node.origin(name))
    check(schema.faults(cfg, ''), cfg.file or 'the config')
    filled = schema.fill(cfg)
    object.__setattr__(filled, 'file', cfg.file)
    return filled


def as_ours(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[Config, list[Any]]:
    """A file of NOVA's own program as a config of ours, and a row for each of its keys (models/nova/guide.py).

    overrides: KEY.PATH=VALUE words; those of its keys are meant before the change, all others behind it.
    Raises ConfigError, and CheckpointError for what MODEL.WEIGHTS names.
    """
    from scepter.models.nova.guide import translate  # needs torch, which writing such a file does not
    before = [word for word in overrides if knows(word.partition('=')[0])]
    ours, rows = translate(read(path, before))
    ours.override([word for word in overrides if word not in before])
    return ours, rows


cfg = Section(NovaConfig)
