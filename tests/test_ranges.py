"""What --check finds in a config whose keys and types are right: numbers that make no sense, and keys that contradict each other."""
from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

import scepter.components  # noqa: F401
from scepter import run_train
from scepter.core.config import Config
from scepter.core.experiment import Experiment
from scepter.core.schema import schema_of

NAN, INF = math.nan, math.inf
RIGHT = '''
ENV: {SEED: 1}
SOLVER:
  NAME: LatentDiffusionSolver
  WORK_DIR: outputs/ranges
  MAX_STEPS: 100
  EVAL_INTERVAL: 10
  SAMPLE_ARGS: {SAMPLER: ddim, IMAGE_SIZE: [32, 64]}
  OPTIMIZER: {NAME: AdamW, LEARNING_RATE: 1e-3, BETAS: [0.9, 0.99]}
  LR_SCHEDULER: {NAME: Cosine}
  MODEL:
    NAME: LatentDiffusion
    SIZE_FACTOR: 4
    IMAGE_SIZE: 32
    SCHEDULE_ARGS: {NAME: scaled_linear}
    LOSS: {NAME: ReconstructLoss}
    DIFFUSION_MODEL: {NAME: DiffusionUNet, IN_CHANNELS: 4, OUT_CHANNELS: 4, MODEL_CHANNELS: 64, CHANNEL_MULT: [1, 2], NUM_RES_BLOCKS: 1,
                      ATTENTION_RESOLUTIONS: [2], NUM_HEADS: 4, CONTEXT_DIM: 64}
    FIRST_STAGE_MODEL:
      NAME: AutoencoderKL
      ENCODER: {NAME: Encoder, CH: 32, CH_MULT: [1, 1, 2]}
      DECODER: {NAME: Decoder, CH: 32, CH_MULT: [1, 1, 2]}
    COND_STAGE_MODEL: {NAME: FrozenCLIPEmbedder, WIDTH: 64, DEPTH: 2, HEADS: 4}
  TRAIN_DATA: {NAME: ImageTextFolderDataset, DATA_FOLDER: x, TRANSFORMS: [{NAME: RecordedCrop, SIZE: 32}, {NAME: RandomHorizontalFlip}]}
  EVAL_DATA: {NAME: PromptListDataset, PROMPTS: [a three]}
  METRICS: [{NAME: AccuracyMetric}]
  TRAIN_HOOKS:
  - {NAME: LogHook}
  - {NAME: CheckpointHook}
  - {NAME: ModelEmaHook}
  - {NAME: ProbeDataHook}
  - {NAME: ProfileHook}
  - {NAME: TensorboardLogHook}
'''
UNET, VAE, TEXT = 'MODEL.DIFFUSION_MODEL', 'MODEL.FIRST_STAGE_MODEL', 'MODEL.COND_STAGE_MODEL'
LOG, CHECKPOINT, EMA, PROBE, PROFILE, TENSORBOARD = (f'TRAIN_HOOKS[{i}]' for i in range(6))

OUT_OF_RANGE: list[tuple[str, Any]] = [
    ('MAX_STEPS', 0), ('MAX_STEPS', -5), ('ACCU_STEP', 0), ('ACCU_STEP', -1), ('GLOBAL_BATCH_SIZE', 0), ('GLOBAL_BATCH_SIZE', -8),
    ('WARMUP_STEPS', -1), ('GRADIENT_CLIP', 0.0), ('GRADIENT_CLIP', -1.0), ('GRADIENT_CLIP', INF), ('GRADIENT_CLIP', NAN),
    ('EVAL_INTERVAL', -1), ('KEEP_CHECKPOINTS', 0), ('KEEP_CHECKPOINTS', -1), ('KEEP_EVERY', 0),
    ('OPTIMIZER.LEARNING_RATE', -1), ('OPTIMIZER.LEARNING_RATE', INF), ('OPTIMIZER.LEARNING_RATE', NAN), ('OPTIMIZER.BETAS', [2, 2]),
    ('OPTIMIZER.BETAS', [0.9, 1.0]), ('OPTIMIZER.BETAS', [-0.1, 0.9]), ('OPTIMIZER.EPS', -1e-8), ('OPTIMIZER.WEIGHT_DECAY', -0.1),
    ('OPTIMIZER.WEIGHT_DECAY', INF), ('OPTIMIZER.EVERY', 0), ('OPTIMIZER.LR_SCALE', -1.0), ('LR_SCHEDULER.FINAL', -0.1),
    ('LR_SCHEDULER.FINAL', INF),
    ('SAMPLE_ARGS.SAMPLE_STEPS', 0), ('SAMPLE_ARGS.GUIDE_SCALE', NAN), ('SAMPLE_ARGS.GUIDE_SCALE', [7.5, NAN]),
    ('SAMPLE_ARGS.GUIDE_SCALE', {'image': NAN, 'text': 1.0}), ('SAMPLE_ARGS.GUIDE_SCALE', INF), ('SAMPLE_ARGS.GUIDE_RESCALE', 1.5),
    ('SAMPLE_ARGS.IMAGE_SIZE', 0), ('SAMPLE_ARGS.IMAGE_SIZE', [32, -32]), ('SAMPLE_ARGS.IMAGE_SIZE', [32]),
    ('SAMPLE_ARGS.DENOISING_STRENGTH', 1.1),
    ('MODEL.TIMESTEPS', 0), ('MODEL.P_ZERO', -0.1), ('MODEL.P_ZERO', 1.5), ('MODEL.P_ZERO', NAN), ('MODEL.SIZE_FACTOR', 0),
    ('MODEL.SCALE_FACTOR', 0.0), ('MODEL.IMAGE_SIZE', 0), ('MODEL.MIN_SNR_GAMMA', 0.0), ('MODEL.OFFSET_NOISE', -0.1),
    ('MODEL.INPUT_PERTURBATION', -0.1), ('MODEL.SCHEDULE_ARGS.BETA_MAX', 1.0), ('MODEL.SCHEDULE_ARGS.BETA_MIN', 0.0),
    ('MODEL.LOSS.HUBER_DELTA', 0.0),
    (f'{UNET}.MODEL_CHANNELS', 0), (f'{UNET}.MODEL_CHANNELS', 40), (f'{UNET}.CHANNEL_MULT', [1, 0]), (f'{UNET}.NUM_RES_BLOCKS', 0),
    (f'{UNET}.NUM_HEADS', 0), (f'{UNET}.CONTEXT_DIM', 0), (f'{UNET}.DROPOUT', 1.0), (f'{UNET}.TRANSFORMER_DEPTH', -1),
    (f'{VAE}.KL_WEIGHT', -1.0), (f'{VAE}.BATCH_SIZE', 0), (f'{VAE}.DISC_START', -1), (f'{VAE}.ENCODER.CH', 0),
    (f'{VAE}.DECODER.NUM_RES_BLOCKS', -1), (f'{TEXT}.DEPTH', 0), (f'{TEXT}.MAX_LENGTH', 0),
    ('TRAIN_DATA.BATCH_SIZE', 0), ('TRAIN_DATA.NUM_WORKERS', -1), ('TRAIN_DATA.PREFETCH', 0), ('TRAIN_DATA.TIMEOUT', 0.0),
    ('TRAIN_DATA.TIMEOUT', INF), ('TRAIN_DATA.MAX_BAD_FRACTION', 2.0), ('TRAIN_DATA.REPEATS', 0), ('TRAIN_DATA.TRANSFORMS[0].SIZE', 0),
    ('TRAIN_DATA.TRANSFORMS[0].FLIP', 2.0), ('METRICS[0].TOPK', [0]),
    (f'{LOG}.LOG_INTERVAL', 0), (f'{CHECKPOINT}.INTERVAL', -1), (f'{EMA}.BETA', 1.0), (f'{EMA}.BETA', 1.5), (f'{EMA}.BETA', NAN),
    (f'{EMA}.EVERY', 0), (f'{PROBE}.INTERVAL', 0), (f'{PROBE}.COLUMNS', 0), (f'{PROFILE}.STEPS', 0), (f'{PROFILE}.START', -1),
    (f'{TENSORBOARD}.LOG_INTERVAL', 0),
]
ENVIRONMENT = [('NPROC', 0), ('TIMEOUT', 0.0), ('TIMEOUT', NAN), ('THREADS', 0), ('SEED', -1)]

# what is against what, and the key that the fault names: (changes, path); a value of None is null
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({'MAX_EPOCHS': 2.0}, 'MAX_STEPS'),
    ({'MAX_STEPS': None}, 'MAX_STEPS'),
    ({'MODE': ['train', 'test']}, 'MODE'),
    ({'MODE': ['test'], 'TRAIN_DATA': None}, 'MODE'),
    ({'TRAIN_DATA': None}, ''),
    ({'MODE': []}, ''),
    ({'OPTIMIZER': None}, 'OPTIMIZER'),
    ({'EVAL_DATA': None}, 'EVAL_INTERVAL'),
    ({'OPTIMIZER': {'NAME': 'SGD', 'NESTEROV': True}}, 'OPTIMIZER'),
    ({'OPTIMIZER': {'one': {'NAME': 'Adam', 'FUSED': True, 'FOREACH': True}}}, 'OPTIMIZER.one'),
    ({f'{CHECKPOINT}.SAVE_BEST_BY': 'loss'}, f'{CHECKPOINT}.SAVE_BEST_BY'),
    ({f'{CHECKPOINT}.SAVE_BEST_BY': '-'}, f'{CHECKPOINT}.SAVE_BEST_BY'),
    ({f'{TEXT}.FREEZE': False}, f'{TEXT}.FREEZE'),
    ({f'{TEXT}.HEADS': 5}, f'{TEXT}.HEADS'),
    ({f'{TEXT}.LAYER': 'hidden'}, f'{TEXT}.LAYER_IDX'),
    ({f'{TEXT}.LAYER': 'hidden', f'{TEXT}.LAYER_IDX': 3}, f'{TEXT}.LAYER_IDX'),
    ({'MODEL.SIZE_FACTOR': 8}, 'MODEL.SIZE_FACTOR'),
    ({'MODEL.IMAGE_SIZE': 30}, 'MODEL.IMAGE_SIZE'),
    ({'SAMPLE_ARGS.IMAGE_SIZE': [32, 30]}, 'SAMPLE_ARGS.IMAGE_SIZE'),
    ({'MODEL.ZERO_TERMINAL_SNR': True}, 'MODEL.PARAMETERIZATION'),
    ({'MODEL.SCHEDULE_ARGS': {'NAME': 'karras', 'SIGMA_MIN': 80.0, 'SIGMA_MAX': 0.1}}, 'MODEL.PARAMETERIZATION'),
    ({f'{UNET}.NUM_HEADS_CHANNELS': 16}, f'{UNET}.NUM_HEADS'),
    ({f'{VAE}.DECODER.CH_MULT': [1, 2]}, f'{VAE}.DECODER.CH_MULT'),
    ({f'{VAE}.TILE_SIZE': 30}, f'{VAE}.TILE_SIZE'),
    ({'EVAL_DATA.PROMPTS': []}, 'EVAL_DATA.PROMPTS'),
    ({'TRAIN_DATA.TRANSFORMS[1].P': 2.0}, 'TRAIN_DATA.TRANSFORMS[1]'),
]


def written(value: Any) -> str:
    return str(Config({'V': value})).partition(':')[2].strip() if not isinstance(value, dict) else str(value).replace('nan', '.nan')


def faults(changes: dict[str, Any], section: str = 'SOLVER') -> list[str]:
    """The faults that --check finds in the right config with these changes."""
    cfg = Config.parse(RIGHT)
    cfg.override([f'{section}.{path}={written(value)}' for path, value in changes.items()])
    return [f'{f.path}: {f.message}' for f in schema_of(Experiment).faults(cfg, '')]


def test_the_config_itself_is_right():
    assert faults({}) == []


@pytest.mark.parametrize(('path', 'value'), OUT_OF_RANGE)
def test_a_value_out_of_range_is_a_fault_with_its_path(path: str, value: Any):
    found = faults({path: value})

    assert found and all(re.match(rf'SOLVER\.{re.escape(path)}[^ ]*: expected ', fault) for fault in found), found


@pytest.mark.parametrize(('path', 'value'), ENVIRONMENT)
def test_so_is_one_of_the_environment(path: str, value: Any):
    fault, = faults({path: value}, 'ENV')

    assert fault.startswith(f'ENV.{path}: expected ')


@pytest.mark.parametrize(('changes', 'path'), CONTRADICTIONS, ids=str)
def test_keys_that_contradict_each_other_are_a_fault(changes: dict[str, Any], path: str):
    fault, = faults(changes)

    assert fault.startswith(f'SOLVER.{path}: ' if path else 'SOLVER: ')


# ------------------------------------------------------------------------------------------------ the command line
def checked(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str]:
    code = run_train.main([*words, '--check'])
    return code, ''.join(capsys.readouterr())


def test_max_steps_on_the_command_line_wins_over_max_epochs(tmp_path: Path, capsys: pytest.CaptureFixture):
    code, said = checked(capsys, '--cfg', 'classifier/classifier.yaml', '--max_steps', '2')
    assert code == 0, said

    code, said = checked(capsys, '--cfg', 'classifier/classifier.yaml', 'SOLVER.MAX_STEPS=2')
    assert code == 2 and 'give one of MAX_STEPS and MAX_EPOCHS: they are 2 and 12; null takes one away' in said


def test_a_flag_out_of_range_is_a_fault_that_names_the_flag(capsys: pytest.CaptureFixture):
    code, said = checked(capsys, '--cfg', 'digits/diffusion.yaml', '--max_steps', '0', '--learning_rate', 'nan')

    assert code == 2 and 'the command line (--max_steps 0)' in said and said.count('--learning_rate nan') == 2


def test_a_file_without_a_solver_is_a_fault_also_with_flags(tmp_path: Path, capsys: pytest.CaptureFixture):
    for text in ('ENV: {}', 'SOLVER: 3', 'SOLVER: {OPTIMIZER: 3}', 'SOLVER: {OPTIMIZER: {a: 3}}'):
        (tmp_path / 'x.yaml').write_text(text)
        code, said = checked(capsys, '--cfg', str(tmp_path / 'x.yaml'), '--max_steps', '2', '--learning_rate', '0.1')

        assert code == 2 and 'SOLVER' in said and 'Traceback' not in said
