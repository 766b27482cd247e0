"""One run of the graph `adapt`: mini-batches as the paper draws them, with a check of its outcome.

The callers, `model` and `regressor`, define the form of a task.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reptile.errors import DivergedError, InputError
from reptile.minibatches import mini_batches
from reptile.runtime.bundle import Bundle
from reptile.runtime.inputs import check_integer, check_learning_rate
from reptile.runtime.provider import run_within
from reptile.runtime.saved import FloatArray


class InnerLoop(NamedTuple):
    """How to adapt, as callers give it: None means the bundle's default."""

    steps: int | None
    learning_rate: float | None
    seed: int  # chooses the mini-batches
    timeout: float | None  # seconds


def check_support(size: int, bundle: Bundle, what: str) -> None:
    """Refuse an empty or too large support set."""
    if not 1 <= size <= bundle.max_support:
        raise InputError(
            f"the support set has {size} {what}: this bundle adapts to 1..{bundle.max_support}"
        )


def adapt(
    bundle: Bundle,
    session: Any,
    inputs: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    inner: InnerLoop,
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Return the losses [steps] and the adapted weights by name, read-only.

    Args:
        bundle: whose graph it is.
        session: of the graph `adapt`.
        inputs: the support set, checked, [N, C, H, W].
        targets: its labels [N] or values [N, outputs].
        inner: how to adapt.

    Raises:
        InputError: a setting that cannot be used.
        DivergedError: the numbers are no longer finite.
        TimeoutError: not done in time.
    """
    count = bundle.steps if inner.steps is None else inner.steps
    count = check_integer(count, "steps", 0, bundle.max_steps)
    rate = bundle.learning_rate if inner.learning_rate is None else inner.learning_rate
    rate = check_learning_rate(rate)
    rng = np.random.default_rng(check_integer(inner.seed, "seed", 0, 2**63 - 1))
    batch = min(bundle.batch, len(inputs))
    feeds = {
        "support_images": inputs,
        "support_labels": targets,
        "batches": mini_batches(rng, len(inputs), batch, count, bundle.replacement),
        "learning_rate": np.array(rate, dtype=np.float32),
    }
    outputs = ["finite", "losses", *bundle.weights]
    finite, losses, *weights = run_within(session, outputs, feeds, inner.timeout)
    if not finite:
        raise DivergedError(
            f"adaptation diverged: its numbers are no longer finite after {count} steps at "
            f"learning rate {rate:g}; lower learning_rate (this bundle was made for "
            f"{bundle.learning_rate:g}) or steps"
        )
    for array in (losses, *weights):
        array.flags.writeable = False  # threads share them
    return losses, dict(zip(bundle.weights, weights, strict=True))
