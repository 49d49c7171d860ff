"""Clips: from a video file, or a folder of frames, to RGB pictures."""
from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from scepter.core.errors import DataError
from scepter.core.registry import need
from scepter.data.captions import CAPTION_SUFFIXES
from scepter.data.folders import METADATA_FILES, Found, find_records
from scepter.data.images import IMAGE_SUFFIXES, UnreadableError, load_image

VIDEO_SUFFIXES = ('.mp4', '.m4v', '.webm', '.mov', '.mkv', '.avi')


def find_clips(folder: str, shown: str) -> list[Found]:
    """The video files and the folders of frames below a folder, each with its caption (<name>.txt beside it); or what its sheet lists.

    shown: what messages call the folder. Raises DataError where there are none.
    """
    if any(os.path.isfile(os.path.join(folder, name)) for name in METADATA_FILES):
        return find_records(folder, shown)
    clips: list[Path] = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        here = Path(root).relative_to(folder)
        clips += [here / name for name in files if name.lower().endswith(VIDEO_SUFFIXES)]
        if here.parts and any(name.lower().endswith(IMAGE_SUFFIXES) for name in files):
            clips.append(here)
    if not clips:
        raise DataError(f'no clips in {shown}: looked for {", ".join(METADATA_FILES)}, for files that end in {" ".join(VIDEO_SUFFIXES)}, '
                        'and for folders of frames')
    beside = ((clip, (clip.with_name(_stem(clip) + suffix) for suffix in CAPTION_SUFFIXES)) for clip in sorted(clips))
    return [(clip.as_posix(), next((text for text in texts if os.path.isfile(os.path.join(folder, text))), None)) for clip, texts in beside]


def read_clip(path: str | os.PathLike[str], count: int, every: int = 1) -> list[Image.Image]:
    """Frames 0, every, 2 * every, ... of a video file, or of a folder whose frames have numbers in their names: `count`, or what there is.

    Raises UnreadableError for what cannot be decoded, or has frames of several sizes.
    """
    frames = _frames_of_folder(Path(path), count, every) if os.path.isdir(path) else _frames_of_file(str(path), count, every)
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise UnreadableError(f'its frames have {len(sizes)} sizes' if frames else 'it holds no frame')
    return frames


def _frames_of_folder(folder: Path, count: int, every: int) -> list[Image.Image]:
    names = sorted((name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES)), key=_natural)
    return [load_image(str(folder / name)) for name in names[::every][:count]]


def _frames_of_file(path: str, count: int, every: int) -> list[Image.Image]:
    reader = need('imageio_ffmpeg', 'video').read_frames(path, pix_fmt='rgb24')
    with contextlib.closing(reader):
        try:
            width, height = next(reader)['size']
            frames = []
            for number, data in enumerate(reader):
                if number % every == 0:
                    frames.append(Image.fromarray(np.frombuffer(data, np.uint8).reshape(height, width, 3)))
                if len(frames) == count:
                    break
        except (OSError, RuntimeError, ValueError, StopIteration) as error:    # what ffmpeg says of a file that it cannot read
            lines = str(error).strip().splitlines() or ['ffmpeg gives no frame']
            raise UnreadableError(lines[-1]) from error
    return frames


def _stem(clip: Path) -> str:
    return clip.stem if clip.name.lower().endswith(VIDEO_SUFFIXES) else clip.name


def _natural(name: str) -> list[int | str]:
    """frame_10 comes after frame_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]
