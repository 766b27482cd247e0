"""Heads on the features of many tasks at once: what learns a task without adapting the network.

Each maps T support sets [T, S, D] with targets [T, S, W] (one-hot labels, or values) and queries
[T, Q, D] to outputs [T, Q, W], all float64. The closed-form ones are those of `learn.heads`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.learn import heads as learnt
from reptile.learn.heads import Classifier
from reptile.learn.optimizer import decay, fresh_state, update
from reptile.models import Params
from reptile.settings import OptimizerSettings

PROBE_STEPS = 100  # of accelerated gradient descent; at 100 images probabilities are exact to 1e-4


class Shown(NamedTuple):
    """The features of T tasks."""

    support: Tensor  # [T, S, D]
    targets: Tensor  # [T, S, W]
    query: Tensor  # [T, Q, D]
    batches: tuple[Tensor, ...] = ()  # [T, B] positions in the support set, one for each inner step


Head = Callable[[Shown], Tensor]


def closed_form(head: learnt.Head, params: Params) -> Head:
    """Return a head that networks are trained through, with its learnt numbers."""
    numbers = {name: params[name].double().cpu() for name in head.shapes}

    def one(support: Tensor, targets: Tensor, query: Tensor) -> Tensor:
        if isinstance(head, learnt.ClassifierHead):
            return head.fit(numbers, support, targets).logits(query)
        assert isinstance(head, learnt.BayesHead)
        return head.fit(numbers, support, targets).predict(query)[0]

    each = torch.vmap(one)

    def outputs(shown: Shown) -> Tensor:
        result: Tensor = each(shown.support, shown.targets, shown.query)
        return result

    return outputs


def variances(head: learnt.BayesHead, params: Params) -> Head:
    """Return a head whose outputs are the variances of the queries' values."""
    numbers = {name: params[name].double().cpu() for name in head.shapes}

    def one(support: Tensor, targets: Tensor, query: Tensor) -> Tensor:
        return head.fit(numbers, support, targets).predict(query)[1]

    each = torch.vmap(one)

    def outputs(shown: Shown) -> Tensor:
        result: Tensor = each(shown.support, shown.targets, shown.query)
        return result

    return outputs


def prototypes(shown: Shown) -> Tensor:
    """Return the negative squared distance to each class's mean, up to what classes share."""
    head = learnt.HEADS["protonet"]
    return closed_form(head, head.initial)(shown)


def ridge(strength: float) -> Head:
    """Return ridge regression of this strength on labels or values, with a free constant."""
    numbers = {"head.strength": torch.tensor(strength).log(), "head.scale": torch.zeros(())}
    return closed_form(learnt.HEADS["ridge"], numbers)


def constant_zero(shown: Shown) -> Tensor:
    """Return 0 for every query."""
    return shown.query.new_zeros(*shown.query.shape[:2], shown.targets.shape[-1])


def mean_target(shown: Shown) -> Tensor:
    """Return the mean of the support set's targets for every query."""
    return shown.targets.mean(1, keepdim=True) + constant_zero(shown)


def linear_probe(shown: Shown) -> Tensor:
    """Return the logits of logistic regression on features of unit length.

    The fixed procedure of Tian et al., Rethinking few-shot image classification (2020): minimise
    Σ cross-entropy + ½‖W‖² with a free bias (scikit-learn's LogisticRegression with C = 1). Solved
    by Nesterov's accelerated gradient descent; W = Aᵀ·support, so only A [S, W] is kept.
    """
    support, query = (F.normalize(x, dim=-1) for x in (shown.support, shown.query))
    kernel, targets = support @ support.mT, shown.targets
    smooth = 1 + 0.5 * (kernel.abs() + 1).sum(-1).amax(-1)[:, None, None]  # bounds the curvature
    momentum = (smooth.sqrt() - 1) / (smooth.sqrt() + 1)
    dual = previous = torch.zeros_like(targets)
    bias = previous_bias = targets.new_zeros(len(targets), 1, targets.shape[-1])
    for _ in range(PROBE_STEPS):
        ahead = dual + momentum * (dual - previous)
        ahead_bias = bias + momentum * (bias - previous_bias)
        error = (kernel @ ahead + ahead_bias).softmax(-1) - targets
        previous, previous_bias = dual, bias
        dual = ahead - (error + ahead) / smooth
        bias = ahead_bias - error.sum(1, keepdim=True) / smooth
    return query @ (support.mT @ dual) + bias


def prototype_steps(optimizer: OptimizerSettings) -> Head:
    """Return gradient steps on the last layer, which starts from the prototypes.

    Proto-MAML's start (Triantafillou et al., Meta-Dataset, 2020): weight 2c and bias -‖c‖² for each
    class's mean c; then the inner optimiser, from a fresh state, on the task's mini-batches.
    Features are divided by the root mean square of the support set's lengths: without that the
    start separates the support set so far that no gradient is left.
    """

    def outputs(shown: Shown) -> Tensor:
        tasks, _, size = shown.support.shape
        ways, each = shown.targets.shape[-1], torch.arange(tasks)[:, None]
        length = shown.support.square().sum(-1).mean(1).sqrt().clamp(min=1e-12)[:, None, None]
        support, query = shown.support / length, shown.query / length
        head = learnt.HEADS["protonet"]
        numbers = {name: value.double() for name, value in head.initial.items()}
        start = torch.vmap(lambda s, t: head.fit(numbers, s, t))(support, shown.targets)
        weights = torch.cat([start.weight.flatten(1), start.bias], 1)
        state = fresh_state(weights)
        if optimizer.name == "scaled_sgd":  # all steps of the same size
            state = state._replace(second_moment=torch.ones_like(weights))
        for batch in shown.batches:
            weights = decay(weights, optimizer)
            features, targets = support[each, batch], shown.targets[each, batch]
            classifier = _classifier(weights, ways, size)
            error = (_logits(classifier, features).softmax(-1) - targets) / batch.shape[1]
            gradient = torch.cat([(error.mT @ features).flatten(1), error.sum(1)], 1)
            weights, state = update(weights, gradient, state, optimizer)
        return _logits(_classifier(weights, ways, size), query)

    return outputs


def _classifier(weights: Tensor, ways: int, size: int) -> Classifier:
    """Split flat weights [T, W·D + W]."""
    weight, bias = torch.split(weights, [ways * size, ways], 1)
    return Classifier(weight.view(-1, ways, size), bias)


def _logits(classifier: Classifier, features: Tensor) -> Tensor:
    """Return the logits [T, N, W] of features [T, N, D] under a classifier for each task."""
    return features @ classifier.weight.mT + classifier.bias[:, None]
