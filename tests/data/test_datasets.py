from __future__ import annotations

import io
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from scepter.core.errors import DataError
from scepter.core.faults import ConfigError
from scepter.core.registry import DATASETS
from scepter.data.folders import ImageTextFolderDataset
from scepter.data.images import UnreadableError, load_image, to_tensor
from scepter.data.loader import Loader, OrderedLoader
from scepter.data.prompts import PromptListDataset


def build(folder: Path, **options: Any) -> ImageTextFolderDataset:
    return DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDER': str(folder), **options})


def captions(folder: Path, **options: Any) -> dict[str, str]:
    dataset = build(folder, **options)
    return {Path(dataset.name_of(i)).name: dataset[i]['prompt'] for i in range(len(dataset))}


def picture(path: Path, gray: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 6), (gray,) * 3).save(path)


# --------------------------------------------------------------------------------- what a folder holds
def test_a_caption_is_the_text_file_beside_its_image(folder):
    (folder / '5.txt').unlink()
    (folder / '5.caption').write_text('\ufeff  five,\r\n  in two lines ', encoding='utf-8')
    assert captions(folder, PROMPT_PREFIX='a ') == {**{f'{i}.png': f'a gray {i}' for i in range(5)}, '5.png': 'a five, in two lines'}


def test_the_folder_is_searched_to_its_bottom_in_one_order_everywhere(tmp_path):
    for name in ('b/2.png', 'a/1.JPG', 'a/.hidden.png', '.git/3.png', '__MACOSX/4.png', 'c.webp'):
        picture(tmp_path / name)
    assert list(captions(tmp_path)) == ['1.JPG', '2.png', 'c.webp']


def test_jsonl_gives_file_names_and_texts(folder):
    rows = [{'file_name': '1.png', 'text': 'first', 'extra': 1}, {'file_name': '2.png'}]
    (folder / 'metadata.jsonl').write_text('\n'.join(json.dumps(r) for r in rows) + '\n\n')
    assert captions(folder) == {'1.png': 'first', '2.png': ''}


def test_csv_is_read_with_its_quotes(folder):
    (folder / 'metadata.csv').write_text('file_name,text\n1.png,"one, with ""quotes""\nand a break"\n2.png,two\n')
    assert captions(folder) == {'1.png': 'one, with "quotes" and a break', '2.png': 'two'}


def test_missing_captions_are_counted_and_said_once(folder, said):
    (folder / '2.txt').unlink()
    (folder / '4.txt').unlink()
    assert build(folder).missing_captions == 2
    assert [m for m in said if '2 of 6 images have no caption, e.g. 2.png' in m]
    assert len(said) == 1


def test_repeats_make_an_epoch_longer(folder):
    dataset = build(folder, REPEATS=3)
    assert (len(dataset), dataset.file_count) == (18, 6)
    assert dataset[7]['prompt'] == 'gray 1'


@pytest.mark.parametrize(('name', 'text', 'message'), [
    ('metadata.jsonl', '{"file_name": "../secret.png", "text": ""}', 'line 1.*leads out of '),
    ('metadata.jsonl', '{"file_name": "/etc/secret.png", "text": ""}', 'leads out of '),
    ('metadata.jsonl', r'{"file_name": "a\\..\\..\\b.png", "text": ""}', 'leads out of '),
    ('metadata.jsonl', '{"file_name": "C:/b.png", "text": ""}', 'leads out of '),
    ('metadata.csv', 'file_name,text\nx/../../b.png,a', 'line 2.*leads out of '),
    ('metadata.jsonl', '{"file_name": "1.png", "text": ""}\n{"file', 'line 2: not JSON'),
    ('metadata.jsonl', '[1]', 'expected an object'),
    ('metadata.jsonl', '{"image": "1.png"}', 'expected a file_name, got the keys image'),
    ('metadata.jsonl', '{"file_name": "1.png", "caption": "x"}', 'only file_name, caption: name the captions "text"'),
    ('metadata.jsonl', '{"file_name": "1.png", "text": 5}', 'a caption is a string'),
    ('metadata.jsonl', json.dumps({'file_name': '1.png', 'text': 'x' * 70_000}), 'longer than 65536'),
    ('metadata.jsonl', '', 'lists no image'),
    ('metadata.csv', 'file_name,text\n1.png,one, two', 'line 2: more fields than headings'),
    ('metadata.csv', 'file_name,text\n1.png,"one', 'not CSV'),
])
def test_a_broken_sheet_is_an_error_that_says_where(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        build(folder)


def test_two_sheets_are_one_too_many(folder):
    (folder / 'metadata.csv').write_text('file_name,text\n')
    (folder / 'metadata.jsonl').write_text('')
    with pytest.raises(DataError, match=r'metadata.jsonl and metadata.csv: keep the one'):
        build(folder)


def test_a_folder_without_images_says_what_was_looked_for(tmp_path):
    (tmp_path / 'photo.heic').write_bytes(b'')
    with pytest.raises(DataError, match=r'looked for metadata.jsonl.*\.webp.*found 1 other files, e.g. photo.heic') as error:
        build(tmp_path)
    assert error.value.exit_code == 3


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match='nowhere'):
        build(tmp_path / 'nowhere')


def test_a_typo_in_a_parameter_is_found():
    with pytest.raises(ConfigError, match='did you mean DATA_FOLDER'):
        DATASETS.build({'NAME': 'ImageTextFolderDataset', 'DATA_FOLDR': 'x'})


# ------------------------------------------------------------------------------------- kinds of images
def saved(image: Image.Image, tmp_path: Path, suffix: str = 'png', **options: Any) -> Image.Image:
    image.save(tmp_path / f'x.{suffix}', **options)
    return load_image(str(tmp_path / f'x.{suffix}'))


def test_an_image_is_a_float_tensor_in_minus_one_to_one(folder):
    image = build(folder)[3]['image']
    assert image.dtype == torch.float32 and image.shape == (3, 10, 12)
    assert torch.allclose(image, torch.full((3, 10, 12), 120 / 127.5 - 1))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_an_image_stands_upright_whatever_its_orientation_tag(orientation, tmp_path):
    upright = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    how = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]    # the turn that the tag undoes
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = saved(upright if how is None else upright.transpose(Image.Transpose(how)), tmp_path, exif=exif)
    assert np.asarray(found)[..., 0].tolist() == np.asarray(upright).tolist()
    assert found.info['original_size'] == (2, 3)


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'RGB'])
def test_what_is_transparent_is_white(mode, tmp_path):
    if mode in ('RGBA', 'LA'):
        found = saved(Image.new(mode, (4, 4)), tmp_path)
    else:    # one colour is declared transparent
        found = saved(Image.new(mode, (4, 4)), tmp_path, transparency=0 if mode == 'P' else (0, 0, 0))
    assert set(np.asarray(found).ravel()) == {255}


def test_half_transparent_red_on_white_is_pink(tmp_path):
    assert saved(Image.new('RGBA', (1, 1), (255, 0, 0, 128)), tmp_path).getpixel((0, 0)) == (255, 127, 127)


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert np.asarray(saved(Image.fromarray(deep), tmp_path))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(saved(Image.fromarray(deep), tmp_path, 'tif'))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(('mode', 'colour', 'suffix'), [('CMYK', (0, 255, 255, 0), 'jpg'), ('CMYK', (0, 255, 255, 0), 'tif'),
                                                        ('P', None, 'gif'), ('YCbCr', (76, 85, 255), 'jpg')])
def test_red_is_red_in_every_colour_model(mode, colour, suffix, tmp_path):
    image = Image.new(mode, (8, 8), colour) if colour else Image.new('RGB', (8, 8), (255, 0, 0)).convert('P')
    assert np.allclose(np.asarray(saved(image, tmp_path, suffix)), (255, 0, 0), atol=4)


@pytest.mark.parametrize('mode', ['1', 'L'])
def test_one_channel_becomes_three(mode, tmp_path):
    assert np.asarray(saved(Image.new(mode, (2, 2), 255), tmp_path)).tolist() == [[[255] * 3] * 2] * 2


def test_a_tensor_that_a_transform_made_keeps_its_floats():
    assert torch.equal(to_tensor(torch.full((3, 2, 2), 0.3)), torch.full((3, 2, 2), 0.3))
    assert to_tensor(torch.full((3, 2, 2), 255, dtype=torch.uint8)).unique().tolist() == [1.0]


# ------------------------------------------------------------------------------------- what is refused
def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def png(width: int, height: int, extra: bytes = b'', pixels: bytes = b'') -> bytes:
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + head + extra + chunk(b'IDAT', zlib.compress(pixels)) + chunk(b'IEND', b'')


@pytest.mark.parametrize(('data', 'reason'), [
    (png(50_000, 50_000), 'decompression bomb'), (png(12_000, 10_000), '12000x10000 pixels, more than'),
    (png(1, 1, chunk(b'zTXt', b'k\0\0' + zlib.compress(bytes(200_000_000), 1)), bytes(4)), 'too large'),
], ids=['50k x 50k', '120 megapixels', 'zTXt bomb'])
def test_a_bomb_is_refused_without_being_unpacked(data, reason, tmp_path):
    import resource
    (tmp_path / 'x.png').write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableError, match=reason):
        load_image(str(tmp_path / 'x.png'))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000    # kB


def test_a_small_file_of_very_many_pixels_is_refused_and_a_dense_one_is_not(tmp_path):
    (tmp_path / 'bomb.png').write_bytes(png(9000, 9000, pixels=bytes(9000 * 27001)))
    assert (tmp_path / 'bomb.png').stat().st_size < 300_000
    with pytest.raises(UnreadableError, match=r'9000x9000 pixels out of \d+ bytes: .* a bomb'):
        load_image(str(tmp_path / 'bomb.png'))

    Image.effect_noise((5000, 4000), 60).save(tmp_path / 'photo.jpg', quality=30)
    assert load_image(str(tmp_path / 'photo.jpg')).size == (5000, 4000)


def test_only_the_promised_formats_are_opened_whatever_the_name_says(folder, monkeypatch):
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *_: pytest.fail('Ghostscript was started'))
    (folder / '0.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n')

    with pytest.raises(UnreadableError, match='cannot identify'):
        load_image(str(folder / '0.png'))


def test_half_a_picture_is_refused_even_if_another_library_allows_it(folder):
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, 'JPEG')
    (folder / '0.jpg').write_bytes(whole.getvalue()[:len(whole.getvalue()) // 2])
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    with pytest.raises(UnreadableError, match='truncated'):
        load_image(str(folder / '0.jpg'))


@pytest.mark.parametrize('content', [b'x' * 10_000_000, b'\xff\xfe\xfa'], ids=['10 MB', 'not UTF-8'])
def test_a_caption_file_that_is_none_makes_its_sample_unreadable(content, folder):
    (folder / '3.txt').write_bytes(content)
    with pytest.raises(UnreadableError, match=r'caption of 3\.png'):
        build(folder)[3]


def mutated(whole: bytes, chance: random.Random) -> bytes:
    data, kind = bytearray(whole), chance.randrange(6)
    if kind == 0:
        return bytes(data[:chance.randrange(len(data))])
    if kind == 1:
        return bytes(data[chance.randrange(1, len(data)):])
    if kind == 2:
        at = chance.randrange(len(data))
        return bytes(data[:at] + chance.randbytes(32) + data[at:])
    for _ in range((1, 4, 32)[kind - 3]):
        data[chance.randrange(len(data) if kind != 3 else min(64, len(data)))] = chance.randrange(256)
    return bytes(data)


@pytest.mark.filterwarnings('ignore')    # Pillow's own, of the reference below
@pytest.mark.parametrize('count', [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_of_all_damaged_images_exactly_the_good_ones_are_read(tmp_path, count):
    """Good is what Pillow alone decodes whole; every other file is skipped, named once, and nothing else is."""
    chance, noise = random.Random(5), np.random.default_rng(5).integers(0, 256, (24, 20, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = []
    kinds: list[tuple[str, str, dict]] = [
        ('RGB', 'JPEG', {'exif': exif}), ('CMYK', 'JPEG', {}), ('L', 'JPEG', {'progressive': True}), ('RGB', 'PNG', {}),
        ('RGBA', 'PNG', {}), ('P', 'PNG', {}), ('I;16', 'PNG', {}), ('RGB', 'WEBP', {}), ('P', 'GIF', {})]
    for mode, format, options in kinds:
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257) if mode == 'I;16' else Image.fromarray(noise).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        originals.append((format.lower(), buffer.getvalue()))
    good = set()
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    for i in range(count):
        suffix, whole = originals[i % len(originals)]
        path = tmp_path / f'{i:05d}.{suffix}'
        path.write_bytes(whole if i % 100 == 0 else mutated(whole, chance) if i % 100 != 50 else b'')
        try:
            with Image.open(path) as image:
                if image.width * image.height <= 89_478_485:
                    image.load()
                    image.convert('RGBA')
                    good.add(str(path))
        except Exception:
            pass
    dataset = build(tmp_path, MAX_BAD_FRACTION=1.0)
    read, skipped = set(), {}
    for _, n in (loader := OrderedLoader(dataset, 1, skipped_file=tmp_path / 'skipped.jsonl')):
        read.add(dataset.name_of(int(n)))
    for line in (tmp_path / 'skipped.jsonl').read_text().splitlines():
        assert json.loads(line)['path'] not in skipped
        skipped[json.loads(line)['path']] = json.loads(line)['reason']
    assert len(loader) == count and count / 5 < len(good) < count * 4 / 5
    assert read == good
    assert read | set(skipped) == {dataset.name_of(i) for i in range(count)}
    assert not read & set(skipped) and all(skipped.values())


@pytest.mark.parametrize('workers', [0, 2])
def test_training_goes_on_over_two_damaged_files_and_ends_at_the_third(folder, workers):
    for i in (1, 4):
        (folder / f'{i}.png').write_bytes(b'')
    batches = [next(loader) for loader in [Loader(build(folder), 6, seed=1, num_workers=workers)] for _ in range(4)]
    assert {p for batch, _ in batches for p in batch['prompt']} == {'gray 0', 'gray 2', 'gray 3', 'gray 5'}
    (folder / '5.png').unlink()
    loader = Loader(build(folder), 6, seed=1, num_workers=workers)
    (folder / '0.png').unlink()    # after the folder was listed
    with pytest.raises(DataError, match=r'3 of 5 files are unreadable.*\n.*png: '):
        for _ in range(9):
            next(loader)
    loader.close()


# -------------------------------------------------------------------------------------- lists of prompts
def prompts(**options: Any) -> list[dict[str, Any]]:
    dataset = DATASETS.build({'NAME': 'PromptListDataset', **options})
    return [dataset[i] for i in range(len(dataset))]


def test_prompts_come_from_the_config_or_a_file(tmp_path):
    (tmp_path / 'prompts.txt').write_text('a cat\n\n  a "dog", running \n')
    assert prompts(PROMPTS=['a cat']) == [{'prompt': 'a cat'}]
    assert prompts(PROMPTS=['a cat'], N_PROMPT='blurry', PROMPT_PREFIX='photo of ') == [{'n_prompt': 'blurry', 'prompt': 'photo of a cat'}]
    assert [p['prompt'] for p in prompts(PROMPT_FILE=str(tmp_path / 'prompts.txt'))] == ['a cat', 'a "dog", running']
    with pytest.raises(ConfigError, match=r'give either PROMPTS \(got 0\) or PROMPT_FILE'):
        prompts()


def test_a_line_of_a_prompt_file_may_bring_its_own_settings(tmp_path):
    (tmp_path / 'p.jsonl').write_text('{"prompt": "a", "image_size": 64, "seed": 3}\n{"prompt": "b", "n_prompt": "c", "seed": 4}\n')
    found = prompts(PROMPT_FILE=str(tmp_path / 'p.jsonl'), IMAGE_SIZE=[32, 48], N_PROMPT='d')
    assert found == [{'prompt': 'a', 'n_prompt': 'd', 'image_size': 64, 'seed': 3},
                     {'prompt': 'b', 'n_prompt': 'c', 'image_size': [32, 48], 'seed': 4}]
    (tmp_path / 'p.jsonl').write_text('{"prompt": "a"}\n{"text": "b"}')
    with pytest.raises(DataError, match='line 2: expected a "prompt", got the keys text'):
        prompts(PROMPT_FILE=str(tmp_path / 'p.jsonl'))


def test_a_batch_of_prompts_is_what_forward_test_takes(tmp_path):
    lines = [{'prompt': 'a', 'seed': 3, 'guide_scale': 5.0}, {'prompt': 'b', 'seed': 4, 'guide_scale': 5.0}, {'prompt': 'c', 'seed': 4}]
    (tmp_path / 'p.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    dataset = PromptListDataset({'PROMPT_FILE': str(tmp_path / 'p.jsonl'), 'IMAGE_SIZE': [32, 48], 'N_PROMPT': ''})
    batch, _ = next(iter(OrderedLoader(dataset, 2)))
    assert batch == {'prompt': ['a', 'b'], 'n_prompt': ['', ''], 'image_size': [32, 48], 'seed': [3, 4], 'guide_scale': 5.0}
    with pytest.raises(DataError, match=r'prompt 1 \(a\) and prompt 3 \(c\).*guide_scale 5.0 and None.*BATCH_SIZE: 1'):
        next(iter(OrderedLoader(dataset, 3)))
