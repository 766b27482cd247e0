"""Ordinary supervised training: one classifier of all training classes, whose features are kept.

The baseline of Chen et al., A closer look at few-shot classification (2019), and of SimpleShot
(Wang et al., 2019). Tasks are then learnt by the nearest prototype. The optimiser is that of
`episodic`, and so is its state: the classifier comes last in it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.data.dataset import ClassRange
from reptile.learn.engines.base import Engine
from reptile.learn.episodic import EpisodicState, adam
from reptile.minibatches import IntArray
from reptile.models import named_parts, size


def pretrain_step(
    engine: Engine,
    state: EpisodicState,
    rows: IntArray,
    labels: IntArray,
    classes: int,
    rate: float,
) -> tuple[EpisodicState, Tensor]:
    """Take one step of Adam on the cross-entropy of a batch.

    Args:
        engine: computes features.
        state: weights [P + H + C·D + C]: the network's, a head's (unused), the classifier's.
        rows: of the batch, [B].
        labels: their classes 0..C-1, [B].
        classes: C.
        rate: Adam's step size.

    Returns:
        The state, and the batch's loss before the step [1].
    """
    weights = state.weights.detach().requires_grad_()
    model = engine.model
    features = engine.features(weights[: size(model)], rows)
    shapes = classifier_shapes(model.feature_size, classes)
    numbers = sum(shape.numel() for shape in shapes.values())
    weight, bias = named_parts(shapes, weights[-numbers:]).values()
    logits = F.linear(features, weight, bias)
    loss = F.cross_entropy(logits, torch.from_numpy(labels).to(logits.device))
    (gradient,) = torch.autograd.grad(loss, weights)
    return adam(state, gradient, rate), loss.detach()[None]


def classifier_shapes(features: int, classes: int) -> dict[str, torch.Size]:
    """Return names and shapes of the classifier's weights."""
    return {
        "classifier.weight": torch.Size((classes, features)),
        "classifier.bias": torch.Size((classes,)),
    }


def training_batch(
    rng: np.random.Generator, classes: ClassRange, batch: int
) -> tuple[IntArray, IntArray]:
    """Draw `batch` rows of random classes, with replacement; return rows and classes [B]."""
    labels = rng.integers(len(classes.starts), size=batch)
    return classes.starts[labels] + rng.integers(classes.counts[labels]), labels
