"""The text encoder of NOVA: Phi's states as transformers computes them, without padding, and what is too long is said."""
from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from scepter.core.config import Config
from scepter.core.errors import CheckpointError
from scepter.core.faults import ConfigError
from scepter.core.registry import EMBEDDERS
from scepter.models.embedders.phi import FrozenPhiEmbedder
from scepter.models.nova.model import NovaModel
from scepter.weights.vocabulary import byte_characters
from tests.models.nova_folders import PHI, phi, tokenizer, write
from tests.models.test_nova_model import TEXT
from tests.models.test_nova_model import build as build_nova


@pytest.fixture(scope='module')
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('phi')
    phi(root / 'text_encoder')
    tokenizer(root / 'tokenizer')
    return root


def build(files: Path, **keys) -> FrozenPhiEmbedder:
    return EMBEDDERS.build({'NAME': 'FrozenPhiEmbedder', **PHI, 'TOKENIZER_PATH': str(files / 'tokenizer'), 'MAX_LENGTH': 6, **keys})


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_states_are_those_of_transformers_whatever_stands_beside(files, dtype):
    embedder, theirs = build(files, PRETRAINED_MODEL=str(files / 'text_encoder')).to(dtype), phi(files / 'again').to(dtype)

    found = embedder(['a red fox in the snow', '', 'bird'])

    lengths = [6, 0, 1]
    assert found.mask.sum(1).tolist() == lengths and found.context.shape == (3, 6, 24) and not found.context[~found.mask].any()
    for context, ids in ((found.context[0], [1, 2, 4, 6, 7, 8]), (found.context[2, :1], [5])):
        with torch.no_grad():
            wanted = theirs.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(context, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_turns_stay_exact_where_weights_are_rounded(files):
    embedder = build(files)
    turns = embedder.transformer.rotary_emb.inv_freq.clone()

    assert torch.equal(embedder.bfloat16().transformer.rotary_emb.inv_freq, turns)


def test_a_prompt_beyond_the_limit_is_cut_and_what_was_lost_is_said_once(files, caplog):
    embedder = build(files, MAX_LENGTH=3)
    embedder.logger = logging.getLogger('a run')

    tokens = embedder.tokenize(['a red fox in snow', 'a photo of a bird'])

    assert tokens.tolist() == [[1, 2, 4], [1, 10, 11]]
    assert len(caplog.records) == 1 and 'longer than 3 tokens; this was cut: "in snow"' in caplog.text


def test_the_published_kind_of_tokenizer_frames_no_prompt(files, tmp_path):
    """CodeGen's, of bytes and merges: an empty prompt has no tokens at all, which is what makes it nothing."""
    letters, merges = list(byte_characters().values()), [('f', 'o'), ('fo', 'x'), ('Ġ', 'fox')]
    tokens = [*letters, *(a + b for a, b in merges), '<|endoftext|>']
    write(tmp_path / 'vocab.json', {token: i for i, token in enumerate(tokens)})
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(map(' '.join, merges)) + '\n', encoding='utf-8')
    write(tmp_path / 'tokenizer_config.json', {'tokenizer_class': 'CodeGenTokenizer', 'unk_token': '<|endoftext|>'})
    embedder = build(files, TOKENIZER_PATH=str(tmp_path), VOCABULARY=300)

    found = embedder.tokenize(['a fox', '', 'fox'])

    assert found.tolist() == [[letters.index('a'), 258, *[-1] * 4], [-1] * 6, [257, *[-1] * 5]]
    assert embedder(['', '']).context.shape == (2, 6, 24)


def test_weights_begin_small_and_are_not_drawn_where_a_file_brings_them(files):
    from scepter.models.unfilled import unfilled
    std = build(files).transformer.layers[0].mlp.fc1.weight.std().item()
    with unfilled({}):
        state = torch.get_rng_state()
        build(files)

    assert 0.017 < std < 0.023 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('keys, words', [({'HEADS': 5}, 'HEADS'), ({'WIDTH': 20}, 'even number of turned'),
                                         ({'TOKENIZER_PATH': None}, 'TOKENIZER_PATH')])
def test_sizes_that_make_no_heads_are_faults(files, keys, words):
    faults = [str(fault) for fault in EMBEDDERS.faults(Config({'NAME': 'FrozenPhiEmbedder', **PHI, 'TOKENIZER_PATH': 'x', **keys}), 'X')]

    assert faults and words in faults[0]


def test_heads_that_no_shape_shows_are_held_against_the_file(files):
    with pytest.raises(CheckpointError, match=r'HEADS: the config has 1, but text_encoder/config.json: num_attention_heads says 2'):
        build(files, HEADS=1, PRETRAINED_MODEL=str(files / 'text_encoder'))


def nova(files: Path, **keys) -> NovaModel:
    words = {'NAME': 'FrozenPhiEmbedder', **PHI, 'TOKENIZER_PATH': str(files / 'tokenizer'), 'MAX_LENGTH': 6}
    return build_nova({**TEXT, 'TEXT_TOKEN_DIM': 24, 'TEXT_TOKEN_LEN': 6, **keys}, COND_STAGE_MODEL=words)


def test_what_stands_behind_a_prompt_is_the_table_of_nothing(files):
    """As published: features of the prompt alone, then the rows of an empty one; an empty or dropped prompt is these rows."""
    model = nova(files)
    network = model.model

    empty, short = model.features(['', 'red fox'])
    told = network.condition([empty, short])

    assert len(empty) == 0 and short.shape == (2, 24)
    rows = torch.cat([short, network.text_embed.weight[2:6]])
    torch.testing.assert_close(told[1], network.text_embed.norm(network.text_embed.proj(rows)))
    torch.testing.assert_close(told[0], network.text_embed.norm(network.text_embed.proj(network.text_embed.weight[:6])))


def test_a_prompt_has_the_same_features_in_any_batch_and_under_autocast(files):
    model = nova(files)

    alone = model.features(['red fox'])[0]
    with torch.autocast('cpu', torch.bfloat16):
        beside = model.features(['a photo of a blue bird', 'red fox'])[1]

    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-6)


def test_features_of_another_width_than_the_network_reads_are_refused(files):
    with pytest.raises(ConfigError, match='features 24 wide, but the network reads 12'):
        nova(files, TEXT_TOKEN_DIM=12)
