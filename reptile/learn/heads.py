"""Closed-form heads: a linear classifier from a support set in one step, without gradients.

Both give weights [W, D] and biases [W] for features [D], so that whatever is trained through a head
is used in the same way: logits = features · weightᵀ + bias.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.models import Params

Solve = Callable[[Tensor, Tensor], Tensor]
"""From a symmetric positive definite matrix [S, S] and [S, W] to the solution [S, W]."""


class Classifier(NamedTuple):
    """A linear classifier of features."""

    weight: Tensor  # [W, D]
    bias: Tensor  # [W]

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [N, W] of features [N, D]."""
        return F.linear(features, self.weight, self.bias)


class Head(ABC):
    """How a support set becomes a classifier."""

    initial: ClassVar[dict[str, float]]
    """Its learnt numbers by name, each a logarithm, and where they start."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the learnt numbers."""
        return dict.fromkeys(self.initial, torch.Size(()))

    @abstractmethod
    def fit(
        self,
        params: Params,
        features: Tensor,
        labels: Tensor,
        solve: Solve = torch.linalg.solve,
    ) -> Classifier:
        """Return the classifier of a support set.

        Args:
            params: the head's learnt numbers.
            features: of the support set, [S, D].
            labels: one-hot, [S, W], of the features' type.
            solve: solves the linear system, where there is one.
        """


class PrototypeHead(Head):
    """Nearest prototype: logits are -s·‖f - c‖², with the mean c of each class's features.

    Snell et al., Prototypical networks for few-shot learning (2017), where s = 1; here s is learnt.
    ‖f‖² is left out, as it is the same for every class. A class without examples has prototype 0.
    """

    initial: ClassVar[dict[str, float]] = {"head.scale": 0.0}

    def fit(
        self,
        params: Params,
        features: Tensor,
        labels: Tensor,
        solve: Solve = torch.linalg.solve,
    ) -> Classifier:
        """See `Head.fit`."""
        prototypes = (labels.T @ features) / labels.sum(0).clamp(min=1)[:, None]
        scale = params["head.scale"].exp()
        return Classifier(2 * scale * prototypes, -scale * prototypes.square().sum(1))


class RidgeHead(Head):
    """Ridge regression on the one-hot labels, in closed form.

    Bertinetto et al., Meta-learning with differentiable closed-form solvers (R2D2, 2019): with
    A = [features, 1], W = Aᵀ(AAᵀ + λI)⁻¹Y and logits α·A·W; λ and α are learnt. R2D2's further bias
    is left out, as it is the same for every class.
    """

    initial: ClassVar[dict[str, float]] = {"head.strength": 0.0, "head.scale": math.log(4)}

    def fit(
        self,
        params: Params,
        features: Tensor,
        labels: Tensor,
        solve: Solve = torch.linalg.solve,
    ) -> Classifier:
        """See `Head.fit`."""
        strength = params["head.strength"].exp()
        identity = torch.eye(features.shape[0], dtype=features.dtype, device=features.device)
        kernel = features @ features.T + 1 + strength * identity  # 1: of the column of ones
        dual = params["head.scale"].exp() * solve(kernel, labels)
        return Classifier(dual.T @ features, dual.sum(0))


HEADS: dict[str, Head] = {"protonet": PrototypeHead(), "ridge": RidgeHead()}
"""By the name of the algorithm that trains through them."""


def one_hot(labels: Tensor, ways: int, like: Tensor) -> Tensor:
    """Return labels [S] as [S, ways], of the type of `like`."""
    return F.one_hot(labels, ways).to(like.dtype)
