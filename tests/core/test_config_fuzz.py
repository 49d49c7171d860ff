"""Bad configs by the thousand: each is refused with a message before anything is built, and never with a traceback."""
from __future__ import annotations

import contextlib
import io
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import scepter.components  # noqa: F401
from scepter import run_train
from scepter.core.config import Config
from scepter.core.experiment import Experiment, check_experiment
from scepter.core.faults import ConfigError
from scepter.core.schema import schema_of

EXAMPLES = Path(__file__).resolve().parents[2] / 'examples'
SHIPPED = sorted(p for p in EXAMPLES.glob('*/*.yaml') if not p.parent.name.startswith('_'))
Step = str | int
FREE = [('EVALS',), ('PARTS',), ('CAPTION',), ('BESIDE',)]     # below these, names are the user's own


@pytest.fixture(scope='module', params=SHIPPED, ids=lambda p: str(p.relative_to(EXAMPLES)))
def shipped(request: pytest.FixtureRequest) -> Config:
    """A shipped config, with what it imports registered and its files named in full."""
    cfg = Config.load(request.param)
    if 'IMPORTS' in cfg:
        cfg['IMPORTS'] = check_experiment(cfg)
    return cfg


def keys(node: object, above: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    """The path of every key."""
    for step, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(node, dict):
            yield (*above, step)
        yield from keys(value, (*above, step))


def typos(word: str, chance: random.Random) -> set[str]:
    """One of each kind: a letter left out, put in, two swapped, one in the other case."""
    i = chance.randrange(len(word))
    j = chance.choice([j for j in range(len(word) - 1) if word[j] != word[j + 1]] or [0])
    letters = [k for k, letter in enumerate(word) if letter.isalpha()] or [0]
    k = chance.choice(letters)
    return {word[:i] + word[i + 1:], word[:i] + chance.choice(string.ascii_uppercase) + word[i:],
            word[:j] + word[j:j + 2][::-1] + word[j + 2:], word[:k] + word[k].swapcase() + word[k + 1:]} - {word, ''}


def with_key(cfg: Config, path: tuple[Step, ...], key: str) -> Config:
    """cfg with the key at path spelled another way, in the same place."""
    twin = cfg.copy()
    node = twin
    for step in path[:-1]:
        node = node[step]
    entries = [(key if k == path[-1] else k, v) for k, v in node.items()]
    node.clear()
    node.update(entries)
    return twin


def with_value(cfg: Config, path: tuple[Step, ...], value: object) -> Config:
    twin = cfg.copy()
    node = twin
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    return twin


def mutants(cfg: Config) -> Iterator[tuple[str, Config]]:
    """Every key with each kind of typo, and so every NAME: (what was right, the config that is wrong)."""
    chance = random.Random(str(cfg))
    for path in keys(cfg):
        key = str(path[-1])
        siblings = cfg
        for step in path[:-1]:
            siblings = siblings[step]
        is_free = (path[-2:-1] == ('OPTIMIZER',) and 'NAME' not in siblings) or path[-2:-1] in FREE
        for typo in () if is_free else sorted(typos(key, chance)):
            if typo not in siblings:
                yield key, with_key(cfg, path, typo)
        if key == 'NAME':
            for typo in sorted(typos(siblings['NAME'], chance)):
                yield siblings['NAME'], with_value(cfg, path, typo)


def same_by_signature(cfg: Config) -> bool:
    """Whether the typo is no typo: arguments of functions and foreign classes are matched without regard to case."""
    return not list(schema_of(Experiment).faults(cfg, ''))


def test_every_typo_in_every_shipped_config_is_refused_and_mended_by_the_message(shipped: Config):
    total = suggested = 0
    missed = []
    for right, wrong in mutants(shipped):
        try:
            check_experiment(wrong)
        except ConfigError as error:
            total += 1
            if f'did you mean {right}?' in str(error):
                suggested += 1
            else:
                missed.append(str(error))
        else:
            changed = set(map(str, keys(wrong))) ^ set(map(str, keys(shipped)))
            assert len({str(k).casefold() for k in changed}) == len(changed) // 2, f'{right} was mistyped in vain: {changed}'

    assert total > 20 and suggested >= 0.95 * total, missed[:5]


def test_a_typo_ends_the_command_with_code_two_before_anything_is_built(shipped: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                        capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    made = list(mutants(shipped))
    for right, wrong in random.Random(str(shipped)).sample(made, 8):
        if right in str(wrong.get('IMPORTS')) or 'IMPORTS' == right or same_by_signature(wrong):
            continue
        (tmp_path / 'wrong.yaml').write_text(str(wrong), encoding='utf-8')

        assert run_train.main(['--cfg', 'wrong.yaml']) == 2
        error = capsys.readouterr().err
        assert 'wrong.yaml' in error and 'line ' in error and 'Traceback' not in error
        assert [p.name for p in tmp_path.iterdir()] == ['wrong.yaml']


# ------------------------------------------------------------------------------------------------ anything at all
ODD = [None, True, 0, -1, 10 ** 400, float('nan'), float('inf'), -0.0, '', ' ', '\t', '010', 'on', '1e-4', '../..', '/', '\u202e', '\x00',
       'ä' * 300, '${HOME}', '${NO_SUCH_NAME}', [], [[]], {}, {'NAME': None}, {'NAME': 'BaseSolver'}, {'NAME': ['a']},
       [{'NAME': 'LogHook'}], {'A': {'A': {}}}, '<<', '*a', '&a', '!!str', 'NAME', '{', 'null', '2024-01-01', 0.1, 10 ** 18]
LINES = ['\tA: 1', 'SOLVER: {}', 'A: &a [*a]', 'A: !!python/object/apply:os.system [ls]', '<<: 3', '? [a]', '---', '...', '%YAML 1.1',
         '- 1', ': :', 'A: "${X', 'A: |', '  deep: 1', '_BASE_: a.yaml', '_BASE_: [a, [b]]', '_BASE_: {}', '\ufeff', 'A: .nan',
         'A: 1' + '0' * 400, '"', "'", '#', 'SOLVER.MAX_STEPS: 3', '{' * 100, '[' * 10_000, 'IMPORTS: [a, a.py, 3, ""]', 'IMPORTS: a',
         '@', '`', '\x85', 'ENV: {SEED: [], NPROC: no}']
PIECES = [*LINES, 'SOLVER:', '  NAME: BaseSolver', '  MODEL: {', 'ENV:', '  SEED: 1', '*a', '&a', ',', ']', '}']


def damaged(seed: int, bases: list[Config]) -> bytes:
    """A config that was right before up to three accidents, in its tree, its lines or its bytes."""
    chance = random.Random(seed)
    cfg = chance.choice(bases).copy()
    for _ in range(chance.randint(0, 2)):
        path = chance.choice(list(keys(cfg)) or [('A',)])
        node = cfg
        for step in path[:-1]:
            node = node[step]
        match chance.randrange(5):
            case 0:
                node.pop(path[-1], None)
            case 1:
                node[chance.choice(['A', 'NAME', '_BASE_', path[-1].lower(), 'é', '${HOME}'])] = node.get(path[-1])
            case 2:
                node[path[-1]] = [node.get(path[-1])]
            case _:
                node[path[-1]] = chance.choice(ODD[:-1])
    lines = (str(cfg) if cfg else '').splitlines()
    for _ in range(chance.choice([0, 0, 1, 2])):
        place = chance.randrange(len(lines) + 1)
        match chance.randrange(4):
            case 0:
                lines.insert(place, chance.choice(LINES))
            case 1:
                lines.insert(place, ' ' * chance.randrange(8) + chance.choice(LINES))
            case 2:
                lines[place:place] = lines[place:place + chance.randint(1, 3)]
            case _:
                del lines[place:place + 1]
    raw = '\n'.join(lines).encode('utf-8', 'surrogatepass')
    if chance.random() < 0.1 and raw:
        place = chance.randrange(len(raw))
        intruder = chance.choice([b'', b'\xff', b'\x00', b'\xef\xbb\xbf', b'\t', '\u2028'.encode(), 'ä'.encode('latin-1'), b'\r'])
        raw = raw[:place] + intruder + raw[place + chance.randrange(20):]
    return raw


@pytest.fixture(scope='module')
def check(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], None]:
    """Give bytes to the command as a config; it may accept or refuse them, with a message."""
    folder = tmp_path_factory.mktemp('fuzz')

    def run(raw: bytes) -> None:
        (folder / 'any.yaml').write_bytes(raw)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = run_train.main(['--cfg', str(folder / 'any.yaml'), '--check'])
        assert code in (0, 2) and 'Traceback' not in said.getvalue(), said.getvalue()
        assert len(said.getvalue()) < 200_000 and (code == 0) == ('no faults' in said.getvalue())
    return run


quick = settings(max_examples=1000, deadline=None, derandomize=True, database=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])


@quick
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda s: s.encode('utf-8', 'replace'))
       | st.lists(st.sampled_from(PIECES), max_size=8).map(lambda lines: '\n'.join(lines).encode()))
@example(b'\xef\xbb\xbfENV: {SEED: 1}')
@example('ENV: {SEED: ä}'.encode('latin-1'))
@example(('[' * 10_000).encode())
@example(b'A: ' * 10_000)
@example(b'ENV: {SEED: 1' + b'0' * 5000 + b'}')
@example(b'\xff\xfeE\x00')
def test_any_bytes_are_taken_or_refused_without_a_traceback(check: Callable[[bytes], None], raw: bytes):
    check(raw)


@quick
@given(st.integers(0, 2 ** 32))
def test_any_damage_to_a_good_config_is_taken_or_refused_without_a_traceback(check: Callable[[bytes], None], seed: int):
    check(damaged(seed, BASES))


BASES = [Config.parse(text) for text in ('''
IMPORTS: []
ENV: {SEED: 1, DEVICE: cpu}
SOLVER:
  NAME: BaseSolver
  WORK_DIR: outputs/fuzz
  MAX_STEPS: 10
  OPTIMIZER: {NAME: AdamW, LEARNING_RATE: 1e-3, BETAS: [0.9, 0.99], PARAMS: ['*']}
  LR_SCHEDULER: {NAME: Cosine, FINAL: 0.1}
  MODEL:
    NAME: AutoencoderKL
    EMBED_DIM: 4
    ENCODER: {NAME: Encoder, CH: 32, CH_MULT: [1, 2], NUM_RES_BLOCKS: 1, Z_CHANNELS: 4}
    DECODER: {NAME: Decoder, CH: 32, CH_MULT: [1, 2], NUM_RES_BLOCKS: 1, Z_CHANNELS: 4}
  TRAIN_DATA: {NAME: ImageTextFolderDataset, DATA_FOLDER: x, BATCH_SIZE: 2}
  TRAIN_HOOKS:
  - {NAME: LogHook, LOG_INTERVAL: 20}
  - {NAME: CheckpointHook, INTERVAL: 0}
''', '''
SOLVER:
  NAME: LatentDiffusionSolver
  WORK_DIR: outputs/fuzz
  MAX_EPOCHS: 1.5
  SAMPLE_ARGS: {SAMPLER: ddim, GUIDE_SCALE: 2.0}
  OPTIMIZER: {one: {NAME: SGD, LR: 0.1, EVERY: 2}}
  MODEL:
    NAME: LatentDiffusion
    SCHEDULE_ARGS: {NAME: cosine}
    DIFFUSION_MODEL: {NAME: DiffusionUNet, IN_CHANNELS: 4, OUT_CHANNELS: 4, MODEL_CHANNELS: 64, CHANNEL_MULT: [1], NUM_RES_BLOCKS: 1,
                      ATTENTION_RESOLUTIONS: [1], NUM_HEADS: 4, CONTEXT_DIM: 8}
    FIRST_STAGE_MODEL: {NAME: AutoencoderKL, ENCODER: {NAME: Encoder}, DECODER: {NAME: Decoder}}
    COND_STAGE_MODEL: {NAME: FrozenCLIPEmbedder, FREEZE: false, USE_GRAD: true}
  TRAIN_DATA: {NAME: ImageTextFolderDataset, DATA_FOLDER: x, TRANSFORMS: [{NAME: RecordedCrop, SIZE: 8}]}
''')]


@pytest.mark.parametrize('cfg', BASES, ids=['autoencoder', 'diffusion'])
def test_what_is_damaged_was_right_before(cfg: Config):
    assert [f.path for f in schema_of(Experiment).faults(cfg, '')] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)     # a check also computes schedules
@settings(quick, max_examples=50_000)
@given(st.integers(0, 2 ** 48))
def test_fifty_thousand_damages(check: Callable[[bytes], None], seed: int):
    check(damaged(seed, BASES))
