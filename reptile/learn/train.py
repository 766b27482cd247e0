"""Meta-training: the loop, as in the paper's algorithm box.

One meta-step is in `reptile`, the inner loop in `inner_loop`, a step through a closed-form head in
`episodic`. The run's folder, its
processes and resuming are in `run`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from reptile.data.dataset import PreparedData, Split
from reptile.errors import DivergedError, StoppedError
from reptile.learn.algorithms import algorithm_of, check_objective
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo, CurvePoint, build_network
from reptile.learn.engines import Engine
from reptile.models import ModuleNetwork, Towers, initialise
from reptile.objectives import Objective, objective_of
from reptile.provenance import code_sha256, versions
from reptile.settings import TrainSettings
from reptile.tasks import (
    Purpose,
    Task,
    check_classes,
    held_out_task,
    random_stream,
)


class Progress(NamedTuple):
    """Where training is, after a meta-iteration."""

    iteration: int  # meta-iterations done
    of: int
    engine: str
    objective: Objective
    curve: tuple[CurvePoint, ...]


def meta_train(
    engine: Engine,
    start: Checkpoint,
    data: PreparedData,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None,
    stop: Callable[[], bool] = lambda: False,
) -> Checkpoint:
    """Meta-train from a checkpoint to the last meta-iteration of its settings.

    Args:
        engine: runs the inner loops; holds the data's inputs.
        start: an untrained initialisation, or where an earlier training stopped.
        data: its training split makes tasks, its validation split the learning curve.
        on_progress: called after each meta-iteration.
        on_checkpoint: called every `checkpoint_every` meta-iterations, after the last, and when
            the training is stopped.
        stop: asked after each meta-iteration but the last whether to stop there.

    Raises:
        InputError: the data cannot make the tasks.
        DivergedError: the loss is no longer finite.
        StoppedError: `stop` said so.
    """
    model, state, info = start
    settings, classes = info.settings, data.split("train")
    validation = validation_tasks(settings, data)
    algorithm = algorithm_of(settings, model, info.values, info.classes)
    losses = list(info.losses)
    for iteration in range(info.iteration, settings.meta_iterations):
        state, task_losses = algorithm.iterate(engine, state, classes, iteration)
        if not (task_losses.sum() + state.weights.sum()).isfinite():  # one bad number spoils a sum
            raise DivergedError(
                f"the loss is no longer finite in meta-iteration {iteration + 1}: lower "
                + algorithm.diverged()
            )
        losses.append(float(task_losses.mean()))

        done = iteration + 1
        if done % settings.checkpoint_every == 0 or done == settings.meta_iterations:
            state = algorithm.finish(engine, state, data)
            score = algorithm.score(engine, state, validation)
            point = CurvePoint(iteration=done, loss=sum(losses) / len(losses), score=score)
            losses = []
            info = info.model_copy(
                update={
                    "iteration": done,
                    "curve": (*info.curve, point),
                    "losses": (),
                    "shares": getattr(state, "shares", ()),
                }
            )
            on_checkpoint(Checkpoint(model, state.to(torch.device("cpu")), info))
        on_progress(
            Progress(done, settings.meta_iterations, engine.name, info.objective, info.curve)
        )
        if done < settings.meta_iterations and stop():
            if done != info.iteration:
                state = algorithm.finish(engine, state, data)  # so that it can be evaluated
                info = info.model_copy(
                    update={
                        "iteration": done,
                        "losses": tuple(losses),
                        "shares": getattr(state, "shares", ()),
                    }
                )
                on_checkpoint(Checkpoint(model, state.to(torch.device("cpu")), info))
            raise StoppedError(f"stopped after meta-iteration {done} of {settings.meta_iterations}")
    if start.info.iteration == settings.meta_iterations:  # the loop did not run
        state = algorithm.finish(engine, state, data)
    return Checkpoint(model, state.to(torch.device("cpu")), info)


def untrained(
    settings: TrainSettings, data: PreparedData, module: nn.Module | None = None
) -> Checkpoint:
    """Return the initialisation before any meta-step, and check that the data can make the tasks.

    Args:
        settings: of the training.
        data: what it will be trained on.
        module: the network, if not the one that the settings name.

    Raises:
        InputError: the data cannot make the tasks, or the module does not fit it.
    """
    objective = objective_of(data.values)
    objective.check_ways(settings.ways, data.name)
    check_objective(settings, objective)
    check_tasks(settings, data, "training split")
    packages = ["torch", "numpy"]
    networks = settings.model.towers or (settings.model,)
    if any(network.name.startswith("torchvision:") for network in networks):
        packages.append("torchvision")
    info = CheckpointInfo(
        iteration=0,
        settings=settings,
        image_shape=data.image_shape,
        values=data.values,
        classes=len(data.split("train").starts) if settings.algorithm == "pretrain" else 0,
        pixels=data.images.dtype == np.uint8,
        dataset=data.name,
        data_sha256=data.content_sha256,
        splits_sha256=data.splits_sha256,
        code_sha256=code_sha256("train"),
        versions=versions(*packages),
    )
    model = build_network(info, module)
    loaded = model.weights_sha256 if isinstance(model, ModuleNetwork | Towers) else ""
    name = model.name if module else ""
    info = info.model_copy(update={"module": name, "weights_sha256": loaded})
    weights = initialise(model, settings.seed)
    start = algorithm_of(settings, model, info.values, info.classes).start(weights)
    return Checkpoint(model, start, info)


def check_tasks(settings: TrainSettings, data: PreparedData, what: str) -> None:
    """Refuse data that cannot make the tasks of a training and its curve; `what` is it in errors.

    Raises:
        InputError: it cannot.
    """
    check_classes(data.split("train"), settings.ways, settings.images_per_class, what)
    validation_tasks(settings, data)


def validation_tasks(settings: TrainSettings, data: PreparedData) -> list[Task]:
    """Draw the tasks of the learning curve; of the training split, if none is for validation.

    Raises:
        InputError: the split cannot make such tasks.
    """
    name: Split = "validation" if data.split("validation").starts.size else "train"
    classes = data.split(name)
    ways = min(settings.ways, len(classes.starts)) if settings.closed_form else settings.ways
    protocol = objective_of(data.values).validation._replace(ways=ways)
    if settings.closed_form and data.values:
        episode = settings.episode
        protocol = protocol._replace(shots=max(episode.shots), queries=episode.queries)
    elif data.values and classes.starts.size:  # tasks of few rows: half of them known
        shots = min(protocol.shots, int(classes.counts.min()) // 2)
        queries = min(protocol.queries, int(classes.counts.min()) - shots)
        protocol = protocol._replace(shots=shots, queries=queries)
    check_classes(classes, protocol.ways, protocol.shots + protocol.queries, f"{name} split")
    return [
        held_out_task(random_stream(settings.seed, Purpose.VALIDATE, number), classes, protocol)
        for number in range(settings.validation_tasks)
    ]
