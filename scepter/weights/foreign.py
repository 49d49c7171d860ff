"""Files that are no model to open, called by their names, with what to do about each."""
from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from scepter.weights.family import Part, parts
from scepter.weights.files import INVERSION, Weights


class Kind(NamedTuple):
    """What a file is, told by a pattern that one of its names matches, and what to do."""
    pattern: re.Pattern[str]
    what: str
    advice: str


MERGE = 'It changes a model and is none. Merge it into the model that it was made for, with the program that made it, and give the result'
BESIDE = 'It works beside a model, and no network here takes it: give the model itself'
OTHER = 'No network here is of this kind'
KINDS = [Kind(re.compile(pattern), what, advice) for pattern, what, advice in (
    (r'\.hada_w[12]', 'a LoHa (LyCORIS)', MERGE),
    (r'\.lokr_w[12]', 'a LoKr (LyCORIS)', MERGE),
    (r'^(lora|lycoris)_(unet|te\d?|transformer)_|\.lora_(down|up|mid)\.', "a LoRA with kohya's names", MERGE),
    (r'\.lora_[AB]\.|[._]lora\.(down|up)\.|\.lora_linear_layer\.|\.dora_scale$', "a LoRA with diffusers' (PEFT's) names", MERGE),
    (r'^control_model\.|^controlnet_|^input_hint_block\.|^zero_convs\.|lllite_|^control_add_embedding\.', 'a ControlNet', BESIDE),
    (r'^(ip_adapter|image_proj)\.', 'an IP-Adapter', BESIDE),
    (r'^adapter\.|^body\.\d+\.(resnets|block)', 'a T2I-Adapter', BESIDE),
    (r'motion_modules\.', 'a motion module of AnimateDiff', BESIDE),
    (r'time_stack\.|time_mixer', 'Stable Video Diffusion', OTHER),
    (r'(^|\.)(double_blocks|single_blocks|single_transformer_blocks|double_stream_blocks)\.\d', 'of the FLUX family', OTHER),
    (r'(^|\.)joint_blocks\.\d|transformer_blocks\.\d+\.attn\.add_q_proj', 'of Stable Diffusion 3', OTHER),
    (r'^edm_mean$', 'an EDM model (Playground 2.5)', OTHER),
    (r'^depth_model\.', 'a depth-to-image Stable Diffusion 2', OTHER),
    (r'(^|\.)(encoder|decoder)\.block\.\d+\.layer\.', 'a T5 text encoder', BESIDE),
    (r'^(visual|vision_model)\.(?!.*text)', 'the picture side of CLIP', BESIDE))]


def foreign_kind(weights: Weights) -> str | None:
    """A sentence about weights that are no model of ours, whole or in part: what they are and what to do; None where nothing is known."""
    if is_inversion(weights):
        return f'is {INVERSION}'
    for kind in KINDS:
        if any(kind.pattern.search(name) for name in weights):
            if kind.what.startswith('the picture side') and any('text' in name or 'token_embedding' in name for name in weights):
                continue
            return f'is {kind.what}. {kind.advice}'
    return None


def is_inversion(weights: Weights) -> bool:
    """Vectors as wide as a token: kohya's emb_params, clip_l and clip_g for SDXL, or one under its own word (diffusers)."""
    names = set(weights)
    are_vectors = bool(names) and all(len(weights.shape(n)) in (1, 2) and weights.shape(n)[-1] in (768, 1024, 1280) for n in names)
    return are_vectors and (names <= {'emb_params', 'clip_l', 'clip_g'} or (len(names) == 1 and '.' not in next(iter(names))))


# ---------------------------------------------------------------- parts
def sections() -> dict[str, Part]:
    """Section of a config -> the part of a model that it is, for what may have a PRETRAINED_MODEL of its own."""
    found: dict[str, Part] = {}
    for part in parts():
        found.setdefault(part.key, part)
    return {key: part for key, part in found.items() if key}


def lone_parts(names: Iterable[str], wanted: Collection[str] | None = None) -> str | None:
    """A sentence about a file that has some parts of a model and lacks others of those wanted (sections); None where it lacks none."""
    known, names = sections(), list(names)
    here = [part for part in known.values() if any(re.search(part.pattern, name) for name in names)]
    lacking = [part for key, part in known.items() if part not in here and (wanted is None or key in wanted)]
    if not here or not lacking:
        return None
    has, lacks = (' and '.join(part.what for part in some) for some in (here, lacking))
    keys = ', '.join(f'SOLVER.MODEL.{part.key}.PRETRAINED_MODEL' for part in here)
    return (f'is {"an" if has[0] in "aeio" else "a"} {has} alone, without {lacks}. Give a whole model as '
            f'SOLVER.MODEL.PRETRAINED_MODEL, and this one as {keys}')
