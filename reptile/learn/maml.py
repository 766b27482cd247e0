"""MAML: the initialisation follows the gradient of the queries' loss through the inner loop.

Finn et al., Model-agnostic meta-learning (2017), algorithm 2; with `first_order` its second
derivatives are left out. Batch norm uses the statistics of each batch, as theirs does. The outer
optimiser is that of `episodic`, and so is its state.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, grad_and_value

from reptile.learn.engines.base import Engine
from reptile.learn.episodic import EpisodicState, adam
from reptile.models import unflatten
from reptile.tasks import Task


def maml_step(
    engine: Engine, state: EpisodicState, tasks: Sequence[Task], inner_rate: float, rate: float
) -> tuple[EpisodicState, Tensor]:
    """Take one step of Adam on the mean loss of the tasks' queries after the inner loop.

    Args:
        engine: holds the network and the inputs.
        state: where to start.
        tasks: with queries, and as many mini-batches of equal size as inner steps.
        inner_rate: step size of the inner loop (SGD).
        rate: Adam's step size.

    Returns:
        The state, and each task's loss after the inner loop, before the step [T].
    """
    gradient, losses = torch.zeros_like(state.weights), []
    for task in tasks:
        task_gradient, loss = grad_and_value(query_loss)(state.weights, engine, task, inner_rate)
        gradient += task_gradient / len(tasks)
        losses.append(loss)
    return adam(state, gradient, rate), torch.stack(losses)


def query_loss(
    weights: Tensor, engine: Engine, task: Task, inner_rate: float, first_order: bool = False
) -> Tensor:
    """Return the loss [] of a task's queries after the inner loop from the weights [P]."""
    model, device = engine.model, weights.device
    inputs = engine.images(task.support).to(weights.dtype)
    targets = torch.from_numpy(task.support_targets).to(device)

    def loss(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = model.forward(unflatten(model, weights), inputs)
        return model.objective.loss(outputs, targets)

    for positions in task.batches:
        batch = torch.from_numpy(positions).to(device)
        gradient = grad(loss)(weights, inputs[batch], targets[batch])
        weights = weights - inner_rate * (gradient.detach() if first_order else gradient)
    queries = engine.images(task.query).to(weights.dtype)
    return loss(weights, queries, torch.from_numpy(np.asarray(task.query_targets)).to(device))
