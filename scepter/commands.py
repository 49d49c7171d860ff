"""The one command that an installation brings: scepter train | draw | export | convert | cache | latents | doctor | config | ...

Each is a file that also runs by itself; `scepter draw --help` is `python scepter/run_inference.py --help`.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    'train': ('scepter.run_train', 'train, or test in batches, what a config file describes'),
    'draw': ('scepter.run_inference', 'draw what a prompt asks for'),
    'export': ('scepter.tools.export', 'write what was trained as a file that other programs open'),
    'convert': ('scepter.tools.convert_weights', 'turn published weights from one form into another'),
    'cache': ('scepter.tools.cache_latents', 'turn images or clips into latents once, before training'),
    'latents': ('scepter.tools.latents', 'fill, check and thin out the cache of a run (SOLVER.CACHE)'),
    'doctor': ('scepter.tools.data_doctor', 'read all data once, and say what is wrong with it'),
    'config': ('scepter.tools.convert_config', "write a config of NOVA's own program as one of ours"),
    'checkpoint': ('scepter.tools.checkpoint', 'look at checkpoints, and make one file of one'),
    'docs': ('scepter.tools.make_docs', 'the reference of components, or a JSON Schema for editors'),
}


def main(argv: Sequence[str] | None = None) -> int:
    """`scepter COMMAND ...` (default: this process's words). Answers the exit code of docs/design.md, section 9."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ('-h', '--help'):
        print('usage: scepter COMMAND ...     scepter COMMAND --help says more\n')
        print('\n'.join(f'  {name:<12}{about}' for name, (_, about) in COMMANDS.items()))
        return 0 if words else 2
    if words[0] in ('-V', '--version'):
        import scepter
        print(scepter.__version__)
        return 0
    if words[0] not in COMMANDS:
        print(f'scepter: no command {words[0]!r}; there is {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    sys.argv[0] = f'scepter {words[0]}'    # what argparse calls the program
    return module(words[0]).main(words[1:])


def module(command: str) -> types.ModuleType:
    """The module of a command."""
    name = COMMANDS[command][0]
    return tool(name.removeprefix('scepter.tools.')) if name.startswith('scepter.tools.') else importlib.import_module(name)


def tool(name: str) -> types.ModuleType:
    """tools/<name>.py: inside the package where it is installed, beside it in a checkout."""
    if 'scepter.tools' not in sys.modules and importlib.util.find_spec('scepter.tools') is None:
        tools = types.ModuleType('scepter.tools')
        tools.__path__ = [str(Path(__file__).resolve().parents[1] / 'tools')]
        sys.modules['scepter.tools'] = tools
    return importlib.import_module(f'scepter.tools.{name}')


if __name__ == '__main__':
    sys.exit(main())
