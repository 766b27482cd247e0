"""Adapting to a batch of tasks: the interface that every engine has.

The rest of the library does not depend on which engine runs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from reptile.data.dataset import Inputs
from reptile.learn.optimizer import OptimizerState
from reptile.minibatches import IntArray
from reptile.models import Model, Statistics
from reptile.objectives import to_unit
from reptile.settings import BatchNormMode
from reptile.tasks import Task


class Adapted(NamedTuple):
    """What the inner loop made of T tasks, in K steps each."""

    weights: Tensor  # [T, P]
    state: OptimizerState  # second moment [T, P]; the step count is the same for all
    losses: Tensor  # [T, K], each before its step


class Engine(Protocol):
    """Runs inner loops on images held by the engine."""

    @property
    def model(self) -> Model:
        """The network."""

    @property
    def name(self) -> str:
        """The engine and its device, in a few words for people."""

    def images(self, rows: IntArray) -> Tensor:
        """Gather prepared images [B] as network input [B, C, H, W]; pixels in 0..1."""

    def adapt(self, weights: Tensor, state: OptimizerState, tasks: Sequence[Task]) -> Adapted:
        """Adapt to each task by one inner step for each of its mini-batches.

        Args:
            weights: where to start: [P] for all tasks, or [T, P].
            state: the optimiser's state at the start; its second moment is shaped as `weights`.
            tasks: T tasks of equally many support images, and mini-batches of equal sizes.
        """

    def adapt_sequential(
        self, weights: Tensor, state: OptimizerState, tasks: Sequence[Task]
    ) -> Adapted:
        """Adapt to each task from the same weights, and from the state after the task before.

        Args:
            weights: where each task starts, [P].
            state: where the first task starts, second moment [P].
            tasks: as for `adapt`.

        Returns:
            What `adapt` returns, but a single state, that after the last task: second moment [P].
        """

    def predict(self, weights: Tensor, tasks: Sequence[Task], mode: BatchNormMode) -> Tensor:
        """Return the logits [T, Q, ways] of each task's queries under its weights [T, P].

        Args:
            weights: adapted weights, one row a task.
            tasks: T tasks of equally many support and of equally many query images.
            mode: what batch norm sees, see `predict`.
        """

    def features(
        self, weights: Tensor, rows: IntArray, statistics: Statistics | None = None
    ) -> Tensor:
        """Return the features [N, D] of rows [N], differentiable by the weights [P].

        Batch norm uses the statistics of these rows, or `statistics` if given.
        """

    def statistics(self, weights: Tensor, rows: IntArray) -> Statistics:
        """Return each batch norm's statistics on rows [N]; empty without batch norm."""


def adapt_each(
    adapt: Callable[[Tensor, OptimizerState, Sequence[Task]], Adapted],
    weights: Tensor,
    state: OptimizerState,
    tasks: Sequence[Task],
) -> Adapted:
    """Implement `Engine.adapt_sequential` by a call of `adapt` for each task."""
    adapted, losses = [], []
    for task in tasks:
        result = adapt(weights, state, [task])
        state = OptimizerState(result.state.second_moment[0], result.state.step)
        adapted.append(result.weights)
        losses.append(result.losses)
    return Adapted(torch.cat(adapted), state, torch.cat(losses))


def gather(inputs: Inputs, rows: IntArray, device: torch.device) -> Tensor:
    """Return the inputs of `rows` [...], pixels in 0..1, float32 [..., C, H, W]."""
    gathered = torch.from_numpy(np.asarray(inputs[rows])).to(device)
    return to_unit(gathered) if gathered.dtype == torch.uint8 else gathered
