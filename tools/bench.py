"""How fast we are beside a peer, in the same process and in alternating pairs; one JSON line per measurement.

    python tools/bench.py overhead            # the solver's loop against a bare PyTorch loop
    python tools/bench.py startup             # the command line against `import torch`

Each line: {"name", "ours", "peer", "ratio", "low", "high", "unit", "pairs", ...}: medians of both, the median of the pairs' ratios
and its 95 % interval (bootstrap). Machines drift; a pair sees the same machine, so the ratio is what to trust.
"""
from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='+', choices=sorted(BENCHMARKS), help='what to measure')
    parser.add_argument('--pairs', type=int, default=15, help='alternating pairs (default 15)')
    args = parser.parse_args()
    for name in args.names:
        BENCHMARKS[name](args)


def compare(name: str, ours: Callable[[], Any], peer: Callable[[], Any], pairs: int, unit: str = 's', share: float = 1.0,
            **more: Any) -> None:
    """Time both in turn, after one of each that does not count; share: how many units one call holds."""
    times = [(seconds(ours), seconds(peer)) if i % 2 else (seconds(peer), seconds(ours))[::-1] for i in range(pairs + 1)][1:]
    a, b = np.array(times).T / share
    low, high = interval(a / b)
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


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    text = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    return next((line.split(':')[1].strip() for line in text.splitlines() if line.startswith('model name')), platform.processor())


# ------------------------------------------------------------------------------------------------ the solver's loop
def overhead(args: argparse.Namespace) -> None:
    """The digits recipe, by the solver and by a bare loop: same networks, optimizer, data and arithmetic; noise of torch.randn there."""
    import scepter.components  # noqa: F401
    from scepter.core.config import Config
    from scepter.core.env import we
    from scepter.core.experiment import carry_out_imports
    from scepter.core.registry import SOLVERS
    steps = 2
    with tempfile.TemporaryDirectory() as folder:
        cfg = Config.load(ROOT / 'examples' / 'digits' / 'diffusion.yaml', [f'SOLVER.WORK_DIR={folder}', 'SOLVER.TRAIN_HOOKS=[]'])
        carry_out_imports(cfg)
        del cfg.SOLVER.MODEL.FIRST_STAGE_MODEL['PRETRAINED_MODEL']

        def solver() -> Any:
            torch.manual_seed(0)
            built = SOLVERS.build(cfg.SOLVER)
            built.set_up()
            built.train_mode()
            return built

        ours, peer = solver(), solver()
        ours.max_steps = ours.step
        ours.before_all_iter()

        def solve() -> None:
            for _ in range(steps):
                ours.before_iter()
                ours.outputs = ours.run_step_train(ours.batches)
                ours.step += 1
                ours.after_iter()
                ours.save_if_requested()

        compare('overhead', solve, bare_loop(peer.model, peer.datasets['train'], cfg.SOLVER, steps, peer.autocast, we.device), args.pairs,
                's/step', share=steps, recipe='examples/digits')


def bare_loop(model: Any, dataset: Any, cfg: Any, steps: int, autocast: Callable[[], Any], device: Any) -> Callable[[], None]:
    """What one would write without a framework."""
    def endless() -> Any:
        while True:
            yield from torch.utils.data.DataLoader(dataset, cfg.TRAIN_DATA.BATCH_SIZE, shuffle=True, drop_last=True)

    batches = endless()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.OPTIMIZER.LEARNING_RATE, betas=tuple(cfg.OPTIMIZER.BETAS), weight_decay=0.0, fused=True)
    alphas, sigmas = model.diffusion.alphas.float().to(device), model.diffusion.sigmas.float().to(device)

    def loop() -> None:
        for _ in range(steps):
            batch = next(batches)
            image = batch['image'].to(device, memory_format=torch.channels_last)
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
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
    return loop


# ------------------------------------------------------------------------------------------------ the command line
def startup(args: argparse.Namespace) -> None:
    """Whole processes: --help against an empty Python, --check against `import torch`."""
    def process(*words: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)

    compare('startup --help', process('scepter/run_train.py', '--help'), process('-c', 'pass'), args.pairs)
    compare('startup --check', process('scepter/run_train.py', '--cfg', 'sd15.yaml', '--check'), process('-c', 'import torch'), args.pairs)


BENCHMARKS: dict[str, Callable[[argparse.Namespace], None]] = {'overhead': overhead, 'startup': startup}

if __name__ == '__main__':
    main()
