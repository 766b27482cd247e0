import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from reptile.data.readers.glyphs import draw_glyphs, glyph_name, write_glyphs

SMALL = {"alphabets": 3, "characters": 4, "hands": 5}


def test_a_seed_draws_the_same_bytes_and_another_seed_draws_others() -> None:
    assert draw_glyphs(seed=3, **SMALL).tobytes() == draw_glyphs(seed=3, **SMALL).tobytes()
    assert draw_glyphs(seed=3, **SMALL).tobytes() != draw_glyphs(seed=4, **SMALL).tobytes()


def test_a_larger_dataset_contains_the_smaller_one() -> None:
    large = draw_glyphs(alphabets=4, characters=5, hands=6)
    assert np.array_equal(large[:3, :4, :5], draw_glyphs(**SMALL))


def test_the_zip_has_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("one.zip", "two.zip"):
        write_glyphs(tmp_path / name, seed=1, **SMALL)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_the_zip_holds_exactly_the_drawn_images(tmp_path: Path) -> None:
    write_glyphs(tmp_path / "glyphs.zip", **SMALL)
    images = draw_glyphs(**SMALL)
    with zipfile.ZipFile(tmp_path / "glyphs.zip") as archive:
        assert len(archive.namelist()) == 3 * 4 * 5
        for place in np.ndindex(images.shape[:3]):
            with Image.open(BytesIO(archive.read(glyph_name(*place)))) as image:
                assert image.mode == "L"
                assert np.array_equal(np.asarray(image), images[place])


def test_glyphs_are_dark_antialiased_ink_on_white_and_no_two_hands_write_alike() -> None:
    images = draw_glyphs(**SMALL).reshape(-1, 28 * 28)
    ink = (images < 128).mean(axis=1)
    assert ink.min() > 0.005
    assert ink.max() < 0.5
    assert len(np.unique(images)) == 16
    assert len(np.unique(images, axis=0)) == len(images)


def test_drawings_of_one_character_are_more_alike_than_those_of_others() -> None:
    images = draw_glyphs(alphabets=2, characters=8, hands=8).reshape(16, 8, -1) / 255
    within = ((images[:, :1] - images[:, 1:]) ** 2).mean()
    between = ((images[:, None, 0] - images[None, :, 1]) ** 2).mean(-1)
    assert within < between[~np.eye(16, dtype=bool)].mean()
