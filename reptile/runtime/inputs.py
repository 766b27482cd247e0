"""Checks of a caller's arguments before a graph runs: ONNX Runtime checks very little.

For files see `bundle` and `saved`. Every error names the value and the way out.
"""

import math
import reprlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reptile.bundle_format import MAX_LEARNING_RATE, Manifest
from reptile.errors import InputError
from reptile.runtime.columns import check_rows


def check_images(
    images: npt.ArrayLike, shape: tuple[int, ...], what: str = "images"
) -> npt.NDArray[Any]:
    """Return images as an array [N, C, H, W] of unsigned, signed or floating pixels in 0..255.

    Args:
        images: [N, C, H, W], or [N, H, W] where C is 1; any real number type.
        shape: the bundle's (C, H, W).
        what: their name in error messages.

    Raises:
        InputError: another shape, type or range, NaN, or floats that were scaled to 0..1.
    """
    try:
        array = np.asarray(images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} cannot be made into one array: {error}") from error
    if shape[0] == 1 and array.shape[1:] == shape[1:]:
        array = array[:, np.newaxis]
    if array.ndim != 4 or array.shape[1:] != shape:
        raise InputError(_wrong_shape(array.shape, shape, what))
    if array.dtype.kind not in "uif":
        hint = ": multiply masks by 255" if array.dtype.kind == "b" else ""
        raise InputError(
            f"{what} must be numbers such as uint8 or float32, got {array.dtype}{hint}"
        )
    if array.dtype != np.uint8 and array.size:
        _check_range(array, what)
    return array


def _wrong_shape(got: tuple[int, ...], shape: tuple[int, ...], what: str) -> str:
    channels, *size = shape
    expected = str(("N", *shape)).replace("'", "")
    if channels == 1:
        expected += f" or {('N', *size)}".replace("'", "")
    hint = ""
    if got[1:] == (*size, channels):
        hint = ": channels come first here, pass images.transpose(0, 3, 1, 2)"
    elif got == shape or (channels == 1 and got == tuple(size)):
        hint = ": for a single image pass image[None]"
    return f"{what} have shape {got}, expected {expected}{hint}"


def _check_range(array: npt.NDArray[Any], what: str) -> None:
    low, high = float(array.min()), float(array.max())  # NaN if any pixel is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{what} hold NaN or infinite pixels: pixels are finite, 0..255")
    if low < 0 or high > 255:
        raise InputError(
            f"{what} hold pixels from {low:g} to {high:g}, expected 0..255: "
            "pass them as in the image file, the graph normalises by itself"
        )
    if array.dtype.kind == "f" and 0 < high <= 1:
        raise InputError(
            f"{what} are floats of at most {high:g} and look scaled to 0..1, expected 0..255: "
            "multiply by 255 (or pass uint8 if the images really are that dark)"
        )


def check_inputs(x: Any, bundle: Manifest, what: str) -> npt.NDArray[np.floating[Any]]:
    """Return inputs that are no images as the graphs take them: see `check_points`.

    Raw rows of a table, where the bundle takes these: see `columns.check_rows`.

    Raises:
        InputError: as these.
    """
    if bundle.columns:
        return check_rows(x, bundle.columns, what)
    return check_points(x, bundle.image_shape, what)


def check_points(
    points: npt.ArrayLike, shape: tuple[int, ...], what: str
) -> npt.NDArray[np.float32]:
    """Return inputs that are no images, or values, as an array [N, *shape] of finite numbers.

    Args:
        points: [N, *shape], or without those sizes at its end or its start that are 1: [N] for
            single numbers.
        shape: of one of them.
        what: their name in error messages.

    Raises:
        InputError: another shape or type, NaN, or numbers too large for float32.
    """
    try:
        array = np.asarray(points)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} cannot be made into one array: {error}") from error
    short = tuple(size for size in shape if size > 1)
    if array.ndim == 0 or array.shape[1:] not in (shape, short):
        wanted = " or ".join(str(("N", *sizes)).replace("'", "") for sizes in (short, shape))
        raise InputError(f"{what} have shape {array.shape}, expected {wanted}")
    if array.dtype.kind not in "uif":
        raise InputError(f"{what} must be numbers such as float32, got {array.dtype}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32).reshape(len(array), *shape)
    if not np.isfinite(array).all():
        raise InputError(f"{what} hold NaN, or numbers that are not finite in float32")
    return array


def check_labels(
    labels: Iterable[Hashable], images: int, bundle: Manifest
) -> tuple[tuple[Hashable, ...], npt.NDArray[np.int64]]:
    """Return the distinct names of a task, and each label's place among them; see `check_names`.

    Raises:
        InputError: as `check_names` and `check_ways`.
    """
    names, targets = check_names(labels, images)
    check_ways(names, bundle)
    return names, targets


def check_names(
    labels: Iterable[Hashable], images: int, known: tuple[Hashable, ...] = ()
) -> tuple[tuple[Hashable, ...], npt.NDArray[np.int64]]:
    """Return the known names with the new ones in order of appearance, and each label's place.

    Arrays and their scalars count as the Python values they hold.

    Raises:
        InputError: not one label an image, or an unhashable or NaN label.
    """
    if isinstance(labels, str | bytes):
        raise InputError(f"labels must be a list with one name an image, got {labels!r}")
    try:
        listed = [_plain(label) for label in _plain(labels)]
        places = {name: i for i, name in enumerate(dict.fromkeys([*known, *listed]))}
    except TypeError as error:
        raise InputError(
            f"labels must be hashable names, one an image, not one-hot rows or lists: {error}"
        ) from error
    if len(listed) != images:
        raise InputError(f"{images} images but {len(listed)} labels: give each image one label")
    if any(name != name for name in places):  # only NaN differs from itself
        raise InputError("a label is NaN: drop the unlabelled images")
    return tuple(places), np.array([places[name] for name in listed], dtype=np.int64)


def check_ways(names: Sequence[Hashable], bundle: Manifest) -> None:
    """Refuse fewer than two names, or more than the bundle takes."""
    if 2 <= len(names) <= bundle.ways:
        return
    if len(names) < 2:
        way_out = "with one name there is nothing to tell apart, add images of another"
    elif bundle.learner == "closed_form":
        way_out = f"this bundle takes at most {bundle.ways}, use fewer"
    else:
        way_out = f"this bundle's head has {bundle.ways} ways, use fewer or a bundle with more"
    raise InputError(
        f"labels have {len(names)} distinct names, {reprlib.repr(list(names))}: {way_out}"
    )


def _plain(value: Any) -> Any:
    """Turn numpy and torch values into Python's; torch scalars would hash by identity."""
    convert = getattr(value, "tolist", None)
    return convert() if callable(convert) else value


def check_integer(value: Any, what: str, low: int, high: int) -> int:
    """Return `value` if it is an integer in low..high; a bool or float is an InputError."""
    if isinstance(value, bool | np.bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{what} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise InputError(f"{what} must lie in {low}..{high}, got {value}")
    return int(value)


def check_learning_rate(value: Any) -> float:
    """Return a finite number in (0, 100] that float32 can hold; else an InputError."""
    number = isinstance(value, int | float | np.integer | np.floating)
    if isinstance(value, bool) or not number:
        raise InputError(f"learning_rate must be a number, got {value!r}")
    if not 0 < value <= MAX_LEARNING_RATE or not np.float32(value) > 0:
        raise InputError(
            f"learning_rate must be above 0 and at most {MAX_LEARNING_RATE:g}, got {value}"
        )
    return float(value)
