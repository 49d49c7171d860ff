"""Config: YAML without surprises, bases, overrides, the environment, secrets, and writing it all down again."""
from __future__ import annotations

import copy
import datetime
import logging
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scepter.core.config import Config
from scepter.core.faults import ConfigError
from scepter.core.images import read_settings, save_png
from scepter.core.logger import get_logger, set_up_logging
from scepter.core.secrets import hide, is_secret


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding='utf-8')
    return file


# ------------------------------------------------------------------------------------------------ YAML's traps
@pytest.mark.parametrize(('text', 'value'), [
    ('1e-4', 1e-4), ('1E5', 1e5), ('1.e-3', 1e-3), ('.5', 0.5), ('-1e-4', -1e-4), ('1_000', 1000), ('0x1F', 31), ('.inf', math.inf),
    ('on', 'on'), ('off', 'off'), ('yes', 'yes'), ('no', 'no'), ('y', 'y'), ('010', '010'), ('0o17', '0o17'), ('1:30', '1:30'),
    ('2024-01-01', '2024-01-01'), ('2024-01-01 10:00:00', '2024-01-01 10:00:00'), ('true', True), ('False', False), ('~', None),
    ('', None), ('null', None), ('"1e-4"', '1e-4'), ("'true'", 'true'), ('1_', '1_'), ('1e', '1e'), ('me-too', 'me-too'), ('=', '='),
    ('[1e-4, on]', [1e-4, 'on']), ('{a: 1:30}', {'a': '1:30'}), ('!!str 5', '5'), ('!!float 5', 5.0), ('1e5000', math.inf),
])
def test_a_word_of_yaml_means_what_it_looks_like(text: str, value: object):
    got = Config.parse(f'V: {text}\n').V

    assert got == value and type(got) is type(Config({'V': value}).V)


def test_not_a_number_is_read_as_such():
    assert math.isnan(Config.parse('V: .nan').V)


@pytest.mark.parametrize(('text', 'words'), [
    ('A: 1\nB: 2\nA: 3\n', ['A', 'line 1', 'line 3']),
    ('S:\n  A: 1\n  A: 2\n', ['S.A', 'line 2', 'line 3']),
    ('A: !!python/object/apply:os.system [ls]\n', ['A', 'python/object/apply:os.system', 'is not taken']),
    ('A: !mine 5\n', ['!mine']),
    ('A: !!binary aGk=\n', ['binary']),
    ('? [1, 2]\n: 3\n', ['a key must be a word']),
    ('<<: 3\n', ['<< takes a mapping']),
    ('a0: &a0 [x]\n' + ''.join(f'a{i}: &a{i} [*a{i - 1}]\n' for i in range(1, 300)), ['levels deep']),
    ('A: &a [*a]\n', ['A[0]', 'this alias holds itself']),
    ('A:\n\tB: 1\n', ['not YAML', 'line 2']),
    ('A: [1\n', ['not YAML']),
    ('- 1\n- 2\n', ['a list']),
    ('just words\n', ['a single value']),
    ('', ['is empty']),
    ('# only a comment\n', ['is empty']),
    ('A: 1\n---\nB: 2\n', ['not YAML', 'another document']),
    ('[' * 5000, ['levels deep']),
    ('A: ' + '{A: ' * 100 + '1' + '}' * 100, ['levels deep']),
    ('a0: &a0 [x]\n' + ''.join(f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]\n' for i in range(1, 10)), ['100,000 values']),
    ('A: x' * 300_000, ['characters']),
])
def test_what_is_no_config_is_refused_with_the_reason(text: str, words: list[str]):
    with pytest.raises(ConfigError) as error:
        Config.parse(text)

    assert error.value.exit_code == 2
    for word in words:
        assert word in str(error.value)


def test_all_faults_of_a_text_are_shown_at_once():
    with pytest.raises(ConfigError) as error:
        Config.parse('A: 1\nA: 2\nB: ${NOT_SET_ANYWHERE}\nC: !x 1\n')

    assert [f.origin.line for f in error.value.faults] == [2, 3, 4]


def test_a_merge_key_lays_a_mapping_underneath():
    cfg = Config.parse('base: &b {X: 1, Y: 2}\nA: {<<: *b, Y: 3}\n')

    assert cfg.A == {'X': 1, 'Y': 3}


# ------------------------------------------------------------------------------------------------ files
def test_a_file_is_found_under_both_suffixes_and_without_a_byte_order_mark(tmp_path: Path):
    (tmp_path / 'a.yml').write_bytes('\ufeffA: ä\n'.encode())

    assert Config.load(tmp_path / 'a.yml') == {'A': 'ä'}


@pytest.mark.parametrize(('content', 'words'), [
    (None, 'there is no config'), (b'', 'is empty'), ('A: ä\n'.encode('latin-1'), 'is not UTF-8: byte 3 is 0xe4'),
    (b'A: \x00\n', 'not YAML'),
])
def test_a_file_that_cannot_be_read_is_a_fault_of_the_config(tmp_path: Path, content: bytes | None, words: str):
    if content is not None:
        (tmp_path / 'a.yaml').write_bytes(content)

    with pytest.raises(ConfigError, match=words):
        Config.load(tmp_path / 'a.yaml')


def test_a_misspelled_file_is_told_its_neighbour(tmp_path: Path):
    write(tmp_path, 'train.yaml', 'A: 1')

    with pytest.raises(ConfigError, match='did you mean train'):
        Config.load(tmp_path / 'trian.yaml')


def test_a_base_is_merged_underneath_and_each_value_knows_its_file(tmp_path: Path):
    write(tmp_path, 'low.yaml', 'A: {X: 1, Y: 2}\nB: [1, 2]\n')
    write(tmp_path, 'mid.yaml', '_BASE_: low.yaml\nA: {Y: 3}\n')
    cfg = Config.load(write(tmp_path, 'top.yaml', '_BASE_: [mid.yaml]\nB: [5]\n'))

    assert cfg == {'A': {'X': 1, 'Y': 3}, 'B': [5]}
    assert [Path(cfg.A.origin(k).file).name for k in 'XY'] == ['low.yaml', 'mid.yaml'] and cfg.A.origin('Y').line == 2


def test_a_part_of_another_name_replaces_the_one_below_it_whole(tmp_path: Path):
    write(tmp_path, 'low.yaml', 'M: {NAME: A, X: 1}\nN: {NAME: A, X: 1}\n')
    cfg = Config.load(write(tmp_path, 'top.yaml', '_BASE_: low.yaml\nM: {NAME: B, Y: 2}\nN: {Y: 2}\n'))

    assert cfg.M == {'NAME': 'B', 'Y': 2} and cfg.N == {'NAME': 'A', 'X': 1, 'Y': 2}


@pytest.mark.parametrize(('base', 'words'), [('top.yaml', 'goes in a circle'), ('nowhere.yaml', 'there is no file'),
                                             ('3', 'expected a file')])
def test_a_base_that_cannot_be_is_refused(tmp_path: Path, base: str, words: str):
    with pytest.raises(ConfigError, match=words):
        Config.load(write(tmp_path, 'top.yaml', f'_BASE_: {base}\nA: 1\n'))


# ------------------------------------------------------------------------------------------------ overrides
def test_overrides_reach_into_mappings_and_lists_and_make_what_is_missing(tmp_path: Path):
    file = write(tmp_path, 'a.yaml', 'A: {X: 1}\nL: [{I: 1}, {I: 2}]\nE:\n')

    cfg = Config.load(file, ['A.X=1e-3', 'L[1].I=5', 'L.0.I=4', 'A.N.M=[a, b]', 'E.Z=', 'S=a=b: c'.replace(': ', ':')])

    assert cfg == {'A': {'X': 1e-3, 'N': {'M': ['a', 'b']}}, 'L': [{'I': 4}, {'I': 5}], 'E': {'Z': None}, 'S': 'a=b:c'}
    assert str(cfg.A.origin('X')) == 'the command line (A.X=1e-3)'


@pytest.mark.parametrize(('word', 'words'), [
    ('A', 'expected KEY.PATH=VALUE'), ('=3', 'expected KEY.PATH=VALUE'), ('A.X.Y=3', 'nothing below it to set Y in'),
    ('L[7]=1', 'has 2 entries'), ('L[7].I=1', 'nothing below it'), ('A.X=[1', 'not YAML'), ('L.Z=1', 'has 2 entries'),
])
def test_an_override_that_cannot_be_says_why(tmp_path: Path, word: str, words: str):
    with pytest.raises(ConfigError) as error:
        Config.load(write(tmp_path, 'a.yaml', 'A: {X: 1}\nL: [1, 2]\n'), [word])

    assert words in str(error.value) and 'the command line' in str(error.value)


# ------------------------------------------------------------------------------------------------ the environment
def test_the_environment_is_read_also_inside_quotes_and_saved_as_it_was_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('SCEPTER_TEST', 'x/y')
    cfg = Config.parse('A: "${SCEPTER_TEST}/z"\nB: ${SCEPTER_TEST}\n')

    assert cfg == {'A': 'x/y/z', 'B': 'x/y'}
    assert '${SCEPTER_TEST}/z' in str(cfg) and 'x/y' not in str(cfg) and Config.parse(str(cfg)) == cfg


def test_a_variable_that_is_not_set_is_a_fault_and_untouched_where_nobody_asks():
    with pytest.raises(ConfigError, match='the environment has no SCEPTER_NOT_SET'):
        Config.parse('A: ${SCEPTER_NOT_SET}')
    assert Config.parse('A: ${SCEPTER_NOT_SET}', environment=False).A == '${SCEPTER_NOT_SET}'


# ------------------------------------------------------------------------------------------------ the object
def test_keys_are_attributes_and_methods_stay_methods():
    cfg = Config({'A': {'B': 1}, 'items': 2})
    cfg.C = (1, {'D': 2})

    assert cfg.A.B == 1 and cfg.C[1].D == 2 and cfg.get('X', 5) == 5 and cfg.have('A') and cfg['items'] == 2 and len(cfg.items()) == 3
    with pytest.raises(AttributeError, match='did you mean A'):
        _ = cfg.AA


def test_a_copy_shares_nothing_and_keeps_the_origins():
    cfg = Config.parse('A: {B: [1, {C: 2}]}\n', name='f')
    for twin in (cfg.copy(), copy.deepcopy(cfg), copy.copy(cfg), pickle.loads(pickle.dumps(cfg))):  # noqa: S301
        twin.A.B[1].C = 3

        assert cfg.A.B[1].C == 2 and twin.origin('A') == cfg.origin('A') and twin.A.origin('B').line == 1


leaves = (st.none() | st.booleans() | st.integers(-2 ** 70, 2 ** 70) | st.floats(allow_nan=False) | st.dates().map(datetime.date.isoformat)
          | st.sampled_from(['on', '1e-4', '010', '1:30', '~', '', ' ', '-', '=', '<<', 'null', '1_0', 'a\nb', '\n', 'a: b', '#', '!!s x'])
          | st.text(st.characters(blacklist_categories=('Cs',))).filter(lambda s: '${' not in s))
trees = st.dictionaries(st.text('ABC_1é', min_size=1, max_size=6).filter(lambda k: k != '_BASE_'),
                        st.recursive(leaves, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text('AB', min_size=1), t, max_size=3),
                                     max_leaves=8), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_what_is_written_down_is_read_back_equal(tree: dict):
    cfg = Config(tree)
    back = Config.parse(str(cfg))

    assert back == cfg and repr(back) == repr(cfg)    # repr: 1, 1.0 and True are not the same


# ------------------------------------------------------------------------------------------------ secrets
SECRETS = ['OSS_AK', 'OSS_SK', 'AK', 'SK', 'HF_TOKEN', 'TOKEN', 'SECRET', 'PASSWORD', 'ACCESS_KEY', 'ACCESS_KEY_ID', 'ACCESS_KEY_SECRET',
           'ACCESS_ID', 'API_KEY', 'APPKEY', 'PRIVATE_KEY', 'OSS_ACCESS_KEY_SECRET', 'hf_token', 'CREDENTIALS',
           'SECURITY_TOKEN', 'STS_TOKEN']


@pytest.mark.parametrize('key', SECRETS)
def test_no_canary_leaves_through_a_repr_a_safe_dump_a_log_or_a_traceback(key: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    canary = f'canary-{key}-8f3a'
    cfg = Config.parse(f'FILES: {{{key}: {canary}, LIST: [{{{key}: [{canary}]}}]}}\n')
    set_up_logging(tmp_path, debug=True)
    try:
        get_logger().info(f'the client says {canary}')
        try:
            raise RuntimeError(f'403 for {cfg.FILES[key]}')
        except RuntimeError:
            get_logger().exception('it failed')
        logged = (tmp_path / 'log.txt').read_text() + capsys.readouterr().err
    finally:
        set_up_logging(None)

    for text in (repr(cfg), repr(cfg.FILES), f'{cfg!r}', cfg.dump(is_secure=True), logged):
        assert canary not in text and '***' in text
    assert cfg.FILES[key] == canary


@pytest.mark.parametrize('key', ['TOKENIZER_PATH', 'MASK', 'MAX_TOKENS', 'KEYS', 'TASK', 'TOKENS', 'KEY', 'RISK', 'DISK', 'BREAK'])
def test_a_key_that_only_sounds_like_a_secret_is_shown(key: str):
    assert not is_secret(key)


def test_a_secret_from_the_environment_is_kept_out_of_logs_and_stays_a_reference_in_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('SCEPTER_CANARY', 'canary-from-env-77')
    cfg = Config.parse('OSS_SK: ${SCEPTER_CANARY}\n')
    record = logging.LogRecord('scepter', logging.INFO, '', 0, 'key %s', (cfg.OSS_SK,), None)

    assert 'canary' not in get_logger().handlers[0].format(record) + str(cfg) + repr(cfg) + cfg.dump(is_secure=True)
    assert '${SCEPTER_CANARY}' in cfg.dump(is_secure=True)


@pytest.mark.parametrize('url', ['https://me:canary-1@host/x', 'oss://ak:canary-1@bucket/key', 'https://h/x?a=1&Signature=canary-1&b=2',
                                 'https://h/x?OSSAccessKeyId=canary-1', 'https://h/x?X-Amz-Signature=canary-1', 'https://h/x?security-token=canary-1'])
def test_keys_inside_urls_are_hidden_and_the_rest_of_the_url_is_shown(url: str):
    cfg = Config({'DATA': [url]})
    record = logging.LogRecord('scepter', logging.INFO, '', 0, f'cannot read {url}: 403', (), None)

    for text in (repr(cfg), cfg.dump(is_secure=True), get_logger().handlers[0].format(record)):
        assert 'canary' not in text and url[:5] in text
    assert 'canary' in str(cfg)


def test_what_came_from_the_environment_is_shown_as_its_name_under_any_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                                           capsys: pytest.CaptureFixture):
    monkeypatch.setenv('SCEPTER_HIDDEN', 'canary-plain-41')
    monkeypatch.setenv('SCEPTER_SHORT', 'abc')
    cfg = Config.parse('PROMPT: ${SCEPTER_HIDDEN}\nWORD: ${SCEPTER_SHORT}\nADDRESS: "https://host/${SCEPTER_HIDDEN}/x"\n')
    set_up_logging(tmp_path, debug=True)
    try:
        get_logger().info(f'drawing {cfg.PROMPT} and abc')
        try:
            raise FileNotFoundError(2, 'no such file', str(cfg.ADDRESS))
        except FileNotFoundError:
            get_logger().exception('it failed')
        logged = (tmp_path / 'log.txt').read_text() + capsys.readouterr().err
    finally:
        set_up_logging(None)

    for text in (repr(cfg), repr(cfg.PROMPT), f'got {cfg.PROMPT!r}', cfg.dump(is_secure=True), str(cfg), logged):
        assert 'canary' not in text and '${SCEPTER_HIDDEN}' in text
    assert 'and abc' in logged and "'abc'" not in repr(cfg)    # too short to be known again in running text, but not in a config
    assert cfg.PROMPT == 'canary-plain-41' and cfg.ADDRESS == 'https://host/canary-plain-41/x'


def test_a_picture_holds_no_secret_and_no_value_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv('SCEPTER_PAINTED', 'canary-painted-3')
    cfg = Config.parse('PROMPT: ${SCEPTER_PAINTED}\nHF_TOKEN: canary-token-4\n')
    save_png(torch.zeros(3, 4, 4), tmp_path / 'a.png', {'prompt': cfg.PROMPT, 'seed': 1, 'model': f'https://host/{cfg.HF_TOKEN}'})

    assert b'canary' not in (tmp_path / 'a.png').read_bytes()
    assert read_settings(tmp_path / 'a.png')['prompt'] == '${SCEPTER_PAINTED}'


def test_a_process_that_was_handed_a_config_hides_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('SCEPTER_HANDED', 'canary-handed-52')
    handed = pickle.dumps(Config.parse('A: ${SCEPTER_HANDED}\n'))
    monkeypatch.setattr('scepter.core.secrets._environment', {})

    cfg = pickle.loads(handed)  # noqa: S301

    assert hide(f'see {cfg.A}') == 'see ${SCEPTER_HANDED}'


def test_a_value_of_the_environment_is_replaced_only_where_it_stands_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('SCEPTER_WORD', 'training')
    monkeypatch.setenv('SCEPTER_NUMBER', '20230101')
    Config.parse('A: ${SCEPTER_WORD}\nB: ${SCEPTER_NUMBER}\n')

    assert hide('constraining trainings; step 20230101') == 'constraining trainings; step 20230101'
    assert hide('/data/training/x') == '/data/${SCEPTER_WORD}/x'


# ------------------------------------------------------------------------------------------------ overrides are no files
@pytest.mark.parametrize(('word', 'value'), [('A=#1', '#1'), ('A=a #1', 'a #1'), ('A="#1"', '#1'), ("A=it's #1", "it's #1"), ('A=', None),
                                             ('A=[1, "#2"]', [1, '#2']), ('A=c#', 'c#'), ('A=3', 3)])
def test_a_word_of_the_command_line_holds_no_comment(word: str, value: object):
    cfg = Config()
    cfg.override([word])

    assert cfg.A == value
