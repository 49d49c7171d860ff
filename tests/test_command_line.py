"""run_train's command line: what it checks, explains and starts, and what it says where it cannot."""
from __future__ import annotations

import itertools
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import scepter.components  # noqa: F401
from scepter import run_inference, run_train
from scepter.core.schema import registries, schema_of
from scepter.solvers.optim import OptimizerPlace

ROOT = Path(__file__).resolve().parents[1]
numbers = itertools.count()

SOLVER = '''
import json, os
from pathlib import Path
from scepter.core.env import we
from scepter.core.registry import OPTIMIZERS, SOLVERS
from scepter.core.schema import Component, param, part


@SOLVERS.register_class()
class {name}(Component):
    """Writes down what it was given."""
    WORK_DIR: str = param(doc='Where to write.')
    MAX_STEPS: int = param(10, 'How many steps.')
    FAIL: bool = param(False, 'Whether to fail.')
    OPTIMIZER: dict | None = part(OPTIMIZERS, 'One, or a map of named ones.', default=None, place=Component)

    def set_up(self):
        if self.FAIL:
            from scepter.core.errors import DataError
            raise DataError('as asked')

    def solve(self):
        seen = {{'rank': we.rank, 'world': we.world_size, 'debug': we.debug, 'cfg': str(self.experiment), 'module': type(self).__module__}}
        Path(self.WORK_DIR, f'rank{{we.rank}}.json').write_text(json.dumps(seen))
'''


@pytest.fixture
def experiment(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """experiment('KEY: VALUE ...') -> a config file whose solver is the user's own, in a file beside it."""
    entries = [(r, dict(r._entries)) for r in registries()]
    path = list(sys.path)

    def write(more: str = '', top: str = '', imports: str | None = None) -> Path:
        name = f'Solver{next(numbers)}'
        (tmp_path / f'{name.lower()}.py').write_text(SOLVER.format(name=name), encoding='utf-8')
        file = tmp_path / 'train.yaml'
        lines = [f'IMPORTS: [{name.lower() + ".py" if imports is None else imports}]', 'ENV: {DEVICE: cpu, NPROC: 1}', *top.splitlines(),
                 'SOLVER:', f'  NAME: {name}', f'  WORK_DIR: {tmp_path}', *(f'  {line}' for line in more.splitlines())]
        file.write_text('\n'.join(lines) + '\n', encoding='utf-8')
        return file

    yield write
    sys.path[:] = path
    for registry, before in entries:
        registry._entries.clear()
        registry._entries.update(before)


def main(*words: object) -> int:
    return run_train.main([str(w) for w in words])


def result(file: Path, rank: int = 0) -> dict:
    return json.loads((file.parent / f'rank{rank}.json').read_text())


# ------------------------------------------------------------------------------------------------ running
def test_a_users_own_solver_runs_with_the_whole_config_in_hand(experiment: Callable[..., Path], capsys: pytest.CaptureFixture):
    file = experiment()

    assert main('--cfg', file, 'ENV.SEED=7', '--max_steps', '3', 'SOLVER.FAIL=off') == 0
    seen = result(file)
    assert 'SEED: 7' in seen['cfg'] and 'MAX_STEPS: 3' in seen['cfg'] and 'IMPORTS: [' in seen['cfg'] and not seen['debug']
    assert re.search(r'imported .*solver\d+\.py', capsys.readouterr().err)


@pytest.mark.parametrize(('node', 'rates'), [
    ('{NAME: AdamW}', ['LEARNING_RATE: 0.5']), ('{NAME: AdamW, LR: 0.1}', ['LR: 0.5']),
    ('{a: {NAME: AdamW, LR: 0.1}, b: {NAME: SGD, LEARNING_RATE: 1}}', ['LR: 0.5', 'LEARNING_RATE: 0.5']),
])
def test_learning_rate_sets_that_of_every_optimizer(experiment: Callable[..., Path], node: str, rates: list[str]):
    file = experiment(f'OPTIMIZER: {node}')

    assert main('--cfg', file, '--learning_rate', '0.5') == 0
    assert re.findall(r'(?:LR|LEARNING_RATE): \S+', result(file)['cfg']) == rates


def test_a_deliberate_failure_is_its_code_and_a_message_and_debug_shows_where(experiment: Callable[..., Path],
                                                                              capsys: pytest.CaptureFixture):
    file = experiment('FAIL: true')

    assert main('--cfg', file) == 3
    quiet = capsys.readouterr().err
    assert main('--cfg', file, '--debug') == 3
    assert 'as asked' in quiet and 'Traceback' not in quiet and 'Traceback' in capsys.readouterr().err


def test_every_spawned_process_imports_the_users_files_and_a_script_may_be_run_from_anywhere(experiment: Callable[..., Path]):
    file = experiment()
    (file.parent / 'json.py').write_text('raise RuntimeError("a file in the working folder was imported")')
    environment = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'PYTHONPATH')}
    done = subprocess.run([sys.executable, '-W', 'ignore', ROOT / 'scepter' / 'run_train.py', '--cfg', 'train.yaml', 'ENV.NPROC=2'],
                          cwd=file.parent, env=environment, capture_output=True, text=True, timeout=200)

    assert done.returncode == 0, done.stderr
    assert [result(file, rank)['world'] for rank in (0, 1)] == [2, 2] and result(file, 1)['module'].startswith('solver')


# ------------------------------------------------------------------------------------------------ checking
def test_check_says_so_and_builds_nothing(experiment: Callable[..., Path], capsys: pytest.CaptureFixture):
    file = experiment('FAIL: true')

    assert main('--cfg', file, '--check') == 0
    assert capsys.readouterr().out == f'{file}: no faults\n' and not list(file.parent.glob('rank*'))


def test_all_faults_are_shown_at_once_with_line_path_and_suggestion(experiment: Callable[..., Path], capsys: pytest.CaptureFixture):
    file = experiment('MAX_STEPZ: 3\nOPTIMIZER: {NAME: Adamw}', top='SOVLER: {}\nENV2: 1')
    file.write_text(file.read_text().replace('DEVICE: cpu', 'DEVICE: gpu'))

    assert main('--cfg', file, 'SOLVER.FAIL=3', '--max_steps', '4') == 2
    assert not list(file.parent.glob('rank*'))
    lines = capsys.readouterr().err.split('6 faults in')[1].splitlines()
    assert [' '.join(line.split()) for line in lines[1:]] == [
        "line 2 ENV.DEVICE: expected one of auto, cuda, mps, cpu, got 'gpu'",
        'line 3 SOVLER: no such parameter; did you mean SOLVER?',
        'line 4 ENV2: no such parameter; did you mean ENV?',
        'line 8 SOLVER.MAX_STEPZ: no such parameter; did you mean MAX_STEPS?',
        'line 9 SOLVER.OPTIMIZER.NAME: OPTIMIZERS has no Adamw; did you mean AdamW? (is its file listed under IMPORTS?)',
        'the command line (SOLVER.FAIL=3) SOLVER.FAIL: expected bool, got 3']


@pytest.mark.parametrize('text', ['ENV: {SEED: 1}\n', 'SOLVER: 3\n', 'SOLVER: {WORK_DIR: x}\n', 'SOLVER: [1]\n', 'SOLVER:\n', '',
                                  'SOLVER: {SAMPLE_ARGS: 3}\n'])
def test_a_config_without_a_solver_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture):
    (tmp_path / 'a.yaml').write_text(text)

    for door in (run_train, run_inference):
        assert door.main(['--cfg', str(tmp_path / 'a.yaml'), *['--prompt', 'x'] * (door is run_inference)]) == 2
        said = capsys.readouterr().err
        assert 'SOLVER' in said and 'Traceback' not in said


@pytest.mark.parametrize('words', [[], ['--check'], ['--cfg'], ['--cfg', 'x', '--launcher', 'mpi'], ['--cfg', 'x', '--max_steps', 'many'],
                                   ['--cfg', 'x', '--no-such-flag']])
def test_a_wrong_command_line_is_exit_code_two(words: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        main(*words)

    assert end.value.code == 2 and 'usage:' in capsys.readouterr().err


def test_a_config_that_is_not_there_is_exit_code_two(capsys: pytest.CaptureFixture):
    assert main('--cfg', '/nowhere/train.yaml') == 2
    assert 'there is no config /nowhere/train.yaml' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the user's files
@pytest.mark.parametrize(('imports', 'content', 'words'), [
    ('nowhere.py', None, 'ImportError: there is no file'),
    ('no_such_module_at_all', None, "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    ('two words.py', '', 'is no module name'),
    ('random.py', '', 'the name random is taken by'),
    ('sys.py', '', 'the name sys is taken by Python'),
    ('broken{}.py', 'x = 1\nif\n', 'SyntaxError: invalid syntax'),
    ('raising{}.py', '\n\nraise ValueError("my own")\n', 'ValueError: my own (line 3)'),
])
def test_a_file_that_cannot_be_imported_is_a_fault_that_says_why(experiment: Callable[..., Path], imports: str, content: str | None,
                                                                 words: str, capsys: pytest.CaptureFixture):
    imports = imports.format(next(numbers))
    file = experiment(imports=imports)
    if content is not None:
        (file.parent / imports).write_text(content)

    assert main('--cfg', file, '--check') == 2
    error = capsys.readouterr().err
    assert words in error and 'line 1' in error and 'IMPORTS' in error and 'Traceback' not in error


def test_imports_of_a_base_are_found_beside_the_base(experiment: Callable[..., Path]):
    file = experiment()
    (file.parent / 'below').mkdir()
    (file.parent / 'below' / 'top.yaml').write_text('_BASE_: ../train.yaml\nENV: {SEED: 3}\n')

    assert main('--cfg', file.parent / 'below' / 'top.yaml', '--check') == 0


def test_imports_of_a_checkpoint_are_not_carried_out_unless_named_on_the_command_line(experiment: Callable[..., Path],
                                                                                      capsys: pytest.CaptureFixture):
    file = experiment()
    (file.parent / 'MANIFEST.json').write_text('{}')
    source, = file.parent.glob('solver*.py')

    assert main('--cfg', file, '--check') == 2
    assert 'IMPORTS: not carried out, since they stand in a checkpoint or came from an address: name the files' in capsys.readouterr().err
    assert source.stem not in sys.modules
    assert main('--cfg', file, '--check', '--imports', source) == 0


@pytest.mark.parametrize('way', ['a base', 'a base of a base', 'a base that the checkpoint names', 'a link into it', 'a list of bases'])
def test_imports_that_a_checkpoint_brings_by_any_way_are_not_carried_out(way: str, experiment: Callable[..., Path],
                                                                         tmp_path_factory: pytest.TempPathFactory,
                                                                         capsys: pytest.CaptureFixture):
    inner = experiment()
    checkpoint, home = inner.parent, tmp_path_factory.mktemp('home')
    source, = checkpoint.glob('solver*.py')
    (checkpoint / 'MANIFEST.json').write_text('{}')
    mine = home / 'mine.yaml'
    if way == 'a base':
        mine.write_text(f'_BASE_: {inner}\n')
    elif way == 'a base of a base':
        (home / 'middle.yaml').write_text(f'_BASE_: {inner}\n')
        mine.write_text('_BASE_: middle.yaml\n')
    elif way == 'a base that the checkpoint names':    # it lies outside: a stranger's archive may hold both
        outside = home / 'outside.yaml'
        outside.write_text(inner.read_text().replace(source.name, str(source)))
        inner.write_text(f'_BASE_: {outside}\n')
        mine.write_text(f'_BASE_: {inner}\n')
    elif way == 'a link into it':
        mine.symlink_to(inner)
    else:
        (home / 'other.yaml').write_text('ENV: {SEED: 2}\n')
        mine.write_text(f'_BASE_: [{inner}, other.yaml]\n')

    assert main('--cfg', mine, '--check') == 2
    assert 'IMPORTS: not carried out, since they stand in a checkpoint' in capsys.readouterr().err
    assert source.stem not in sys.modules
    assert main('--cfg', mine, '--check', f'IMPORTS=[{source}]') == 0    # the user's own word


def test_a_value_of_the_environment_is_not_echoed_by_a_fault(experiment: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture):
    monkeypatch.setenv('SCEPTER_SHY', 'pw-7')
    file = experiment()

    assert main('--cfg', file, '--check', 'SOLVER.MAX_STEPS=${SCEPTER_SHY}', 'SOLVER.OPTIMIZER={NAME: "${SCEPTER_SHY}"}') == 2
    said = capsys.readouterr().err
    assert 'pw-7' not in said and "got '${SCEPTER_SHY}'" in said
    assert main('--cfg', file, '--explain', 'SOLVER.WORK_DIR', 'SOLVER.WORK_DIR=${SCEPTER_SHY}') == 0
    assert 'pw-7' not in ''.join(capsys.readouterr())


# ------------------------------------------------------------------------------------------------ explaining
@pytest.mark.parametrize(('path', 'words'), [
    ('SOLVER.MAX_STEPS', ['How many steps.', 'type     int', 'default  10', 'value    4', 'train.yaml, line 6']),
    ('SOLVER.FAIL', ['value    false', 'from     the default']),
    ('SOLVER.WORK_DIR', ['default  none: it is required']),
    ('ENV.SEED', ['value    9', 'from     the command line (ENV.SEED=9)']),
    ('ENV', ['type     Env', 'keys     SEED, DEVICE']),
    ('SOLVER', ['choices  BaseSolver, LatentDiffusionSolver, Solver']),
    ('SOLVER.NAME', ['Which of SOLVERS this is']),
    ('SOLVER.OPTIMIZER.BETAS', ['an argument of torch.optim.adamw.AdamW', 'default  [0.9, 0.999]']),
    ('SOLVER.OPTIMIZER.LEARNING_RATE', ['an argument of torch', 'value    0.1']),
    ('SOLVER.OPTIMIZER', ['choices', 'AdamW', 'a map of named ones']),
    ('IMPORTS[0]', ['value    solver']),
])
def test_explain_says_what_a_key_means_and_where_its_value_came_from(experiment: Callable[..., Path], path: str, words: list[str],
                                                                     capsys: pytest.CaptureFixture):
    file = experiment('MAX_STEPS: 4\nOPTIMIZER: {NAME: AdamW, LEARNING_RATE: 0.1}')

    assert main('--cfg', file, 'ENV.SEED=9', '--explain', path) == 0
    text = capsys.readouterr().out
    assert text.startswith(path) and all(word in text for word in words), text


@pytest.mark.parametrize(('path', 'words'), [
    ('SOLVER.MAX_STEPZ', 'SOLVER.MAX_STEPZ: no such parameter; did you mean MAX_STEPS?'), ('SOLVR', 'did you mean SOLVER?'),
    ('SOLVER.MAX_STEPS.DEEP', 'there are no keys below SOLVER.MAX_STEPS'), ('IMPORTS[5]', 'has 1 entries'),
    ('...', 'takes the path of a key'), ('SOLVER.OPTIMIZER.LR', 'nothing is set here'),
])
def test_explain_of_what_is_not_there_names_the_nearest(experiment: Callable[..., Path], path: str, words: str,
                                                        capsys: pytest.CaptureFixture):
    assert main('--cfg', experiment(), '--explain', path) == 2
    assert words in capsys.readouterr().err


def test_explain_shows_no_secret(experiment: Callable[..., Path], capsys: pytest.CaptureFixture):
    file = experiment(top='HF_TOKEN: canary-99')

    assert main('--cfg', file, '--explain', 'HF_TOKEN') == 0
    assert 'canary' not in ''.join(capsys.readouterr())


@pytest.mark.parametrize(('name', 'place'), [
    ('DiffusionUNet', 'SOLVER.MODEL.DIFFUSION_MODEL'), ('AdamW', 'SOLVER.OPTIMIZER'), ('scaled_linear', 'SOLVER.MODEL.SCHEDULE_ARGS'),
    ('CheckpointHook', 'SOLVER.TRAIN_HOOKS[0]'), ('Cosine', 'SOLVER.LR_SCHEDULER'), ('Encoder', 'SOLVER.MODEL.ENCODER'),
    ('RecordedCrop', 'SOLVER.TRAIN_DATA.TRANSFORMS[0]'), ('LatentDiffusionSolver', 'SOLVER'),
    ('AutoencoderKL', 'SOLVER.MODEL'), ('ImageTextFolderDataset', 'SOLVER.TRAIN_DATA')])
def test_a_template_stands_at_its_place_and_loads_and_lacks_only_what_is_marked(name: str, place: str, capsys: pytest.CaptureFixture):
    from scepter.core.config import Config, split_path
    assert main('--template', name) == 0
    text = capsys.readouterr().out
    node = Config.parse(text)
    for step in split_path(place):
        node = node[int(step) if step.isdigit() else step]
    owner = next(r for r in registries() if name in r)

    found = list(owner.faults(node, '', beside=schema_of(OptimizerPlace) if name == 'AdamW' else None))
    marked = text.count(':    # required')
    assert node.NAME == name and bool(found) == bool(marked) and len(found) <= marked    # null is a value of some
    assert all(f.message.startswith('required, but without a value') or 'with a NAME, got' in f.message for f in found)


def test_a_template_writes_out_sections_and_default_parts(capsys: pytest.CaptureFixture):
    assert main('--template', 'LatentDiffusionSolver') == 0
    text = capsys.readouterr().out
    assert '  SAMPLE_ARGS:\n    # The sampler: ' in text
    assert re.search(r'  MODEL:\n    NAME:    # required: one of (\w+, )*AutoencoderKL', text)

    assert main('--template', 'AutoencoderKL') == 0
    assert '    REC_LOSS:\n      NAME: ReconstructLoss\n' in (text := capsys.readouterr().out) and '      LOSS_TYPE: l1\n' in text


def test_who_reads_a_template_may_stop_before_its_end():
    line = f'{sys.executable} scepter/run_train.py --template FrozenCLIPEmbedder | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', line], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')


def test_template_of_an_unknown_name_tells_the_nearest(capsys: pytest.CaptureFixture):
    assert main('--template', 'DiffusionUnet') == 2
    assert 'did you mean DiffusionUNet?' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ how quick
def seconds(*words: str, code: int = 0) -> tuple[float, str]:
    """Processor time of a fresh Python, which other work on the machine does not change, and what it wrote to stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr


@pytest.mark.parametrize(('words', 'code'), [
    (['--help'], 0), (['--cfg', 'sd15.yaml', '--explain', 'ENV.SEED'], 0), (['--cfg', 'sd51.yaml'], 2), (['--cfg', 'TWICE', '--check'], 2)],
    ids=['help', 'a key of ENV', 'no such file', 'a key that stands twice'])
def test_what_no_component_is_needed_for_needs_no_torch_and_less_than_a_second(words: list[str], code: int, tmp_path: Path):
    (tmp_path / 'twice.yaml').write_text('SOLVER: {NAME: BaseSolver}\nSOLVER: {}\n')
    words = [str(tmp_path / 'twice.yaml') if word == 'TWICE' else word for word in words]
    took, modules = seconds('-X', 'importtime', 'scepter/run_train.py', *words, code=code)

    assert took < 1 and not re.search(r'\| +torch$', modules, re.MULTILINE)


def test_check_and_explain_take_less_than_two_seconds_beside_the_import_of_torch(experiment: Callable[..., Path]):
    file = str(experiment())
    torch = seconds('-c', 'import torch')[0]

    assert seconds('scepter/run_train.py', '--cfg', file, '--check')[0] < torch + 2
    assert seconds('scepter/run_train.py', '--cfg', file, '--explain', 'SOLVER.MAX_STEPS')[0] < torch + 2
