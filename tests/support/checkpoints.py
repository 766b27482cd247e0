"""Small checkpoints whose weights no training made, and a protocol to evaluate them with."""

from typing import Literal

import torch

from reptile.data.dataset import PreparedData
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo
from reptile.learn.optimizer import OptimizerState
from reptile.learn.reptile import MetaState
from reptile.models import build_model, initialise
from reptile.settings import EvaluateSettings, ModelSettings, TrainSettings

SETTINGS = EvaluateSettings(tasks=6, shots=(1, 2), queries=2, steps=4, batch=3)


def make_checkpoint(
    data: PreparedData, name: Literal["conv4", "mlp"] = "conv4", ways: int = 3
) -> Checkpoint:
    """Weights that no training made, with a warm optimiser state."""
    model_settings = ModelSettings(name=name, filters=4, hidden=(16,))
    settings = TrainSettings(model=model_settings, ways=ways, engine="eager", device="cpu")
    model = build_model(model_settings, ways, data.image_shape)
    weights = initialise(model, 99)
    info = CheckpointInfo(
        iteration=7,
        settings=settings,
        image_shape=data.image_shape,
        dataset=data.name,
        data_sha256=data.content_sha256,
        splits_sha256=data.splits_sha256,
        code_sha256="c" * 64,
        versions={"torch": "0"},
    )
    state = MetaState(weights, OptimizerState(torch.full_like(weights, 1e-3), 500))
    return Checkpoint(model, state, info)


def renamed(data: PreparedData, name: str) -> PreparedData:
    return PreparedData(data.images, data.index.model_copy(update={"name": name}))
