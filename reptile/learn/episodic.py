"""Training through a closed-form head: prototypical networks (Snell et al.) and R2D2 (ridge).

Each episode is a task whose queries are classified by the head that its support set gives; the
features, and the head's own numbers, follow the gradient of the queries' loss. The loop over
episodes is in `train`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reptile.data.dataset import ClassRange, Inputs
from reptile.learn.engines.base import Engine, gather
from reptile.learn.heads import HEADS, Classifier, Head, one_hot
from reptile.minibatches import IntArray
from reptile.models import (
    LayerStatistics,
    Model,
    Params,
    Statistics,
    flatten,
    named_parts,
    size,
    unflatten,
)
from reptile.objectives import CLASSIFICATION
from reptile.settings import TrainSettings
from reptile.tasks import Purpose, Task, random_stream

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
STATISTICS_IMAGES = 512  # whose statistics batch norm uses after training
IMAGES_AT_ONCE = 256  # bounds the memory of a forward pass


class EpisodicState(NamedTuple):
    """What training through a head learns, and its optimiser (Adam)."""

    weights: Tensor  # [P + H]: the network's, then the head's numbers
    first_moment: Tensor  # [P + H]
    second_moment: Tensor  # [P + H]
    step: int
    statistics: Statistics = ()  # what batch norm uses after training; not used in training

    @classmethod
    def start(cls, weights: Tensor, head: Head) -> "EpisodicState":
        """Return the state before any episode, from a network's weights [P]."""
        weights = torch.cat([weights, weights.new_tensor([*head.initial.values()])])
        return cls(weights, torch.zeros_like(weights), torch.zeros_like(weights), 0)

    def to(self, device: torch.device) -> "EpisodicState":
        """Return it on a device."""
        return self.each(lambda vector: vector.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> "EpisodicState":
        """Return it with each of its vectors changed."""
        weights, first, second = map(change, (self.weights, self.first_moment, self.second_moment))
        statistics = tuple(LayerStatistics(*map(change, layer)) for layer in self.statistics)
        return EpisodicState(weights, first, second, self.step, statistics)


def episodic_step(
    engine: Engine, state: EpisodicState, episodes: Sequence[Task], head: Head, rate: float
) -> tuple[EpisodicState, Tensor]:
    """Take one step of Adam on the mean loss of the episodes' queries.

    Args:
        engine: computes features, on the batch statistics of an episode's images.
        state: where to start.
        episodes: tasks of equally many classes, with queries.
        head: what the support sets are classified by.
        rate: Adam's step size.

    Returns:
        The state, and each episode's loss before the step [T].
    """
    gradient, losses = torch.zeros_like(state.weights), []
    for episode in episodes:
        weights = state.weights.detach().requires_grad_()
        loss = episode_loss(engine, weights, episode, head)
        gradient += torch.autograd.grad(loss, weights)[0] / len(episodes)
        losses.append(loss.detach())
    return adam(state, gradient, rate), torch.stack(losses)


def episode_loss(engine: Engine, weights: Tensor, episode: Task, head: Head) -> Tensor:
    """Return the cross-entropy of an episode's queries, a function of the weights [P + H]."""
    body, numbers = torch.split(weights, [size(engine.model), len(head.shapes)])
    features = engine.features(body, np.concatenate([episode.support, episode.query]))
    support, queries = torch.split(features, [len(episode.support), len(episode.query)])
    labels = torch.from_numpy(episode.support_targets).to(features.device)
    targets = torch.from_numpy(episode.query_targets).to(features.device)
    ways = int(episode.support_targets.max()) + 1
    classifier = head.fit(
        dict(zip(head.shapes, numbers, strict=True)), support, one_hot(labels, ways, support)
    )
    return CLASSIFICATION.loss(classifier.logits(queries), targets)


def adam(state: EpisodicState, gradient: Tensor, rate: float) -> EpisodicState:
    """Take one step of Adam (Kingma and Ba, algorithm 1)."""
    step = state.step + 1
    first = BETA1 * state.first_moment + (1 - BETA1) * gradient
    second = BETA2 * state.second_moment + (1 - BETA2) * gradient.square()
    root = (second / (1 - BETA2**step)).sqrt() + EPSILON
    weights = state.weights - rate / (1 - BETA1**step) * first / root
    return EpisodicState(weights, first, second, step)


class ClosedForm(NamedTuple):
    """A trained learner: features of which each depends on one image alone, and a head."""

    model: Model
    head: Head
    params: Params  # the network's weights and the head's numbers
    statistics: Statistics  # what batch norm uses

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """Return the features [N, D] of what the network sees, [N, *image_shape]."""
        parts = [
            self.model.features(self.params, part, self.statistics or None)
            for part in torch.split(inputs, IMAGES_AT_ONCE)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def classifier(self, features: Tensor, labels: Tensor, ways: int) -> Classifier:
        """Return the classifier of a support set.

        Args:
            features: of its images, [S, D].
            labels: 0..ways-1, int64 [S].
            ways: number of classes.
        """
        return self.head.fit(self.params, features, one_hot(labels, ways, features))


def closed_form(model: Model, state: EpisodicState, settings: TrainSettings) -> ClosedForm:
    """Return the learner that has been trained."""
    head = HEADS[settings.algorithm]
    params = named_parts(model.shapes | head.shapes, state.weights)
    return ClosedForm(model, head, params, state.statistics)


@torch.no_grad()
def mean_accuracy(learner: ClosedForm, engine: Engine, tasks: Sequence[Task]) -> float:
    """Return the mean accuracy over all queries of the tasks."""
    weights, statistics = flatten(engine.model, learner.params), learner.statistics or None
    right = []
    for task in tasks:
        rows = np.concatenate([task.support, task.query])
        features = engine.features(weights, rows, statistics)
        support, queries = torch.split(features, [len(task.support), len(task.query)])
        labels = torch.from_numpy(task.support_targets).to(features.device)
        classifier = learner.classifier(support, labels, int(labels.max()) + 1)
        outputs = classifier.logits(queries).double().cpu().numpy()
        right.append(CLASSIFICATION.scores(outputs, task.query_targets))
    return float(np.mean(right))


@torch.no_grad()
def population_statistics(
    model: Model, weights: Tensor, inputs: Inputs, classes: ClassRange, seed: int
) -> Statistics:
    """Return batch norm's statistics on a fixed sample of the training images.

    Args:
        model: the network.
        weights: [P] or more, of which the first P count.
        inputs: those of the prepared data.
        classes: the training split's.
        seed: chooses the sample.
    """
    if not model.has_batch_norm:
        return ()
    rows: IntArray = np.concatenate(
        [np.arange(a, a + n) for a, n in zip(classes.starts, classes.counts, strict=True)]
    )
    rng = random_stream(seed, Purpose.STATISTICS)
    sample = np.sort(rng.permutation(rows)[:STATISTICS_IMAGES])
    images = gather(inputs, sample, weights.device).to(weights.dtype)
    return model.statistics(unflatten(model, weights[: size(model)]), images)
