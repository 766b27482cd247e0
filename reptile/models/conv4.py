"""The paper's convolutional networks."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.models.base import LayerStatistics, Network, Params, Statistics

BATCH_NORM_EPSILON = 1e-3  # TensorFlow's default, used for the paper's numbers
CONV_LAYERS = 4


@dataclass(frozen=True)
class Conv4(Network):
    """Four 3x3 convolutions with batch norm and ReLU, and a linear head.

    `stride`: convolutions of stride 2 (the paper's Omniglot network). `pool`: max-pooling between
    batch norm and ReLU (its mini-ImageNet network). Padding is TensorFlow's SAME, as in the
    reference. The convolutions have no bias: batch norm would cancel it, and Adam with beta1 = 0
    would turn the rounding noise of its zero gradient into full steps.
    """

    convolve: Callable[..., Tensor] = field(default=F.conv2d, repr=False, compare=False)
    """How a convolution is computed: `F.conv2d`, or another form of it."""

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """conv1.weight [F, C, 3, 3], norm1.weight [F], norm1.bias [F], …, head.bias [outputs]."""
        filters = self.settings.filters
        channels = self.image_shape[0]
        shapes: dict[str, torch.Size] = {}
        for layer in range(1, CONV_LAYERS + 1):
            shapes[f"conv{layer}.weight"] = torch.Size((filters, channels, 3, 3))
            shapes[f"norm{layer}.weight"] = torch.Size((filters,))
            shapes[f"norm{layer}.bias"] = torch.Size((filters,))
            channels = filters
        return shapes | self._head()

    @property
    def feature_size(self) -> int:
        """D, the number of the last layer's activations."""
        height, width = (math.ceil(side / 2**CONV_LAYERS) for side in self.image_shape[1:])
        return int(self.settings.filters * height * width)

    def features(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """Map inputs [B, *image_shape] to what the head sees, [B, D]; otherwise as `forward`."""
        x = self._seen(images)
        for layer in range(1, CONV_LAYERS + 1):
            x = self._convolve(params, x, layer)
            if f"norm{layer}.weight" in params:
                mean, variance = statistics[layer - 1] if statistics else (None, None)
                x = self._normalise(params, x, layer, mean, variance)
            x = self._activate(x)
        return x.flatten(1)

    def statistics(self, params: Params, images: Tensor) -> Statistics:
        """Return the statistics of each layer's convolution on this batch."""
        x, statistics = self._seen(images), []
        for layer in range(1, CONV_LAYERS + 1):
            x = self._convolve(params, x, layer)
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            statistics.append(LayerStatistics(mean, variance))
            x = self._activate(self._normalise(params, x, layer, mean, variance))
        return tuple(statistics)

    def _convolve(self, params: Params, x: Tensor, layer: int) -> Tensor:
        weight, bias = params[f"conv{layer}.weight"], params.get(f"conv{layer}.bias")
        if self.settings.downsampling == "pool":
            return self.convolve(x, weight, bias, padding=1)
        # SAME padding at stride 2 puts an odd total on the far side: (0, 1) for even sizes.
        left, top = x.shape[-1] % 2, x.shape[-2] % 2
        return self.convolve(F.pad(x, (left, 1, top, 1)), weight, bias, stride=2)

    def _normalise(
        self, params: Params, x: Tensor, layer: int, mean: Tensor | None, variance: Tensor | None
    ) -> Tensor:
        # Not F.batch_norm: that refuses a single value a channel (one tiny image), where the
        # reference's batch norm gives the bias.
        scale, shift = params[f"norm{layer}.weight"], params[f"norm{layer}.bias"]
        training = mean is None
        x = x.to(scale.dtype)  # in mixed precision it is less precise
        return torch.batch_norm(
            x, scale, shift, mean, variance, training, 0.0, BATCH_NORM_EPSILON, False
        )

    def _activate(self, x: Tensor) -> Tensor:
        if self.settings.downsampling == "pool":
            x = F.max_pool2d(x, 2, ceil_mode=True)
        return F.relu(x)
