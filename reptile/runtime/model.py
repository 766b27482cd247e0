"""The two objects of the runtime: a bundle ready to adapt, and a task it was adapted to.

Not for checking files or arguments: `bundle`, `saved` and `inputs` do that.
"""

import reprlib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reptile.errors import InputError
from reptile.runtime.adapting import InnerLoop, adapt, check_support
from reptile.runtime.bundle import Bundle
from reptile.runtime.closed_form import check_no_steps, deadline, embed, fit
from reptile.runtime.columns import Inputs
from reptile.runtime.inputs import (
    check_images,
    check_inputs,
    check_labels,
    check_names,
    check_ways,
)
from reptile.runtime.opened import OpenedBundle
from reptile.runtime.saved import (
    AdaptedState,
    Examples,
    FloatArray,
    IntArray,
    read_adapted,
    write_adapted,
)


class Prediction(NamedTuple):
    """The result of `AdaptedModel.predict` for N images."""

    labels: list[Any]  # [N] the most probable label of each image
    probabilities: FloatArray  # [N, names] in the order of AdaptedModel.labels; rows sum to 1


@dataclass(frozen=True, eq=False, repr=False)
class AdaptedModel:
    """A bundle adapted to one task; made by `FewShotModel.adapt` or `load_adapted`.

    Immutable; threads may share it.
    """

    bundle: Bundle
    state: AdaptedState
    _sessions: Mapping[str, Any]
    _fed: Mapping[str, FloatArray]  # weights, inputs of every run
    _options: dict[str, Any]

    def __repr__(self) -> str:
        return f"AdaptedModel(labels={reprlib.repr(self.labels)})"

    @property
    def labels(self) -> list[Any]:
        """The task's names, in the order of the columns of `Prediction.probabilities`."""
        return list(self.state.labels)

    @property
    def losses(self) -> FloatArray:
        """The loss of each inner step's mini-batch before that step, float32 [steps].

        Empty where a classifier is fitted in closed form.
        """
        return self.state.losses

    def predict(self, images: Inputs) -> Prediction:
        """Classify each image independently of the others.

        Args:
            images: [N, C, H, W], or [N, H, W] where C is 1; pixels 0..255 of any real type. Of a
                bundle that was trained on other data: [N, ...], any numbers; of a table its rows,
                as `columns.check_rows` takes them. N may be any number, 0 included.

        Raises:
            InputError: images of another shape, type or range.
        """
        logits = self.logits(images)
        names = self.state.labels
        return Prediction([names[i] for i in logits.argmax(axis=1)], softmax(logits))

    def logits(self, images: Inputs) -> FloatArray:
        """Return the logits, before the softmax of `predict`, float32 [N, names].

        Raises:
            InputError: as `predict`.
        """
        array = _inputs(images, self.bundle)
        logits = np.empty((len(array), len(self.state.labels)), dtype=np.float32)
        session = self._sessions["predict_adapted"]
        for start in range(0, len(array), self.bundle.images_at_once):
            part = slice(start, start + self.bundle.images_at_once)
            chunk = np.ascontiguousarray(array[part], dtype=self.bundle.input_dtype)
            (output,) = session.run(["logits"], {"images": chunk, **self._fed})
            # Outputs without a class are dropped.
            logits[part] = output[:, : logits.shape[1]]
        return logits

    def specialized(self) -> "AdaptedModel":
        """Return the same task with a separate graph, in which its weights are constants.

        ONNX Runtime then packs them for the processor, and predicts two to three times as fast on a
        CPU; the logits are the same except for rounding. Takes some milliseconds, a few times the
        task's memory, and the package onnx. Useful from about a hundred images on. A closed-form
        bundle's network is constant already; its tasks are returned as they are.

        Raises:
            InputError: no package onnx, or the bundle's files have changed since it was opened.
        """
        if self.bundle.learner == "closed_form":
            return self
        session = self.bundle.open_with("predict_adapted", self.state.weights, **self._options)
        return replace(self, _sessions={**self._sessions, "predict_adapted": session}, _fed={})

    def add(
        self, images: Inputs, labels: Iterable[Hashable], *, timeout: float | None = None
    ) -> "AdaptedModel":
        """Return the task with more examples, of its classes or of new ones.

        Only the new images are run through the network; the result equals adapting to all examples
        again. This task stays as it is.

        Args:
            images: as in `FewShotModel.adapt`.
            labels: a name for each image; new names become classes.
            timeout: seconds after which to give up; None means no limit.

        Raises:
            InputError: a bundle that learns by gradient steps, or an argument that cannot be used.
            TimeoutError: not done in time.
        """
        old, names = self._examples(), self.state.labels
        array = _inputs(images, self.bundle)
        names, targets = check_names(labels, len(array), names)
        check_ways(names, self.bundle)
        check_support(len(old.targets) + len(array), self.bundle, "images")
        until = deadline(timeout)
        features = embed(self._sessions["embed"], self.bundle, array, until)
        examples = Examples(
            np.concatenate([old.features, features]), np.concatenate([old.targets, targets])
        )
        return self._fitted(names, examples, until)

    def remove(self, label: Hashable, *, timeout: float | None = None) -> "AdaptedModel":
        """Return the task without one of its classes.

        The result equals adapting to the other classes' examples. This task stays as it is.

        Raises:
            InputError: a bundle that learns by gradient steps, no such class, or one of only two.
            TimeoutError: not done in time.
        """
        old, names = self._examples(), self.state.labels
        if label not in names:
            raise InputError(f"no class {label!r}: the task has {reprlib.repr(list(names))}")
        place = names.index(label)
        rest = (*names[:place], *names[place + 1 :])
        check_ways(rest, self.bundle)
        kept = old.targets != place
        targets = old.targets[kept]
        examples = Examples(old.features[kept], targets - (targets > place))
        return self._fitted(rest, examples, deadline(timeout))

    def _examples(self) -> Examples:
        if self.state.examples is None:
            raise InputError(
                "this bundle learns by gradient steps, which need every example: adapt again with "
                "all images"
            )
        return self.state.examples

    def _fitted(
        self, names: tuple[Hashable, ...], examples: Examples, until: float | None
    ) -> "AdaptedModel":
        weights = fit(self._sessions["fit"], self.bundle, examples, until)
        state = self.state._replace(labels=names, weights=weights, examples=examples)
        return replace(self, state=state, _fed=weights)

    def save(self, path: str | Path) -> None:
        """Write the adapted task to one file (safetensors format) for `load_adapted`.

        Raises:
            InputError: labels other than str, int, float and bool, or a path that cannot be
                written.
        """
        write_adapted(Path(path), self.state, self.bundle)


def _inputs(images: Inputs, bundle: Bundle) -> npt.NDArray[Any]:
    """Check images, or inputs of any numbers where the bundle takes no pixels."""
    if bundle.pixels:
        return check_images(images, bundle.image_shape)
    return check_inputs(images, bundle, "inputs")


def softmax(logits: FloatArray) -> FloatArray:
    """Return probabilities [N, names]; every row sums to 1."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), dtype=np.float32)


@dataclass(frozen=True, eq=False, repr=False)
class FewShotModel(OpenedBundle):
    """A bundle opened in ONNX Runtime, ready to adapt to tasks; made by `FewShotModel.load`.

    Immutable; threads may share it and adapt at the same time, as ONNX Runtime's sessions allow.
    """

    kind = "classification"
    others = "predicts values and names no classes: open it with FewShotRegressor"

    def __repr__(self) -> str:
        return (
            f"FewShotModel({str(self.bundle.folder)!r}, "
            f"ways={self.ways}, image_shape={self.image_shape})"
        )

    @property
    def ways(self) -> int:
        """Maximum number of names of one task."""
        return self.bundle.ways

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of every image; the shape of every input of other data."""
        return self.bundle.image_shape

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """The shape of images, for programs that take nothing else.

        Raises:
            InputError: the bundle takes other inputs than images.
        """
        if not self.bundle.pixels:
            raise InputError(
                f"{self.bundle.folder} takes inputs of shape {list(self.image_shape)} that are no "
                "images: adapt it over HTTP (reptile serve) or from Python (reptile.runtime)"
            )
        channels, height, width = self.image_shape
        return channels, height, width

    def adapt(
        self,
        images: Inputs,
        labels: Iterable[Hashable],
        *,
        steps: int | None = None,
        learning_rate: float | None = None,
        seed: int = 0,
        timeout: float | None = None,
    ) -> AdaptedModel:
        """Learn a new task from a few labelled images, on mini-batches as the paper draws them.

        The same arguments give the same result.

        Args:
            images: the support set; see `AdaptedModel.predict`.
            labels: a hashable name for each image; 2 to `ways` distinct names.
            steps: inner steps; None means the bundle's.
            learning_rate: of the inner steps; None means the bundle's.
            seed: chooses the mini-batches.
            timeout: seconds after which to give up; None means no limit.

        A closed-form bundle has no inner steps: steps, learning_rate and seed are refused.

        Raises:
            InputError: an argument that cannot be used, or an adaptation that diverged.
            TimeoutError: not done in time.
        """
        bundle = self.bundle
        array = _inputs(images, bundle)
        check_support(len(array), bundle, "images")
        names, targets = check_labels(labels, len(array), bundle)
        inner = InnerLoop(steps, learning_rate, seed, timeout)
        if bundle.learner == "closed_form":
            check_no_steps(inner)
            return self._closed_form(names, array, targets, timeout)
        array = np.ascontiguousarray(array, dtype=bundle.input_dtype)
        losses, weights = adapt(bundle, self._sessions["adapt"], array, targets, inner)
        return self._adapted(AdaptedState(names, losses, weights))

    def _closed_form(
        self,
        names: tuple[Hashable, ...],
        images: npt.NDArray[Any],
        targets: IntArray,
        timeout: float | None,
    ) -> AdaptedModel:
        until = deadline(timeout)
        features = embed(self._sessions["embed"], self.bundle, images, until)
        examples = Examples(features, targets)
        weights = fit(self._sessions["fit"], self.bundle, examples, until)
        losses = np.empty(0, dtype=np.float32)
        return self._adapted(AdaptedState(names, losses, weights, examples))

    def load_adapted(self, path: str | Path) -> AdaptedModel:
        """Read a task that `AdaptedModel.save` wrote for this bundle.

        Raises:
            InputError: a missing or damaged file, or one of another bundle.
        """
        return self._adapted(read_adapted(Path(path), self.bundle))

    def _adapted(self, state: AdaptedState) -> AdaptedModel:
        return AdaptedModel(self.bundle, state, self._sessions, state.weights, self._options)
