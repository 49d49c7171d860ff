"""Stable Diffusion 1.5 at its published size, on an ordinary machine."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scepter.core.config import Config

ROOT = Path(__file__).resolve().parents[1]
# the command in a process of its own that tells its peak: what a child of the tests used before would count too
MEASURED = """
import resource, sys
from scepter.run_train import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_steps_of_the_whole_unet_fit_in_sixteen_gigabytes(tmp_path):
    (tmp_path / 'images').mkdir()
    Image.effect_noise((640, 512), 64).convert('RGB').save(tmp_path / 'images' / 'a.png')
    (tmp_path / 'images' / 'a.txt').write_text('noise')
    (tmp_path / 'full.yaml').write_text(str(Config({
        '_BASE_': str(ROOT / 'examples' / 'sd15' / 'sd15_512_full.yaml'),
        'ENV': {'DEVICE': 'cpu'},
        'SOLVER': {'WORK_DIR': str(tmp_path / 'work'), 'MAX_STEPS': 2, 'PARAM_DTYPE': 'bfloat16',
                   'TRAIN_HOOKS': [{'NAME': 'LogHook', 'LOG_INTERVAL': 1}],
                   'MODEL': {'PRETRAINED_MODEL': None, 'DIFFUSION_MODEL': {'CHECKPOINTING': 2}},
                   'TRAIN_DATA': {'DATA_FOLDER': str(tmp_path / 'images'), 'BATCH_SIZE': 1, 'NUM_WORKERS': 0}}})), encoding='utf-8')
    done = subprocess.run([sys.executable, '-c', MEASURED, '--cfg', str(tmp_path / 'full.yaml')], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'step 2/2' in done.stderr
    assert float(done.stdout.splitlines()[-1]) < 16
