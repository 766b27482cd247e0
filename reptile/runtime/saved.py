"""One adapted task in one file: the safetensors format, which is a JSON header and raw numbers.

Not for bundles. Any safetensors reader opens these files. They contain no code, and their
size is limited by the bundle's weights, so an untrusted file can at worst predict badly.
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

FORMAT = "reptile-adapted/1"
_MAX_HEADER_BYTES = 1 << 20

FloatArray = npt.NDArray[np.float32]


class AdaptedState(NamedTuple):
    """The result of an adaptation."""

    labels: tuple[Hashable, ...]  # the name of each head output in use; none of a regressor
    losses: FloatArray  # [steps]
    weights: Mapping[str, FloatArray]


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
    tensors = {**state.weights, "losses": state.losses}
    layout = _layout({name: tensor.shape for name, tensor in tensors.items()})
    header = json.dumps({"__metadata__": metadata, **layout}).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the numbers to 8 bytes
    if len(header) > _MAX_HEADER_BYTES:
        raise InputError(f"labels of more than {_MAX_HEADER_BYTES} bytes cannot be saved: shorten")
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for tensor in tensors.values():
                file.write(tensor.astype("<f4", copy=False).tobytes())
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
            body = file.read(4 * (_numbers(bundle) + bundle.max_steps) + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InputError(f"{path} is not a file that AdaptedModel.save wrote (format {FORMAT})")
    if metadata.get("bundle_sha256") != bundle.sha256:
        raise InputError(
            f"{path} was adapted from another bundle than {bundle.folder} "
            "(the hash of its manifest differs): load it with that bundle, or adapt again"
        )
    return AdaptedState(
        _labels(str(metadata.get("labels")), bundle, path),
        *_tensors(header, body, bundle, path),
    )


def _numbers(bundle: Bundle) -> int:
    return sum(math.prod(shape) for shape in bundle.weights.values())


def _layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    layout, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        layout[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    return layout


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


def _tensors(
    header: Any, body: bytes, bundle: Bundle, path: Path
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Split the body by this bundle's shapes; the header must agree."""
    steps = len(body) // 4 - _numbers(bundle)
    shapes = {**bundle.weights, "losses": (steps,)}
    if len(body) % 4 or not 0 <= steps <= bundle.max_steps or header != _layout(shapes):
        raise InputError(
            f"{path} is damaged: its tensors are not those of this bundle; save it again"
        )
    values = np.frombuffer(body, "<f4").astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise InputError(f"{path} is damaged: it holds NaN or infinite numbers; save it again")
    tensors, start = {}, 0
    for name, shape in shapes.items():
        tensors[name] = values[start : (start := start + math.prod(shape))].reshape(shape)
    return tensors.pop("losses"), tensors
