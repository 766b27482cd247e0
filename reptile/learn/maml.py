"""MAML: the initialisation follows the gradient of the queries' loss through the inner loop.

Finn et al., Model-agnostic meta-learning (2017), algorithm 2; with `first_order` its second
derivatives are left out. ANIL and Meta-SGD are MAML with other step sizes (`step_sizes`),
Proto-MAML is MAML from another head (`prototypes`). Batch norm uses the statistics of each batch,
as theirs does. The outer optimiser is that of `episodic`, and so is its state.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reptile.learn.engines.base import Engine
from reptile.learn.episodic import EpisodicState, adam
from reptile.learn.prototypes import one_hot, with_prototypes
from reptile.learn.step_sizes import relative_sizes
from reptile.models import size, unflatten
from reptile.settings import TrainSettings
from reptile.tasks import Task


def maml_step(
    engine: Engine,
    state: EpisodicState,
    tasks: Sequence[Task],
    settings: TrainSettings,
    rate: float,
    done: float = 1.0,
) -> tuple[EpisodicState, Tensor]:
    """Take one step of Adam on the mean loss of the tasks' queries after the inner loop.

    Args:
        engine: holds the network and the inputs.
        state: where to start.
        tasks: with queries, and as many mini-batches of equal size as inner steps.
        settings: the algorithm, and the step size of the inner loop.
        rate: Adam's step size.
        done: the share of training that is done, 0..1, by which a multi-step loss is weighted.

    Returns:
        The state, and each task's loss, before the step [T].
    """
    shares = [0.0] * (len(tasks[0].batches) - 1) + [1.0]
    if settings.episode.multi_step_loss:
        shares = step_shares(len(shares), done)

    gradient, losses = torch.zeros_like(state.weights), []
    for task in tasks:
        vector = state.weights.detach().requires_grad_()
        weights = vector[: size(engine.model)]
        rates = settings.optimizer.learning_rate * relative_sizes(settings, engine.model, vector)
        prototypes = settings.algorithm == "proto-maml"
        loss = query_loss(weights, engine, task, rates, shares, prototypes=prototypes)
        gradient += torch.autograd.grad(loss, vector)[0] / len(tasks)
        losses.append(loss.detach())
    return adam(state, gradient, rate), torch.stack(losses)


def query_loss(
    weights: Tensor,
    engine: Engine,
    task: Task,
    rates: Tensor | float,
    shares: Sequence[float] = (),
    first_order: bool = False,
    prototypes: bool = False,
) -> Tensor:
    """Return the loss [] of a task's queries after the inner loop from the weights [P].

    Args:
        weights: where to start; they require gradients.
        engine: holds the network and the inputs.
        task: with queries.
        rates: step sizes of the inner loop: [P], [K, P] for each of K steps, or one for all.
        shares: how much the loss after each step counts, [K]; the last alone by default.
        first_order: leave second derivatives out.
        prototypes: start from a head of the support set's prototypes.
    """
    model, device = engine.model, weights.device
    inputs = engine.images(task.support).to(weights.dtype)
    targets = torch.from_numpy(task.support_targets).to(device)
    queries = engine.images(task.query).to(weights.dtype)
    query_targets = torch.from_numpy(np.asarray(task.query_targets)).to(device)

    def loss(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = model.forward(unflatten(model, weights), inputs)
        return model.objective.loss(outputs, targets)

    shares = shares or [0.0] * (len(task.batches) - 1) + [1.0]
    total = weights.new_zeros(())
    each_rate = rates if isinstance(rates, Tensor) and rates.dim() == 2 else [rates] * len(shares)
    if prototypes:
        features = model.features(unflatten(model, weights), inputs)
        weights = with_prototypes(model, weights, features, one_hot(model, targets).to(features))
    for positions, share, rate in zip(task.batches, shares, each_rate, strict=True):
        batch = torch.from_numpy(positions).to(device)
        step_loss = loss(weights, inputs[batch], targets[batch])
        (gradient,) = torch.autograd.grad(step_loss, weights, create_graph=not first_order)
        weights = weights - rate * gradient
        if share:
            total = total + share * loss(weights, queries, query_targets)
    return total


def step_shares(steps: int, done: float) -> list[float]:
    """Return how much the loss after each step counts in MAML++'s multi-step loss.

    Antoniou et al., How to train your MAML (2019): all alike at the start; those before the last
    fall to 0, here linearly in the share of training that is `done`.
    """
    before = (1 - done) / steps
    return [before] * (steps - 1) + [1 - before * (steps - 1)]
