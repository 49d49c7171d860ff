"""Text towers: equal to the libraries they come from, right at every layer, and calm about any prompt."""
from __future__ import annotations

import logging
import random

import pytest
import torch

from scepter.core.errors import CheckpointError
from scepter.core.faults import ConfigError
from scepter.core.logger import get_logger
from scepter.core.registry import EMBEDDERS
from scepter.models.embedders.base import BaseEmbedder
from scepter.models.embedders.tokenizer import ClipTokenizer, split_weights, weighted_pieces
from scepter.weights import load_into
from scepter.weights.vocabulary import Vocabulary

transformers = pytest.importorskip('transformers')
open_clip = pytest.importorskip('open_clip')

TINY = {'WIDTH': 32, 'DEPTH': 3, 'HEADS': 2}
PROMPTS = ['a photo of a cat', '', 'two dogs, running: fast!', '\U0001f600 \u05e9\u05dc\u05d5\u05dd']


def clip(**keys):
    torch.manual_seed(0)
    return EMBEDDERS.build({'NAME': 'FrozenCLIPEmbedder', **TINY, **keys})


def openclip(**keys):
    torch.manual_seed(0)
    return EMBEDDERS.build({'NAME': 'FrozenOpenCLIPEmbedder', 'ARCH': 'custom', **TINY, **keys})


def hf_tower(embedder, kind='CLIPTextModel', act='quick_gelu'):
    """transformers' own tower with the weights of ours."""
    from scepter.weights import Weights
    from scepter.weights.families.text import openclip
    width = embedder.tower.width
    config = transformers.CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=embedder.tower.depth,
                                         num_attention_heads=embedder.tower.heads, vocab_size=49408, hidden_act=act, projection_dim=width,
                                         eos_token_id=49407)
    tower = getattr(transformers, kind)(config).eval()
    if act == 'quick_gelu':
        weights = Weights.of(embedder.state_dict()).section('transformer.')
    else:
        weights = openclip().to_theirs(Weights.of(embedder.state_dict()))
    load_into(tower, weights)
    return tower


def near(a, b, tol=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tol * b.abs().max()


# ---------------------------------------------------------------- tokens
def texts():
    rng = random.Random(0)
    alphabets = ["abc XYZ 0189 '!?-_\t\n", 'éàüßøñÇ', 'привет', 'שלום', 'नमस्ते', '日本語', '\U0001f600\U0001f3f3', '½²Ⅷ٣']
    mixed = [''.join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randrange(40))) for _ in range(200)]
    return ["the dog's don't WE'LL 'sup", "!'s ''s", 'x²½ 12345', 'e\u0301\u0301', '<|endoftext|> hi', 'a\n\tb  c', '', '_a__b', 'a' * 500,
            *mixed]


def test_tokens_are_those_of_transformers(tmp_path):
    ours = ClipTokenizer.shipped()
    ours.vocabulary.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    for text in texts():
        assert ours.encode(text) == theirs(text, add_special_tokens=False, verbose=False)['input_ids'], text


def test_tokens_are_those_of_open_clip():
    ours, theirs = ClipTokenizer.shipped(pad=0), open_clip.SimpleTokenizer()
    prompts = ['a photo of a cat', 'Two dogs, 12 cats; "red"!', '', 'ünïcödé']
    assert torch.equal(ours(prompts), theirs(prompts))


def test_a_saved_tokenizer_reads_back_the_same(tmp_path):
    ours = ClipTokenizer.shipped(pad=0)
    ours.vocabulary.save(tmp_path / 'a')
    transformers.CLIPTokenizer.from_pretrained(tmp_path / 'a').save_pretrained(tmp_path / 'b')
    for folder in 'ab':
        read = ClipTokenizer.from_folder(tmp_path / folder)
        assert torch.equal(read(PROMPTS), ours(PROMPTS))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match='no tokenizer'):
        ClipTokenizer.from_folder(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('[]')
    with pytest.raises(CheckpointError, match='not a CLIP tokenizer'):
        ClipTokenizer.from_folder(tmp_path)


def test_what_a_long_prompt_loses_is_shown_once(caplog, monkeypatch):
    embedder = clip(MAX_LENGTH=6)
    monkeypatch.setattr(get_logger(), 'propagate', True)
    with caplog.at_level(logging.WARNING):
        tokens = embedder.tokenize(['one two three four five six'])
        embedder.tokenize(['one two three four five seven'])
    assert tokens[0, 0] == 49406 and tokens[0, -1] == 49407
    assert [record.message for record in caplog.records if 'five six' in record.message]
    assert not any('seven' in record.message for record in caplog.records)


def test_decoding_undoes_encoding():
    tokenizer = ClipTokenizer.shipped()
    assert tokenizer.decode(tokenizer.encode('three handwritten digits: été')) == 'three handwritten digits : été'


@pytest.mark.parametrize('prompt', ['', ' \n', '\U0001f9d1\u200d\U0001f680' * 30, 'x' * 10_000, 'word ' * 2_000, 'مرحبا بالعالم',
                                    '\0\1\2\3(a:1.2)', '(' * 500 + ':' * 500, '((((a:9):9):9):9)', '\ud800'])
@pytest.mark.parametrize('long', ['cut', 'chunk'])
def test_any_prompt_is_encoded(prompt, long):
    embedder = clip(LONG_PROMPT=long, PROMPT_WEIGHTING=True, DEPTH=1)
    context = embedder([prompt, 'a cat'])
    assert context.isfinite().all() and context.shape[0] == 2 and context.shape[1] % 77 == 0


# ---------------------------------------------------------------- CLIP
def test_each_layer_of_the_clip_tower_is_that_of_transformers():
    embedder = clip()
    tokens = embedder.tokenize(PROMPTS)
    with torch.no_grad():
        theirs = hf_tower(embedder)(input_ids=tokens, output_hidden_states=True)
    norm = embedder.tower.final_layer_norm
    near(embedder.encode_text(tokens), theirs.last_hidden_state)
    near(clip(LAYER='pooled').encode_text(tokens), theirs.pooler_output[:, None])
    near(clip(LAYER='pooled', USE_FINAL_LAYER_NORM=True).encode_text(tokens), theirs.pooler_output[:, None])    # never twice
    near(clip(LAYER='penultimate').encode_text(tokens), theirs.hidden_states[-2])
    near(clip(LAYER='penultimate', USE_FINAL_LAYER_NORM=True).encode_text(tokens), norm(theirs.hidden_states[-2]))
    for index in range(-4, 4):
        near(clip(LAYER='hidden', LAYER_IDX=index).encode_text(tokens), theirs.hidden_states[index])


def test_a_hidden_layer_that_is_not_there_is_a_config_error():
    for index in (None, 4, -5):
        with pytest.raises(ConfigError, match='-4 to 3'):
            clip(LAYER='hidden', LAYER_IDX=index)


@pytest.mark.parametrize('kind', ['CLIPTextModel', 'CLIPModel'])
def test_a_pretrained_folder_of_transformers_gives_tokenizer_and_tower(tmp_path, kind):
    text = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'vocab_size': 49408,
            'hidden_act': 'gelu'}
    config = transformers.CLIPTextConfig(**text) if kind == 'CLIPTextModel' else transformers.CLIPConfig(text_config=text, vision_config={
        'hidden_size': 16, 'intermediate_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'image_size': 32, 'patch_size': 16})
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(tmp_path)
    Vocabulary.shipped().save(tmp_path)
    embedder = EMBEDDERS.build({'NAME': 'FrozenCLIPEmbedder', 'PRETRAINED_MODEL': str(tmp_path)})
    with torch.no_grad():
        theirs = getattr(model, 'text_model', model)(input_ids=embedder.tokenize(PROMPTS)).last_hidden_state
    near(embedder(PROMPTS), theirs)
    assert not any(p.requires_grad for p in embedder.parameters())


def test_names_are_those_of_compvis_whatever_is_installed():
    names = set(clip().state_dict())
    assert 'transformer.text_model.embeddings.token_embedding.weight' in names
    assert all(name.startswith('transformer.text_model.') for name in names)


def test_a_trained_tower_gets_gradients_only_where_they_are_used():
    embedder = clip(FREEZE=False, USE_GRAD=True, LAYER='penultimate')
    embedder(['a cat']).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for n, p in embedder.named_parameters() if 'final_layer_norm' not in n)
    assert any(p.requires_grad for p in embedder.parameters())


def test_a_frozen_tower_records_nothing_and_stays_in_evaluation():
    embedder = clip()
    assert not embedder(['a cat']).requires_grad
    assert not embedder.train().training


def test_bfloat16_training_attention_is_the_fused_one():
    embedder = clip(FREEZE=False, USE_GRAD=True).bfloat16()
    tokens = embedder.tokenize(PROMPTS)
    plain = embedder.encode_text(tokens)
    with torch.no_grad():
        fused = embedder.encode_text(tokens)
    near(plain.float(), fused.float(), 0.03)


# ---------------------------------------------------------------- OpenCLIP
def test_the_openclip_tower_is_that_of_open_clip():
    ours = openclip(LAYER='last', RETURN_POOLED=True)
    theirs = open_clip.model.CLIP(32, {'layers': 1, 'width': 32, 'patch_size': 16, 'image_size': 32, 'head_width': 16},
                                  {'context_length': 77, 'vocab_size': 49408, 'width': 32, 'heads': 2, 'layers': 3}).eval()
    mine = {n: t for n, t in theirs.state_dict().items() if not n.startswith('visual.')}
    load_into(ours.model, mine, ignore_keys=['logit_scale', 'attn_mask'])
    tokens = ours.tokenize(PROMPTS)
    context, pooled = ours.encode_both(tokens)
    with torch.no_grad():
        states = []
        hooks = [block.register_forward_hook(lambda m, i, o: states.append(o)) for block in theirs.transformer.resblocks]
        near(pooled, theirs.encode_text(tokens))
        near(context, theirs.ln_final(states[-1]))
    for hook in hooks:
        hook.remove()
    penultimate = openclip(USE_FINAL_LAYER_NORM=False)
    load_into(penultimate, {f'model.{n}': t for n, t in mine.items()})    # the last block and the projection are known to be spare
    near(penultimate.encode_text(tokens), states[-2])


@pytest.mark.parametrize(('arch', 'parameters'), [
    ('custom', None), *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        ('ViT-L-14', 123_650_304), ('ViT-H-14', 354_032_640), ('ViT-bigG-14', 694_659_840)))])
def test_openclip_and_hugging_face_hold_the_same_tower(arch, parameters):
    sizes = {'ARCH': arch, **dict.fromkeys(TINY if arch != 'custom' else ())}
    ours = openclip(LAYER='last', RETURN_POOLED=True, **sizes)
    assert parameters in (None, sum(p.numel() for p in ours.parameters()))
    tokens = ours.tokenize(PROMPTS)
    with torch.no_grad():
        theirs = hf_tower(ours, 'CLIPTextModelWithProjection', 'gelu')(input_ids=tokens)
    context, pooled = ours.encode_both(tokens)
    near(context, theirs.last_hidden_state)
    near(pooled, theirs.text_embeds)


@pytest.mark.slow
def test_the_clip_tower_of_published_size_is_that_of_transformers():
    torch.manual_seed(0)
    ours = EMBEDDERS.build({'NAME': 'FrozenCLIPEmbedder'})
    assert sum(p.numel() for p in ours.parameters()) == 123_060_480 and len(ours.state_dict()) == 196
    tokens = ours.tokenize(PROMPTS)
    with torch.no_grad():
        theirs = hf_tower(ours)(input_ids=tokens)
    near(ours.encode_text(tokens), theirs.last_hidden_state)


def test_a_penultimate_openclip_tower_leaves_out_what_it_never_runs():
    names = set(openclip().state_dict())
    assert 'model.transformer.resblocks.1.ln_1.weight' in names
    assert not any('resblocks.2' in name or 'projection' in name for name in names)


def test_an_unknown_architecture_is_a_config_error():
    with pytest.raises(ConfigError, match='ViT-H-14'):
        EMBEDDERS.build({'NAME': 'FrozenOpenCLIPEmbedder', 'ARCH': 'ViT-H-15'})


# ---------------------------------------------------------------- long and weighted prompts
def test_chunks_are_encoded_one_by_one_and_joined():
    embedder = clip(LONG_PROMPT='chunk', MAX_LENGTH=6)
    context = embedder(['one two three four five six', 'seven'])
    assert context.shape == (2, 12, 32)
    near(context[:1, :6], embedder(['one two three four']))
    near(context[:1, 6:], embedder(['five six']))
    near(context[1:, 6:], embedder(['']))


def test_a_weight_moves_the_context_away_from_the_empty_prompt():
    embedder = clip(PROMPT_WEIGHTING=True)
    plain, empty, weighted = embedder(['a red cat']), embedder(['']), embedder(['a (red:1.5) cat'])
    near(weighted[:, 2], empty[:, 2] + 1.5 * (plain[:, 2] - empty[:, 2]))
    near(weighted[:, [0, 1, 3]], plain[:, [0, 1, 3]])
    near(embedder(['(a red cat:0)'])[:, 1:4], empty[:, 1:4])


def test_weights_are_read_as_written():
    assert weighted_pieces('a (red:1.3) cat') == [('a ', 1.0), ('red', 1.3), (' cat', 1.0)]
    assert weighted_pieces('(x (y:2):0.5)') == [('x ', 0.5), ('y', 1.0)]
    assert weighted_pieces(r'\(a:2\) (b) c:3') == [('(a:2) (b) c:3', 1.0)]
    ids, weights = split_weights(ClipTokenizer.shipped()(['a (red:-0.7) cat'], has_weights=True))
    assert torch.equal(ids, ClipTokenizer.shipped()(['a red cat']))
    assert weights[0, :4].tolist() == pytest.approx([1, 1, -0.7, 1])


# ---------------------------------------------------------------- conditioner
def sdxl(**keys):
    towers = [{'NAME': 'FrozenCLIPEmbedder', **TINY, 'LAYER': 'hidden', 'LAYER_IDX': 2},
              {'NAME': 'FrozenOpenCLIPEmbedder', 'ARCH': 'custom', 'WIDTH': 48, 'DEPTH': 2, 'HEADS': 3, 'RETURN_POOLED': True,
               'USE_FINAL_LAYER_NORM': False}]
    torch.manual_seed(0)
    return EMBEDDERS.build({'NAME': 'GeneralConditioner', 'EMBEDDERS': towers, **keys})


def sizes(count):
    return {'original_size': torch.tensor([[900, 1200]] * count), 'crop_top_left': torch.tensor([[0, 64]] * count),
            'target_size': torch.tensor([[1024, 1024]] * count), 'prompt': ['not read'] * count}


def test_two_towers_and_the_sizes_make_the_condition_of_sdxl():
    embedder = sdxl()
    cond = embedder(PROMPTS, **sizes(4))
    assert cond.context.shape == (4, 77, 32 + 48) and cond.vector.shape == (4, 48 + 6 * 256)
    near(cond.context[..., :32], embedder.embedders[0](PROMPTS))
    near(cond.vector[:, :48], embedder.embedders[1].encode_both(embedder.embedders[1].tokenize(PROMPTS))[1])


def test_the_size_features_are_those_of_diffusers():
    embeddings = pytest.importorskip('diffusers.models.embeddings')
    theirs = embeddings.Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.tensor([900., 1200, 0, 64, 1024, 1024]))
    near(sdxl()(['x'], **sizes(1)).vector[0, 48:], theirs.flatten())


def test_a_missing_size_is_named():
    given = sizes(1)
    del given['original_size']
    with pytest.raises(ValueError, match='original_size'):
        sdxl()(['x'], **given)


def test_the_refiner_is_told_a_score_instead_of_a_target():
    embedder = sdxl(SIZES=['original_size', 'crop_top_left', 'aesthetic_score'])
    assert embedder(['x'], **sizes(1), aesthetic_score=torch.tensor([6.0])).vector.shape == (1, 48 + 5 * 256)


def test_an_empty_prompt_can_be_all_zeros():
    cond = sdxl(ZERO_EMPTY=True)(['', 'x'], **sizes(2))
    assert (cond.context[0] == 0).all() and (cond.vector[0, :48] == 0).all()
    assert (cond.context[1] != 0).any() and (cond.vector[0, 48:] != 0).any()


def test_a_last_tower_without_a_pooled_vector_is_refused():
    tower = {'NAME': 'FrozenOpenCLIPEmbedder', 'ARCH': 'custom', 'WIDTH': 48, 'DEPTH': 2, 'HEADS': 3}
    with pytest.raises(ConfigError, match='set its RETURN_POOLED to true'):
        sdxl(EMBEDDERS=[tower])


# ---------------------------------------------------------------- embedders of others
class Foreign(BaseEmbedder):
    """In the manner of the quick start: a text model and a tokenizer of transformers."""

    def __init__(self, cfg, logger=None):
        super().__init__(cfg, logger=logger)
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(cfg.TOKENIZER)
        self.transformer = transformers.CLIPTextModel(transformers.CLIPTextConfig(
            hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2)).eval()
        self.max_length = 8

    def encode_text(self, tokens, tokenizer=None, append_sentence_embedding=False):
        return self.transformer(input_ids=tokens).last_hidden_state


@pytest.fixture
def foreign(tmp_path):
    from scepter.core.config import Config
    Vocabulary.shipped().save(tmp_path)
    return Foreign(Config({'TOKENIZER': str(tmp_path)}))


def test_a_foreign_tokenizer_is_used_as_it_is(foreign, caplog, monkeypatch):
    monkeypatch.setattr(get_logger(), 'propagate', True)
    assert torch.equal(foreign.tokenize(PROMPTS[:2]), ClipTokenizer.shipped()(PROMPTS[:2], 8))
    with caplog.at_level(logging.WARNING):
        assert foreign.tokenize(['one two three four five six seven eight']).shape == (1, 8)
    assert 'seven eight' in caplog.text


def test_a_foreign_text_model_answers_to_both_names(foreign):
    assert foreign.transformer.text_model.final_layer_norm is foreign.transformer.get_submodule('final_layer_norm')
    assert not any('text_model' in name for name in foreign.state_dict())
    import copy
    twin = copy.deepcopy(foreign)
    assert twin.transformer.text_model.final_layer_norm is not foreign.transformer.text_model.final_layer_norm


@pytest.mark.parametrize('layout', ['transformer.text_model.', 'transformer.'])
def test_a_foreign_text_model_loads_weights_of_either_layout(foreign, layout):
    ours = clip()
    theirs = {n.replace('transformer.text_model.', layout): t for n, t in ours.state_dict().items()}
    foreign.load_state_dict({n: torch.zeros_like(t) for n, t in foreign.state_dict().items()})
    foreign.load_state_dict(theirs)
    tokens = foreign.tokenize(['a cat'])
    with torch.no_grad():
        near(foreign.encode_text(tokens), ours.encode_text(tokens))
    load_into(foreign, theirs)
