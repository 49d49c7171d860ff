"""Hostile, damaged and mistaken files: each is a CheckpointError that names it, and nothing in it ever runs."""
from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

import scepter.components  # noqa: F401  (registers)
import tiny
from scepter.core.disk.tensors import write_tensors
from scepter.core.errors import CheckpointError
from scepter.core.registry import EMBEDDERS, MODELS
from scepter.weights import load_pretrained, read_weights
from tiny import autoencoder

CANARY = 'SCEPTER_TEST_CANARY'


class Calls:
    """Pickles as a call of function(*arguments) when it is read."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def touch():
    return f'touch {os.environ[CANARY]}'


def archive(path: Path, data: bytes, compress: int = zipfile.ZIP_STORED, **entries: bytes) -> None:
    """What torch.save would write, with our own bytes as the pickle."""
    with zipfile.ZipFile(path, 'w', compress) as file:
        file.writestr('archive/data.pkl', data)
        file.writestr('archive/version', b'3\n')
        file.writestr('archive/byteorder', b'little')
        for name, content in entries.items():
            file.writestr(f'archive/{name.replace("__", "/")}', content)


def reduce_call(module: str, name: str, argument: str, protocol: int = 2, stack: bool = False) -> bytes:
    """The opcodes of module.name(argument), by GLOBAL or by STACK_GLOBAL."""
    start = bytes([0x80, protocol]) if protocol >= 2 else b''
    if stack:
        names = b''.join(b'\x8c' + bytes([len(w)]) + w.encode() for w in (module, name)) + b'\x93'
    else:
        names = b'c' + module.encode() + b'\n' + name.encode() + b'\n'
    return start + names + b'(X' + struct.pack('<I', len(argument)) + argument.encode() + b'tR.'


def python_code():
    return f'open({os.environ[CANARY]!r}, "w").close()'


# name -> a function that writes the file and returns its path
CORPUS = {}


def corpus(suffix='.ckpt'):
    def register(write):
        CORPUS[write.__name__] = lambda folder: (write(path := folder / f'{write.__name__}{suffix}'), path)[1]
        return write
    return register


for _protocol in range(6):
    def _os_system(path, protocol=_protocol):
        archive(path, pickle.dumps({'state_dict': Calls(os.system, touch())}, protocol=protocol))
    _os_system.__name__ = f'os_system_protocol_{_protocol}'
    corpus()(_os_system)

for _module, _name in (('builtins', 'eval'), ('builtins', 'exec'), ('__builtin__', 'eval'), ('posix', 'system'), ('nt', 'system'),
                       ('subprocess', 'getoutput'), ('pkgutil', 'resolve_name'), ('importlib', 'import_module'), ('runpy', '_run_code'),
                       ('torch.serialization', 'load'), ('torch.storage', '_load_from_bytes'), ('numpy', 'load'),
                       ('numpy.f2py.crackfortran', 'getlincoef'), ('torch.hub', 'load'), ('shutil', 'rmtree'),
                       ('_pickle', 'loads'), ('yaml', 'unsafe_load'), ('joblib', 'load')):
    for _stack in (False, True):
        def _global(path, module=_module, name=_name, stack=_stack):
            argument = touch() if name in ('system', 'getoutput') else python_code()
            archive(path, reduce_call(module, name, argument, 4 if stack else 2, stack))
        _global.__name__ = f'{_module}_{_name}_{"stack_global" if _stack else "global"}'.replace('.', '_')
        corpus()(_global)


@corpus()
def code_in_the_state_of_an_object(path):
    archive(path, b'\x80\x02cbuiltins\nobject\n)\x81}X\x01\x00\x00\x00a' + reduce_call('os', 'system', touch())[2:-1] + b'sb.')


@corpus()
def build_with_a_hostile_setstate(path):
    archive(path, b'\x80\x02ctorch\nTensor\n)\x81' + reduce_call('posix', 'system', touch())[2:-1] + b'b.')


@corpus()
def inst_opcode(path):
    archive(path, b'(V' + touch().encode() + b'\nios\nsystem\n.')


@corpus()
def nested_load_from_bytes(path):
    inner = io.BytesIO()
    torch.save(Calls(os.system, touch()), inner)
    archive(path, pickle.dumps(Calls(torch.storage._load_from_bytes, inner.getvalue())))


@corpus()
def extension_registry_opcode(path):
    archive(path, b'\x80\x02\x82\x01)R.')


@corpus('.pth')
def bare_pickle(path):
    path.write_bytes(pickle.dumps(Calls(os.system, touch())))


@corpus('.bin')
def bare_text_pickle(path):
    path.write_bytes(pickle.dumps(Calls(os.system, touch()), protocol=0))


@corpus('.pt')
def legacy_torch_file(path):
    torch.save({'a': Calls(os.system, touch())}, path, _use_new_zipfile_serialization=False)


@corpus('.pt')
def legacy_tar(path):
    with tarfile.open(path, 'w') as file:
        for name in ('sys_info', 'pickle', 'tensors', 'storages'):
            data = pickle.dumps(Calls(os.system, touch()))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


@corpus('.pt')
def torchscript(path):
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1
    torch.jit.save(torch.jit.script(Net()), str(path))


@corpus('.bin')
def numpy_object_array(path):
    with open(path, 'wb') as file:
        numpy.save(file, numpy.array([Calls(os.system, touch())], dtype=object), allow_pickle=True)


@corpus('.pt')
def numpy_archive(path):
    with open(path, 'wb') as file:
        numpy.savez(file, a=numpy.array([Calls(os.system, touch())], dtype=object))


@corpus()
def zip_bomb(path):
    archive(path, pickle.dumps({}), zipfile.ZIP_DEFLATED, data__0=b'\0' * (200 << 20))


@corpus()
def compressed_entries_with_room_to_hide(path):
    torch.save({'a': torch.zeros(64)}, path)
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)
        file.comment = b'x' * 60_000


@corpus()
def zip_whose_entries_overlap(path):
    archive(path, pickle.dumps({}), data__0=b'\0' * (1 << 20))
    raw = bytearray(path.read_bytes())
    place = raw.rfind(b'PK\x01\x02')
    entry = raw[place:raw.rfind(b'PK\x05\x06')]
    end = bytearray(raw[raw.rfind(b'PK\x05\x06'):])
    count = struct.unpack('<H', end[10:12])[0] + 300
    end[8:12] = struct.pack('<HH', count, count)
    end[12:16] = struct.pack('<I', struct.unpack('<I', end[12:16])[0] + 300 * len(entry))
    path.write_bytes(bytes(raw[:raw.rfind(b'PK\x05\x06')]) + bytes(entry) * 300 + bytes(end))


@corpus()
def memory_bomb_of_a_call(path):
    archive(path, b'\x80\x02cbuiltins\nbytearray\n(\x8a\x05\x00\x00\x00\x00\x40tR.')


@corpus()
def a_storage_that_is_not_there(path):
    torch.save({'state_dict': {'a': torch.zeros(4)}}, path)
    with zipfile.ZipFile(path) as file:
        data = next(file.read(n) for n in file.namelist() if n.endswith('data.pkl'))
    archive(path, data)


@corpus()
def half_a_download(path):
    torch.save({'a': torch.zeros(1 << 16)}, path)
    path.write_bytes(path.read_bytes()[:1 << 17])


@corpus()
def an_object_instead_of_tensors(path):
    torch.save([1, 2, 3], path)


@corpus()
def no_tensors_at_all(path):
    torch.save({'state_dict': {'a': 'text', 'b': {'c': 1}}}, path)


@corpus()
def sparse_tensors(path):
    torch.save({'a': torch.eye(3).to_sparse()}, path)


@corpus('.ckpt')
def lfs_pointer(path):
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n')


@corpus('.safetensors')
def lfs_pointer_of_safetensors(path):
    lfs_pointer(path)


@corpus('.bin')
def web_page(path):
    path.write_text('<!DOCTYPE html><html><title>404</title></html>')


@corpus('.safetensors')
def web_page_of_safetensors(path):
    web_page(path)


@corpus()
def empty(path):
    path.write_bytes(b'')


@corpus('.safetensors')
def empty_of_safetensors(path):
    path.write_bytes(b'')


@corpus('.safetensors')
def header_of_a_hundred_megabytes(path):
    with open(path, 'wb') as file:
        file.write(struct.pack('<Q', 100 << 20))
        file.truncate(101 << 20)


@corpus('.safetensors')
def header_larger_than_the_file(path):
    path.write_bytes(struct.pack('<Q', 1 << 60) + b'{}')


@corpus('.safetensors')
def deeply_nested_header(path):
    text = b'{"a":' + b'[' * 100_000
    path.write_bytes(struct.pack('<Q', len(text)) + text)


@corpus('.safetensors')
def truncated_safetensors(path):
    write_tensors(path, {'a': torch.zeros(1 << 16)})
    path.write_bytes(path.read_bytes()[:-5])


def _safetensors(path, header, data=b'\0' * 16):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)


@corpus('.safetensors')
def tensors_that_overlap(path):
    _safetensors(path, {n: {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]} for n in 'ab'})


@corpus('.safetensors')
def a_tensor_beyond_the_end(path):
    _safetensors(path, {'a': {'dtype': 'F32', 'shape': [1 << 40], 'data_offsets': [0, 1 << 42]}})


@corpus('.safetensors')
def a_shape_that_overflows(path):
    _safetensors(path, {'a': {'dtype': 'F32', 'shape': [1 << 62, 4], 'data_offsets': [0, 16]}})


@corpus('.safetensors')
def a_pickle_called_safetensors(path):
    path.write_bytes(pickle.dumps(Calls(os.system, touch()), protocol=2))


@corpus('.safetensors')
def a_zip_called_safetensors(path):
    archive(path, reduce_call('os', 'system', touch()))


@corpus('.exe')
def another_kind_of_file(path):
    path.write_bytes(b'MZ')


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    path = tmp_path / 'canary'
    monkeypatch.setenv(CANARY, str(path))
    yield path
    assert not path.exists(), 'code of the file was run'


WATCHED: list[str] = []
IS_WATCHING: list[bool] = []


def _audit(event, args):
    if IS_WATCHING and event in ('os.system', 'subprocess.Popen', 'os.exec', 'os.posix_spawn', 'exec.dynamic', 'shutil.rmtree'):
        WATCHED.append(event)


sys.addaudithook(_audit)


# what a message must say, so that the right check has refused the file
SAYS = {'zip_bomb': 'unpack to more', 'compressed_entries_with_room_to_hide': 'unpack to more',
        'zip_whose_entries_overlap': 'unpack to more', 'torchscript': 'TorchScript', 'legacy_tar': 'tar',
        'lfs_pointer': 'git lfs pull', 'lfs_pointer_of_safetensors': 'git lfs pull', 'web_page': 'web page', 'empty': 'empty',
        'web_page_of_safetensors': 'web page', 'half_a_download': 'half a download', 'builtins_eval_global': 'builtins.eval',
        'posix_system_stack_global': 'posix.system', 'bare_pickle': 'bare pickle', 'no_tensors_at_all': '0 tensors',
        'inst_opcode': 'os.system', 'sparse_tensors': 'sparse', 'another_kind_of_file': '.safetensors',
        **{f'os_system_protocol_{n}': '.system' for n in range(6)}}


@pytest.mark.parametrize('name', CORPUS)
def test_a_bad_file_is_refused_and_runs_nothing(name, tmp_path):
    path = CORPUS[name](tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WATCHED.clear()
    IS_WATCHING.append(True)
    try:
        with pytest.raises(CheckpointError) as error:
            dict(read_weights(path))
    finally:
        IS_WATCHING.clear()
    assert WATCHED == []
    assert SAYS.get(name, '') in str(error.value)
    assert 'weights_only' not in str(error.value)    # PyTorch's own text advises to switch the protection off
    assert str(path) in str(error.value) and len(str(error.value)) < 1500
    assert error.value.exit_code == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 << 10    # KiB: refused before it allocates


def test_the_corpus_is_large():
    assert len(CORPUS) >= 30


def test_sound_files_of_every_kind_still_load(tmp_path):
    tensors = {'a': torch.randn(3, 4), 'b': torch.arange(5), 'c': torch.randn(2).to(torch.bfloat16)}
    for suffix in ('.ckpt', '.pth', '.pt', '.bin'):
        torch.save({'state_dict': tensors, 'epoch': 3, 'lr': 0.1, 'name': 'x'}, tmp_path / f'm{suffix}')
    write_tensors(tmp_path / 'm.safetensors', tensors)
    for suffix in ('.ckpt', '.pth', '.pt', '.bin', '.safetensors'):
        found = read_weights(tmp_path / f'm{suffix}')
        assert set(found) == set(tensors) and all(torch.equal(found[n], t) for n, t in tensors.items())


# ---------------------------------------------------------------- weights of something else
VAE, CLIP = autoencoder(1, 2), {**tiny.CLIP, 'DEPTH': 1}


def refusal(model, path):
    with pytest.raises(CheckpointError) as error:
        load_pretrained(model, path)
    assert str(path) in str(error.value) and error.value.exit_code == 4
    return str(error.value)


def test_an_autoencoder_with_other_channels_is_refused_with_both_shapes(tmp_path):
    other = {**VAE, 'EMBED_DIM': 16, 'ENCODER': {**VAE['ENCODER'], 'Z_CHANNELS': 16}, 'DECODER': {**VAE['DECODER'], 'Z_CHANNELS': 16}}
    write_tensors(tmp_path / 'vae.safetensors', MODELS.build(other).state_dict())
    assert 'quant_conv.weight: expected [8, 8, 1, 1], found [32, 32, 1, 1]' in refusal(MODELS.build(VAE), tmp_path / 'vae.safetensors')


def test_a_text_tower_of_another_width_is_refused_with_both_shapes(tmp_path):
    write_tensors(tmp_path / 'text.safetensors', EMBEDDERS.build({**CLIP, 'WIDTH': 48}).state_dict())
    assert 'expected [49408, 32], found [49408, 48]' in refusal(EMBEDDERS.build(CLIP), tmp_path / 'text.safetensors')


def test_another_architecture_is_refused_by_name(tmp_path):
    name = 'model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight'
    write_tensors(tmp_path / 'sdxl.safetensors', {name: torch.zeros(8, 2048)})
    said = refusal(MODELS.build(VAE), tmp_path / 'sdxl.safetensors')
    assert 'Stable Diffusion XL' in said and 'missing' in said


def test_a_path_that_is_not_there_is_named(tmp_path):
    assert 'does not exist' in refusal(MODELS.build(VAE), tmp_path / 'gone.safetensors')


def test_an_empty_folder_says_what_was_expected(tmp_path):
    (tmp_path / 'm').mkdir()
    assert 'diffusion_pytorch_model.safetensors' in refusal(MODELS.build(VAE), tmp_path / 'm')


@pytest.mark.parametrize('config', ['', '[]', '{}', '{"hidden_size": "x"}', '<html>', '{"text_config": 3}', '[' * 100_000,
                                    '{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 77, '
                                    '"vocab_size": 1000000000000000, "intermediate_size": 64}'])
def test_a_text_folder_with_a_bad_config_is_refused(tmp_path, config):
    (tmp_path / 'config.json').write_text(config)
    write_tensors(tmp_path / 'model.safetensors', {'a': torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r'config.json|does not fit'):
        EMBEDDERS.build({'NAME': 'FrozenCLIPEmbedder', 'PRETRAINED_MODEL': str(tmp_path)})
