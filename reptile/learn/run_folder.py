"""Unfinished training runs: a folder each, named after what the run is made of.

The latest checkpoint in it is always whole: a new one is saved under a name of its own before the
older ones are removed.
"""

import re
import shutil
from pathlib import Path

from reptile.learn.checkpoint import Checkpoint, CheckpointInfo, save_checkpoint
from reptile.provenance import settings_sha256


def run_folder(work: Path, info: CheckpointInfo) -> Path:
    """Return the folder in `work` that belongs to a run, whatever progress it has made."""
    identity = info.model_dump(mode="json", exclude={"iteration", "curve"})
    return work / settings_sha256(identity)[:16]


def keep_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Save a checkpoint under its own name, then drop the older ones."""
    name = f"iteration-{checkpoint.info.iteration:08d}"
    save_checkpoint(run / name, checkpoint)
    for folder in kept_checkpoints(run):
        if folder.name != name:
            shutil.rmtree(folder)


def kept_checkpoints(run: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    if not run.is_dir():
        return []
    return sorted(path for path in run.iterdir() if re.fullmatch(r"iteration-\d{8}", path.name))
