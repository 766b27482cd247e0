"""The short way of reading pixels takes what the long way takes, and reads the same."""

from typing import Any

import numpy as np
import pytest

from reptile.errors import InputError
from reptile.runtime.inputs import check_images
from reptile.serve.pixels import whole_pixels

SHAPE = (2, 3, 4)


@pytest.mark.parametrize("seed", range(20))
def test_whole_pixels_are_read_as_numpy_reads_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (rng.integers(1, 5), *SHAPE))
    found = whole_pixels(images.tolist(), SHAPE)
    assert found is not None and found.dtype == np.uint8
    np.testing.assert_array_equal(found, images)


def _image() -> Any:
    return np.arange(24).reshape(1, *SHAPE).tolist()


def _changed(*place: int, value: Any) -> Any:
    images = target = _image()
    for position in place[:-1]:
        target = target[position]
    target[place[-1]] = value
    return images


@pytest.mark.parametrize(
    "images",
    [
        [],
        [[]],
        {},
        "images",
        None,
        7,
        [1, 2],
        _changed(0, value=3),
        _changed(0, 1, value={"a": 1, "b": 2, "c": 3}),
        _changed(0, 1, 2, value="four"),
        _changed(0, 1, 2, value={"a": 1, "b": 2, "c": 3, "d": 4}),
        _changed(0, 1, 2, value=4),
        _changed(0, 1, 2, value=[1, 2, 3]),
        _changed(0, 1, value=[[1, 2, 3, 4]] * 2),
        _changed(0, 1, 2, 3, value=256),
        _changed(0, 1, 2, 3, value=-1),
        _changed(0, 1, 2, 3, value=10**30),
        _changed(0, 1, 2, 3, value=0.5),
        _changed(0, 1, 2, 3, value=None),
        _changed(0, 1, 2, 3, value="1"),
        _changed(0, 1, 2, 3, value=[1]),
        [_image()[0][0] + _image()[0][1]],
        # As many rows as two images have, but not two of the same size.
        [[[[1, 2, 3, 4]] * 2] * 2, [[[1, 2, 3, 4]] * 4] * 2],
        np.zeros((1, *SHAPE), int).tolist(),
        np.ones((1, *SHAPE), bool).tolist(),
    ],
    ids=repr,
)
def test_everything_else_is_left_to_the_long_way(images: Any) -> None:
    assert whole_pixels(images, SHAPE) is None


def test_what_is_read_is_never_what_the_long_way_refuses() -> None:
    rng = np.random.default_rng(0)
    values: list[object] = [0, 1, 2, 255, 256, -1, 1.5, True, None, "2", [3], {}]
    read = 0
    for _ in range(2000):
        images = rng.integers(0, 4, (2, *SHAPE)).tolist()
        for _ in range(rng.integers(0, 3)):
            row = images[rng.integers(2)][rng.integers(2)][rng.integers(3)]
            row[rng.integers(len(row))] = values[rng.integers(len(values))]
        if (found := whole_pixels(images, SHAPE)) is None:
            continue
        read += 1
        try:
            expected = check_images(images, SHAPE)
        except InputError as error:
            pytest.fail(f"{images}: {error}")
        np.testing.assert_array_equal(found, expected)
    assert read > 500
