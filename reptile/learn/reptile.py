"""Reptile and first-order MAML: one meta-step.

What the paper calls θ is `MetaState.weights`; the inner optimiser's state belongs to the learnt
initialisation too. No data, no loop, no files here.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from reptile.learn.engines.base import Adapted, Engine, adapt_each
from reptile.learn.optimizer import OptimizerState, fresh_state, merge_parallel_states
from reptile.settings import TrainSettings
from reptile.tasks import Task


class MetaState(NamedTuple):
    """What meta-training learns."""

    weights: Tensor  # [P], the initialisation θ
    inner: OptimizerState  # the optimiser's state that adaptation starts from


class MetaStep(NamedTuple):
    """The outcome of one meta-step."""

    state: MetaState
    losses: Tensor  # [T, K], of each task's inner steps


def meta_step(
    engine: Engine,
    state: MetaState,
    tasks: Sequence[Task],
    settings: TrainSettings,
    step_size: float,
) -> MetaStep:
    """Move θ towards the mean of the weights adapted to each task.

    Reptile: θ ← θ + ε·mean(θ̃ - θ). First-order MAML: θ ← θ + ε·mean(θ̃ - θ̃'), where θ̃' is θ̃
    before its last inner step.

    Args:
        engine: runs the inner loops.
        state: θ and the inner optimiser's state.
        tasks: the meta-batch.
        settings: the algorithm and the mode of the inner state.
        step_size: ε.
    """
    theta, inner = state
    mode = settings.optimizer.state
    start = fresh_state(theta) if mode == "reset" else inner
    adapt: Callable[..., Adapted] = engine.adapt
    in_turn: Callable[..., Adapted] = engine.adapt_sequential
    if settings.algorithm == "fomaml":
        adapt = partial(_last_steps, engine)
        in_turn = partial(adapt_each, adapt)
    adapted, after, losses = (in_turn if mode == "sequential" else adapt)(theta, start, tasks)
    pull = adapted.mean(0)
    if settings.algorithm == "reptile":
        pull = pull - theta
    if mode == "sequential":
        inner = after
    elif mode == "parallel":
        inner = merge_parallel_states(inner, after, len(tasks))
    return MetaStep(MetaState(theta + step_size * pull, inner), losses)


def step_size(settings: TrainSettings, iteration: int) -> float:
    """Return ε of a meta-iteration (from 0): linear from meta_step to meta_step_final."""
    done = iteration / settings.meta_iterations
    return settings.meta_step * (1 - done) + settings.meta_step_final * done


def _last_steps(
    engine: Engine, theta: Tensor, start: OptimizerState, tasks: Sequence[Task]
) -> Adapted:
    """Adapt to the tasks side by side; the weights returned are how far the last step went."""
    before = engine.adapt(theta, start, [_steps(task, slice(None, -1)) for task in tasks])
    last = engine.adapt(
        before.weights, before.state, [_steps(task, slice(-1, None)) for task in tasks]
    )
    losses = torch.cat([before.losses, last.losses], dim=1)
    return Adapted(last.weights - before.weights, last.state, losses)


def _steps(task: Task, part: slice) -> Task:
    return task._replace(batches=task.batches[part])
