"""A run of NovaModel on the smallest clips, for tests that begin it in processes of their own."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import scepter.components  # noqa: F401
from pairs import SAVED, STEPS, train
from scepter.core.config import Config
from scepter.data.records import RecordWriter

NETWORK: dict[str, Any] = {'NAME': 'NovaTransformer', 'IMAGE_DIM': 2, 'IMAGE_SIZE': 64, 'IMAGE_STRIDE': 8,
                           'ARCH': ['vit_d2w32h2', 'vit_d2w32h2', 'mlp_d1w16'], 'NUM_CLASSES': 10}
TEXT = {**NETWORK, 'TEXT_TOKEN_DIM': 12, 'TEXT_TOKEN_LEN': 5}
CLIP = {**TEXT, 'VIDEO_BASE_SIZE': [3, 2, 2], 'VIDEO_MIXER_RANK': 2}
DDPM = {'PARAMETERIZATION': 'eps', 'SCHEDULE_ARGS': {'NAME': 'cosine'}, 'SPACING': 'leading', 'TIMESTEP_DENSITY': {'NAME': 'uniform'}}


def moments(count: int, frames: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(count, 4, *([frames] if frames else []), 8, 8))).half()


def write_clips(folder: Path, lengths: list[int]) -> Path:
    """Clips of so many frames, with features of text; the folder."""
    folder.mkdir(exist_ok=True)
    text = {'data': 'bytes', 'shape': ['int64']}
    with RecordWriter(folder, {'moments': 'bytes', 'shape': ['int64'], 'caption': text, 'text': text, 'flow': 'float64'}) as writer:
        for i, frames in enumerate(lengths):
            x, words = moments(5, frames).numpy()[i % 5], {'data': np.full((i % 5, 12), i, np.float16).tobytes(), 'shape': [i % 5, 12]}
            writer.write({'shape': x.shape, 'moments': x.tobytes(), 'flow': i + 0.5, 'caption': words})
    return folder


def experiment(folder: Path, data: Path, **solver: Any) -> Config:
    hooks = [{'NAME': 'LogHook', 'LOG_INTERVAL': 3, 'PROGRESS': False}, {'NAME': 'CheckpointHook', 'INTERVAL': SAVED},
             {'NAME': 'ModelEmaHook', 'BETA': 0.9, 'EVERY': 2}]
    return Config({'SOLVER': {
        'NAME': 'BaseSolver', 'WORK_DIR': str(folder), 'MAX_STEPS': STEPS, 'RESUME_FROM': 'auto', 'TRAIN_HOOKS': hooks,
        'MODEL': {'NAME': 'NovaModel', 'NETWORK': {**CLIP, 'CHECKPOINTING': 3}, 'SCALE_FACTOR': 1.0, **DDPM},
        'OPTIMIZER': {'NAME': 'AdamW', 'LEARNING_RATE': 1e-3, 'WEIGHT_DECAY': 0.02},
        'TRAIN_DATA': {'NAME': 'LatentRecordDataset', 'DATA_FOLDER': str(data), 'BATCH_SIZE': 2},
        'EVAL_DATA': {'NAME': 'LatentRecordDataset', 'DATA_FOLDER': str(data), 'BATCH_SIZE': 2}, **solver}})


def run(cfg: Config) -> None:
    train(cfg)
