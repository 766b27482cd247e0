"""Learners of gradient steps on test tasks: their predictions, on the way and after all steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reptile.data.dataset import PreparedData
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.engines import Engine, choose_device, make_engine
from reptile.learn.reptile import MetaState
from reptile.learn.validate import TASKS_AT_ONCE
from reptile.models import mask_absent_outputs
from reptile.objectives import CLASSIFICATION
from reptile.settings import BATCH_NORM_MODES, BatchNormMode
from reptile.tasks import Task

PATH_TASKS = 3 * TASKS_AT_ONCE  # also scored at these steps
PATH_STEPS = (0, 1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500, 800)
PATH_MODES: tuple[BatchNormMode, ...] = ("transductive", "frozen")

FloatArray = npt.NDArray[np.float64]
Count = Callable[[int], None]
"""Called with the number of tasks done since the last call."""


class GradientLearner(NamedTuple):
    """Where gradient steps start, and the network and inner loop that they are taken with."""

    checkpoint: Checkpoint
    start: MetaState


class Predictions(NamedTuple):
    """The outputs [T, Q, outputs] by mode, and the scores [steps, first tasks] on the way."""

    outputs: Mapping[BatchNormMode, FloatArray]
    by_step: Mapping[BatchNormMode, FloatArray]


def engine_on(checkpoint: Checkpoint, data: PreparedData) -> Engine:
    """Return the engine of a checkpoint's training, on this data."""
    training = checkpoint.info.settings
    device = choose_device(training.device)
    return make_engine(training.engine, checkpoint.model, training.optimizer, data.images, device)


def run(
    learner: GradientLearner,
    engine: Engine,
    tasks: Sequence[Task],
    ways: int,
    steps: int,
    path: Sequence[int] = (),
    modes: Sequence[BatchNormMode] = BATCH_NORM_MODES,
    count: Count = lambda tasks: None,
) -> Predictions:
    """Adapt to each task from the same start and predict its queries.

    Args:
        learner: where to start.
        engine: of its network, on the tasks' data.
        tasks: T tasks.
        ways: classes of a task; the head's other outputs are masked, as in the bundle.
        steps: inner steps.
        path: numbers of steps at which the first tasks are scored too; `steps` comes last.
        modes: of batch norm.
        count: called with the number of tasks done.
    """
    objective, state = engine.model.objective, _masked(learner.start, engine, ways)
    first = list(_chunks(engine, state, tasks[:PATH_TASKS], path or (steps,), ways, modes, count))
    rest = list(_chunks(engine, state, tasks[PATH_TASKS:], (steps,), ways, modes, count))
    outputs = {mode: np.concatenate([chunk[-1][mode] for chunk in first + rest]) for mode in modes}
    if not path:
        return Predictions(outputs, {})
    targets = np.stack([task.query_targets for task in tasks[:PATH_TASKS]])
    along = {
        mode: [np.concatenate([chunk[i][mode] for chunk in first]) for i in range(len(path))]
        for mode in PATH_MODES
    }
    by_step = {
        mode: np.stack([objective.scores(outputs, targets) for outputs in each])
        for mode, each in along.items()
    }
    return Predictions(outputs, by_step)


def _chunks(
    engine: Engine,
    state: MetaState,
    tasks: Sequence[Task],
    path: Sequence[int],
    ways: int,
    modes: Sequence[BatchNormMode],
    count: Count,
) -> Iterator[list[dict[BatchNormMode, FloatArray]]]:
    """Yield for each chunk of tasks, for each number of steps in `path`, the outputs by mode."""
    for first in range(0, len(tasks), TASKS_AT_ONCE):
        chunk = tasks[first : first + TASKS_AT_ONCE]
        yield [
            {
                mode: _predict(engine, weights, chunk, mode, ways)
                for mode in (modes if step == path[-1] else PATH_MODES)
            }
            for step, weights in adapt_along(engine, state, chunk, path)
        ]
        count(len(chunk))


def _predict(
    engine: Engine, weights: Tensor, tasks: Sequence[Task], mode: BatchNormMode, ways: int
) -> FloatArray:
    """Return the logits [T, Q, ways] or values of all queries, given weights [T, P]."""
    logits = engine.predict(weights, tasks, mode)
    if engine.model.objective is CLASSIFICATION:
        logits = logits[..., :ways]
    return logits.double().cpu().numpy()


def _masked(state: MetaState, engine: Engine, ways: int) -> MetaState:
    """Mask the outputs beyond the tasks' classes."""
    model = engine.model
    if model.objective is not CLASSIFICATION or ways == model.outputs:
        return state
    present = torch.arange(model.outputs, device=state.weights.device) < ways
    return state._replace(weights=mask_absent_outputs(model, state.weights, present))


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
    weights, inner = state.starts(engine, tasks)
    weights, done = weights.expand(len(tasks), -1), 0
    inner = inner._replace(second_moment=inner.second_moment.expand(len(tasks), -1))
    for step in path:
        if step > done:
            parts = [task._replace(batches=task.batches[done:step]) for task in tasks]
            weights, inner, _ = engine.adapt(weights, inner, parts)
            done = step
        yield step, weights


def path_to(steps: int) -> tuple[int, ...]:
    """Return where scores are measured on the way to `steps`, which comes last."""
    return (*(step for step in PATH_STEPS if step < steps), steps)
