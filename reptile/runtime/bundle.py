"""Reading a bundle: every byte is checked against the manifest before anything uses it.

Not for running graphs (see `model`), nor for proving who made a bundle: the hashes find damage
and mix-ups, while a forger would rewrite the manifest too. Compare `Bundle.sha256` for that.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from reptile.errors import InputError
from reptile.runtime.constants import with_constants
from reptile.runtime.inputs import MAX_LEARNING_RATE
from reptile.runtime.provider import open_session

FORMAT = 1
KINDS = ("classification", "regression")  # the first where the manifest does not say
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_FILE_BYTES = 1 << 30  # protobuf itself ends at 2 GiB
_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}


class TensorType(NamedTuple):
    """What a graph's input or output looks like; None stands for a size that may vary."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if n is None else str(n) for n in self.shape)}]"


class Graph(NamedTuple):
    """One graph of the manifest: its file and its tensors by name."""

    path: str
    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest is understood and whose files all match it."""

    folder: Path
    sha256: str  # of manifest.json, which holds the hash of every other file
    manifest: dict[str, Any] = field(repr=False)
    kind: str  # classification or regression
    ways: int  # the most classes of a task; of a regressor 1
    outputs: int  # of the head: ways, or the values predicted for each input
    image_shape: tuple[int, int, int]  # channels, height, width
    steps: int
    learning_rate: float
    batch: int
    replacement: bool
    max_steps: int
    max_support: int
    graphs: dict[str, Graph] = field(repr=False)
    weights: dict[str, tuple[int, ...]] = field(repr=False)  # shapes: what adapt hands to predict

    def read(self, name: str) -> bytes:
        """Return the content of one listed file, checked against its hash.

        Raises:
            InputError: not listed, missing, outside the bundle, too large or changed.
        """
        digest = self.manifest["files"].get(name)
        if digest is None:
            raise InputError(f"{self.folder}: manifest.json does not list the file {name!r}")
        content = _read(self.folder, name, _MAX_FILE_BYTES)
        if hashlib.sha256(content).hexdigest() != digest:
            raise InputError(
                f"{self.folder / name} does not match its SHA-256 in manifest.json: "
                "the file was damaged or changed; fetch the bundle again"
            )
        return content

    def open(self, graph: str, *, threads: int, providers: Sequence[str] | None) -> Any:
        """Open a session on one graph and hold it to what the manifest says of it.

        Raises:
            InputError: the file, the provider or a tensor's name or type is not as it should be.
        """
        expected = self.graphs[graph]
        session = open_session(
            self.read(expected.path), graph, threads=threads, providers=providers
        )
        for kind, nodes, said in (
            ("inputs", session.get_inputs(), expected.inputs),
            ("outputs", session.get_outputs(), expected.outputs),
        ):
            found = {node.name: _tensor_type(node.type, node.shape) for node in nodes}
            if found != said:
                raise InputError(
                    f"{self.folder / expected.path}: manifest.json and the graph disagree on its "
                    f"{kind}: {_show(said)} against {_show(found)}; export the bundle again"
                )
        return session

    def open_with(
        self,
        graph: str,
        constants: Mapping[str, npt.NDArray[Any]],
        *,
        threads: int,
        providers: Sequence[str] | None,
    ) -> Any:
        """Open a session on one graph with arrays for some of its inputs, as constants.

        Raises:
            InputError: as `open`, or the package onnx is absent.
        """
        content = with_constants(self.read(self.graphs[graph].path), constants)
        return open_session(content, graph, threads=threads, providers=providers)


def open_bundle(folder: Path) -> Bundle:
    """Read manifest.json and check every file it lists; files it does not list are never opened.

    Raises:
        InputError: anything missing, damaged, too large, outside the folder or not understood.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the bundle that `reptile export` wrote")
    content = _read(folder, "manifest.json", _MAX_MANIFEST_BYTES)
    where = str(folder / "manifest.json")
    manifest = parse_json(content, where)
    version = _get(manifest, "format", int, where)
    if version != FORMAT:
        raise InputError(
            f"{where}: format {version} is not the format {FORMAT} this version reads: "
            "update reptile-fewshot or export the bundle again"
        )
    kind = str(_get(manifest, "task", dict, where).get("kind", KINDS[0]))
    if kind not in KINDS:
        raise InputError(f"{where}: task.kind must be {' or '.join(KINDS)}, got {kind!r}")
    fixed: dict[str, Any] = {"layout": "NCHW", "dtype": "float32"}
    if kind == "classification":
        fixed["pixel_range"] = [0, 255]
    for key, value in fixed.items():
        if _get(manifest, f"task.{key}", type(value), where) != value:
            raise InputError(f"{where}: task.{key} must be {value!r}")
    shape = _get(manifest, "task.image_shape", list, where)
    if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise InputError(f"{where}: task.image_shape must be [channels, height, width]")
    rate = _get(manifest, "inner.learning_rate", (int, float), where)
    if not 0 < rate <= MAX_LEARNING_RATE:
        raise InputError(f"{where}: inner.learning_rate must be above 0, got {rate}")
    if kind == "classification":
        outputs = ways = _whole(manifest, "task.ways", where, low=2)
    else:
        outputs, ways = _whole(manifest, "task.outputs", where), 1
    graphs = {name: _graph(manifest, name, where) for name in _get(manifest, "graphs", dict, where)}
    max_steps = _whole(manifest, "limits.max_steps", where)
    bundle = Bundle(
        folder=folder,
        sha256=hashlib.sha256(content).hexdigest(),
        manifest=manifest,
        kind=kind,
        ways=ways,
        outputs=outputs,
        image_shape=(shape[0], shape[1], shape[2]),
        steps=_whole(manifest, "inner.steps", where, low=0, high=max_steps),
        learning_rate=float(rate),
        batch=_whole(manifest, "inner.batch", where),
        replacement=_get(manifest, "inner.replacement", bool, where),
        max_steps=max_steps,
        max_support=_whole(manifest, "limits.max_support", where),
        graphs=graphs,
        weights=_adapted_weights(graphs, kind, outputs, shape, where),
    )
    for name in _get(manifest, "files", dict, where):
        bundle.read(name)
    return bundle


def parse_json(content: bytes | str, where: str) -> Any:
    """Parse strict JSON: UTF-8, no repeated keys, no NaN.

    Raises:
        InputError: anything else, with `where` in front.
    """
    try:
        text = content if isinstance(content, str) else content.decode()
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not strict JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(result := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _read(folder: Path, name: str, limit: int) -> bytes:
    path = folder / name
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name, re.ASCII) or ".." in name.split("/"):
        raise InputError(f"{folder}: {name!r} is not a plain relative path inside the bundle")
    try:
        if not path.is_file():
            raise InputError(f"{path} is missing: the bundle is not complete; fetch it again")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path} links out of the bundle: copy the files themselves (cp -rL)")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise InputError(f"{path} is larger than {limit} bytes, the most this version reads")
    return content


def _get(value: Any, path: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Walk a dotted path and insist on a type; a bool never passes for a number."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(k.__name__ for k in kinds)
        raise InputError(f"{where}: {path} must be {names}, got {reprlib.repr(value)}")
    return value


def _whole(value: Any, path: str, where: str, *, low: int = 1, high: int = 10**6) -> int:
    number: int = _get(value, path, int, where)
    if not low <= number <= high:
        raise InputError(f"{where}: {path} must lie in {low}..{high}, got {number}")
    return number


def _graph(manifest: Any, name: str, where: str) -> Graph:
    if "." in name:
        raise InputError(f"{where}: a graph's name has no dots, got {name!r}")

    def tensors(kind: str) -> dict[str, TensorType]:
        entries = _get(manifest, f"graphs.{name}.{kind}", list, where)
        found = [
            (
                _get(entry, "name", str, where),
                _tensor_type(_get(entry, "dtype", str, where), _get(entry, "shape", list, where)),
            )
            for entry in entries
        ]
        return dict(found)

    return Graph(
        _get(manifest, f"graphs.{name}.path", str, where), tensors("inputs"), tensors("outputs")
    )


def _tensor_type(dtype: str, shape: Sequence[Any]) -> TensorType:
    sizes = tuple(n if isinstance(n, int) else None for n in shape)
    return TensorType(_DTYPES.get(dtype, dtype), sizes)


def _adapted_weights(
    graphs: dict[str, Graph], kind: str, outputs: int, image_shape: list[int], where: str
) -> dict[str, tuple[int, ...]]:
    """Hold the two graphs that the runtime runs to the format; return what passes between them."""
    for name in ("adapt", "predict_adapted"):
        if name not in graphs:
            raise InputError(f"{where}: the graph {name!r} is missing from graphs")
    adapt, predict = graphs["adapt"], graphs["predict_adapted"]
    images = TensorType("float32", (None, *image_shape))
    support = {
        "support_images": images,
        "support_labels": (
            TensorType("int64", (None,))
            if kind == "classification"
            else TensorType("float32", (None, outputs))
        ),
        "batches": TensorType("int64", (None, None)),
        "learning_rate": TensorType("float32", ()),
    }
    trace = {"losses": TensorType("float32", (None,)), "finite": TensorType("bool", ())}
    logits = {"logits": TensorType("float32", (None, outputs))}
    weights = {name: tensor for name, tensor in predict.inputs.items() if name != "images"}
    for title, found, needed in (
        ("adapt.inputs", adapt.inputs, support),
        ("adapt.outputs", adapt.outputs, {**trace, **weights}),
        ("predict_adapted.inputs", predict.inputs, {"images": images, **weights}),
        ("predict_adapted.outputs", predict.outputs, logits),
    ):
        if found != needed:
            raise InputError(f"{where}: graphs.{title} must be {_show(needed)}, got {_show(found)}")
    shapes = {
        name: tuple(n for n in tensor.shape if n is not None) for name, tensor in weights.items()
    }
    if any(len(shapes[name]) < len(tensor.shape) for name, tensor in weights.items()):
        raise InputError(f"{where}: adapted weights need fixed shapes, got {_show(weights)}")
    return shapes


def _show(tensors: dict[str, TensorType]) -> str:
    return ", ".join(f"{name}: {tensor}" for name, tensor in tensors.items()) or "none"
