"""The networks in the form that runs fastest in ONNX Runtime: rows of channels.

The same functions as `models`, restated: activations are [B, positions, channels], a convolution is
a gather of 3x3 patches and one matrix product, and weights are packed as those products need them.
Gathers, batch norm and pooling carry gradients of a few operations each, written by hand; the rest
is autograd's. Tests compare outputs and gradients with `models` in float64. The loop: `graphs`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.minibatches import IntArray
from reptile.models import BATCH_NORM_EPSILON, CONV_LAYERS, Network, Params, flatten, unflatten


class Layout:
    """How the weights of one network are packed: each as the matrix its product takes.

    A convolution's weight is [out, 9 taps · in], tap = 3·ky + kx; a linear one's [out, in], with
    the inputs of conv4's head ordered by position, then channel.
    """

    def __init__(self, model: Network) -> None:
        self._model = model
        self._channels = model.settings.filters if model.settings.name == "conv4" else 0
        self.shapes = {
            name: value.shape
            for name, value in self._matrices(
                {name: torch.zeros(shape) for name, shape in model.shapes.items()}
            ).items()
        }

    def pack(self, weights: Tensor) -> Tensor:
        """Return a flat vector [P] in packed order."""
        matrices = self._matrices(unflatten(self._model, weights))
        return torch.cat([matrix.reshape(-1) for matrix in matrices.values()])

    def named(self, packed: Tensor) -> dict[str, Tensor]:
        """Name the matrices in a packed vector [P]."""
        parts = torch.split(packed, [shape.numel() for shape in self.shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def unpack(self, packed: Tensor) -> Tensor:
        """Return a packed vector [P] in the order of `models`."""
        params = {}
        for name, matrix in self.named(packed).items():
            shape = self._model.shapes[name]
            if name.startswith("conv"):
                matrix = matrix.view(shape[0], 3, 3, shape[1]).permute(0, 3, 1, 2)
            elif self._channels and len(shape) == 2:
                matrix = matrix.view(shape[0], -1, self._channels).transpose(1, 2)
            params[name] = matrix.reshape(shape)
        return flatten(self._model, params)

    def _matrices(self, params: Params) -> dict[str, Tensor]:
        matrices = {}
        for name, value in params.items():
            if name.startswith("conv"):
                value = value.permute(0, 2, 3, 1)
            elif self._channels and value.ndim == 2:
                value = value.view(len(value), self._channels, -1).transpose(1, 2)
            matrices[name] = value.flatten(1) if value.ndim > 1 else value
        return matrices


def indices(model: Network) -> tuple[Tensor, ...]:
    """Return the indices of each layer's gathers, constants of the model, for `logits`."""
    if model.settings.name == "mlp":
        return ()
    pool = model.settings.downsampling == "pool"
    _, height, width = model.image_shape
    arrays: list[IntArray] = []
    for _ in range(CONV_LAYERS):
        arrays += _patches(height, width, 1 if pool else 2)
        if pool:
            arrays += _windows(height, width)
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return tuple(torch.from_numpy(index) for index in arrays)


def logits(
    model: Network, params: Params, images: Tensor, share: Tensor, index: Sequence[Tensor]
) -> Tensor:
    """Map images [B, C, H, W] in 0..1 to logits [B, ways], as `models` does on a batch.

    Args:
        model: the network.
        params: its packed matrices by name.
        images: the batch.
        share: 1/B, [].
        index: what `indices` returned.
    """
    if model.settings.name == "mlp":  # its weights are matrices already
        return model.forward(params, images)
    x = _conv4(model, params, images, share, iter(index))
    return x @ params["head.weight"].t() + params["head.bias"]


def _conv4(
    model: Network, params: Params, images: Tensor, share: Tensor, index: Iterator[Tensor]
) -> Tensor:
    x = images.flatten(2).transpose(1, 2)
    for layer in range(1, CONV_LAYERS + 1):
        forward, backward = next(index), next(index)
        outputs = len(forward) // 9
        patches = _Gather.apply(x, forward, backward).reshape(-1, 9 * x.shape[-1])
        rows = patches @ params[f"conv{layer}.weight"].t()
        x = rows.reshape(-1, outputs, rows.shape[-1])
        scale, shift = params[f"norm{layer}.weight"], params[f"norm{layer}.bias"]
        x, *_ = _BatchNorm.apply(x, scale, shift, share / outputs)
        if model.settings.downsampling == "pool":
            x, *_ = _MaxPool.apply(x, next(index), next(index))
        x = F.relu(x)
    return x.flatten(1)


def _patches(height: int, width: int, stride: int) -> tuple[IntArray, IntArray]:
    """Index a 3x3 convolution with TensorFlow's SAME padding, as `models` pads.

    Returns:
        forward [outputs · 9]: the position that each tap of each output reads, or the number of
        positions where it reads outside.
        backward [most, positions]: the places in `forward` that read each position, filled up with
        the length of `forward`.
    """
    top, left = (1, 1) if stride == 1 else (height % 2, width % 2)
    rows = stride * np.arange(math.ceil(height / stride))[:, None] + np.arange(3) - top
    columns = stride * np.arange(math.ceil(width / stride))[:, None] + np.arange(3) - left
    y, x = rows[:, None, :, None], columns[None, :, None, :]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    forward = np.where(inside, y * width + x, height * width).ravel()
    readers: list[list[int]] = [[] for _ in range(height * width + 1)]
    for place, position in enumerate(forward):
        readers[position].append(place)
    most = max(map(len, readers[:-1]))
    padded = [reads + [forward.size] * (most - len(reads)) for reads in readers[:-1]]
    return forward, np.ascontiguousarray(np.array(padded).T)


def _windows(height: int, width: int) -> tuple[IntArray, IntArray]:
    """Index 2x2 max-pooling that keeps an odd side's last row or column.

    Returns:
        windows [4, outputs]: the positions of each window, row by row; one that is outside is
        replaced by the window's first, which then wins as the first of equals.
        places [positions]: where each position stands in `windows`, flattened.
    """
    y, x = 2 * np.arange(math.ceil(height / 2))[:, None], 2 * np.arange(math.ceil(width / 2))
    windows = []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        inside = (y + down < height) & (x + right < width)
        windows.append(np.where(inside, (y + down) * width + x + right, y * width + x).ravel())
    flat = np.concatenate(windows)
    _, places = np.unique(flat, return_index=True)  # the first place: a position inside the window
    return np.stack(windows), places


def _with_zeros(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 1))


class _Gather(torch.autograd.Function):
    """A gather whose gradient is a gather and a sum, where autograd would scatter."""

    @staticmethod
    def forward(x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        return _with_zeros(x).index_select(1, forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        read = _with_zeros(gradient).index_select(1, index.flatten())
        return read.view(-1, *index.shape, read.shape[-1]).sum(1), None, None


def _total(rows: Tensor) -> Tensor:
    """Sum rows [B, positions, F] in two stages: ONNX Runtime adds one after another."""
    return rows.sum(1).sum(0)


class _BatchNorm(torch.autograd.Function):
    """Batch norm of rows [B, positions, F] on themselves; `share` is 1/(B · positions), []."""

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, shift: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        off = x - _total(x) * share
        inverse = torch.rsqrt(_total(off * off) * share + BATCH_NORM_EPSILON)
        return off * (inverse * scale) + shift, off, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, off, inverse = output
        ctx.mark_non_differentiable(off, inverse)
        ctx.save_for_backward(off, inverse, inputs[1], inputs[3])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        off, inverse, scale, share = ctx.saved_tensors
        to_shift = _total(gradient)
        to_scale = _total(gradient * off) * inverse
        centred = gradient - to_shift * share - off * (inverse * to_scale * share)
        return centred * (inverse * scale), to_scale, to_shift, None


class _MaxPool(torch.autograd.Function):
    """The largest of each window; the first of equals gets the gradient, as in PyTorch."""

    @staticmethod
    def forward(x: Tensor, windows: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        a, b, c, d = (x.index_select(1, window) for window in windows)
        first, second = torch.maximum(a, b), torch.maximum(c, d)
        wins = ((first >= second).to(x), (a >= b).to(x), (c >= d).to(x))
        return torch.maximum(first, second), *wins

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        first_wins, a_wins, c_wins, places = ctx.saved_tensors
        first = gradient * first_wins
        second = gradient - first
        a, c = first * a_wins, second * c_wins
        return torch.cat([a, first - a, c, second - c], 1).index_select(1, places), None, None
