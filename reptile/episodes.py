"""Few-shot tasks as index arrays into a prepared dataset: sampled, seeded, resumable.

Every task has its own random stream, keyed by (seed, purpose, iteration, number), so any task can
be drawn again without drawing those before it. No image is touched here.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reptile.config import EvaluateSettings, TrainSettings
from reptile.data.prepared import ClassRange
from reptile.errors import InputError
from reptile.minibatches import IntArray, mini_batches

Targets = npt.NDArray[Any]
"""Labels, int64 [S]; a regressor's values, float32 or float64 [S] or [S, outputs]."""


class Task(NamedTuple):
    """One task. Rows point into the prepared images; labels run over 0..ways-1, or are values."""

    support: IntArray  # [S] rows
    support_labels: Targets
    query: IntArray  # [Q] rows, none of them in the support set
    query_labels: Targets  # [Q]
    batches: tuple[IntArray, ...]  # positions in `support`, one array an inner step


class Purpose(IntEnum):
    """What a random stream is for; streams of different purposes never meet."""

    TRAIN = 0
    VALIDATE = 1
    EVALUATE = 2
    VERIFY = 3
    EXPORT = 4
    JOINT = 5


def random_stream(seed: int, purpose: Purpose, *numbers: int) -> np.random.Generator:
    """Return the generator of one task; the same arguments give the same stream anywhere."""
    return np.random.default_rng((seed, purpose, *numbers))


def sample_rows(rng: np.random.Generator, classes: ClassRange, ways: int, images: int) -> IntArray:
    """Draw `ways` classes in random order and `images` different images of each.

    Returns:
        rows [ways, images]: row w holds images of the class that gets label w, so each call is
        also a fresh random map from classes to labels.
    """
    chosen = rng.choice(len(classes.start), ways, replace=False)
    picks = [rng.choice(count, images, replace=False) for count in classes.count[chosen]]
    return np.asarray(classes.start[chosen][:, None] + np.stack(picks))


def targets(classes: ClassRange, rows: IntArray) -> Targets:
    """Return what is to be answered for rows [ways, images] of a task, flattened.

    Labels 0..ways-1, int64 [ways·images]; where the data has values to predict, these, float32
    [ways·images, outputs].
    """
    if classes.targets is None:
        return np.repeat(np.arange(len(rows)), rows.shape[1])
    return np.asarray(classes.targets[rows.ravel()])


def check_classes(classes: ClassRange, ways: int, images: int, what: str) -> None:
    """Refuse a split that cannot give a task of `ways` classes with `images` images each."""
    if len(classes.start) < ways:
        raise InputError(
            f"{what}: {len(classes.start)} classes cannot make a {ways}-way task; "
            "lower the ways or hold out more classes"
        )
    if classes.count.min() < images:
        raise InputError(
            f"{what}: a class has {classes.count.min()} images and a task needs {images} of each; "
            "lower the shots or queries"
        )


def training_task(
    classes: ClassRange, settings: TrainSettings, iteration: int, number: int
) -> Task:
    """Draw task `number` of a meta-iteration: train_shots images a class, and its mini-batches.

    With a FOMAML tail, the last mini-batch is `tail_shots` images of every class, kept out of the
    mini-batches before it.
    """
    rng = random_stream(settings.seed, Purpose.TRAIN, iteration, number)
    rows = sample_rows(rng, classes, settings.ways, settings.train_shots)
    labels = targets(classes, rows)
    positions = np.arange(rows.size).reshape(rows.shape)
    head = positions[:, settings.tail_shots :].ravel()
    steps = settings.inner_steps - bool(settings.tail_shots)
    drawn = mini_batches(rng, head.size, settings.inner_batch, steps, settings.replacement)
    batches = tuple(head[drawn])
    if settings.tail_shots:
        batches += (positions[:, : settings.tail_shots].ravel(),)
    nothing = np.empty(0, dtype=np.int64)
    return Task(rows.ravel(), labels, nothing, nothing, batches)


def meta_batches(
    classes: ClassRange, settings: TrainSettings, iterations: range
) -> Iterator[list[Task]]:
    """Yield the tasks of each meta-iteration; the next are drawn while these are learnt."""

    def draw(iteration: int) -> list[Task]:
        return [
            training_task(classes, settings, iteration, number)
            for number in range(settings.meta_batch)
        ]

    with ThreadPoolExecutor(1, "sampling") as sampler:
        drawn = sampler.submit(draw, iterations.start)
        for iteration in iterations:
            tasks = drawn.result()
            drawn = sampler.submit(draw, iteration + 1)
            yield tasks


class FewShotProtocol(NamedTuple):
    """How a test task is made and adapted to."""

    ways: int
    shots: int
    queries: int
    steps: int
    batch: int

    @classmethod
    def of(cls, settings: EvaluateSettings, ways: int, shots: int) -> "FewShotProtocol":
        """The evaluation's protocol at one number of shots."""
        return cls(ways, shots, settings.queries, settings.steps, settings.batch)


def held_out_task(rng: np.random.Generator, classes: ClassRange, protocol: FewShotProtocol) -> Task:
    """Draw a test task: `shots` support and `queries` query images of each class, all different."""
    ways, shots, queries, steps, batch = protocol
    rows = sample_rows(rng, classes, ways, shots + queries)
    support, query = rows[:, :shots], rows[:, shots:]
    return Task(
        support.ravel(),
        targets(classes, support),
        query.ravel(),
        targets(classes, query),
        tuple(mini_batches(rng, support.size, batch, steps)),
    )
