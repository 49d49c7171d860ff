"""NovaModel: NOVA's network with what it needs to be trained and to draw, as LatentDiffusion is for the UNet."""
from __future__ import annotations

import fnmatch
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scepter.core import streams
from scepter.core.config import Config
from scepter.core.faults import ConfigError, Fault
from scepter.core.logger import get_logger
from scepter.core.registry import BACKBONES, EMBEDDERS, LEVELS, MODELS, SAMPLERS, SCHEDULES, sampler_named
from scepter.core.schema import default, param, part
from scepter.models.autoencoder import to_pixels
from scepter.models.base import TrainModule
from scepter.models.condition import Condition
from scepter.models.latent import LatentSpace
from scepter.models.nova.drawing import KeyedDraws, Painter, Progress
from scepter.models.nova.guidance import Guidance
from scepter.models.nova.steps import Spacing, chains
from scepter.models.nova.training import Chance, frame_losses, visible_tokens
from scepter.models.process import process_of
from scepter.models.resting import Encoder
from scepter.models.unfilled import unfilled

FROZEN = {    # as published, by what the network is for
    'image': ['model.text_embed.norm.*', 'model.video_pos_embed.*', 'model.video_encoder.patch_embed.*', 'model.motion_embed.*'],
    'clip': ['model.text_embed.norm.*', 'model.motion_embed.*'],
    'class': ['model.label_embed.norm.*', 'model.video_pos_embed.*', 'model.video_encoder.patch_embed.*'],
}


@MODELS.register_class()
class NovaModel(TrainModule):
    """NOVA (Deng et al. 2024, arXiv 2412.14169).    moments, or images or clips in -1..1, and prompts or labels -> loss; prompts -> images

    Parts: `model` (a NovaTransformer), `first_stage_model` (frozen), `cond_stage_model` (frozen), `diffusion`, of each token.
    """

    NETWORK: dict = part(BACKBONES, 'A NovaTransformer.')
    FIRST_STAGE_MODEL: dict | None = part(MODELS, 'The autoencoder, always frozen; null: training has moments, and latents are drawn.',
                                          default=None)
    COND_STAGE_MODEL: dict | None = part(EMBEDDERS, 'From prompts to features of text, always frozen; null: the data has features, or a '
                                                    'class.', default=None)
    PARAMETERIZATION: Literal['eps', 'x0', 'v', 'flow'] = param('flow', 'What the head predicts.')
    TIMESTEPS: int = param(1000, 'Levels of noise in training.', least=1)
    TIMESTEP_DENSITY: dict = part(LEVELS, 'How often training draws each level, for each token.', default={'NAME': 'logit_normal'})
    SCHEDULE_ARGS: dict = part(SCHEDULES, 'How noise grows over the levels.', default={'NAME': 'flow'})
    ZERO_TERMINAL_SNR: bool = param(False, 'Rescale the schedule so that the last level is pure noise (2305.08891); not for eps.')
    SPACING: Spacing = param('flow', 'Which levels are drawn with: as published flows, or as published DDPMs spread theirs.')
    STEPS_OFFSET: int = param(0, 'Added to the levels of SPACING leading.', least=0)

    LOSS_REPEAT: int = param(4, 'How often each token is learnt from in a pass, at levels and noise of its own.', least=1)
    MASK_LEAST: float = param(0.7, 'Smallest share of the tokens of a frame that is hidden.', above=0, below=1)
    MASK_STD: float = param(0.25, 'Spread of that share, below 1.', above=0)
    P_ZERO: float = param(0.1, 'Share of samples that training tells nothing, so that guidance can work.', least=0, most=1)
    SCALE_FACTOR: float = param(0.18215, 'Latents are multiplied by this, so that their variance is about 1.', above=0)
    SHIFT_FACTOR: float = param(0.0, 'Taken off latents before.')
    FREEZE: list[str] | None = param(None, 'Names or globs of parameters that are not trained; null: as published.')
    PRETRAINED_MODEL: str | None = param(None, 'Weights of the whole: a checkpoint of ours.')
    IGNORE_KEYS: list[str] = param([], 'Names or globs of weights that may be missing, left over or of another shape.')

    _has_warned_of_cut = False

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if cfg.NETWORK.NAME != 'NovaTransformer':
            yield Fault('NETWORK', f'is a {cfg.NETWORK.NAME}, expected a NovaTransformer')
        if (cfg.SPACING == 'flow') != (cfg.SCHEDULE_ARGS.NAME in ('flow', 'shifted')):
            yield Fault('SPACING', f'is {cfg.SPACING}, but the schedule is {cfg.SCHEDULE_ARGS.NAME}: flow belongs to flow, '
                                   'the others to the others')
        try:
            process_of(cfg)
        except ValueError as error:
            yield Fault('PARAMETERIZATION', f'{cfg.PARAMETERIZATION} on {cfg.SCHEDULE_ARGS.NAME}: {error}')

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        with unfilled(self.cfg) if self.PRETRAINED_MODEL is not None else nullcontext():
            self.model = BACKBONES.build(self.NETWORK, logger=logger)
            self.first_stage_model = MODELS.build(self.FIRST_STAGE_MODEL, logger=logger) if self.FIRST_STAGE_MODEL is not None else None
            self.cond_stage_model = EMBEDDERS.build(self.COND_STAGE_MODEL, logger=logger) if self.COND_STAGE_MODEL is not None else None
        self._check_parts()
        self.diffusion = process_of(self.cfg)
        self.density = LEVELS.function(self.TIMESTEP_DENSITY)
        if self.PRETRAINED_MODEL is not None:
            self.load_pretrained(self.PRETRAINED_MODEL, self.IGNORE_KEYS)
        for frozen in (self.first_stage_model, self.cond_stage_model):
            if frozen is not None:
                frozen.freeze()
        kind = 'class' if self.model.is_told_class else 'clip' if self.model.is_told_motion else 'image'
        for name, parameter in self.named_parameters():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in default(self.FREEZE, FROZEN[kind])):
                parameter.requires_grad_(False)

    def _check_parts(self) -> None:
        """Refuse parts that give something else than the network takes before anything is computed."""
        autoencoder, network = self.first_stage_model, self.model
        given = getattr(getattr(self.cond_stage_model, 'gives', None), 'context', None)
        if given is not None and network.TEXT_TOKEN_DIM is not None and given != network.TEXT_TOKEN_DIM:
            raise ConfigError(f'COND_STAGE_MODEL gives features {given} wide, but the network reads {network.TEXT_TOKEN_DIM} '
                              '(TEXT_TOKEN_DIM)')
        if autoencoder is None:
            return
        channels, factor = getattr(autoencoder, 'EMBED_DIM', network.IMAGE_DIM), getattr(autoencoder, 'size_factor', network.IMAGE_STRIDE)
        if channels != network.IMAGE_DIM:
            raise ConfigError(f'the autoencoder gives {channels} channels, but the network draws {network.IMAGE_DIM} (IMAGE_DIM)')
        if factor != network.IMAGE_STRIDE:
            raise ConfigError(f'the autoencoder makes pictures {factor} times smaller, but IMAGE_STRIDE is {network.IMAGE_STRIDE}')
        if problem := self.space.misfit(self.IGNORE_KEYS):
            raise ConfigError(problem)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Norms take no weight decay."""
        norms = [f'{path}.{name}' for path, module in self.named_modules() if isinstance(module, nn.LayerNorm)
                 for name, p in module.named_parameters(recurse=False) if p.requires_grad]
        return [{'params': norms, 'weight_decay': 0.0}]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.model.mask_embed.bos_token.device

    def compile_network(self) -> None:
        self.model.image_encoder.compile()
        self.model.image_decoder.compile()

    # ---------------------------------------------------------------- training
    def forward_train(self, moments: Tensor | None = None, image: Tensor | None = None, video: Tensor | None = None,
                      prompt: list[str] | list[Tensor] | None = None, label: Tensor | None = None, motion_flow: Tensor | None = None,
                      **batch: Any) -> dict[str, Any]:
        """moments [B, 2C, (T,) h, w], or image [B, 3, H, W], or video [B, 3, T, H, W]  ->  loss, and for clips its two parts.

        prompt: strings, or features [L, F] each.  label [B] int64.  motion_flow [B]: pixels per frame.
        """
        if moments is None:
            latents = self.encode_first_stage(default(image, video))
        else:
            latents = self.space.draw(moments.to(self.device).float())
        latents = latents if latents.ndim == 5 else latents.unsqueeze(2)
        condition = self.model.condition(self._told_in_training(prompt, label, len(latents)), **_motion(motion_flow))
        losses = frame_losses(self.model, self.diffusion, latents, condition, self._chance(latents))
        return weighed(losses)

    def _chance(self, latents: Tensor) -> Chance:
        """Every draw of a pass, keyed by the samples."""
        (batch, channels, length, height, width), patch = latents.shape, self.model.patch
        tokens, repeat = (height // patch) * (width // patch), self.LOSS_REPEAT
        orders = [streams.permutation(f'order {frame}', batch, tokens) for frame in range(length)]
        noise = streams.normal('noise', latents.new_empty(batch, repeat * length, tokens, patch * patch * channels))
        t = self.density(use='timestep', n=self.diffusion.num_timesteps, count=batch, tokens=repeat * length * tokens)    # [B, r*T*N]

        def rows(x: Tensor) -> Tensor:    # [B, r*T, N, ...] -> [r*B*T, N, ...]
            return x.unflatten(1, (repeat, length)).transpose(0, 1).flatten(0, 2)

        return Chance(torch.stack(orders, 1).flatten(0, 1).to(latents.device), visible_tokens(tokens, self.MASK_LEAST, self.MASK_STD),
                      rows(noise), rows(t.unflatten(1, (repeat * length, tokens))).to(latents.device))

    def _told_in_training(self, prompt: Any, label: Tensor | None, count: int) -> list[Tensor] | Tensor:
        dropped = (streams.uniform('drop_caption', count) < self.P_ZERO).to(self.device)
        if self.model.is_told_class:
            if label is None:
                raise ValueError('the network is told a class (TEXT_TOKEN_DIM null), but the batch has no label: add it to the dataset')
            return torch.where(dropped, self.model.nothing(), label.to(self.device))
        if prompt is None:
            raise ValueError('the network is told a text, but the batch has no prompt: add it to the dataset')
        return [self.model.nothing() if drop else text for text, drop in zip(self.features(prompt), dropped.tolist())]

    def features(self, prompts: Sequence[str | Tensor]) -> list[Tensor]:
        """Features [L, F] of each prompt; none of an empty one. Raises ValueError where there is nothing to make them with."""
        told, strings = list(prompts), [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
        words = [i for i in strings if told[i]]
        if words and self.cond_stage_model is None:
            raise ValueError(f'{told[words[0]]!r} is words, but COND_STAGE_MODEL is null: name an embedder, or cache features of text')
        for i in strings:
            told[i] = self.model.nothing()
        if words:
            for i, row in zip(words, self._encoded([prompts[i] for i in words])):
                told[i] = row
        return [self._fitting(text.to(self.device, self.model.text_embed.weight.dtype)) for text in told]

    @torch.no_grad()
    def _encoded(self, prompts: list[str]) -> list[Tensor]:
        """Features [L, F] of each of these words by the embedder, in full precision; behind a prompt's end there are none."""
        embedder = self.cond_stage_model
        tokens = embedder.tokenize(prompts).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            found = Condition.of(embedder.encode_text(tokens, tokenizer=getattr(embedder, 'tokenizer', None)))
        return [*found.context] if found.mask is None else [row[seen] for row, seen in zip(found.context, found.mask)]

    def _fitting(self, text: Tensor) -> Tensor:
        """Features [L, F] with L up to TEXT_TOKEN_LEN; what is longer is cut, with one warning. Raises ValueError for another F."""
        width, limit = self.model.TEXT_TOKEN_DIM, self.model.TEXT_TOKEN_LEN
        if len(text) and text.shape[1:] != (width,):
            raise ValueError(f'features of a text are {list(text.shape)}, expected [L, {width}] (TEXT_TOKEN_DIM)')
        if len(text) > limit and not self._has_warned_of_cut:
            self._has_warned_of_cut = True
            (self.logger or get_logger()).warning(f'a text has {len(text)} tokens, and those beyond {limit} (TEXT_TOKEN_LEN) are cut '
                                                  '(further ones without a word)')
        return text[:limit]

    def encoders(self) -> dict[Literal['picture', 'prompt'], Encoder]:
        return {'picture': Encoder('first_stage_model', self._moments)} if self.first_stage_model is not None else {}

    def _moments(self, x: Tensor) -> Tensor:
        """What the autoencoder says of pictures or clips; one of pictures is asked frame by frame.    [B, 3, (T,) H, W] -> [B, 2C, ...]"""
        return by_frames(self.space.moments, x) if self.space.time_factor is None else self.space.moments(x)

    @property
    def space(self) -> LatentSpace:
        """Where it diffuses."""
        return LatentSpace.of(self.first_stage_model, self.SCALE_FACTOR, self.SHIFT_FACTOR, self.model.IMAGE_STRIDE, self.model.IMAGE_DIM)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Tensor:
        """An image or a clip in -1..1 -> its latent, drawn from the posterior, of variance about 1."""
        if self.first_stage_model is None:
            raise ValueError('the batch has pictures, but FIRST_STAGE_MODEL is null: name an autoencoder, or cache its moments')
        if x.ndim == 5 and self.space.time_factor is None:    # the draw is of whole clips, which have the keys
            return self.space.draw(self._moments(x))
        return self.space.encode(x)

    # ---------------------------------------------------------------- drawing
    @torch.no_grad()
    def forward_test(self, prompt: list[str] | list[Tensor] | None = None, n_prompt: list[str] | str | None = None,
                     label: int | Sequence[int] | Tensor | None = None, first_frame: Tensor | None = None, num_frames: int | None = None,
                     length: int | None = None, image_size: int | Sequence[int] | None = None, sets: int = 64, sample_steps: int = 25,
                     sampler: str | None = None, seed: int = 2023, row_seeds: Sequence[int] | None = None, guide_scale: float = 5.0,
                     image_guide_scale: float = 0.0, spatiotemporal_guide_scale: float = 0.0, guide_renorm: float = 1.0,
                     guide_trunc: float = 0.0, min_guide_scale: float | None = None, flow_shift: float | None = None,
                     motion_flow: float | Tensor = 5.0, num_samples: int | None = None, show_progress: bool = False,
                     on_step: Callable[[int, int, Tensor], None] | None = None) -> list[dict[str, Any]]:
        """Prompts or labels -> one dict each: prompt or label, seed, and image [3, H, W] or video [3, T, H, W] in 0..1.

        Without an autoencoder, latent [C, T, h, w] instead.
        num_frames: of a clip; or length, those of its latents. Without either, an image.
        sets: of tokens in a frame.  sample_steps: of each set.  guide_*: see guidance.py.  motion_flow: of all clips, or [B].
        first_frame [B, 3, H, W] in -1..1: the picture that a clip begins with.
        seed: below 0 for another one each time; row i of it is keyed (seed, i).
        on_step: called as (set, sets of all frames, tokens) after each set.
        Raises ValueError, with what would fit, for a size or a length that the network was not made for, and for what it cannot be told.
        """
        count, size = self._length(num_frames, length), self._size(image_size)
        wanted, empty, results = self._conditions(prompt, n_prompt, label, default(num_samples, 1), motion_flow)
        seeds = streams.row_seeds(default(row_seeds, random.randrange(2 ** 32) if seed < 0 else seed), len(wanted))
        network, side = self.model, self.model.patch * self.model.IMAGE_STRIDE
        grid = size[0] // side, size[1] // side
        draws = KeyedDraws(seeds, grid[0] * grid[1], network.patch ** 2 * network.IMAGE_DIM, self.device)
        if spatiotemporal_guide_scale:
            (self.logger or get_logger()).info('spatiotemporal_guide_scale changes nothing: it guides away from a disturbed network, and '
                                               'NOVA has no such disturbance, as published')
        guidance = Guidance(guide_scale, image_guide_scale, renorm=guide_renorm, trunc=guide_trunc, min_scale=min_guide_scale)
        first = None if first_frame is None else self._first_frame(first_frame, size, count, len(wanted))
        with Progress(show_progress, on_step) as progress:
            painter = Painter(network, self.diffusion, chains(self.diffusion, sample_steps, self.SPACING, self.STEPS_OFFSET, flow_shift),
                              self.sampler(sampler), guidance, draws, sets, progress, grid)
            latents = painter.draw(wanted, empty, count, first)
        return [{**result, 'seed': s, **drawn} for result, s, drawn in zip(results, seeds, self._shown(latents))]

    def _length(self, num_frames: int | None, length: int | None) -> int:
        """Frames of the latents of what is drawn. Raises ValueError, with what would fit, for one that it was not made for."""
        space, longest = self.space, self.model.length
        if num_frames is None:
            count, asked = default(length, 1), f'{length} frames of latents'
        else:
            is_joined = space.time_factor is not None
            count = space.shape(space.size_factor, space.size_factor, num_frames)[1] if is_joined else num_frames
            asked = f'a clip of {num_frames} frames'
        if count < 1 or count > longest:
            most = f'up to {longest} of latents' + (f', {space.frames(longest)} of the clip' if space.time_factor is not None else '')
            raise ValueError(f'{asked} cannot be drawn: the network was made for '
                             + (f'clips of {most} (VIDEO_BASE_SIZE)' if longest > 1 else 'images; leave num_frames and length out'))
        return count

    @property
    def drawn_size(self) -> tuple[int, int]:
        """Height and width of what is drawn where nothing is said."""
        height, width = (self.model.IMAGE_SIZE,) * 2 if isinstance(self.model.IMAGE_SIZE, int) else self.model.IMAGE_SIZE
        return height, width

    def _size(self, image_size: int | Sequence[int] | None) -> tuple[int, int]:
        """Height and width in pixels. Raises ValueError, with what would fit, for a size that the positions do not."""
        size = default(image_size, self.drawn_size)
        height, width = (size, size) if isinstance(size, int) else size
        side, (own_height, own_width) = 2 * self.model.patch * self.model.IMAGE_STRIDE, self.drawn_size
        if not self.model.ROTARY_POS_EMBED and (height, width) != self.drawn_size:
            raise ValueError(f'an image of {height}x{width} cannot be drawn: the positions of this network fit {own_height}x{own_width} '
                             'alone (IMAGE_SIZE; one trained with ROTARY_POS_EMBED draws other sizes too)')
        if height % side or width % side or min(height, width) < side:
            near = [max(1, round(length / side)) * side for length in (height, width)]
            raise ValueError(f'an image of {height}x{width} cannot be drawn: sides are multiples of {side}, e.g. {near[0]}x{near[1]}')
        return height, width

    def _first_frame(self, image: Tensor, size: tuple[int, int], length: int, rows: int) -> Tensor:
        """image [B or 1, 3, H, W] in -1..1 -> the latent [B, C, h, w] that clips begin with: the mean, for a draw would obey no seed."""
        if self.first_stage_model is None:
            raise ValueError('a first frame is given, but FIRST_STAGE_MODEL is null: name an autoencoder')
        if length == 1:
            raise ValueError('a first frame is given, but an image is asked for: ask for a clip by num_frames'
                             + (f', e.g. {self.space.frames(2)}' if self.model.length > 1 else ', of a network that draws clips'))
        if tuple(image.shape[-2:]) != size:
            raise ValueError(f'the first frame is {image.shape[-2]}x{image.shape[-1]}, but the clip {size[0]}x{size[1]}: make it that size')
        latent = self.space.encode(image.to(self.device), is_drawn=False)
        return (latent[:, :, 0] if latent.ndim == 5 else latent).expand(rows, -1, -1, -1)

    def sampler(self, name: str | None = None) -> Callable[..., Tensor]:
        """A sampler by its name; without one, the published one of the process: Euler's method for flows, else DDPM."""
        return SAMPLERS.function({'NAME': sampler_named(default(name, 'euler' if self.SPACING == 'flow' else 'ddpm'))[0]})

    def _conditions(self, prompt: Any, n_prompt: Any, label: Any, count: int,
                    motion_flow: float | Tensor) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
        """Conditions of what is wanted and of nothing, [B, K, D] each, and what results tell of them."""
        if self.model.is_told_class:
            if prompt is not None and label is None:
                raise ValueError(f'the network is told a class, not a prompt: give a label, 0 to {self.model.NUM_CLASSES - 1}')
            labels = [i % self.model.NUM_CLASSES for i in range(count)] if label is None else torch.as_tensor(label).reshape(-1).tolist()
            labels = labels * count if len(labels) == 1 else labels
            if foreign := [number for number in labels if not 0 <= number < self.model.NUM_CLASSES]:
                raise ValueError(f'{foreign[0]} is no class: expected 0 to {self.model.NUM_CLASSES - 1}')
            nothing = self.model.nothing().expand(len(labels))
            told, empty = torch.tensor(labels, device=self.device), nothing
            results = [{'label': number} for number in labels]
        else:
            if prompt is None:
                raise ValueError('the network is told a text, not a class: give prompts')
            negative = [n_prompt] * len(prompt) if isinstance(n_prompt, str) else default(n_prompt, [''] * len(prompt))
            told, empty = self.features(prompt), self.features(negative)
            results = [{'prompt': p, 'n_prompt': n} if isinstance(p, str) else {} for p, n in zip(prompt, negative)]
        flow = torch.as_tensor(motion_flow, dtype=torch.float32).expand(len(results)).repeat(2)
        both = self.model.condition([*told, *empty] if isinstance(told, list) else torch.cat([told, empty]), flow)
        return *both.chunk(2), results

    def _shown(self, latents: Tensor) -> list[dict[str, Any]]:
        """latents [B, C, T, h, w] -> what each result holds of them."""
        if self.first_stage_model is None:
            return [{'latent': latent} for latent in latents]
        is_image = latents.shape[2] == 1
        x = to_pixels(by_frames(self.space.decode, latents) if self.space.time_factor is None else self.space.decode(latents))
        x = x[:, :, 0] if is_image else x
        return [{'image' if is_image else 'video': shown} for shown in x]


SAMPLERS.reserve(NovaModel.forward_test)


def weighed(losses: Tensor) -> dict[str, Any]:
    """The shares of frames [T] as losses: of a clip the first frame weighs as much as all later ones together, and both are logged."""
    count = len(losses)
    if count == 1:
        return {'loss': losses.sum()}    # not a view, whose backward hooks FSDP2 would lose
    first, later = count * losses[0], count / (count - 1) * losses[1:].sum()
    return {'loss': first + later, 'loss_t2i': first.detach(), 'loss_i2i': later.detach()}


def by_frames(convert: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """convert(x) of each frame by itself, for an autoencoder of pictures.    [B, C, T, h, w] -> [B, D, T, H, W];  pictures as they are"""
    if x.ndim == 4:
        return convert(x)
    return convert(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


def _motion(motion_flow: Tensor | None) -> dict[str, Tensor]:
    return {} if motion_flow is None else {'motion_flow': motion_flow}
