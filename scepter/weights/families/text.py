"""CLIP's text towers, as ours, as transformers' CLIPTextModel, and in the spelling of OpenCLIP: names, config and shapes."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from scepter.weights.family import Part
from scepter.weights.files import Weights, read_model_folder
from scepter.weights.said import Node, Said, Settings, Shapes
from scepter.weights.tables import Row

# OpenCLIP's published towers: name -> (width, depth, heads, width of the pooled vector)
ARCHITECTURES = {'ViT-L-14': (768, 12, 12, 768), 'ViT-H-14': (1024, 24, 16, 1024), 'ViT-bigG-14': (1280, 32, 20, 1280)}
TOWERS = {(1024, 23): 'ViT-H-14', (1024, 24): 'ViT-H-14', (1280, 32): 'ViT-bigG-14'}    # (width, blocks in the file) of SD2's and SDXL's


# ---------------------------------------------------------------- names
MODULES = ('embeddings', 'encoder', 'final_layer_norm')
OPENCLIP_BLOCK = {'ln_1': 'layer_norm1', 'ln_2': 'layer_norm2', 'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2',
                  'attn.out_proj': 'self_attn.out_proj'}
# what a file of the whole CLIP holds beside its text side, and what any tower holds beside weights
SPARE = ('visual.', 'vision_model.', 'visual_projection.', 'logit_scale', 'logit_bias', 'embeddings.position_ids',
         'text_model.embeddings.position_ids')
PATTERN = r'^(cond_stage_model|conditioner|text_encoder(_2)?)\.|token_embedding'


def clip_rows() -> Iterator[Row]:
    """Newer transformers save a tower without its prefix text_model."""
    return (Row(f'transformer.text_model.{m}', f'{prefix}{m}') for prefix in ('text_model.', '', 'transformer.') for m in MODULES)


def openclip_rows() -> Iterator[Row]:
    """q, k and v are one matrix with OpenCLIP, and the projection is transposed."""
    for prefix in ('text_model.', ''):
        block, layer = 'model.transformer.resblocks.{n}', f'{prefix}encoder.layers.{{n}}'
        yield Row('model.token_embedding', f'{prefix}embeddings.token_embedding')
        yield Row('model.positional_embedding', f'{prefix}embeddings.position_embedding.weight')
        yield Row('model.ln_final', f'{prefix}final_layer_norm')
        yield from (Row(f'{block}.{a}', f'{layer}.{b}') for a, b in OPENCLIP_BLOCK.items())
        for leaf in ('weight', 'bias'):
            yield Row(f'{block}.attn.in_proj_{leaf}', tuple(f'{layer}.self_attn.{c}_proj.{leaf}' for c in 'qkv'))
    yield Row('model.text_projection', 'text_projection.weight', 'transposed')


def clip(ours: str = 'cond_stage_model.', folder: str = 'text_encoder') -> Part:
    """CLIP's tower as a part."""
    return Part(folder, ours, CLIP_ROWS, 'text tower', 'COND_STAGE_MODEL', PATTERN, (*SPARE, 'text_projection.weight'), 'model')


def openclip(ours: str = 'cond_stage_model.', folder: str = 'text_encoder') -> Part:
    """OpenCLIP's tower as a part."""
    return Part(folder, ours, OPENCLIP_ROWS, 'text tower', 'COND_STAGE_MODEL', PATTERN, SPARE, 'model')


CLIP_ROWS, OPENCLIP_ROWS = tuple(clip_rows()), tuple(openclip_rows())


def text_tower_weights(folder: str | Path) -> Weights:
    """The weights of a Hugging Face CLIP folder under ClipText's names: embeddings.*, encoder.*, final_layer_norm.*"""
    found = clip().to_ours(read_model_folder(Path(folder)))
    return found.renamed({name: name.removeprefix('transformer.text_model.') for name in found})


# ---------------------------------------------------------------- theirs as ours
TEXT_DEFAULTS = {'hidden_size': 512, 'intermediate_size': 2048, 'num_hidden_layers': 12, 'num_attention_heads': 8,
                 'max_position_embeddings': 77, 'projection_dim': 512, 'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5,
                 'vocab_size': 49408}


def read_config(values: Mapping[str, Any], folder: str, part: str = 'text_encoder', role: str = 'alone') -> Node:
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


# ---------------------------------------------------------------- shapes as ours
def read_shapes(shapes: Shapes, prefix: str, role: str) -> Node:
    """A text tower. role: as in read_config."""
    clip, opened = f'{prefix}transformer.text_model.', f'{prefix}model.'
    is_open = f'{opened}token_embedding.weight' in shapes.weights
    embedding = f'{opened if is_open else f"{clip}embeddings."}token_embedding.weight'
    positions = f'{opened}positional_embedding' if is_open else f'{clip}embeddings.position_embedding.weight'
    blocks = f'{opened}transformer.resblocks' if is_open else f'{clip}encoder.layers'
    width, depth = shapes.size(embedding, 1), shapes.count(blocks)
    if shapes.size(f'{blocks}.0.mlp.{"c_fc" if is_open else "fc1"}.weight', 0).value != 4 * width.value:
        raise shapes.refusal(f'{blocks}.0.mlp', f'is not 4 times as wide as its tower, {width.value}, as those of a text tower here are')
    if shapes.size(embedding, 0).value != 49408:
        raise shapes.refusal(embedding, f'has {shapes.size(embedding, 0).value} words, but a text tower here knows the usual 49408')
    if width.value % 64:
        raise shapes.refusal(embedding, f'is {width.value} wide, so its heads are not the usual ones of 64 channels: give a YAML')
    kind: dict[str, Any] = {'NAME': Said('FrozenOpenCLIPEmbedder' if is_open else 'FrozenCLIPEmbedder', f'the names of {blocks}')}
    length = {'MAX_LENGTH': shapes.size(positions, 0)}
    sizes = {'WIDTH': width, 'DEPTH': Said(depth, f'the names of {blocks}'),
             'HEADS': Said(width.value // 64, 'heads of 64 channels', True)}

    def taken(value: Any) -> Said:
        return Said(value, f'the convention of Stable Diffusion{" XL" if prefix else ""}', True)

    if not is_open:
        layer = {'LAYER': taken('last')} if role == 'alone' else {'LAYER': taken('hidden'), 'LAYER_IDX': taken(-2)}
        return {**kind, **sizes, **length, **layer}
    if role == 'alone' and f'{opened}text_projection' not in shapes.weights:    # a part of the tower: its last block is left out
        sizes['DEPTH'] = Said(depth + 1, f'the names of {blocks}, where the last block is left out')
    if (width.value, depth) in TOWERS:
        sizes = {'ARCH': Said(TOWERS[width.value, depth], width.source)}
    else:
        sizes = {'ARCH': Said('custom', width.source), **sizes}
    pooled = {} if role == 'alone' else {'RETURN_POOLED': taken(role == 'last')}
    return {**kind, **sizes, **length, 'LAYER': taken('penultimate'), 'USE_FINAL_LAYER_NORM': taken(role == 'alone'), **pooled}


# ---------------------------------------------------------------- ours as theirs
def is_openclip(embedder: nn.Module) -> bool:
    """Whether the tower is OpenCLIP's, and not CLIP's."""
    return hasattr(embedder.tower, 'ln_final')


def hf_depth(embedder: nn.Module) -> int:
    """The blocks that a tower must have there. SD reads the last, normed state: an inner, normed one is the last of a shorter tower.

    SDXL reads the last but one, not normed. Raises ValueError for what neither does.
    """
    depth, state, normed = embedder.tower.depth, embedder.taken_state, embedder.USE_FINAL_LAYER_NORM
    if embedder.LAYER == 'last' or (normed and embedder.LAYER != 'pooled'):
        return state
    if not normed and state == depth - 1:
        return depth
    raise ValueError(f'diffusers cannot read the state after block {state} of {depth} {"with" if normed else "without"} the final norm')


def write_config(embedder: nn.Module, part: str) -> dict[str, Any]:
    """The config of a text tower of transformers."""
    tower, tokenizer, is_open = embedder.tower, embedder.tokenizer, is_openclip(embedder)
    embedding = tower.token_embedding if is_open else tower.embeddings.token_embedding
    blocks = tower.blocks()
    mlp = blocks[0].mlp.c_fc if is_open else blocks[0].mlp.fc1
    projection = getattr(tower, 'text_projection', None)
    kind = 'CLIPTextModelWithProjection' if part == 'text_encoder_2' else 'CLIPTextModel'
    return {'architectures': [kind], 'model_type': 'clip_text_model',
            'hidden_size': tower.width, 'intermediate_size': mlp.out_features, 'num_hidden_layers': hf_depth(embedder),
            'num_attention_heads': tower.heads, 'vocab_size': embedding.num_embeddings, 'layer_norm_eps': tower.norm.eps,
            'max_position_embeddings': tower.positions, 'hidden_act': 'gelu' if is_open else tower.activation,
            'projection_dim': tower.width if projection is None else projection.shape[1],
            'bos_token_id': tokenizer.bos, 'eos_token_id': tokenizer.eos, 'pad_token_id': tokenizer.pad}
