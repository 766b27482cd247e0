from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from reptile.errors import InputError
from reptile.runtime import FewShotModel
from reptile.runtime.inputs import check_images

LABELS = ["a", "a", "b", "b", "c", "c", "d", "d"]


def with_pixel(value: float, dtype: Any = np.float32) -> Callable[[np.ndarray], np.ndarray]:
    def change(images: np.ndarray) -> np.ndarray:
        changed = images.astype(dtype)
        changed[3, 0, 1, 2] = value
        return changed

    return change


BAD_IMAGES = {
    "channels last": (lambda x: x.transpose(0, 2, 3, 1), r"\(8, 3, 5, 1\).*transpose\(0, 3, 1, 2"),
    "one grey image": (lambda x: x[0, 0], r"shape \(3, 5\).*single image pass image\[None\]"),
    "other size": (lambda x: x[..., :4], r"shape \(8, 1, 3, 4\), expected \(N, 1, 3, 5\) or"),
    "flattened": (lambda x: x.reshape(8, -1), r"shape \(8, 15\), expected .* or \(N, 3, 5\)"),
    "two channels": (lambda x: np.repeat(x, 2, axis=1), r"\(8, 2, 3, 5\), expected \(N, 1, 3, 5\)"),
    "a number": (lambda x: 3, r"shape \(\), expected"),
    "ragged": (lambda x: [x[0], x[0, :, :2]], "cannot be made into one array"),
    "bool": (lambda x: x > 100, "got bool: multiply masks by 255"),
    "object": (lambda x: x.astype(object), "numbers such as uint8 or float32, got object"),
    "complex": (lambda x: x.astype(complex), "got complex128"),
    "string": (lambda x: x.astype(str), "numbers such as uint8"),
    "nan": (with_pixel(np.nan), "NaN or infinite"),
    "infinity": (with_pixel(np.inf), "NaN or infinite"),
    "negative": (with_pixel(-1, np.int16), r"from -1 to .* expected 0\.\.255"),
    "too bright": (with_pixel(256, np.int16), r"to 256, expected 0\.\.255"),
    "scaled": (lambda x: x / 255, r"look scaled to 0\.\.1.*multiply by 255"),
    "scaled and binary": (lambda x: (x > 100).astype(np.float32), "multiply by 255"),
    "standardised": (lambda x: (x - x.mean()) / x.std(), "the graph normalises by itself"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused_by_adapt_and_predict(
    model: FewShotModel, images: np.ndarray, name: str
) -> None:
    change, words = BAD_IMAGES[name]
    with pytest.raises(InputError, match=words):
        model.adapt(change(images), LABELS)
    with pytest.raises(InputError, match=words):
        model.adapt(images, LABELS, steps=0).predict(change(images))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((8, 5, 6, 3), r"expected \(N, 3, 5, 6\): channels come first.*transpose\(0, 3, 1, 2\)"),
        ((3, 5, 6), r"shape \(3, 5, 6\), expected \(N, 3, 5, 6\): .* pass image\[None\]"),
        ((8, 5, 6), r"shape \(8, 5, 6\), expected \(N, 3, 5, 6\)$"),
    ],
)
def test_colour_images_of_other_shapes_are_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_images(np.zeros(shape, np.uint8), (3, 5, 6))


def test_black_images_are_images(model: FewShotModel, images: np.ndarray) -> None:
    adapted = model.adapt(images, LABELS)
    assert len(adapted.predict(images * 0).labels) == 8
    assert len(adapted.predict((images > 100).astype(np.uint8)).labels) == 8


BAD_LABELS: dict[str, tuple[Any, str]] = {
    "too few": (LABELS[:7], "8 images but 7 labels"),
    "too many": ([*LABELS, "a"], "8 images but 9 labels"),
    "unhashable": ([["a"]] * 8, "hashable names.*unhashable type: 'list'"),
    "one-hot": (np.eye(8), "not one-hot rows"),
    "not a list": (3, "hashable names, one an image"),
    "nan": ([float("nan")] * 4 + ["b"] * 4, "label is NaN: drop"),
    "numpy nan": (np.array([np.nan, 1] * 4), "label is NaN: drop"),
    "one name": (["a"] * 8, "1 distinct names.*nothing to tell apart"),
    "many names": (list("abcdefgh"), "8 distinct names.*head has 4 ways"),
    "a string": ("aabbccdd", "one name an image, got 'aabbccdd'"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels_are_refused(model: FewShotModel, images: np.ndarray, name: str) -> None:
    labels, words = BAD_LABELS[name]
    with pytest.raises(InputError, match=words):
        model.adapt(images, labels)


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"steps": 1.0}, "steps must be an integer, got 1.0"),
    ({"steps": True}, "steps must be an integer, got True"),
    ({"steps": "5"}, "steps must be an integer, got '5'"),
    ({"steps": -1}, r"steps must lie in 0\.\.50, got -1"),
    ({"steps": 51}, r"steps must lie in 0\.\.50, got 51"),
    ({"learning_rate": 0}, "learning_rate must be above 0"),
    ({"learning_rate": -0.1}, "learning_rate must be above 0"),
    ({"learning_rate": float("nan")}, "learning_rate must be above 0 .* got nan"),
    ({"learning_rate": float("inf")}, "at most 100, got inf"),
    ({"learning_rate": 101}, "at most 100, got 101"),
    ({"learning_rate": 1e-60}, "above 0 .* got 1e-60"),  # float32 would make it 0
    ({"learning_rate": True}, "learning_rate must be a number, got True"),
    ({"learning_rate": "0.1"}, "learning_rate must be a number, got '0.1'"),
    ({"seed": -1}, "seed must lie in 0"),
    ({"seed": 0.5}, "seed must be an integer"),
    ({"seed": None}, "seed must be an integer, got None"),
]


@pytest.mark.parametrize(("settings", "words"), BAD_SETTINGS)
def test_bad_settings_are_refused(
    model: FewShotModel, images: np.ndarray, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        model.adapt(images, LABELS, **settings)


def test_an_empty_or_huge_support_set_is_refused(model: FewShotModel, images: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"support set has 0 images: .* 1\.\.30"):
        model.adapt(images[:0], [])
    with pytest.raises(InputError, match=r"support set has 32 images: .* 1\.\.30"):
        model.adapt(np.tile(images, (4, 1, 1, 1)), LABELS * 4)


def test_numpy_settings_are_taken(model: FewShotModel, images: np.ndarray) -> None:
    settings: dict[str, Any] = {
        "steps": np.int64(3),
        "learning_rate": np.float32(0.1),
        "seed": np.uint8(1),
    }
    model.adapt(images, LABELS, **settings)
