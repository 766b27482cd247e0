"""The two objectives, classification and regression, and everything in which they differ.

The meaning of a network's outputs, their loss and score, and the form of a validation task. Other
modules use these fields instead of testing which objective it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from reptile.errors import InputError
from reptile.tasks import FewShotProtocol

if TYPE_CHECKING:  # torch takes seconds to import, and preparing data does without it
    from torch import Tensor

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

ROUNDING = 1e-12  # squared errors below it are float32's rounding


@dataclass(frozen=True)
class Objective:
    """What the outputs of a network are for."""

    name: Literal["classification", "regression"]
    loss: "Callable[[Tensor, Tensor], Tensor]"
    """From outputs [B, outputs] and targets (labels, integers [B]; values [B, outputs], or [B] of a
    single output) to the mean loss []."""
    metric: Literal["accuracy", "mean_squared_error"]
    """The score's name in metrics.json, curves and gates."""
    title: str
    """The score's name for people."""
    unit: str
    """The unit to show: `%` of answers, or none for squared values."""
    better: Literal[1, -1]
    """1 where a larger score is better, -1 where a smaller one is."""
    least_ways: int
    """The fewest classes of a task."""
    scores: Callable[[Array, Array], FloatArray]
    """From outputs [..., Q, outputs] and targets [..., Q] or [..., Q, outputs] to scores [...]."""
    compared: Callable[[FloatArray], FloatArray]
    """What the choice between learners compares of their mean scores on each class [C]."""
    validation: FewShotProtocol
    """The tasks of the learning curve; those of classification take the training's ways."""

    disagreement_title: str
    """What `disagreement` measures, for people: "… from others'"."""

    @property
    def scale(self) -> int:
        """What a score is multiplied by to be shown in its unit."""
        return 100 if self.unit == "%" else 1

    def gain(self, score: Any, other: Any) -> Any:
        """Return by how much a score is better than another, of numbers or arrays."""
        return self.better * (score - other)

    def disagreement(self, answers: Array, others: Array) -> float:
        """Return how much two sets of outputs [..., Q, outputs] differ.

        The share of labels that differ; or the norm of the values' difference relative to the
        norm of `others`.
        """
        if self.name == "classification":
            return float((answers.argmax(-1) != others.argmax(-1)).mean())
        return float(np.linalg.norm(answers - others) / np.linalg.norm(others))

    def show(self, mean: float, interval: float) -> str:
        """Write a score with its 95 % interval for people, without its unit."""
        digits = 3 if max(abs(mean), interval) >= 0.05 else 5
        text = (
            f"{self.scale * mean:.1f} ± {self.scale * interval:.1f}"
            if self.unit == "%"
            else f"{mean:.{digits}f} ± {interval:.{digits}f}"
        )
        return text.replace("-", "\N{MINUS SIGN}")

    def show_difference(self, mean: float, interval: float) -> str:
        """Write a difference of what is `compared`, and its 95 % interval, for people."""
        if self.unit == "%":
            return f"{self.show(abs(mean), interval)} points"
        factor, low, high = np.exp(abs(mean) + interval * np.array([0, -1, 1]))
        return f"a factor of {factor:.2f}, {low:.2f} to {high:.2f}"

    def check_ways(self, ways: int, dataset: str) -> None:
        """Refuse a number of classes a task that makes no sense for this objective.

        Raises:
            InputError: one class to classify, or several to predict values of.
        """
        if self.name == "regression" and ways != 1:
            raise InputError(
                f"train.ways = {ways}: {dataset} has values to predict, so a task is of one class "
                "alone; set train.ways to 1"
            )
        if ways < self.least_ways:
            raise InputError(
                f"train.ways = {ways}: telling classes of {dataset} apart takes at least "
                f"{self.least_ways}"
            )


def _share_right(logits: Array, labels: Array) -> FloatArray:
    return np.asarray((logits.argmax(-1) == labels).mean(-1))


def _mean_squared_error(values: Array, targets: Array) -> FloatArray:
    return np.asarray(np.square(values - targets.reshape(values.shape)).mean((-2, -1)))


def _logarithm(errors: FloatArray) -> FloatArray:
    """Return logarithms, whose differences are ratios.

    Errors of tasks differ by orders of magnitude, and one or two would decide a mean; the geometric
    mean of ratios is the measure that weighs all alike (Davydenko and Fildes, Measuring forecasting
    accuracy, 2013).
    """
    return np.log(np.maximum(errors, ROUNDING))


def _unchanged(scores: FloatArray) -> FloatArray:
    return scores


def to_unit(pixels: "Tensor") -> "Tensor":
    """Scale pixels 0..255 to float32 in 0..1, the networks' input."""
    return pixels.float() / 255


def as_they_are(values: "Tensor") -> "Tensor":
    """Return numbers other than pixels, the networks' input already."""
    return values


def _cross_entropy(logits: "Tensor", labels: "Tensor") -> "Tensor":
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, labels)


def _squared_error(values: "Tensor", targets: "Tensor") -> "Tensor":
    from torch.nn.functional import mse_loss

    return mse_loss(values, targets.to(values.dtype).reshape(values.shape))


CLASSIFICATION = Objective(
    name="classification",
    loss=_cross_entropy,
    metric="accuracy",
    title="accuracy",
    unit="%",
    better=1,
    least_ways=2,
    scores=_share_right,
    compared=_unchanged,
    validation=FewShotProtocol(ways=2, shots=1, queries=1, steps=50, batch=5),  # the paper's
    disagreement_title="share of answers that differ",
)
REGRESSION = Objective(
    name="regression",
    loss=_squared_error,
    metric="mean_squared_error",
    title="mean squared error",
    unit="",
    better=-1,
    least_ways=1,
    scores=_mean_squared_error,
    compared=_logarithm,
    validation=FewShotProtocol(ways=1, shots=10, queries=10, steps=32, batch=10),  # the authors'
    disagreement_title="difference of the values, relative to their norm,",
)


def objective_named(name: str) -> Objective:
    """Return the objective of this name, `classification` or `regression`."""
    return next(each for each in (CLASSIFICATION, REGRESSION) if each.name == name)


def objective_of(values: int) -> Objective:
    """Return the objective of data with so many values to predict for each input; 0 for none."""
    return REGRESSION if values else CLASSIFICATION
