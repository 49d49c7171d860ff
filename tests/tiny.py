"""All that is tiny: the networks of Stable Diffusion, and the smallest real experiment, its parts registered as a user would."""
from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import scepter.components  # noqa: F401
from scepter.core import jsonl, streams
from scepter.core.config import Config
from scepter.core.env import we
from scepter.core.registry import DATASETS, HOOKS, METRICS, MODELS, SOLVERS
from scepter.core.schema import param
from scepter.data.datasets import BaseDataset
from scepter.diffusion.process import Diffusion
from scepter.diffusion.schedules import cosine
from scepter.hooks.base import Hook
from scepter.models.base import TrainModule
from scepter.solvers.metrics import Metric
from scepter.weights import Weights
from scepter.weights.families.autoencoder import VAE

CLIP = {'NAME': 'FrozenCLIPEmbedder', 'WIDTH': 32, 'DEPTH': 2, 'HEADS': 2}
OPENCLIP = {'NAME': 'FrozenOpenCLIPEmbedder', 'ARCH': 'custom', 'WIDTH': 48, 'DEPTH': 3, 'HEADS': 3}


def unet(*levels: int, **more: Any) -> dict[str, Any]:
    """The config of Stable Diffusion's UNet of so many levels, each in multiples of 32 channels; attention is in the last one."""
    sizes = {'MODEL_CHANNELS': 32, 'CHANNEL_MULT': [*levels], 'NUM_RES_BLOCKS': 1, 'ATTENTION_RESOLUTIONS': [2 ** (len(levels) - 1)]}
    return {'NAME': 'DiffusionUNet', 'IN_CHANNELS': 4, 'OUT_CHANNELS': 4, **sizes, **more}


def autoencoder(*levels: int, channels: int = 4, **more: Any) -> dict[str, Any]:
    """The config of its autoencoder; every level but the last halves the size."""
    coder = {'CH': 32, 'CH_MULT': [*levels], 'NUM_RES_BLOCKS': 1, 'Z_CHANNELS': channels}
    return {'NAME': 'AutoencoderKL', 'EMBED_DIM': channels, 'ENCODER': {'NAME': 'Encoder', **coder},
            'DECODER': {'NAME': 'Decoder', **coder}, **more}


def published_vae(folder: Path) -> Path:
    """The smallest autoencoder, 8 times smaller, as diffusers writes one; the folder."""
    torch.manual_seed(0)
    weights = VAE.to_theirs(Weights.of(MODELS.build(Config(autoencoder(1, 1, 1, 1))).state_dict()))
    save_file({name: weights[name].contiguous() for name in weights}, folder / 'diffusion_pytorch_model.safetensors')
    (folder / 'config.json').write_text(json.dumps({
        '_class_name': 'AutoencoderKL', 'block_out_channels': [32] * 4, 'down_block_types': ['DownEncoderBlock2D'] * 4,
        'up_block_types': ['UpDecoderBlock2D'] * 4, 'latent_channels': 4, 'layers_per_block': 1, 'scaling_factor': 0.5}))
    return folder


# the smallest Stable Diffusion
LATENT_DIFFUSION = {
    'NAME': 'LatentDiffusion', 'SIZE_FACTOR': 2, 'IMAGE_SIZE': 16, 'FIRST_STAGE_MODEL': autoencoder(1, 1),
    'DIFFUSION_MODEL': unet(1, NUM_HEADS=2, CONTEXT_DIM=32), 'COND_STAGE_MODEL': {**CLIP, 'DEPTH': 1, 'MAX_LENGTH': 8}}


@DATASETS.register_class()
class TinyPoints(BaseDataset):
    """Sixteen points on a circle.    image [2], number"""

    COUNT: int = param(16)

    def __len__(self) -> int:
        return self.COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        angle = torch.tensor(2 * torch.pi * index / self.COUNT)
        return {'image': torch.stack([angle.cos(), angle.sin()]), 'number': index}


@MODELS.register_class()
class TinyDenoiser(TrainModule):
    """Learns the circle; keeps every batch's numbers, and can be told to fail."""

    WIDTH: int = param(16)
    DROPOUT: float = param(0.0)
    NAN_AT: list[int] = param([], 'Draws of this network, counted from 0, whose loss is not a number.')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        self.net = nn.Sequential(nn.Linear(3, self.WIDTH), nn.SiLU(), nn.Dropout(self.DROPOUT), nn.Linear(self.WIDTH, 2))
        self.register_buffer('seen', torch.zeros((), dtype=torch.int64))
        self.diffusion = Diffusion(*cosine(100), prediction='v')
        self.numbers: list[list[int]] = []
        self.calls = 0

    def forward_train(self, image: Tensor, number: Tensor, **batch: Any) -> dict[str, Any]:
        self.numbers.append(number.tolist())
        self.seen += len(image)
        t = streams.integers('timestep', 100, len(image))

        def network(x: Tensor, t: Tensor) -> Tensor:
            return self.net(torch.cat([x, (t[:, None] / 100).to(x)], 1))

        loss = self.diffusion.loss(image, t.to(image.device), network).mean()
        loss = loss * float('nan') if self.calls in self.NAN_AT else loss
        self.calls += 1
        return {'loss': loss, 'probe_data': {'number': number}}

    def forward_test(self, image: Tensor, number: Tensor, **batch: Any) -> list[dict[str, Any]]:
        return [{'prompt': f'point {n}', 'value': float(p.sum())} for n, p in zip(number.tolist(), image)]


@MODELS.register_class()
class TinyPainter(TinyDenoiser):
    """Draws noise of four pixels for each sample, keyed by what it is handed."""

    def forward_test(self, number: Tensor, row_seeds: list[int], **batch: Any) -> list[dict[str, Any]]:
        noise = streams.normal_rows(row_seeds, 'start', (3, 2, 2)) + self.net[3].bias.mean()
        return [{'prompt': 'a point', 'image': picture.sigmoid(), 'seed': s} for picture, s in zip(noise, row_seeds)]


@METRICS.register_class()
class MeanValue(Metric):
    """The mean of what TinyDenoiser gives for a point, in tenths of it, whose sum floating point rounds."""

    def sums(self, results: list[dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
        return {'total': sum(r['value'] / 10 for r in results), 'count': len(results)}

    def figures(self, total: float, count: int) -> dict[str, float]:    # type: ignore[override]
        return {'value': total / count}


@HOOKS.register_class()
class StopAfter(Hook):
    """A signal reaches one of the processes after so many batches of its mode."""

    BATCHES: int = param(1)
    RANK: int = param(0)

    def before_all_iter(self, solver: Any) -> None:
        self.batches = 0

    def after_iter(self, solver: Any) -> None:
        self.batches += 1
        if we.rank == self.RANK and self.batches == self.BATCHES:
            we.stop_signal = signal.SIGTERM     # as the handler of core/env.py notes it


@HOOKS.register_class()
class SaveOnMain(Hook):
    """Only the main process asks for a checkpoint."""

    def after_iter(self, solver: Any) -> None:
        if we.is_main:
            solver.request_save()


@HOOKS.register_class()
class NoteSamples(Hook):
    """Which samples each step saw, over all processes.    WORK_DIR/samples.jsonl"""

    def before_iter(self, solver: Any) -> None:
        seen = we.gather([int(n) for _, numbers in solver.batches for n in numbers])
        if we.is_main:
            jsonl.append(solver.work_dir / 'samples.jsonl', [{'step': solver.step, 'samples': sorted(n for rank in seen for n in rank)}])


def config(work_dir: Path, steps: int = 10, **solver: Any) -> Config:
    return Config({'SOLVER': {
        'NAME': 'BaseSolver', 'WORK_DIR': str(work_dir), 'MAX_STEPS': steps, 'MODEL': {'NAME': 'TinyDenoiser'},
        'OPTIMIZER': {'NAME': 'AdamW', 'LEARNING_RATE': 1e-2}, 'LR_SCHEDULER': {'NAME': 'Cosine'}, 'WARMUP_STEPS': 3,
        'TRAIN_DATA': {'NAME': 'TinyPoints', 'BATCH_SIZE': 6},
        'TRAIN_HOOKS': [{'NAME': 'ModelEmaHook', 'BETA': 0.9}, {'NAME': 'CheckpointHook', 'INTERVAL': 0}], **solver}})


def run(cfg: Config, seed: int = 7, force: bool = False) -> Any:
    """The solver after its run, in this process."""
    from scepter.core.env import seed_everything
    we.seed, we.stop_signal = seed, 0
    seed_everything(seed, 'start')
    solver = SOLVERS.build(cfg.SOLVER)
    solver.experiment, solver.is_forced = cfg, force
    solver.set_up()
    solver.solve()
    return solver


def memory_for(work: Callable[[], object]) -> int:
    """Bytes by which this process grows while it works, at most. Linux alone tells."""
    Path('/proc/self/clear_refs').write_text('5')     # from here on the peak is counted anew

    def peak() -> int:
        return 1024 * next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM'))

    before = peak()
    work()
    return peak() - before


def groups(work_dir: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """Every tensor of a checkpoint."""
    from scepter.core.disk import checkpoints
    loaded = checkpoints.load(checkpoints.folder_of(work_dir / 'checkpoints', step))
    return {name: loaded.group(name) for name in loaded.groups}


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    """Whether two checkpoints are equal to the bit."""
    return a.keys() == b.keys() and all(a[g].keys() == b[g].keys() and all(torch.equal(a[g][k], b[g][k]) for k in a[g]) for g in a)
