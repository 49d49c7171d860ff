"""tools/cache_latents.py: what it writes is what the guide's own snippet writes, whoever was killed on the way, and however many wrote."""
from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scepter.components  # noqa: F401
import tiny
from scepter.commands import tool
from scepter.core.config import Config
from scepter.core.registry import DATASETS, MODELS, SOLVERS
from scepter.data.motion import motion_score
from scepter.data.records import RecordReader
from scepter.solvers.caching import open_alone

ROOT = Path(__file__).resolve().parents[1]
SIDES = ((64, 64), (72, 64))    # of the pictures, in turn


@pytest.fixture(scope='module')
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder of the smallest autoencoder, 8 times smaller."""
    return tiny.published_vae(tmp_path_factory.mktemp('vae'))


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 pictures of two sizes with captions, one of them short as well, and one that cannot be read."""
    folder, random = tmp_path_factory.mktemp('source'), np.random.default_rng(0)
    for i in range(22):
        Image.fromarray(random.integers(0, 255, (*SIDES[i % 2], 3), dtype=np.uint8)).save(folder / f'{i:02}.png')
        (folder / f'{i:02}.txt').write_text(f'The long caption of {i}. It goes on.')
    (folder / '04.short.txt').write_text('four')
    (folder / '07.png').write_bytes((folder / '07.png').read_bytes()[:900])
    return folder


def words(source: Path, target: Path, vae: Path, *more: str) -> list[str]:
    return [str(source), str(target), '--vae', str(vae), '--batch', '2', '--shard', '6', '--workers', '1', '--device', 'cpu', *more]


def cache(*args: str | Path) -> int:
    return tool('cache_latents').main(words(*args))


def start(source: Path, target: Path, vae: Path, **env: str) -> subprocess.Popen:
    command = [sys.executable, 'tools/cache_latents.py', *words(source, target, vae)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1', **env}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope='module')
def whole(source: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes that nobody disturbs."""
    target = tmp_path_factory.mktemp('whole') / 'records'
    assert cache(source, target, vae) == 0
    return target


def test_a_record_is_what_the_guides_snippet_makes_of_the_picture(whole: Path, source: Path, vae: Path):
    model, reader = tool('caching').open_autoencoder(str(vae), 'cpu'), RecordReader(whole)
    x = torch.as_tensor(np.array(Image.open(source / '04.png'))[None, ...].transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        moments = model.encode(x.sub(127.5).div(127.5)).latent_dist.parameters.half().numpy()[0]

    record = reader[4]

    assert record['shape'] == [8, 8, 8] and (record['caption'], record['text']) == ('The long caption of 4. It goes on.', 'four')
    assert np.allclose(np.frombuffer(record['moments'], np.float16).reshape(8, 8, 8), moments, atol=2e-3)
    assert reader.features == {'moments': 'BYTES', 'caption': 'STRING', 'text': 'STRING', 'shape': ['INT64']}
    assert len(reader) == 21 and json.loads((whole / '00001.skipped.jsonl').read_text())['file'] == '07.png'


def test_the_records_are_trained_on_by_shape(whole: Path):
    dataset = DATASETS.build(Config({'NAME': 'LatentRecordDataset', 'DATA_FOLDER': str(whole), 'BATCH_SIZE': 2}))

    shapes = [{tuple(dataset[i]['moments'].shape) for i in indices} for indices in dataset.batches(4)]

    assert all(len(found) == 1 for found in shapes) and set.union(*shapes) == {(8, 8, 8), (8, 9, 8)}


def test_after_a_kill_two_processes_at_once_write_the_same_bytes(whole: Path, source: Path, vae: Path, tmp_path: Path):
    mine, target = shutil.copytree(source, tmp_path / 'source'), tmp_path / 'records'
    last = mine / '21.png'
    last.rename(mine / 'waiting')
    os.mkfifo(last)    # whoever opens it waits for ever, so that the first process cannot end before it is killed
    killed = start(mine, target, vae)
    while not list((target / '.parts').glob('0*')):    # until the first chunk is done
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.001)

    killed.kill()
    assert killed.wait() == -signal.SIGKILL and not (target / 'METADATA').exists()
    (mine / 'waiting').replace(last)
    other = start(mine, target, vae)
    third = cache(mine, target, vae)

    assert third == 0 and other.wait() == 0, other.communicate()[0]
    assert files(target) == files(whole)


def test_a_disk_that_is_full_is_said_and_the_same_command_goes_on(whole: Path, source: Path, vae: Path, tmp_path: Path):
    command = shlex.join([sys.executable, 'tools/cache_latents.py', *words(source, tmp_path / 'records', vae)])

    full = subprocess.run(['bash', '-c', f'ulimit -f 5; {command}'], cwd=ROOT, capture_output=True, text=True)    # files of 5 KiB at most

    assert full.returncode == 4 and 'cannot be written: File too large' in full.stderr and 'Traceback' not in full.stderr
    assert list((tmp_path / 'records' / '.parts').glob('0*')) and cache(source, tmp_path / 'records', vae) == 0
    assert files(tmp_path / 'records') == files(whole)


def test_where_locks_do_nothing_the_bytes_are_the_same(whole: Path, source: Path, vae: Path, tmp_path: Path):
    """A lock on a byte is a process's own, so two threads see none of one another's: as on a file system that has no locks."""
    caching, model = tool('caching'), tool('caching').open_autoencoder(str(vae), 'cpu')
    samples = caching.Samples.find(str(source), model, clips=False, labels=False, size=None, frames=33, every=1)

    with ThreadPoolExecutor(3) as pool:
        works = [caching.Work(tmp_path / 'records', samples, model, 2, 3, 1) for _ in range(3)]
        said = list(pool.map(lambda work: work.carry_out(), works))

    assert all('21 records' in text for text in said) and sum(work.encoded for work in works) > 21
    assert files(tmp_path / 'records') == files(whole)


@pytest.mark.slow
def test_nothing_is_encoded_twice_by_two_processes(source: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    both = [start(source, tmp_path / 'records', vae, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2') for rank in '01']
    said = [process.communicate()[0] for process in both]
    counts = [int(text.split('records, ')[1].split()[0]) if 'records, ' in text else 0 for text in said]

    assert [process.returncode for process in both] == [0, 0] and sum(counts) == 21, said
    assert cache(source, tmp_path / 'records', vae) == 0    # a third one has nothing left to do
    assert '21 records;' in capsys.readouterr().out


@pytest.mark.parametrize('size, expected', [('48', 'size None there, [48, 48] now'), ('50', 'multiples of 8')])
def test_another_cache_is_not_written_into_the_same_folder(whole: Path, source: Path, vae: Path, size: str, expected: str,
                                                           capsys: pytest.CaptureFixture):
    before = files(whole)

    assert cache(source, whole, vae, '--size', size) == 3
    assert expected in capsys.readouterr().err and files(whole) == before


def test_a_folder_that_holds_something_else_is_left_alone(source: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / 'mine.txt').write_text('mine')

    assert cache(source, tmp_path, vae) == 3
    assert 'holds mine.txt' in capsys.readouterr().err and files(tmp_path) == {'mine.txt': b'mine'}


def test_shards_are_what_a_run_with_a_cache_finds(source: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    args = words(source, tmp_path / 'cache', vae, '--size', '48', '--format', 'shards')

    assert tool('cache_latents').main(args) == 0
    cfg = Config.parse(capsys.readouterr().out)    # the lines that the command says
    cfg.SOLVER.TRAIN_DATA.BATCH_SIZE = 2
    model = {**tiny.LATENT_DIFFUSION, 'SIZE_FACTOR': 8, 'IMAGE_SIZE': 48, 'SCALE_FACTOR': 0.5, **cfg.SOLVER.MODEL}
    run = SOLVERS.build(Config({**cfg.SOLVER, 'NAME': 'BaseSolver', 'WORK_DIR': str(tmp_path / 'run'), 'MAX_STEPS': 1, 'MODEL': model,
                                'OPTIMIZER': {'NAME': 'SGD', 'LR': 0.0}}))
    pictures, _ = open_alone(run)

    assert len(pictures.keys) == 22 and (pictures.numbers >= 0).sum() == 21
    (columns, place), = pictures.read([4])
    assert columns['moments'][place].shape == (8, 6, 6) and columns['moments'].dtype == torch.float16


@pytest.mark.parametrize('more', [[], ['--size', '48', '--clips'], ['--size', '48', '--labels']])
def test_shards_are_of_images_of_one_size(source: Path, vae: Path, tmp_path: Path, more: list[str]):
    assert tool('cache_latents').main(words(source, tmp_path / 'cache', vae, '--format', 'shards', *more)) == 2
    assert not (tmp_path / 'cache').exists()


# ---------------------------------------------------------------- clips
def moving(pixels_per_frame: int, frames: int = 7) -> np.ndarray:
    """A texture that moves to the left: [T, 64, 64, 3] uint8."""
    random = np.random.default_rng(1)
    wide = Image.fromarray(random.integers(0, 255, (16, 48, 3), dtype=np.uint8)).resize((192, 64), Image.Resampling.BICUBIC)
    return np.stack([np.asarray(wide)[:, pixels_per_frame * t:pixels_per_frame * t + 64] for t in range(frames)])


@pytest.mark.parametrize('pixels', [0, 1, 3, 6])
def test_the_motion_score_is_the_way_in_pixels_per_frame(pixels: int):
    assert motion_score(torch.from_numpy(moving(pixels, 4))) == pytest.approx(pixels, abs=0.05 + 0.05 * pixels)


def test_where_there_is_nothing_to_follow_nothing_moves():
    assert motion_score(torch.zeros(3, 40, 40, 3, dtype=torch.uint8)) == 0 == motion_score(torch.from_numpy(moving(2, 1)))


def test_clips_of_files_and_of_folders_become_moments_with_their_motion(vae: Path, tmp_path: Path):
    import imageio_ffmpeg
    source, target = tmp_path / 'films', tmp_path / 'records'
    frames = source / 'b_walk'
    frames.mkdir(parents=True)
    for i, picture in enumerate(moving(3, 12)):
        Image.fromarray(picture).save(frames / f'frame_{i}.png')    # frame_10 is not behind frame_1
    (source / 'b_walk.txt').write_text('it walks')
    writer = imageio_ffmpeg.write_frames(str(source / 'a.mp4'), (64, 64), fps=8, quality=10, output_params=['-g', '1'])
    writer.send(None)
    for picture in moving(0, 5):
        writer.send(np.ascontiguousarray(picture))
    writer.close()
    (source / 'c.mp4').write_bytes(b'no film')

    assert cache(source, target, vae, '--frames', '3', '--every', '2') == 0
    still, walk = RecordReader(target)

    assert (still['shape'], walk['shape']) == ([8, 3, 8, 8], [8, 3, 8, 8]) and (still['caption'], walk['caption']) == ('', 'it walks')
    assert still['flow'] < 0.5 and walk['flow'] == pytest.approx(6, abs=0.4)    # every second frame
    assert 'c.mp4' in (target / '00000.skipped.jsonl').read_text()


def test_a_causal_autoencoder_takes_as_many_frames_as_make_whole_latents(tmp_path: Path):
    model = MODELS.build(Config({'NAME': 'VideoAutoencoderKL', 'BLOCK_OUT_CHANNELS': [32] * 4, 'LAYERS_PER_BLOCK': 1,
                                 'LATENT_CHANNELS': 2})).eval()
    for i, picture in enumerate(moving(2, 7)):
        (tmp_path / 'films' / 'one').mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / 'films' / 'one' / f'{i}.png')
    caching = tool('caching')
    samples = caching.Samples.find(str(tmp_path / 'films'), model, clips=True, labels=False, size=(32, 48), frames=33, every=1)

    caching.Work(tmp_path / 'records', samples, model, 4, 1, 0).carry_out()

    assert RecordReader(tmp_path / 'records')[0]['shape'] == [4, 2, 4, 6]    # 5 of 7 frames


def test_classes_are_the_folders(vae: Path, source: Path, tmp_path: Path):
    for i, name in enumerate(('dog', 'cat')):
        (tmp_path / 'pets' / name).mkdir(parents=True)
        Image.open(source / f'{i:02}.png').save(tmp_path / 'pets' / name / '0.png')

    assert cache(tmp_path / 'pets', tmp_path / 'records', vae, '--labels', '--size', '32x48') == 0
    assert [(r['label'], r['shape']) for r in RecordReader(tmp_path / 'records')] == [(0, [8, 4, 6]), (1, [8, 4, 6])]
    assert json.loads((tmp_path / 'records' / 'cache.json').read_text())['labels'] == {'cat': 0, 'dog': 1}
