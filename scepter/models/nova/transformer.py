"""NOVA's network: autoregression over frames, over sets of tokens within a frame, and a denoiser for each token.

Deng et al. 2024 (arXiv 2412.14169), under the names of the published weights. An image is a clip of one frame. Sizes as published:

    vit_d16w768   vit_d32w768   mlp_d6w768     363.9 M parameters
    vit_d16w1024  vit_d32w1024  mlp_d6w1024    645.7 M
    vit_d16w1536  vit_d32w1536  mlp_d6w1536   1449.8 M
    vit_d16w1024  vit_d32w1024  mlp_d3w1280    644.2 M, for clips, with a mixer of rank 24

Letters: B batch, T frames, C channels of a latent, h x w its size, p the side of a patch, N = (h/p)(w/p) tokens of a frame in the image
encoder, Nv those in the video encoder, whose patches are 2p wide, K tokens of the condition, D the encoders' width.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scepter.core.config import Config
from scepter.core.faults import Fault
from scepter.core.registry import BACKBONES
from scepter.core.schema import param
from scepter.models.base import BaseModel
from scepter.models.nova.blocks import Block, KeyValues, Size
from scepter.models.nova.decoder import DecoderBlock, ImageDecoder
from scepter.models.nova.embeddings import MAX_TEXT_TOKENS, LabelEmbed, MaskEmbed, MotionEmbed, TextEmbed, VideoPosEmbed
from scepter.models.nova.encoders import ImageEncoder, VideoEncoder, ends_of_frames
from scepter.models.nova.positions import can_rotate, places, rotations


@BACKBONES.register_class()
class NovaTransformer(BaseModel):
    """Frames before and visible tokens -> what is known about each token.    latents [B, C, T, h, w], condition [B, K, D] -> [B*T, N, D]

    Its keys are those of a published transformer/config.json, in capitals.
    """

    IMAGE_DIM: int = param(doc='Channels of a latent.', least=1)
    IMAGE_SIZE: int | tuple[int, int] = param(doc='Pixels of an image or a frame, or [height, width].', least=1)
    IMAGE_STRIDE: int = param(doc='How much smaller than the image a latent is, per side; a patch is 15 // IMAGE_STRIDE + 1 wide.', least=1)
    TEXT_TOKEN_DIM: int | None = param(None, 'Width of text features; null: the network is told a class.', least=1)
    TEXT_TOKEN_LEN: int | None = param(None, 'Tokens of a text.', least=1, most=MAX_TEXT_TOKENS)
    IMAGE_BASE_SIZE: tuple[int, int] | None = param(None, 'Rows and columns of tokens in a frame; null: as many as there are.', least=1)
    VIDEO_BASE_SIZE: tuple[int, int, int] | None = param(
        None, 'Frames, rows and columns of tokens in the video encoder; null: one frame. From 2 frames on it is told the motion.', least=1)
    VIDEO_MIXER_RANK: int | None = param(None, 'Rank of the scale and shift of later frames; negative: full; null or 0: there is none.')
    ROTARY_POS_EMBED: bool = param(False, 'Turn queries and keys by where a token is; false: add sines, for one size alone.')
    ARCH: tuple[str, str, str] = param(
        doc='Sizes of video encoder, image encoder and decoder: vit_d<depth>w<width> twice, with h<heads> behind it where heads are not 64 '
            'wide, then mlp_d<depth>w<width>.')
    NUM_CLASSES: int = param(1000, 'Classes of a network that is told one.', least=1)
    CHECKPOINTING: int = param(0, 'Recompute in the backward pass, to save memory: 1 the half of video encoder blocks that is no '
                                  'attention, 2 of image encoder blocks too, 3 the decoder too.', least=0, most=3)
    PRETRAINED_MODEL: str | None = param(None, 'Weights to start from.')
    IGNORE_KEYS: list[str] = param([], 'Names or globs of weights that may be missing, left over or of another shape.')

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        try:
            sizes = _sizes(cfg)
        except ValueError as error:
            yield Fault('ARCH', str(error))
            return
        if sizes[0].width != sizes[1].width:
            yield Fault('ARCH', f'the video encoder is {sizes[0].width} wide, but the image encoder {sizes[1].width}: one reads the other')
        if cfg.ROTARY_POS_EMBED:
            for name, size in dict(zip(cfg.ARCH[:2], sizes)).items():
                if not can_rotate(size.width // size.heads):
                    yield Fault('ARCH', f'{name} has heads of {size.width // size.heads}, which rotations cannot share out among frame, '
                                        'row and column: use 32, 64, 96 or 128')
        if (cfg.TEXT_TOKEN_DIM is None) != (cfg.TEXT_TOKEN_LEN is None):
            yield Fault('TEXT_TOKEN_LEN', 'give both TEXT_TOKEN_DIM and TEXT_TOKEN_LEN, or neither of a network that is told a class')
        yield from _size_faults(cfg)

    def __init__(self, cfg: dict, logger: Any = None):
        super().__init__(cfg, logger=logger)
        video, image, head = _sizes(self.cfg)
        self.patch, (self.length, *self.video_grid), self.image_grid = _patch(self.cfg), _video_grid(self.cfg), _image_grid(self.cfg)
        self.head_widths = video.width // video.heads, image.width // image.heads
        self.video_encoder = VideoEncoder(self.IMAGE_DIM, 2 * self.patch, video, self.VIDEO_MIXER_RANK or 0)
        self.image_encoder = ImageEncoder(self.IMAGE_DIM, self.patch, image, None if self.ROTARY_POS_EMBED else self.image_grid)
        self.image_decoder = ImageDecoder(self.IMAGE_DIM, self.patch, head, image.width)
        self.mask_embed = MaskEmbed(image.width)
        if self.TEXT_TOKEN_DIM is not None and self.TEXT_TOKEN_LEN is not None:
            self.text_embed = TextEmbed(self.TEXT_TOKEN_DIM, image.width, self.TEXT_TOKEN_LEN)
        else:
            self.label_embed = LabelEmbed(self.NUM_CLASSES, image.width)
        if not self.ROTARY_POS_EMBED:
            self.video_pos_embed = VideoPosEmbed(video.width, self.length, (self.video_grid[0], self.video_grid[1]))
        if self.is_told_motion:
            self.motion_embed = MotionEmbed(video.width)
        for part, level, kind in ((self.video_encoder, 1, Block), (self.image_encoder, 2, Block), (self.image_decoder, 3, DecoderBlock)):
            for module in part.modules():
                if isinstance(module, kind):
                    module.is_checkpointed = self.CHECKPOINTING >= level
        if self.PRETRAINED_MODEL is not None:
            self.load_pretrained(self.PRETRAINED_MODEL, self.IGNORE_KEYS)

    def main_blocks(self) -> list[nn.Module]:
        return [*self.video_encoder.blocks, *self.image_encoder.blocks]

    @property
    def is_told_motion(self) -> bool:
        """Whether it is a network for clips."""
        return self.length > 1

    @property
    def is_told_class(self) -> bool:
        """Whether it is told a class, and not text."""
        return self.TEXT_TOKEN_DIM is None

    # ---------------------------------------------------------------- the condition
    def condition(self, told: Sequence[Tensor] | Tensor, motion_flow: Tensor | float = 5.0, fps: Tensor | float = 12.0) -> Tensor:
        """[B, K, D] of text features, a list of B [L, F] with L up to TEXT_TOKEN_LEN, or of labels [B].

        motion_flow, fps: [B] or one number: pixels per frame, frames per second; for networks that are told the motion.
        """
        tokens = self.label_embed(told) if self.is_told_class else self.text_embed(told)
        if not self.is_told_motion:
            return tokens
        numbers = (torch.as_tensor(number, dtype=torch.float32, device=tokens.device) for number in (motion_flow, fps))
        motion = self.motion_embed(*(number.expand(len(tokens)) for number in numbers))
        return torch.cat([tokens, motion.to(tokens.dtype)], 1)

    def nothing(self) -> Tensor:
        """What stands for one sample's empty prompt, or no class, in what `condition` takes."""
        if self.is_told_class:
            return torch.tensor(self.label_embed.none, device=self.label_embed.weight.device)
        return self.text_embed.nothing()

    # ---------------------------------------------------------------- training: all frames at once
    def forward(self, latents: Tensor, condition: Tensor, order: Tensor, visible: int) -> Tensor:
        """What is known about each token of latents [B, C, T, h, w] under masks.    -> [B*T, N, D], frames of one clip behind one another

        order [B*T, N]: the numbers of a frame's tokens; the first `visible` of them are seen.
        """
        told, frames = self.indicators(latents, condition), latents.transpose(1, 2).flatten(0, 1)
        tokens = self.mask_embed(self.image_encoder.patch_embed(frames), hidden(order, visible))
        return self.image_encoder(tokens, told.flatten(0, 1), order[:, :visible], self.image_rotations(self.video_grid_of(frames)))

    def indicators(self, latents: Tensor, condition: Tensor) -> Tensor:
        """What condition and frames before say about each frame.    [B, C, T, h, w], [B, K, D] -> [B, T, Nv, D]"""
        b, _, length, _, _ = latents.shape
        grid = self.video_grid_of(latents)
        x = self.bos(b, grid).to(condition.dtype)
        if length > 1:
            x = torch.cat([x, self.video_encoder.patch_embed(latents[:, :, :-1]).to(x.dtype)], 1)    # [B, T, Nv, D]
        x, turns = self.with_positions(x, grid, prefix=condition.shape[1])
        ends = ends_of_frames(length, x.shape[2], condition.shape[1]) if length > 1 else None
        out = self.video_encoder(x.flatten(1, 2), condition, turns, ends).unflatten(1, (length, -1))
        return out if length == 1 else torch.cat([out[:, :1], self.video_encoder.mix(out[:, :1], out[:, 1:])], 1)

    # ---------------------------------------------------------------- drawing: one frame after another
    def bos(self, rows: int, grid: tuple[int, int]) -> Tensor:
        """The frame before the first, of this grid in the video encoder.    [rows, 1, Nv, D]"""
        return self.mask_embed.bos_token.expand(rows, 1, grid[0] * grid[1], -1)

    def caches(self, length: int, capacity: int) -> list[KeyValues] | None:
        """Room for the keys and values of so many tokens, for each block of the video encoder; none for an image, which asks once."""
        return [KeyValues(capacity) for _ in self.video_encoder.blocks] if length > 1 else None

    # ---------------------------------------------------------------- where tokens are
    def with_positions(self, x: Tensor, grid: tuple[int, int], prefix: int, first: int = 0,
                       length: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Frames [B, T, Nv, D] with their positions, or beside the turns of a prefix and of them, [1, prefix + T*Nv, ...]."""
        if not self.ROTARY_POS_EMBED:
            return self.video_pos_embed(x, first, length), None
        where = places(first + torch.arange(x.shape[1], device=x.device), grid)
        return x, rotations(where, self.head_widths[0], prefix)[None]

    def image_rotations(self, grid: tuple[int, int]) -> Tensor | None:
        """The turns in the image encoder, where what comes from the video encoder is not turned.    [1, Nv + N, ...]

        grid: rows and columns of the video encoder's tokens; of its own there are twice as many each.
        """
        if not self.ROTARY_POS_EMBED:
            return None
        rows, columns = grid
        first = torch.zeros(1, dtype=torch.int64, device=self.mask_embed.bos_token.device)
        return rotations(places(first, (2 * rows, 2 * columns)), self.head_widths[1], rows * columns)[None]

    def video_grid_of(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of these latents' tokens in the video encoder. Raises ValueError where positions do not fit them."""
        size = latents.shape[-2:]
        fits = tuple(side * self.patch for side in self.image_grid)
        if not self.ROTARY_POS_EMBED and tuple(size) != fits:
            raise ValueError(f'latents are {size[0]}x{size[1]}, but the positions of this network are for {fits[0]}x{fits[1]} '
                             f'(IMAGE_BASE_SIZE {list(self.image_grid)}): make them of that size, or train with ROTARY_POS_EMBED')
        if any(side % (2 * self.patch) for side in size):
            raise ValueError(f'latents are {size[0]}x{size[1]}: sides are multiples of {2 * self.patch}, the patch of the video encoder')
        return size[0] // (2 * self.patch), size[1] // (2 * self.patch)


def hidden(order: Tensor, visible: int) -> Tensor:
    """1 for each token that is not among the first `visible` of an order.    [B, N] -> [B, N, 1] float32"""
    mask = torch.ones(order.shape, device=order.device)
    return mask.scatter(1, order[:, :visible], 0.0).unsqueeze(-1)


def _sizes(cfg: Config) -> tuple[Size, Size, Size]:
    return Size.of(cfg.ARCH[0], 'vit'), Size.of(cfg.ARCH[1], 'vit'), Size.of(cfg.ARCH[2], 'mlp')


def _patch(cfg: Config) -> int:
    """So that a token is 16 pixels wide, whatever the autoencoder."""
    return 15 // cfg.IMAGE_STRIDE + 1


def _latent_size(cfg: Config) -> tuple[int, int]:
    height, width = (cfg.IMAGE_SIZE,) * 2 if isinstance(cfg.IMAGE_SIZE, int) else cfg.IMAGE_SIZE
    return height // cfg.IMAGE_STRIDE, width // cfg.IMAGE_STRIDE


def _image_grid(cfg: Config) -> tuple[int, int]:
    rows, columns = cfg.IMAGE_BASE_SIZE or (side // _patch(cfg) for side in _latent_size(cfg))
    return rows, columns


def _video_grid(cfg: Config) -> tuple[int, int, int]:
    length, rows, columns = cfg.VIDEO_BASE_SIZE or (1, *(side // (2 * _patch(cfg)) for side in _latent_size(cfg)))
    return length, rows, columns


def _size_faults(cfg: Config) -> Iterator[Fault]:
    """The sizes of image and tokens against each other: a network with other ones would draw, and draw nonsense."""
    latent, patch = _latent_size(cfg), _patch(cfg)
    pixels = 2 * patch * cfg.IMAGE_STRIDE
    if any(side % (2 * patch) or not side for side in latent):
        yield Fault('IMAGE_SIZE', f'is {cfg.IMAGE_SIZE}: sides are multiples of {pixels} pixels, the side of a token of the video encoder')
        return
    for key, (rows, columns), side in (('IMAGE_BASE_SIZE', _image_grid(cfg), patch), ('VIDEO_BASE_SIZE', _video_grid(cfg)[1:], 2 * patch)):
        if (rows * side, columns * side) != latent:
            yield Fault(key, f'is {list(cfg[key])}, but an image of {latent[0] * cfg.IMAGE_STRIDE}x{latent[1] * cfg.IMAGE_STRIDE} has '
                             f'{latent[0] // side} rows and {latent[1] // side} columns of tokens {side * cfg.IMAGE_STRIDE} pixels wide')
