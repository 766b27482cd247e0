"""Learners that take no gradient step: a network's features as they are, and a closed-form head.

What a checkpoint is worth without adaptation; trained through a head or not.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.learn.checkpoint import Checkpoint, build_network
from reptile.learn.engines import make_engine
from reptile.learn.episodic import ClosedForm, EpisodicState, population_statistics
from reptile.learn.heads import HEADS, BayesHead
from reptile.models import Network, size, unflatten
from reptile.settings import OptimizerSettings

HeadName = Literal["prototypes", "ridge"]
ALGORITHM_OF: dict[HeadName, str] = {"prototypes": "protonet", "ridge": "ridge"}
"""The algorithm that trains through the head."""


def unadapted(
    checkpoint: Checkpoint, data: PreparedData, head: HeadName, strength: float | None = None
) -> ClosedForm:
    """Return the learner that a checkpoint gives without gradient steps.

    Batch norm uses the statistics of a sample of the training images, so that the features of an
    image depend on that image alone.

    Args:
        checkpoint: of any algorithm.
        data: what it was trained on, of classes.
        head: classifies by the features.
        strength: of ridge regression, for the kernel of the features; None for the head's default.
    """
    if checkpoint.info.settings.closed_form:
        return with_head(checkpoint.closed_form, head, strength)
    return frozen_features(checkpoint, checkpoint.meta.weights, data, head, strength)


def frozen_features(
    checkpoint: Checkpoint,
    weights: Tensor,
    data: PreparedData,
    head: HeadName = "prototypes",
    strength: float | None = None,
) -> ClosedForm:
    """Return the learner without gradient steps that any weights [P] of the network give."""
    model, seed = checkpoint.model, checkpoint.info.settings.seed
    engine = make_engine("eager", model, OptimizerSettings(), data.images, weights.device)
    statistics = population_statistics(engine, weights, data.split("train"), seed)
    chosen = HEADS[ALGORITHM_OF[head]]
    numbers = {name: value.to(weights) for name, value in chosen.initial.items()}
    learner = ClosedForm(model, chosen, unflatten(model, weights) | numbers, statistics)
    return with_head(learner, head, strength)


def with_head(learner: ClosedForm, head: HeadName, strength: float | None = None) -> ClosedForm:
    """Return a learner of the same features with another head, its numbers at their start."""
    chosen = HEADS[ALGORITHM_OF[head]]
    like = next(iter(learner.params.values()))
    numbers = {name: value.to(like) for name, value in chosen.initial.items()}
    if strength is not None:
        numbers["head.strength"] = like.new_tensor(strength).log()
    body = {name: value for name, value in learner.params.items() if name in learner.model.shapes}
    return ClosedForm(learner.model, chosen, body | numbers, learner.statistics)


def as_closed_form(
    checkpoint: Checkpoint, data: PreparedData, head: HeadName, strength: float | None = None
) -> Checkpoint:
    """Return `unadapted` as a checkpoint, as if it had been trained through the head.

    Raises:
        InputError: a module with a head, which cannot be taken off.
    """
    learner, settings = unadapted(checkpoint, data, head, strength), checkpoint.info.settings
    if not isinstance(checkpoint.model, Network) and not settings.closed_form:
        raise InputError(
            f"evaluate.learner = {head}: the head of {checkpoint.model.name} cannot be taken off; "
            f"train with algorithm: {ALGORITHM_OF[head]}, or use evaluate.learner: trained"
        )
    settings = settings.model_copy(update={"algorithm": ALGORITHM_OF[head]})
    info = checkpoint.info.model_copy(update={"settings": settings})
    model = checkpoint.model if checkpoint.info.settings.closed_form else build_network(info)
    names = (*model.shapes, *learner.head.shapes)
    weights = torch.cat([learner.params[name].reshape(-1) for name in names])
    state = EpisodicState.start(weights[: size(model)], learner.head)
    return Checkpoint(model, state._replace(weights=weights, statistics=learner.statistics), info)


def exported(
    checkpoint: Checkpoint, data: PreparedData, metrics: Mapping[str, Any] | None
) -> Checkpoint:
    """Return the checkpoint that a bundle is made of: with the learner that its evaluation names.

    Args:
        checkpoint: what was trained and evaluated.
        data: what it was trained on.
        metrics: of the evaluation, as in metrics.json; None if there was none. Ridge regression
            takes its strength at the fewest shots.

    Raises:
        InputError: see `as_closed_form`.
    """
    learner = (metrics or {}).get("learner", "trained")
    if metrics is None or learner == "trained":
        return checkpoint
    strengths = metrics["strengths"].get(learner, {})
    strength = strengths[min(strengths, key=int)] if strengths else None
    return as_closed_form(checkpoint, data, learner, strength)


def with_interval_scale(checkpoint: Checkpoint, scale: float) -> Checkpoint:
    """Return a checkpoint whose intervals are `scale` times as wide, with the same predictions.

    The prior's covariance is in units of the noise's variance, so that is the one number to change.
    A checkpoint without variances is returned as it is.
    """
    settings = checkpoint.info.settings
    if not settings.closed_form or not isinstance(checkpoint.closed_form.head, BayesHead):
        return checkpoint
    learner = checkpoint.closed_form
    noise = learner.params["head.noise"] + 2 * math.log(scale)
    params = {**learner.params, "head.noise": noise}
    names = (*learner.model.shapes, *learner.head.shapes)
    weights = torch.cat([params[name].reshape(-1) for name in names])
    return checkpoint._replace(state=checkpoint.state._replace(weights=weights))


def with_measured_intervals(
    checkpoint: Checkpoint, metrics: Mapping[str, Any] | None
) -> Checkpoint:
    """Return the checkpoint with the scale of intervals that its evaluation measured.

    Args:
        checkpoint: what was evaluated.
        metrics: of the evaluation, as in metrics.json, whose `learner` it is; None if there was
            none. Older ones have no scale.
    """
    metrics = metrics or {}
    scales = metrics.get("interval_scales", {})
    scale = scales.get(metrics.get("learner", "trained"), {}).get("scale", 1.0)
    return with_interval_scale(checkpoint, scale)
