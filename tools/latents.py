"""Fill, check and thin out the caches of SOLVER.CACHE (docs/data.md, "Latents computed once").

    python tools/latents.py build --cfg train.yaml                 as the run would before its first step; its processes share the work
    python tools/latents.py verify --cfg train.yaml                read every picture and every row: what has changed, what is damaged
    python tools/latents.py info --cfg train.yaml                  what there is, and what the run would still compute
    python tools/latents.py prune --cfg train.yaml --unused        drop damaged files, and those that this config does not need

verify, info and prune also take a folder alone, `--folder cache/photos`, and then look at its files. Exit code 3 where anything is damaged.
"""
from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scepter.data.kept import Table
    from scepter.data.shards import Shards

if not __package__:    # run as a file
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

KINDS = ('pictures', 'texts')
STALE = 3600     # seconds after which a file that was never finished is what a kill has left


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: this process's). Answers the exit code of docs/design.md, section 9."""
    parser = command_line()
    args = parser.parse_intermixed_args(argv)
    if (args.cfg is None) == (args.folder is None) or (args.command == 'build' and args.cfg is None):
        parser.error('--cfg FILE is needed' + ('' if args.command == 'build' else ', or --folder FOLDER'))
    if args.unused and args.cfg is None:
        parser.error('what is unused only a config can tell: --cfg FILE')
    from scepter.core.env import guarded
    return guarded(lambda: COMMANDS[args.command](args))


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=COMMANDS, help='what to do')
    parser.add_argument('overrides', nargs='*', metavar='KEY.PATH=VALUE', help='set a key of the config; the last one wins')
    parser.add_argument('--cfg', metavar='FILE', help='the YAML of the run')
    parser.add_argument('--folder', metavar='FOLDER', help='a cache, without the run')
    parser.add_argument('--imports', metavar='FILE', action='append', default=[], help="components of yours, beside the config's IMPORTS")
    parser.add_argument('--launcher', choices=('spawn', 'torchrun'), default='spawn', help='build: how processes begin')
    parser.add_argument('--unused', action='store_true', help='prune: also drop files of which this config needs no row')
    return parser


def build(args: argparse.Namespace) -> None:
    from scepter.core.launch import launch
    from scepter.run_train import run_task
    cfg, imports = checked(args)
    launch(cfg, partial(run_task, imports=imports, only_cache=True), args.launcher)


def verify(args: argparse.Namespace) -> None:
    from scepter.core.errors import DataError
    faults = []
    if args.cfg is not None:
        for name, table in tables(args, anew=True).items():
            print(f'{name}: {missing(table):,} of {len(table.keys):,} are to be computed: new, or changed since')
    for name, shards in opened(args).items():
        found = shards.verify()
        print(f'{name}: {len(shards):,} rows in {len(shards.shards):,} files, {"sound" if not found else f"{len(found)} faults"}')
        faults += [f'  {fault.file}: {fault.what}' for fault in found]
    if faults:
        raise DataError('\n'.join(['damaged:', *faults, 'prune drops these files, and the next run computes their rows again']))


def info(args: argparse.Namespace) -> None:
    wanted = tables(args) if args.cfg is not None else {}
    for name, shards in opened(args).items():
        size = sum(shard.size for shard in shards.shards)
        print(f'{name}: {len(shards):,} rows in {len(shards.shards):,} files, {size / 2 ** 20:,.1f} MiB')
        for form in sorted({', '.join(f'{key} {list(f.shape)} {str(f.dtype).removeprefix("torch.")}' for key, f in shard.fields.items())
                            for shard in shards.shards}):
            print(f'  {form}')
        if name in wanted:
            print(f'  this config needs {len(wanted[name].keys):,}, of which {missing(wanted[name]):,} are to be computed')


def prune(args: argparse.Namespace) -> None:
    from scepter.data.shards import index_of, key_of
    wanted = tables(args) if args.cfg is not None else {}
    for name, shards in opened(args).items():
        doomed = {fault.file for fault in shards.verify() if fault.rows or fault.file.suffix == '.safetensors'}
        if args.unused:
            needed = {number for number in wanted[name].numbers.tolist() if number >= 0} if name in wanted else set()
            doomed |= {shard.path for shard, first in zip(shards.shards, shards.firsts.tolist())
                       if needed.isdisjoint(range(first, first + len(shard)))}
        for path in sorted(doomed):
            for file in (index_of(path), path):
                file.unlink(missing_ok=True)
            print(f'dropped {path}')
        print(f'{name}: {len(doomed):,} files dropped')
    folder = next(iter(opened(args).values())).folder.parent
    stale = [path for path in folder.rglob('.tmp-*') if time.time() - path.stat().st_mtime > STALE]
    if args.unused:
        needed = {f'{key_of(table.encoder).hex()}.safetensors' for table in wanted.values()}
        stale += [path for path in (folder / 'encoders').glob('*.safetensors') if path.name not in needed]
    for path in stale:
        path.unlink(missing_ok=True)
        print(f'dropped {path}')


COMMANDS = {'build': build, 'verify': verify, 'info': info, 'prune': prune}


# ------------------------------------------------------------------------------------------------ what the commands look at
def checked(args: argparse.Namespace) -> tuple[Any, Sequence[str]]:
    """The config, without a fault, and the user's files that it names. Raises ConfigError."""
    import scepter.components  # noqa: F401  fills the registries
    from scepter.core.config import Config
    from scepter.core.experiment import check_experiment
    from scepter.core.faults import ConfigError
    cfg = Config.load(args.cfg, args.overrides)
    imports = check_experiment(cfg, args.imports)
    if (cfg.SOLVER.get('CACHE') or {}).get('FOLDER') is None:
        raise ConfigError(f'{args.cfg} names no SOLVER.CACHE.FOLDER')
    return cfg, imports


def tables(args: argparse.Namespace, anew: bool = False) -> dict[str, Table]:
    """What the run of this config needs of its cache."""
    from scepter.core.registry import SOLVERS
    from scepter.solvers import caching
    cfg, _ = checked(args)
    pictures, texts = caching.open_alone(SOLVERS.build(cfg.SOLVER), anew)
    return {'pictures': pictures} if texts is None else {'pictures': pictures, 'texts': texts}


def opened(args: argparse.Namespace) -> dict[str, Shards]:
    """The shards of the cache. Raises DataError where there are none."""
    from scepter.core.errors import DataError
    from scepter.data.shards import Shards
    folder = Path(args.folder or checked(args)[0].SOLVER.CACHE.FOLDER)
    found = {name: Shards(folder / name) for name in KINDS if (folder / name).is_dir()}
    if not found:
        raise DataError(f'{folder} is no cache: it has no folder {" or ".join(KINDS)}')
    return found


def missing(table: Table) -> int:
    """How many rows are to be computed."""
    return sum(map(len, table.missing()))


if __name__ == '__main__':
    sys.exit(main())
