"""Predicting with adapted weights: the three ways of batch norm, and accuracy on tasks.

- transductive: all queries in one forward pass; batch norm sees them all together.
- non_transductive: each query in a forward pass together with the whole support set.
- frozen: batch norm uses the support set's statistics; queries are independent of each other.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from reptile.config import BatchNormMode
from reptile.episodes import Task
from reptile.learn.engine import Engine
from reptile.learn.meta import MetaState
from reptile.models import Model, Params, unflatten

TASKS_AT_ONCE = 32  # bounds the memory of adapted weights, whatever the number of tasks


def query_logits(
    model: Model, params: Params, support: Tensor, queries: Tensor, mode: BatchNormMode
) -> Tensor:
    """Return logits [Q, ways] of query images [Q, C, H, W], given the support images [S, …]."""
    if mode == "transductive":
        return model.logits(params, queries)
    if mode == "frozen":
        return model.logits(params, queries, model.statistics(params, support))
    alone = [model.logits(params, torch.cat([support, query[None]]))[-1] for query in queries]
    return torch.stack(alone)


def adapted_in_chunks(
    engine: Engine, state: MetaState, tasks: Sequence[Task]
) -> Iterator[tuple[Task, Tensor]]:
    """Adapt to each task from the same initialisation and state; yield it with its weights [P]."""
    for start in range(0, len(tasks), TASKS_AT_ONCE):
        chunk = tasks[start : start + TASKS_AT_ONCE]
        yield from zip(chunk, engine.adapt(*state, chunk).weights, strict=True)


@torch.no_grad()
def predict(engine: Engine, weights: Tensor, task: Task, mode: BatchNormMode) -> Tensor:
    """Return the logits [Q, ways] of a task's queries under its adapted weights [P]."""
    params = unflatten(engine.model, weights)
    return query_logits(
        engine.model, params, engine.images(task.support), engine.images(task.query), mode
    )


def accuracy(engine: Engine, state: MetaState, tasks: Sequence[Task], mode: BatchNormMode) -> float:
    """Adapt to each task and return the share of all queries predicted right."""
    right = total = 0
    for task, weights in adapted_in_chunks(engine, state, tasks):
        labels = torch.from_numpy(task.query_labels).to(weights.device)
        right += int((predict(engine, weights, task, mode).argmax(1) == labels).sum())
        total += len(labels)
    return right / total
