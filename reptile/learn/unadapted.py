"""Learners that take no gradient step: a network's features as they are, and a closed-form head.

What a checkpoint is worth without adaptation; trained through a head or not.
"""

from typing import Literal

from torch import Tensor

from reptile.data.dataset import PreparedData
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.engines import make_engine
from reptile.learn.episodic import ClosedForm, EpisodicState, population_statistics
from reptile.learn.heads import HEADS
from reptile.models import unflatten
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
    if isinstance(checkpoint.state, EpisodicState):
        return with_head(checkpoint.closed_form, head, strength)
    return frozen_features(checkpoint, checkpoint.state.weights, data, head, strength)


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
