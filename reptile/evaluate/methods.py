"""The methods that an evaluation compares: names in metrics.json, titles, and what each is.

The rows of a report. How they are computed is in `measure`.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Method(NamedTuple):
    """One way to learn a task."""

    title: str
    note: str


METHODS: dict[str, Method] = {
    "trained": Method("trained learner", "What was trained, learning a task as it was trained to."),
    "prototypes": Method(
        "no adaptation, nearest prototype",
        "The trained network's features without a gradient step; a query belongs to the class "
        "whose mean support feature is nearest.",
    ),
    "ridge": Method(
        "no adaptation, ridge regression",
        "The same features; ridge regression on the support set. Its strength is chosen on "
        "validation tasks, for each number of shots.",
    ),
    "linear_probe": Method(
        "no adaptation, linear probe",
        "The same features, scaled to unit length; logistic regression on the support set.",
    ),
    "prototype_steps": Method(
        "last layer from the prototypes, then steps",
        "The same features; the last layer starts from the prototypes and takes as many gradient "
        "steps as the trained learner.",
    ),
    "joint": Method(
        "jointly trained",
        "A network trained on all training tasks pooled, with as many steps, then adapted.",
    ),
    "random": Method(
        "untrained start",
        "The weights that this training began with, learning a task as the trained learner does.",
    ),
    "random_prototypes": Method(
        "untrained features, nearest prototype", "Features of the weights that training began with."
    ),
    "random_ridge": Method("untrained features, ridge regression", "Likewise, with ridge."),
    "pretrained_prototypes": Method(
        "pretrained features, nearest prototype",
        "The frozen features of the pretrained weights, before any meta-training.",
    ),
    "pretrained_ridge": Method("pretrained features, ridge regression", "Likewise, with ridge."),
    "nearest_mean": Method(
        "raw input, nearest mean", "No network: the class whose mean support image is nearest."
    ),
    "input_ridge": Method("raw input, ridge regression", "No network: ridge on the inputs."),
    "mean": Method("mean of the support set", "No network: the mean of the values shown."),
    "zero": Method("always zero", "No network and no examples."),
}
"""In the order in which they are shown; a checkpoint beside comes after `trained`."""

BESIDE = Method("", "Another network, trained on the same data.")
SECOND = {
    "reptile": "second learner, Reptile",
    "fomaml": "second learner, first-order MAML",
    "maml": "second learner, MAML",
    "proto-maml": "second learner, Proto-MAML",
    "anil": "second learner, ANIL",
    "meta-sgd": "second learner, Meta-SGD",
    "protonet": "second learner, trained through nearest prototypes",
    "ridge": "second learner, trained through ridge regression",
    "bayes": "second learner, trained through Bayesian regression",
    "pretrain": "second learner, trained to tell all training classes apart",
}


def title(name: str) -> str:
    """Return a method's title; any other checkpoint beside is called by its own name."""
    if name in METHODS:
        return METHODS[name].title
    return SECOND.get(name.removesuffix("-trained"), name) if name.endswith("-trained") else name


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names in the order in which methods are shown."""
    places = {name: place for place, name in enumerate(METHODS)}
    # 0.5: after `trained`, before the rest
    return tuple(sorted(set(names), key=lambda name: (places.get(name, 0.5), name)))
