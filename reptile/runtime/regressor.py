"""The two objects of the runtime for regression: they predict values where `model` names classes.

Not for checking files or arguments: `bundle`, `saved` and `inputs` do that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reptile.errors import InputError
from reptile.runtime.adapting import InnerLoop, adapt, check_support
from reptile.runtime.bundle import Bundle
from reptile.runtime.closed_form import check_no_steps, deadline, embed, fit
from reptile.runtime.columns import check_values
from reptile.runtime.inputs import check_inputs, check_points
from reptile.runtime.opened import OpenedBundle
from reptile.runtime.saved import AdaptedState, Examples, Values, read_adapted, write_adapted

_CHUNK = 4096  # inputs per run: bounds memory; they are independent


class Interval(NamedTuple):
    """The result of `AdaptedRegressor.predict_interval` for N inputs."""

    low: Values  # [N, outputs]
    high: Values  # [N, outputs]


def check_pairs(x: Any, y: Any, bundle: Bundle) -> tuple[Values, Values]:
    """Return points' inputs [N, *image_shape] and values [N, outputs].

    Raises:
        InputError: another shape or type, numbers that are not finite, or not one y for each x.
    """
    inputs = check_inputs(x, bundle, "x")
    values: Values
    if bundle.columns:
        values = check_values(y, bundle.targets, "y")
    else:
        values = check_points(y, (bundle.outputs,), "y")
    if len(inputs) != len(values):
        raise InputError(f"{len(inputs)} x but {len(values)} y: give each point both")
    return inputs, values


@dataclass(frozen=True, eq=False)
class AdaptedRegressor:
    """A bundle adapted to one function; made by `FewShotRegressor.adapt` or `load_adapted`.

    Immutable; threads may share it.
    """

    bundle: Bundle
    state: AdaptedState
    _sessions: Mapping[str, Any]

    @property
    def losses(self) -> npt.NDArray[np.float32]:
        """The loss of each inner step's mini-batch before that step, float32 [steps].

        Empty where the function is learnt in closed form.
        """
        return self.state.losses

    def predict(self, x: Any) -> Values:
        """Predict the values at each x independently of the others.

        Args:
            x: [N, C, H, W], or [N] where inputs are single numbers; of a table's bundle, its rows,
                as `columns.check_rows` takes them. N may be any number.

        Returns:
            float32 [N, outputs]; of a table's bundle float64, in the units of its columns.

        Raises:
            InputError: inputs of another shape or type, or not finite.
        """
        (values,) = self._run(x, ["logits"])
        return values

    def predict_interval(self, x: Any, level: float = 0.95) -> Interval:
        """Predict intervals that hold the values at each x with a given probability.

        Of a bundle that learns in closed form, by the normal distribution that it predicts. How
        often they hold on test functions is in the bundle's model card.

        Args:
            x: as in `predict`.
            level: the probability, between 0 and 1.

        Raises:
            InputError: as `predict`, a level out of range, or a bundle that learns by gradient
                steps.
        """
        if self.bundle.learner != "closed_form":
            raise InputError(
                "this bundle learns by gradient steps and predicts no variances: use predict, or a "
                "bundle of algorithm: bayes"
            )
        if not 0 < level < 1:
            raise InputError(f"level must lie between 0 and 1, got {level}")
        mean, variance = self._run(x, ["logits", "variance"])
        # The lower tail: 1 + level may round to 2.
        half = np.sqrt(variance) * mean.dtype.type(-NormalDist().inv_cdf((1 - level) / 2))
        with np.errstate(invalid="ignore"):  # an infinite value has no interval
            return Interval(mean - half, mean + half)

    def _run(self, x: Any, names: list[str]) -> list[Values]:
        """Return these outputs of the graph, each [N, outputs]."""
        inputs = check_inputs(x, self.bundle, "x")
        sizes = len(names), len(inputs), self.bundle.outputs
        found = np.empty(sizes, dtype=self.bundle.input_dtype)
        for start in range(0, len(inputs), _CHUNK):
            part = slice(start, start + _CHUNK)
            found[:, part] = self._sessions["predict_adapted"].run(
                names, {"images": inputs[part], **self.state.weights}
            )
        return list(found)

    def add(self, x: Any, y: Any, *, timeout: float | None = None) -> "AdaptedRegressor":
        """Return the function given more of its points.

        Only the new points are run through the network; the result equals adapting to all points
        again. This function stays as it is.

        Args:
            x: as in `FewShotRegressor.adapt`.
            y: likewise.
            timeout: seconds after which to give up; None means no limit.

        Raises:
            InputError: a bundle that learns by gradient steps, a function that an earlier version
                saved, or an argument that cannot be used.
            TimeoutError: not done in time.
        """
        old = self._examples()
        inputs, values = check_pairs(x, y, self.bundle)
        check_support(len(old.targets) + len(inputs), self.bundle, "points")
        until = deadline(timeout)
        features = embed(self._sessions["embed"], self.bundle, inputs, until)
        examples = Examples(
            np.concatenate([old.features, features]), np.concatenate([old.targets, values])
        )
        weights = fit(self._sessions["fit"], self.bundle, examples, until)
        return replace(self, state=self.state._replace(weights=weights, examples=examples))

    def _examples(self) -> Examples:
        if self.bundle.learner != "closed_form":
            raise InputError(
                "this bundle learns by gradient steps, which need every example: adapt again with "
                "all points"
            )
        if self.state.examples is None:
            raise InputError(
                "this function was saved by an earlier version, without its points: adapt again "
                "with all of them"
            )
        return self.state.examples

    def save(self, path: str | Path) -> None:
        """Write the adapted function to one file (safetensors format) for `load_adapted`.

        Raises:
            InputError: a path that cannot be written.
        """
        write_adapted(Path(path), self.state, self.bundle)


@dataclass(frozen=True, eq=False, repr=False)
class FewShotRegressor(OpenedBundle):
    """A regressor's bundle opened in ONNX Runtime; made by `FewShotRegressor.load`.

    Immutable; threads may share it and adapt at the same time, as ONNX Runtime's sessions allow.
    """

    kind = "regression"
    others = "names classes and predicts no values: open it with FewShotModel"

    def __repr__(self) -> str:
        return f"FewShotRegressor({str(self.bundle.folder)!r}, outputs={self.outputs})"

    @property
    def outputs(self) -> int:
        """Number of values predicted for each input."""
        return self.bundle.outputs

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of every input; (1, 1, 1) for single numbers."""
        return self.bundle.image_shape

    def adapt(
        self,
        x: Any,
        y: Any,
        *,
        steps: int | None = None,
        learning_rate: float | None = None,
        seed: int = 0,
        timeout: float | None = None,
    ) -> AdaptedRegressor:
        """Learn a new function from a few of its points; the same arguments give the same result.

        Args:
            x: the points' inputs, as `AdaptedRegressor.predict` takes them.
            y: the function's values there, [N, outputs], or [N] of a single output; of a table's
                bundle in the units of its columns, or by their names, as x.
            steps: inner steps; None means the bundle's.
            learning_rate: of the inner steps; None means the bundle's.
            seed: chooses the mini-batches.
            timeout: seconds after which to give up; None means no limit.

        A closed-form bundle has no inner steps: steps, learning_rate and seed are refused.

        Raises:
            InputError: an argument that cannot be used, or an adaptation that diverged.
            TimeoutError: not done in time.
        """
        inputs, values = check_pairs(x, y, self.bundle)
        check_support(len(inputs), self.bundle, "points")
        inner = InnerLoop(steps, learning_rate, seed, timeout)
        if self.bundle.learner == "closed_form":
            check_no_steps(inner)
            return self._closed_form(inputs, values, timeout)
        losses, weights = adapt(self.bundle, self._sessions["adapt"], inputs, values, inner)
        return self._adapted(AdaptedState((), losses, weights))

    def _closed_form(
        self, inputs: Values, values: Values, timeout: float | None
    ) -> AdaptedRegressor:
        until = deadline(timeout)
        features = embed(self._sessions["embed"], self.bundle, inputs, until)
        examples = Examples(features, values)
        weights = fit(self._sessions["fit"], self.bundle, examples, until)
        return self._adapted(AdaptedState((), np.empty(0, dtype=np.float32), weights, examples))

    def load_adapted(self, path: str | Path) -> AdaptedRegressor:
        """Read a function that `AdaptedRegressor.save` wrote for this bundle.

        Raises:
            InputError: a missing or damaged file, or one of another bundle.
        """
        return self._adapted(read_adapted(Path(path), self.bundle))

    def _adapted(self, state: AdaptedState) -> AdaptedRegressor:
        return AdaptedRegressor(self.bundle, state, self._sessions)
