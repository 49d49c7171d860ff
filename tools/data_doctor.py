"""Read all data of a config once, and say what is wrong with it.

    python tools/data_doctor.py --cfg train.yaml --out checkup
    python tools/data_doctor.py --cfg train.yaml --of EVAL_DATA --quarantine unreadable checksum tiny

Looks for samples that cannot be read, whose bytes are not those of CHECKSUMS, that come twice or nearly so, that are tiny, that have no
words or more than the text encoder reads, and for buckets that cannot fill a step. Writes report.html (a sheet of small pictures, one
file), report.json and quarantine.jsonl, a list that training passes over: `QUARANTINE: checkup/quarantine.jsonl` in TRAIN_DATA.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:    # run as a file
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: this process's). Answers the exit code of docs/design.md, section 9."""
    args = command_line().parse_intermixed_args(argv)
    from scepter.core.env import guarded
    return guarded(lambda: run(args))


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('overrides', nargs='*', metavar='KEY.PATH=VALUE', help='set a key of the config; the last one wins')
    parser.add_argument('--cfg', metavar='FILE', required=True, help='the YAML of the run')
    parser.add_argument('--of', metavar='KEY', default='TRAIN_DATA', help='which data: TRAIN_DATA (default), EVAL_DATA, TEST_DATA')
    parser.add_argument('--out', metavar='FOLDER', default='checkup', help='where the report goes (default checkup)')
    parser.add_argument('--quarantine', nargs='+', metavar='KIND', help='what the list of quarantine.jsonl holds (default: unreadable, '
                        'checksum, failing, and all but the first of duplicates)')
    parser.add_argument('--imports', metavar='FILE', action='append', default=[], help="components of yours, beside the config's IMPORTS")
    return parser


def run(args: argparse.Namespace) -> None:
    import scepter.components  # noqa: F401  fills the registries
    from scepter.core.config import Config
    from scepter.core.env import we
    from scepter.core.experiment import check_experiment
    from scepter.core.faults import ConfigError, did_you_mean
    from scepter.core.logger import get_logger, set_up_logging
    from scepter.core.registry import DATASETS
    from scepter.data import doctor
    set_up_logging(None, 0, False)
    if unknown := [kind for kind in args.quarantine or () if kind not in doctor.KINDS]:
        raise ConfigError(f'--quarantine {unknown[0]}: no such complaint{did_you_mean(unknown[0], doctor.KINDS)}')
    cfg = Config.load(args.cfg, args.overrides)
    check_experiment(cfg, args.imports)
    if cfg.SOLVER.get(args.of) is None:
        raise ConfigError(f'{args.cfg} has no SOLVER.{args.of} to look at')
    dataset = DATASETS.build(cfg.SOLVER[args.of], logger=get_logger())
    step = cfg.SOLVER.get('GLOBAL_BATCH_SIZE') or dataset.BATCH_SIZE * cfg.SOLVER.get('ACCU_STEP', 1) * we.world_size
    found = doctor.examine(dataset, step, cut_by(cfg))
    folder = Path(args.out)
    doctor.write(found, dataset, folder, args.quarantine or doctor.QUARANTINED)
    print(f'{found.samples:,} samples')
    for kind, complaints in found.complaints.items():
        print(f'  {kind:<15}{len(complaints):>9,}   e.g. {complaints[0].name}{f": {complaints[0].reason}" if complaints[0].reason else ""}')
    print(f'{folder / "report.html"}\n{folder / "report.json"}\n{folder / "quarantine.jsonl"}: '
          f'{len(found.quarantine(args.quarantine or doctor.QUARANTINED)):,} samples; name it as QUARANTINE in {args.of}')


def cut_by(cfg: Any) -> Callable[[str], str] | None:
    """What the text encoder of a config would not read of a prompt; None, with a word, where there is none or it cannot be built."""
    import torch

    from scepter.core.logger import get_logger
    from scepter.core.registry import EMBEDDERS
    node = cfg.SOLVER.MODEL.get('COND_STAGE_MODEL')
    if node is None:
        return None
    ear = Ear()
    try:
        with torch.device('meta'):    # the tokenizer is what is asked; its network may be as large as it likes
            embedder = EMBEDDERS.build(node, logger=ear)
    except Exception as error:    # whatever a text encoder of any kind needs, the data can be looked at without
        get_logger().warning(f'captions are not held against the text encoder, which cannot be built here: {type(error).__name__}: {error}')
        return None
    if embedder.reads != 'prompt':
        return None

    def cut(prompt: str) -> str:
        ear.heard = ''
        for part in embedder.modules():
            if hasattr(part, 'has_warned_of_cut'):
                part.has_warned_of_cut = False
        embedder.tokenize([prompt])
        return ear.heard

    return cut


class Ear:
    """A logger that keeps what a text encoder says it has cut."""

    heard = ''

    def warning(self, text: str, *args: Any) -> None:
        self.heard = text.partition('"')[2].rpartition('"')[0] or text

    def info(self, text: str, *args: Any) -> None:
        pass


if __name__ == '__main__':
    sys.exit(main())
