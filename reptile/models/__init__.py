"""The networks, as pure functions of (weights, inputs), and their losses. Nothing about tasks."""

from reptile.models.base import (
    ABSENT,
    LayerStatistics,
    Model,
    Objective,
    Params,
    Statistics,
    flatten,
    initialise,
    silence,
    size,
    to_unit,
    unflatten,
)
from reptile.models.build import build_model
from reptile.models.conv4 import BATCH_NORM_EPSILON, CONV_LAYERS, Conv4
from reptile.models.mlp import MLP

__all__ = [
    "ABSENT",
    "BATCH_NORM_EPSILON",
    "CONV_LAYERS",
    "MLP",
    "Conv4",
    "LayerStatistics",
    "Model",
    "Objective",
    "Params",
    "Statistics",
    "build_model",
    "flatten",
    "initialise",
    "silence",
    "size",
    "to_unit",
    "unflatten",
]
