"""Eager PyTorch on the graphs' inputs, of a closed-form learner; in any precision.

The learner is the one that training and evaluation use. Independent of ONNX. For learners by
gradient steps see `reference`.
"""

import torch
from torch import Tensor

from reptile.export.reference import Array, Tensors
from reptile.learn.episodic import ClosedForm
from reptile.learn.heads import BayesHead, Classifier, Prior
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
    """Return head.weight [W, D] and head.bias [W]; labels without examples are masked.

    Of a regressor, head.mean [D + 1, outputs] and head.covariance [D + 1, D + 1], given values
    [S, outputs].
    """
    if isinstance(learner.head, BayesHead):
        prior = _prior(learner, learner.head, features.dtype)
        mean, covariance = prior.given(features, torch.from_numpy(labels), torch.linalg.solve)
        return {"head.mean": mean.numpy(), "head.covariance": covariance.numpy()}
    ways = int(labels.max()) + 1
    classifier = learner.classifier(features, torch.from_numpy(labels), ways)
    absent = ~torch.isin(torch.arange(ways), torch.from_numpy(labels))
    bias = classifier.bias.masked_fill(absent, MASK_BIAS)
    return {"head.weight": classifier.weight.numpy(), "head.bias": bias.numpy()}


def adapt(learner: ClosedForm, images: Array, labels: Array) -> Tensors:
    """Return the outputs of the graph `adapt` but `finite`: features, and those of `fit`."""
    features = embed(learner, images)
    return {"features": features.numpy(), **fit(learner, features, labels)}


def predict(learner: ClosedForm, weights: Tensors, images: Array) -> Tensors:
    """Return the logits [N, W] of a task's classifier; other tensors in `weights` are ignored.

    Of a regressor, the values [N, outputs] by that name, and their variance [N, outputs].
    """
    features = embed(learner, images)
    head = {
        name: torch.from_numpy(value).to(features.dtype)
        for name, value in weights.items()
        if name.startswith("head.")
    }
    if isinstance(learner.head, BayesHead):
        prior = _prior(learner, learner.head, features.dtype)
        mean, variance = prior.predict(head["head.mean"], head["head.covariance"], features)
        return {"logits": mean.numpy(), "variance": variance.numpy()}
    return {"logits": Classifier(head["head.weight"], head["head.bias"]).logits(features).numpy()}


def _prior(learner: ClosedForm, head: BayesHead, dtype: torch.dtype) -> Prior:
    return Prior(*(value.to(dtype) for value in head.prior(learner.params)))
