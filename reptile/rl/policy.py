"""A policy: a network of the library whose outputs are a distribution of actions.

Its weights are one flat vector [P], as those of all networks here.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.models import Network, initialise, unflatten
from reptile.models.base import size
from reptile.models.mlp import MLP
from reptile.objectives import REGRESSION
from reptile.rl.environments import Family
from reptile.settings import ModelSettings

LOG_TWO_PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Policy:
    """Normal with a mean from the network and a learnt deviation; or categorical.

    The logarithms of the deviations, one an action's number, are the last of the weights.
    """

    network: Network
    discrete: bool

    @classmethod
    def of(cls, family: Family, hidden: tuple[int, ...]) -> "Policy":
        """Return the policy for a family of tasks: hidden layers with ReLU."""
        settings = ModelSettings(name="mlp", hidden=hidden, activation="relu")
        shape = (1, 1, family.observations)
        return cls(MLP(family.actions, shape, settings, REGRESSION), family.discrete)

    @property
    def size(self) -> int:
        """P, the number of weights."""
        return size(self.network) + (0 if self.discrete else self.network.outputs)

    def initialise(self, seed: int) -> Tensor:
        """Return weights before any training [P]; deviations are 1."""
        weights = initialise(self.network, seed)
        return F.pad(weights, (0, self.size - len(weights)))

    def outputs(self, weights: Tensor, observations: Tensor) -> Tensor:
        """Return means or logits [N, A] for observations [N, O]."""
        params = unflatten(self.network, weights[: size(self.network)])
        return self.network.forward(params, observations)

    def log_deviation(self, weights: Tensor) -> Tensor:
        """Return the logarithms of the deviations [..., A]; none if discrete."""
        return weights[..., size(self.network) :]

    def log_probability(self, weights: Tensor, observations: Tensor, actions: Tensor) -> Tensor:
        """Return the log-density of actions [N, A], or the log-probability of integers [N]: [N]."""
        outputs = self.outputs(weights, observations)
        if self.discrete:
            chosen = actions[:, None] == torch.arange(self.network.outputs)
            return (outputs.log_softmax(-1) * chosen.to(outputs.dtype)).sum(-1)
        spread = self.log_deviation(weights)
        scaled = (actions - outputs) * (-spread).exp()
        return (-0.5 * (scaled.square() + LOG_TWO_PI) - spread).sum(-1)

    def act(self, weights: Tensor, observations: Tensor, rng: np.random.Generator) -> Tensor:
        """Draw actions [T, R, A], or integers [T, R], for tasks side by side.

        Args:
            weights: [T, P].
            observations: [T, R, O].
            rng: gives the noise.
        """
        outputs = torch.func.vmap(self.outputs)(weights, observations)
        if self.discrete:
            noise = torch.from_numpy(rng.gumbel(size=outputs.shape))
            return (outputs + noise).argmax(-1)
        noise = torch.from_numpy(rng.standard_normal(outputs.shape, dtype=np.float32))
        return outputs + self.log_deviation(weights).exp()[:, None] * noise
