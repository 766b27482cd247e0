"""Eager PyTorch on the graphs' inputs, of a closed-form learner; in any precision.

The learner is the one that training and evaluation use. Independent of ONNX. For learners by
gradient steps see `reference`.
"""

import numpy as np
import torch
from torch import Tensor

from reptile.export.reference import Array, Tensors
from reptile.learn.episodic import ClosedForm
from reptile.models import MASK_BIAS, LayerStatistics


def cast(learner: ClosedForm, dtype: torch.dtype) -> ClosedForm:
    """Return the learner in another precision."""
    params = {name: value.to(dtype) for name, value in learner.params.items()}
    statistics = tuple(
        LayerStatistics(*(value.to(dtype) for value in layer)) for layer in learner.statistics
    )
    return learner._replace(params=params, statistics=statistics)


def embed(learner: ClosedForm, images: Array) -> Tensor:
    """Return the features [N, D] of pixels [N, C, H, W]."""
    dtype = next(iter(learner.params.values())).dtype
    return learner.features(learner.network_input(torch.from_numpy(images)).to(dtype))


def fit(learner: ClosedForm, features: Tensor, labels: Array) -> Tensors:
    """Return head.weight [W, D] and head.bias [W]; labels without examples are masked."""
    ways = int(labels.max()) + 1
    classifier = learner.classifier(features, torch.from_numpy(labels), ways)
    absent = ~torch.isin(torch.arange(ways), torch.from_numpy(labels))
    bias = classifier.bias.masked_fill(absent, MASK_BIAS)
    return {"head.weight": classifier.weight.numpy(), "head.bias": bias.numpy()}


def adapt(learner: ClosedForm, images: Array, labels: Array) -> Tensors:
    """Return the outputs of the graph `adapt` but `finite`: features, head.weight, head.bias."""
    features = embed(learner, images)
    return {"features": features.numpy(), **fit(learner, features, labels)}


def predict(learner: ClosedForm, weights: Tensors, images: Array) -> Array:
    """Return the logits [N, W] of a task's classifier; other tensors in `weights` are ignored."""
    features = embed(learner, images).numpy()
    logits = features @ weights["head.weight"].astype(features.dtype).T
    return np.asarray(logits + weights["head.bias"].astype(features.dtype))
