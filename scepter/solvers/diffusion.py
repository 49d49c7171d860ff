"""The solver of diffusion models: how they draw in evaluations and tests."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from scepter.core.config import Config
from scepter.core.faults import Fault
from scepter.core.registry import MODELS, SAMPLERS, SOLVERS, sampler_named
from scepter.core.schema import Component, param
from scepter.solvers.base import BaseSolver


class SampleArgs(Component):
    """How to draw; what is not given stays as the network's forward_test has it."""

    SAMPLER: str | None = param(None, 'The sampler: ddim, euler_ancestral, dpmpp_2m_karras, ...; or as others write it, DPM++ 2M Karras.')
    SAMPLE_STEPS: int | None = param(None, 'Steps of the sampler.', least=1)
    SEED: int | None = param(None, 'Picture i is keyed by (SEED, i); below 0 for another one each time.')
    GUIDE_SCALE: float | list[float] | dict[str, float] | None = param(None, 'Strength of classifier-free guidance; 1 for none.', least=0)
    GUIDE_RESCALE: float | None = param(
        None, 'Share by which guided outputs get back the contrast of unguided ones (2305.08891).', least=0, most=1)
    DISCRETIZATION: Literal['trailing', 'leading', 'linspace', 'karras'] | None = param(None, 'How the steps are spread over the levels.')
    IMAGE_SIZE: int | tuple[int, int] | None = param(None, 'Pixels, or [height, width].', least=1)
    NUM_FRAMES: int | None = param(None, 'Frames of a clip, where the autoencoder makes clips.', least=1)
    DENOISING_STRENGTH: float | None = param(None, 'How much of a given image is made anew, 0..1.', least=0, most=1)
    RUN_TRAIN_N: bool | None = param(None, "Draw once more with the network's TRAIN_N_PROMPT as the negative prompt.")
    SETS: int | None = param(None, 'Sets of tokens in a frame, where a network draws tokens in sets.', least=1)
    LENGTH: int | None = param(None, 'Frames of the latents of a clip, where latents are drawn.', least=1)
    IMAGE_GUIDE_SCALE: float | None = param(None, 'Strength of guidance by the frames before; 0 for none.', least=0)
    GUIDE_RENORM: float | None = param(None, "Below 1: a guided output's norm is brought back to the unguided one's, by no more than "
                                             'this factor.', least=0, most=1)
    GUIDE_TRUNC: float | None = param(None, 'No guidance at times below this one.', least=0)
    MIN_GUIDE_SCALE: float | None = param(None, 'Strength of guidance of the first set, from which it grows.', least=0)
    SPATIOTEMPORAL_GUIDE_SCALE: float | None = param(None, 'Strength of guidance away from a disturbed network, where it has one.', least=0)
    FLOW_SHIFT: float | None = param(None, 'Another shift of a flow than that of training.', above=0)
    MOTION_FLOW: float | None = param(None, 'How much is to move in a clip, in pixels per frame.', least=0)
    SAMPLER_ARGS: dict | None = param(None, "The sampler's own options, e.g. {eta: 1.0}, and clamp, percentile, t_max, ...")

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        try:
            if cfg.SAMPLER is not None:
                SAMPLERS.get(sampler_named(cfg.SAMPLER)[0])
        except KeyError as error:
            yield Fault('SAMPLER', error.args[0])

    def given(self) -> dict[str, Any]:
        """The arguments of forward_test that were given."""
        return {key.lower(): value for key, value in self.cfg.items() if value is not None}


@SOLVERS.register_class()
class LatentDiffusionSolver(BaseSolver):
    """BaseSolver with the settings that diffusion models draw with."""

    SAMPLE_ARGS: SampleArgs = param({}, 'How evaluations and tests draw.')

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        tell = getattr(MODELS.get(cfg.MODEL.NAME), 'side_multiple', None)
        step = tell(MODELS.filled(cfg.MODEL)) if tell is not None else None
        size = cfg.SAMPLE_ARGS.IMAGE_SIZE
        if step is not None and any(side % step for side in (size if isinstance(size, list) else [size or 0])):
            yield Fault('SAMPLE_ARGS.IMAGE_SIZE', f'is {size}: sides are multiples of {step} in this network')

    def test_arguments(self) -> dict[str, Any]:
        return SampleArgs(self.SAMPLE_ARGS).given()
