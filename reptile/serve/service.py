"""What the server does with a bundle, without HTTP: adapt, predict, run graphs as models."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from reptile.bundle_format import TensorType
from reptile.errors import DivergedError, InputError
from reptile.runtime import AdaptedModel, FewShotModel
from reptile.runtime.inputs import check_images, check_learning_rate
from reptile.runtime.provider import run_within
from reptile.serve.pixels import whole_pixels
from reptile.serve.settings import ServeSettings
from reptile.serve.task_store import AdaptedTask, StorageError, TaskStore, check_labels
from reptile.serve.workers import Adapter, Predictor

Array = npt.NDArray[Any]

GRAPHS = {"gradient": ("few_shot", "predict"), "closed_form": ("few_shot", "embed")}
"""The graphs that are served as models, by how the bundle learns."""
IMAGES = {"images", "support_images", "query_images"}  # inputs that hold pixels
TASK = "task-"  # prefix of the model name of an adapted task; its id follows


class UnknownError(Exception):
    """There is no such model or task."""


class ConflictError(Exception):
    """Another request changed the same task first."""


class Service:
    """A bundle being served.

    Raises:
        InputError: the bundle takes no images, or the folder of the kept tasks cannot be used.
    """

    def __init__(self, model: FewShotModel, settings: ServeSettings) -> None:
        self.model, self.settings = model, settings
        _ = model.pixel_shape  # refuses other bundles before any folder is touched
        self.store = TaskStore(settings)
        self.store.load(model)
        self.adapter = Adapter(settings)
        self.predictor = Predictor(settings)
        self.ready = False
        self.graphs = GRAPHS[model.bundle.learner]
        self._sessions = {
            name: model.bundle.open(name, threads=1, providers=None) for name in self.graphs
        }

    async def start(self) -> None:
        """Run every graph once, so that no request pays for it."""
        images = np.zeros((2, *self.model.pixel_shape), dtype=np.uint8)
        steps = 1 if self.model.bundle.learner == "gradient" else None
        adapted = await self.adapter.run(lambda _: self.model.adapt(images, [0, 1], steps=steps))
        await self.adapter.run(lambda _: adapted.specialized())
        await self.predictor.predict(adapted, images)
        self.ready = True

    def close(self) -> None:
        """Stop taking work; wait for what runs."""
        self.ready = False
        self.adapter.close()
        self.predictor.close()
        self.store.close()

    def images(self, values: Any) -> Array:
        """Return images as uint8 or float32 [N, C, H, W].

        Raises:
            InputError: not images of this bundle, none, or too many.
        """
        shape = self.model.pixel_shape
        images = whole_pixels(values, shape)
        if images is None:
            images = check_images(values, shape)
        if not 1 <= len(images) <= self.settings.max_images:
            raise InputError(
                f"{len(images)} images: give 1 to {self.settings.max_images} in one request"
            )
        return images.astype(np.float32 if images.dtype.kind == "f" else np.uint8)

    async def adapt(self, images: Array, labels: list[Any], **options: Any) -> AdaptedTask:
        """Adapt to a new task and keep it; once it returns, it survives a restart.

        A closed-form bundle has no steps, so their options have no effect: a client need not know
        which kind of bundle is served.

        Raises:
            BusyError: too many adaptations are waiting.
            TimeoutError: not done in time.
            InputError: arguments that cannot be used, or an adaptation that diverged.
        """
        check_labels(labels)
        if self.model.bundle.learner == "closed_form":
            options = {}
        loop = asyncio.get_running_loop()

        def work(seconds: float) -> AdaptedTask:
            adapted = self.model.adapt(images, labels, timeout=seconds, **options)
            task = self.store.write(adapted)
            # Even if its client has gone by now: what is on disk is in memory.
            loop.call_soon_threadsafe(self.store.add, task)
            return task

        return await self.adapter.run(work)

    async def add(self, name: str, images: Array, labels: list[Any]) -> AdaptedTask:
        """Add examples, of its classes or of new ones, to a task of a closed-form bundle.

        Raises:
            As `adapt`; and UnknownError, ConflictError: see there.
        """
        check_labels([*self.task(name).model.labels, *labels])
        return await self._change(
            name, lambda model, seconds: model.add(images, labels, timeout=seconds)
        )

    async def remove(self, name: str, label: str) -> AdaptedTask:
        """Remove a class, given as text, from a task of a closed-form bundle.

        Raises:
            As `add`.
        """
        labels = {str(each): each for each in self.task(name).model.labels}
        if label not in labels:
            raise UnknownError(
                f"no label {label[:50]!r}: GET /tasks/{name} lists the task's labels"
            )
        return await self._change(
            name, lambda model, seconds: model.remove(labels[label], timeout=seconds)
        )

    async def _change(
        self, name: str, change: Callable[[AdaptedModel, float], AdaptedModel]
    ) -> AdaptedTask:
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
        adapted = self._adapted(name)
        shape = (None, *self.model.pixel_shape)
        outputs = TensorType("float32", (None, len(adapted.labels)))
        return {"images": TensorType("float32", shape)}, {
            "probabilities": outputs,
            "logits": outputs,
        }

    async def predict(self, name: str, images: Array) -> dict[str, Array]:
        """Run the model of an adapted task on images of its type and shape.

        Raises:
            UnknownError, BusyError, InputError: see there.
        """
        named = await self.predictor.predict(self._adapted(name), self.images(images))
        return named._asdict()

    async def run_graph(self, name: str, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run one of `graphs` on tensors of its types and shapes.

        Raises:
            BusyError, TimeoutError, DivergedError, InputError: see there.
        """
        for tensor in IMAGES & feeds.keys():
            feeds[tensor] = self.images(feeds[tensor]).astype(np.float32)
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
                else "check the images"
            )
            raise DivergedError(
                f"the adaptation diverged: its numbers are no longer finite; {way_out}"
            )
        return results

    def _adapted(self, name: str) -> AdaptedModel:
        if name.startswith(TASK):
            return self.task(name.removeprefix(TASK)).model
        raise UnknownError(
            f"no model {name[:50]!r}: there are {', '.join(self.graphs)}, and {TASK}ID for each "
            "task"
        )

    def _check_adaptation(self, feeds: Mapping[str, Array]) -> None:
        """Hold the graph's inputs to what it needs, as ONNX Runtime does not."""
        bundle, labels = self.model.bundle, feeds["support_labels"]
        support = len(feeds["support_images"])
        if len(labels) != support:
            raise InputError(f"{support} support images but {len(labels)} support_labels")
        if support > bundle.max_support:
            raise InputError(f"{support} support images: at most {bundle.max_support}")
        if labels.min() < 0 or labels.max() >= bundle.ways:
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
