"""What an adapted task is: tensors under which each prediction depends on one image.

Batch norm keeps the statistics of the whole support set. With them it is an affine map, which in
conv4 the convolution before it takes over; any other network gets them as tensors of their own. Not
for choosing those statistics' weights: see `learn`.
"""

from torch import Tensor

from reptile.learn.checkpoint import Checkpoint
from reptile.learn.reptile import MetaState
from reptile.models import (
    BATCH_NORM_EPSILON,
    MLP,
    Conv4,
    LayerStatistics,
    MaskedNetwork,
    Model,
    ModuleNetwork,
    Params,
)
from reptile.objectives import REGRESSION


def exportable(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with a network that can mask outputs, as a bundle's classifier does."""
    masked, (weights, inner), info = with_mask(checkpoint.model), checkpoint.meta, checkpoint.info
    if not isinstance(masked, MaskedNetwork):
        return checkpoint
    each_step = inner.second_moment.view(-1, len(weights))
    inner = inner._replace(second_moment=masked.extend(each_step).flatten())
    return Checkpoint(masked, MetaState(masked.extend(weights), inner), info)


def with_mask(model: Model) -> Model:
    """Return the network, with a mask of its outputs if it is a classifier without a bias there."""
    if model.head_bias or model.objective is REGRESSION or not isinstance(model, ModuleNetwork):
        return model
    return MaskedNetwork(model)


def adapted_tensors(model: Model, params: Params, images: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a task by name: weights, and statistics of the support set.

    Args:
        model: the network.
        params: its adapted weights.
        images: the support set [S, C, H, W].
    """
    if isinstance(model, Conv4 | MLP):
        return fold(model, params, images)
    statistics = {
        f"{norm}.{what}": value
        for norm, measured in zip(_norms(model), model.statistics(params, images), strict=True)
        for what, value in measured._asdict().items()
    }
    return {**params, **statistics}


def predict_adapted(model: Model, tensors: Params, images: Tensor) -> Tensor:
    """Return the logits of images under the tensors that `adapted_tensors` returned."""
    if isinstance(model, Conv4 | MLP):
        return model.forward(tensors, images)
    statistics = tuple(
        LayerStatistics(tensors[f"{norm}.mean"], tensors[f"{norm}.variance"])
        for norm in _norms(model)
    )
    params = {name: tensors[name] for name in model.shapes}
    return model.forward(params, images, statistics)


def fold(model: Model, params: Params, images: Tensor) -> dict[str, Tensor]:
    """Fold batch norm, with the statistics of `images` [S, C, H, W], into the convolutions."""
    folded: dict[str, Tensor] = {}
    for layer, (mean, variance) in enumerate(model.statistics(params, images), start=1):
        scale = params[f"norm{layer}.weight"] / (variance + BATCH_NORM_EPSILON).sqrt()
        weight = params[f"conv{layer}.weight"]
        folded[f"conv{layer}.weight"] = weight * scale[:, None, None, None]
        folded[f"conv{layer}.bias"] = params[f"norm{layer}.bias"] - mean * scale
    norms = {name for name in params if name.startswith("norm")}
    return folded | {name: params[name] for name in params if name not in norms | set(folded)}


def _norms(model: Model) -> tuple[str, ...]:
    assert isinstance(model, ModuleNetwork | MaskedNetwork)
    return model.norm_names
