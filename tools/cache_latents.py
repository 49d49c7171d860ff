"""Turn a folder of images or clips, with captions beside them, into latents once, before training.

    python tools/cache_latents.py photos img_dataset --vae nova-d48w1024-sdxl1024/vae --size 1024
    python tools/cache_latents.py films vid_dataset --vae nova-d48w1024-osp480/vae --size 480x768 --frames 33 --every 2
    torchrun --nproc_per_node 8 tools/cache_latents.py photos img_dataset --vae .. --size 1024

    python tools/cache_latents.py photos cache/photos --vae sd15/vae --size 512 --format shards

The result is a folder of record files, which TRAIN_DATA: {NAME: LatentRecordDataset, DATA_FOLDER: img_dataset} reads, and NOVA's own
program too. Started again after whatever end it goes on where it stopped, and the result is the same to the byte; started several times
at once, also on several machines that see the folder, the processes share the work.

Captions are <name>.txt (long) and <name>.short.txt (short) beside each image, video file or folder of frames, or the "text" of a
metadata.jsonl; with --labels the class of a sample is the folder that it lies in.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

if not __package__:    # run as a file
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: this process's). Answers the exit code of docs/design.md, section 9."""
    args = command_line().parse_args(argv)
    from scepter.core.env import guarded  # from here on torch is needed
    return guarded(lambda: run(args))


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='SOURCE', help='folder of images, of video files, or of folders of frames')
    parser.add_argument('target', metavar='TARGET', help='folder of the records')
    parser.add_argument('--vae', metavar='PATH', required=True,
                        help="the autoencoder: a published vae/ folder, or a checkpoint of ours that holds one")
    parser.add_argument('--format', choices=('records', 'shards'), default='records',
                        help='records (default), or the safetensors shards that SOLVER.CACHE of a config reads (images of one --size)')
    parser.add_argument('--size', type=size_of, metavar='N | HxW',
                        help='scale and cut to so many pixels (default: cut to the next multiple that the autoencoder takes)')
    parser.add_argument('--clips', action='store_true',
                        help='SOURCE holds clips, also as folders of frames (default: where it holds video files)')
    parser.add_argument('--frames', type=int, default=33, help='frames of a clip, at most (default 33)')
    parser.add_argument('--every', type=int, default=1, help='take every n-th frame (default 1)')
    parser.add_argument('--labels', action='store_true', help='write classes, which are the names of the folders, and no captions')
    parser.add_argument('--batch', type=int, default=8, help='samples that are encoded together, and the least that a kill can cost')
    parser.add_argument('--shard', type=int, default=1024, help='samples of one file of the result (default 1024)')
    parser.add_argument('--workers', type=int, default=4, help='threads that read ahead (default 4)')
    parser.add_argument('--dtype', choices=('auto', 'float16', 'bfloat16', 'float32'), default='auto',
                        help='of the arithmetic (default float16 on CUDA, else float32); the moments are float16')
    parser.add_argument('--device', help='default: CUDA where there is some, that of LOCAL_RANK')
    return parser


def size_of(word: str) -> tuple[int, int]:
    """'512' or '480x768' (height x width)."""
    sides = [int(side) for side in word.lower().split('x')]
    if len(sides) > 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f'{word}: expected pixels, or height x width, e.g. 480x768')
    return sides[0], sides[-1]


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    import scepter.components  # noqa: F401  fills the registries
    from scepter.commands import tool
    from scepter.core.errors import CheckpointError, DataError
    from scepter.core.faults import ConfigError
    from scepter.core.logger import set_up_logging
    set_up_logging(None, 0)
    if min(args.frames, args.every, args.batch, args.shard) < 1 or args.workers < 0:
        raise ConfigError('--frames, --every, --batch and --shard are at least 1, --workers at least 0')
    if not os.path.isdir(args.source):
        raise DataError(f'{args.source} is no folder')
    caching = tool('caching')
    autoencoder = caching.open_autoencoder(args.vae, args.device)
    arithmetic = caching.arithmetic_of(args.dtype, autoencoder)
    if args.format == 'shards':
        if args.size is None or args.clips or args.labels:
            raise ConfigError('--format shards takes images of one --size; for all else tools/latents.py build --cfg fills a cache')
        print(caching.fill_shards(args.source, args.target, autoencoder, args.size, arithmetic, args.batch))
        return
    autoencoder.to(arithmetic)
    samples = caching.Samples.find(args.source, autoencoder, clips=args.clips, labels=args.labels, size=args.size, frames=args.frames,
                                   every=args.every)
    work = caching.Work(Path(args.target), samples, autoencoder, args.batch, max(1, args.shard // args.batch), args.workers)
    try:
        print(work.carry_out())
    except OSError as error:    # of the target: what a sample's file refuses is noted, and the sample left out
        where = error.filename or args.target
        raise CheckpointError(f'{where} cannot be written: {error.strerror}. What is done stays; the same command goes on') from error


if __name__ == '__main__':
    sys.exit(main())
