"""Running test tasks: what each method predicts for every query, and the accuracy that makes.

Keeps predictions rather than scores, so that every number and picture comes from the same tasks.
Writes nothing.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from reptile.config import BATCH_NORM_MODES, BatchNormMode, EvaluateSettings
from reptile.data.prepared import Inputs, PreparedData
from reptile.episodes import (
    FewShotProtocol,
    Purpose,
    Task,
    check_classes,
    held_out_task,
    random_stream,
)
from reptile.errors import InputError
from reptile.learn.accuracy import TASKS_AT_ONCE
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo
from reptile.learn.engine import Engine, make_engine
from reptile.learn.inner import fresh_state
from reptile.learn.meta import MetaState
from reptile.learn.train import choose_device
from reptile.minibatches import IntArray
from reptile.models import initialise

log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float64]
Start = Literal["trained", "random"]
STARTS: tuple[Start, ...] = ("trained", "random")

PATH_TASKS = 3 * TASKS_AT_ONCE  # whose accuracy is also taken on the way, at these steps
PATH_STEPS = (0, 1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500, 800)
PATH_MODES: tuple[BatchNormMode, ...] = ("transductive", "frozen")


class Score(NamedTuple):
    """A mean over tasks, and half the width of its 95 % interval."""

    mean: float
    interval: float

    @classmethod
    def of(cls, values: FloatArray) -> "Score":
        """Score one value a task, [T] with T >= 2: 1.96·s/√T, s with T - 1 in its denominator."""
        return cls(float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Measurement:
    """Every prediction on one dataset at one number of shots: T tasks of Q queries."""

    dataset: str
    shots: int
    tasks: tuple[Task, ...]
    logits: Mapping[tuple[Start, BatchNormMode], FloatArray]  # [T, Q, ways], after all steps
    nearest_mean: IntArray  # [T, Q] labels
    steps: tuple[int, ...] = ()  # where `by_step` was measured; empty on cross-domain data
    by_step: Mapping[tuple[Start, BatchNormMode], FloatArray] = field(default_factory=dict)
    """Accuracy of each of the first tasks after so many steps, [steps, first tasks]."""

    def accuracies(self, start: Start, mode: BatchNormMode) -> FloatArray:
        """Return the share of right answers of each task [T]."""
        return self._share_right(self.logits[start, mode].argmax(-1))

    def score(self, start: Start, mode: BatchNormMode) -> Score:
        """Return the accuracy of one initialisation in one mode of batch norm."""
        return Score.of(self.accuracies(start, mode))

    def gain(self, mode: BatchNormMode) -> Score:
        """Return trained minus random, task by task: the same tasks make the interval narrower."""
        return Score.of(self.accuracies("trained", mode) - self.accuracies("random", mode))

    def nearest_mean_score(self) -> Score:
        """Return the accuracy of the nearest class mean of the pixels."""
        return Score.of(self._share_right(self.nearest_mean))

    def _share_right(self, predicted: IntArray) -> FloatArray:
        labels = np.stack([task.query_labels for task in self.tasks])
        return np.asarray((predicted == labels).mean(axis=1))


@dataclass(frozen=True)
class Evaluation:
    """All that was measured, and what the report needs to show it."""

    settings: EvaluateSettings
    checkpoint: CheckpointInfo
    data: Mapping[str, PreparedData]  # the held-out split's dataset first, then cross-domain
    measurements: tuple[Measurement, ...]  # by dataset, then by shots
    skipped: Mapping[str, str]  # cross-domain datasets that cannot make these tasks, and why
    has_batch_norm: bool

    @property
    def adaptations(self) -> int:
        """How many tasks were adapted to, from each start."""
        return len(STARTS) * sum(len(measured.tasks) for measured in self.measurements)

    @property
    def held_out(self) -> tuple[Measurement, ...]:
        """The measurements on held-out classes of the training data."""
        return self.of(next(iter(self.data)))

    def of(self, dataset: str) -> tuple[Measurement, ...]:
        """The measurements on one dataset, fewest shots first."""
        return tuple(m for m in self.measurements if m.dataset == dataset)

    @property
    def fewest_classes(self) -> str:
        """The dataset of which a confusion matrix is easiest to read."""
        return min(self.data, key=lambda name: len(self.data[name].split("test").start))

    @property
    def modes(self) -> tuple[BatchNormMode, ...]:
        """The modes worth showing: without batch norm all three are the same."""
        return BATCH_NORM_MODES if self.has_batch_norm else ("frozen",)


def evaluate(
    settings: EvaluateSettings,
    checkpoint: Checkpoint,
    data: PreparedData,
    cross_domain: Mapping[str, PreparedData],
    on_progress: Callable[[int, int], None] | None = None,
    *,
    ways: int | None = None,
) -> Evaluation:
    """Measure few-shot accuracy on the held-out classes and on every cross-domain dataset.

    Each task is adapted to from the checkpoint's weights and optimiser state, and from the random
    weights its training began with and a fresh state; then the queries are predicted in all modes
    of batch norm. Nothing passes from one task to the next.

    Args:
        settings: the protocol.
        checkpoint: the meta-trained initialisation.
        data: what it was trained on; its test split makes tasks.
        cross_domain: further datasets of the same image shape, by name; likewise.
        on_progress: told how many of how many adaptations are done.
        ways: classes of a task, if fewer than the checkpoint was trained for; the head's other
            outputs are then left out, as the bundle does.

    Raises:
        InputError: more ways than the checkpoint has, the held-out classes cannot make the tasks,
            or a cross-domain dataset has another image shape or the name of the training data.
    """
    head = checkpoint.info.settings.ways
    ways, shots = ways or head, sorted(set(settings.shots))
    if not 2 <= ways <= head:
        raise InputError(f"{ways}-way tasks: the checkpoint is for 2 to {head} ways; train another")
    classes, needed = data.split("test"), shots[-1] + settings.queries
    check_classes(classes, ways, needed, f"test split of {data.name}")
    sources = {data.name: data}
    skipped: dict[str, str] = {}
    for name, source in cross_domain.items():
        if name == data.name or source.image_shape != data.image_shape:
            raise InputError(
                f"cross-domain dataset {name} of image shape {source.image_shape}: it must have "
                f"another name than the training data and its image shape {data.image_shape}; "
                "change prepare.cross_domain"
            )
        try:
            check_classes(source.split("test"), ways, needed, f"cross-domain dataset {name}")
        except InputError as error:  # no reason to refuse what can be measured
            skipped[name] = str(error)
            log.warning("%s; not measured", error)
        else:
            sources[name] = source

    total = len(sources) * len(shots) * len(STARTS) * settings.tasks
    done = 0

    def count(tasks: int) -> None:
        nonlocal done
        done += tasks
        if on_progress:
            on_progress(done, total)

    measurements = []
    for name, source in sources.items():
        runner = _Runner(settings, checkpoint, source, ways, count)
        path = _path(settings.steps) if name == data.name else ()
        measurements += [runner.measure(name, number, path) for number in shots]
    has_batch_norm = any(name.startswith("norm") for name in checkpoint.model.shapes)
    return Evaluation(
        settings, checkpoint.info, sources, tuple(measurements), skipped, has_batch_norm
    )


class _Runner:
    """Measures one dataset from both starts."""

    def __init__(
        self,
        settings: EvaluateSettings,
        checkpoint: Checkpoint,
        data: PreparedData,
        ways: int,
        count: Callable[[int], None],
    ) -> None:
        training = checkpoint.info.settings
        device = choose_device(training.device)
        model, (weights, inner), _ = checkpoint
        random = initialise(model, training.seed).to(device)
        inner = inner._replace(second_moment=inner.second_moment.to(device))
        self._starts: dict[Start, MetaState] = {
            "trained": MetaState(weights.to(device), inner),
            "random": MetaState(random, fresh_state(random)),
        }
        self._engine = make_engine(training.engine, model, training.optimizer, data.images, device)
        self._settings, self._data, self._ways, self._count = settings, data, ways, count

    def measure(self, name: str, shots: int, path: tuple[int, ...]) -> Measurement:
        """Run all tasks at one number of shots; take the accuracy along `path` on the first."""
        settings, ways = self._settings, self._ways
        protocol = FewShotProtocol.of(settings, ways, shots)
        classes = self._data.split("test")
        tasks = [
            held_out_task(
                random_stream(settings.seed, Purpose.EVALUATE, shots, i), classes, protocol
            )
            for i in range(settings.tasks)
        ]
        labels = np.stack([task.query_labels for task in tasks[:PATH_TASKS]])
        logits: dict[tuple[Start, BatchNormMode], FloatArray] = {}
        by_step: dict[tuple[Start, BatchNormMode], FloatArray] = {}
        for start, state in self._starts.items():
            first = list(self._adapt(state, tasks[:PATH_TASKS], path or (settings.steps,)))
            rest = list(self._adapt(state, tasks[PATH_TASKS:], (settings.steps,)))
            for mode in BATCH_NORM_MODES:
                logits[start, mode] = np.concatenate([chunk[-1][mode] for chunk in first + rest])
            for mode in PATH_MODES if path else ():
                along = [
                    np.concatenate([chunk[i][mode] for chunk in first]) for i in range(len(path))
                ]
                by_step[start, mode] = (np.stack(along).argmax(-1) == labels).mean(-1)
        nearest = np.stack([nearest_mean(self._data.images, task, ways) for task in tasks])
        return Measurement(name, shots, tuple(tasks), logits, nearest, path, by_step)

    def _adapt(
        self, state: MetaState, tasks: Sequence[Task], path: tuple[int, ...]
    ) -> Iterator[list[dict[BatchNormMode, FloatArray]]]:
        """Yield for each chunk of tasks, for each number of steps in `path`, the logits by mode."""
        for first in range(0, len(tasks), TASKS_AT_ONCE):
            chunk = tasks[first : first + TASKS_AT_ONCE]
            yield [
                {
                    mode: self._predict(weights, chunk, mode)
                    for mode in (BATCH_NORM_MODES if step == path[-1] else PATH_MODES)
                }
                for step, weights in adapt_along(self._engine, state, chunk, path)
            ]
            self._count(len(chunk))

    def _predict(self, weights: Tensor, tasks: Sequence[Task], mode: BatchNormMode) -> FloatArray:
        """Return the logits [T, Q, ways] of all queries, given weights [T, P]."""
        logits = self._engine.predict(weights, tasks, mode)[..., : self._ways]
        return logits.double().cpu().numpy()


def adapt_along(
    engine: Engine, state: MetaState, tasks: Sequence[Task], path: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Adapt to tasks in one go, stopping on the way: yield (steps taken, weights [T, P]).

    Args:
        engine: runs the inner loops.
        state: where every task starts.
        tasks: T tasks.
        path: numbers of steps, ascending.
    """
    weights, inner = state
    weights, done = weights.expand(len(tasks), -1), 0
    inner = inner._replace(second_moment=inner.second_moment.expand(len(tasks), -1))
    for step in path:
        if step > done:
            parts = [task._replace(batches=task.batches[done:step]) for task in tasks]
            weights, inner, _ = engine.adapt(weights, inner, parts)
            done = step
        yield step, weights


def nearest_mean(images: Inputs, task: Task, ways: int) -> IntArray:
    """Label each query by the class whose mean support image is nearest in pixels, [Q]."""
    support = images[task.support].reshape(len(task.support), -1) / 255
    query = images[task.query].reshape(len(task.query), -1) / 255
    means = np.stack([support[task.support_labels == label].mean(0) for label in range(ways)])
    return np.asarray(np.square(query[:, None] - means).sum(-1).argmin(-1))


def _path(steps: int) -> tuple[int, ...]:
    """Return where accuracy is measured on the way to `steps`, which comes last."""
    return (*(step for step in PATH_STEPS if step < steps), steps)
