"""What the server does with a bundle, without HTTP: adapt, predict, run graphs as models."""

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from reptile.bundle_format import Column, TensorType
from reptile.errors import DivergedError, InputError
from reptile.runtime import AdaptedModel
from reptile.runtime.inputs import check_images, check_inputs, check_learning_rate
from reptile.runtime.provider import run_within
from reptile.runtime.regressor import check_pairs
from reptile.serve.pixels import whole_pixels
from reptile.serve.settings import ServeSettings
from reptile.serve.task_store import (
    Adapted,
    AdaptedTask,
    Model,
    StorageError,
    TaskStore,
    check_labels,
    label_text,
    normal,
)
from reptile.serve.workers import LEVEL, Adapter, Outputs, Predictor, Values

Array = npt.NDArray[Any]

GRAPHS = {"gradient": ("few_shot", "predict"), "closed_form": ("few_shot", "embed")}
"""The graphs that are served as models, by how the bundle learns."""
IMAGES = {"images", "support_images", "query_images"}  # tensors that hold inputs
TASK = "task-"  # prefix of the model name of an adapted task; its id follows


class UnknownError(Exception):
    """There is no such model or task."""


class ConflictError(Exception):
    """Another request changed the same task first."""


class Service:
    """A bundle being served.

    Raises:
        InputError: the folder of the kept tasks cannot be used.
    """

    def __init__(self, model: Model, settings: ServeSettings) -> None:
        self.model, self.settings = model, settings
        bundle = model.bundle
        self.predicts_values = bundle.kind == "regression"
        self.takes: Literal["images", "rows", "inputs"] = (
            "images" if bundle.pixels else "rows" if bundle.columns else "inputs"
        )
        self.columns = bundle.columns or _numbered("x", math.prod(bundle.image_shape))
        """Of CSV files: an input's numbers in row-major order, where they have no names."""
        self.targets = bundle.targets or _numbered("y", bundle.outputs)
        """A regressor's values."""
        self.store = TaskStore(settings)
        self.store.load(model)
        self.adapter = Adapter(settings)
        self.predictor = Predictor(settings)
        self.ready = False
        self.graphs = [name for name in GRAPHS[bundle.learner] if name in bundle.graphs]
        self._sessions = {
            name: model.bundle.open(name, threads=1, providers=None) for name in self.graphs
        }

    async def start(self) -> None:
        """Run every graph once, so that no request pays for it."""
        bundle = self.model.bundle
        shape = (2, *bundle.image_shape)
        inputs: Array = np.zeros(shape, np.uint8 if bundle.pixels else np.float32)
        if bundle.columns:
            inputs = np.full(shape, np.nan)  # missing values: the graph takes their mean
        targets = np.zeros((2, bundle.outputs)) if self.predicts_values else np.arange(2)
        steps = 1 if bundle.learner == "gradient" else None
        adapted = await self.adapter.run(lambda _: self.model.adapt(inputs, targets, steps=steps))
        if isinstance(adapted, AdaptedModel):
            await self.adapter.run(lambda _: adapted.specialized())
        await self.predictor.predict(adapted, inputs)
        self.ready = True

    def close(self) -> None:
        """Stop taking work; wait for what runs."""
        self.ready = False
        self.adapter.close()
        self.predictor.close()
        self.store.close()

    def inputs(self, values: Any) -> Array:
        """Return inputs as the graphs take them.

        Images as uint8 or float32 [N, C, H, W], rows of a table as float64 [N, columns], others as
        float32 [N, ...].

        Raises:
            InputError: not inputs of this bundle, none, or too many.
        """
        bundle, what = self.model.bundle, self.takes
        self.check_count(len(values))
        if not bundle.pixels:
            return check_inputs(values, bundle, what)
        images = whole_pixels(values, bundle.image_shape)
        if images is None:
            images = check_images(values, bundle.image_shape)
        return images.astype(np.float32 if images.dtype.kind == "f" else np.uint8)

    def check_count(self, count: int) -> None:
        """Refuse no inputs, or too many for one request.

        Raises:
            InputError: see above.
        """
        if not 1 <= count <= self.settings.max_images:
            raise InputError(
                f"{count} {self.takes}: give 1 to {self.settings.max_images} in one request"
            )

    async def adapt(self, inputs: Array, targets: Any, **options: Any) -> AdaptedTask:
        """Adapt to a new task and keep it; once it returns, it survives a restart.

        A closed-form bundle has no steps, so their options have no effect: a client need not know
        which kind of bundle is served.

        Args:
            inputs: what `inputs` returns.
            targets: a label for each, or the values [N, outputs].
            options: of the runtime's `adapt`.

        Raises:
            BusyError: too many adaptations are waiting.
            TimeoutError: not done in time.
            InputError: arguments that cannot be used, or an adaptation that diverged.
        """
        if not self.predicts_values:
            check_labels(targets)
        if self.model.bundle.learner == "closed_form":
            options = {}
        loop = asyncio.get_running_loop()

        def work(seconds: float) -> AdaptedTask:
            adapted = self.model.adapt(inputs, targets, timeout=seconds, **options)
            task = self.store.write(adapted)
            # Even if its client has gone by now: what is on disk is in memory.
            loop.call_soon_threadsafe(self.store.add, task)
            return task

        return await self.adapter.run(work)

    async def add(self, name: str, inputs: Array, targets: Any) -> AdaptedTask:
        """Add examples, of its classes or of new ones, to a task of a closed-form bundle.

        Raises:
            As `adapt`; and UnknownError, ConflictError: see there.
        """
        task = self.task(name)
        if not self.predicts_values:
            check_labels([*task.labels, *targets])
        return await self._change(
            name, lambda model, seconds: model.add(inputs, targets, timeout=seconds)
        )

    async def remove(self, name: str, label: str) -> AdaptedTask:
        """Remove a class, given as text, from a task of a closed-form bundle.

        Raises:
            As `add`.
        """
        labels = {normal(label_text(each)): each for each in self.task(name).labels}
        if (label := normal(label)) not in labels:
            raise UnknownError(
                f"no label {label[:50]!r}: GET /tasks/{name} lists the task's labels"
            )

        def without(model: Adapted, seconds: float) -> Adapted:
            assert isinstance(model, AdaptedModel)  # a regressor's task has no labels
            return model.remove(labels[label], timeout=seconds)

        return await self._change(name, without)

    async def _change(self, name: str, change: Callable[[Adapted, float], Adapted]) -> AdaptedTask:
        """Put a changed task in a task's place; once it returns, it survives a restart."""
        task, loop = self.task(name), asyncio.get_running_loop()
        done: asyncio.Future[bool] = loop.create_future()

        def replace(changed: AdaptedTask) -> None:
            try:
                done.set_result(self.store.replace(task, changed))
            except StorageError as error:
                done.set_exception(error)

        def work(seconds: float) -> None:
            changed = self.store.write(change(task.model, seconds), task)
            # Even if its client has gone by now, as in `adapt`.
            loop.call_soon_threadsafe(replace, changed)

        await self.adapter.run(work)
        if await done:
            return self.task(name)
        self.task(name)  # unless it was deleted
        raise ConflictError("another request changed the task first: send this one again")

    def task(self, name: str) -> AdaptedTask:
        """Return an adapted task.

        Raises:
            UnknownError: there is none of this id.
        """
        if task := self.store.get(name):
            return task
        raise UnknownError(
            f"no task {name[:50]!r}: it was never created here, was deleted, or has expired; "
            "POST /tasks adapts to one"
        )

    def tensors(self, name: str) -> tuple[Mapping[str, TensorType], Mapping[str, TensorType]]:
        """Return the inputs and outputs of a model by its name.

        Raises:
            UnknownError: there is no such model.
        """
        if name in self.graphs:
            graph = self.model.bundle.graphs[name]
            return graph.inputs, graph.outputs
        adapted, bundle = self._adapted(name), self.model.bundle
        inputs = {"images": TensorType(bundle.input_dtype, (None, *bundle.image_shape))}
        if isinstance(adapted, AdaptedModel):
            each = TensorType("float32", (None, len(adapted.labels)))
            return inputs, {"probabilities": each, "logits": each}
        each = TensorType(bundle.input_dtype, (None, bundle.outputs))
        names = ["values", "low", "high"] if bundle.learner == "closed_form" else ["values"]
        return inputs, dict.fromkeys(names, each)

    async def predict_named(self, name: str, inputs: Array) -> dict[str, Array]:
        """Run the model of an adapted task on inputs of its type and shape.

        Raises:
            UnknownError, BusyError, InputError: see there.
        """
        found = await self.predict(self._adapted(name), self.inputs(inputs))
        return {key: array for key, array in found._asdict().items() if array is not None}

    async def predict(self, adapted: Adapted, inputs: Array, level: float | None = None) -> Outputs:
        """Predict for what `inputs` returned.

        Args:
            adapted: the model of a task.
            inputs: see above.
            level: the probability of the intervals; None means 0.95, where there are any.

        Raises:
            BusyError: too many inputs are waiting.
            InputError: a predicted value is not finite, or a level that cannot be used.
        """
        if level is not None:
            self._check_level(level)
        found = await self.predictor.predict(adapted, inputs, LEVEL if level is None else level)
        if isinstance(found, Values) and not np.isfinite(found.values).all():
            row = int(np.argwhere(~np.isfinite(found.values))[0, 0])
            raise InputError(
                f"{self.takes}: the value predicted for row {row} is not finite: give inputs of "
                "the size of the training data's"
            )
        return found

    async def run_graph(self, name: str, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run one of `graphs` on tensors of its types and shapes.

        Raises:
            BusyError, TimeoutError, DivergedError, InputError: see there.
        """
        for tensor in IMAGES & feeds.keys():
            feeds[tensor] = self.inputs(feeds[tensor]).astype(self.model.bundle.input_dtype)
        if name == "few_shot":
            self._check_adaptation(feeds)
        outputs = list(self.model.bundle.graphs[name].outputs)
        found = await self.adapter.run(
            lambda seconds: run_within(self._sessions[name], outputs, feeds, seconds)
        )
        results = dict(zip(outputs, found, strict=True))
        if not all(np.isfinite(array).all() for array in results.values()):
            way_out = (
                "lower learning_rate or give fewer steps"
                if self.model.bundle.learner == "gradient"
                else "check the inputs"
            )
            raise DivergedError(
                f"the adaptation diverged: its numbers are no longer finite; {way_out}"
            )
        return results

    def _adapted(self, name: str) -> Adapted:
        if name.startswith(TASK):
            return self.task(name.removeprefix(TASK)).model
        raise UnknownError(
            f"no model {name[:50]!r}: there are {', '.join(self.graphs)}, and {TASK}ID for each "
            "task"
        )

    def _check_level(self, level: float) -> None:
        if not (self.predicts_values and self.model.bundle.learner == "closed_form"):
            raise InputError("level: this bundle predicts no intervals: leave it out")
        if not 0 < level < 1:
            raise InputError(f"level must lie between 0 and 1, got {level}")

    def _check_adaptation(self, feeds: Mapping[str, Array]) -> None:
        """Hold the graph's inputs to what it needs, as ONNX Runtime does not."""
        bundle, labels = self.model.bundle, feeds["support_labels"]
        support = len(feeds["support_images"])
        if len(labels) != support:
            raise InputError(f"{support} support images but {len(labels)} support_labels")
        if support > bundle.max_support:
            raise InputError(f"{support} support images: at most {bundle.max_support}")
        if self.predicts_values:
            check_pairs(feeds["support_images"], labels, bundle)
        elif labels.min() < 0 or labels.max() >= bundle.ways:
            raise InputError(f"support_labels must lie in 0..{bundle.ways - 1}")
        if bundle.learner == "closed_form":
            return
        batches = feeds["batches"]
        steps, batch = batches.shape
        if steps > bundle.max_steps or not 1 <= batch <= bundle.max_support:
            raise InputError(
                f"batches have shape [{steps}, {batch}]: at most {bundle.max_steps} steps of "
                f"1 to {bundle.max_support} positions"
            )
        if batches.size and (batches.min() < 0 or batches.max() >= support):
            raise InputError(f"batches must hold positions in 0..{support - 1}")
        check_learning_rate(float(feeds["learning_rate"]))


def _numbered(name: str, count: int) -> tuple[Column, ...]:
    """Return columns of numbers: `name` of a single one, else `name0`, `name1` and so on."""
    names = [name] if count == 1 else [f"{name}{place}" for place in range(count)]
    return tuple(Column(each, "number", ()) for each in names)
