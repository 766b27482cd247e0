"""The algorithms: one inner update by the policy gradient, and a meta-iteration of each.

MAML is algorithm 3 of Finn et al. (2017), with Adam in place of TRPO; the gradient goes through the
inner updates, not through how the first trajectories were drawn. First-order MAML leaves the second
derivatives out. Reptile is Nichol et al. (2018), algorithm 2.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from reptile.rl.environments import Family, Goals
from reptile.rl.policy import Policy
from reptile.rl.rollout import Batch, Trajectories, batch, rollout
from reptile.rl.settings import RLSettings

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class State(NamedTuple):
    """What training learns, with Adam's state."""

    weights: Tensor  # [P]
    first_moment: Tensor  # [P]
    second_moment: Tensor  # [P]
    step: int

    @classmethod
    def start(cls, weights: Tensor) -> "State":
        """Return the state before training."""
        return cls(weights, torch.zeros_like(weights), torch.zeros_like(weights), 0)


class Sampler(NamedTuple):
    """Draws trajectories of the tasks of one meta-iteration."""

    policy: Policy
    family: Family
    goals: Goals
    trajectories: int
    discount: float
    rng: np.random.Generator

    def __call__(self, weights: Tensor) -> tuple[Trajectories, Batch]:
        """Let the policy act with the weights [P] of all tasks, or [T, P] of each."""
        each = weights.detach().expand(len(self.goals), -1)
        found = rollout(self.policy, each, self.family, self.goals, self.trajectories, self.rng)
        return found, batch(found, self.discount)


def loss(policy: Policy, weights: Tensor, steps: Batch) -> Tensor:
    """Return the surrogate [] whose gradient is the policy gradient, of one task's steps."""
    logs = policy.log_probability(weights, steps.observations, steps.actions)
    return -(steps.mask * steps.advantages * logs).sum() / steps.mask.sum()


def update(
    policy: Policy, weights: Tensor, steps: Batch, rate: float, *, first_order: bool = False
) -> Tensor:
    """Return one task's weights [P] after a step of gradient descent."""
    gradient: Tensor = grad(lambda w: loss(policy, w, steps))(weights)
    return weights - rate * (gradient.detach() if first_order else gradient)


def updates(policy: Policy, weights: Tensor, steps: Batch, rate: float) -> Tensor:
    """Return the weights [T, P] of all tasks after a step each."""
    return vmap(lambda w, *s: update(policy, w, Batch(*s), rate))(weights, *steps).detach()


def maml_loss(
    policy: Policy,
    weights: Tensor,
    inner: Sequence[Batch],
    outer: Batch,
    rate: float,
    *,
    first_order: bool = False,
) -> Tensor:
    """Return the mean loss [] of the tasks after the inner updates, as a function of weights [P].

    Args:
        policy: whose weights they are.
        weights: where every task starts.
        inner: the steps of each update, T tasks side by side.
        outer: steps taken with the adapted weights.
        rate: of the inner updates.
        first_order: whether to leave the second derivatives out.
    """

    def adapted_loss(*tensors: Tensor) -> Tensor:
        batches = [Batch(*tensors[i : i + 4]) for i in range(0, len(tensors), 4)]
        adapted = weights
        for steps in batches[:-1]:
            adapted = update(policy, adapted, steps, rate, first_order=first_order)
        return loss(policy, adapted, batches[-1])

    return vmap(adapted_loss)(*(each for steps in (*inner, outer) for each in steps)).mean()


def maml_step(
    state: State, sample: Sampler, settings: RLSettings, *, first_order: bool = False
) -> State:
    """Follow the gradient of the loss after the inner updates."""
    policy, rate = sample.policy, settings.inner_rate
    adapted = state.weights.expand(len(sample.goals), -1)
    inner = []
    for _ in range(settings.updates):
        _, steps = sample(adapted)
        inner.append(steps)
        adapted = updates(policy, adapted, steps, rate)
    _, outer = sample(adapted)

    def meta_loss(weights: Tensor) -> Tensor:
        return maml_loss(policy, weights, inner, outer, rate, first_order=first_order)

    return adam(state, grad(meta_loss)(state.weights), settings.outer_rate)


def fomaml_step(state: State, sample: Sampler, settings: RLSettings) -> State:
    """Follow the gradient at the adapted weights."""
    return maml_step(state, sample, settings, first_order=True)


def reptile_step(state: State, sample: Sampler, settings: RLSettings) -> State:
    """Move towards the mean of the adapted weights."""
    adapted = state.weights.expand(len(sample.goals), -1)
    for _ in range(settings.updates):
        _, steps = sample(adapted)
        adapted = updates(sample.policy, adapted, steps, settings.inner_rate)
    step_size = settings.meta_step * (1 - state.step / settings.iterations)
    moved = state.weights + step_size * (adapted.mean(0) - state.weights)
    return state._replace(weights=moved, step=state.step + 1)


def joint_step(state: State, sample: Sampler, settings: RLSettings) -> State:
    """Follow the policy gradient of all tasks, without an inner loop."""
    _, steps = sample(state.weights)

    def mean_loss(weights: Tensor) -> Tensor:
        return vmap(lambda *s: loss(sample.policy, weights, Batch(*s)))(*steps).mean()

    gradient, _ = grad_and_value(mean_loss)(state.weights)
    return adam(state, gradient, settings.outer_rate)


STEPS: dict[str, Callable[[State, Sampler, RLSettings], State]] = {
    "reptile": reptile_step,
    "fomaml": fomaml_step,
    "maml": maml_step,
    "joint": joint_step,
}


def adam(state: State, gradient: Tensor, rate: float) -> State:
    """Take one step of Adam (Kingma and Ba, algorithm 1)."""
    step = state.step + 1
    first = BETA1 * state.first_moment + (1 - BETA1) * gradient
    second = BETA2 * state.second_moment + (1 - BETA2) * gradient.square()
    scale = (second / (1 - BETA2**step)).sqrt() + EPSILON
    return State(state.weights - rate * first / (1 - BETA1**step) / scale, first, second, step)
