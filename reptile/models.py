"""The networks, as pure functions of (weights, images), and their losses.

All weights of a network travel as one flat vector [P], so that a meta-step, an optimiser and a
merge of states are each one line of arithmetic; `unflatten` gives them their names and shapes.
Nothing here knows about tasks or learning.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.config import ModelSettings
from reptile.errors import InputError

Params = Mapping[str, Tensor]
Objective = Literal["cross_entropy", "squared_error"]

BATCH_NORM_EPSILON = 1e-3  # TensorFlow's default, with which the paper's numbers were made
CONV_LAYERS = 4
ABSENT = -1e9  # a bias that leaves an output exactly no probability, in float32 and float64


class LayerStatistics(NamedTuple):
    """Mean [F] and biased variance [F] of one batch norm's input."""

    mean: Tensor
    variance: Tensor


Statistics = tuple[LayerStatistics, ...]


class Model(Protocol):
    """What every network offers; both models below do."""

    @property
    def outputs(self) -> int:
        """Number of outputs: the ways of a classifier, the values that a regressor predicts."""

    @property
    def objective(self) -> Objective:
        """What the loss is, which makes the network a classifier or a regressor."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an input."""

    @property
    def settings(self) -> ModelSettings:
        """The settings the network was built from."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the weights, in the order they have in the flat vector."""

    def logits(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """Map images [B, C, H, W] in 0..1 to logits, or a regressor's values, [B, outputs].

        Batch norm uses the batch's own statistics, or `statistics` where given. Params with batch
        norm folded into the convolutions (`export.fold`) hold biases instead, and skip it.
        """

    def statistics(self, params: Params, images: Tensor) -> Statistics:
        """Return what each batch norm measures on this batch; empty where there is none."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss [] of logits [B, outputs].

        Args:
            logits: what the network gives.
            targets: a classifier's labels, integers [B]; a regressor's values, floating point
                [B, outputs], or [B] of a single output.
        """


@dataclass(frozen=True)
class _Network:
    """What all networks have in common."""

    outputs: int
    image_shape: tuple[int, int, int]
    settings: ModelSettings
    objective: Objective = "cross_entropy"

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `Model.loss`."""
        if self.objective == "cross_entropy":
            return F.cross_entropy(logits, targets)
        return F.mse_loss(logits, targets.to(logits.dtype).reshape(logits.shape))


@dataclass(frozen=True)
class Conv4(_Network):
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
        channels, height, width = self.image_shape
        shapes: dict[str, torch.Size] = {}
        for layer in range(1, CONV_LAYERS + 1):
            shapes[f"conv{layer}.weight"] = torch.Size((filters, channels, 3, 3))
            shapes[f"norm{layer}.weight"] = torch.Size((filters,))
            shapes[f"norm{layer}.bias"] = torch.Size((filters,))
            channels, height, width = filters, math.ceil(height / 2), math.ceil(width / 2)
        shapes["head.weight"] = torch.Size((self.outputs, filters * height * width))
        shapes["head.bias"] = torch.Size((self.outputs,))
        return shapes

    def logits(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """See `Model.logits`."""
        x = images
        for layer in range(1, CONV_LAYERS + 1):
            x = self._convolve(params, x, layer)
            if f"norm{layer}.weight" in params:
                mean, variance = statistics[layer - 1] if statistics else (None, None)
                x = self._normalise(params, x, layer, mean, variance)
            x = self._activate(x)
        return F.linear(x.flatten(1), params["head.weight"], params["head.bias"])

    def statistics(self, params: Params, images: Tensor) -> Statistics:
        """See `Model.statistics`: one entry a layer."""
        x, found = images, []
        for layer in range(1, CONV_LAYERS + 1):
            x = self._convolve(params, x, layer)
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            found.append(LayerStatistics(mean, variance))
            x = self._activate(self._normalise(params, x, layer, mean, variance))
        return tuple(found)

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
        return torch.batch_norm(
            x, scale, shift, mean, variance, training, 0.0, BATCH_NORM_EPSILON, False
        )

    def _activate(self, x: Tensor) -> Tensor:
        if self.settings.downsampling == "pool":
            x = F.max_pool2d(x, 2, ceil_mode=True)
        return F.relu(x)


@dataclass(frozen=True)
class MLP(_Network):
    """Hidden layers with ReLU or tanh, and a linear head.

    One of 64 with ReLU is the article's network; two of 64 with tanh that of its sinusoids.
    """

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """hidden1.weight [width, C·H·W], hidden1.bias [width], …, head.bias [outputs]."""
        shapes: dict[str, torch.Size] = {}
        inputs = math.prod(self.image_shape)
        for layer, width in enumerate(self.settings.hidden, start=1):
            shapes[f"hidden{layer}.weight"] = torch.Size((width, inputs))
            shapes[f"hidden{layer}.bias"] = torch.Size((width,))
            inputs = width
        shapes["head.weight"] = torch.Size((self.outputs, inputs))
        shapes["head.bias"] = torch.Size((self.outputs,))
        return shapes

    def logits(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """See `Model.logits`; there is no batch norm."""
        activate = torch.tanh if self.settings.activation == "tanh" else F.relu
        x = images.flatten(1)
        for layer in range(1, len(self.settings.hidden) + 1):
            x = activate(
                F.linear(x, params[f"hidden{layer}.weight"], params[f"hidden{layer}.bias"])
            )
        return F.linear(x, params["head.weight"], params["head.bias"])

    def statistics(self, params: Params, images: Tensor) -> Statistics:
        """See `Model.statistics`: none."""
        return ()


def build_model(
    settings: ModelSettings,
    outputs: int,
    image_shape: tuple[int, int, int],
    objective: Objective = "cross_entropy",
) -> Model:
    """Build the network that `settings` names.

    Args:
        settings: its kind and sizes.
        outputs: a classifier's ways, or the number of values that a regressor predicts.
        image_shape: (C, H, W) of an input; a point of n coordinates is (n, 1, 1).
        objective: the loss.
    """
    if settings.name == "mlp":
        return MLP(outputs, image_shape, settings, objective)
    if min(image_shape[1:]) < 2:
        raise InputError(f"conv4 needs images of at least 2x2 pixels, not {image_shape[1:]}")
    return Conv4(outputs, image_shape, settings, objective)


def size(model: Model) -> int:
    """Return P, the number of weights."""
    return sum(shape.numel() for shape in model.shapes.values())


def unflatten(model: Model, weights: Tensor) -> dict[str, Tensor]:
    """Name the parts of a flat vector [..., P] as views [..., *shape]."""
    parts = torch.split(weights, [shape.numel() for shape in model.shapes.values()], dim=-1)
    lead = weights.shape[:-1]
    return {
        name: part.view(lead + shape)
        for (name, shape), part in zip(model.shapes.items(), parts, strict=True)
    }


def flatten(model: Model, params: Params) -> Tensor:
    """Join named weights into one flat vector [P], the inverse of `unflatten`."""
    return torch.cat([params[name].reshape(-1) for name in model.shapes])


def silence(model: Model, weights: Tensor, present: Tensor) -> Tensor:
    """Return weights [..., P] under which a classifier has only the outputs in `present`.

    A bias of `ABSENT` takes an output out of the softmax: its probability and all of its gradients
    are exactly 0, so it stays out however long one adapts. Where all are present nothing changes.

    Args:
        model: the network.
        weights: where adaptation starts.
        present: bool [outputs], the labels that the support set has.
    """
    absent = ABSENT * (~present).to(weights.dtype)
    return weights + F.pad(absent, (size(model) - model.outputs, 0))  # the head's bias comes last


def initialise(model: Model, seed: int) -> Tensor:
    """Draw a random initialisation, float32 [P]: the reference's (TensorFlow's) defaults.

    Glorot uniform weights, zero biases, unit scale in batch norm.
    """
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in model.shapes.items():
        if name.startswith("norm") and name.endswith("weight"):
            params[name] = torch.ones(shape)
        elif name.endswith("bias"):
            params[name] = torch.zeros(shape)
        else:
            window = math.prod(shape[2:])
            bound = math.sqrt(6 / ((shape[0] + shape[1]) * window))
            params[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    return flatten(model, params)


def to_unit(pixels: Tensor) -> Tensor:
    """Scale pixels 0..255 to float32 in 0..1, the networks' input."""
    return pixels.to(torch.float32) / 255
