"""The folder of an unfinished run: its checkpoints, of which the latest is always whole."""

import re
import shutil
from pathlib import Path

from reptile.learn.checkpoint import Checkpoint, CheckpointInfo, save_checkpoint
from reptile.provenance import settings_sha256


def run_folder(work: Path, info: CheckpointInfo) -> Path:
    """Return the folder in `work` that belongs to a run, whatever progress it has made."""
    identity = info.model_dump(mode="json", exclude={"iteration", "curve"})
    return work / settings_sha256(identity)[:16]


def keep(run: Path, checkpoint: Checkpoint) -> None:
    """Save a checkpoint under its own name, then drop the older ones."""
    name = f"iteration-{checkpoint.info.iteration:08d}"
    save_checkpoint(run / name, checkpoint)
    for folder in kept(run):
        if folder.name != name:
            shutil.rmtree(folder)


def kept(run: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    if not run.is_dir():
        return []
    return sorted(path for path in run.iterdir() if re.fullmatch(r"iteration-\d{8}", path.name))


def remove(run: Path) -> None:
    """Remove a run's folder, if there is one."""
    shutil.rmtree(run, ignore_errors=True)
