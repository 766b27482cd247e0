"""Few-shot tasks as index arrays into a prepared dataset: sampled, seeded, resumable.

Every meta-batch and every test task has its own random stream, keyed by (seed, purpose, number), so
each can be drawn independently of the others. No image is read here.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reptile.data.dataset import ClassRange
from reptile.errors import InputError
from reptile.minibatches import IntArray, mini_batches
from reptile.settings import EvaluateSettings, TrainSettings

Targets = npt.NDArray[Any]
"""Labels, int64 [S]; a regressor's values, float32 or float64 [S] or [S, outputs]."""


class Task(NamedTuple):
    """One task. Rows point into the prepared images; labels run over 0..ways-1, or are values."""

    support: IntArray  # [S] rows
    support_targets: Targets
    query: IntArray  # [Q] rows, none of them in the support set
    query_targets: Targets  # [Q]
    batches: tuple[IntArray, ...]  # positions in `support`, one array an inner step


class Purpose(IntEnum):
    """What a random stream is for; streams of different purposes are independent."""

    TRAIN = 0
    VALIDATE = 1
    EVALUATE = 2
    VERIFY = 3
    EXPORT = 4
    JOINT = 5
    STATISTICS = 6
    CHOOSE = 7


def random_stream(seed: int, purpose: Purpose, *numbers: int) -> np.random.Generator:
    """Return a generator; the same arguments give the same stream anywhere."""
    return np.random.default_rng((seed, purpose, *numbers))


def sample_rows(
    rng: np.random.Generator, classes: ClassRange, tasks: int, ways: int, images: int
) -> IntArray:
    """Draw for each task `ways` classes in random order and `images` different images of each.

    Returns:
        rows [tasks, ways, images]: row w of a task holds images of the class that gets label w, so
        each call is also a fresh random map from classes to labels.
    """
    chosen = _distinct(rng, np.full(tasks, len(classes.starts)), ways)
    picks = _distinct(rng, classes.counts[chosen].ravel(), images)
    return np.asarray(classes.starts[chosen][..., None] + picks.reshape(tasks, ways, images))


def _distinct(rng: np.random.Generator, ends: IntArray, size: int) -> IntArray:
    """Draw `size` different numbers below each of the `ends` [N]; the time depends on `size` alone.

    All outcomes [N, size] are equally likely.
    """
    drawn = np.empty((len(ends), size), dtype=np.int64)
    few = ends <= 8 * size
    if few.any():  # permute all
        keys = rng.random((np.count_nonzero(few), ends[few].max()))
        keys[np.arange(keys.shape[1]) >= ends[few, None]] = 1
        drawn[few] = np.argsort(keys, axis=1)[:, :size]
    if not few.all():  # redraw repeats
        many = np.repeat(ends[~few, None], size, axis=1)
        candidates = rng.integers(many)
        while (again := _repeated(candidates)).any():
            candidates[again] = rng.integers(many[again])
        drawn[~few] = candidates
    return drawn


def _repeated(values: IntArray) -> npt.NDArray[np.bool_]:
    """Mark repeated values in each row [N, size]."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    marks = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(marks, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return marks


def targets(classes: ClassRange, rows: IntArray) -> Targets:
    """Return the targets of rows [ways, images] of a task, flattened.

    Labels 0..ways-1, int64 [ways·images]; where the data has values to predict, these, float32
    [ways·images, outputs].
    """
    if classes.targets is None:
        return np.repeat(np.arange(len(rows)), rows.shape[1])
    return np.asarray(classes.targets[rows.ravel()])


def check_classes(classes: ClassRange, ways: int, images: int, what: str) -> None:
    """Refuse a split that cannot give a task of `ways` classes with `images` images each."""
    if len(classes.starts) < ways:
        raise InputError(
            f"{what}: {len(classes.starts)} classes cannot make a {ways}-way task; "
            "lower the ways or hold out more classes"
        )
    if classes.counts.min() < images:
        raise InputError(
            f"{what}: a class has {classes.counts.min()} images and a task needs {images} of each; "
            "lower the shots or queries"
        )


def check_ways(training: TrainSettings, least: int, ways: int) -> None:
    """Refuse to evaluate tasks of more classes than a network that is trained so has outputs.

    Raises:
        InputError: it has fewer, or a task has fewer than the `least` of its objective.
    """
    if not training.closed_form and not least <= ways <= training.ways:
        raise InputError(
            f"{ways}-way tasks: {training.algorithm} trained with {training.ways} ways is for "
            f"{least} to {training.ways} ways; change evaluate.ways, or train another"
        )
    if ways < least:
        raise InputError(f"{ways}-way tasks: give at least {least} ways")
    if least == 1 < ways:
        raise InputError(f"{ways}-way tasks: a task of values has one way; leave evaluate.ways out")


def training_tasks(classes: ClassRange, settings: TrainSettings, iteration: int) -> list[Task]:
    """Draw the tasks of a meta-iteration: train_shots images a class, and their mini-batches.

    With a FOMAML tail, the last mini-batch is `tail_shots` images of every class, kept out of the
    mini-batches before it; where the rows are ordered, they are the latest ones.
    """
    rng = random_stream(settings.seed, Purpose.TRAIN, iteration)
    ways, shots, tail = settings.ways, settings.train_shots, settings.tail_shots
    rows = sample_rows(rng, classes, settings.meta_batch, ways, shots)
    if classes.ordered:
        rows = np.sort(rows)[..., ::-1]  # the tail is taken from the front
    positions = np.arange(ways * shots).reshape(ways, shots)
    head, last = positions[:, tail:].ravel(), (positions[:, :tail].ravel(),) if tail else ()
    steps = settings.inner_steps - len(last)
    no_rows = np.empty(0, dtype=np.int64)
    tasks = []
    for task_rows in rows:
        drawn = mini_batches(rng, head.size, settings.inner_batch, steps, settings.replacement)
        support = task_rows.ravel(), targets(classes, task_rows)
        tasks.append(Task(*support, no_rows, no_rows, (*head[drawn], *last)))
    return tasks


def episodes(classes: ClassRange, settings: TrainSettings, iteration: int) -> list[Task]:
    """Draw the tasks with queries of a meta-iteration, all of the same number of shots."""
    rng = random_stream(settings.seed, Purpose.TRAIN, iteration)
    episode = settings.episode
    shots, steps, batch = int(rng.choice(episode.shots)), 0, 1
    if settings.second_order:
        shots, steps = settings.train_shots, settings.inner_steps
        batch = min(settings.inner_batch, settings.ways * shots)
    protocol = FewShotProtocol(settings.ways, shots, episode.queries, steps, batch)
    return [held_out_task(rng, classes, protocol, any_cut=True) for _ in range(settings.meta_batch)]


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


def held_out_task(
    rng: np.random.Generator,
    classes: ClassRange,
    protocol: FewShotProtocol,
    *,
    any_cut: bool = False,
) -> Task:
    """Draw a test task: `shots` support and `queries` query images of each class, all different.

    Where the rows are ordered, the support set is the first `shots` of a class and the queries are
    any later ones. With `any_cut`, as in training, the support set is the last `shots` before a
    random cut that leaves enough later ones.
    """
    ways, shots, queries, steps, batch = protocol
    if classes.ordered:
        rows = _ordered_rows(rng, classes, protocol, any_cut)
    else:
        (rows,) = sample_rows(rng, classes, 1, ways, shots + queries)
    support, query = rows[:, :shots], rows[:, shots:]
    return Task(
        support.ravel(),
        targets(classes, support),
        query.ravel(),
        targets(classes, query),
        tuple(mini_batches(rng, support.size, batch, steps)),
    )


def _ordered_rows(
    rng: np.random.Generator, classes: ClassRange, protocol: FewShotProtocol, any_cut: bool
) -> IntArray:
    """Draw rows [ways, shots + queries] of different classes, the queries all after the support."""
    ways, shots, queries = protocol[:3]
    (chosen,) = _distinct(rng, np.array([len(classes.starts)]), ways)
    counts = classes.counts[chosen]
    cuts = rng.integers(shots, counts - queries + 1) if any_cut else np.full(ways, shots)
    support = cuts[:, None] - shots + np.arange(shots)
    query = cuts[:, None] + _distinct(rng, counts - cuts, queries)
    return np.asarray(classes.starts[chosen, None] + np.concatenate([support, query], axis=1))
