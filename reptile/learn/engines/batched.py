"""All tasks of a call as one batch of operations: the engine for CUDA.

Launches dominate small networks on a GPU: so tasks are batched by vmap, each convolution is one
batched matrix product over all tasks, and a whole inner loop is captured as one CUDA graph. Model
and optimiser are those of the eager engine. On the CPU it runs without a graph, to be tested there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.data.dataset import Inputs
from reptile.learn.engines.base import Adapted, adapt_each, gather
from reptile.learn.engines.fixed import without_fixed_part
from reptile.learn.engines.precision import in_precision
from reptile.learn.optimizer import OptimizerState, decay, update
from reptile.learn.predict import query_logits
from reptile.minibatches import IntArray
from reptile.models import Conv4, Model, Statistics, unflatten
from reptile.settings import BatchNormMode, OptimizerSettings, Precision
from reptile.tasks import Targets, Task

Loop = Callable[..., tuple[Tensor, Tensor, Tensor]]
GRAPHS = 8  # captured inner loops kept, one for each shape of a call; each holds memory


class BatchedEngine:
    """Runs the inner loops of all tasks of a call in parallel; not verified on CUDA hardware."""

    def __init__(
        self,
        model: Model,
        optimizer: OptimizerSettings,
        inputs: Inputs,
        device: torch.device,
        precision: Precision = "float32",
    ) -> None:
        if device.type == "cuda":  # TF32 keeps 10 bits of a product: too few for Adam's signs
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.name = f"batched on {device}"
        self._inputs = inputs
        network, self._values = without_fixed_part(model, inputs, device)
        if isinstance(network, Conv4):
            network = replace(network, convolve=patches)
        self._network = in_precision(network, precision, device)
        self._loops: dict[tuple[torch.Size, ...], Loop] = {}

    def images(self, rows: IntArray) -> Tensor:
        """Gather prepared images [B] as network input [B, C, H, W]; pixels in 0..1."""
        return gather(self._inputs, rows, self.device)

    def adapt(self, weights: Tensor, state: OptimizerState, tasks: Sequence[Task]) -> Adapted:
        """Adapt to T tasks in one batch, from weights [P] or [T, P]."""
        steps = len(tasks[0].batches)
        arguments = [
            weights.expand(len(tasks), -1).contiguous(),
            state.second_moment.expand(len(tasks), -1).contiguous(),
            torch.tensor(state.step, dtype=torch.float64, device=self.device),
            self._values(np.stack([task.support for task in tasks])).to(weights.dtype),
            self._send(np.stack([task.support_targets for task in tasks])),
        ]
        arguments += [
            self._send(np.stack([task.batches[k] for task in tasks])) for k in range(steps)
        ]
        adapted, moment, losses = self._loop(arguments)(*arguments)
        return Adapted(adapted, OptimizerState(moment, state.step + steps), losses)

    def adapt_sequential(
        self, weights: Tensor, state: OptimizerState, tasks: Sequence[Task]
    ) -> Adapted:
        """Adapt to each task from weights [P], and the optimiser's state after the task before."""
        return adapt_each(self.adapt, weights, state, tasks)

    @torch.no_grad()
    def predict(self, weights: Tensor, tasks: Sequence[Task], mode: BatchNormMode) -> Tensor:
        """Return the logits [T, Q, ways] of each task's queries under its weights [T, P]."""

        def one(weights: Tensor, support: Tensor, queries: Tensor) -> Tensor:
            params = unflatten(self.model, weights)
            return query_logits(self._network, params, support, queries, mode)

        support = self._values(np.stack([task.support for task in tasks])).to(weights.dtype)
        queries = self._values(np.stack([task.query for task in tasks])).to(weights.dtype)
        return torch.vmap(one)(weights, support, queries)

    def features(
        self, weights: Tensor, rows: IntArray, statistics: Statistics | None = None
    ) -> Tensor:
        """Return the features [N, D] of rows [N], one batch, differentiable by the weights [P]."""
        images = self._values(rows).to(weights.dtype)
        return self._network.features(unflatten(self.model, weights), images, statistics)

    def statistics(self, weights: Tensor, rows: IntArray) -> Statistics:
        """Return each batch norm's statistics on rows [N]; empty without batch norm."""
        images = self._values(rows).to(weights.dtype)
        return self._network.statistics(unflatten(self.model, weights), images)

    def _loop(self, arguments: list[Tensor]) -> Loop:
        """Return the inner loop for arguments of these shapes, captured on CUDA."""
        if self.device.type != "cuda":
            return self._run
        shapes = tuple(argument.shape for argument in arguments)
        if shapes not in self._loops:
            if len(self._loops) == GRAPHS:
                self._loops.pop(next(iter(self._loops)))
            samples = tuple(argument.clone() for argument in arguments)  # become the graph's inputs
            graph = cast(Loop, torch.cuda.make_graphed_callables(self._run, samples))

            def replay(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                adapted, moment, losses = graph(
                    *arguments
                )  # owned by the graph, overwritten next time
                return adapted.clone(), moment.clone(), losses.clone()

            self._loops[shapes] = replay
        return self._loops[shapes]

    def _run(
        self,
        weights: Tensor,
        moment: Tensor,
        step: Tensor,
        images: Tensor,
        labels: Tensor,
        *batches: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step for each [T, B] of `batches`.

        Returns:
            weights [T, P], second moment [T, P], losses [T, K].
        """

        def loss(weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            logits = self._network.forward(unflatten(self.model, weights), images)
            return self.model.objective.loss(logits, labels)

        gradients = torch.vmap(torch.func.grad_and_value(loss))
        tasks = torch.arange(len(weights), device=self.device)[:, None]
        state = OptimizerState(moment, cast(int, step))  # counting works on a tensor too
        losses = [weights.new_empty(len(weights), 0)]
        for batch in batches:
            weights = decay(weights, self.optimizer)
            gradient, value = gradients(weights, images[tasks, batch], labels[tasks, batch])
            weights, state = update(weights, gradient, state, self.optimizer)
            losses.append(value[:, None])
        return weights, state.second_moment, torch.cat(losses, dim=1)

    def _send(self, values: Targets) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def patches(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0
) -> Tensor:
    """`F.conv2d` for one group as a matrix product over image patches [B, C·kh·kw, h·w].

    With a weight for each task, vmap makes it one batched product instead of a grouped convolution.
    """
    kernel = weight.shape[-2:]
    columns = F.unfold(images, kernel, padding=padding, stride=stride)
    height, width = (
        (size + 2 * padding - kernel_size) // stride + 1
        for size, kernel_size in zip(images.shape[-2:], kernel, strict=True)
    )
    output = weight.flatten(1) @ columns
    if bias is not None:
        output = output + bias[:, None]
    return output.reshape(*output.shape[:-1], height, width)
