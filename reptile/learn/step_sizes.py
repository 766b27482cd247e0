"""Where gradient steps start, and the relative size of each parameter's step.

MAML takes steps of one size. ANIL (Raghu et al., Rapid learning or feature reuse?, 2020) adapts the
head alone: the steps of all other parameters have size 0. Meta-SGD (Li et al., 2017) learns a size
for each parameter. All sizes are relative to `optimizer.learning_rate`.
"""

import torch
from torch import Tensor

from reptile.errors import InputError
from reptile.learn.optimizer import OptimizerState, fresh_state
from reptile.learn.reptile import MetaState
from reptile.models import Model, size
from reptile.settings import TrainSettings


def first_vector(settings: TrainSettings, weights: Tensor) -> Tensor:
    """Return what is learnt, before training: the weights [P], and Meta-SGD's step sizes [P]."""
    if settings.algorithm == "meta-sgd":
        return torch.cat([weights, torch.ones_like(weights)])
    return weights


def relative_sizes(settings: TrainSettings, model: Model, vector: Tensor) -> Tensor:
    """Return the relative size of each parameter's step, [P], or [] where all are the same.

    Args:
        settings: of the training.
        model: the network.
        vector: what is learnt, as `first_vector` gives it.

    Raises:
        InputError: ANIL needs a network that ends in an adapted linear layer.
    """
    if settings.algorithm == "meta-sgd":
        return vector[size(model) :]
    if settings.algorithm == "anil":
        if not model.head_bias:
            raise InputError(
                f"train.algorithm = anil: {model.name} does not end in an adapted linear layer "
                "with a bias; use maml"
            )
        head = model.head_bias.removesuffix("bias")
        sizes = [
            torch.full((shape.numel(),), float(name.startswith(head)))
            for name, shape in model.shapes.items()
        ]
        return torch.cat(sizes).to(vector)
    return torch.ones((), dtype=vector.dtype, device=vector.device)


def start_of(settings: TrainSettings, model: Model, vector: Tensor) -> MetaState:
    """Return where gradient steps start, from what is learnt."""
    weights = vector[: size(model)]
    if settings.optimizer.name != "scaled_sgd":
        return MetaState(weights, fresh_state(weights))
    return MetaState(weights, OptimizerState(relative_sizes(settings, model, vector), 0))


def untrained_start(settings: TrainSettings, model: Model, weights: Tensor) -> MetaState:
    """Return where gradient steps start from weights [P] before any training."""
    return start_of(settings, model, first_vector(settings, weights))
