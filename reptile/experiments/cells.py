"""One training in a folder of its own, done once: found finished, resumed, or trained.

For experiments of several trainings (`reproduce`, `compare`).
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from pydantic import BaseModel, ConfigDict, ValidationError

from reptile import stages
from reptile.cpus import available_cpus
from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.files import write_json
from reptile.learn.checkpoint import load_checkpoint
from reptile.learn.train import Progress
from reptile.settings import TrainSettings

Reported = Callable[[str, int, int], None]
"""Called with the current step, the number done and the total."""


class Training(BaseModel):
    """How a checkpoint was trained, as in training.json. Of an interrupted run, the last part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    cpus: int
    first_iteration: int
    """0, or where this part resumed."""
    seconds: float
    tasks_per_second: float
    """Including validation."""
    peak_bytes: int | None = None
    """The most memory that the process held while it trained; None where the system does not
    tell."""


def trained(
    settings: TrainSettings,
    data: PreparedData,
    prepared: Path,
    folder: Path,
    label: str,
    on_progress: Reported,
) -> Training:
    """Train into `folder/checkpoint` unless that is done already; return how it was trained.

    An interrupted training resumes from its latest checkpoint. What was measured of another
    checkpoint, in `folder/evaluation`, is removed.

    Args:
        settings: of the training.
        data: the prepared data.
        prepared: where they lie.
        folder: for `checkpoint`, `curves`, `training.json`, and the unfinished training.
        label: what the progress is called.
        on_progress: called with the label, the meta-iterations done, and all of them.

    Raises:
        InputError: whatever the stage refuses.
    """
    if (found := _finished(settings, data, folder)) is not None:
        return found
    shutil.rmtree(folder / "evaluation", ignore_errors=True)
    training = _train(settings, prepared, folder, label, on_progress)
    write_json(folder / "training.json", training.model_dump(mode="json"))
    return training


def _finished(settings: TrainSettings, data: PreparedData, folder: Path) -> Training | None:
    try:
        info = load_checkpoint(folder / "checkpoint").info
        training = Training.model_validate_json((folder / "training.json").read_bytes())
    except (InputError, FileNotFoundError, ValidationError):
        return None
    theirs = info.settings, info.data_sha256, info.splits_sha256
    same = theirs == (settings, data.content_sha256, data.splits_sha256)
    return training if same else None


def _train(
    settings: TrainSettings, prepared: Path, folder: Path, label: str, on_progress: Reported
) -> Training:
    start = perf_counter()
    first, engine = settings.meta_iterations, ""

    def observe(progress: Progress) -> None:
        nonlocal first, engine
        first, engine = min(first, progress.iteration - 1), progress.engine
        on_progress(label, progress.iteration, progress.of)

    _forget_peak()
    stages.train(
        settings,
        prepared,
        folder / "checkpoint",
        curves=folder / "curves",
        work=folder / "training",
        resume=True,
        on_progress=observe,
    )
    seconds = perf_counter() - start
    tasks = settings.meta_batch * (settings.meta_iterations - first)
    return Training(
        engine=engine,
        cpus=available_cpus(),
        first_iteration=first,
        seconds=round(seconds, 1),
        tasks_per_second=round(tasks / seconds, 1),
        peak_bytes=_peak(),
    )


def _forget_peak() -> None:
    """Start the system's record of this process's peak memory anew."""
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # a container may forbid it: the peak is then that of the whole process
            return


def _peak() -> int | None:
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None
