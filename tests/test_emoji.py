"""examples/emoji with a font of its own: a few glyphs in colour, and ligatures for skin tones, as the real fonts have them."""
from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from scepter import run_train
from scepter.core.config import Config
from scepter.core.errors import DataError
from scepter.core.images import save_png
from scepter.core.registry import DATASETS
from scepter.models.condition import Condition

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'examples' / 'emoji'))

from emoji_data import TINTS, all_emoji, draw, draw_all, in_colour, name_of, open_font, with_article  # noqa: E402
from nearest import Real, judge  # noqa: E402
from whole_picture import WholePicture  # noqa: E402

INK = {0x1F600: (1.0, 0.8, 0.1), 0x1F34E: (0.9, 0.1, 0.1), 0x1F34F: (0.3, 0.8, 0.2), 0x2764: (0.9, 0.1, 0.1), 0x1F499: (0.1, 0.2, 0.9),
       0x1F49A: (0.1, 0.7, 0.2), 0x1F44D: (1.0, 0.8, 0.2)}
TONES = {0x1F3FB: (1.0, 0.85, 0.7), 0x1F3FC: (0.9, 0.75, 0.6), 0x1F3FD: (0.75, 0.55, 0.4), 0x1F3FE: (0.6, 0.4, 0.25),
         0x1F3FF: (0.35, 0.25, 0.2)}


@pytest.fixture(scope='session')
def font_file(tmp_path_factory) -> str:
    """Squares in one colour each; the thumb is a ligature with every skin tone."""
    from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    toned = {f'thumb{tone:X}': colour for tone, colour in TONES.items()}
    glyphs = {**{f'u{code:X}': colour for code, colour in {**INK, **TONES}.items()}, **toned}
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(['.notdef', *glyphs])
    font.setupCharacterMap({code: f'u{code:X}' for code in (*INK, *TONES)})
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0)), pen.lineTo((100, 800)), pen.lineTo((900, 800)), pen.lineTo((900, 0)), pen.closePath()
    square = pen.glyph()
    font.setupGlyf(dict.fromkeys(('.notdef', *glyphs), square))
    font.setupHorizontalMetrics(dict.fromkeys(('.notdef', *glyphs), (1000, 100)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({'familyName': 'Small Emoji', 'styleName': 'Regular'})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.setupCOLR({name: [(name, i)] for i, name in enumerate(glyphs)}, version=0)
    font.setupCPAL([[(*colour, 1.0) for colour in glyphs.values()]])
    lines = '\n'.join(f'sub u1F44D u{tone:X} by thumb{tone:X};' for tone in TONES)
    addOpenTypeFeaturesFromString(font.font, f'feature liga {{ {lines} }} liga;')
    path = tmp_path_factory.mktemp('font') / 'emoji.ttf'
    font.save(str(path))
    return str(path)


def test_a_font_tells_its_emoji_by_name(font_file):
    names = [emoji.name for emoji in all_emoji(open_font(font_file), tinted=False)]
    assert {'grinning face', 'red apple', 'green apple', 'red heart', 'thumbs up sign', 'thumbs up sign dark skin'} <= set(names)
    assert len(names) == len(INK) + len(TONES), 'skin tones alone are no emoji, and only the thumb has them'
    assert not any('skin' in emoji.name for emoji in all_emoji(open_font(font_file), sequences=False))


def test_what_has_neither_colour_nor_skin_by_name_is_there_in_each_tint(font_file):
    tinted = [emoji for emoji in all_emoji(open_font(font_file)) if emoji.tint is not None]
    assert {emoji.name for emoji in tinted} == {f'{tint} grinning face' for tint in TINTS}
    for emoji, picture in zip(tinted, draw_all(tinted, open_font(font_file), 32)):
        assert picture[0, 0].min() > 250 and picture[16, 16].argmax() == np.argmax(TINTS[emoji.tint])


def test_a_tint_leaves_each_pixel_as_light_as_it_was():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    weights = np.array([0.299, 0.587, 0.114])
    for colour in TINTS.values():
        assert np.abs(in_colour(pixels, colour) @ weights - pixels @ weights).max() < 1
        assert (in_colour(np.full((1, 1, 3), 255, np.uint8), colour) == 255).all()


@pytest.mark.parametrize('character, name', [('❤', 'red heart'), ('☎', 'telephone'), ('⚫', 'medium black circle'), ('1', None),
                                             ('🏽', None), ('🇩', None)])
def test_a_name_is_what_one_sees(character, name):
    assert name_of(character) == name


def test_a_picture_is_drawn_in_its_colour_on_white(font_file):
    picture = draw('\U0001F499', open_font(font_file), 32)
    assert picture.shape == (32, 32, 3) and np.abs(picture[16, 16] - np.array([25, 51, 229])).max() <= 3 and picture[0, 0].min() > 250


def dataset(font_file: str, **options):
    return DATASETS.build(Config({'NAME': 'EmojiDataset', 'FONT': font_file, **options}))


def test_held_out_combinations_are_in_one_split_alone(font_file):
    train, held_out, everything = (dataset(font_file, SPLIT=split) for split in ('train', 'held_out', 'all'))
    seen, new = ({data.name_of(i) for i in range(len(data))} for data in (train, held_out))
    assert 'green heart' in new and not seen & new and len(seen | new) == len(everything)
    assert {word for name in new for word in name.split()} <= {word for name in seen for word in name.split()}, 'each word was seen'


def test_some_prompts_say_less(font_file):
    whole, short = dataset(font_file, SHORTER=0.0), dataset(font_file, SHORTER=1.0)
    names = [whole.name_of(i) for i in range(len(whole))]
    assert all(whole[i]['prompt'].split(' ', 1)[1] == name for i, name in enumerate(names))
    prompts = [short[i]['prompt'].split(' ', 1)[1] for i in range(len(short)) for _ in range(5)]
    assert all(set(prompt.split()) <= set(names[i // 5].split()) for i, prompt in enumerate(prompts)) and len(set(prompts)) > len(names)
    assert all(prompt.startswith(whole.emoji[i // 5].tint or '') for i, prompt in enumerate(prompts)), 'a tint is always said'


def test_without_a_font_it_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(DataError, match='apt install fonts-noto-color-emoji'):
        open_font()
    with pytest.raises(DataError, match='no font that Pillow can draw'):
        open_font(str(tmp_path / 'gone.ttf'))


def test_the_nearest_emoji_is_the_one_that_was_drawn(font_file, tmp_path):
    real, font = Real.of_the_font(font_file), open_font(font_file)
    for i, (name, pixels) in enumerate(zip(real.names, draw_all(real.emoji, font, 64))):
        picture = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        save_png(picture, tmp_path / 'right' / f'{i}.png', {'prompt': with_article(name)})
        save_png(torch.ones_like(picture), tmp_path / 'blank' / f'{i}.png', {'prompt': with_article(name)})
    right, blank = judge(tmp_path / 'right', real), judge(tmp_path / 'blank', real)
    for split in ('trained', 'held_out'):
        assert right[split]['pictures'] and right[split]['top1'] == right[split]['variant'] == 1
        assert blank[split]['top1'] <= 0.5 and blank[split]['variant'] <= 0.6


def test_a_prompt_is_its_words_whatever_their_order_and_padding():
    torch.manual_seed(0)
    network = WholePicture(Config({'CHANNELS': 2, 'SIZE': 4, 'WIDTH': 16, 'CONTEXT_DIM': 8}))
    x, t, words = torch.randn(3, 2, 4, 4), torch.tensor([10, 500, 999]), torch.randn(3, 5, 8)
    mask = torch.arange(5) < torch.tensor([[2], [3], [5]])
    out = network(x, t, Condition(words, mask=mask))
    assert out.shape == x.shape
    torch.testing.assert_close(network(x, t, Condition(words.masked_fill(~mask[..., None], 9.0).flip(1), mask=mask.flip(1))), out)
    torch.testing.assert_close(network(x[:1], t[:1], words[:1, :2]), out[:1])
    assert not torch.allclose(network(x, t, Condition(words + 1, mask=mask)), out, atol=1e-3)


@pytest.fixture(scope='module')
def demo(demo_of: Callable[[str], ModuleType]) -> ModuleType:
    return demo_of('emoji')


def test_both_stages_train_and_draw(demo, font_file, tmp_path):
    common = ['--max_steps', '2', 'SOLVER.DTYPE=float32', 'SOLVER.TRAIN_DATA.BATCH_SIZE=4', f'SOLVER.TRAIN_DATA.FONT={font_file}']
    recipes = ROOT / 'examples' / 'emoji'
    assert run_train.main(['--cfg', str(recipes / 'autoencoder.yaml'), f'SOLVER.WORK_DIR={tmp_path}/autoencoder', *common]) == 0
    stage1 = f'SOLVER.MODEL.FIRST_STAGE_MODEL.PRETRAINED_MODEL={tmp_path}/autoencoder/checkpoints/step-00000002'
    assert run_train.main(['--cfg', str(recipes / 'emoji.yaml'), f'SOLVER.WORK_DIR={tmp_path}/diffusion', stage1, *common,
                           f'SOLVER.CACHE.FOLDER={tmp_path}/cache',
                           'SOLVER.MODEL.DIFFUSION_MODEL.WIDTH=32']) == 0
    demo.draw_prompts(tmp_path / 'diffusion', tmp_path / 'drawn', 1, 2, *demo.NETWORK, '--prompt', 'a red apple', '--num_samples', '2')
    drawn = [Image.open(file) for file in (tmp_path / 'drawn').glob('*.png')]
    assert [picture.size for picture in drawn] == [(64, 64)] * 2, 'by a process that knows the network from its own command alone'
