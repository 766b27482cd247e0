"""Folding batch norm into the convolutions, so that each prediction depends on one image.

With the statistics of the whole support set fixed, batch norm is an affine map, which the
convolution before it can take over. Not for choosing those statistics' weights: see `learn`.
"""

from torch import Tensor

from reptile.models import BATCH_NORM_EPSILON, Model, Params


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
