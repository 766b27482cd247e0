"""A training run: its folder, its processes and resuming, around the loop in `train`."""

import logging
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from reptile.cpus import available_cpus
from reptile.data.dataset import PreparedData
from reptile.errors import DivergedError, InputError, StoppedError
from reptile.files import lock_folder
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo, load_checkpoint
from reptile.learn.distributed import Processes
from reptile.learn.engines import choose_device, make_engine
from reptile.learn.reptile import MetaState
from reptile.learn.run_folder import describe_start, drop_damaged, keep, kept, remove, run_folder
from reptile.learn.train import Progress, meta_train, untrained
from reptile.settings import TrainSettings

log = logging.getLogger(__name__)

ALONE = Processes()


def run_training(
    settings: TrainSettings,
    data: PreparedData,
    work: Path | None = None,
    *,
    module: nn.Module | None = None,
    resume: bool = False,
    processes: Processes = ALONE,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], int] = lambda: 0,
) -> Checkpoint:
    """Meta-train an initialisation.

    Args:
        settings: the algorithm and all its numbers.
        data: a prepared dataset; its training split makes tasks, its validation split the curve
            (the training split does, where no classes are held out for validation).
        work: folder for unfinished runs; None keeps none. Each run has a folder in it, named
            after its settings, data, code and packages; its latest checkpoint is always complete.
        module: the network, if not the one that the settings name; it is copied, not changed.
        resume: continue from this run's latest checkpoint, if any; on the CPU the result is
            bit for bit that of an uninterrupted run.
        processes: those that share the tasks of each meta-batch; all return the same, and only the
            first one uses `work`.
        on_progress: called after each meta-iteration.
        stop: returns the signal that has asked this process to stop, if any; as long as one
            process was asked, all of them end after the same meta-iteration.

    Raises:
        InputError: the data cannot make the tasks, or another process runs another training.
        DivergedError: the loss is no longer finite.
        PlatformError: another process was lost, or the device is missing.
        StoppedError: `stop` said so; the run's folder has a checkpoint of that meta-iteration.
    """
    start = untrained(settings, data, module)
    folder = run_folder(work, start.info) if work and processes.first else None
    if folder and not resume:
        remove(folder)
    if folder:
        drop_damaged(folder)
    if work and folder and resume and (message := describe_start(work, start.info)):
        log.info(message)
    if folder and (checkpoints := kept(folder)):
        start = load_checkpoint(checkpoints[-1], module)
    in_turn = settings.optimizer.state == "sequential" and not settings.closed_form
    if processes.first and processes.size > 1 and in_turn:
        log.warning(
            "train.optimizer.state = sequential: tasks run one after another, so %d processes are "
            "no faster than one; use parallel",
            processes.size,
        )
    device = choose_device(settings.device)
    # More threads than the quota allows would be stopped for most of the time.
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
    start = _agree(start, processes, device)
    engine = make_engine(
        settings.engine, start.model, settings.optimizer, data.images, device, settings.precision
    )
    try:
        with lock_folder(folder) if folder else nullcontext():
            return meta_train(
                processes.share(engine),
                start,
                data,
                on_progress=on_progress,
                on_checkpoint=lambda checkpoint: keep(folder, checkpoint) if folder else None,
                stop=lambda: processes.any(bool(stop()), device),
            )
    except DivergedError as error:
        saved = kept(folder)[-1:] if folder else []
        where = f"the last good checkpoint is {saved[0]}" if saved else "no checkpoint was due yet"
        raise DivergedError(f"{error}; {where}") from None
    except StoppedError as stopped:
        where = "; resume from its checkpoint with --resume" if work else ""
        ended = StoppedError(f"{stopped}{where}")
        ended.exit_code = 128 + (stop() or signal.SIGTERM)
        raise ended from None


def _agree(checkpoint: Checkpoint, processes: Processes, device: torch.device) -> Checkpoint:
    """Return the first process's start on this process's device."""
    model, state, info = checkpoint
    here = run_folder(Path(), info)
    info = CheckpointInfo.model_validate_json(processes.tell(info.model_dump_json(), device))
    if run_folder(Path(), info) != here:
        raise InputError(
            f"process {processes.rank} has other settings, data, code or packages than process 0; "
            "all of one run need the same"
        )
    step = int(processes.broadcast(torch.tensor(state.step, device=device)))
    if isinstance(state, MetaState):
        state = state._replace(inner=state.inner._replace(step=step))
    else:  # the statistics are measured again when training ends
        state = state._replace(step=step, statistics=())
    return Checkpoint(model, state.to(device).each(processes.broadcast), info)
