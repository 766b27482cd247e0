"""The paper's settings, and the work they define: tasks, engines and starting points.

Speed depends on shapes, not on what the images show, so these are random pixels.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from reptile.data.dataset import ClassRange
from reptile.learn.engines import Engine, make_engine
from reptile.learn.optimizer import OptimizerState
from reptile.learn.reptile import MetaState, meta_step
from reptile.models import build_model, initialise
from reptile.settings import ModelSettings, OptimizerSettings, TrainSettings
from reptile.tasks import Task, training_tasks

CPU = torch.device("cpu")
CLASSES, IMAGES = 40, 20  # images of each class
WARM_STEP, WARM_MOMENT = 1000, 1e-4  # Adam's state in the midst of a training


class Case(NamedTuple):
    """One setting, and its target speed relative to eager."""

    title: str
    settings: TrainSettings
    image_shape: tuple[int, int, int]
    speed: float


CASES = {
    "omniglot-5way": Case("Omniglot, 5-way", TrainSettings(), (1, 28, 28), 4.5),
    "omniglot-20way": Case(
        "Omniglot, 20-way",
        TrainSettings(
            ways=20,
            optimizer=OptimizerSettings(learning_rate=5e-4),
            inner_batch=20,
            inner_steps=10,
        ),
        (1, 28, 28),
        3.5,
    ),
    "article-mlp": Case(
        "the article's MLP", TrainSettings(model=ModelSettings(name="mlp")), (1, 28, 28), 8.0
    ),
    "mini-imagenet": Case(
        "mini-ImageNet",
        TrainSettings(
            model=ModelSettings(filters=32, downsampling="pool"), train_shots=15, inner_steps=8
        ),
        (3, 84, 84),
        2.5,
    ),
}


def class_range(classes: int, images: int) -> ClassRange:
    """Return classes of equally many images, as in a dataset's index."""
    return ClassRange(
        np.arange(classes, dtype=np.int64) * images, np.full(classes, images, dtype=np.int64)
    )


def with_state(settings: TrainSettings, state: str) -> TrainSettings:
    """Return the settings with another mode of the inner optimiser's state."""
    optimizer = settings.optimizer.model_copy(update={"state": state})
    return settings.model_copy(update={"optimizer": optimizer})


class Work:
    """One case ready to run: both engines on the same images, and where adaptation starts."""

    def __init__(self, settings: TrainSettings, image_shape: tuple[int, int, int]) -> None:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (CLASSES * IMAGES, *image_shape), dtype=np.uint8)
        model = build_model(settings.model, settings.ways, image_shape)
        weights = initialise(model, 0)
        self.settings = settings
        self.classes = class_range(CLASSES, IMAGES)
        self.state = MetaState(
            weights, OptimizerState(torch.full_like(weights, WARM_MOMENT), WARM_STEP)
        )
        self.engines: dict[str, Engine] = {
            name: make_engine(name, model, settings.optimizer, pixels, CPU)
            for name in ("eager", "auto")
        }

    def meta_batch(self, tasks: int) -> list[Task]:
        """Draw a meta-batch."""
        settings = self.settings.model_copy(update={"meta_batch": tasks})
        return training_tasks(self.classes, settings, 0)

    def meta_iteration(self, engine: str, state: str, tasks: int) -> Callable[[], object]:
        """Return what runs one meta-step, always from the same start on the same tasks."""
        runner, settings = self.engines[engine], with_state(self.settings, state)
        batch = self.meta_batch(tasks)
        return lambda: meta_step(runner, self.state, batch, settings, 1.0)
