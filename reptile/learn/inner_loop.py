"""The inner loop: learning one task, a gradient step for each of its mini-batches.

The readable form. The other engines compute the same faster.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reptile.learn.optimizer import OptimizerState, decay, update
from reptile.models import Model, unflatten
from reptile.settings import OptimizerSettings


def inner_loop(
    model: Model,
    weights: Tensor,
    state: OptimizerState,
    inputs: Tensor,
    targets: Tensor,
    batches: Sequence[Tensor],
    optimizer: OptimizerSettings,
) -> tuple[Tensor, OptimizerState, Tensor]:
    """Take one step of the optimiser for each mini-batch.

    Args:
        model: the network and its loss.
        weights: where to start, [P].
        state: the optimiser's state at the start, second moment [P].
        inputs: the support set, [S, *shape].
        targets: its labels [S] or values [S, outputs].
        batches: K mini-batches, each positions in the support set.
        optimizer: its settings.

    Returns:
        weights [P], the optimiser's state, and each mini-batch's loss before its step, [K].
    """
    losses = [weights.new_empty(0)]
    for batch in batches:
        weights = decay(weights, optimizer).detach().requires_grad_()
        outputs = model.forward(unflatten(model, weights), inputs[batch])
        loss = model.objective.loss(outputs, targets[batch])
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            weights, state = update(weights, gradient, state, optimizer)
        losses.append(loss.detach()[None])
    return weights.detach(), state, torch.cat(losses)
