"""LatentDiffusion: an autoencoder, a network that removes noise in its latent space, and an embedder that tells it what to draw.

Without an autoencoder the network draws pixels. latent.py has the space that it draws in, inpainting.py what a given picture does.
"""
from __future__ import annotations

import fnmatch
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scepter.core import streams
from scepter.core.config import Config
from scepter.core.env import we
from scepter.core.errors import CheckpointError, ScepterError
from scepter.core.faults import ConfigError, Fault
from scepter.core.registry import BACKBONES, EMBEDDERS, LEVELS, LOSSES, MODELS, SAMPLERS, SCHEDULES
from scepter.core.schema import default, param, part
from scepter.models.base import TrainModule
from scepter.models.condition import Condition, Widths
from scepter.models.inpainting import Given
from scepter.models.latent import LatentSpace, size_factor_of, size_factor_told, size_faults
from scepter.models.process import process_of
from scepter.models.resting import Encoder
from scepter.models.unfilled import unfilled


@MODELS.register_class()
class LatentDiffusion(TrainModule):
    """Latent diffusion (Rombach et al. 2022).    image [B, 3, H, W] in -1..1 and prompts -> loss;  prompts -> images in 0..1

    Parts: `model` (the denoising network), `first_stage_model` (frozen), `cond_stage_model` (its own FREEZE decides), `diffusion`.
    """

    DIFFUSION_MODEL: dict = part(BACKBONES, 'The network that removes noise: (x, t, cond) -> prediction.')
    FIRST_STAGE_MODEL: dict | None = part(MODELS, 'The autoencoder; always frozen. Null: the network draws pixels, and SCALE_FACTOR is 1.',
                                          default=None)
    COND_STAGE_MODEL: dict | None = part(EMBEDDERS, 'From prompts, or labels, to what the network is told; null: it is told nothing.',
                                         default=None)
    LOSS: dict | None = part(LOSSES, 'The error of each element of the prediction; default its square.', default=None)

    PARAMETERIZATION: Literal['eps', 'x0', 'v', 'flow'] = param('eps', 'What the network predicts.')
    TIMESTEPS: int = param(1000, 'Levels of noise in training.', least=1)
    TIMESTEP_DENSITY: dict = part(LEVELS, 'How often training draws each level.', default={'NAME': 'uniform'})
    SCHEDULE_ARGS: dict = part(SCHEDULES, 'How noise grows over the levels.', default={'NAME': 'scaled_linear'})
    ZERO_TERMINAL_SNR: bool = param(False, 'Rescale the schedule so that the last level is pure noise (2305.08891); not for eps.')
    MIN_SNR_GAMMA: float | None = param(None, 'Weigh the loss by min(SNR, gamma) (2303.09556); 5 is usual.', above=0)
    OFFSET_NOISE: float = param(0.0, 'Share of noise that is constant over each channel, for very dark and very bright pictures.', least=0)
    INPUT_PERTURBATION: float = param(0.0, 'Extra noise on what the network sees, but not on its target (2301.11706).', least=0)

    SCALE_FACTOR: float = param(0.18215, 'Latents are multiplied by this, so that their variance is about 1.', above=0)
    SHIFT_FACTOR: float = param(0.0, 'Taken from latents before that: (z - shift) * scale; SD3 and FLUX have one.')
    SIZE_FACTOR: int | None = param(None, 'How much smaller than the image a latent is, per side; null: as the autoencoder says.', least=1)
    IMAGE_SIZE: int | tuple[int, int] = param(512, 'Size to draw where none is given: pixels, or [height, width].', least=1)
    NUM_FRAMES: int | None = param(None, 'Frames to draw where none are given; null: pictures.', least=1)
    P_ZERO: float = param(0.0, 'Share of prompts that training replaces by TRAIN_N_PROMPT, so that guidance can work.', least=0, most=1)
    TRAIN_N_PROMPT: str = param('', 'What training puts in place of a dropped prompt.')
    DEFAULT_N_PROMPT: str = param('', 'The negative prompt of pictures that come without one.')
    FREEZE: list[str] = param([], 'Names or globs of parameters that are not trained, e.g. model.input_blocks.*')
    PRETRAINED_MODEL: str | None = param(None, 'Weights of the whole: a single file, a diffusers folder, a checkpoint of ours.')
    IGNORE_KEYS: list[str] = param([], 'Names or globs of weights that may be missing, left over or of another shape.')

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        yield from size_faults(cfg)
        try:
            process_of(cfg)
        except ValueError as error:
            yield Fault('PARAMETERIZATION', f'{cfg.PARAMETERIZATION} on {cfg.SCHEDULE_ARGS.NAME}: {error}')

    @classmethod
    def side_multiple(cls, cfg: Config) -> int | None:
        return size_factor_told(cfg) or cfg.SIZE_FACTOR

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        with unfilled(self.cfg) if self.PRETRAINED_MODEL is not None else nullcontext():
            self.model = BACKBONES.build(self.DIFFUSION_MODEL, logger=logger)
            self.first_stage_model = MODELS.build(self.FIRST_STAGE_MODEL, logger=logger) if self.FIRST_STAGE_MODEL is not None else None
            self.cond_stage_model = EMBEDDERS.build(self.COND_STAGE_MODEL, logger=logger) if self.COND_STAGE_MODEL is not None else None
        self.loss = LOSSES.build(self.LOSS, logger=logger) if self.LOSS is not None else None

        self.diffusion, self.draw_levels = process_of(self.cfg), LEVELS.function(self.TIMESTEP_DENSITY)
        self.num_timesteps, self.scale_factor, self.shift_factor = self.TIMESTEPS, self.SCALE_FACTOR, self.SHIFT_FACTOR
        self.size_factor = size_factor_of(self.first_stage_model, self.SIZE_FACTOR)
        self.p_zero, self.train_n_prompt, self.default_n_prompt = self.P_ZERO, self.TRAIN_N_PROMPT, self.DEFAULT_N_PROMPT
        self._check_parts()

        if self.PRETRAINED_MODEL is not None:
            self.load_pretrained(self.PRETRAINED_MODEL, self.IGNORE_KEYS)
        if self.first_stage_model is not None:
            self.first_stage_model.freeze()
        for name, parameter in self.named_parameters():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.FREEZE):
                parameter.requires_grad_(False)

    def _check_parts(self) -> None:
        """Refuse parts that cannot work together before anything is computed. Parts that do not tell their sizes are left alone."""
        latent, takes = self.space.channels, self.model.takes or Widths()
        if takes.channels not in (None, latent):
            raise _misfit(self.first_stage_model, f'the autoencoder gives {latent} channels (EMBED_DIM), but the network predicts '
                                                  f'{takes.channels} (OUT_CHANNELS)')
        if problem := self.space.misfit(self.IGNORE_KEYS):
            raise _misfit(self.first_stage_model, problem)
        gives = Widths() if self.cond_stage_model is None else self.cond_stage_model.gives
        if self.model.takes is not None and gives is not None and (problem := gives.misfit(takes)):
            raise _misfit(self.cond_stage_model, problem)

    # ---------------------------------------------------------------- training
    def forward_train(self, image: Tensor | None = None, moments: Tensor | None = None, noise: Tensor | None = None,
                      prompt: list[str] | None = None, label: Tensor | None = None, video: Tensor | None = None,
                      **batch: Any) -> dict[str, Any]:
        """image [B, 3, H, W] or video [B, 3, T, H, W] in -1..1, or moments [B, 2C, ...] of an earlier encoding -> {'loss', 'probe_data'}.

        prompt: list of B, or label: int64 [B], whichever the embedder reads. Raises ValueError where it is missing.
        """
        x0 = self.encode_first_stage(default(video, image)) if moments is None else self.space.draw(moments)
        t = self.draw_levels('timestep', self.num_timesteps, len(x0))
        probe: dict[str, Any] = {'t': t}
        model_kwargs = {}
        if self.cond_stage_model is not None:
            dropped = streams.uniform('drop_caption', len(x0)) < self.p_zero
            if self.reads_labels and label is not None:
                tokens = self.cond_stage_model.without(label.to(self.device), dropped.to(self.device))
                probe['label'] = tokens
            elif prompt is not None:
                probe['prompt'] = [self.train_n_prompt if drop else p for p, drop in zip(prompt, dropped.tolist())]
                tokens = self.tokenizer(probe['prompt']).to(self.device) if self.unsaid is None else None
            else:
                raise ValueError(f'{type(self.cond_stage_model).__name__} reads the {"label" if self.reads_labels else "prompt"} of each '
                                 f'sample, but the batch has only {", ".join(["image", *batch])}: add it to the dataset, '
                                 'or set COND_STAGE_MODEL to null')
            model_kwargs = {'cond': self._kept_condition(dropped, batch) if tokens is None else
                            self.encode_condition(tokens, **self._read_sizes(batch))}
        weight = self.diffusion.min_snr(self.MIN_SNR_GAMMA) if self.MIN_SNR_GAMMA is not None else None
        loss = self.diffusion.loss(x0, t.to(x0.device), self.model, model_kwargs, noise, criterion=self.loss, weight=weight,
                                   offset_noise=self.OFFSET_NOISE, input_perturbation=self.INPUT_PERTURBATION)
        return {'loss': loss.mean(), 'probe_data': probe}

    # ---------------------------------------------------------------- what is computed once, before training
    unsaid: dict[str, Tensor] | None = None    # features of TRAIN_N_PROMPT, where training is given features in the place of words

    def encoders(self) -> dict[Literal['picture', 'prompt'], Encoder]:
        found: dict[Literal['picture', 'prompt'], Encoder] = {}
        if self.first_stage_model is not None:
            found['picture'] = Encoder('first_stage_model', self.space.moments)
        if self.cond_stage_model is not None and self._can_keep_words(self.cond_stage_model):
            found['prompt'] = Encoder('cond_stage_model', self._words)
        return found

    @staticmethod
    def _can_keep_words(embedder: Any) -> bool:
        """Whether features of a prompt depend on it alone: nothing is trained, and no longer prompt of its batch adds a chunk to it."""
        parameters, parts = list(embedder.parameters()), embedder.modules()
        is_chunked = any(m.cfg.get('LONG_PROMPT') == 'chunk' for m in parts if isinstance(getattr(m, 'cfg', None), dict))
        return embedder.reads == 'prompt' and parameters != [] and not is_chunked and not any(p.requires_grad for p in parameters)

    def _words(self, prompts: list[str]) -> dict[str, Tensor]:
        """Features of prompts, name -> [B, ...]: the parts of a Condition, without the sizes."""
        embedder = self.cond_stage_model
        tokens = self.tokenizer(prompts).to(embedder.device)
        with torch.autocast(tokens.device.type, enabled=False):
            told = Condition.of(embedder.encode_words(tokens))._asdict()
        return {name: value for name, value in told.items() if value is not None}

    def rest(self, part: str, file: Path, is_writer: bool = True) -> bool:
        if part == 'cond_stage_model':
            self.unsaid = {name: value[0] for name, value in self._words([self.train_n_prompt]).items()}
        return super().rest(part, file, is_writer)

    def _kept_condition(self, dropped: Tensor, batch: Mapping[str, Any]) -> Any:
        """What encode_condition would give, of features that come with the batch (text_context, ...) in the place of words."""
        kept = {name: batch[f'text_{name}'] for name in self.unsaid}
        rows = {name: torch.where(dropped.to(value.device).view(-1, *[1] * (value.ndim - 1)), self.unsaid[name].to(value), value)
                for name, value in kept.items()}
        words = rows['context'] if rows.keys() == {'context'} else Condition(**rows)
        with torch.autocast(self.device.type, enabled=False):
            return self.cond_stage_model.with_sizes(words, **self._read_sizes(batch))

    @property
    def space(self) -> LatentSpace:
        """Where the network diffuses."""
        pixels = (self.model.takes or Widths()).channels or 3
        return LatentSpace.of(self.first_stage_model, self.scale_factor, self.shift_factor, self.size_factor, pixels)

    @torch.no_grad()
    def encode_first_stage(self, image: Tensor, is_drawn: bool = True, **batch: Any) -> Tensor:
        """[B, 3, (T,) H, W] in -1..1 -> latents [B, C, (t,) h, w] of variance about 1, drawn from the posterior, or its mean."""
        return self.space.encode(image, is_drawn)

    def tokenizer(self, prompts: list[str]) -> Tensor:
        """Prompts -> int64 [B, L], by the embedder's own tokenizer."""
        return self.cond_stage_model.tokenize(prompts)

    def encode_condition(self, tokens: Tensor, method: str = 'encode_text', **sizes: Tensor) -> Any:
        """Tokens [B, L] -> what the network takes as cond; the embedder's `method` does it, in full precision."""
        embedder = self.cond_stage_model
        with torch.autocast(tokens.device.type, enabled=False):
            return getattr(embedder, method)(tokens, tokenizer=getattr(embedder, 'tokenizer', None), **sizes)

    def condition(self, prompt: list[str], **batch: Any) -> Any:
        """Prompts, and the entries of the batch that the embedder reads beside them (SDXL's sizes), -> cond."""
        return self.encode_condition(self.tokenizer(prompt).to(self.device), **self._read_sizes(batch))

    def _read_sizes(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: batch[name] for name in self.cond_stage_model.reads_too if name in batch}

    @property
    def reads_labels(self) -> bool:
        """Whether the embedder takes the classes of samples, and prompts only as the words for them."""
        return self.cond_stage_model is not None and self.cond_stage_model.reads == 'label'

    # ---------------------------------------------------------------- drawing
    @torch.no_grad()
    def forward_test(self, prompt: list[str] | None = None, n_prompt: list[str] | str | None = None, image: Tensor | None = None,
                     mask: Tensor | None = None, sampler: str = 'ddim', sample_steps: int = 50, seed: int = 2023,
                     row_seeds: Sequence[int] | None = None, guide_scale: float | list[float] | dict[str, float] | None = 7.5,
                     guide_rescale: float = 0.5, discretization: str = 'trailing', image_size: int | Sequence[int] | None = None,
                     denoising_strength: float | None = None, num_samples: int | None = None, run_train_n: bool = False,
                     show_progress: bool = False, on_step: Callable[[int, int, Tensor], None] | None = None,
                     sampler_args: Mapping[str, Any] | None = None, label: int | Sequence[int] | Tensor | None = None,
                     original_size: Any = None, crop_top_left: Any = None, target_size: Any = None, aesthetic_score: Any = None,
                     video: Tensor | None = None, num_frames: int | None = None) -> list[dict[str, Any]]:
        """Prompts -> one dict each: prompt, n_prompt, image [3, H, W] or video [3, T, H, W] in 0..1; with labels, label.

        label: the class of each picture, or of all, where the embedder reads labels; with neither it nor prompts, one class after another.
        seed: below 0 for another one each time; picture i of it is keyed (seed, i).  row_seeds: the key of each picture instead.
        image [B, 3, H, W] in -1..1: says the size; with a denoising_strength (0..1) or a mask [B, 1, H, W] (1 where the picture is
        made anew) it is also what to begin with; where the mask is 0 the pictures are the image itself. video [B, 3, T, H, W]: likewise.
        run_train_n: draw each once more with TRAIN_N_PROMPT as the negative prompt.
        on_step: called as (step, steps, x0) at each step.
        sampler_args: the sampler's own options (eta, ...), and clamp, percentile, t_max, ...
        original_size, crop_top_left, target_size [B, 2], aesthetic_score [B, 1]: what SDXL is told; a whole picture of this size.
        Raises ValueError for a size that the networks cannot make, with the nearest that they can, and where a network that fills in
        what a mask leaves open (2C + 1 channels) gets no mask.
        """
        labels = self._labels(label, prompt, default(num_samples, 1)) if self.reads_labels else None
        if labels is not None:
            prompt = [str(number) for number in labels]
        space = self.space
        given = Given.of(default(video, image), mask, space, self.device)
        count = len(prompt) if prompt is not None else default(num_samples, 1 if given.image is None else len(given.image))
        seeds = streams.row_seeds(default(row_seeds, random.randrange(2 ** 32) if seed < 0 else seed), count)
        size = default(image_size, default(given.size, self.IMAGE_SIZE))
        height, width = (size, size) if isinstance(size, int) else size
        frames = default(num_frames, given.frames if given.image is not None else self.NUM_FRAMES)
        shape = space.shape(height, width, frames)
        noise = streams.normal_rows(seeds, 'start', shape, self.device)
        start = given.start(space, shape, denoising_strength)
        beside = self._beside(given, count)
        if beside is not None:
            start.pop('mask')    # the network sees itself what is to stay

        negative = [n_prompt] * count if isinstance(n_prompt, str) else default(n_prompt, [self.default_n_prompt] * count)

        told = {'original_size': original_size, 'crop_top_left': crop_top_left, 'target_size': target_size,
                'aesthetic_score': aesthetic_score}
        sizes = self._sizes(count, height, width, {name: value for name, value in told.items() if value is not None})

        def draw(negative_prompt: list[str]) -> Tensor:
            conditions = self._conditions(prompt, negative_prompt, guide_scale, beside, **sizes)
            guidance = {} if len(conditions) == 1 else {'guide_scale': guide_scale, 'guide_rescale': guide_rescale}
            latents = self.diffusion.sample(
                noise, self.model, conditions, solver=sampler, steps=sample_steps, discretization=discretization, seed=seeds,
                show_progress=show_progress, on_step=on_step, **guidance, **start, **(sampler_args or {}))
            pictures = given.kept_in(((self.decode_first_stage(latents).float() + 1) / 2).clamp(0, 1))
            return pictures[:, :, 0] if frames is None and pictures.ndim == 5 else pictures    # a still of an autoencoder of clips

        kind = 'image' if frames is None else 'video'
        results = [{kind: picture, 'seed': s} for picture, s in zip(draw(negative), seeds)]
        if labels is not None:
            results = [{'label': number, **r} for number, r in zip(labels, results)]
        elif prompt is not None:
            results = [{'prompt': p, 'n_prompt': n, **r} for p, n, r in zip(prompt, negative, results)]
        if run_train_n and self.train_n_prompt != self.default_n_prompt:
            for result, picture in zip(results, draw([self.train_n_prompt] * count)):
                result |= {'train_n_prompt': self.train_n_prompt, f'train_n_{kind}': picture}
        return results

    def _labels(self, label: int | Sequence[int] | Tensor | None, prompt: list[str] | None, count: int) -> list[int] | None:
        """The class of each picture; None where prompts say it."""
        if label is None:
            classes = self.cond_stage_model.NUM_CLASSES
            return [i % classes for i in range(count)] if prompt is None else None
        labels = label.tolist() if isinstance(label, Tensor) else label
        return [labels] * (count if prompt is None else len(prompt)) if isinstance(labels, int) else list(labels)

    def _beside(self, given: Given, count: int) -> Tensor | None:
        """What a network of 2C + 1 channels reads beside each latent: the mask, and the latent of what the mask leaves."""
        takes, channels = self.model.takes or Widths(), self.space.channels
        if takes.beside != channels + 1:
            return None
        if None in given:
            raise ValueError(f'the network has {channels + takes.beside} input channels, so it fills in what a mask leaves open: give an '
                             'image and a mask')
        known = given.around_the_hole(self.space)
        return known.repeat(count // len(known), *[1] * (known.ndim - 1))

    def _sizes(self, count: int, height: int, width: int, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What SDXL is told of a picture's size: that it is a whole one of this size, unless the batch says otherwise."""
        usual = {'original_size': [height, width], 'target_size': [height, width], 'crop_top_left': [0, 0], 'aesthetic_score': [6.0]}
        return {name: torch.as_tensor(batch.get(name, [value] * count), device=self.device) for name, value in usual.items()}

    def _conditions(self, prompt: list[str] | None, n_prompt: list[str], guide_scale: Any, beside: Tensor | None,
                    **batch: Any) -> list[dict[str, Any]]:
        """[wanted, unwanted]; the unwanted one only where guidance looks at it. What is the same at every step is computed once."""
        if self.cond_stage_model is None or prompt is None:
            conditions = [None]
        else:
            is_guided = guide_scale is not None and guide_scale != 1
            # tokenized in one call, so that both have as many chunks and go through the network together
            rows = self.tokenizer([*prompt, *n_prompt] if is_guided else prompt).to(self.device).split(len(prompt))
            conditions = [self.encode_condition(tokens, **self._read_sizes(batch)) for tokens in rows]
        if beside is not None:
            conditions = [Condition.of(cond)._replace(beside=beside) for cond in conditions]
        return [{} if cond is None else {'cond': self.model.precompute(cond)} for cond in conditions]

    def decode_first_stage(self, latents: Tensor) -> Tensor:
        """[B, C, (t,) h, w] -> images or clips [B, 3, (T,) H, W] in about -1..1."""
        return self.space.decode(latents)

    def noise_sample(self, num_samples: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise [B, C, height, width] of latents, from torch's generator."""
        return torch.randn(num_samples, self.space.channels, height, width, generator=generator,
                           device=generator.device if generator is not None else None).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.model.parameters()), we.device)

    def compile_network(self) -> None:
        self.model.compile()


SAMPLERS.reserve(LatentDiffusion.forward_test)


def _misfit(part: Any, problem: str) -> ScepterError:
    """A fault of the file that a part came from, where there is one, else of the config."""
    file = part.cfg.get('PRETRAINED_MODEL') if part is not None else None
    return CheckpointError(f'{file}: {problem}') if file else ConfigError(problem)
