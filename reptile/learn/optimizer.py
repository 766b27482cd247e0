"""The inner loop's optimiser: what it carries from step to step, and one update.

Adam with beta1 = 0 has two state variables, the second moment and the step count; meta-training
learns both. Scaled SGD has the factor of each parameter's step in the second moment's place: [P],
or [K·P] for K steps, of which the last serves all later ones.
Written once, for a single task [P] and a batch of tasks [T, P].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from reptile.settings import OptimizerSettings

BETA2 = 0.999
EPSILON = 1e-8


class OptimizerState(NamedTuple):
    """State of the inner optimiser; plain SGD has no second moment and leaves it as it is."""

    second_moment: Tensor  # [P], or [T, P] for a batch of tasks; of scaled SGD, its factors
    step: int  # updates taken so far; a float64 tensor inside a captured loop


def fresh_state(weights: Tensor) -> OptimizerState:
    """Return the state before any step, shaped as `weights`."""
    return OptimizerState(torch.zeros_like(weights), 0)


def decay(weights: Tensor, optimizer: OptimizerSettings) -> Tensor:
    """Shrink the weights, as the reference does before each gradient is taken."""
    return weights if optimizer.weight_decay == 1 else weights * optimizer.weight_decay


def update(
    weights: Tensor, gradient: Tensor, state: OptimizerState, optimizer: OptimizerSettings
) -> tuple[Tensor, OptimizerState]:
    """Take one step of SGD or of Adam with beta1 = 0 (Kingma and Ba, algorithm 1)."""
    step = state.step + 1
    if optimizer.name == "scaled_sgd":
        gradient = _factors(state, gradient.shape[-1]) * gradient
    if optimizer.name != "adam":
        return weights - optimizer.learning_rate * gradient, state._replace(step=step)
    second_moment = BETA2 * state.second_moment + (1 - BETA2) * gradient.square()
    corrected = second_moment.sqrt() / (1 - BETA2**step) ** 0.5
    moved = weights - optimizer.learning_rate * gradient / (corrected + EPSILON)
    return moved, OptimizerState(second_moment, step)


def _factors(state: OptimizerState, size: int) -> Tensor:
    """Return the factors [..., P] of the next step."""
    factors = state.second_moment.view(*state.second_moment.shape[:-1], -1, size)
    step = torch.as_tensor(state.step, device=factors.device).clamp(max=factors.shape[-2] - 1)
    return factors[..., step.long(), :]


def merge_parallel_states(
    before: OptimizerState, after: OptimizerState, tasks: int
) -> OptimizerState:
    """Merge the states of parallel tasks, from a common start, into that of sequential ones.

    After n tasks of k steps each, v = β^{nk}·v₀ + Σᵢ β^{(n-i)k}·(vᵢ - β^k·v₀), i = 1..n, and n·k
    more steps: what running the tasks one after another would give for the same gradients.

    Args:
        before: the common start, second moment [P].
        after: the states reached, second moment [T, P].
        tasks: T.
    """
    steps = after.step - before.step
    kept = BETA2**steps  # share of an earlier second moment that remains after a task
    contribution = after.second_moment - kept * before.second_moment
    ages = torch.arange(tasks - 1, -1, -1, dtype=contribution.dtype, device=contribution.device)
    second_moment = kept**tasks * before.second_moment + (kept**ages)[:, None].mul(
        contribution
    ).sum(0)
    return OptimizerState(second_moment, before.step + tasks * steps)
