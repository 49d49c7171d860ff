"""Clips as MP4: frames and words come back, at any size."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scepter.core.clips import read_comment, read_mp4
from scepter.core.config import Config
from scepter.core.images import read_settings, save_mp4, save_new


@pytest.mark.parametrize('height, width', [(64, 96), (33, 47)])
def test_frames_and_words_come_back(tmp_path: Path, height: int, width: int):
    clip = torch.linspace(0, 1, width).expand(3, 5, height, width).clone()
    clip[0] *= torch.linspace(0, 1, 5)[:, None, None]
    settings = {'prompt': 'a = b; # c \\ d\nnext "é" 日本', 'seed': 3}

    file = save_mp4(clip, tmp_path / 'a' / 'x.mp4', settings)

    assert read_settings(file) == settings
    frames = torch.from_numpy(read_mp4(file)).permute(3, 0, 1, 2) / 255
    assert frames.shape == clip.shape and (frames - clip).abs().mean() < 0.01
    assert [path.name for path in file.parent.iterdir()] == ['x.mp4']


def test_a_clip_without_words_has_none_and_what_is_no_clip_is_said(tmp_path: Path):
    file = save_mp4(torch.zeros(3, 2, 32, 32), tmp_path / 'x.mp4')
    (tmp_path / 'no.mp4').write_bytes(b'no clip')

    assert read_comment(file) == '' and read_settings(file) == {}
    with pytest.raises(OSError, match=r'no\.mp4 cannot be read'):
        read_comment(tmp_path / 'no.mp4')


def test_a_secret_stands_in_no_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv('SCEPTER_FILMED', 'canary-filmed-6')
    cfg = Config.parse('PROMPT: ${SCEPTER_FILMED}\nHF_TOKEN: canary-token-7\n')

    file = save_mp4(torch.zeros(3, 1, 32, 32), tmp_path / 'x.mp4', {'prompt': cfg.PROMPT, 'model': f'https://host/{cfg.HF_TOKEN}'})

    assert b'canary' not in file.read_bytes() and read_settings(file)['prompt'] == '${SCEPTER_FILMED}'


def test_a_clip_takes_the_next_free_name(tmp_path: Path):
    files = [save_new({'.mp4': torch.zeros(3, 2, 32, 32)}, tmp_path, 'a fox', {})[0].name for _ in range(2)]

    assert [name[:11] for name in files] == ['00000-a-fox', '00001-a-fox'] and all(name.endswith('.mp4') for name in files)
