"""The gradient of one inner step as a graph of forward operations only.

Traced from the network in the form of `rows`. For the optimiser and the loop see `graphs`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from reptile.export.rows import Layout, indices, logits
from reptile.models import Network, size
from reptile.objectives import CLASSIFICATION

aten = torch.ops.aten


def trace_gradient(model: Network, layout: Layout) -> GraphModule:
    """Trace (weights [P], images [B, C, H, W], targets [B, outputs], 1/B [], `rows.indices`...).

    It gives (gradient [P], loss []). Weights and gradient are packed by `layout`; images are what
    the network sees; targets are one-hot, or values. The loss is the mean of the model's objective;
    B is free, everything else is fixed by the model. torch.export cannot differentiate by itself,
    so this runs before it.
    """

    def gradient(
        weights: Tensor, images: Tensor, targets: Tensor, share: Tensor, *index: Tensor
    ) -> tuple[Tensor, Tensor]:
        def loss(weights: Tensor) -> Tensor:
            predicted = logits(model, layout.named(weights), images, share, index)
            if model.objective is CLASSIFICATION:
                return (predicted.logsumexp(1) - (predicted * targets).sum(1)).sum() * share
            off = predicted - targets
            return (off * off).sum() * (share / model.outputs)

        return torch.func.grad_and_value(loss)(weights)

    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(tensor: Tensor, first: DimDynamic) -> Tensor:
        sizes = [first, *[DimDynamic.STATIC] * 3][: tensor.ndim]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor, symbolic_context=context)

    batch = 3  # any number above 1, which torch would treat as a constant
    example = (
        fake(torch.zeros(size(model)), DimDynamic.STATIC),
        fake(torch.zeros(batch, *model.image_shape), DimDynamic.DYNAMIC),
        fake(torch.zeros(batch, model.outputs), DimDynamic.DYNAMIC),
        fake(torch.zeros(()), DimDynamic.STATIC),
        *(fake(index, DimDynamic.STATIC) for index in indices(model)),
    )
    # torch's Python kernels keep B free where the compiled ones (padding) would fix it.
    with enable_python_dispatcher():
        return make_fx(gradient, _decompositions(), "fake")(*example)


def threshold_backward(gradient: Tensor, output: Tensor, threshold: float) -> Tensor:
    """Write the gradient of ReLU as a product, which ONNX Runtime runs faster than Where."""
    return gradient * (output > threshold)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    return {
        **core_aten_decompositions(),
        aten.threshold_backward.default: threshold_backward,
    }
