"""The accuracy of an initialisation on tasks, each adapted to on its own.

The one number that training and verification need; `evaluate` measures and shows far more.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from reptile.config import BatchNormMode
from reptile.episodes import Task
from reptile.learn.engine import Engine
from reptile.learn.meta import MetaState

TASKS_AT_ONCE = 32  # bounds the memory of adapted weights, whatever the number of tasks


def adapted_in_chunks(
    engine: Engine, state: MetaState, tasks: Sequence[Task]
) -> Iterator[tuple[Sequence[Task], Tensor]]:
    """Adapt to each task from the same start; yield some tasks with their weights [T, P]."""
    for start in range(0, len(tasks), TASKS_AT_ONCE):
        chunk = tasks[start : start + TASKS_AT_ONCE]
        yield chunk, engine.adapt(*state, chunk).weights


def accuracy(engine: Engine, state: MetaState, tasks: Sequence[Task], mode: BatchNormMode) -> float:
    """Adapt to each task and return the share of all queries predicted right."""
    right = total = 0
    for chunk, weights in adapted_in_chunks(engine, state, tasks):
        labels = np.stack([task.query_labels for task in chunk])
        predicted = engine.predict(weights, chunk, mode).argmax(-1).cpu().numpy()
        right += int((predicted == labels).sum())
        total += labels.size
    return right / total
