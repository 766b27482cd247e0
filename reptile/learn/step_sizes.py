"""Where gradient steps start, and the relative size of each parameter's step.

MAML takes steps of one size. ANIL (Raghu et al., Rapid learning or feature reuse?, 2020) adapts the
head alone: the steps of all other parameters have size 0. Meta-SGD (Li et al., 2017) learns a size
for each parameter, MAML++ (Antoniou et al., 2019) one for each layer's weight or bias and each
inner step. All sizes are relative to `optimizer.learning_rate`.
"""

import torch
from torch import Tensor

from reptile.errors import InputError
from reptile.learn.optimizer import OptimizerState, fresh_state
from reptile.learn.prototypes import PrototypeState
from reptile.learn.reptile import MetaState
from reptile.models import Model, size
from reptile.settings import TrainSettings


def first_vector(settings: TrainSettings, model: Model, weights: Tensor) -> Tensor:
    """Return what is learnt, before training: the weights [P], then step sizes, all 1.

    Args:
        settings: of the training.
        model: the network.
        weights: of the network, [P].

    Returns:
        [P]; with Meta-SGD [P + P]; with sizes for L layers and K steps [P + L·K].
    """
    if settings.algorithm == "meta-sgd":
        return torch.cat([weights, torch.ones_like(weights)])
    if settings.episode.layer_step_sizes:
        return torch.cat([weights, weights.new_ones(len(model.shapes) * settings.inner_steps)])
    return weights


def relative_sizes(settings: TrainSettings, model: Model, vector: Tensor) -> Tensor:
    """Return the relative size of each parameter's step.

    [P]; of each of K steps, [K, P]; or [] where all are the same.

    Args:
        settings: of the training.
        model: the network.
        vector: what is learnt, as `first_vector` gives it.

    Raises:
        InputError: ANIL and Proto-MAML need a network that ends in an adapted linear layer.
    """
    if settings.algorithm in ("anil", "proto-maml") and not model.head_bias:
        raise InputError(
            f"train.algorithm = {settings.algorithm}: {model.name} does not end in an adapted "
            "linear layer with a bias; use maml"
        )
    if settings.algorithm == "meta-sgd":
        return vector[size(model) :]
    if settings.episode.layer_step_sizes:
        of_layers = vector[size(model) :].view(len(model.shapes), settings.inner_steps)
        lengths = torch.tensor([shape.numel() for shape in model.shapes.values()])
        return of_layers.t().repeat_interleave(lengths.to(vector.device), dim=1)
    if settings.algorithm == "anil":
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
    inner = fresh_state(weights)
    if settings.optimizer.name == "scaled_sgd":
        inner = OptimizerState(relative_sizes(settings, model, vector).flatten(), 0)
    state = PrototypeState if settings.algorithm == "proto-maml" else MetaState
    return state(weights, inner)


def untrained_start(settings: TrainSettings, model: Model, weights: Tensor) -> MetaState:
    """Return where gradient steps start from weights [P] before any training."""
    return start_of(settings, model, first_vector(settings, model, weights))
