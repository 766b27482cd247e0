"""The gradient of one inner step as a graph of forward operations only.

Traced from the very network that training uses, so there is no second derivation to keep in step
with it. Not for the optimiser or the loop around it: see `graphs`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from reptile.models import Model, size, unflatten

aten = torch.ops.aten


def trace_gradient(model: Model) -> GraphModule:
    """Trace (weights [P], images [B, C, H, W] in 0..1, labels [B]) → (gradient [P], loss []).

    The loss is the mean cross-entropy; B is free, everything else is fixed by the model.
    torch.export cannot differentiate by itself, so this runs before it.
    """

    def gradient(weights: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        def loss(weights: Tensor) -> Tensor:
            return F.cross_entropy(model.logits(unflatten(model, weights), images), labels)

        return torch.func.grad_and_value(loss)(weights)

    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(tensor: Tensor, first: DimDynamic) -> Tensor:
        sizes = [first] + [DimDynamic.STATIC] * (tensor.ndim - 1)
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor, symbolic_context=context)

    batch = 3  # any number above 1, which torch would take for a constant
    example = (
        fake(torch.zeros(size(model)), DimDynamic.STATIC),
        fake(torch.zeros(batch, *model.image_shape), DimDynamic.DYNAMIC),
        fake(torch.zeros(batch, dtype=torch.int64), DimDynamic.DYNAMIC),
    )
    # Python's own kernels keep B free where the compiled ones (padding) would fix it.
    with enable_python_dispatcher():
        return make_fx(gradient, _decompositions(), "fake")(*example)


def convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Write the gradients of a 2-D convolution as convolutions: aten.convolution_backward.

    With respect to the input: the transposed convolution of the output's gradient. With respect to
    the weight: input and output gradient convolved over the batch, stride and dilation swapped.

    Raises:
        NotImplementedError: a transposed, grouped or biased convolution, which no model has.
    """
    if transposed or groups != 1 or mask[2]:
        raise NotImplementedError("only plain convolutions without groups or bias")
    to_input = to_weight = None
    if mask[0]:
        # What the strides left over at the far side of the input.
        rest = [
            x.shape[2 + i]
            + 2 * padding[i]
            - dilation[i] * (weight.shape[2 + i] - 1)
            - stride[i] * (gradient.shape[2 + i] - 1)
            - 1
            for i in range(2)
        ]
        to_input = aten.convolution(
            gradient, weight, None, stride, padding, dilation, True, rest, 1
        )
    if mask[1]:
        x, gradient = x.transpose(0, 1), gradient.transpose(0, 1)
        full = aten.convolution(x, gradient, None, dilation, padding, stride, False, [0, 0], 1)
        to_weight = full.transpose(0, 1)[:, :, : weight.shape[2], : weight.shape[3]]
    return to_input, to_weight, None


def threshold_backward(gradient: Tensor, output: Tensor, threshold: float) -> Tensor:
    """Write the gradient of ReLU as a product, which ONNX Runtime runs faster than a choice."""
    return gradient * (output > threshold)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    return {
        **core_aten_decompositions(),
        **get_decompositions([aten.max_pool2d_with_indices_backward]),
        aten.convolution_backward.default: convolution_backward,
        aten.threshold_backward.default: threshold_backward,
    }
