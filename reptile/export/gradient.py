"""The gradient of one inner step as a graph of forward operations only.

Traced from the network in the form that `forms` gives it. For the optimiser and the loop see
`graphs`.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reptile.export.tracing import BATCH, Traced, trace
from reptile.objectives import CLASSIFICATION

if TYPE_CHECKING:
    from reptile.export.forms import Form


def trace_gradient(form: "Form") -> Traced:
    """Trace from (weights [P], inputs [B, …], targets [B, outputs], 1/B []) to gradient and loss.

    Weights and gradient [P] are packed by `form`; inputs are what its fixed part makes of images;
    targets are one-hot, or values. The loss is the mean of the model's objective; B is free,
    everything else is fixed by the model.

    Raises:
        InputError: the network cannot be traced.
    """
    model = form.model

    def gradient(
        weights: Tensor, inputs: Tensor, targets: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        def loss(weights: Tensor) -> Tensor:
            predicted = form.logits(weights, inputs, share)
            if model.objective is CLASSIFICATION:
                return (predicted.logsumexp(1) - (predicted * targets).sum(1)).sum() * share
            off = predicted - targets
            return (off * off).sum() * (share / model.outputs)

        return torch.func.grad_and_value(loss)(weights)

    examples = (
        torch.zeros(form.size),
        torch.zeros(BATCH, *form.input_shape),
        torch.zeros(BATCH, model.outputs),
        torch.zeros(()),
    )
    return trace(gradient, examples, (1, 2), form.module)
