"""What a network sees of each row: its input, or the values of its fixed part, which runs once.

The values are kept in a file beside the prepared data, named after the network's code and weights.
"""

import copy
import hashlib
import inspect
import logging
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from reptile.data.dataset import CROSS_DOMAIN_FOLDER, Inputs
from reptile.learn.engines.base import gather
from reptile.minibatches import IntArray
from reptile.models import Model
from reptile.models.cut import Cut, split

log = logging.getLogger(__name__)

Values = Callable[[IntArray], Tensor]
"""From rows [...] to what a network sees of them, [..., *image_shape]."""

LIMIT = 8 * 2**30  # bytes of kept values for each prepared dataset
BATCH = 8  # images in a forward pass of the fixed part: always the same, for equal rounding
DIGEST = 16


def without_fixed_part(model: Model, inputs: Inputs, device: torch.device) -> tuple[Model, Values]:
    """Return what is left of a network when its fixed part is done, and what that sees of rows."""
    cut = split(model)
    if cut is None:
        return model, lambda rows: gather(inputs, rows, device)
    log.debug("%s: what is fixed, up to %s, runs once an image", model.name, cut.where)
    return cut.tail, FixedValues(cut, inputs, device)


class FixedValues:
    """The values of a network's fixed part, computed where they are first needed."""

    def __init__(self, cut: Cut, inputs: Inputs, device: torch.device) -> None:
        self._fixed = copy.deepcopy(cut.fixed).to(device)  # the network itself stays where it is
        self._shape = cut.tail.image_shape
        self._inputs, self._device = inputs, device
        self._store = ValueStore(_size(self._shape), _folder(inputs), _key(cut, inputs, device))

    def __call__(self, rows: IntArray) -> Tensor:
        """Return the values of rows [...], float32 [..., *shape]."""
        unique, places = np.unique(rows, return_inverse=True)
        values = np.empty((len(unique), *self._shape), np.float32)
        missing = []
        for place, row in enumerate(unique):
            kept = self._store.read(int(row), self._inputs)
            if kept is None:
                missing.append(place)
            else:
                values[place] = np.frombuffer(kept, np.float32).reshape(self._shape)
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            values[part] = self._compute(unique[part])
            for place in part:
                self._store.write(int(unique[place]), self._inputs, values[place].tobytes())
        return torch.from_numpy(values[places.reshape(rows.shape)]).to(self._device)

    @torch.no_grad()
    def _compute(self, rows: IntArray) -> npt.NDArray[np.float32]:
        padded = np.concatenate([rows, np.repeat(rows[-1:], BATCH - len(rows))])
        values: Tensor = self._fixed(gather(self._inputs, padded, self._device))
        return np.asarray(values[: len(rows)].float().cpu().numpy())


class ValueStore:
    """Values of one size by row, in a file of a folder, or a temporary one.

    Each is kept with a hash of its image and itself, so that a damaged one, or that of another
    image, is never returned.

    Args:
        size: bytes of a value.
        folder: for the file; its oldest files are removed where all together are above LIMIT. None
            for a file that goes with the process.
        name: of the file.
    """

    def __init__(self, size: int, folder: Path | None, name: str) -> None:
        self._size = size
        self._file = _open(folder, name)
        self._checked: set[int] = set()
        self._free = LIMIT - _used(os.fstat(self._file.fileno()))

    def read(self, row: int, inputs: Inputs) -> bytes | None:
        """Return the value of a row, or None where none is kept."""
        self._file.seek(row * (DIGEST + self._size))
        record = self._file.read(DIGEST + self._size)
        digest, value = record[:DIGEST], record[DIGEST:]
        if len(value) < self._size:
            return None
        if row not in self._checked and digest != _digest(inputs, row, value):
            return None
        self._checked.add(row)
        return value

    def write(self, row: int, inputs: Inputs, value: bytes) -> None:
        """Keep the value of a row, if there is room."""
        record = _digest(inputs, row, value) + value
        if self._free < len(record):
            return
        try:
            self._file.seek(row * len(record))
            self._file.write(record)
            self._free -= len(record)
        except OSError as error:  # the disk is full
            log.warning("cannot keep the values of the fixed part: %s", error)
            self._free = 0
        if self._free < len(record):
            log.warning(
                "the fixed part runs again each time for images beyond %d GB of kept values",
                LIMIT // 10**9,
            )


def _digest(inputs: Inputs, row: int, value: bytes) -> bytes:
    digest = hashlib.blake2b(np.asarray(inputs[row]).tobytes(), digest_size=DIGEST)
    digest.update(value)
    return digest.digest()


def _size(shape: tuple[int, ...]) -> int:
    return np.dtype(np.float32).itemsize * math.prod(shape)


def _folder(inputs: Inputs) -> Path | None:
    """Return a folder beside the prepared data, which must stay as it is; None for other inputs."""
    filename = getattr(inputs, "filename", None)
    if filename is None:
        return None
    prepared = Path(filename).resolve().parent
    if prepared.parent.name == CROSS_DOMAIN_FOLDER:
        prepared = prepared.parent.parent
    return prepared.with_name(f"{prepared.name}.fixed")


def _open(folder: Path | None, name: str) -> IO[bytes]:
    """Open or make a file, and remove those that are beyond LIMIT."""
    if folder is not None:
        try:
            folder.mkdir(exist_ok=True)
            path = folder / name
            path.touch()  # now the last that goes
            _remove_oldest(folder, path)
            return path.open("r+b", buffering=0)
        except OSError as error:
            log.info("the values of the fixed part are kept in a temporary file: %s", error)
    return tempfile.TemporaryFile(buffering=0)


def _remove_oldest(folder: Path, keep: Path) -> None:
    files = [(path.stat().st_mtime, path) for path in folder.iterdir() if path != keep]
    room = LIMIT - _used(keep.stat())
    for _, path in sorted(files, reverse=True):
        room -= _used(path.stat())
        if room < 0:
            path.unlink(missing_ok=True)


def _used(stat: os.stat_result) -> int:
    """Return the bytes on disk, which are fewer than a file's length where rows are left out."""
    return 512 * stat.st_blocks if hasattr(stat, "st_blocks") else stat.st_size


def _key(cut: Cut, inputs: Inputs, device: torch.device) -> str:
    """Return a name that changes with the fixed part's code and weights, and with the data's."""
    parts = list(cut.fixed.modules())
    code = [part.code for part in parts if isinstance(part, fx.GraphModule)]
    sources = {_source(type(part)) for part in parts}
    text = [str(cut.fixed), *code, *sorted(sources), str(inputs.shape), torch.__version__]
    digest = hashlib.sha256("\0".join([*text, device.type]).encode())
    tensors = [*cut.fixed.named_parameters(), *cut.fixed.named_buffers()]
    for name, value in tensors:
        digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update(np.asarray(inputs[:1]).tobytes() + np.asarray(inputs[-1:]).tobytes())
    return f"{digest.hexdigest()[:32]}.values"


def _source(part: type) -> str:
    """Return the source of a module's class; torch's is known by its version."""
    if part.__module__.partition(".")[0] in {"torch", "torchvision"}:
        return part.__qualname__
    try:
        return Path(inspect.getfile(part)).read_text(encoding="utf-8")
    except (TypeError, OSError):  # made while the program runs
        return part.__qualname__
