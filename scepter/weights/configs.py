"""The config files of a diffusers folder, read as configs of ours: one function for each part.

Each leaf of a node is `Said`: a value, and where it was read. What a network of ours cannot be is a CheckpointError that names the key.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from scepter.core.errors import CheckpointError


class Said(NamedTuple):
    """A value, and where it was taken from. is_convention: the file does not say it, published models of its kind are so."""
    value: Any
    source: str
    is_convention: bool = False


Node = dict[str, Any]    # key -> Said, or the Node of another component, or a list of them


class Settings:
    """One JSON file of a folder: what stands in it, else what the library that wrote it takes for an absent key."""

    def __init__(self, values: Mapping[str, Any], file: str, folder: str, defaults: Mapping[str, Any] = {}):
        self.values, self.file, self.folder, self.defaults = values, file, folder, defaults

    def __getitem__(self, key: str) -> Any:
        return self.values[key] if key in self.values else self.defaults[key]

    def get(self, key: str, default: Any = None) -> Any:
        """A value that may be absent; null is absent too."""
        value = self.values.get(key, self.defaults.get(key))
        return default if value is None else value

    def said(self, value: Any, *keys: str) -> Said:
        """A value of ours that was read from these keys."""
        words = ', '.join(key if key in self.values else f'no {key}, so the default' for key in keys)
        return Said(value, f'{self.file}: {words}')

    def refusal(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(f'{self.folder}: {self.file} has {key} {self.get(key)!r}, but {expected}')

    def only(self, known: Mapping[str, tuple[Any, ...]], what: str) -> None:
        """Refuse every key whose value a network of ours cannot have; absent is plain, and so is null where nothing or False is."""
        for key, values in known.items():
            if key not in self.values:
                continue
            value, plain = self.values[key], values or (None,)
            if (isinstance(value, list) and value and all(v in plain for v in value)) or (value is None and False in plain):
                continue
            if value not in plain:
                raise self.refusal(key, f'{what} has {" or ".join(repr(v) for v in plain)} only')

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, a value of a wrong type is a fault of the file."""
        try:
            yield
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            raise CheckpointError(f'{self.folder}: {self.file} cannot be read as the config of such a part '
                                  f'({type(error).__name__}: {error})') from error

    def numbers(self, key: str) -> list[int]:
        """A list of sizes. Raises CheckpointError for anything else."""
        found = self[key]
        if not isinstance(found, list | tuple) or not 0 < len(found) <= 16 or not all(type(n) is int and 0 < n <= 100_000 for n in found):
            raise self.refusal(key, 'expected up to 16 numbers above 0')
        return list(found)

    def number(self, key: str, most: int = 100_000) -> int:
        """A size. Raises CheckpointError for anything else, also for one that nobody could mean."""
        found = self[key]
        if type(found) is not int or not 0 < found <= most:
            raise self.refusal(key, f'expected a number in 1..{most}')
        return found

    def flag(self, key: str) -> bool:
        """A yes or no; null is no. Raises CheckpointError for anything else."""
        found = self[key]
        if found is not None and not isinstance(found, bool):
            raise self.refusal(key, 'expected true or false')
        return bool(found)

    def multiples(self, key: str) -> tuple[int, list[int]]:
        """(channels of the first level, those of all in multiples of it)"""
        channels = self.numbers(key)
        if any(c % channels[0] for c in channels):
            raise self.refusal(key, f'CHANNEL_MULT knows whole multiples of the first, {channels[0]}, only')
        if channels[0] % 32:
            raise self.refusal(key, 'channels are normalised in groups of 32, so expected multiples of it')
        return channels[0], [c // channels[0] for c in channels]


# ---------------------------------------------------------------- UNet
UNET_DEFAULTS = {
    'in_channels': 4, 'out_channels': 4, 'sample_size': None, 'block_out_channels': (320, 640, 1280, 1280), 'layers_per_block': 2,
    'down_block_types': ('CrossAttnDownBlock2D',) * 3 + ('DownBlock2D',), 'up_block_types': ('UpBlock2D',) + ('CrossAttnUpBlock2D',) * 3,
    'cross_attention_dim': 1280, 'attention_head_dim': 8, 'transformer_layers_per_block': 1, 'use_linear_projection': False}
# what changes the network and has one value with us
UNET_ONLY: dict[str, tuple[Any, ...]] = {
    'norm_num_groups': (32,), 'norm_eps': (1e-5,), 'act_fn': ('silu', 'swish'), 'mid_block_type': ('UNetMidBlock2DCrossAttn',),
    'center_input_sample': (False,), 'flip_sin_to_cos': (True,), 'freq_shift': (0,), 'downsample_padding': (1,),
    'mid_block_scale_factor': (1,), 'only_cross_attention': (False,), 'dual_cross_attention': (False,),
    'mid_block_only_cross_attention': (False,), 'cross_attention_norm': (), 'reverse_transformer_layers_per_block': (),
    'encoder_hid_dim': (), 'encoder_hid_dim_type': (), 'class_embed_type': (), 'num_class_embeds': (), 'class_embeddings_concat': (False,),
    'addition_embed_type': (None, 'text_time'), 'resnet_time_scale_shift': ('default',), 'resnet_skip_time_act': (False,),
    'resnet_out_scale_factor': (1,), 'time_embedding_type': ('positional',), 'time_embedding_dim': (), 'time_embedding_act_fn': (),
    'timestep_post_act': (), 'time_cond_proj_dim': (), 'conv_in_kernel': (3,), 'conv_out_kernel': (3,),
    'attention_type': ('default', 'vanilla')}


def unet(values: Mapping[str, Any], folder: str, file: str = 'unet/config.json') -> Node:
    """A UNet2DConditionModel as a DiffusionUNet."""
    s = Settings(values, file, folder, UNET_DEFAULTS)
    with s.reading():
        _expect_class(s, 'UNet2DConditionModel')
        s.only(UNET_ONLY, 'a DiffusionUNet')
        if values.get('mid_block_type', '') is None:
            raise s.refusal('mid_block_type', 'a DiffusionUNet has a middle')
        width, mult = s.multiples('block_out_channels')
        has = _levels_with_attention(s, len(mult))
        depths, context = s['transformer_layers_per_block'], s['cross_attention_dim']
        if isinstance(depths, list | tuple) and not all(type(d) is int for d in depths):
            raise s.refusal('transformer_layers_per_block', 'TRANSFORMER_DEPTH knows one number, or one for each level')
        contexts = set(s.numbers('cross_attention_dim') if isinstance(context, list | tuple) else [s.number('cross_attention_dim')])
        if len(contexts) > 1:
            raise s.refusal('cross_attention_dim', 'CONTEXT_DIM is one for all levels')
        node = {
            'NAME': 'DiffusionUNet',
            'IN_CHANNELS': s.said(s.number('in_channels'), 'in_channels'),
            'OUT_CHANNELS': s.said(s.number('out_channels'), 'out_channels'),
            'MODEL_CHANNELS': s.said(width, 'block_out_channels'),
            'CHANNEL_MULT': s.said(mult, 'block_out_channels'),
            'NUM_RES_BLOCKS': s.said(_one_or_list(s, 'layers_per_block', len(mult)), 'layers_per_block'),
            'ATTENTION_RESOLUTIONS': s.said([2 ** level for level, h in enumerate(has) if h], 'down_block_types'),
            'TRANSFORMER_DEPTH': s.said(_one_or_list(s, 'transformer_layers_per_block', len(mult)), 'transformer_layers_per_block'),
            **_heads(s, [width * m for m in mult], has),
            'USE_LINEAR_IN_TRANSFORMER': s.said(s.flag('use_linear_projection'), 'use_linear_projection'),
            'CONTEXT_DIM': s.said(contexts.pop(), 'cross_attention_dim')}
        if s.get('addition_embed_type') is not None:
            node['NUM_CLASSES'] = s.said('sequential', 'addition_embed_type')
            node['ADM_IN_CHANNELS'] = s.said(s.number('projection_class_embeddings_input_dim'), 'projection_class_embeddings_input_dim')
        return node


def _levels_with_attention(s: Settings, levels: int) -> list[bool]:
    down, up = list(s['down_block_types']), list(s['up_block_types'])
    if len(down) != levels or not set(down) <= {'CrossAttnDownBlock2D', 'DownBlock2D'}:
        raise s.refusal('down_block_types', f'expected CrossAttnDownBlock2D or DownBlock2D for each of {levels} levels')
    has = [kind == 'CrossAttnDownBlock2D' for kind in down]
    if up != ['CrossAttnUpBlock2D' if h else 'UpBlock2D' for h in reversed(has)]:
        raise s.refusal('up_block_types', 'expected the levels of down_block_types in reverse')
    return has


def _heads(s: Settings, channels: list[int], has: list[bool]) -> Node:
    """NUM_HEADS or NUM_HEADS_CHANNELS, whichever says it for every level with attention and for the middle."""
    key = 'num_attention_heads' if s.values.get('num_attention_heads') else 'attention_head_dim'    # both count heads
    heads = s.numbers(key) if isinstance(s[key], list | tuple) else [s.number(key)] * len(channels)
    if len(heads) != len(channels):
        raise s.refusal(key, f'expected one for each of {len(channels)} levels')
    used = [(c, h) for c, h, is_used in zip(channels, heads, [*has[:-1], True]) if is_used]
    if any(c % h for c, h in used):
        raise s.refusal(key, f'{channels} channels cannot be shared by so many heads')
    if len({h for _, h in used}) == 1:
        return {'NUM_HEADS': s.said(used[0][1], key)}
    if len({c // h for c, h in used}) == 1:
        return {'NUM_HEADS_CHANNELS': s.said(used[0][0] // used[0][1], key)}
    raise s.refusal(key, 'expected either as many heads or as many channels of a head on every level (NUM_HEADS, NUM_HEADS_CHANNELS)')


def _one_or_list(s: Settings, key: str, levels: int) -> int | list[int]:
    if not isinstance(s[key], list | tuple):
        return s.number(key, most=100)
    found = s.numbers(key)
    if len(found) != levels or max(found) > 100:
        raise s.refusal(key, f'expected one in 1..100 for each of {levels} levels')
    return found[0] if len(set(found)) == 1 else found


# ---------------------------------------------------------------- autoencoder
VAE_DEFAULTS = {'in_channels': 3, 'out_channels': 3, 'block_out_channels': (64,), 'layers_per_block': 1, 'latent_channels': 4,
                'scaling_factor': 0.18215, 'shift_factor': None, 'use_quant_conv': True, 'use_post_quant_conv': True}
VAE_ONLY: dict[str, tuple[Any, ...]] = {
    'norm_num_groups': (32,), 'act_fn': ('silu', 'swish'), 'down_block_types': ('DownEncoderBlock2D',),
    'up_block_types': ('UpDecoderBlock2D',), 'mid_block_add_attention': (True,), 'latents_mean': (), 'latents_std': ()}


def vae(values: Mapping[str, Any], folder: str, file: str = 'vae/config.json') -> Node:
    """diffusers' AutoencoderKL as ours."""
    s = Settings(values, file, folder, VAE_DEFAULTS)
    with s.reading():
        _expect_class(s, 'AutoencoderKL')
        s.only(VAE_ONLY, 'an AutoencoderKL')
        if s.flag('use_quant_conv') != s.flag('use_post_quant_conv'):
            raise s.refusal('use_quant_conv', 'USE_CONV is one for both: expected it to be as use_post_quant_conv')
        width, mult = s.multiples('block_out_channels')
        latent = s.said(s.number('latent_channels'), 'latent_channels')
        half = {'CH': s.said(width, 'block_out_channels'), 'CH_MULT': s.said(mult, 'block_out_channels'),
                'NUM_RES_BLOCKS': s.said(s.number('layers_per_block', most=100), 'layers_per_block'), 'Z_CHANNELS': latent}
        return {'NAME': 'AutoencoderKL', 'EMBED_DIM': latent, 'USE_CONV': s.said(s.flag('use_quant_conv'), 'use_quant_conv'),
                'ENCODER': {'NAME': 'Encoder', **half, 'IN_CHANNELS': s.said(s.number('in_channels'), 'in_channels')},
                'DECODER': {'NAME': 'Decoder', **half, 'OUT_CH': s.said(s.number('out_channels'), 'out_channels')}}


def latent(values: Mapping[str, Any], folder: str, file: str = 'vae/config.json') -> dict[str, Said]:
    """SCALE_FACTOR and SHIFT_FACTOR."""
    s = Settings(values, file, folder, VAE_DEFAULTS)
    with s.reading():
        scale = float(s['scaling_factor'])
        if not 0 < scale < float('inf'):
            raise s.refusal('scaling_factor', 'expected a number above 0')
        shift = float(s['shift_factor'] or 0)
        if not abs(shift) < float('inf'):
            raise s.refusal('shift_factor', 'expected a number')
        return {'SCALE_FACTOR': s.said(scale, 'scaling_factor'), 'SHIFT_FACTOR': s.said(shift, 'shift_factor')}


# ---------------------------------------------------------------- text towers
TEXT_DEFAULTS = {'hidden_size': 512, 'intermediate_size': 2048, 'num_hidden_layers': 12, 'num_attention_heads': 8,
                 'max_position_embeddings': 77, 'projection_dim': 512, 'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5,
                 'vocab_size': 49408}


def text_tower(values: Mapping[str, Any], folder: str, part: str = 'text_encoder', role: str = 'alone') -> Node:
    """A CLIPTextModel as one of our towers.

    role: alone (the last state, normed: SD1, SD2), beside (the last but one, not normed: SDXL), or last (beside, and it gives the
    pooled vector).
    """
    s = Settings(values.get('text_config') or values, f'{part}/config.json', folder, TEXT_DEFAULTS)
    with s.reading():
        width, depth, heads = s.number('hidden_size'), s.number('num_hidden_layers', most=100), s.number('num_attention_heads')
        if width % heads:
            raise s.refusal('num_attention_heads', f'{width} channels cannot be shared by so many')
        is_open = s['hidden_act'] == 'gelu'
        s.only({'hidden_act': ('quick_gelu', 'gelu'), 'layer_norm_eps': (1e-5,), 'vocab_size': (49408,),
                'intermediate_size': (4 * width,)}, 'a text tower')
        if s.number('intermediate_size') != 4 * width:
            raise s.refusal('intermediate_size', f'the MLPs of a text tower are 4 times as wide as it, {4 * width}')
        if role == 'last' and (not is_open or s['projection_dim'] != width):
            key, expected = ('projection_dim', str(width)) if is_open else ('hidden_act', "'gelu'")
            raise s.refusal(key, f'the tower that gives the pooled vector, which is OpenCLIP\'s, has {expected}')
        sizes = {'WIDTH': s.said(width, 'hidden_size'), 'DEPTH': s.said(depth, 'num_hidden_layers'),
                 'HEADS': s.said(heads, 'num_attention_heads'),
                 'MAX_LENGTH': s.said(s.number('max_position_embeddings'), 'max_position_embeddings')}
        pipeline = {'alone': 'StableDiffusionPipeline', 'beside': 'StableDiffusionXLPipeline', 'last': 'StableDiffusionXLPipeline'}[role]

        def taken(value: Any) -> Said:
            return Said(value, f'what {pipeline} takes of {part}')

        if not is_open:
            layer = {'LAYER': taken('last')} if role == 'alone' else {'LAYER': taken('hidden'), 'LAYER_IDX': taken(-2)}
            return {'NAME': s.said('FrozenCLIPEmbedder', 'hidden_act'), **sizes, **layer}
        arch = {'NAME': s.said('FrozenOpenCLIPEmbedder', 'hidden_act'), 'ARCH': s.said('custom', 'hidden_size')}
        if role != 'alone':
            return {**arch, **sizes, 'LAYER': taken('penultimate'), 'USE_FINAL_LAYER_NORM': taken(False),
                    'RETURN_POOLED': taken(role == 'last')}
        return {**arch, **sizes, 'LAYER': taken('last')}


def conditioner(towers: list[Node], pooled: int, vector: Said, size_dim: Said, zero_empty: Said, name: str) -> Node:
    """A GeneralConditioner whose pooled vector and sizes are as wide together as the network's vector."""
    sizes = {6: ['original_size', 'crop_top_left', 'target_size'], 5: ['original_size', 'crop_top_left', 'aesthetic_score']}
    count, rest = divmod(vector.value - pooled, size_dim.value)
    if rest or count not in sizes:
        raise CheckpointError(f'{name}: the UNet takes a vector of {vector.value} ({vector.source}); expected the pooled {pooled} and '
                              f'{size_dim.value} for each of 6 numbers (base) or 5 (refiner)')
    return {'NAME': 'GeneralConditioner', 'SIZES': Said(sizes[count], vector.source), 'SIZE_DIM': size_dim, 'ZERO_EMPTY': zero_empty,
            'EMBEDDERS': towers}


# ---------------------------------------------------------------- scheduler
PREDICTIONS = {'epsilon': 'eps', 'v_prediction': 'v', 'sample': 'x0'}
# scheduler of diffusers -> (sampler of ours, how it spreads steps where nothing is said, its own betas where nothing is said)
OLD_BETAS, NEW_BETAS = (1e-4, 0.02), (0.00085, 0.012)
SCHEDULERS: dict[str, tuple[str | None, str, tuple[float, float]]] = {
    'DDIMScheduler': ('ddim', 'leading', OLD_BETAS), 'DDPMScheduler': ('ddpm', 'leading', OLD_BETAS),
    'PNDMScheduler': (None, 'leading', OLD_BETAS), 'LCMScheduler': ('lcm', 'leading', NEW_BETAS),
    'EulerDiscreteScheduler': ('euler', 'linspace', OLD_BETAS), 'LMSDiscreteScheduler': ('lms', 'linspace', OLD_BETAS),
    'EulerAncestralDiscreteScheduler': ('euler_ancestral', 'linspace', OLD_BETAS), 'HeunDiscreteScheduler': ('heun', 'linspace', NEW_BETAS),
    'KDPM2DiscreteScheduler': ('dpm2', 'linspace', NEW_BETAS), 'KDPM2AncestralDiscreteScheduler': ('dpm2_ancestral', 'linspace', NEW_BETAS),
    'DPMSolverMultistepScheduler': ('dpmpp_2m', 'linspace', OLD_BETAS), 'UniPCMultistepScheduler': ('unipc', 'linspace', OLD_BETAS),
    'DPMSolverSDEScheduler': ('dpmpp_sde', 'linspace', NEW_BETAS), 'DPMSolverSinglestepScheduler': (None, 'linspace', OLD_BETAS),
    'DEISMultistepScheduler': (None, 'linspace', OLD_BETAS)}
BETAS = {'scaled_linear': 'scaled_linear', 'linear': 'linear', 'sigmoid': 'sigmoid', 'squaredcos_cap_v2': 'cosine'}
SCHEDULER_ONLY: dict[str, tuple[Any, ...]] = {'use_flow_sigmas': (False,), 'thresholding': (False,), 'interpolation_type': ('linear',),
                                              'timestep_type': ('discrete',)}
SCHEDULER = 'scheduler/scheduler_config.json'


def process(values: Mapping[str, Any], folder: str) -> Node:
    """What a scheduler says about the network: how it was noised, and what it predicts."""
    s = _scheduler(values, folder)
    with s.reading():
        prediction = PREDICTIONS.get(s['prediction_type'])
        if prediction is None:
            raise s.refusal('prediction_type', f'expected one of {", ".join(PREDICTIONS)}')
        return {'PARAMETERIZATION': s.said(prediction, 'prediction_type'),
                'TIMESTEPS': s.said(s.number('num_train_timesteps'), 'num_train_timesteps'),
                'SCHEDULE_ARGS': _betas(s),
                'ZERO_TERMINAL_SNR': s.said(s.flag('rescale_betas_zero_snr'), 'rescale_betas_zero_snr')}


def sampling(values: Mapping[str, Any], folder: str) -> Node:
    """SAMPLE_ARGS that draw as this scheduler does."""
    s = _scheduler(values, folder)
    with s.reading():
        sampler, spacing = _sampler(s), s['timestep_spacing']
        if spacing not in ('leading', 'trailing', 'linspace'):
            raise s.refusal('timestep_spacing', 'expected leading, trailing or linspace')
        said = s.said(spacing, 'timestep_spacing')
        if spacing == 'leading' and s['steps_offset']:
            said = Said(spacing, f'{said.source}; its steps_offset {s["steps_offset"]} is left aside, so each step is that much cleaner')
        node = {'SAMPLER': sampler, 'DISCRETIZATION': said}
        if s.get('use_karras_sigmas', False):
            node['DISCRETIZATION'] = s.said('karras', 'use_karras_sigmas')
        return node


def _scheduler(values: Mapping[str, Any], folder: str) -> Settings:
    name = values.get('_class_name')
    if name not in [*SCHEDULERS]:
        raise CheckpointError(f'{folder}: {SCHEDULER} has _class_name {name!r}, whose process is none of ours; known are '
                              f'{", ".join(SCHEDULERS)}')
    betas = SCHEDULERS[name][2]
    s = Settings(values, SCHEDULER, folder, {
        'num_train_timesteps': 1000, 'beta_start': betas[0], 'beta_end': betas[1], 'prediction_type': 'epsilon',
        'beta_schedule': 'scaled_linear' if name == 'LCMScheduler' else 'linear', 'timestep_spacing': SCHEDULERS[name][1],
        'rescale_betas_zero_snr': False, 'steps_offset': 0})
    s.only(SCHEDULER_ONLY, 'a sampler of ours')
    return s


def _sampler(s: Settings) -> Said:
    """The sampler that steps as this class does; ddim where there is none."""
    name = s['_class_name']
    sampler = SCHEDULERS[name][0]
    if name == 'DPMSolverMultistepScheduler':
        kind = (s.get('algorithm_type', 'dpmsolver++'), s.get('solver_order', 2), s.get('solver_type', 'midpoint'))
        sampler = {('dpmsolver++', 2, 'midpoint'): 'dpmpp_2m', ('sde-dpmsolver++', 2, 'midpoint'): 'dpmpp_2m_sde'}.get(kind)
    if sampler is None or s.get('use_exponential_sigmas', False) or s.get('use_beta_sigmas', False):
        return Said('ddim', f'{s.file} names {name}, which no sampler of ours equals with these settings: ddim in its place', True)
    return s.said(sampler, '_class_name')


def _betas(s: Settings) -> Node:
    if s.get('trained_betas') is not None:
        betas = [float(beta) for beta in s['trained_betas']]
        if len(betas) != s.number('num_train_timesteps') or not all(0 < beta < 1 for beta in betas):
            raise s.refusal('num_train_timesteps', f'trained_betas lists {len(betas)}: expected one of 0..1 for each level')
        return {'NAME': s.said('listed', 'trained_betas'), 'BETAS': s.said(betas, 'trained_betas')}
    name = BETAS.get(s['beta_schedule'])
    if name is None:
        raise s.refusal('beta_schedule', f'expected one of {", ".join(BETAS)}')
    node = {'NAME': s.said(name, 'beta_schedule')}
    if name != 'cosine':
        for ours, theirs in (('BETA_MIN', 'beta_start'), ('BETA_MAX', 'beta_end')):
            if not 0 < float(s[theirs]) < 1:
                raise s.refusal(theirs, 'expected a number in 0..1')
            node[ours] = s.said(float(s[theirs]), theirs)
    return node


def _expect_class(s: Settings, name: str) -> None:
    found = s.values.get('_class_name', name)
    if found != name:
        raise s.refusal('_class_name', f'a {name} is what can be read here')
