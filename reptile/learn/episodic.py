"""Training through a closed-form head: prototypical networks, R2D2 (ridge) and ALPaCA (bayes).

Each episode is a task whose queries are predicted by the head that its support set gives; the
features, and the head's own numbers, follow the gradient of the queries' loss. The loop over
episodes is in `train`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reptile.data.dataset import ClassRange
from reptile.learn.engines.base import Engine
from reptile.learn.heads import (
    BayesHead,
    Classifier,
    ClassifierHead,
    Head,
    Posterior,
    one_hot,
    with_constant,
)
from reptile.minibatches import IntArray
from reptile.models import (
    LayerStatistics,
    Model,
    Params,
    Statistics,
    Towers,
    flatten,
    named_parts,
    size,
)
from reptile.objectives import CLASSIFICATION, to_unit
from reptile.tasks import Purpose, Targets, Task, random_stream

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
STATISTICS_IMAGES = 512  # whose statistics batch norm uses after training
PRIOR_TASKS = 500  # that the prior is first fitted to
IMAGES_AT_ONCE = 256  # bounds the memory of a forward pass


class EpisodicState(NamedTuple):
    """What training through a head learns, and its optimiser (Adam)."""

    weights: Tensor  # [P + H]: the network's, then the head's numbers
    first_moment: Tensor  # [P + H]
    second_moment: Tensor  # [P + H]
    step: int
    # What training does not use, but what is trained: of batch norm, and of towers.
    statistics: Statistics = ()
    shares: tuple[float, ...] = ()

    @classmethod
    def start(cls, weights: Tensor, head: Head) -> "EpisodicState":
        """Return the state before any episode, from a network's weights [P]."""
        numbers = [value.reshape(-1).to(weights) for value in head.initial.values()]
        weights = torch.cat([weights, *numbers])
        return cls(weights, torch.zeros_like(weights), torch.zeros_like(weights), 0)

    def to(self, device: torch.device) -> "EpisodicState":
        """Return it on a device."""
        return self.each(lambda vector: vector.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> "EpisodicState":
        """Return it with each of its vectors changed."""
        weights, first, second = map(change, (self.weights, self.first_moment, self.second_moment))
        statistics = tuple(LayerStatistics(*map(change, layer)) for layer in self.statistics)
        return EpisodicState(weights, first, second, self.step, statistics, self.shares)


def episodic_step(
    engine: Engine,
    state: EpisodicState,
    episodes: Sequence[Task],
    head: Head,
    rate: float,
    statistics: Statistics | None = None,
) -> tuple[EpisodicState, Tensor]:
    """Take one step of Adam on the mean loss of the episodes' queries.

    Args:
        engine: computes features.
        state: where to start.
        episodes: tasks of equally many classes, with queries.
        head: what the support sets are classified by.
        rate: Adam's step size.
        statistics: what batch norm uses; None for those of an episode's images.

    Returns:
        The state, and each episode's loss before the step [T].
    """
    model = engine.model
    # Batch norm sees one episode at a time; without it, all may pass through the network at once.
    parts = [[each] for each in episodes] if model.has_batch_norm else [episodes]
    gradient, losses = torch.zeros_like(state.weights), []
    for part in parts:
        weights = state.weights.detach().requires_grad_()
        loss = episode_losses(engine, weights, part, head, statistics)
        gradient += torch.autograd.grad(loss.sum() / len(episodes), weights)[0]
        losses.append(loss.detach())
    return adam(state, gradient, rate), torch.cat(losses)


def episode_losses(
    engine: Engine,
    weights: Tensor,
    episodes: Sequence[Task],
    head: Head,
    statistics: Statistics | None = None,
) -> Tensor:
    """Return the loss of each episode's queries [T], a function of the weights [P + H].

    Batch norm uses the statistics of all their images, or `statistics` if given.
    """
    model = engine.model
    body, numbers = torch.split(weights, [size(model), len(weights) - size(model)])
    rows = np.concatenate([np.concatenate([each.support, each.query]) for each in episodes])
    features = engine.features(body, rows, statistics).view(len(episodes), -1, model.feature_size)
    sizes = [len(episodes[0].support), len(episodes[0].query)]
    support, queries = torch.split(features, sizes, dim=1)
    params = named_parts(head.shapes, numbers)
    losses: Tensor = torch.vmap(head.loss, in_dims=(None, 0, 0, 0, 0))(
        params,
        support,
        head_targets(model, np.stack([each.support_targets for each in episodes]), support),
        queries,
        head_targets(model, np.stack([each.query_targets for each in episodes]), queries),
    )
    return losses


def head_targets(model: Model, targets: Targets, like: Tensor) -> Tensor:
    """Return labels [T, N] as one-hot [T, N, W], or values as [T, N, outputs], as heads take them.

    W is one more than the largest label.
    """
    given = torch.from_numpy(targets).to(like.device)
    if model.objective is CLASSIFICATION:
        return one_hot(given, int(targets.max()) + 1, like)
    return given.reshape(*like.shape[:2], -1)


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
    network_input: Callable[[Tensor], Tensor] = to_unit  # from what callers give to what it sees

    @classmethod
    def of(cls, model: Model, head: Head, state: EpisodicState) -> "ClosedForm":
        """Return the learner of a finished state."""
        shapes = model.shapes | head.shapes
        numbers = sum(shape.numel() for shape in shapes.values())
        params = named_parts(shapes, state.weights[:numbers])  # without a classifier of `pretrain`
        statistics = state.statistics
        if isinstance(model, Towers) and state.shares:
            statistics = model.weigh(statistics, state.shares)
        return cls(model, head, params, statistics)

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """Return the features [N, D] of what the network sees, [N, *image_shape]."""
        params = {name: self.params[name] for name in self.model.shapes}  # without the head's
        parts = [
            self.model.features(params, part, self.statistics or None)
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

        Raises:
            TypeError: the learner predicts values.
        """
        if not isinstance(self.head, ClassifierHead):
            raise TypeError("a learner of values has a posterior, no classifier")
        return self.head.fit(self.params, features, one_hot(labels, ways, features))

    @torch.no_grad()
    def posterior(self, features: Tensor, values: Tensor) -> Posterior:
        """Return what a support set of features [S, D] and values [S, outputs] says.

        Raises:
            TypeError: the learner names classes.
        """
        if not isinstance(self.head, BayesHead):
            raise TypeError("a learner of classes has a classifier, no posterior")
        return self.head.fit(self.params, features, values)

    def outputs(self, support: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        """Return the logits [Q, W] of a task's queries, or the means of their values [Q, outputs].

        Args:
            support: features [S, D].
            targets: labels, int64 [S]; or values [S, outputs].
            queries: features [Q, D].
        """
        if self.model.objective is CLASSIFICATION:
            classifier = self.classifier(support, targets, int(targets.max()) + 1)
            return classifier.logits(queries)
        mean, _ = self.posterior(support, targets.reshape(len(support), -1)).predict(queries)
        return mean


@torch.no_grad()
def mean_query_score(learner: ClosedForm, engine: Engine, tasks: Sequence[Task]) -> float:
    """Return the mean accuracy, or squared error, over all queries of the tasks."""
    weights, statistics = flatten(engine.model, learner.params), learner.statistics or None
    scores = []
    for task in tasks:
        rows = np.concatenate([task.support, task.query])
        features = engine.features(weights, rows, statistics)
        support, queries = torch.split(features, [len(task.support), len(task.query)])
        targets = torch.from_numpy(task.support_targets).to(features.device)
        outputs = learner.outputs(support, targets, queries).double().cpu().numpy()
        scores.append(learner.model.objective.scores(outputs, task.query_targets))
    return float(np.mean(scores))


@torch.no_grad()
def with_likely_prior(
    engine: Engine, state: EpisodicState, head: BayesHead, classes: ClassRange, seed: int
) -> EpisodicState:
    """Return the state with the prior and noise of greatest likelihood, of the present features.

    A few tasks teach more in this way than in as many steps of Adam.

    Args:
        engine: of the network.
        state: where to start.
        head: the state's.
        classes: the training split's.
        seed: chooses the tasks, at most PRIOR_TASKS.
    """
    assert classes.targets is not None
    body = state.weights[: size(engine.model)]
    sums = []
    rng = random_stream(seed, Purpose.STATISTICS)
    for place in np.sort(rng.permutation(len(classes.starts))[:PRIOR_TASKS]):
        first = classes.starts[place]
        rows = np.arange(first, first + min(classes.counts[place], IMAGES_AT_ONCE))
        features = with_constant(engine.features(body, rows, None).double())
        values = torch.from_numpy(classes.targets[rows]).to(features).reshape(len(rows), -1)
        sums.append(
            (
                features.T @ features,
                features.T @ values,
                values.square().sum(0),
                features.new_tensor(len(rows)),
            )
        )
    gram, product, square, count = map(torch.stack, zip(*sums, strict=True))
    fitted = head.most_likely(gram, product, square, count)
    numbers = torch.cat([fitted[name].flatten() for name in head.shapes])
    return state._replace(weights=torch.cat([body, numbers.to(body)]))


@torch.no_grad()
def population_statistics(
    engine: Engine, weights: Tensor, classes: ClassRange, seed: int
) -> Statistics:
    """Return batch norm's statistics on a fixed sample of the training images.

    Args:
        engine: of the network.
        weights: [P] or more, of which the first P count.
        classes: the training split's.
        seed: chooses the sample.
    """
    if not engine.model.has_batch_norm:
        return ()
    rows: IntArray = np.concatenate(
        [np.arange(a, a + n) for a, n in zip(classes.starts, classes.counts, strict=True)]
    )
    rng = random_stream(seed, Purpose.STATISTICS)
    sample = np.sort(rng.permutation(rows)[:STATISTICS_IMAGES])
    return engine.statistics(weights[: size(engine.model)], sample)
