"""NOVA, for tools/bench.py: a training step beside a bare loop, and clips drawn with keys and values kept beside the sequence anew."""
from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_training import Update, built, endless, recipe, stepping


def train(args: argparse.Namespace, compare: Callable[..., None]) -> None:
    """The digits recipe with its average of the weights, by the solver and by a bare loop: same networks, optimizer, data, arithmetic."""
    steps = 2
    with tempfile.TemporaryDirectory() as folder:
        cfg = recipe('nova/digits_nova.yaml', folder)
        ours, peer = built(cfg), built(cfg)
        compare('nova-train', stepping(ours, steps), bare_loop(peer, cfg.SOLVER, steps), args.pairs, 's/step', share=steps,
                recipe='examples/nova/digits_nova', dtype=str(peer.dtype).removeprefix('torch.'))


def bare_loop(solver: Any, cfg: Any, steps: int) -> Callable[[], None]:
    """What one would write without a framework, an average of the weights included."""
    from scepter.core.env import we
    model, how = solver.model, cfg.OPTIMIZER
    batches = endless(torch.utils.data.DataLoader(solver.datasets['train'], cfg.TRAIN_DATA.BATCH_SIZE, shuffle=True, drop_last=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], how.LEARNING_RATE, tuple(how.BETAS),
                                  weight_decay=how.WEIGHT_DECAY, fused=True)
    update = Update(model, optimizer, cfg.TRAIN_HOOKS[0].BETA)

    def loop() -> None:
        for _ in range(steps):
            with solver.autocast():
                loss = nova_loss(model, next(batches), we.device)
            update(loss)
    return loop


def nova_loss(model: Any, batch: dict[str, Any], device: Any) -> torch.Tensor:
    """Each hidden token from those that are visible, by flow matching."""
    from scepter.models.nova.blocks import patchify
    network = model.model
    with torch.no_grad():
        latents = model.first_stage_model.encode(batch['image'].to(device)).latent_dist.sample().float() * model.SCALE_FACTOR
        told = features(model, batch['prompt'], device)
    told = [text if keep else network.nothing() for text, keep in zip(told, (torch.rand(len(told)) >= 0.1).tolist())]
    x0 = patchify(latents, network.patch)
    order = torch.rand(x0.shape[:2], device=device).argsort(1)
    visible = round((1 - float(torch.nn.init.trunc_normal_(torch.empty(()), 1, model.MASK_STD, model.MASK_LEAST, 1))) * x0.shape[1])
    z = network(latents.unsqueeze(2), network.condition(told), order, visible)
    mask = torch.ones(x0.shape[:2], device=device).scatter(1, order[:, :visible], 0)
    repeat, sigmas = model.LOSS_REPEAT, model.diffusion.sigmas.to(device, torch.float32)
    z, x0, mask = z.repeat(repeat, 1, 1), x0.repeat(repeat, 1, 1), mask.repeat(repeat, 1)
    sigma = sigmas[(torch.randn(x0.shape[:2], device=device).sigmoid() * len(sigmas)).long()][..., None]
    noise = torch.randn_like(x0)
    out = network.image_decoder((1 - sigma) * x0 + sigma * noise, 1000 * sigma[..., 0], z)
    return ((out.float() - noise + x0).square().mean(-1) * mask).sum() / mask.sum()


def features(model: Any, prompts: list[str], device: Any) -> torch.Tensor:
    tokens = model.cond_stage_model.tokenize(prompts).to(device)
    with torch.autocast(device.type, enabled=False):
        return model.cond_stage_model.encode_text(tokens)


def sample(args: argparse.Namespace, compare: Callable[..., None]) -> None:
    """Clips of 5 and of 9 latent frames, guided: all of it with few sets and steps, and what frames before say of a frame alone."""
    import scepter.components  # noqa: F401
    from scepter.core.env import we
    from scepter.core.registry import MODELS
    from scepter.models.nova.drawing import KeyedDraws, Painter
    from scepter.models.nova.encoders import ends_of_frames
    from scepter.models.nova.guidance import Guidance
    from scepter.models.nova.steps import chains
    from scepter.solvers.step import best_dtype
    kind = best_dtype(we.device)

    class Anew(Painter):
        """Without keys and values kept: for each frame the video encoder sees condition and all frames before again."""

        def _indicator(self, frame: Any, number: int, length: int, condition: Any, caches: Any, rows: int) -> torch.Tensor:
            encoder, grid = self.network.video_encoder, self.coarse
            token = self.network.bos(rows, grid) if frame is None else encoder.patch_embed(frame.to(self.dtype))[:, None]
            self.seen = token if frame is None else torch.cat([self.seen, token], 1)    # [B, T, Nv, D]
            x, turns = self.network.with_positions(self.seen.to(condition.dtype), grid, condition.shape[1], 0, length)
            x = x.repeat(self.guidance.passes, 1, 1, 1)
            ends = ends_of_frames(number + 1, x.shape[2], condition.shape[1])
            return encoder(x.flatten(1, 2), condition, turns, ends)[:, -x.shape[2]:]

    pixels, text = args.size or 256, 32
    torch.manual_seed(0)
    model = MODELS.build({'NAME': 'NovaModel', 'NETWORK': {
        'NAME': 'NovaTransformer', 'IMAGE_DIM': 4, 'IMAGE_SIZE': pixels, 'IMAGE_STRIDE': 8, 'TEXT_TOKEN_DIM': 64, 'TEXT_TOKEN_LEN': text,
        'VIDEO_BASE_SIZE': [9, pixels // 32, pixels // 32], 'ARCH': ['vit_d8w512', 'vit_d8w512', 'mlp_d3w512']}})
    model = model.to(we.device, kind).eval()
    network, tokens = model.model, (pixels // 16) ** 2
    condition = [network.condition([torch.randn(n, 64, dtype=kind, device=we.device)]) for n in (text, 0)]

    def painter(of: type[Painter]) -> Painter:
        return of(network, model.diffusion, chains(model.diffusion, 4, 'flow'), model.sampler(), Guidance(5.0),
                    KeyedDraws([1], tokens, 16, we.device), sets=4)

    for length in (5, 9):
        frames = torch.randn(length, 1, 4, pixels // 8, pixels // 8, device=we.device)

        def indicators(of: type[Painter], frames: torch.Tensor = frames) -> list[torch.Tensor]:
            one, told = painter(of), Guidance(5.0).words(*condition)
            caches = network.caches(len(frames), told.shape[1] + len(frames) * tokens // 4)
            return [one._indicator(frames[i - 1] if i else None, i, len(frames), told, caches, 1) for i in range(len(frames))]

        with torch.inference_mode():
            kept, anew = (torch.stack(indicators(of)).float() for of in (Painter, Anew))
            more = {'pixels': pixels, 'length': length, 'dtype': str(kind).removeprefix('torch.'),
                    'relative_difference': round(float((kept - anew).norm() / anew.norm()), 5)}
            compare('nova-sample, what frames before say', partial(indicators, Painter), partial(indicators, Anew), args.pairs, **more)
            compare('nova-sample, 4 sets of 4 steps', partial(painter(Painter).draw, *condition, length),
                    partial(painter(Anew).draw, *condition, length), args.pairs, **more)
