"""Small checkpoints with the optimiser state that a little training leaves, and their bundles."""

from pathlib import Path

import torch
from torch import nn

from reptile.data.dataset import PreparedData
from reptile.evaluate.metrics import Metrics
from reptile.export.write import export_bundle
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo, build_network
from reptile.learn.engines import EagerEngine
from reptile.learn.episodic import EpisodicState, population_statistics
from reptile.learn.heads import HEADS
from reptile.learn.optimizer import OptimizerState, fresh_state
from reptile.learn.reptile import MetaState, meta_step
from reptile.models import build_model, initialise, size
from reptile.settings import (
    EvaluateSettings,
    ExportSettings,
    ModelSettings,
    OptimizerSettings,
    TrainSettings,
)
from reptile.tasks import training_tasks

WAYS, FILTERS, MAX_STEPS = 3, 8, 60
PROTOCOL = EvaluateSettings(steps=10, batch=4)
METRICS = Metrics.model_validate(
    {
        "objective": "classification",
        "metric": "accuracy",
        "ways": WAYS,
        "held_out": "patterns",
        "scores": {
            "patterns": {
                1: {
                    "trained": {"frozen": {"mean": 0.75, "interval": 0.01}},
                    "random": {"frozen": {"mean": 0.25, "interval": 0.02}},
                    "nearest_mean": {"none": {"mean": 0.5, "interval": 0.02}},
                }
            }
        },
    }
)


def make_checkpoint(
    model: ModelSettings,
    shape: tuple[int, ...],
    optimizer: OptimizerSettings | None = None,
) -> Checkpoint:
    """A checkpoint of random weights, with a second moment of the size of real gradients."""
    settings = TrainSettings(
        model=model, ways=WAYS, optimizer=optimizer or OptimizerSettings(), train_shots=5
    )
    network = build_model(model, WAYS, shape)
    noise = torch.rand(size(network), generator=torch.Generator().manual_seed(1))
    # Not exactly the initialisation: its zero biases put dead units on the ReLU's kink, where
    # rounding decides.
    weights = initialise(network, 0) + 0.1 * (noise - 0.5)
    state = MetaState(weights, OptimizerState(1e-3 + 1e-2 * noise, 10_000))
    info = CheckpointInfo(
        iteration=3,
        settings=settings,
        image_shape=shape,
        dataset="patterns",
        data_sha256="0" * 64,
        splits_sha256="0" * 64,
        code_sha256="0" * 64,
        versions={},
    )
    return Checkpoint(network, state, info)


def trained_checkpoint(data: PreparedData) -> Checkpoint:
    """A conv4 after a few meta-steps on the patterns."""
    start = make_checkpoint(ModelSettings(filters=FILTERS), data.image_shape)
    settings = start.info.settings
    engine = EagerEngine(start.model, settings.optimizer, data.images, torch.device("cpu"))
    state = MetaState(start.state.weights, fresh_state(start.state.weights))
    for iteration in range(8):
        tasks = training_tasks(data.split("train"), settings, iteration)
        state = meta_step(engine, state, tasks, settings, 1.0).state
    return start._replace(state=state)


def make_closed_form_checkpoint(
    data: PreparedData, algorithm: str, module: nn.Module | None = None
) -> Checkpoint:
    """A checkpoint of random weights, with the statistics of the training images."""
    start = make_checkpoint(ModelSettings(filters=FILTERS), data.image_shape)
    settings = start.info.settings.model_copy(update={"algorithm": algorithm, "ways": WAYS})
    name = f"{type(module).__module__}.{type(module).__qualname__}" if module else ""
    info = start.info.model_copy(update={"settings": settings, "module": name})
    network = build_network(info, module)
    state = EpisodicState.start(initialise(network, 0), HEADS[algorithm])
    engine = EagerEngine(network, settings.optimizer, data.images, torch.device("cpu"))
    measured = population_statistics(engine, state.weights, data.split("train"), settings.seed)
    return Checkpoint(network, state._replace(statistics=measured), info)


def write_bundle(folder: Path, data: PreparedData, checkpoint: Checkpoint) -> None:
    """Export the checkpoint, to a 3-way bundle if it learns by gradient steps."""
    settings = ExportSettings(name="patterns", max_steps=MAX_STEPS, max_support=50)
    export_bundle(settings, checkpoint, data, METRICS, folder, protocol=PROTOCOL)
