"""Features of the inputs of test tasks: each input passes through a network once, for all rows.

Batch norm's statistics are those of a sample of the training images, so an image's features depend
on that image alone.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.data.dataset import Inputs, PreparedData
from reptile.evaluate.heads import Head, Shown
from reptile.learn.engines import make_engine
from reptile.learn.engines.base import gather
from reptile.learn.episodic import IMAGES_AT_ONCE, ClosedForm
from reptile.minibatches import IntArray
from reptile.models import flatten
from reptile.objectives import Objective
from reptile.settings import OptimizerSettings
from reptile.tasks import Purpose, Task, random_stream

BYTES_AT_ONCE = 2**26  # bounds the memory of a head's features
SAMPLE = 512  # training inputs whose features set the scale

Embedding = Callable[[IntArray], Tensor]
"""From rows of prepared data [...] to their features, float64 [..., D] on the CPU."""


def embed(learner: ClosedForm, images: Inputs, rows: IntArray) -> Embedding:
    """Compute the features of these rows, on the device of the learner's weights."""
    distinct = np.unique(rows)
    device = next(iter(learner.params.values())).device
    # An engine keeps what the fixed part of a network gives.
    engine = make_engine("eager", learner.model, OptimizerSettings(), images, device)
    weights, statistics = flatten(learner.model, learner.params), learner.statistics or None
    with torch.no_grad():
        parts = [
            engine.features(weights.to(device), distinct[i : i + IMAGES_AT_ONCE], statistics).cpu()
            for i in range(0, len(distinct), IMAGES_AT_ONCE)
        ]
    table = torch.cat(parts)
    return lambda some: table[torch.from_numpy(np.searchsorted(distinct, some))].double()


def raw(images: Inputs) -> Embedding:
    """Take the inputs themselves, pixels in 0..1, as features."""
    dimensions = images.ndim - 1

    def features(rows: IntArray) -> Tensor:
        return gather(images, rows, torch.device("cpu")).flatten(-dimensions).double()

    return features


def rows_of(tasks: Sequence[Task]) -> IntArray:
    """Return the rows of all inputs of these tasks."""
    return np.concatenate([np.concatenate([task.support, task.query]) for task in tasks])


def training_sample(data: PreparedData, seed: int) -> IntArray:
    """Return rows of some inputs of the training split."""
    classes = data.split("train")
    rows = np.concatenate(
        [np.arange(a, a + n) for a, n in zip(classes.starts, classes.counts, strict=True)]
    )
    return random_stream(seed, Purpose.STATISTICS).permutation(rows)[:SAMPLE]


def apply(
    head: Head, features: Embedding, tasks: Sequence[Task], ways: int, objective: Objective
) -> np.ndarray:
    """Return the outputs [T, Q, W] of a head on the queries of T tasks of equal sizes."""
    first = tasks[0]
    one = features(first.support[:1]).shape[-1] * (len(first.support) + len(first.query)) * 8
    count = max(1, BYTES_AT_ONCE // one)
    parts = [
        head(_shown(features, tasks[i : i + count], ways, objective))
        for i in range(0, len(tasks), count)
    ]
    return torch.cat(parts).numpy()


def _shown(features: Embedding, tasks: Sequence[Task], ways: int, objective: Objective) -> Shown:
    support = features(np.stack([task.support for task in tasks]))
    query = features(np.stack([task.query for task in tasks]))
    given = torch.from_numpy(np.stack([task.support_targets for task in tasks]))
    labels = objective.name == "classification"
    targets = F.one_hot(given, ways) if labels else given.reshape(*support.shape[:2], -1)
    batches = tuple(
        torch.from_numpy(np.stack(batch))
        for batch in zip(*(task.batches for task in tasks), strict=True)
    )
    return Shown(support, targets.double(), query, batches)
