"""How fast we are beside a peer, in the same process and in alternating pairs; one JSON line per measurement.

    python tools/bench.py overhead            # the solver's loop against a bare PyTorch loop
    python tools/bench.py startup             # the command line against `import torch`
    python tools/bench.py sd15-infer          # a guided 512-pixel step of the UNet against diffusers', eager
    python tools/bench.py sd15-infer --compile    # ... both compiled, and ours compiled against theirs eager
    python tools/bench.py sd15-train          # a training step from latents against diffusers'
    python tools/bench.py sdxl-infer          # as sd15-infer, 1024 pixels
    python tools/bench.py loader              # JPEGs from a folder to batches, against torchvision's ImageFolder
    python tools/bench.py latents             # batches out of a cache, against a TensorDataset
    python tools/bench.py open                # a table of a million rows: the first start and later ones
    python tools/bench.py cache --size 128    # filling a cache of latents against a bare loop that encodes
    python tools/bench.py scaling             # a step on two processes against a bare DistributedDataParallel loop; memory of shares
    python tools/bench.py nova-train          # the solver's loop on NOVA against a bare loop over the same network
    python tools/bench.py nova-sample         # a clip with keys and values kept against the whole sequence anew for each frame
    python tools/bench.py checkpointing       # what each level of CHECKPOINTING keeps for the backward pass, and what it costs
    python tools/bench.py checkpoint          # a save and a verified load of 1 GB, and how much of a save ASYNC_SAVE has the loop wait
    python tools/bench.py resume              # to the first batch of step 100,000, of 10 million samples

All in the type that the machine computes in: bfloat16 where the processor or the GPU has it, else float32; each line says which.
Each line: {"name", "ours", "peer", "ratio", "low", "high", "unit", "pairs", ...}: medians of both, the median of the pairs' ratios
and its 95 % interval (bootstrap). Machines drift; a pair sees the same machine, so the ratio is what to trust.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import bench_nova  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_training import Update, built, endless, recipe, stepping  # noqa: E402

DIGITS = 'digits/diffusion.yaml'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='+', choices=sorted(BENCHMARKS), help='what to measure')
    parser.add_argument('--pairs', type=int, default=15, help='alternating pairs (default 15)')
    parser.add_argument('--threads', type=int, default=1, help='threads of each of two processes on the CPU (default 1)')
    parser.add_argument('--size', type=int, help='pixels, where 512 (1024 for sdxl) is too much; megabytes of a checkpoint, '
                        'where 1000 are; thousands of samples to resume among, where 10,000 are')
    parser.add_argument('--count', type=int, help='images or rows, where a benchmark has such')
    parser.add_argument('--compile', action='store_true', help='compile both with torch.compile')
    args = parser.parse_args()
    for name in args.names:
        BENCHMARKS[name](args)


def compare(name: str, ours: Callable[[], Any], peer: Callable[[], Any], pairs: int, unit: str = 's', share: float = 1.0,
            is_told: bool = True, **more: Any) -> None:
    """Time both in turn, after two of each that do not count (memory is still new then); share: how many units one call holds."""
    times = [(seconds(ours), seconds(peer)) if i % 2 else (seconds(peer), seconds(ours))[::-1] for i in range(pairs + 2)][2:]
    a, b = np.array(times).T / share
    low, high = interval(a / b)
    if is_told:
        report(name, float(np.median(a)), float(np.median(b)), float(np.median(a / b)), low, high, unit, pairs, **more)


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, 1), [0.025, 0.975])
    return float(low), float(high)


def report(name: str, ours: float, peer: float, ratio: float, low: float, high: float, unit: str, pairs: int, **more: Any) -> None:
    figures = {'ours': ours, 'peer': peer, 'ratio': ratio, 'low': low, 'high': high}
    print(json.dumps({'name': name, **{key: round(value, 4) for key, value in figures.items()}, 'unit': unit, 'pairs': pairs,
                      'threads': torch.get_num_threads(), 'torch': torch.__version__, 'machine': machine(), **more}), flush=True)


def seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def native() -> torch.dtype:
    """What this machine computes in: DTYPE auto of the recipes."""
    from scepter.core.env import we
    from scepter.solvers.step import best_dtype
    return best_dtype(we.device)


def spelled(kind: torch.dtype) -> str:
    return str(kind).removeprefix('torch.')


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    text = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    return next((line.split(':')[1].strip() for line in text.splitlines() if line.startswith('model name')), platform.processor())


# ------------------------------------------------------------------------------------------------ the solver's loop
def overhead(args: argparse.Namespace) -> None:
    """The digits recipe with its average of the weights, by the solver and by a bare loop: same networks, optimizer, data, arithmetic."""
    from scepter.core.env import we
    steps = 2
    with tempfile.TemporaryDirectory() as folder:
        cfg = recipe(DIGITS, folder)
        ours, peer = built(cfg), built(cfg)
        loop = bare_loop(peer.model, peer.datasets['train'], cfg.SOLVER, steps, peer.autocast, we.device)
        compare('overhead', stepping(ours, steps), loop, args.pairs, 's/step', share=steps, recipe='examples/digits',
                dtype=spelled(peer.dtype))


def scaling(args: argparse.Namespace) -> None:
    """Two processes: the digits recipe by the solver and by a bare DDP loop. And what a process holds of Stable Diffusion 1.5's UNet, by
    shares and whole, counted on the meta device: weights, gradients, two moments, and the blocks at work; no activations."""
    import scepter.components  # noqa: F401
    from scepter.core.config import Config
    from scepter.core.launch import launch
    from scepter.core.registry import BACKBONES
    device = {} if torch.cuda.device_count() > 1 else {'DEVICE': 'cpu', 'THREADS': args.threads}
    with tempfile.TemporaryDirectory() as folder:
        launch(Config({'FOLDER': folder, 'PAIRS': args.pairs, 'ENV': {'NPROC': 2, **device}}), step_of_two)
    with torch.device('meta'):
        network = BACKBONES.build(Config.load('sd15.yaml').SOLVER.MODEL.DIFFUSION_MODEL)
    whole = 4 * 4 * sum(p.numel() for p in network.parameters())
    block = max(2 * 4 * sum(p.numel() for p in each.parameters()) for each in network.main_blocks())
    for processes in (2, 8):
        shares = whole / processes + 2 * block      # the next one is gathered while one computes
        ratio = shares / whole
        report(f'memory of a process, fsdp of {processes} / ddp', shares / 1e9, whole / 1e9, ratio, ratio, ratio, 'GB', 1,
               recipe='sd15.yaml', how='counted on the meta device, without activations')


def step_of_two(cfg: Any) -> None:
    """What each of the two processes does; the main one tells."""
    from torch.nn.parallel import DistributedDataParallel

    from scepter.core import streams
    from scepter.core.env import we
    digits = recipe(DIGITS, cfg.FOLDER)
    digits.SOLVER.TRAIN_HOOKS = []      # the peer keeps no average
    ours, peer = built(digits), built(digits)
    steps, micro = 2, ours.plan.micro
    sampler = torch.utils.data.DistributedSampler(peer.datasets['train'], drop_last=True)
    loader = torch.utils.data.DataLoader(peer.datasets['train'], micro, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(peer.model, find_unused_parameters=False)
    batches = endless(loader)
    update = Update(peer.model, torch.optim.AdamW([p for p in peer.model.parameters() if p.requires_grad], lr=1e-4, fused=True))

    def loop() -> None:
        for step in range(steps):
            with streams.current(0, torch.arange(micro), step), peer.autocast():
                loss = model('train', **peer.to_device(next(batches)))['loss']
            update(loss)

    compare('scaling, two processes: solver / bare DDP loop', stepping(ours, steps), loop, cfg.PAIRS, 's/step', share=steps,
            is_told=we.is_main, recipe='examples/digits', dtype=spelled(peer.dtype), device=str(we.device.type))
    ours.after_solve()


def bare_loop(model: Any, dataset: Any, cfg: Any, steps: int, autocast: Callable[[], Any], device: Any) -> Callable[[], None]:
    """What one would write without a framework, an average of the weights included."""
    batches = endless(torch.utils.data.DataLoader(dataset, cfg.TRAIN_DATA.BATCH_SIZE, shuffle=True, drop_last=True))
    groups = [{'params': list(part.parameters()), 'lr': node.LEARNING_RATE}
              for part, node in ((model.model, cfg.OPTIMIZER.UNET), (model.cond_stage_model, cfg.OPTIMIZER.TEXT))]
    optimizer = torch.optim.AdamW(groups, betas=tuple(cfg.OPTIMIZER.UNET.BETAS), weight_decay=0.0, fused=True)
    update = Update(model, optimizer, cfg.TRAIN_HOOKS[0].BETA)
    alphas, sigmas = model.diffusion.alphas.float().to(device), model.diffusion.sigmas.float().to(device)

    def loop() -> None:
        for _ in range(steps):
            batch = next(batches)
            image = batch['image'].to(device)
            with autocast():
                with torch.no_grad():
                    x0 = model.first_stage_model.encode(image).latent_dist.sample().float()
                t = torch.randint(len(alphas), (len(x0),), device=device)
                prompts = [p if keep else '' for p, keep in zip(batch['prompt'], (torch.rand(len(x0)) >= 0.1).tolist())]
                tokens = model.cond_stage_model.tokenize(prompts).to(device)
                with torch.autocast(device.type, enabled=False):
                    context = model.cond_stage_model.encode_text(tokens)
                noise, alpha, sigma = torch.randn_like(x0), alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)
                out = model.model(alpha * x0 + sigma * noise, t, context)
                loss = torch.nn.functional.mse_loss(out.float(), alpha * noise - sigma * x0)
            update(loss)
    return loop


# ------------------------------------------------------------------------------------------------ the command line
def startup(args: argparse.Namespace) -> None:
    """Whole processes: --help against an empty Python, --check against `import torch`."""
    def process(*words: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)

    compare('startup --help', process('scepter/run_train.py', '--help'), process('-c', 'pass'), args.pairs)
    compare('startup --check', process('scepter/run_train.py', '--cfg', 'sd15.yaml', '--check'), process('-c', 'import torch'), args.pairs)


# ------------------------------------------------------------------------------------------------ networks of published size
def networks(recipe: str) -> tuple[Any, Any, Callable[..., tuple]]:
    """Our UNet of a shipped recipe and diffusers' of the same weights, native type, channels-last; and a maker of their inputs."""
    import diffusers

    import scepter.components  # noqa: F401
    from scepter.core.config import Config
    from scepter.core.env import we
    from scepter.core.registry import BACKBONES
    from scepter.weights import Weights
    from scepter.weights.families.unet import UNET
    node = Config.load(recipe).SOLVER.MODEL.DIFFUSION_MODEL
    is_xl = 'xl' in recipe
    settings = {'block_out_channels': (320, 640, 1280), 'down_block_types': ('DownBlock2D', *['CrossAttnDownBlock2D'] * 2),
                'up_block_types': (*['CrossAttnUpBlock2D'] * 2, 'UpBlock2D'), 'transformer_layers_per_block': (1, 2, 10),
                'attention_head_dim': (5, 10, 20), 'cross_attention_dim': 2048, 'use_linear_projection': True,
                'addition_embed_type': 'text_time', 'addition_time_embed_dim': 256, 'projection_class_embeddings_input_dim': 2816,
                } if is_xl else {'cross_attention_dim': 768, 'attention_head_dim': 8}
    kind = native()
    torch.set_default_dtype(kind)     # so that neither stands in memory in float32 first
    try:
        torch.manual_seed(0)
        ours = BACKBONES.build(node)
        with torch.device('meta'):
            peer = diffusers.UNet2DConditionModel(**settings)
    finally:
        torch.set_default_dtype(torch.float32)
    for p in ours.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.01)
    shapes = {name: value.shape for name, value in peer.state_dict().items()}
    weights = UNET.to_theirs(Weights.of(ours.state_dict()))
    peer.load_state_dict({name: value.reshape(shapes[name]).clone() for name, value in weights.items()}, assign=True)
    move = {'device': we.device, 'memory_format': torch.channels_last}
    ours, peer = ours.to(**move), peer.to(**move)

    def inputs(rows: int, side: int) -> tuple:
        x = torch.randn(rows, 4, side, side, dtype=kind, device=we.device).to(memory_format=torch.channels_last)
        context = torch.randn(rows, 77, settings['cross_attention_dim'], dtype=kind, device=we.device)
        pooled, sizes = torch.randn(rows, 1280, dtype=kind, device=we.device), torch.full((rows, 6), 1024.0, device=we.device)
        from scepter.models.condition import Condition
        from scepter.models.layers import timestep_embedding
        cond = Condition(context)
        added = None
        if is_xl:
            cond = Condition(context, torch.cat([pooled, timestep_embedding(sizes, 256).flatten(1).to(kind)], 1))
            added = {'text_embeds': pooled, 'time_ids': sizes}
        return x, torch.full((rows,), 500, device=we.device), cond, context, added
    return ours, peer, inputs


def infer(recipe: str, side: int) -> Callable[[argparse.Namespace], None]:
    def measure(args: argparse.Namespace) -> None:
        """One guided step: both conditions in one batched call; ours has the context's keys and values from the step before."""
        ours, peer, inputs = networks(recipe)
        pixels = args.size or side
        x, t, cond, context, added = inputs(2, pixels // 8)
        with torch.inference_mode():
            known = ours.precompute(cond)
            mine, theirs = ours(x, t, known), peer(x, t, context, added_cond_kwargs=added).sample
            difference = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
            more = {'recipe': recipe, 'pixels': pixels, 'dtype': spelled(native()), 'relative_difference': round(difference, 5)}

            def eager_peer() -> Any:
                return peer(x, t, context, added_cond_kwargs=added).sample

            if not args.compile:
                compare(f'{recipe} step, eager / diffusers eager', lambda: ours(x, t, known), eager_peer, args.pairs, **more)
                return
            fast, fast_peer = torch.compile(ours), torch.compile(peer)
            for name, other in (('diffusers compiled', lambda: fast_peer(x, t, context, added_cond_kwargs=added).sample),
                                ('diffusers eager', eager_peer)):
                compare(f'{recipe} step, compiled / {name}', lambda: fast(x, t, known), other, args.pairs, **more)
    return measure


def sd15_train(args: argparse.Namespace) -> None:
    """Forward, backward and fused AdamW on one latent, weights in the native type."""
    ours, peer, inputs = networks('sd15.yaml')
    pixels = args.size or 512
    x, t, cond, context, _ = inputs(1, pixels // 8)
    target = torch.randn_like(x)

    def step(network: Any, run: Callable[[], Any]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-5, fused=True)

        def work() -> None:
            torch.nn.functional.mse_loss(run().float(), target.float()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return work

    compare('sd15.yaml training step, eager / diffusers eager', step(ours, lambda: ours(x, t, cond)),
            step(peer, lambda: peer(x, t, context).sample), args.pairs, pixels=pixels, dtype=spelled(native()))


def checkpointing(args: argparse.Namespace) -> None:
    """Stable Diffusion 1.5, native type, one picture: gigabytes kept for the backward pass against level 0, time of both passes."""
    import scepter.components  # noqa: F401
    from scepter.core.config import Config
    from scepter.core.registry import BACKBONES, MODELS
    cfg = Config.load('sd15.yaml').SOLVER.MODEL
    pixels, kind = args.size or 512, native()

    def unet(level: int) -> tuple[Any, Callable[[Any], torch.Tensor]]:
        network = BACKBONES.build({**cfg.DIFFUSION_MODEL, 'CHECKPOINTING': level}).to(kind)
        x, context = torch.randn(1, 4, pixels // 8, pixels // 8, dtype=kind), torch.randn(1, 77, 768, dtype=kind)
        return network, lambda n: n(x, torch.tensor([500]), context).float().square().mean()

    def autoencoder(level: int) -> tuple[Any, Callable[[Any], torch.Tensor]]:
        parts = {name: {**cfg.FIRST_STAGE_MODEL[name], 'CHECKPOINTING': level} for name in ('ENCODER', 'DECODER')}
        network = MODELS.build({**cfg.FIRST_STAGE_MODEL, **parts}).to(kind)
        image = torch.rand(1, 3, pixels // 2, pixels // 2, dtype=kind) * 2 - 1
        return network, lambda n: n.forward_train(image)['loss']

    for name, build, levels in (('UNet', unet, (0, 1, 2)), (f'autoencoder at {pixels // 2}', autoencoder, (0, 3))):
        base: tuple[float, float] | None = None
        for level in levels:
            network, loss = build(level)
            network = network.train().to(memory_format=torch.channels_last)
            gigabytes = kept(network, loss)
            network.zero_grad()
            passes = float(np.median([seconds(partial(both_passes, network, loss)) for _ in range(3)]))
            base = base or (gigabytes, passes)
            ratio = gigabytes / base[0]
            report(f'checkpointing {level}, {name}', gigabytes, base[0], ratio, ratio, ratio, 'GB', 1, pixels=pixels,
                   time_ratio=round(passes / base[1], 3), dtype=spelled(kind))
            del network


def both_passes(network: Any, loss: Callable[[Any], torch.Tensor]) -> None:
    loss(network).backward()


def kept(network: Any, loss: Callable[[Any], torch.Tensor]) -> float:
    """Gigabytes of activations that a forward pass keeps; a storage counts once, weights not at all."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(network)
    total = sum(storages.values()) / 1e9
    del result
    return total


# ------------------------------------------------------------------------------------------------ checkpoints
def checkpoint(args: argparse.Namespace) -> None:
    """Save and load with every byte verified, against torch.save, fsync and hashlib of the same bytes; and what ASYNC_SAVE has wait.

    Both write over what the call before has left. In TMPDIR, which should be on the disk that checkpoints will lie on.
    """
    from scepter.core.disk import checkpoints
    from scepter.core.disk.writing import Save
    megabytes = args.size or 1000
    tensors = {f'block.{i}.weight': torch.randn(1000, 1000) for i in range(max(1, megabytes // 4))}
    more = {'megabytes': megabytes}
    with tempfile.TemporaryDirectory() as folder:
        root, file = Path(folder) / 'checkpoints', Path(folder) / 'peer.pt'
        digests: list[str] = []

        def save() -> Path:
            return checkpoints.save(root, 1, {'model': tensors}, {}, '')

        def load() -> None:
            checkpoints.load(root / 'step-00000001').group('model')

        def peer_save() -> None:
            torch.save(tensors, file.with_suffix('.new'))
            with open(file.with_suffix('.new'), 'rb') as written:
                os.fsync(written.fileno())
                digests[:] = [hashlib.file_digest(written, 'sha256').hexdigest()]
            os.replace(file.with_suffix('.new'), file)

        def peer_load() -> None:
            with open(file, 'rb') as found:
                if [hashlib.file_digest(found, 'sha256').hexdigest()] != digests:
                    raise ValueError(f'{file} is damaged')
            torch.load(file, weights_only=True)

        compare('checkpoint save / torch.save, fsync, sha256', save, peer_save, args.pairs, **more)
        compare('checkpoint load, verified / torch.load, sha256', load, peer_load, args.pairs, **more)
        room: dict[tuple[str, str], torch.Tensor] = {}
        compare('checkpoint, what the loop waits with ASYNC_SAVE / without',
                lambda: Save.of(root, 1, lambda: ({'model': tensors}, {})).hold(room), save, args.pairs, **more)


def resume(args: argparse.Namespace) -> None:
    """From nothing to the first batch of a step, against PyTorch's sampler skipping all that went before."""
    from torch.utils.data import BatchSampler, RandomSampler

    from scepter.data.datasets import BaseDataset
    from scepter.data.loader import Loader
    samples, size, step = (args.size or 10_000) * 1000, 64, 100_000

    class Numbers(BaseDataset):
        """As many samples as are asked for, each no more than its number."""

        def __len__(self) -> int:
            return samples

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {'number': index}

    def ours() -> None:
        next(Loader(Numbers({}), size, seed=7, first=step * size))

    def peer() -> None:
        begin = step % (samples // size)    # in the epoch that the step is in
        batches = BatchSampler(RandomSampler(range(samples), generator=torch.Generator().manual_seed(7)), size, drop_last=True)
        torch.tensor(next(itertools.islice(batches, begin, None)))

    compare(f'resume at step {step:,} / skipping', ours, peer, args.pairs, samples=samples, batch=size)


# ------------------------------------------------------------------------------------------------ data
def loader(args: argparse.Namespace) -> None:
    """Photographs as JPEG, read, scaled, cut and mirrored, against torchvision's ImageFolder with the same transforms and workers."""
    import torchvision
    from PIL import Image

    import scepter.components  # noqa: F401
    from scepter.core.registry import DATASETS
    pixels, count, batch, workers = args.size or 512, args.count or 256, 16, min(2, os.cpu_count() or 1)
    chance, t = np.random.default_rng(0), torchvision.transforms
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / 'photographs' / 'one'
        folder.mkdir(parents=True)
        for i in range(count):    # smooth, with some grain, twice as large as they are needed; half of them wide, half of them tall
            size = (pixels * 8 // 3, pixels * 2)[::-1 if i % 2 else 1]
            small = Image.fromarray(chance.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
            grain = chance.normal(0, 6, (size[1], size[0], 3))
            Image.fromarray((np.asarray(small) + grain).clip(0, 255).astype(np.uint8)).save(folder / f'{i:05d}.jpg', quality=90)
        ours = DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(folder), 'BATCH_SIZE': batch, 'NUM_WORKERS': workers,
                               'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': pixels, 'FLIP': 0.5}]})
        peer = torchvision.datasets.ImageFolder(str(folder.parent), t.Compose([
            t.Resize(pixels, t.InterpolationMode.BICUBIC), t.CenterCrop(pixels), t.RandomHorizontalFlip(), t.ToTensor(),
            t.Normalize(0.5, 0.5)]))
        compare(f'loader, JPEG to {pixels} px / torchvision ImageFolder', epoch_of_ours(ours, count), epoch_of_peer(peer, batch, workers),
                args.pairs, 's/image', share=count, workers=workers, images=count, file_pixels=list(size))


def latents(args: argparse.Namespace) -> None:
    """Moments out of a cache, with their captions, against the same moments alone in one TensorDataset: in the main process and by two
    workers; the first epoch, which looks at every checksum; and against codewithgpu's reader, with captions, where that is installed."""
    from PIL import Image

    import scepter.components  # noqa: F401
    from scepter.core.registry import DATASETS
    from scepter.data.cache import CachedDataset, Pictures
    count, batch, side = args.count or 2048, 32, (args.size or 512) // 8
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / 'pictures'
        folder.mkdir()
        for i in range(count):
            Image.new('RGB', (8, 8), (i % 256, i // 256, 0)).save(folder / f'{i:05d}.png')
        (folder / 'metadata.csv').write_text('file_name,text\n' + ''.join(f'{i:05d}.png,picture {i}\n' for i in range(count)))
        moments = torch.randn(count, 8, side, side)

        def cached(*transforms: dict[str, Any]) -> CachedDataset:
            pictures = DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(folder), 'BATCH_SIZE': batch,
                                       'TRANSFORMS': list(transforms)})
            rows = Pictures(pictures, Path(name) / 'cache', encoder='none')
            rows.fill(lambda images: torch.randn(len(images), *moments.shape[1:]), 16)
            rows.look()
            return CachedDataset(pictures, rows)

        what, more = f'loader, cached moments of {side * 8} px', {'rows': count, 'megabytes': round(moments.nbytes / 1e6)}
        ours, peer = cached(), torch.utils.data.TensorDataset(moments)

        def against(beside: str, epoch: Callable[[], None], peer: Any, workers: int = 0) -> None:
            compare(f'{what} / {beside}', epoch, epoch_of_peer(peer, batch, workers), args.pairs, 'us/row', share=count / 1e6,
                    workers=workers, **more)

        def first_epoch() -> None:
            ours.pictures.look()    # forgets which rows are known to be sound
            epoch_of_ours(ours, count)()

        for workers in (0, 2):
            against('TensorDataset', epoch_of_ours(ours, count, workers), peer, workers)
        against('TensorDataset, first epoch', first_epoch, peer)
        mirrored = cached({'NAME': 'RecordedCrop', 'SIZE': 8, 'FLIP': 0.5})
        against('TensorDataset, ours mirrored by chance, with sizes and cuts', epoch_of_ours(mirrored, count), peer)
        if importlib.util.find_spec('codewithgpu'):
            against('codewithgpu', epoch_of_ours(ours, count), records(Path(name) / 'records', moments))


def records(folder: Path, moments: torch.Tensor) -> Any:
    """Moments and captions in record files, read by codewithgpu as its users do."""
    import codewithgpu

    from scepter.data.records import RecordWriter
    folder.mkdir()
    with RecordWriter(str(folder), {'moments': 'bytes', 'text': 'string'}) as writer:
        for i, row in enumerate(moments):
            writer.write({'moments': row.numpy().tobytes(), 'text': f'picture {i}'})

    class Records(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.reader = codewithgpu.RecordDataset(str(folder))

        def __len__(self) -> int:
            return len(self.reader)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
            row = self.reader[index]
            return torch.frombuffer(bytearray(row['moments']), dtype=torch.float32).reshape(moments.shape[1:]), row['text']

    return Records()


def epoch_of_ours(dataset: Any, count: int, workers: int | None = None) -> Callable[[], None]:
    """An epoch by a loader that is begun for it: none reads ahead while the other is measured."""
    from scepter.data.loader import Loader

    def epoch() -> None:
        begun = Loader(dataset, seed=1, num_workers=workers)
        for _ in range(count // dataset.BATCH_SIZE):
            next(begun)
        begun.close()
    return epoch


def epoch_of_peer(dataset: Any, batch: int, workers: int) -> Callable[[], None]:
    def epoch() -> None:
        for _ in torch.utils.data.DataLoader(dataset, batch, shuffle=True, num_workers=workers, drop_last=True):
            pass
    return epoch


OPEN = """
import resource, sys, time
import scepter.components
from scepter.core.registry import DATASETS
before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
dataset = DATASETS.build({'NAME': 'ImageTextTableDataset', 'TABLE': sys.argv[1], 'BUCKETS': 512, 'TRANSFORMS': [{'NAME': 'RecordedCrop'}]})
names = [dataset.name_of(i * 7919 % len(dataset)) for i in range(100)]    # each maps 64 kB
print(time.perf_counter() - begin, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def opening(args: argparse.Namespace) -> None:
    """A list of a million rows with sizes: the first start, which reads it, against a later one, each a process of its own."""
    count = args.count or 1_000_000
    with tempfile.TemporaryDirectory() as name:
        table = Path(name) / 'list.txt'
        with open(table, 'w') as file:
            file.writelines(f'images/{i // 1000:05d}/{i:08d}.jpg#;#{512 + i % 7 * 64}#;#{512 + i % 5 * 64}#;#a caption, number {i}\n'
                            for i in range(count))

        def start() -> tuple[float, float]:
            done = subprocess.run([sys.executable, '-c', OPEN, str(table)], cwd=ROOT, check=True, capture_output=True, text=True,
                                  env={**os.environ, 'SCEPTER_CACHE': f'{name}/cache'})
            passed, grown = map(float, done.stdout.split())
            return passed, grown

        (first, _), later = start(), [start() for _ in range(min(5, args.pairs))]
        passed = [row[0] for row in later]
        middle = float(np.median(passed))
        report(f'open {count:,} rows, later start / first', middle, first, middle / first, min(passed) / first, max(passed) / first, 's',
               len(later), grown_mb=round(float(np.median([row[1] for row in later])), 1))


# ------------------------------------------------------------------------------------------------ filling a cache
def cache(args: argparse.Namespace) -> None:
    """SOLVER.CACHE with Stable Diffusion's autoencoder, from JPEGs to checked shards, against a loop that keeps nothing."""
    from PIL import Image

    import scepter.components  # noqa: F401
    from scepter.core.config import Config
    from scepter.core.env import we
    from scepter.core.registry import DATASETS, MODELS
    from scepter.data.cache import Pictures
    from scepter.data.loader import OrderedLoader
    from scepter.models.latent import LatentSpace
    size, count, batch, kind = args.size or 512, args.count or 64, 8, native()
    torch.manual_seed(0)
    model = MODELS.build(Config.load('sd15.yaml').SOLVER.MODEL.FIRST_STAGE_MODEL).to(we.device).eval()
    space = LatentSpace.of(model, 1.0, 0.0, model.size_factor, model.EMBED_DIM)

    def encode(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(we.device.type, kind, enabled=kind != torch.float32):
            return space.moments(x.to(we.device))

    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)
        for i in range(count):
            pixels = draw.integers(0, 256, (size // 16, size // 12, 3), np.uint8)
            Image.fromarray(pixels).resize((size * 4 // 3, size)).save(f'{folder}/{i}.jpg', quality=90)
        data = DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': folder, 'BATCH_SIZE': batch,
                               'TRANSFORMS': [{'NAME': 'RecordedCrop', 'SIZE': size}]})
        fresh = iter(range(10 ** 6))

        def ours() -> None:
            Pictures(data, Path(folder) / f'cache-{next(fresh)}', 'sd15').fill(encode, batch)

        def peer() -> None:
            for rows, _ in OrderedLoader(data, batch):
                encode(rows['image']).cpu()

        compare('cache', ours, peer, args.pairs, unit='s/image', share=count, size=size, images=count, dtype=spelled(kind))


BENCHMARKS: dict[str, Callable[[argparse.Namespace], None]] = {
    'overhead': overhead, 'startup': startup, 'sd15-infer': infer('sd15.yaml', 512), 'sd15-train': sd15_train,
    'sdxl-infer': infer('sdxl/sdxl_1024.yaml', 1024), 'checkpointing': checkpointing, 'checkpoint': checkpoint, 'resume': resume,
    'loader': loader, 'latents': latents, 'open': opening, 'cache': cache,
    'scaling': scaling, 'nova-train': partial(bench_nova.train, compare=compare),
    'nova-sample': partial(bench_nova.sample, compare=compare)}

if __name__ == '__main__':
    main()
