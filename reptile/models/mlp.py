"""Fully connected networks: the article's classifier, and the regressor of its sinusoids."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.models.base import Network, Params, Statistics


@dataclass(frozen=True)
class MLP(Network):
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
        return shapes | self._head()

    @property
    def feature_size(self) -> int:
        """D, the width of the last hidden layer."""
        return self.settings.hidden[-1]

    def features(
        self, params: Params, images: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """Map inputs [B, *image_shape] to what the head sees, [B, D]; there is no batch norm."""
        activate = torch.tanh if self.settings.activation == "tanh" else F.relu
        x = self._seen(images).flatten(1)
        for layer in range(1, len(self.settings.hidden) + 1):
            x = activate(
                F.linear(x, params[f"hidden{layer}.weight"], params[f"hidden{layer}.bias"])
            )
        return x

    def statistics(self, params: Params, images: Tensor) -> Statistics:
        """Return nothing: there is no batch norm."""
        return ()
