"""Reptile and first-order MAML: one meta-step.

What the paper calls θ is `MetaState.weights`; the inner optimiser's state is part of the
initialisation too. The inner loop is in `inner_loop`, the loop over meta-steps in `train`.
"""

from collections.abc import Callable, Sequence
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

    def starts(self, engine: Engine, tasks: Sequence[Task]) -> tuple[Tensor, OptimizerState]:
        """Return where the tasks' steps start: the same for each, [P]."""
        return self.weights, self.inner

    def to(self, device: torch.device) -> "MetaState":
        """Return it on a device."""
        return self.each(lambda vector: vector.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> "MetaState":
        """Return it with each of its vectors changed."""
        inner = self.inner._replace(second_moment=change(self.inner.second_moment))
        return self._replace(weights=change(self.weights), inner=inner)

    @property
    def step(self) -> int:
        """Updates that the optimiser has taken."""
        return self.inner.step


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
    """Take one meta-step, with n tasks, k inner steps U and the step size ε.

    Reptile: θ ← θ + ε · 1/n · Σᵢ (θ̃ᵢ - θ), where θ̃ᵢ = Uᵏ(θ) (Nichol et al., algorithm 2);
    first-order MAML: θ ← θ + ε · 1/n · Σᵢ (θ̃ᵢ - Uᵏ⁻¹(θ)): the last inner step alone.

    Args:
        engine: runs the inner loops.
        state: θ and the inner optimiser's state.
        tasks: the meta-batch.
        settings: the algorithm, and how the optimiser's state passes from task to task.
        step_size: ε.
    """
    theta, inner = state
    start = fresh_state(theta) if settings.optimizer.state == "reset" else inner
    sequential = settings.optimizer.state == "sequential"
    if settings.algorithm == "reptile":
        adapted = (engine.adapt_sequential if sequential else engine.adapt)(theta, start, tasks)
        displacement = adapted.weights.mean(0) - theta
    else:
        adapt = _adapt_keeping_last_start if not sequential else _in_sequence
        last_start, adapted = adapt(engine, theta, start, tasks)
        displacement = (adapted.weights - last_start).mean(0)
    theta = theta + step_size * displacement
    if sequential:
        inner = adapted.state
    elif settings.optimizer.state == "parallel":
        inner = merge_parallel_states(inner, adapted.state, len(tasks))
    return MetaStep(MetaState(theta, inner), adapted.losses)


def step_size(settings: TrainSettings, iteration: int) -> float:
    """Return ε of a meta-iteration (from 0): linear from meta_step to meta_step_final."""
    done = iteration / settings.meta_iterations
    return settings.meta_step * (1 - done) + settings.meta_step_final * done


def _adapt_keeping_last_start(
    engine: Engine, theta: Tensor, start: OptimizerState, tasks: Sequence[Task]
) -> tuple[Tensor, Adapted]:
    """Adapt to each task from θ; return the weights before the last step [T, P] too."""
    before = engine.adapt(theta, start, [_some_batches(task, slice(None, -1)) for task in tasks])
    last = [_some_batches(task, slice(-1, None)) for task in tasks]
    adapted = engine.adapt(before.weights, before.state, last)
    return before.weights, adapted._replace(losses=torch.cat([before.losses, adapted.losses], 1))


def _in_sequence(
    engine: Engine, theta: Tensor, start: OptimizerState, tasks: Sequence[Task]
) -> tuple[Tensor, Adapted]:
    """Do the same task by task, each from the optimiser's state after the task before."""
    starts = []

    def adapt(theta: Tensor, state: OptimizerState, tasks: Sequence[Task]) -> Adapted:
        last_start, adapted = _adapt_keeping_last_start(engine, theta, state, tasks)
        starts.append(last_start)
        return adapted

    adapted = adapt_each(adapt, theta, start, tasks)
    return torch.cat(starts), adapted


def _some_batches(task: Task, part: slice) -> Task:
    return task._replace(batches=task.batches[part])
