"""Reptile and first-order MAML: one meta-step.

What the paper calls θ is `MetaState.weights`; the inner optimiser's state belongs to the learnt
initialisation too. No data, no loop, no files here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reptile.config import TrainSettings
from reptile.episodes import Task
from reptile.learn.engine import Engine
from reptile.learn.inner import InnerState, fresh_state, merge


class MetaState(NamedTuple):
    """What meta-training learns."""

    weights: Tensor  # [P], the initialisation θ
    inner: InnerState  # the optimiser's state that adaptation starts from


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
    if settings.optimizer.state == "sequential":
        turns: list[tuple[Tensor, Tensor]] = []
        for task in tasks:
            displacement, after, losses = _displacement(engine, theta, inner, [task], settings)
            inner = InnerState(after.second_moment[0], after.step)
            turns.append((displacement, losses))
        displacements = torch.cat([displacement for displacement, _ in turns])
        all_losses = torch.cat([losses for _, losses in turns])
    else:
        start = fresh_state(theta) if settings.optimizer.state == "reset" else inner
        displacements, after, all_losses = _displacement(engine, theta, start, tasks, settings)
        if settings.optimizer.state == "parallel":
            inner = merge(inner, after, len(tasks))
    return MetaStep(MetaState(theta + step_size * displacements.mean(0), inner), all_losses)


def step_size(settings: TrainSettings, iteration: int) -> float:
    """Return ε of a meta-iteration (from 0): linear from meta_step to meta_step_final."""
    done = iteration / settings.meta_iterations
    return settings.meta_step * (1 - done) + settings.meta_step_final * done


def _displacement(
    engine: Engine,
    theta: Tensor,
    inner: InnerState,
    tasks: Sequence[Task],
    settings: TrainSettings,
) -> tuple[Tensor, InnerState, Tensor]:
    """Return how far each task pulls [T, P], the inner states reached and the losses [T, K]."""
    if settings.algorithm == "reptile":
        adapted = engine.adapt(theta, inner, tasks)
        return adapted.weights - theta, adapted.state, adapted.losses
    before = engine.adapt(theta, inner, [_steps(task, slice(None, -1)) for task in tasks])
    last = engine.adapt(
        before.weights, before.state, [_steps(task, slice(-1, None)) for task in tasks]
    )
    losses = torch.cat([before.losses, last.losses], dim=1)
    return last.weights - before.weights, last.state, losses


def _steps(task: Task, part: slice) -> Task:
    return task._replace(batches=task.batches[part])
