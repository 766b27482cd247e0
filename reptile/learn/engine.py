"""Adapting to a batch of tasks: the interface, and the plain eager engine.

Nothing else in the library knows which engine runs. The eager engine is the readable form and the
oracle of every other one; it runs on any device torch has.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from reptile.config import BatchNormMode, OptimizerSettings
from reptile.data.prepared import Inputs
from reptile.episodes import Task
from reptile.errors import InputError
from reptile.learn.inner import InnerState, decay, update
from reptile.learn.predict import query_logits
from reptile.minibatches import IntArray
from reptile.models import Model, to_unit, unflatten


class Adapted(NamedTuple):
    """What the inner loop made of T tasks, in K steps each."""

    weights: Tensor  # [T, P]
    state: InnerState  # second moment [T, P]; the step count is the same for all
    losses: Tensor  # [T, K], each before its step


class Engine(Protocol):
    """Runs inner loops on images held by the engine."""

    @property
    def model(self) -> Model:
        """The network."""

    @property
    def name(self) -> str:
        """What runs, in a few words for people."""

    def images(self, rows: IntArray) -> Tensor:
        """Gather prepared images [B] as network input [B, C, H, W]; pixels in 0..1."""

    def adapt(self, weights: Tensor, state: InnerState, tasks: Sequence[Task]) -> Adapted:
        """Adapt to each task by one inner step for each of its mini-batches.

        Args:
            weights: where to start: [P] for all tasks, or [T, P].
            state: the optimiser's state at the start; its second moment is shaped as `weights`.
            tasks: T tasks of equally many support images, and mini-batches of equal sizes.
        """

    def adapt_in_turn(self, weights: Tensor, state: InnerState, tasks: Sequence[Task]) -> Adapted:
        """Adapt to each task from the same weights, and from the state that the last one left.

        Args:
            weights: where each task starts, [P].
            state: where the first task starts, second moment [P].
            tasks: as for `adapt`.

        Returns:
            What `adapt` returns, but the one state that the last task left: second moment [P].
        """

    def predict(self, weights: Tensor, tasks: Sequence[Task], mode: BatchNormMode) -> Tensor:
        """Return the logits [T, Q, ways] of each task's queries under its weights [T, P].

        Args:
            weights: adapted weights, one row a task.
            tasks: T tasks of equally many support and of equally many query images.
            mode: what batch norm sees, see `predict`.
        """


class EagerEngine:
    """One task after another, one torch operation after another."""

    def __init__(
        self,
        model: Model,
        optimizer: OptimizerSettings,
        inputs: Inputs,
        device: torch.device,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.name = f"eager on {device}"
        self._inputs = inputs

    def images(self, rows: IntArray) -> Tensor:
        """See `Engine.images`."""
        return gather(self._inputs, rows, self.device)

    def adapt(self, weights: Tensor, state: InnerState, tasks: Sequence[Task]) -> Adapted:
        """See `Engine.adapt`."""
        shape = (len(tasks), weights.shape[-1])
        starts, moments = weights.expand(shape), state.second_moment.expand(shape)
        results = [
            self._adapt_one(start, InnerState(moment, state.step), task)
            for start, moment, task in zip(starts, moments, tasks, strict=True)
        ]
        return Adapted(
            torch.stack([weights for weights, _, _ in results]),
            InnerState(
                torch.stack([state.second_moment for _, state, _ in results]),
                results[0][1].step,
            ),
            torch.stack([losses for _, _, losses in results]),
        )

    def adapt_in_turn(self, weights: Tensor, state: InnerState, tasks: Sequence[Task]) -> Adapted:
        """See `Engine.adapt_in_turn`."""
        return one_by_one(self.adapt, weights, state, tasks)

    @torch.no_grad()
    def predict(self, weights: Tensor, tasks: Sequence[Task], mode: BatchNormMode) -> Tensor:
        """See `Engine.predict`."""
        found = []
        for own, task in zip(weights, tasks, strict=True):
            support = self.images(task.support).to(own.dtype)
            queries = self.images(task.query).to(own.dtype)
            found.append(
                query_logits(self.model, unflatten(self.model, own), support, queries, mode)
            )
        return torch.stack(found)

    def _adapt_one(
        self, weights: Tensor, state: InnerState, task: Task
    ) -> tuple[Tensor, InnerState, Tensor]:
        images = self.images(task.support).to(weights.dtype)
        labels = torch.from_numpy(task.support_labels).to(self.device)
        losses = [weights.new_empty(0)]
        for positions in task.batches:
            batch = torch.from_numpy(positions).to(self.device)
            weights = decay(weights, self.optimizer).detach().requires_grad_()
            logits = self.model.logits(unflatten(self.model, weights), images[batch])
            loss = self.model.loss(logits, labels[batch])
            (gradient,) = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                weights, state = update(weights, gradient, state, self.optimizer)
            losses.append(loss.detach()[None])
        return weights.detach(), state, torch.cat(losses)


def one_by_one(
    adapt: Callable[[Tensor, InnerState, Sequence[Task]], Adapted],
    weights: Tensor,
    state: InnerState,
    tasks: Sequence[Task],
) -> Adapted:
    """Do as `Engine.adapt_in_turn` says, by a call of `adapt` for each task."""
    adapted, losses = [], []
    for task in tasks:
        found = adapt(weights, state, [task])
        state = InnerState(found.state.second_moment[0], found.state.step)
        adapted.append(found.weights)
        losses.append(found.losses)
    return Adapted(torch.cat(adapted), state, torch.cat(losses))


def gather(inputs: Inputs, rows: IntArray, device: torch.device) -> Tensor:
    """Return the inputs of `rows` [...], pixels in 0..1, float32 [..., C, H, W]."""
    found = torch.from_numpy(np.asarray(inputs[rows])).to(device)
    return to_unit(found) if found.dtype == torch.uint8 else found


def make_engine(
    kind: str,
    model: Model,
    optimizer: OptimizerSettings,
    inputs: Inputs,
    device: torch.device,
) -> Engine:
    """Return the engine that the settings name; `auto` takes the fastest that runs here.

    Raises:
        InputError: `native` is asked for, and it does not run on this device or machine.
    """
    from reptile.learn.batched import BatchedEngine  # both need this module's Adapted

    if kind == "eager":
        return EagerEngine(model, optimizer, inputs, device)
    if kind == "batched" or (kind == "auto" and device.type != "cpu"):
        return BatchedEngine(model, optimizer, inputs, device)
    if device.type != "cpu":
        raise InputError(f"train.engine = native: runs on the cpu, not on {device}; use auto")
    from reptile.learn.native import BuildError, NativeEngine

    try:
        return NativeEngine(model, optimizer, inputs)
    except BuildError as error:
        if kind == "native":
            raise InputError(f"train.engine = native: {error}; or use auto") from None
        eager = EagerEngine(model, optimizer, inputs, device)
        eager.name += f" (several times slower than native: {error})"
        return eager
