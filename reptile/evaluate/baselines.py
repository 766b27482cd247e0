"""Joint training: ordinary training on the pooled tasks, a baseline for Reptile.

All points of all training tasks are one set, as if of one function. Only for regression: labels of
classes differ from task to task, so classification tasks cannot be pooled.
"""

import numpy as np
import torch
from torch import Tensor

from reptile.data.dataset import PreparedData
from reptile.learn.engines import Engine
from reptile.learn.optimizer import OptimizerState, fresh_state
from reptile.learn.reptile import MetaState
from reptile.learn.step_sizes import untrained_start
from reptile.settings import TrainSettings
from reptile.tasks import Purpose, Task, random_stream

STEPS_AT_ONCE = 1000  # bounds the memory of a call


def train_jointly(
    settings: TrainSettings, engine: Engine, weights: Tensor, data: PreparedData
) -> MetaState:
    """Train from the same start with as many steps, of the same size, as meta-training took.

    Args:
        settings: of meta-training; its inner optimiser and mini-batches are used.
        engine: holds the data's inputs.
        weights: the random start, [P].
        data: with values to predict; mini-batches are drawn from all points of its training split.

    Returns:
        The weights reached, with a fresh optimiser state.
    """
    classes = data.split("train")
    assert classes.targets is not None
    rows = np.concatenate(
        [np.arange(a, a + n) for a, n in zip(classes.starts, classes.counts, strict=True)]
    )
    no_rows = np.empty(0, dtype=np.int64)
    rng = random_stream(settings.seed, Purpose.JOINT)
    left = settings.meta_iterations * settings.meta_batch * settings.inner_steps
    state = fresh_state(weights)
    if settings.optimizer.name == "scaled_sgd":  # all steps of the same size
        state = OptimizerState(torch.ones_like(weights), 0)
    while left:
        steps = min(left, STEPS_AT_ONCE)
        support = rng.choice(rows, steps * settings.inner_batch)
        batches = np.arange(support.size).reshape(steps, -1)
        task = Task(support, classes.targets[support], no_rows, no_rows, tuple(batches))
        adapted = engine.adapt(weights, state, [task])
        weights = adapted.weights[0]
        state = OptimizerState(adapted.state.second_moment[0], adapted.state.step)
        left -= steps
    return untrained_start(settings, engine.model, weights)
