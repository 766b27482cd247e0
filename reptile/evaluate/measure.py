"""Running test tasks: the predictions of each method for every query, and their scores.

Keeps predictions rather than scores, so that every number and picture comes from the same tasks.
Writes no files.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reptile.data.dataset import Inputs, PreparedData
from reptile.errors import InputError
from reptile.evaluate.baselines import train_jointly
from reptile.evaluate.fits import Fit, fit_curves
from reptile.evaluate.metrics import Score
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo
from reptile.learn.engines import Engine, choose_device, make_engine
from reptile.learn.optimizer import fresh_state
from reptile.learn.reptile import MetaState
from reptile.learn.validate import TASKS_AT_ONCE
from reptile.minibatches import IntArray
from reptile.models import initialise, mask_absent_outputs
from reptile.objectives import CLASSIFICATION, REGRESSION, Objective
from reptile.settings import BATCH_NORM_MODES, BatchNormMode, EvaluateSettings
from reptile.tasks import (
    FewShotProtocol,
    Purpose,
    Task,
    check_classes,
    held_out_task,
    random_stream,
)

log = logging.getLogger(__name__)

Starts = dict["Start", MetaState]

FloatArray = npt.NDArray[np.float64]
Start = Literal["trained", "random", "joint"]
STARTS: Mapping[Objective, tuple[Start, ...]] = {
    CLASSIFICATION: ("trained", "random"),
    REGRESSION: ("trained", "random", "joint"),
}

PATH_TASKS = 3 * TASKS_AT_ONCE  # also scored at these steps
PATH_STEPS = (0, 1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500, 800)
FITS = 6  # tasks whose functions are drawn
PATH_MODES: tuple[BatchNormMode, ...] = ("transductive", "frozen")


@dataclass(frozen=True)
class Measurement:
    """Every prediction on one dataset at one number of shots: T tasks of Q queries."""

    dataset: str
    objective: Objective
    shots: int
    tasks: tuple[Task, ...]
    logits: Mapping[tuple[Start, BatchNormMode], FloatArray]  # [T, Q, outputs], after all steps
    baseline: FloatArray  # [T] scores of a method without a network, see `BASELINES`
    steps: tuple[int, ...] = ()  # where `by_step` was measured; empty on cross-domain data
    by_step: Mapping[tuple[Start, BatchNormMode], FloatArray] = field(default_factory=dict)
    """Score of each of the first tasks after so many steps, [steps, first tasks]."""

    def scores(self, start: Start, mode: BatchNormMode) -> FloatArray:
        """Return each task's share of right answers, or its mean squared error, [T]."""
        targets = np.stack([task.query_targets for task in self.tasks])
        return self.objective.scores(self.logits[start, mode], targets)

    def score(self, start: Start, mode: BatchNormMode) -> Score:
        """Return the mean score of one initialisation in one mode of batch norm."""
        return Score.of(self.scores(start, mode))

    def gain(self, mode: BatchNormMode) -> Score:
        """Return trained against random, task by task: the same tasks narrow the interval."""
        trained, random = (self.scores(start, mode) for start in ("trained", "random"))
        return Score.of(self.objective.gain(trained, random))

    def baseline_score(self) -> Score:
        """Return the mean score of the method without a network."""
        return Score.of(self.baseline)


@dataclass(frozen=True)
class Evaluation:
    """All measurements, and what the report needs to show them."""

    settings: EvaluateSettings
    checkpoint: CheckpointInfo
    data: Mapping[str, PreparedData]  # the held-out split's dataset first, then cross-domain
    measurements: tuple[Measurement, ...]  # by dataset, then by shots
    skipped: Mapping[str, str]  # cross-domain datasets that cannot make these tasks, and why
    has_batch_norm: bool
    fits: tuple[Fit, ...] = ()  # of the first tasks, where inputs are single numbers

    @property
    def adaptations(self) -> int:
        """How many tasks were adapted to, from each start."""
        return len(self.starts) * sum(len(measured.tasks) for measured in self.measurements)

    @property
    def objective(self) -> Objective:
        """Of the tasks."""
        return self.checkpoint.objective

    @property
    def starts(self) -> tuple[Start, ...]:
        """What adaptation started from."""
        return STARTS[self.objective]

    @property
    def held_out(self) -> tuple[Measurement, ...]:
        """The measurements on held-out classes of the training data."""
        return self.of(next(iter(self.data)))

    def of(self, dataset: str) -> tuple[Measurement, ...]:
        """The measurements on one dataset, fewest shots first."""
        return tuple(m for m in self.measurements if m.dataset == dataset)

    @property
    def fewest_classes(self) -> str:
        """The dataset with the most readable confusion matrix."""
        return min(self.data, key=lambda name: len(self.data[name].split("test").starts))

    @property
    def modes(self) -> tuple[BatchNormMode, ...]:
        """The modes to show: without batch norm all three are the same."""
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
    """Measure few-shot scores on the held-out classes and on every cross-domain dataset.

    Each task is adapted to from the checkpoint's weights and optimiser state, from the random
    weights its training began with and a fresh state, and, of a regressor, from a network trained
    on all training tasks at once; then the queries are predicted in all modes of batch norm.
    No state passes from one task to the next.

    Args:
        settings: the protocol.
        checkpoint: the meta-trained initialisation.
        data: what it was trained on; its test split makes tasks.
        cross_domain: further datasets of the same image shape, by name; likewise.
        on_progress: called with the number of adaptations done, and the total.
        ways: classes of a task, if fewer than the checkpoint was trained for; the head's other
            outputs are then masked, as in the bundle.

    Raises:
        InputError: more ways than the checkpoint has, the held-out classes cannot make the tasks,
            or a cross-domain dataset has another image shape or the name of the training data.
    """
    head, objective = checkpoint.info.settings.ways, checkpoint.info.objective
    ways, shots = ways or head, sorted(set(settings.shots))
    least = 2 if objective is CLASSIFICATION else 1
    if not least <= ways <= head:
        raise InputError(
            f"{ways}-way tasks: the checkpoint is for {least} to {head} ways; train another"
        )
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
        except InputError as error:  # measure the rest
            skipped[name] = str(error)
            log.warning("%s; not measured", error)
        else:
            sources[name] = source

    total = len(sources) * len(shots) * len(STARTS[objective]) * settings.tasks
    done = 0

    def count(tasks: int) -> None:
        nonlocal done
        done += tasks
        if on_progress:
            on_progress(done, total)

    measurements = []
    starts = _starts(checkpoint, data)
    for name, source in sources.items():
        runner = _Runner(settings, checkpoint, source, ways, count, starts)
        path = _path(settings.steps) if name == data.name else ()
        measurements += [runner.measure(name, number, path) for number in shots]
    held_out = _Runner(settings, checkpoint, data, ways, count, starts)
    return Evaluation(
        settings,
        checkpoint.info,
        sources,
        tuple(measurements),
        skipped,
        checkpoint.model.has_batch_norm,
        held_out.fits(measurements[0].tasks),
    )


def _starts(checkpoint: Checkpoint, data: PreparedData) -> Starts:
    """Return where adaptation starts, on the device that the checkpoint was trained for."""
    model, (weights, inner), info = checkpoint.model, checkpoint.meta, checkpoint.info
    device = choose_device(info.settings.device)
    random = initialise(model, info.settings.seed).to(device)
    starts: Starts = {
        "trained": MetaState(
            weights.to(device), inner._replace(second_moment=inner.second_moment.to(device))
        ),
        "random": MetaState(random, fresh_state(random)),
    }
    if "joint" in STARTS[info.objective]:
        starts["joint"] = train_jointly(info.settings, _engine(checkpoint, data), random, data)
    return starts


def _engine(checkpoint: Checkpoint, data: PreparedData) -> Engine:
    training = checkpoint.info.settings
    device = choose_device(training.device)
    return make_engine(training.engine, checkpoint.model, training.optimizer, data.images, device)


class _Runner:
    """Measures one dataset from all starts."""

    def __init__(
        self,
        settings: EvaluateSettings,
        checkpoint: Checkpoint,
        data: PreparedData,
        ways: int,
        count: Callable[[int], None],
        starts: Starts,
    ) -> None:
        self._objective = checkpoint.info.objective
        self._engine = _engine(checkpoint, data)
        self._settings, self._data, self._ways, self._count = settings, data, ways, count
        self._starts = starts

    def measure(self, name: str, shots: int, path: tuple[int, ...]) -> Measurement:
        """Run all tasks at one number of shots; score the first ones along `path`."""
        settings, ways, objective = self._settings, self._ways, self._objective
        tasks = self._tasks(shots, ways)
        targets = np.stack([task.query_targets for task in tasks[:PATH_TASKS]])
        logits: dict[tuple[Start, BatchNormMode], FloatArray] = {}
        by_step: dict[tuple[Start, BatchNormMode], FloatArray] = {}
        for start, whole in self._starts.items():
            state = self._masked(whole, ways)
            first = list(self._adapt(state, tasks[:PATH_TASKS], path or (settings.steps,), ways))
            rest = list(self._adapt(state, tasks[PATH_TASKS:], (settings.steps,), ways))
            for mode in BATCH_NORM_MODES:
                logits[start, mode] = np.concatenate([chunk[-1][mode] for chunk in first + rest])
            for mode in PATH_MODES if path else ():
                along = [
                    np.concatenate([chunk[i][mode] for chunk in first]) for i in range(len(path))
                ]
                by_step[start, mode] = np.stack(
                    [objective.scores(outputs, targets) for outputs in along]
                )
        baseline = BASELINES[objective].score
        without = np.array([baseline(self._data.images, task, ways) for task in tasks])
        return Measurement(name, objective, shots, tuple(tasks), logits, without, path, by_step)

    def fits(self, tasks: Sequence[Task]) -> tuple[Fit, ...]:
        """Return the functions that the meta-trained network learns on the first tasks."""
        if self._objective is CLASSIFICATION or math.prod(self._data.image_shape) > 1:
            return ()
        path = sorted({0, min(1, self._settings.steps), self._settings.steps})
        along = adapt_along(self._engine, self._starts["trained"], tasks[:FITS], path)
        return fit_curves(self._engine.model, self._data, tasks[:FITS], dict(along))

    def _tasks(self, shots: int, ways: int) -> list[Task]:
        settings, classes = self._settings, self._data.split("test")
        protocol = FewShotProtocol.of(settings, ways, shots)
        streams = (
            random_stream(settings.seed, Purpose.EVALUATE, shots, i) for i in range(settings.tasks)
        )
        return [held_out_task(stream, classes, protocol) for stream in streams]

    def _masked(self, state: MetaState, ways: int) -> MetaState:
        """Mask the outputs beyond the tasks' classes."""
        model = self._engine.model
        if self._objective is not CLASSIFICATION or ways == model.outputs:
            return state
        present = torch.arange(model.outputs, device=state.weights.device) < ways
        return state._replace(weights=mask_absent_outputs(model, state.weights, present))

    def _adapt(
        self, state: MetaState, tasks: Sequence[Task], path: tuple[int, ...], ways: int
    ) -> Iterator[list[dict[BatchNormMode, FloatArray]]]:
        """Yield for each chunk of tasks, for each number of steps in `path`, the logits by mode."""
        for first in range(0, len(tasks), TASKS_AT_ONCE):
            chunk = tasks[first : first + TASKS_AT_ONCE]
            yield [
                {
                    mode: self._predict(weights, chunk, mode, ways)
                    for mode in (BATCH_NORM_MODES if step == path[-1] else PATH_MODES)
                }
                for step, weights in adapt_along(self._engine, state, chunk, path)
            ]
            self._count(len(chunk))

    def _predict(
        self, weights: Tensor, tasks: Sequence[Task], mode: BatchNormMode, ways: int
    ) -> FloatArray:
        """Return the logits [T, Q, ways] or values of all queries, given weights [T, P]."""
        logits = self._engine.predict(weights, tasks, mode)
        if self._objective is CLASSIFICATION:
            logits = logits[..., :ways]
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


class Baseline(NamedTuple):
    """A method without a network: its name in metrics.json, for people, and its score of a task."""

    name: str
    title: str
    score: Callable[[Inputs, Task, int], float]


def nearest_mean_accuracy(images: Inputs, task: Task, ways: int) -> float:
    """Return the share of queries that `nearest_mean` labels correctly."""
    return float((nearest_mean(images, task, ways) == task.query_targets).mean())


def zero_error(images: Inputs, task: Task, ways: int) -> float:
    """Return the mean squared error of always answering 0."""
    return float(np.square(task.query_targets, dtype=np.float64).mean())


def nearest_mean(images: Inputs, task: Task, ways: int) -> IntArray:
    """Label each query by the class whose mean support image is nearest in pixels, [Q]."""
    support = images[task.support].reshape(len(task.support), -1) / 255
    query = images[task.query].reshape(len(task.query), -1) / 255
    means = np.stack([support[task.support_targets == label].mean(0) for label in range(ways)])
    return np.asarray(np.square(query[:, None] - means).sum(-1).argmin(-1))


BASELINES: Mapping[Objective, Baseline] = {
    CLASSIFICATION: Baseline("nearest_mean", "nearest mean", nearest_mean_accuracy),
    REGRESSION: Baseline("zero", "always zero", zero_error),
}


def _path(steps: int) -> tuple[int, ...]:
    """Return where accuracy is measured on the way to `steps`, which comes last."""
    return (*(step for step in PATH_STEPS if step < steps), steps)
