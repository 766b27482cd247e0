"""The interface of every network, and its weights as one flat vector.

The weights of a network are passed as one flat vector [P], so that a meta-step, an optimiser step
and a merge of states are each one line of arithmetic; `unflatten` restores names and shapes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reptile.errors import InputError
from reptile.objectives import CLASSIFICATION, Objective
from reptile.settings import ModelSettings

Params = Mapping[str, Tensor]

MASK_BIAS = -1e9  # a bias that makes an output's probability exactly 0, in float32 and float64


class LayerStatistics(NamedTuple):
    """Mean [F] and biased variance [F] of one batch norm's input."""

    mean: Tensor
    variance: Tensor


Statistics = tuple[LayerStatistics, ...]


class Model(Protocol):
    """A network as a pure function of its weights and inputs."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    @property
    def outputs(self) -> int:
        """Number of outputs: the ways of a classifier, the values that a regressor predicts.

        0 means no head: `forward` returns the features.
        """

    @property
    def objective(self) -> Objective:
        """The meaning of the outputs, with their loss."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one input: channels, height and width of an image."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the weights, in the order they have in the flat vector."""

    @property
    def has_batch_norm(self) -> bool:
        """Whether a prediction depends on the statistics of a batch."""

    @property
    def head_bias(self) -> str:
        """The adapted parameter [outputs] that is added to the outputs; empty for none."""

    def initialise(self, seed: int) -> Tensor:
        """Return the weights before any training, float32 [P]."""

    def forward(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """Map inputs [B, *image_shape], pixels in 0..1, to logits or values [B, outputs].

        Batch norm uses the batch's statistics, or `statistics` if given.
        """

    @property
    def feature_size(self) -> int:
        """D, the number of features of one input."""

    def features(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """Map inputs [B, *image_shape] to what the head sees, [B, D]; otherwise as `forward`."""

    def statistics(self, params: Params, images: Tensor) -> Statistics:
        """Return each batch norm's statistics on this batch; empty without batch norm."""


@dataclass(frozen=True)
class Network(ABC):
    """What the networks of this library have in common: settings, and a head that comes last."""

    outputs: int
    image_shape: tuple[int, ...]
    settings: ModelSettings
    objective: Objective = CLASSIFICATION
    preprocess: nn.Module | None = field(default=None, repr=False, compare=False)
    """What images pass before, of a tower; they then have `image_shape`."""

    @property
    def name(self) -> str:
        """Its name in the settings."""
        return self.settings.name

    @property
    def has_batch_norm(self) -> bool:
        """Whether a prediction depends on the statistics of a batch."""
        return any(name.startswith("norm") for name in self.shapes)

    @property
    def head_bias(self) -> str:
        """The parameter [outputs] that is added to the outputs; empty without a head."""
        return "head.bias" if self.outputs else ""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the weights, in the order they have in the flat vector."""

    @property
    @abstractmethod
    def feature_size(self) -> int:
        """D, the number of features of one input."""

    @abstractmethod
    def features(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """Map inputs [B, *image_shape] to what the head sees, [B, D]; otherwise as `forward`.

        Params with batch norm folded into the convolutions (`export.fold`) hold biases instead.
        """

    def forward(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """Map inputs [B, *image_shape] to [B, outputs]; without a head to features [B, D]."""
        features = self.features(params, images, statistics)
        if not self.outputs:
            return features
        return F.linear(features, params["head.weight"], params["head.bias"])

    def _head(self) -> dict[str, torch.Size]:
        """Return the shapes of the head, which come last."""
        if not self.outputs:
            return {}
        return {
            "head.weight": torch.Size((self.outputs, self.feature_size)),
            "head.bias": torch.Size((self.outputs,)),
        }

    @abstractmethod
    def statistics(self, params: Params, images: Tensor) -> Statistics:
        """Return each batch norm's statistics on this batch; empty without batch norm."""

    def _seen(self, images: Tensor) -> Tensor:
        """Return what the network sees of images."""
        seen: Tensor = self.preprocess(images) if self.preprocess else images
        return seen

    def initialise(self, seed: int) -> Tensor:
        """Draw the reference's (TensorFlow's) initialisation.

        Glorot uniform weights, zero biases, unit scale in batch norm.
        """
        generator = torch.Generator().manual_seed(seed)
        params = {}
        for name, shape in self.shapes.items():
            if name.startswith("norm") and name.endswith("weight"):
                params[name] = torch.ones(shape)
            elif name.endswith("bias"):
                params[name] = torch.zeros(shape)
            else:
                window = math.prod(shape[2:])
                bound = math.sqrt(6 / ((shape[0] + shape[1]) * window))
                params[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        return torch.cat([params[name].reshape(-1) for name in self.shapes])


def size(model: Model) -> int:
    """Return P, the number of weights."""
    return sum(shape.numel() for shape in model.shapes.values())


def unflatten(model: Model, weights: Tensor) -> dict[str, Tensor]:
    """Name the parts of a flat vector [..., P] as views [..., *shape]."""
    return named_parts(model.shapes, weights)


def named_parts(shapes: Mapping[str, torch.Size], vector: Tensor) -> dict[str, Tensor]:
    """Name the parts of any flat vector, whose length is that of all shapes together."""
    parts = torch.split(vector, [shape.numel() for shape in shapes.values()], dim=-1)
    lead = vector.shape[:-1]
    return {
        name: part.view(lead + shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def flatten(model: Model, params: Params) -> Tensor:
    """Join named weights into one flat vector [P], the inverse of `unflatten`."""
    parts = [params[name].reshape(-1) for name in model.shapes]
    return torch.cat(parts) if parts else torch.empty(0)


def initialise(model: Model, seed: int) -> Tensor:
    """Return a network's weights before any training, float32 [P]."""
    return model.initialise(seed)


def mask_absent_outputs(model: Model, weights: Tensor, present: Tensor) -> Tensor:
    """Return weights [..., P] that restrict a classifier to the outputs in `present`.

    A bias of `MASK_BIAS` takes an output out of the softmax: its probability and its gradients are
    exactly 0, so it stays out during adaptation. If all are present, the weights are unchanged.

    Args:
        model: the network.
        weights: where adaptation starts.
        present: bool [outputs], the labels in the support set.

    Raises:
        InputError: no adapted bias is added to the network's outputs.
    """
    if not model.head_bias:
        raise InputError(
            f"{model.name}: tasks of fewer classes than its {model.outputs} outputs need a linear "
            "layer with a bias as its last, and that among what is adapted; or train one with as "
            "many outputs as the tasks have classes"
        )
    before = 0
    for name, shape in model.shapes.items():
        if name == model.head_bias:
            break
        before += shape.numel()
    absent = MASK_BIAS * (~present).to(weights.dtype)
    return weights + F.pad(absent, (before, size(model) - before - model.outputs))
