"""One adapted task in one file: the safetensors format, which is a JSON header and raw numbers.

Not for bundles. Any safetensors reader opens these files. They contain no code, and their
size is limited by the bundle's limits, so an untrusted file can at worst predict badly.
"""

import json
import math
import struct
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reptile.bundle_format import parse_json
from reptile.errors import InputError
from reptile.files import atomic_file
from reptile.runtime.bundle import Bundle

FORMAT = "reptile-adapted/1.2"
READABLE = (
    "reptile-adapted/1",
    "reptile-adapted/1.1",  # with the features of a closed-form classifier's examples
    FORMAT,  # a regressor's too
)
_MAX_HEADER_BYTES = 1 << 20

FloatArray = npt.NDArray[np.float32]
Values = npt.NDArray[np.floating[Any]]
"""A regressor's values: float32, or float64 in the units of a table's columns."""
IntArray = npt.NDArray[np.int64]


class Examples(NamedTuple):
    """What a closed-form learner keeps of a support set, so that classes can come and go."""

    features: FloatArray  # [S, D]
    targets: IntArray | Values  # [S], places among the task's labels; or values [S, outputs]


class AdaptedState(NamedTuple):
    """The result of an adaptation."""

    labels: tuple[Hashable, ...]  # the name of each head output in use; none of a regressor
    losses: FloatArray  # [steps]
    weights: Mapping[str, FloatArray]
    examples: Examples | None = None  # of a closed-form learner

    @property
    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """All of its arrays, by the names and in the order that they have in a file."""
        examples = self.examples._asdict() if self.examples else {}
        return {**examples, **self.weights, "losses": self.losses}


def write_adapted(path: Path, state: AdaptedState, bundle: Bundle) -> None:
    """Write the file in one step, bound to its bundle by the manifest's hash.

    Raises:
        InputError: a label that JSON cannot hold, so that loading would change it.
    """
    for label in state.labels:
        if not isinstance(label, str | int | float):
            raise InputError(
                f"only labels that are str, int, float or bool can be saved, got {label!r}: "
                "adapt with names of these types"
            )
    try:
        labels = json.dumps(state.labels, allow_nan=False)
    except ValueError as error:
        raise InputError(f"labels cannot be saved as JSON: {error}") from error
    metadata = {"format": FORMAT, "bundle_sha256": bundle.sha256, "labels": labels}
    tensors = state.tensors
    layout = _layout({name: tensor.shape for name, tensor in tensors.items()}, bundle)
    header = json.dumps({"__metadata__": metadata, **layout}).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the numbers to 8 bytes
    if len(header) > _MAX_HEADER_BYTES:
        raise InputError(f"labels of more than {_MAX_HEADER_BYTES} bytes cannot be saved: shorten")
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for name, tensor in tensors.items():
                file.write(tensor.astype(_dtype(name, bundle), copy=False).tobytes())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def read_adapted(path: Path, bundle: Bundle) -> AdaptedState:
    """Read a file that `write_adapted` wrote for this bundle.

    Raises:
        InputError: missing, damaged, of another bundle, or anything that does not fit.
    """
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > _MAX_HEADER_BYTES:
                raise InputError(f"{path} is not a file that AdaptedModel.save wrote")
            header = parse_json(file.read(header_size), f"the header of {path}")
            labels = _read_metadata(header, bundle, path)
            shapes = _shapes(header, len(labels), bundle)
            if header != _layout(shapes, bundle):
                raise _damaged(path, "its tensors are not those of this bundle")
            size = sum(_bytes(name, shape, bundle) for name, shape in shapes.items())
            body = file.read(size + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len(body) != size:
        raise _damaged(path, "its tensors are not those of this bundle")
    tensors, start = {}, 0
    for name, shape in shapes.items():
        end = start + _bytes(name, shape, bundle)
        tensors[name] = np.frombuffer(body[start:end], _dtype(name, bundle)).reshape(shape)
        start = end
    if not all(np.isfinite(values).all() for values in tensors.values()):
        raise _damaged(path, "it holds NaN or infinite numbers")
    losses = tensors.pop("losses")
    if "features" not in tensors:
        return AdaptedState(labels, losses, tensors)
    examples = Examples(tensors.pop("features"), tensors.pop("targets"))
    names = bundle.kind == "classification"
    if names and set(examples.targets.tolist()) != set(range(len(labels))):
        raise _damaged(path, "its examples are not of its labels")
    return AdaptedState(labels, losses, tensors, examples)


def _read_metadata(header: Any, bundle: Bundle, path: Path) -> tuple[Hashable, ...]:
    """Take the metadata out of the header, check it, and return the labels."""
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") not in READABLE:
        raise InputError(
            f"{path} is not a file that AdaptedModel.save wrote (format {' or '.join(READABLE)})"
        )
    if metadata.get("bundle_sha256") != bundle.sha256:
        raise InputError(
            f"{path} was adapted from another bundle than {bundle.folder} "
            "(the hash of its manifest differs): load it with that bundle, or adapt again"
        )
    return _labels(str(metadata.get("labels")), bundle, path)


def _shapes(header: Any, ways: int, bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a task's tensors have, by the one size that the header decides."""
    weights = {
        name: tuple(ways if size is None else size for size in shape)
        for name, shape in bundle.weights.items()
    }
    if bundle.learner != "closed_form":
        return {**weights, "losses": (_length(header, "losses", bundle.max_steps),)}
    if bundle.kind == "regression" and "features" not in header:  # of an earlier version
        return {**weights, "losses": (0,)}
    size = _length(header, "targets", bundle.max_support)
    targets = (size,) if bundle.kind == "classification" else (size, bundle.outputs)
    return {"features": (size, bundle.features), "targets": targets, **weights, "losses": (0,)}


def _length(header: Any, name: str, most: int) -> int:
    """Return the first size of an array, or 0 for what cannot be one."""
    entry = header.get(name)
    shape = entry.get("shape") if isinstance(entry, dict) else None
    size = shape[0] if isinstance(shape, list) and shape else None
    return size if type(size) is int and 0 <= size <= most else 0


def _layout(shapes: Mapping[str, tuple[int, ...]], bundle: Bundle) -> dict[str, Any]:
    layout, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + _bytes(name, shape, bundle)
        dtype = {"<i8": "I64", "<f8": "F64", "<f4": "F32"}[_dtype(name, bundle)]
        layout[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return layout


def _dtype(name: str, bundle: Bundle) -> str:
    if name != "targets":
        return "<f4"
    if bundle.kind == "classification":
        return "<i8"
    return "<f8" if bundle.columns else "<f4"


def _bytes(name: str, shape: tuple[int, ...], bundle: Bundle) -> int:
    return math.prod(shape) * np.dtype(_dtype(name, bundle)).itemsize


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged: {reason}; save it again")


def _labels(content: str, bundle: Bundle, path: Path) -> tuple[Hashable, ...]:
    labels, ways = parse_json(content, f"the labels of {path}"), bundle.ways
    if bundle.kind == "regression" and labels == []:
        return ()
    if (
        not isinstance(labels, list)
        or not all(isinstance(label, str | int | float) for label in labels)
        or not 2 <= len(labels) == len(set(labels)) <= ways
    ):
        raise InputError(
            f"{path}: labels must be a list of 2..{ways} distinct names; save it again"
        )
    return tuple(labels)
