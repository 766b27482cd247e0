"""The page's arithmetic in Node, against the Python it must agree with."""

import io
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reptile.data.readers.glyphs import draw_glyphs
from reptile.images import decode, fit
from reptile.minibatches import mini_batches

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")

READ = 'import { readFileSync } from "node:fs"; const cases = JSON.parse(readFileSync(0));'
STROKES = {
    "ring": [[[0.5 + 0.2 * np.cos(t), 0.5 + 0.2 * np.sin(t)] for t in np.linspace(0, 6.3, 30)]],
    "cross": [[[0.1, 0.1], [0.9, 0.9]], [[0.9, 0.1], [0.1, 0.9]]],
    "flat": [[[0.0, 0.2], [1.0, 0.25]]],
}


def call(node: Callable[..., Any], module: str, function: str, cases: list[Any]) -> list[Any]:
    return node(
        f'import {{ {function} }} from "./clients/js/{module}"; {READ}'
        f"console.log(JSON.stringify(cases.map((args) => Array.from({function}(...args)))));",
        cases,
    )


def test_mini_batches_are_those_of_python_for_the_same_seed(node: Callable[..., Any]) -> None:
    cases = [
        [seed, size, batch, steps, replacement]
        for seed in (0, 1, 2**32 - 1, 2**32, 2**53 - 1)
        for size, batch, steps in ((5, 5, 50), (13, 5, 20), (1, 1, 3), (300, 10, 7), (2, 2, 0))
        for replacement in (False, True)
    ]
    for case, rows in zip(cases, call(node, "minibatches.js", "miniBatches", cases), strict=True):
        seed, size, batch, steps, replacement = case
        drawn = mini_batches(np.random.default_rng(seed), size, batch, steps, bool(replacement))
        assert rows == drawn.tolist(), case


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(105, 105), (28, 28), (9, 9), (300, 150)])
def test_picture_files_become_the_pixels_that_python_makes_of_them(
    node: Callable[..., Any], mode: str, size: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = rng.integers(0, 256, (size[1], size[0], bands), dtype=np.uint8).squeeze()
    image = Image.fromarray(noise)
    file = io.BytesIO()
    image.save(file, "PNG")
    rgba = {
        "data": np.asarray(image.convert("RGBA")).ravel().tolist(),
        "width": size[0],
        "height": size[1],
    }
    shapes = [(1, 28, 28), (3, 32, 32)]
    for shape, pixels in zip(
        shapes, call(node, "pixels.js", "fit", [[rgba, s] for s in shapes]), strict=True
    ):
        assert pixels == fit(decode("noise", file.getvalue()), shape).ravel().tolist()


def test_drawings_are_inked_sized_and_centred_like_the_training_data(
    node: Callable[..., Any],
) -> None:
    shape = (1, 28, 28)
    drawn = call(node, "pixels.js", "drawingPixels", [[s, shape] for s in STROKES.values()])
    letters = 255.0 - draw_glyphs(alphabets=4, characters=10, hands=10).reshape(-1, 28, 28)
    extents = [max(np.ptp(np.argwhere(letter > 100), axis=0)) for letter in letters]
    low, high = np.percentile(extents, [10, 90])
    for name, pixels in zip(STROKES, drawn, strict=True):
        ink = 255.0 - np.array(pixels).reshape(28, 28)
        places = np.argwhere(ink > 100)
        assert low <= max(np.ptp(places, axis=0)) <= high, name
        np.testing.assert_allclose((places.max(0) + places.min(0)) / 2, 13.5, atol=0.51)
        assert ink.max() > 240
    # The same pen: ink for each pixel of length. A level line of known length tells it exactly.
    flat = 255.0 - np.array(drawn[2]).reshape(28, 28)
    assert 1.2 <= flat.sum() / 255 / (0.68 * 28) <= 1.7


def test_a_drawing_keeps_its_pixels_wherever_and_however_large_it_is_drawn(
    node: Callable[..., Any],
) -> None:
    ring = np.array(STROKES["ring"])
    cases = [
        [(ring * scale + shift).tolist(), (1, 28, 28)] for scale, shift in ((1, 0), (1.5, -0.2))
    ]
    first, second = np.array(call(node, "pixels.js", "drawingPixels", cases))
    np.testing.assert_allclose(first, second, atol=1)
    dot, line = np.array(
        call(
            node,
            "pixels.js",
            "drawingPixels",
            [[[[[0.5, 0.5]]], (1, 28, 28)], [[[[0.5, 0.45], [0.5, 0.55]]], (1, 28, 28)]],
        )
    )
    assert (dot < 128).sum() <= 4
    assert np.ptp(np.argwhere(line.reshape(28, 28) < 128), axis=0)[0] < 12


def test_colour_bundles_get_the_drawing_in_every_channel(node: Callable[..., Any]) -> None:
    (pixels,) = call(node, "pixels.js", "drawingPixels", [[STROKES["cross"], (3, 20, 20)]])
    red, green, blue = np.array(pixels).reshape(3, 400)
    np.testing.assert_array_equal(red, green)
    np.testing.assert_array_equal(red, blue)
