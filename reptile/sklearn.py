"""A bundle as scikit-learn's estimators: `fit` adapts it to a few examples.

Needs numpy, ONNX Runtime and scikit-learn. Not for training bundles.
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from reptile import runtime
from reptile.errors import InputError

Array = npt.NDArray[Any]
WITHIN_ONE_DEVIATION = math.erf(math.sqrt(0.5))  # 0.683, the probability of that interval


class _FewShot(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """What both have: parameters, the form of inputs, and pickling."""

    _runtime: type[runtime.FewShotModel] | type[runtime.FewShotRegressor]

    def __init__(
        self,
        bundle: str | Path,
        *,
        steps: int | None = None,
        learning_rate: float | None = None,
        random_state: int = 0,
    ) -> None:
        self.bundle = bundle
        self.steps = steps
        self.learning_rate = learning_rate
        self.random_state = random_state

    def _open(self) -> Any:
        return self._runtime.load(self.bundle)

    def _adapt(self, inputs: Array, targets: Array) -> Any:
        model = self._open()
        shape = model.bundle.image_shape
        if np.prod(shape) != inputs.shape[1]:
            raise InputError(
                f"X has {inputs.shape[1]} features, and the bundle takes {np.prod(shape)} of each "
                f"example, {list(shape)} flattened"
            )
        closed_form = model.bundle.learner == "closed_form"
        return model.adapt(
            inputs.reshape(-1, *shape),
            targets,
            steps=self.steps,
            learning_rate=self.learning_rate,
            seed=0 if closed_form else self.random_state,
        )

    def _inputs(self, X: Any) -> Array:  # noqa: N803
        check_is_fitted(self)
        inputs: Array = validate_data(self, _flat(X), reset=False)
        return inputs.reshape(-1, *self.adapted_.bundle.image_shape)

    def __getstate__(self) -> dict[str, Any]:
        """Return it with the adapted task as the bytes of its file: open graphs have none."""
        state: dict[str, Any] = dict(super().__getstate__())
        if "adapted_" in state:
            with TemporaryDirectory() as folder:
                state["adapted_"].save(Path(folder) / "task")
                state["adapted_"] = (Path(folder) / "task").read_bytes()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the bundle again, which must be where it was, and unchanged."""
        super().__setstate__(state)
        if "adapted_" in state:
            with TemporaryDirectory() as folder:
                (Path(folder) / "task").write_bytes(state["adapted_"])
                self.adapted_ = self._open().load_adapted(Path(folder) / "task")


class FewShotClassifier(ClassifierMixin, _FewShot):  # type: ignore[misc]
    """A classifier that a bundle adapts to the examples that `fit` gets.

    Args:
        bundle: the folder that holds manifest.json.
        steps: inner steps; None means the bundle's. A closed-form bundle has none.
        learning_rate: of the inner steps; likewise.
        random_state: chooses the mini-batches of the inner steps.

    Attributes:
        classes_: the labels, sorted.
        n_features_in_: numbers of an example.
        adapted_: the adapted task, a `reptile.runtime.AdaptedModel` whose labels are places in
            `classes_`.
    """

    _runtime = runtime.FewShotModel

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Adapt to the examples X [N, features] or [N, *shape of an input], with labels y [N].

        Raises:
            ValueError: an argument that cannot be used, or of another size than the bundle takes.
        """
        inputs, labels = validate_data(self, _flat(X), y)
        check_classification_targets(labels)
        self.classes_, places = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(
                f"y has 1 class, {self.classes_.tolist()[0]!r}: there is nothing to tell apart"
            )
        self.adapted_ = self._adapt(inputs, places)
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[np.float32]:  # noqa: N803
        """Return the probabilities [N, classes] of examples, in the order of `classes_`."""
        inputs = self._inputs(X)
        found: npt.NDArray[np.float32] = self.adapted_.predict(inputs).probabilities
        probabilities = np.empty_like(found)
        probabilities[:, self.adapted_.labels] = found
        return probabilities

    def predict(self, X: Any) -> Array:  # noqa: N803
        """Return the most probable label [N] of each example."""
        places = self.predict_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[places])


class FewShotRegressor(RegressorMixin, _FewShot):  # type: ignore[misc]
    """A regressor that a bundle adapts to the points that `fit` gets.

    Args:
        bundle: the folder that holds manifest.json.
        steps: inner steps; None means the bundle's. A closed-form bundle has none.
        learning_rate: of the inner steps; likewise.
        random_state: chooses the mini-batches of the inner steps.

    Attributes:
        n_features_in_: numbers of an input.
        adapted_: the adapted function, a `reptile.runtime.AdaptedRegressor`.
    """

    _runtime = runtime.FewShotRegressor

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Adapt to points X [N, features] or [N, *shape of an input], y [N] or [N, outputs].

        Raises:
            ValueError: an argument that cannot be used, or of another size than the bundle takes.
        """
        inputs, values = validate_data(self, _flat(X), y, multi_output=True, y_numeric=True)
        self._flat_y = values.ndim == 1
        self.adapted_ = self._adapt(inputs, values)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:  # noqa: N803
        """Return the values [N], or [N, outputs] where y had two dimensions.

        Args:
            X: as in `fit`.
            return_std: return the standard deviations of the prediction too, of the same shape: of
                bundles that learn in closed form. As with scikit-learn's other regressors, they
                include the noise of a single observation.
        """
        inputs = self._inputs(X)
        mean = self._shaped(self.adapted_.predict(inputs))
        if not return_std:
            return mean
        low, high = self.adapted_.predict_interval(inputs, level=WITHIN_ONE_DEVIATION)
        return mean, self._shaped((high - low) / 2)

    def _shaped(self, values: Array) -> npt.NDArray[np.float64]:
        values = values.astype(np.float64)
        return values[:, 0] if self._flat_y else values

    def __sklearn_tags__(self) -> Any:
        """Say that y may have several outputs: as many as the bundle predicts."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _flat(X: Any) -> Any:  # noqa: N803
    """Return inputs of any shape as [N, features]; tables, lists and what is wrong as they are."""
    return X.reshape(len(X), -1) if isinstance(X, np.ndarray) and X.ndim > 2 else X
