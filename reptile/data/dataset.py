"""The prepared dataset: one memory-mapped array of inputs, and the table of its classes.

The inputs are images, or the points of functions with the values there. Every later stage reads
this; `prepare` makes it.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reptile.data.coding import Coding
from reptile.errors import InputError
from reptile.minibatches import IntArray
from reptile.settings import describe

UInt8Array = npt.NDArray[np.uint8]
Inputs = UInt8Array | npt.NDArray[np.float32]
"""Examples [N, ...]: images [N, C, H, W] of pixels 0..255 (uint8), or any numbers (float32)."""
Values = npt.NDArray[np.float32]
Split = Literal["train", "validation", "test"]

IMAGES_FILE = "images.npy"
TARGETS_FILE = "targets.npy"
INDEX_FILE = "dataset.json"
CROSS_DOMAIN_FOLDER = "cross_domain"
HASH_BLOCK = 2**24  # bytes


class ClassRange(NamedTuple):
    """Where the images of some classes lie: rows starts[k] to starts[k] + counts[k]."""

    starts: IntArray  # [K]
    counts: IntArray  # [K]
    targets: Values | None = None  # [N, outputs] of all rows, where a task is to predict them
    ordered: bool = False  # the rows of a class are in the order of time


class PreparedClass(BaseModel):
    """One class: its name, its group (`""` where there are none), its split and its rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    group: str
    split: Split
    rotation: Literal[0, 90, 180, 270]
    start: Annotated[int, Field(ge=0)]
    count: Annotated[int, Field(ge=1)]


class DatasetIndex(BaseModel):
    """What dataset.json says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: str
    image_shape: Annotated[tuple[int, ...], Field(min_length=1)]
    classes: tuple[PreparedClass, ...]
    content_sha256: str
    splits_sha256: str
    settings: dict[str, object]
    dtype: Literal["uint8", "float32"] = "uint8"
    """Of the inputs: pixels, or any numbers. In older data those with values are float32 too."""
    values: Annotated[int, Field(ge=0)] = 0
    """How many values there are to predict for each input; 0 for classes, and in older data."""
    coding: Coding | None = None
    """What was done to a table's columns; the scores of all stages are of the coded targets."""
    ordered: bool = False
    """Whether the rows of each class are in the order of time."""


@dataclass(frozen=True)
class PreparedData:
    """A prepared dataset in use."""

    images: Inputs  # [N, *image_shape], read-only, memory-mapped if it comes from a folder
    index: DatasetIndex
    targets: Values | None = None  # [N, outputs], likewise: what a regressor is to predict

    @property
    def name(self) -> str:
        """The dataset's name, from its source."""
        return self.index.name

    @property
    def classes(self) -> tuple[PreparedClass, ...]:
        """All classes, in the order of their rows."""
        return self.index.classes

    @property
    def content_sha256(self) -> str:
        """Hash of the pixels (or points and values) and of the class table."""
        return self.index.content_sha256

    @property
    def splits_sha256(self) -> str:
        """Hash of which class is in which split."""
        return self.index.splits_sha256

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one example: channels, height and width of an image."""
        return self.index.image_shape

    @property
    def values(self) -> int:
        """How many values there are to predict for each input; 0 where classes are to be named."""
        return 0 if self.targets is None else self.targets.shape[1]

    def split(self, name: Split) -> ClassRange:
        """Return the rows of the classes of one split."""
        rows = [(c.start, c.count) for c in self.classes if c.split == name]
        table = np.array(rows, dtype=np.int64).reshape(-1, 2)
        return ClassRange(table[:, 0], table[:, 1], self.targets, self.index.ordered)


def content_header(shape: tuple[int, ...], classes: Iterable[PreparedClass]) -> bytes:
    """What is hashed before the pixels: the array's shape and the classes, but not their splits."""
    table = [(c.name, c.group, c.rotation, c.start, c.count) for c in classes]
    return json.dumps([shape, table]).encode()


def content_digest(
    inputs: Inputs,
    classes: Iterable[PreparedClass],
    targets: Values | None = None,
    where: str = "",
    rows: IntArray | None = None,
) -> str:
    """Hash inputs, the values to predict, and which rows are whose; 64 hexadecimal digits.

    In errors, `where` precedes the name of an array, and `rows` are what its rows [N] were before.

    Raises:
        InputError: a number is not finite.
    """
    digest = hashlib.sha256(content_header(inputs.shape, classes))
    for what, array in (("inputs", inputs), ("targets", targets)):
        if array is None:
            continue
        step = max(1, HASH_BLOCK // max(1, array[0].nbytes))
        for start in range(0, len(array), step):
            block = np.ascontiguousarray(array[start : start + step])
            if block.dtype.kind == "f" and not np.isfinite(block).all():
                bad = start + int(
                    np.flatnonzero(~np.isfinite(block).reshape(len(block), -1).all(1))[0]
                )
                row = bad if rows is None else rows[bad]
                raise InputError(
                    f"{where}{what}: row {row} has numbers that are not finite in float32; leave "
                    "it out"
                )
            digest.update(block.data)
    return digest.hexdigest()


def splits_digest(classes: Iterable[PreparedClass]) -> str:
    """Hash which class, turned how, is in which split; 64 hexadecimal digits."""
    table = [(c.name, c.split, c.rotation) for c in classes]
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()


def load_prepared(folder: Path) -> PreparedData:
    """Open a prepared dataset without reading its images into memory.

    Raises:
        InputError: it is missing or damaged.
    """
    again = "run `reptile prepare` again"
    try:
        values = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        index = DatasetIndex.model_validate(values)
        images = open_memmap(folder / IMAGES_FILE, mode="r")
        path = folder / TARGETS_FILE
        targets = open_memmap(path, mode="r") if path.exists() else None
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file; run `reptile prepare` first") from None
    except ValidationError as error:
        raise InputError(f"{folder / INDEX_FILE}: {describe(error)[0]}; {again}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: damaged ({error}); {again}") from None
    if targets is None and index.values:
        raise InputError(f"{path}: no such file; {again}")
    expected = np.dtype(index.dtype if targets is None else np.float32)
    if images.dtype != expected or images.shape[1:] != index.image_shape:
        shape = ", ".join(map(str, ("N", *index.image_shape)))
        raise InputError(
            f"{folder / IMAGES_FILE}: {images.dtype} of shape {images.shape}, expected {expected} "
            f"of shape ({shape}); {again}"
        )
    if targets is not None and (
        targets.dtype != np.float32 or targets.ndim != 2 or len(targets) != len(images)
    ):
        raise InputError(
            f"{path}: {targets.dtype} of shape {targets.shape}, expected float32 of shape "
            f"({len(images)}, outputs); {again}"
        )
    end = 0
    for entry in index.classes:
        if entry.start != end:
            raise InputError(f"{folder / INDEX_FILE}: class {entry.name} is out of place; {again}")
        end += entry.count
    if end != len(images):
        raise InputError(
            f"{folder / IMAGES_FILE}: {len(images)} images, the classes have {end}; {again}"
        )
    if splits_digest(index.classes) != index.splits_sha256:
        raise InputError(f"{folder / INDEX_FILE}: the splits were changed by hand; {again}")
    return PreparedData(images, index, targets)


def load_cross_domain(folder: Path) -> dict[str, PreparedData]:
    """Open the cross-domain datasets that were prepared with `folder`, by name."""
    root = folder / CROSS_DOMAIN_FOLDER
    if not root.is_dir():
        return {}
    loaded = (load_prepared(path) for path in sorted(root.iterdir()) if path.is_dir())
    return {data.name: data for data in loaded}
