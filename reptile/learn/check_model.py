"""What a network of the settings is and costs, and whether it can train; needs no data."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reptile.errors import InputError
from reptile.learn.engines import choose_device, make_engine
from reptile.learn.engines.base import Engine
from reptile.learn.episodic import EpisodicState, episodic_step
from reptile.learn.heads import head_of
from reptile.learn.step_sizes import untrained_start
from reptile.minibatches import IntArray
from reptile.models import Model, ModuleNetwork, build_model, initialise, size, unflatten
from reptile.models.cut import Cut, split
from reptile.objectives import objective_of
from reptile.settings import TrainSettings
from reptile.tasks import Task

REPEATS = 3


class ModelCheck(NamedTuple):
    """What was found."""

    model: Model
    parameters: int  # all
    adapted: int  # P, of which the initialisation consists
    cut: Cut | None
    batch: int  # images in what follows
    forward: float  # seconds of a forward pass of the whole network
    step: float  # seconds of an inner step, or of a training step through a closed-form head
    memory: int  # bytes of a step: what the gradient needs, weights and the optimiser's state

    def rows(self) -> list[tuple[str, str]]:
        """Return it for people: names and values."""
        model, share = self.model, self.adapted / max(self.parameters, 1)
        names = list(model.shapes)
        some = ", ".join(names[:3]) + (f", ... {names[-1]}" if len(names) > 4 else "")
        cut = (
            f"after {self.cut.where}: {' x '.join(map(str, self.cut.tail.image_shape))} values "
            "an image; what runs before is computed once an image"
            if self.cut
            else "none: the whole network runs in every step"
        )
        return [
            ("network", model.name),
            ("input", " x ".join(map(str, model.image_shape))),
            ("outputs", str(model.outputs or "none: a head in closed form")),
            ("parameters", f"{self.parameters:,}"),
            ("adapted", f"{self.adapted:,} ({share:.1%}){': ' if some else ''}{some}"),
            ("features", f"{model.feature_size:,}"),
            ("batch norm", "of each batch" if model.has_batch_norm else "none of the batch"),
            ("cut", cut),
            ("forward pass", f"{1e3 * self.forward:.1f} ms for {self.batch} images"),
            ("step", f"{1e3 * self.step:.1f} ms for {self.batch} images"),
            ("memory of a step", f"{self.memory / 2**20:.1f} MiB"),
        ]


def check_model(
    settings: TrainSettings, image_shape: tuple[int, ...], values: int = 0
) -> ModelCheck:
    """Build a network and take one step on random inputs.

    Args:
        settings: of the training.
        image_shape: of one input.
        values: that a regressor predicts; 0 for a classifier.

    Raises:
        InputError: the network cannot be built, or cannot train.
        PlatformError: its weights cannot be downloaded, or the device is missing.
    """
    outputs = 0 if settings.closed_form else values or settings.ways
    model = build_model(
        settings.model,
        outputs,
        image_shape,
        objective_of(values),
        adapt=settings.adapt,
        seed=settings.seed,
    )
    device = choose_device(settings.device)
    weights = initialise(model, settings.seed).to(device)
    task, inputs = _random_task(settings, image_shape, values)
    engine = make_engine(settings.engine, model, settings.optimizer, inputs, device)
    step = _step(engine, weights, task, settings)
    images = engine.images(task.support)
    with torch.no_grad():
        outputs_once = model.forward(unflatten(model, weights), images)
        again = model.forward(unflatten(model, weights), images)
    if not outputs_once.isfinite().all():
        raise InputError(f"{model.name}: gives outputs that are not finite; check its weights")
    if not torch.allclose(outputs_once, again):
        raise InputError(
            f"{model.name}: gives other outputs for the same inputs; it must not draw at random"
        )
    try:
        moved = step()
    except (RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{model.name}: no gradient step on {engine.name} ({reason})") from error
    if not moved.isfinite().all() or not moved.any():
        raise InputError(
            f"{model.name}: a step on random images has "
            + ("no effect" if moved.isfinite().all() else "a gradient that is not finite")
        )
    with torch.no_grad():
        forward = _seconds(lambda: model.forward(unflatten(model, weights), images))
    return ModelCheck(
        model,
        sum(value.numel() for value in model.module.parameters())
        if isinstance(model, ModuleNetwork)
        else size(model),
        size(model),
        split(model),
        len(task.support),
        forward,
        _seconds(step),
        _saved(engine, weights, task, settings) + 4 * weights.nbytes,
    )


def _random_task(
    settings: TrainSettings, image_shape: tuple[int, ...], values: int
) -> tuple[Task, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """Return a task of one mini-batch, and its inputs; through a head, with as many queries."""
    rng = np.random.default_rng(0)
    count = 2 * settings.ways if settings.closed_form else settings.inner_batch
    rows: IntArray = np.arange(count)
    targets = (
        rng.standard_normal((count, values)).astype(np.float32) if values else rows % settings.ways
    )
    inputs = rng.integers(0, 256, (2 * count, *image_shape), dtype=np.uint8)
    return Task(rows, targets, rows + count, targets, (rows,)), inputs


def _step(
    engine: Engine, weights: Tensor, task: Task, settings: TrainSettings
) -> Callable[[], Tensor]:
    """Return one training step, which gives how far what is learnt has moved."""
    if not settings.closed_form:
        start = untrained_start(settings, engine.model, weights)
        return lambda: engine.adapt(*start.starts(engine, [task]), [task]).weights[0] - weights
    values = task.query_targets.shape[1] if task.query_targets.ndim > 1 else 0
    head = head_of(settings.head, engine.model.feature_size, values)
    state, rate = EpisodicState.start(weights, head), settings.episode.learning_rate
    return lambda: episodic_step(engine, state, [task], head, rate)[0].weights - state.weights


def _saved(engine: Engine, weights: Tensor, task: Task, settings: TrainSettings) -> int:
    """Return the bytes that torch keeps for the gradient of a step."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _step(engine, weights, task, settings)()
    return sum(kept.values())


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return median(times)
