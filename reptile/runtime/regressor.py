"""The two objects of the runtime for regression: they predict values where `model` names classes.

Not for checking files or arguments: `bundle`, `saved` and `inputs` do that.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reptile.errors import InputError
from reptile.runtime.adapting import InnerLoop, adapt, check_support
from reptile.runtime.bundle import Bundle
from reptile.runtime.inputs import check_points
from reptile.runtime.opened import OpenedBundle
from reptile.runtime.saved import AdaptedState, FloatArray, read_adapted, write_adapted

_CHUNK = 4096  # inputs per run: bounds memory; they are independent


@dataclass(frozen=True, eq=False)
class AdaptedRegressor:
    """A bundle adapted to one function; made by `FewShotRegressor.adapt` or `load_adapted`.

    Immutable; threads may share it.
    """

    bundle: Bundle
    state: AdaptedState
    _session: Any

    @property
    def losses(self) -> FloatArray:
        """The loss of each inner step's mini-batch before that step, float32 [steps]."""
        return self.state.losses

    def predict(self, x: npt.ArrayLike) -> FloatArray:
        """Predict the values at each x independently of the others.

        Args:
            x: [N, C, H, W], or [N] where inputs are single numbers. N may be any number.

        Returns:
            float32 [N, outputs].

        Raises:
            InputError: inputs of another shape or type, or not finite.
        """
        inputs = check_points(x, self.bundle.image_shape, "x")
        values = np.empty((len(inputs), self.bundle.outputs), dtype=np.float32)
        for start in range(0, len(inputs), _CHUNK):
            feeds = {"images": inputs[start : start + _CHUNK], **self.state.weights}
            (values[start : start + _CHUNK],) = self._session.run(["logits"], feeds)
        return values

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
        x: npt.ArrayLike,
        y: npt.ArrayLike,
        *,
        steps: int | None = None,
        learning_rate: float | None = None,
        seed: int = 0,
        timeout: float | None = None,
    ) -> AdaptedRegressor:
        """Learn a new function from a few of its points; the same arguments give the same result.

        Args:
            x: the points' inputs, [N, C, H, W], or [N] where they are single numbers.
            y: the function's values there, [N, outputs], or [N] of a single output.
            steps: inner steps; None means the bundle's.
            learning_rate: of the inner steps; None means the bundle's.
            seed: chooses the mini-batches.
            timeout: seconds after which to give up; None means no limit.

        Raises:
            InputError: an argument that cannot be used, or an adaptation that diverged.
            TimeoutError: not done in time.
        """
        inputs = check_points(x, self.bundle.image_shape, "x")
        values = check_points(y, (self.bundle.outputs,), "y")
        check_support(len(inputs), self.bundle, "points")
        if len(inputs) != len(values):
            raise InputError(f"{len(inputs)} x but {len(values)} y: give each point both")
        inner = InnerLoop(steps, learning_rate, seed, timeout)
        losses, weights = adapt(self.bundle, self._sessions["adapt"], inputs, values, inner)
        return self._adapted(AdaptedState((), losses, weights))

    def load_adapted(self, path: str | Path) -> AdaptedRegressor:
        """Read a function that `AdaptedRegressor.save` wrote for this bundle.

        Raises:
            InputError: a missing or damaged file, or one of another bundle.
        """
        return self._adapted(read_adapted(Path(path), self.bundle))

    def _adapted(self, state: AdaptedState) -> AdaptedRegressor:
        return AdaptedRegressor(self.bundle, state, self._sessions["predict_adapted"])
