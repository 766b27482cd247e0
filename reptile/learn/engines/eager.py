"""The eager engine: the readable form, and the reference for the others.

It runs on any device torch has.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reptile.data.dataset import Inputs
from reptile.learn.engines.base import Adapted, adapt_each, gather
from reptile.learn.engines.fixed import without_fixed_part
from reptile.learn.engines.precision import in_precision
from reptile.learn.inner_loop import inner_loop
from reptile.learn.optimizer import OptimizerState
from reptile.learn.predict import query_logits
from reptile.minibatches import IntArray
from reptile.models import Model, Statistics, unflatten
from reptile.settings import BatchNormMode, OptimizerSettings, Precision
from reptile.tasks import Task


class EagerEngine:
    """One task after another, one torch operation after another."""

    def __init__(
        self,
        model: Model,
        optimizer: OptimizerSettings,
        inputs: Inputs,
        device: torch.device,
        precision: Precision = "float32",
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.name = f"eager on {device}"
        self._inputs = inputs
        network, self._values = without_fixed_part(model, inputs, device)
        self._network = in_precision(network, precision, device)

    def images(self, rows: IntArray) -> Tensor:
        """Gather prepared images [B] as network input [B, C, H, W]; pixels in 0..1."""
        return gather(self._inputs, rows, self.device)

    def adapt(self, weights: Tensor, state: OptimizerState, tasks: Sequence[Task]) -> Adapted:
        """Adapt to T tasks one after another, from weights [P] or [T, P]."""
        starts = weights.expand(len(tasks), -1)
        moments = state.second_moment.expand(len(tasks), -1)
        results = [
            self._adapt_one(start, OptimizerState(moment, state.step), task)
            for start, moment, task in zip(starts, moments, tasks, strict=True)
        ]
        return Adapted(
            torch.stack([weights for weights, _, _ in results]),
            OptimizerState(
                torch.stack([state.second_moment for _, state, _ in results]),
                results[0][1].step,
            ),
            torch.stack([losses for _, _, losses in results]),
        )

    def adapt_sequential(
        self, weights: Tensor, state: OptimizerState, tasks: Sequence[Task]
    ) -> Adapted:
        """Adapt to each task from weights [P], and the optimiser's state after the task before."""
        return adapt_each(self.adapt, weights, state, tasks)

    @torch.no_grad()
    def predict(self, weights: Tensor, tasks: Sequence[Task], mode: BatchNormMode) -> Tensor:
        """Return the logits [T, Q, ways] of each task's queries under its weights [T, P]."""
        logits = []
        for task_weights, task in zip(weights, tasks, strict=True):
            support = self._values(task.support).to(task_weights.dtype)
            queries = self._values(task.query).to(task_weights.dtype)
            logits.append(
                query_logits(
                    self._network, unflatten(self.model, task_weights), support, queries, mode
                )
            )
        return torch.stack(logits)

    def features(
        self, weights: Tensor, rows: IntArray, statistics: Statistics | None = None
    ) -> Tensor:
        """Return the features [N, D] of rows [N], differentiable by the weights [P]."""
        images = self._values(rows).to(weights.dtype)
        return self._network.features(unflatten(self.model, weights), images, statistics)

    def statistics(self, weights: Tensor, rows: IntArray) -> Statistics:
        """Return each batch norm's statistics on rows [N]; empty without batch norm."""
        images = self._values(rows).to(weights.dtype)
        return self._network.statistics(unflatten(self.model, weights), images)

    def _adapt_one(
        self, weights: Tensor, state: OptimizerState, task: Task
    ) -> tuple[Tensor, OptimizerState, Tensor]:
        inputs = self._values(task.support).to(weights.dtype)
        targets = torch.from_numpy(task.support_targets).to(self.device)
        batches = [torch.from_numpy(batch).to(self.device) for batch in task.batches]
        return inner_loop(self._network, weights, state, inputs, targets, batches, self.optimizer)
