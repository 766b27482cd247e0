"""The networks, as pure functions of (weights, inputs), and their losses; independent of tasks."""

from reptile.models.base import (
    MASK_BIAS,
    LayerStatistics,
    Model,
    Network,
    Params,
    Statistics,
    flatten,
    initialise,
    mask_absent_outputs,
    named_parts,
    size,
    unflatten,
)
from reptile.models.build import build_model
from reptile.models.conv4 import BATCH_NORM_EPSILON, CONV_LAYERS, Conv4
from reptile.models.masked import OUTPUT_MASK, MaskedNetwork
from reptile.models.mlp import MLP
from reptile.models.module import ModuleNetwork
from reptile.models.pretrained import PretrainedNetwork
from reptile.models.towers import Towers

__all__ = [
    "BATCH_NORM_EPSILON",
    "CONV_LAYERS",
    "MASK_BIAS",
    "MLP",
    "OUTPUT_MASK",
    "Conv4",
    "LayerStatistics",
    "MaskedNetwork",
    "Model",
    "ModuleNetwork",
    "Network",
    "Params",
    "PretrainedNetwork",
    "Statistics",
    "Towers",
    "build_model",
    "flatten",
    "initialise",
    "mask_absent_outputs",
    "named_parts",
    "size",
    "unflatten",
]
