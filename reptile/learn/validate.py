"""The score of an initialisation on tasks, each adapted to separately.

The one number that training and verification need; `evaluate` measures more.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from reptile.learn.engines import Engine
from reptile.learn.reptile import MetaState
from reptile.objectives import Objective
from reptile.settings import BatchNormMode
from reptile.tasks import Task

TASKS_AT_ONCE = 32  # bounds the memory of adapted weights, whatever the number of tasks


def adapted_in_chunks(
    engine: Engine, state: MetaState, tasks: Sequence[Task]
) -> Iterator[tuple[Sequence[Task], Tensor]]:
    """Adapt to each task from the same start; yield some tasks with their weights [T, P]."""
    for start in range(0, len(tasks), TASKS_AT_ONCE):
        chunk = tasks[start : start + TASKS_AT_ONCE]
        yield chunk, engine.adapt(*state.starts(engine, chunk), chunk).weights


def mean_score(
    engine: Engine,
    state: MetaState,
    tasks: Sequence[Task],
    objective: Objective,
    mode: BatchNormMode = "transductive",
) -> float:
    """Adapt to each task and return the mean accuracy, or squared error, over all queries."""
    scores = []
    for chunk, weights in adapted_in_chunks(engine, state, tasks):
        targets = np.stack([task.query_targets for task in chunk])
        scores.append(
            objective.scores(engine.predict(weights, chunk, mode).double().cpu().numpy(), targets)
        )
    return float(np.concatenate(scores).mean())
