"""Meta-training: the loop, its checkpoints, and resuming.

The loop is meant to be read beside the paper's algorithm box. What one meta-step does is in
`meta`; how it is shown to a person is the caller's business.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from reptile.data.dataset import PreparedData, Split
from reptile.errors import DivergedError, InputError, PlatformError
from reptile.learn.checkpoint import (
    Checkpoint,
    CheckpointInfo,
    CurvePoint,
    load_checkpoint,
)
from reptile.learn.distributed import Processes
from reptile.learn.engines import make_engine
from reptile.learn.optimizer import OptimizerState, fresh_state
from reptile.learn.reptile import MetaState, meta_step, step_size
from reptile.learn.run_folder import keep_checkpoint, kept_checkpoints, run_folder
from reptile.learn.validate import mean_score
from reptile.models import initialise
from reptile.objectives import Objective, objective_of
from reptile.provenance import code_sha256, versions
from reptile.settings import TrainSettings
from reptile.tasks import (
    Purpose,
    Task,
    check_classes,
    held_out_task,
    random_stream,
    training_tasks,
)

log = logging.getLogger(__name__)

ALONE = Processes()


class Progress(NamedTuple):
    """Where training is, told after each meta-iteration."""

    iteration: int  # meta-iterations done
    of: int
    engine: str
    objective: Objective
    curve: tuple[CurvePoint, ...]


def train(
    settings: TrainSettings,
    data: PreparedData,
    work: Path,
    *,
    resume: bool = False,
    processes: Processes = ALONE,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Checkpoint:
    """Meta-train an initialisation.

    Args:
        settings: the algorithm and all its numbers.
        data: a prepared dataset; its training split makes tasks, its validation split the curve
            (the training split does, where no classes are held out for validation).
        work: folder for unfinished runs. Each run has a folder of its own in it, named after its
            settings, data, code and packages; the latest checkpoint there is always whole.
        resume: go on from this run's latest checkpoint, if there is one; on the CPU the result is
            bit for bit that of an uninterrupted run.
        processes: those that share the tasks of each meta-batch; all return the same, and the
            first one alone uses `work`.
        on_progress: called after each meta-iteration.

    Raises:
        InputError: the data cannot make the tasks, or another process runs something else.
        DivergedError: the loss is no longer finite.
        PlatformError: another process has gone, or the device is not there.
    """
    objective_of(data.values).check_ways(settings.ways, data.name)
    classes = data.split("train")
    check_classes(classes, settings.ways, settings.train_shots, "training split")
    validation = _validation_tasks(settings, data)
    start = _start(settings, data)
    run = run_folder(work, start.info)
    if processes.first and not resume:
        shutil.rmtree(run, ignore_errors=True)
    kept = kept_checkpoints(run) if processes.first else []
    if processes.first and processes.size > 1 and settings.optimizer.state == "sequential":
        log.warning(
            "train.optimizer.state = sequential: tasks run one after another, so %d processes are "
            "no faster than one; use parallel",
            processes.size,
        )
    device = choose_device(settings.device)
    model, state, info = _agree(load_checkpoint(kept[-1]) if kept else start, processes, device)
    engine = processes.share(
        make_engine(settings.engine, model, settings.optimizer, data.images, device)
    )
    losses: list[float] = []
    for iteration in range(info.iteration, settings.meta_iterations):
        tasks = training_tasks(classes, settings, iteration)
        epsilon = step_size(settings, iteration)
        state, task_losses = meta_step(engine, state, tasks, settings, epsilon)
        if not (task_losses.sum() + state.weights.sum()).isfinite():  # one bad number spoils a sum
            raise DivergedError(_diverged(settings, iteration, run))
        losses.append(float(task_losses[:, -1].mean()))

        if (iteration + 1) % settings.checkpoint_every == 0 or (
            iteration + 1 == settings.meta_iterations
        ):
            point = CurvePoint(
                iteration=iteration + 1,
                loss=sum(losses) / len(losses),
                score=mean_score(engine, state, validation, info.objective),
            )
            losses = []
            curve = (*info.curve, point)
            info = info.model_copy(update={"iteration": iteration + 1, "curve": curve})
            if processes.first:
                keep_checkpoint(run, Checkpoint(model, _to(state, torch.device("cpu")), info))
        of = settings.meta_iterations
        on_progress(Progress(iteration + 1, of, engine.name, info.objective, info.curve))
    return Checkpoint(model, _to(state, torch.device("cpu")), info)


def choose_device(name: str) -> torch.device:
    """Return the device that the settings name; `auto` is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise PlatformError("train.device = cuda: torch sees no CUDA device here; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # torchrun's, one a device


def _start(settings: TrainSettings, data: PreparedData) -> Checkpoint:
    info = CheckpointInfo(
        iteration=0,
        settings=settings,
        image_shape=data.image_shape,
        values=data.values,
        dataset=data.name,
        data_sha256=data.content_sha256,
        splits_sha256=data.splits_sha256,
        code_sha256=code_sha256(),
        versions=versions("torch", "numpy"),
    )
    model = info.model()
    weights = initialise(model, settings.seed)
    return Checkpoint(model, MetaState(weights, fresh_state(weights)), info)


def _agree(checkpoint: Checkpoint, processes: Processes, device: torch.device) -> Checkpoint:
    """Return the first process's start on this process's device."""
    model, state, info = checkpoint
    ours = run_folder(Path(), info)
    info = CheckpointInfo.model_validate_json(processes.tell(info.model_dump_json(), device))
    if run_folder(Path(), info) != ours:
        raise InputError(
            f"process {processes.rank} has other settings, data, code or packages than process 0; "
            "all of one run need the same"
        )
    weights, inner = _to(state, device)
    step = int(processes.broadcast(torch.tensor(inner.step, device=device)))
    inner = OptimizerState(processes.broadcast(inner.second_moment), step)
    return Checkpoint(model, MetaState(processes.broadcast(weights), inner), info)


def _validation_tasks(settings: TrainSettings, data: PreparedData) -> list[Task]:
    name: Split = "validation" if data.split("validation").starts.size else "train"
    classes = data.split(name)
    protocol = objective_of(data.values).validation._replace(ways=settings.ways)
    check_classes(classes, protocol.ways, protocol.shots + protocol.queries, f"{name} split")
    return [
        held_out_task(random_stream(settings.seed, Purpose.VALIDATE, number), classes, protocol)
        for number in range(settings.validation_tasks)
    ]


def _to(state: MetaState, device: torch.device) -> MetaState:
    weights, inner = state
    moved = OptimizerState(inner.second_moment.to(device), inner.step)
    return MetaState(weights.to(device), moved)


def _diverged(settings: TrainSettings, iteration: int, run: Path) -> str:
    kept = kept_checkpoints(run)
    saved = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was due before"
    return (
        f"the loss is no longer finite in meta-iteration {iteration + 1}; {saved}. "
        f"Lower train.optimizer.learning_rate (now {settings.optimizer.learning_rate:g}) "
        f"or train.meta_step (now {settings.meta_step:g})"
    )
