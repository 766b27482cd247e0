"""The start of Proto-MAML: a head whose logits are those of the nearest prototype.

Triantafillou et al., Meta-Dataset (2020), section 3: with c the mean of a class's features, the
head's weight is 2c and its bias -‖c‖². Gradient steps then start from there.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reptile.learn.engines.base import Engine
from reptile.learn.optimizer import OptimizerState
from reptile.learn.reptile import MetaState
from reptile.models import MASK_BIAS, Model, flatten, unflatten
from reptile.tasks import Task


class PrototypeState(MetaState):
    """An initialisation whose head is replaced, for each task, by the support set's prototypes."""

    __slots__ = ()

    @torch.no_grad()
    def starts(self, engine: Engine, tasks: Sequence[Task]) -> tuple[Tensor, OptimizerState]:
        """Return where each task's steps start, [T, P], and the optimiser's state."""
        model, weights = engine.model, []
        for task, own in zip(tasks, self.weights.expand(len(tasks), -1), strict=True):
            features = engine.features(own, np.asarray(task.support))
            labels = torch.from_numpy(np.asarray(task.support_targets)).to(own.device)
            targets = one_hot(model, labels).to(features)
            weights.append(with_prototypes(model, own, features, targets))
        moment = self.inner.second_moment.expand(len(tasks), -1)
        return torch.stack(weights), self.inner._replace(second_moment=moment)


def with_prototypes(model: Model, weights: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    """Return weights [P] with a head of prototypes; differentiable by weights and features.

    Args:
        model: a classifier that ends in an adapted linear layer with a bias.
        weights: of the network, [P].
        features: of the support set, [S, D].
        targets: its labels, one-hot [S, outputs]. Outputs without examples are masked.
    """
    counts = targets.sum(0)
    means = (targets.t() @ features) / counts.clamp(min=1)[:, None]
    bias = torch.where(counts > 0, -means.square().sum(1), MASK_BIAS)
    params = unflatten(model, weights)
    weight_name = model.head_bias.removesuffix("bias") + "weight"
    return flatten(model, params | {weight_name: 2 * means, model.head_bias: bias})


def one_hot(model: Model, labels: Tensor) -> Tensor:
    """Return labels [S] as float32 [S, outputs]."""
    return torch.eye(model.outputs, device=labels.device)[labels]
