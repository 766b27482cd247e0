"""From files of arrays to the prepared dataset: signals, spectra, embeddings, images.

No pickle is read. Not for arrays that a program has in memory (see `arrays`).
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile
from safetensors import SafetensorError, safe_open

from reptile.data.dataset import (
    IMAGES_FILE,
    INDEX_FILE,
    TARGETS_FILE,
    PreparedData,
    Split,
    load_prepared,
)
from reptile.data.readers.base import Source
from reptile.data.splits import assign_splits, groups_or_classes
from reptile.errors import InputError
from reptile.files import atomic_directory, write_json
from reptile.settings import PrepareSettings, WindowSettings

log = logging.getLogger(__name__)

SUFFIXES = (".npz", ".safetensors")
INPUTS = "inputs"
NAMES = (INPUTS, "labels", "targets", "tasks", "groups", "names")


def is_arrays(source: str) -> bool:
    """Say whether the path of a source is that of arrays: by its suffix, or by `inputs.npy`."""
    path = Path(source)
    return path.suffix.casefold() in SUFFIXES or (path / f"{INPUTS}.npy").is_file()


def prepare_arrays(
    settings: PrepareSettings, folder: Path, progress: Callable[[int, int], None] | None = None
) -> PreparedData:
    """Prepare arrays as `from_arrays` does; replace `folder` in one step.

    The file holds `inputs` [N, ...] of any shape, and `labels` [N], or `targets` [N] or
    [N, outputs] with `tasks` [N]; with labels, `groups` [N] if there are any. Where `names` [K] are
    given, labels (or tasks) are places in it. A folder of .npy files is memory-mapped; the others
    are read into memory.

    Args:
        settings: the source, what is held out, `windows` and `order: true`. The settings for
            images have no effect.
        folder: where to write `images.npy`, `targets.npy` (values) and `dataset.json`.
        progress: called with all examples when they are written.

    Raises:
        InputError: the file or the settings cannot be used; `folder` is as it was before.
    """
    from reptile.data.arrays import collect  # imports torch

    source = settings.source
    if isinstance(settings.order, str):
        raise InputError(
            f"prepare.order = {settings.order!r}: arrays have no columns; set it to true if the "
            "rows are in the order of time"
        )
    arrays = _read(Path(source))
    inputs, targets, tasks = arrays[INPUTS], arrays.get("targets"), arrays.get("tasks")
    labels, groups = arrays.get("labels"), arrays.get("groups")
    if (labels is None) == (targets is None):
        raise InputError(f"{source}: give labels (classes), or targets (values) with tasks")
    if (targets is None) != (tasks is None):
        raise InputError(f"{source}: targets and tasks go together; classes are in `labels`")
    if targets is not None and groups is not None:
        raise InputError(f"{source}: groups are of classes; leave them out, or targets and tasks")
    if "names" in arrays:
        labels, tasks = (
            None if each is None else _named(each, arrays["names"], source)
            for each in (labels, tasks)
        )
    if settings.windows:
        number = _windows(inputs, settings.windows, source)
        each_row = np.arange(len(inputs)).repeat(number)
        for name, array in (("labels", labels), ("tasks", tasks), ("groups", groups)):
            if array is not None and array.shape != inputs.shape[:1]:
                raise InputError(f"{source}: {name} of shape {list(array.shape)}: expected [N]")
        if targets is not None and targets.shape[:1] != inputs.shape[:1]:
            raise InputError(
                f"{source}: targets of shape {list(targets.shape)} for {len(inputs)} inputs"
            )
        inputs = _cut(inputs, settings.windows)
        labels, tasks, groups, targets = (
            None if each is None else each[each_row] for each in (labels, tasks, groups, targets)
        )

    def assign(of: Source) -> tuple[dict[str, Split], dict[str, object]]:
        splits = assign_splits(of, groups_or_classes(of, settings))
        return splits, settings.model_dump(mode="json")

    data = collect(
        inputs,
        labels if targets is None else targets,
        tasks=tasks,
        groups=groups,
        assign=assign,
        ordered=settings.order,
        name=Path(source).stem,
        where=f"{source}: ",
    )
    for c in data.classes:
        if c.count < settings.images_per_class:
            raise InputError(
                f"{source}: {c.name} has {c.count} of the {settings.images_per_class} examples "
                "that images_per_class asks for; add some, leave it out, or lower that setting"
            )
    with atomic_directory(folder) as temporary:
        np.save(temporary / IMAGES_FILE, data.images)
        if data.targets is not None:
            np.save(temporary / TARGETS_FILE, data.targets)
        write_json(temporary / INDEX_FILE, data.index.model_dump(mode="json"))
    if progress is not None:
        progress(len(data.images), len(data.images))
    return load_prepared(folder)


def _read(path: Path) -> Mapping[str, npt.NDArray[Any]]:
    """Return the arrays of NAMES that are there."""
    try:
        if path.is_dir():
            files = {file.stem: file for file in path.glob("*.npy")}
            known = set(files)
            arrays = {
                name: np.load(files[name], mmap_mode="r", allow_pickle=False)
                for name in NAMES
                if name in files
            }
        elif path.suffix.casefold() == ".npz":
            # `load` would read other forms too.
            with path.open("rb") as file, NpzFile(file, allow_pickle=False) as archive:
                known = set(archive)
                arrays = {name: archive[name] for name in NAMES if name in archive}
        else:
            with safe_open(path, "numpy") as tensors:
                known = set(tensors.keys())
                arrays = {name: tensors.get_tensor(name) for name in NAMES if name in known}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (
        OSError,
        ValueError,
        TypeError,
        BadZipFile,
        EOFError,
        KeyError,
        SafetensorError,
    ) as error:
        reason = str(error) or type(error).__name__  # TypeError: bfloat16, which NumPy has not
        if any(word in reason for word in ("allow_pickle", "pickled", "Python objects")):
            reason = (
                "it holds Python objects as a pickle, which can run code; save numbers, strings"
            )
        raise InputError(f"{path}: cannot be read ({' '.join(reason.split())})") from None
    if unused := sorted(known - set(NAMES)):
        log.warning("%s: %s: not used; known are %s", path, ", ".join(unused), ", ".join(NAMES))
    if INPUTS not in arrays:
        raise InputError(f"{path}: no array `{INPUTS}`; it must hold `{INPUTS}` and `labels`")
    if arrays[INPUTS].ndim < 2 or 0 in arrays[INPUTS].shape:
        raise InputError(
            f"{path}: inputs of shape {list(arrays[INPUTS].shape)}: expected [N, ...], one row an "
            "example; single numbers are [N, 1]"
        )
    return arrays


def _named(places: npt.NDArray[Any], names: npt.NDArray[Any], source: str) -> npt.NDArray[Any]:
    """Return the names at places [N]."""
    if names.ndim != 1 or names.dtype.kind != "U":
        raise InputError(f"{source}: names are {names.dtype} {list(names.shape)}, expected strings")
    if places.dtype.kind not in "iu" or not np.all((places >= 0) & (places < len(names))):
        raise InputError(
            f"{source}: with {len(names)} names, labels (or tasks) must be integers from 0 to "
            f"{len(names) - 1}"
        )
    return np.asarray(names[places])


def _windows(inputs: npt.NDArray[Any], windows: WindowSettings, source: str) -> int:
    """Return how many windows each example gives."""
    time = int(inputs.shape[-1])
    if time < windows.length:
        raise InputError(
            f"{source}: recordings of {time} samples are shorter than windows.length = "
            f"{windows.length}; lower it"
        )
    return (time - windows.length) // windows.step + 1


def _cut(inputs: npt.NDArray[Any], windows: WindowSettings) -> npt.NDArray[Any]:
    """Cut [N, ..., time] into windows [N·windows, ..., length], those of an example together."""
    views = np.lib.stride_tricks.sliding_window_view(inputs, windows.length, axis=-1)
    views = np.moveaxis(views[..., :: windows.step, :], -2, 1)
    return views.reshape(-1, *views.shape[2:])
