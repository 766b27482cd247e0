"""Runs of a closed-form learner's graphs: `embed` for features, `fit` for what they give.

For learners by gradient steps see `adapting`.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from reptile.errors import DivergedError, InputError
from reptile.runtime.adapting import InnerLoop
from reptile.runtime.bundle import Bundle
from reptile.runtime.provider import run_within
from reptile.runtime.saved import Examples, FloatArray


def check_no_steps(inner: InnerLoop) -> None:
    """Refuse settings of gradient steps, of which there are none."""
    if (inner.steps, inner.learning_rate, inner.seed) != (None, None, 0):
        raise InputError(
            "this bundle learns a task in closed form, without gradient steps: leave out "
            "steps, learning_rate and seed"
        )


def deadline(timeout: float | None) -> float | None:
    """Return when the time is up, by the monotonic clock."""
    return None if timeout is None else time.monotonic() + timeout


def _left(until: float | None) -> float | None:
    return None if until is None else until - time.monotonic()


def embed(
    session: Any, bundle: Bundle, images: npt.NDArray[Any], until: float | None
) -> FloatArray:
    """Return the features [N, D] of checked images [N, C, H, W].

    Raises:
        TimeoutError: not done in time.
    """
    features = np.empty((len(images), bundle.features), dtype=np.float32)
    for start in range(0, len(images), bundle.images_at_once):
        part = slice(start, start + bundle.images_at_once)
        chunk = np.ascontiguousarray(images[part], dtype=bundle.input_dtype)
        (output,) = run_within(session, ["features"], {"images": chunk}, _left(until))
        features[part] = output
    return features


def fit(
    session: Any, bundle: Bundle, examples: Examples, until: float | None
) -> Mapping[str, FloatArray]:
    """Return a classifier, or a posterior; its arrays and the examples' become read-only.

    Raises:
        DivergedError: its numbers are not finite.
        TimeoutError: not done in time.
    """
    feeds = {"features": examples.features, "support_labels": examples.targets}
    finite, *weights = run_within(session, ["finite", *bundle.weights], feeds, _left(until))
    if not finite:
        raise DivergedError(
            "what these examples give is not finite: give values of the size of the training "
            "data's, or run the bundle's self-check (check) on this machine"
        )
    for array in (*examples, *weights):  # threads share them
        array.flags.writeable = False
    return dict(zip(bundle.weights, weights, strict=True))
