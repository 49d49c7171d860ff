"""Clips to MP4 files, with words inside; imageio-ffmpeg brings the ffmpeg that writes and reads them (the extra `video`)."""
from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np

from scepter.core.disk import atomic
from scepter.core.registry import need

FRAME_RATE = 12    # of a clip, per second
QUALITY = 17       # of H.264, 0 (nothing is lost) .. 51; nobody sees what is lost below 18


def write_mp4(frames: np.ndarray, path: str | Path, words: str = '') -> Path:
    """Write frames [T, H, W, 3] uint8 as H.264, in place of any file that is there. words: its comment (`read_comment`).

    Raises ImportError that names the extra, and OSError where ffmpeg fails.
    """
    ffmpeg, path = need('imageio_ffmpeg', 'video'), Path(path)
    height, width = frames.shape[1:3]
    # colours at half the size are what every player knows, but there is no half of an odd side
    colours = 'yuv444p' if height % 2 or width % 2 else 'yuv420p'
    with atomic.replacing(path) as temporary:
        writer = ffmpeg.write_frames(str(temporary), (width, height), pix_fmt_out=colours, fps=FRAME_RATE, quality=None, codec='libx264',
                                     macro_block_size=1, output_params=['-crf', str(QUALITY), '-metadata', f'comment={words}',
                                                                        '-movflags', '+faststart'])
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
    return path


def read_mp4(path: str | Path) -> np.ndarray:
    """The frames of a clip, [T, H, W, 3] uint8. Raises ImportError that names the extra, and OSError for what is no clip."""
    reader = need('imageio_ffmpeg', 'video').read_frames(str(path))
    width, height = next(reader)['size']
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def read_comment(path: str | Path) -> str:
    """The words that `write_mp4` wrote; empty where there are none. Raises OSError for what is no clip."""
    exe = need('imageio_ffmpeg', 'video').get_ffmpeg_exe()
    done = subprocess.run([exe, '-v', 'error', '-i', str(path), '-f', 'ffmetadata', '-'], capture_output=True)
    if done.returncode:
        raise OSError(f'{path} cannot be read: {done.stderr.decode(errors="replace").strip()}')
    found = re.search(r'^comment=((?:\\.|[^\\\n])*)$', done.stdout.decode(), re.MULTILINE | re.DOTALL)
    return re.sub(r'\\(.)', r'\1', found[1], flags=re.DOTALL) if found else ''
