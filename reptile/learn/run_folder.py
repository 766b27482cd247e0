"""The folders of unfinished runs: their checkpoints, of which the latest is always complete."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from reptile.files import atomic_directory, sha256_file, write_json
from reptile.learn.checkpoint import (
    INFO_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    CheckpointInfo,
    write_checkpoint,
)
from reptile.provenance import settings_sha256

log = logging.getLogger(__name__)

DIGESTS_FILE = "sha256.json"
"""Beside a kept checkpoint's files: the SHA-256 of each, by its name."""
PROGRESS = {"iteration", "curve", "losses"}
"""Fields of a run that change as it goes; the others say which run it is."""


class UnfinishedRun(NamedTuple):
    """A run's folder with a checkpoint in it."""

    folder: Path
    info: CheckpointInfo | None
    """None where another version of reptile wrote what cannot be read here."""
    iteration: int
    size: int  # bytes


def run_folder(work: Path, info: CheckpointInfo) -> Path:
    """Return the folder in `work` that belongs to a run, whatever progress it has made."""
    identity = info.model_dump(mode="json", exclude=PROGRESS)
    return work / settings_sha256(identity)[:16]


def keep(run: Path, checkpoint: Checkpoint) -> None:
    """Save a checkpoint named after its iteration, with digests, then drop the older ones."""
    name = f"iteration-{checkpoint.info.iteration:08d}"
    with atomic_directory(run / name) as temporary:
        write_checkpoint(temporary, checkpoint)
        for path in temporary.iterdir():
            _to_disk(path)  # or a crash of the machine could keep the name and lose the content
        write_json(temporary / DIGESTS_FILE, {p.name: sha256_file(p) for p in temporary.iterdir()})
    for folder in kept(run):
        if folder.name != name:
            shutil.rmtree(folder)


def kept(run: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    if not run.is_dir():
        return []
    return sorted(path for path in run.iterdir() if re.fullmatch(r"iteration-\d{8}", path.name))


def is_whole(checkpoint: Path) -> bool:
    """Return whether a kept checkpoint's files have the digests that were saved with them."""
    try:
        digests = json.loads((checkpoint / DIGESTS_FILE).read_text(encoding="utf-8"))
        return digests.keys() == {WEIGHTS_FILE, INFO_FILE} and all(
            sha256_file(checkpoint / name) == digest for name, digest in digests.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def drop_damaged(run: Path) -> None:
    """Remove the checkpoints of a run that are not whole, so that it resumes from one that is."""
    for checkpoint in kept(run):
        if not is_whole(checkpoint):
            log.warning("%s: damaged, its digests differ; removed", checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)


def remove(run: Path) -> None:
    """Remove a run's folder, if there is one."""
    shutil.rmtree(run, ignore_errors=True)


def unfinished_runs(work: Path) -> list[UnfinishedRun]:
    """Return the runs in `work` that have a checkpoint, in the order of their folders' names."""
    if not work.is_dir():
        return []
    folders = sorted(path for path in work.iterdir() if re.fullmatch(r"[0-9a-f]{16}", path.name))
    return [_read(folder, checkpoints[-1]) for folder in folders if (checkpoints := kept(folder))]


def differences(run: CheckpointInfo | None, now: CheckpointInfo) -> str:
    """Return why a training cannot resume a run, in words; empty if it can."""
    if run is None:
        return "written by another version of reptile"
    then, here = (info.model_dump(mode="json", exclude=PROGRESS) for info in (run, now))
    settings, wanted = then.pop("settings"), here.pop("settings")
    parts = [f"other settings ({_changes(settings, wanted)})"] if settings != wanted else []
    code, versions = then.pop("code_sha256"), then.pop("versions")
    other_code, other_versions = here.pop("code_sha256"), here.pop("versions")
    if then != here:
        parts.append("other network" if _data(then) == _data(here) else "other data")
    if code != other_code:
        parts.append("other code")
    if versions != other_versions:
        parts.append(f"other packages ({_changes(versions, other_versions)})")
    return ", ".join(parts)


def describe_start(work: Path, now: CheckpointInfo) -> str:
    """Return one sentence a line: where a training with `resume` starts, and which runs it skips.

    Args:
        work: folder of unfinished runs.
        now: the run that is to start.
    """
    runs = unfinished_runs(work)
    here = run_folder(work, now)
    lines = [
        f"resuming {run.folder} after meta-iteration {run.iteration}"
        for run in runs
        if run.folder == here
    ]
    others = [run for run in runs if run.folder != here]
    if not lines and others:
        lines = [
            f"starting anew, not resuming {run.folder} (meta-iteration {run.iteration}): "
            f"{differences(run.info, now)}"
            for run in others
        ]
        lines.append("`reptile runs` lists unfinished runs and removes them")
    return "\n".join(lines)


def _to_disk(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _read(folder: Path, checkpoint: Path) -> UnfinishedRun:
    try:
        text = (checkpoint / INFO_FILE).read_text(encoding="utf-8")
        info = CheckpointInfo.model_validate_json(text)
    except (OSError, ValidationError):
        info = None
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return UnfinishedRun(folder, info, int(checkpoint.name.removeprefix("iteration-")), size)


def _data(identity: dict[str, Any]) -> list[Any]:
    fields = ("dataset", "data_sha256", "splits_sha256", "image_shape", "values")
    return [identity[field] for field in fields]


def _changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    before, after = _flat(then), _flat(now)
    return ", ".join(
        f"{key}: {before.get(key)}, now {after.get(key)}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
