"""Eager PyTorch on the graphs' inputs, of a closed-form learner; in any precision.

The learner is the one that training and evaluation use. Independent of ONNX. For learners by
gradient steps see `reference`.
"""

import numpy as np
import torch
from torch import Tensor

from reptile.export.reference import Array, Tensors
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.episodic import ClosedForm
from reptile.models import MASK_BIAS, LayerStatistics


def embed(checkpoint: Checkpoint, images: Array, dtype: torch.dtype) -> Tensor:
    """Return the features [N, D] of pixels [N, C, H, W], or of other inputs."""
    inputs = checkpoint.info.network_input(torch.from_numpy(images)).to(dtype)
    return _learner(checkpoint, dtype).features(inputs)


def adapt(checkpoint: Checkpoint, images: Array, labels: Array, dtype: torch.dtype) -> Tensors:
    """Return the outputs of the graph `adapt` but `finite`; labels without examples are masked."""
    learner, features = _learner(checkpoint, dtype), embed(checkpoint, images, dtype)
    ways = int(labels.max()) + 1
    classifier = learner.classifier(features, torch.from_numpy(labels), ways)
    absent = ~torch.isin(torch.arange(ways), torch.from_numpy(labels))
    return {
        "features": features.numpy(),
        "head.weight": classifier.weight.numpy(),
        "head.bias": classifier.bias.masked_fill(absent, MASK_BIAS).numpy(),
    }


def predict(checkpoint: Checkpoint, weights: Tensors, images: Array, dtype: torch.dtype) -> Array:
    """Return the logits [N, W] of a task's classifier; other tensors in `weights` are ignored."""
    features = embed(checkpoint, images, dtype).numpy()
    logits = features @ weights["head.weight"].astype(features.dtype).T
    return np.asarray(logits + weights["head.bias"].astype(features.dtype))


def _learner(checkpoint: Checkpoint, dtype: torch.dtype) -> ClosedForm:
    learner = checkpoint.closed_form
    params = {name: value.to(dtype) for name, value in learner.params.items()}
    statistics = tuple(
        LayerStatistics(*(value.to(dtype) for value in layer)) for layer in learner.statistics
    )
    return learner._replace(params=params, statistics=statistics)
