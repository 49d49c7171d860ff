"""Write a config of NOVA's own program as one of ours.

    python tools/convert_config.py nova_d48w1024_1024px.yml train.yaml
    python tools/convert_config.py nova_d48w1024_1024px.yml SOLVER.MAX_STEPS=1000 > train.yaml

What each key became is said on the way. scepter/run_train.py takes either file, and trains the same.
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
    parser.add_argument('source', metavar='SOURCE', help="the YAML that str(cfg) or NOVA's own program wrote")
    parser.add_argument('words', nargs='*', metavar='TARGET | KEY.PATH=VALUE',
                        help='the file to write (default: standard output); keys to set')
    return parser


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    import scepter.components  # noqa: F401  fills the registries
    from scepter.config import as_ours, is_published
    from scepter.core.config import Config
    from scepter.core.disk.atomic import replacing
    from scepter.core.experiment import check_experiment
    from scepter.core.faults import ConfigError
    overrides = [word for word in args.words if '=' in word]
    targets = [word for word in args.words if '=' not in word]
    if len(targets) > 1:
        raise ConfigError(f'one file is written, but {" and ".join(targets)} are named')
    if not is_published(Config.load(args.source)):
        raise ConfigError(f"{args.source} has no PIPELINE.TYPE: it is no config of NOVA's own program")
    ours, rows = as_ours(args.source, overrides)
    check_experiment(ours)
    text = ours.dump()
    print('\n'.join(map(str, rows)), file=sys.stderr)
    if not targets:
        print(text, end='')
        return
    with replacing(Path(targets[0])) as file:
        file.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    sys.exit(main())
