"""Backward passes written as forward operations, which ONNX has.

They extend torch's core ATen decompositions; sizes of the batch may be symbolic, all others are
fixed. Tests compare each with autograd. For the tracing that applies them see `tracing`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

aten = torch.ops.aten

Sizes = Sequence[int]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the table for `make_fx`: operator to the function that replaces it."""
    return {
        **core_aten_decompositions(),
        **get_decompositions([aten.max_pool2d_with_indices_backward]),
        aten.empty.memory_format: empty,
        aten.empty_permuted.default: empty,
        aten.copy.default: copy,
        aten.threshold_backward.default: threshold_backward,
        aten.convolution_backward.default: convolution_backward,
        aten.avg_pool2d_backward.default: avg_pool_backward,
        aten.avg_pool3d_backward.default: avg_pool_backward,
        aten._adaptive_avg_pool2d.default: adaptive_avg_pool,
        aten._adaptive_avg_pool3d.default: adaptive_avg_pool,
        aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool_backward,
        aten._adaptive_avg_pool3d_backward.default: adaptive_avg_pool_backward,
        aten.adaptive_max_pool2d.default: adaptive_max_pool2d,
        aten.adaptive_max_pool2d_backward.default: adaptive_max_pool2d_backward,
        aten._native_batch_norm_legit.no_stats: batch_norm,
        aten.native_batch_norm_backward.default: batch_norm_backward,
        aten.rrelu_with_noise.default: rrelu_with_noise,
        aten.rrelu_with_noise_backward.default: rrelu_with_noise_backward,
    }


def empty(sizes: Sizes, *layout: Any, dtype: torch.dtype | None = None, **form: Any) -> Tensor:
    """Allocate: what is overwritten later may as well be zeros."""
    return torch.zeros(sizes, dtype=dtype)


def copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Write assignment as expansion to the target's shape, which the exporter leaves out."""
    return source.to(target.dtype).expand(target.shape).clone()


def threshold_backward(gradient: Tensor, output: Tensor, threshold: float) -> Tensor:
    """Write the gradient of ReLU as a product, which ONNX Runtime runs faster than Where."""
    return gradient * (output > threshold)


def rrelu_with_noise(
    x: Tensor, noise: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any
) -> Tensor:
    """Take the mean slope: networks run in evaluation mode."""
    return torch.where(x > 0, x, x * ((lower + upper) / 2))


def rrelu_with_noise_backward(
    gradient: Tensor,
    output: Tensor,
    noise: Tensor,
    lower: float,
    upper: float,
    training: bool,
    is_result: bool,
) -> Tensor:
    """Return the gradient by the inputs of `rrelu_with_noise` with its mean slope."""
    return torch.where(output > 0, gradient, gradient * ((lower + upper) / 2))


def convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sizes | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Write the gradients of a convolution of any number of dimensions as convolutions.

    That of the input is a convolution with the same weight the other way round. That of the weight
    correlates the larger of input and gradient with the smaller: stride and dilation change places,
    and the batch is summed as channels are, so its size stays free.
    """
    to_input = to_weight = to_bias = None
    if wanted[0]:
        extra = [0] * len(stride)
        if not transposed:  # rows that the stride left over
            extra = [
                size - ((out - 1) * step - 2 * pad + far * (taps - 1) + 1)
                for size, out, taps, step, pad, far in zip(
                    x.shape[2:],
                    gradient.shape[2:],
                    weight.shape[2:],
                    stride,
                    padding,
                    dilation,
                    strict=True,
                )
            ]
        to_input = aten.convolution(
            gradient, weight, None, stride, padding, dilation, not transposed, extra, groups
        )
        for axis, size in enumerate(x.shape[2:], start=2):
            to_input = to_input.narrow(axis, 0, size)
    if wanted[1]:
        large, small = (gradient, x) if transposed else (x, gradient)
        # [B, G·C, …] -> [C, G·B, …] and [B, G·D, …] -> [G·D, B, …]: groups stay apart.
        apart = large.view(large.shape[0], groups, -1, *large.shape[2:])
        sources = apart.transpose(0, 2).flatten(1, 2)
        kernels = small.transpose(0, 1)
        none = [0] * len(stride)
        product = aten.convolution(
            sources, kernels, None, dilation, padding, stride, False, none, groups
        )
        to_weight = product.transpose(0, 1)  # [G·D, C, …]
        for axis, size in enumerate(weight.shape[2:], start=2):
            to_weight = to_weight.narrow(axis, 0, size)
    if wanted[2]:
        to_bias = total(gradient)
    return to_input, to_weight, to_bias


def total(x: Tensor) -> Tensor:
    """Sum [B, C, …] to [C] in two stages: ONNX Runtime adds one number after another."""
    return x.flatten(2).sum(2).sum(0) if x.dim() > 2 else x.sum(0)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise [B, C, …] by its statistics; also return the mean and 1/deviation [C]."""
    share = _share(x)
    mean = total(x) * share
    off = x - _channels(mean, x)
    inverse = torch.rsqrt(total(off * off) * share + epsilon)
    scale = inverse if weight is None else inverse * weight
    y = off * _channels(scale, x)
    return (y if bias is None else y + _channels(bias, x)), mean, inverse


def batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_inverse: Tensor | None,
    training: bool,
    epsilon: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, scale and shift."""
    if training:
        assert save_mean is not None and save_inverse is not None
        mean, inverse = save_mean, save_inverse
    else:
        assert running_mean is not None and running_var is not None
        mean, inverse = running_mean, torch.rsqrt(running_var + epsilon)
    off = x - _channels(mean, x)
    to_shift = total(gradient)
    to_scale = total(gradient * off) * inverse
    scale = inverse if weight is None else inverse * weight
    if training:
        share = _share(x)
        gradient = gradient - _channels(to_shift * share, x)
        gradient = gradient - off * _channels(to_scale * inverse * share, x)
    return gradient * _channels(scale, x), to_scale, to_shift


def _share(x: Tensor) -> Tensor | float:
    """Return 1 / the numbers in a channel of [B, C, …]."""
    return 1 / (x.shape[0] * x[0, 0].numel())


def _channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view([1, -1, *[1] * (x.dim() - 2)])


def avg_pool_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Multiply by each axis's matrix of averages."""
    axes = gradient.dim() - 2 if gradient.dim() > 3 else 2
    matrices = []
    for axis in range(-axes, 0):
        size, outputs = x.shape[axis], gradient.shape[axis]
        width, step, pad = (
            each[axis] if len(each) > 1 else each[0] for each in (kernel, stride or kernel, padding)
        )
        rows = []
        for start in range(-pad, -pad + outputs * step, step):
            end = min(start + width, size + pad)
            inside = range(max(start, 0), min(end, size))
            count = end - start if count_include_pad else len(inside)
            if divisor_override:
                count = 1
            rows.append([1 / count if place in inside else 0.0 for place in range(size)])
        matrices.append(rows)
    averaged = _multiply(gradient, matrices, transposed=True)
    return averaged / divisor_override if divisor_override else averaged


def adaptive_avg_pool(x: Tensor, outputs: Sizes) -> Tensor:
    """Multiply by each axis's matrix of averages."""
    sizes = x.shape[-len(outputs) :]
    if all(each == 1 for each in outputs):
        return x.mean(list(range(-len(outputs), 0)), keepdim=True)
    return _multiply(x, [_windows(*pair) for pair in zip(sizes, outputs, strict=True)])


def adaptive_avg_pool_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Multiply by each axis's matrix of averages, transposed."""
    axes = x.dim() - 2
    pairs = zip(x.shape[-axes:], gradient.shape[-axes:], strict=True)
    return _multiply(gradient, [_windows(*pair) for pair in pairs], transposed=True)


def _windows(size: int, outputs: int) -> list[list[float]]:
    """Return the weights [outputs, size] of adaptive average pooling along one axis."""
    rows = []
    for number in range(outputs):
        start, end = number * size // outputs, -(-(number + 1) * size // outputs)
        rows.append([1 / (end - start) if start <= i < end else 0.0 for i in range(size)])
    return rows


def _multiply(x: Tensor, matrices: list[list[list[float]]], transposed: bool = False) -> Tensor:
    """Multiply the last axes of x by a matrix each."""
    for axis, rows in zip(range(-len(matrices), 0), matrices, strict=True):
        matrix = torch.tensor(rows, dtype=x.dtype)  # [outputs, size]
        if not transposed:
            matrix = matrix.t()
        x = (x.transpose(axis, -1) @ matrix).transpose(axis, -1)
    return x


def adaptive_max_pool2d(x: Tensor, outputs: Sizes) -> tuple[Tensor, Tensor]:
    """Pool with equal windows; others are refused."""
    kernel = _equal_windows(x, outputs)
    return aten.max_pool2d_with_indices(x, kernel, kernel)  # type: ignore[no-any-return]


def adaptive_max_pool2d_backward(gradient: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Return the gradient by the inputs of `adaptive_max_pool2d`; equal windows only."""
    kernel = _equal_windows(x, gradient.shape[-2:])
    return aten.max_pool2d_with_indices_backward(  # type: ignore[no-any-return]
        gradient, x, kernel, kernel, [0, 0], [1, 1], False, indices
    )


def _equal_windows(x: Tensor, outputs: Sizes) -> list[int]:
    sizes = list(x.shape[-2:])
    if any(size % out for size, out in zip(sizes, outputs, strict=True)):
        raise NotImplementedError(
            f"adaptive max-pooling of {sizes} to {list(outputs)}, which are no equal windows"
        )
    return [size // out for size, out in zip(sizes, outputs, strict=True)]
