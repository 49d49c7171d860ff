"""Train, or test in batches, what a config file describes.

    python scepter/run_train.py --cfg examples/digits/diffusion.yaml SOLVER.MAX_STEPS=100
    python scepter/run_train.py --cfg my.yaml --check                # all faults at once, then stop
    python scepter/run_train.py --cfg my.yaml --explain SOLVER.MODEL.P_ZERO
    python scepter/run_train.py --template DiffusionUNet
"""
from __future__ import annotations

import os
import sys

if not __package__:    # run as a file: Python has put this folder on the path, where the project's root belongs
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.path.dirname(_here), *(p for p in sys.path if os.path.abspath(p) != _here)]

import argparse
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scepter.core.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: this process's). Answers the exit code of docs/design.md, section 9."""
    parser = command_line()
    args = parser.parse_intermixed_args(argv)
    if not args.cfg and not args.template:
        parser.error('--cfg FILE is required (or --template NAME)')
    from scepter.core.env import guarded
    return guarded(lambda: run(args))


def show(text: str) -> None:
    """Print it; who reads may have seen enough (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or Python complains once more when it ends


def command_line() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('overrides', nargs='*', metavar='KEY.PATH=VALUE', help='set a key of the config; the last one wins')
    parser.add_argument('--cfg', metavar='FILE', help='a YAML file, its address in a store, or a shipped example such as sd15.yaml')
    parser.add_argument('--launcher', choices=('spawn', 'torchrun'), default='spawn',
                        help='spawn (default): start one process per device here; torchrun: torchrun has started us')
    parser.add_argument('--learning_rate', type=float, help='the LEARNING_RATE of every optimizer')
    parser.add_argument('--max_steps', type=int, help='SOLVER.MAX_STEPS, also in place of MAX_EPOCHS')
    parser.add_argument('--imports', metavar='FILE', action='append', default=[],
                        help="a file or module with components of yours, beside the config's own IMPORTS; may be repeated")
    parser.add_argument('--force', action='store_true',
                        help='go on in a WORK_DIR whose run had another network, other samples or another optimizer')
    parser.add_argument('--debug', action='store_true', help='say more, and show the traceback of every error')
    parser.add_argument('--check', action='store_true', help='check the whole config and stop')
    parser.add_argument('--explain', metavar='KEY.PATH', help='say what a key means and where its value came from, and stop')
    parser.add_argument('--template', metavar='NAME', help="print a component's parameters as commented YAML at their place, and stop")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, without exit codes: errors are raised."""
    from scepter.core.config import Config
    from scepter.core.env import Env
    from scepter.core.experiment import carry_out_imports, check_experiment
    from scepter.core.explain import explain, needs_no_component, template
    from scepter.core.faults import check
    from scepter.core.launch import launch
    from scepter.core.logger import set_up_logging
    set_up_logging(None, int(os.environ.get('RANK', 0)) if args.launcher == 'torchrun' else 0, args.debug)
    cfg = load(args) if args.cfg else Config()
    if args.explain and not args.template and needs_no_component(args.explain):
        show(explain(cfg, args.explain))
        return
    import scepter.components  # noqa: F401  fills the registries; from here on torch is needed
    from scepter.solvers import lightning
    if args.template or args.explain:
        check(carry_out_imports(cfg, args.imports)[1], cfg.file or 'the config')
        show(template(args.template).rstrip() if args.template else explain(cfg, args.explain))
        return
    imports = check_experiment(cfg, args.imports)
    if Env(cfg.get('ENV', {})).USE_PL:
        lightning.require()
    if args.check:
        print(f'{cfg.file}: no faults')
        return
    launch(cfg, partial(run_task, imports=imports, force=args.force), args.launcher, args.debug)


def load(args: argparse.Namespace) -> Config:
    """The config with the command line on top of it; one of NOVA's own program as ours."""
    from scepter.config import as_ours, is_published
    from scepter.core.config import Config
    from scepter.core.experiment import load_config
    from scepter.core.faults import Origin
    from scepter.core.logger import get_logger
    cfg = load_config(args.cfg, args.overrides)
    if is_published(cfg):
        cfg, rows = as_ours(args.cfg, args.overrides)
        get_logger().info(f'{args.cfg} is a config of NOVA\'s own program. What its keys became (convert_config.py writes it down):\n  '
                          + '\n  '.join(map(str, rows)))
    solver = cfg.get('SOLVER')
    if not isinstance(solver, Config):
        return cfg    # the check says what is missing
    if args.max_steps is not None:
        solver.pop('MAX_EPOCHS', None)    # the other way to say it
        solver.put('MAX_STEPS', args.max_steps, Origin(f'the command line (--max_steps {args.max_steps})'))
    optimizer = solver.get('OPTIMIZER')
    if args.learning_rate is not None and isinstance(optimizer, Config):
        for node in [optimizer] if 'NAME' in optimizer else optimizer.values():    # one, or a map of named ones
            if isinstance(node, Config):
                key = 'LR' if 'LR' in node else 'LEARNING_RATE'
                node.put(key, args.learning_rate, Origin(f'the command line (--learning_rate {args.learning_rate})'))
    return cfg


def run_task(cfg: Config, imports: Sequence[str] = (), force: bool = False, only_cache: bool = False) -> None:
    """What each process of a run does. A spawned one begins with empty registries, so it fills its own.

    only_cache: fill the cache that SOLVER.CACHE names, and stop.
    """
    import scepter.components  # noqa: F401
    from scepter.core.experiment import import_user_code
    from scepter.core.logger import get_logger
    from scepter.core.registry import SOLVERS
    from scepter.solvers import caching
    for word in imports:
        import_user_code(word)
    solver = SOLVERS.build(cfg.SOLVER, logger=get_logger())
    if only_cache:
        caching.fill_alone(solver)
        return
    solver.experiment, solver.imports = cfg, imports    # a checkpoint's config.yaml holds all of it
    solver.is_forced = force
    solver.set_up()
    solver.solve()


if __name__ == '__main__':
    from scepter.run_train import main  # under its own name, so that other processes find run_task
    sys.exit(main())
