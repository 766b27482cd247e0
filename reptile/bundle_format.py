"""The form of a bundle: manifest.json and golden/golden.json, written and read in one place.

JSON Schemas of both, for other languages, are in reptile/schemas. Standard library only, as
consumers without any other package read bundles too. Not for files and hashes: see
`runtime.bundle`.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from reptile.errors import InputError

FORMAT = 4
READABLE = (1, 2, 3, 4)
"""Format 4 has `task.columns`: its graphs take the raw rows of a table, and give raw values. A
bundle without them is written in format 3, which earlier consumers read too. Formats 1 and 2 have
no `learner`: it is `gradient`. Format 1 differs in what `metrics` holds, which no consumer needs.
"""
KINDS = ("classification", "regression")  # the first where the manifest does not say
GRAPHS = {
    "gradient": ("predict", "adapt", "predict_adapted", "few_shot"),
    "closed_form": ("embed", "fit", "adapt", "predict_adapted", "few_shot"),
}
"""The graphs of a bundle, by how it learns.

`adapt`, `predict_adapted` and `few_shot` are the contract of both. `predict` is the network before
adaptation, which a closed-form learner has none of: without examples it has no head.
"""
MANIFEST_FILE = "manifest.json"
CARD_FILE = "MODEL_CARD.md"
GOLDEN_FOLDER = "golden"
GOLDEN_FILE = "golden.json"
MAX_LEARNING_RATE = 100.0  # as in training's settings; far beyond anything that converges
MAX_FILE_BYTES = 1 << 30  # protobuf's limit is 2 GiB
MAX_ATOL = 1e30  # of values in the units of a table's column
COLUMN_KINDS = ("number", "date", "category")

_LAYOUT, _PIXEL_RANGE, _DTYPE, _RAW_DTYPE = "NCHW", [0, 255], "float32", "float64"


def graph_path(name: str) -> str:
    """Return where a graph lies in the bundle: the layout of a Triton model repository."""
    return f"{name}/1/model.onnx"


def bundle_folders(algorithms: Mapping[str, str]) -> dict[str, str]:
    """Return the folder of each learner's bundle, where there are several, by its method.

    It is called after the learner's algorithm, or, if another has that already, after the method.
    """
    folders: dict[str, str] = {}
    for method, algorithm in algorithms.items():
        folders[method] = method if algorithm in folders.values() else algorithm
    return folders


Shape = tuple[int | None, ...]  # None stands for a size that may vary


class TensorType(NamedTuple):
    """What a graph's input or output looks like."""

    dtype: str
    shape: Shape

    @classmethod
    def of(cls, dtype: str, shape: Sequence[Any]) -> "TensorType":
        """Read a shape whose free sizes have names."""
        return cls(dtype, tuple(n if isinstance(n, int) else None for n in shape))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if n is None else str(n) for n in self.shape)}]"


class Column(NamedTuple):
    """A column of the table whose raw rows a bundle takes, or of the values that it predicts."""

    name: str
    kind: str
    """number; date: seconds since 1970-01-01 UTC; or category: its place in `categories`."""
    categories: tuple[str, ...]
    """Empty of a number or date. Any number that is no place in it stands for all others."""


class Graph(NamedTuple):
    """One graph of the manifest: its file and its tensors by name."""

    path: str
    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says, understood."""

    raw: dict[str, Any] = field(repr=False)
    kind: str  # classification or regression
    learner: str  # gradient or closed_form
    ways: int  # the most classes of a task; of a regressor 1
    outputs: int  # of the head: ways, or the values predicted for each input
    image_shape: tuple[int, ...]  # channels, height, width of an image
    pixels: bool  # whether inputs are images of pixels 0..255, or any numbers
    columns: tuple[Column, ...]  # of the table whose raw rows [N, columns] are inputs; else none
    targets: tuple[Column, ...]  # the columns of its values; none of a classifier
    steps: int  # this and the next four are 0 of a closed-form learner, which has no inner loop
    learning_rate: float
    batch: int
    replacement: bool
    max_steps: int
    max_support: int
    features: int  # of one image, of a closed-form learner; else 0
    graphs: dict[str, Graph] = field(repr=False)
    weights: dict[str, Shape] = field(repr=False)  # what adapt hands to predict_adapted
    files: dict[str, str] = field(repr=False)  # SHA-256 of each file but manifest.json

    @property
    def input_dtype(self) -> str:
        """The type of the graphs' inputs, and of a regressor's values: float64 of raw rows."""
        return _RAW_DTYPE if self.columns else _DTYPE


class GoldenCase(NamedTuple):
    """A graph's inputs and outputs, as paths below the golden folder, and their tolerance."""

    graph: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    atol: float
    rtol: float


def manifest_json(
    *,
    name: str,
    created_by: str,
    kind: str,
    learner: Mapping[str, Any],
    outputs: int,
    image_shape: Sequence[int],
    pixels: bool,
    columns: Mapping[str, Sequence[Mapping[str, Any]]] | None,
    model: Mapping[str, Any],
    max_support: int,
    graphs: Mapping[str, Mapping[str, list[dict[str, Any]]]],
    metrics: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return manifest.json as plain values, but for the hashes of `files`.

    Args:
        name: the bundle's.
        created_by: program and version.
        kind: classification or regression.
        learner: what `gradient_learner` or `closed_form_learner` returns.
        outputs: of the head; of a closed-form learner, the most classes of a task.
        image_shape: channels, height and width of an input.
        pixels: whether a classifier's inputs are pixels 0..255, or any numbers.
        columns: where inputs are the raw rows of a table, `columns` and `targets`: for each its
            name, its kind, and its mean and deviation in the training split or its categories.
        model: settings of the network.
        max_support: the most images of a support set.
        graphs: for each graph, `inputs` and `outputs` as lists of name, dtype and shape.
        metrics: the evaluation's metrics.json.
        provenance: dataset, hashes and versions.
    """
    head = {"ways": outputs} if kind == "classification" else {"outputs": outputs}
    task: dict[str, Any] = {"kind": kind, **head, "image_shape": list(image_shape)}
    if columns:
        task |= {"image_shape": [len(columns["columns"])], **columns}
    elif len(image_shape) == 3:
        task["layout"] = _LAYOUT
    if kind == "classification" and pixels:
        task["pixel_range"] = _PIXEL_RANGE
    adapted = graphs["predict_adapted"]["inputs"]
    return {
        "format": FORMAT if columns else FORMAT - 1,
        "name": name,
        "created_by": created_by,
        "task": task | {"dtype": _RAW_DTYPE if columns else _DTYPE},
        "model": dict(model),
        **learner,
        "limits": {**learner.get("limits", {}), "max_support": max_support},
        "graphs": {name: {"path": graph_path(name), **graph} for name, graph in graphs.items()},
        "adapted": {each["name"]: each["shape"] for each in adapted if each["name"] != "images"},
        "metrics": metrics,
        "provenance": dict(provenance),
    }


def gradient_learner(
    *,
    optimizer: str,
    learning_rate: float,
    weight_decay: float,
    steps: int,
    batch: int,
    max_steps: int,
) -> dict[str, Any]:
    """Return the manifest's keys of a learner by gradient steps.

    Args:
        optimizer: of the inner loop.
        learning_rate: its default.
        weight_decay: what weights are multiplied by before each step.
        steps: inner steps by default.
        batch: images of a mini-batch by default.
        max_steps: inner steps beyond this many are not taken.
    """
    return {
        "learner": "gradient",
        "inner": {
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "steps": steps,
            "batch": batch,
            "replacement": False,
        },
        "limits": {"max_steps": max_steps},
    }


def closed_form_learner(head: str) -> dict[str, Any]:
    """Return the manifest's keys of a closed-form learner, with the name of its head."""
    return {"learner": "closed_form", "head": head}


def parse_manifest(content: bytes | str, where: str) -> Manifest:
    """Read manifest.json, of any format that can be read.

    Raises:
        InputError: not strict JSON, another format, or values that do not belong there.
    """
    manifest = parse_json(content, where)
    version = _get(manifest, "format", int, where)
    if version not in READABLE:
        raise InputError(
            f"{where}: format {version} is not a format this version reads (1 to {FORMAT}): "
            "update reptile-fewshot or export the bundle again"
        )
    kind = str(_get(manifest, "task", dict, where).get("kind", KINDS[0]))
    if kind not in KINDS:
        raise InputError(f"{where}: task.kind must be {' or '.join(KINDS)}, got {kind!r}")
    shape = _get(manifest, "task.image_shape", list, where)
    pixels = kind == "classification" and "pixel_range" in manifest["task"]
    if not shape or not all(type(n) is int and n > 0 for n in shape):
        raise InputError(f"{where}: task.image_shape must be sizes such as [1, 28, 28]")
    if pixels and len(shape) != 3:
        raise InputError(f"{where}: task.image_shape must be [channels, height, width] of images")
    columns = _columns(manifest, "columns", where) if version >= 4 else ()
    targets = _columns(manifest, "targets", where) if version >= 4 else ()
    if columns and shape != [len(columns)]:
        raise InputError(
            f"{where}: task.image_shape must be the number of task.columns, [{len(columns)}]"
        )
    number = _RAW_DTYPE if columns else _DTYPE
    fixed: dict[str, Any] = {"dtype": number}
    if len(shape) == 3:
        fixed["layout"] = _LAYOUT
    if pixels:
        fixed["pixel_range"] = _PIXEL_RANGE
    for key, value in fixed.items():
        if _get(manifest, f"task.{key}", type(value), where) != value:
            raise InputError(f"{where}: task.{key} must be {value!r}")
    learner = _get(manifest, "learner", str, where) if version >= 3 else "gradient"
    if learner not in GRAPHS:
        raise InputError(f"{where}: learner must be {' or '.join(GRAPHS)}, got {learner!r}")
    if kind == "classification":
        outputs = ways = _whole(manifest, "task.ways", where, low=2)
    else:
        outputs, ways = _whole(manifest, "task.outputs", where), 1
    if columns and len(targets) != (outputs if kind == "regression" else 0):
        raise InputError(
            f"{where}: task.targets must hold a column for each value, none of a classifier"
        )
    graphs = {name: _graph(manifest, name, where) for name in _get(manifest, "graphs", dict, where)}
    if learner == "gradient":
        features, weights = 0, _check_gradient(graphs, kind, outputs, shape, number, where)
    else:
        features, weights = _check_closed_form(graphs, kind, outputs, shape, number, where)
    adapted = _get(manifest, "adapted", dict, where)
    if not all(isinstance(size, list) for size in adapted.values()) or weights != {
        name: TensorType.of(_DTYPE, size).shape for name, size in adapted.items()
    }:
        raise InputError(
            f"{where}: adapted must hold the shapes of predict_adapted's inputs but images: "
            f"{weights}; export the bundle again"
        )
    files = _get(manifest, "files", dict, where)
    if not all(isinstance(digest, str) for digest in files.values()):
        raise InputError(f"{where}: files must map paths to SHA-256 sums")
    return Manifest(
        raw=manifest,
        kind=kind,
        learner=learner,
        ways=ways,
        outputs=outputs,
        image_shape=tuple(shape),
        pixels=pixels,
        columns=columns,
        targets=targets,
        **_inner_loop(manifest, learner, where),
        features=features,
        max_support=_whole(manifest, "limits.max_support", where),
        graphs=graphs,
        weights=weights,
        files=files,
    )


def golden_json(cases: Sequence[GoldenCase]) -> dict[str, Any]:
    """Return golden.json as plain values."""
    return {"cases": [case._asdict() for case in cases]}


def parse_golden(content: bytes | str, where: str) -> list[GoldenCase]:
    """Read golden.json.

    Raises:
        InputError: no cases, or values that do not belong there.
    """
    values = parse_json(content, where)
    cases = _get(values, "cases", list, where)
    if not cases:
        raise InputError(f"{where} has no cases; export the bundle again")
    again = f"{where} cannot be used: a case"
    found = []
    for case in cases:
        paths = [_get(case, key, dict, again) for key in ("inputs", "outputs")]
        if not all(isinstance(path, str) for each in paths for path in each.values()):
            raise InputError(f"{again}: inputs and outputs must map names to paths")
        if not paths[1]:
            raise InputError(f"{again} has no outputs; export the bundle again")
        tolerance = [_get(case, key, (int, float), again) for key in ("atol", "rtol")]
        if not 0 <= tolerance[0] <= MAX_ATOL or not 0 <= tolerance[1] <= 1:
            raise InputError(
                f"{again}: atol must lie in 0..{MAX_ATOL:g} and rtol in 0..1, got {tolerance}"
            )
        found.append(GoldenCase(_get(case, "graph", str, again), *paths, *tolerance))
    return found


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


def _columns(manifest: Any, key: str, where: str) -> tuple[Column, ...]:
    found = []
    for place, entry in enumerate(_get(manifest, f"task.{key}", list, where)):
        here = f"{where}: task.{key}: column {place}"
        kind = _get(entry, "kind", str, here)
        allowed = COLUMN_KINDS if key == "columns" else COLUMN_KINDS[:2]
        if kind not in allowed:
            raise InputError(f"{here}: kind must be {' or '.join(allowed)}, got {kind!r}")
        categories = _get(entry, "categories", list, here) if kind == "category" else []
        if not all(isinstance(each, str) for each in categories):
            raise InputError(f"{here}: categories must be names")
        found.append(Column(_get(entry, "name", str, here), kind, tuple(categories)))
    if key == "columns" and not found:
        raise InputError(f"{where}: task.columns must hold a column")
    return tuple(found)


def _graph(manifest: Any, name: str, where: str) -> Graph:
    if "." in name:
        raise InputError(f"{where}: a graph's name has no dots, got {name!r}")

    def tensors(kind: str) -> dict[str, TensorType]:
        entries = _get(manifest, f"graphs.{name}.{kind}", list, where)
        found = [
            (
                _get(entry, "name", str, where),
                TensorType.of(_get(entry, "dtype", str, where), _get(entry, "shape", list, where)),
            )
            for entry in entries
        ]
        return dict(found)

    return Graph(
        _get(manifest, f"graphs.{name}.path", str, where), tensors("inputs"), tensors("outputs")
    )


def _inner_loop(manifest: Any, learner: str, where: str) -> dict[str, Any]:
    """Read the defaults of the inner loop, which a closed-form learner has none of."""
    if learner != "gradient":
        return {"steps": 0, "learning_rate": 0.0, "batch": 0, "replacement": False, "max_steps": 0}
    rate = _get(manifest, "inner.learning_rate", (int, float), where)
    if not 0 < rate <= MAX_LEARNING_RATE:
        raise InputError(f"{where}: inner.learning_rate must be above 0, got {rate}")
    max_steps = _whole(manifest, "limits.max_steps", where)
    return {
        "steps": _whole(manifest, "inner.steps", where, low=0, high=max_steps),
        "learning_rate": float(rate),
        "batch": _whole(manifest, "inner.batch", where),
        "replacement": _get(manifest, "inner.replacement", bool, where),
        "max_steps": max_steps,
    }


def _check_gradient(
    graphs: dict[str, Graph],
    kind: str,
    outputs: int,
    image_shape: list[int],
    number: str,
    where: str,
) -> dict[str, Shape]:
    """Hold the two graphs that the runtime runs to the format; return what passes between them."""
    images = TensorType(number, (None, *image_shape))
    support = {
        "support_images": images,
        "support_labels": (
            TensorType("int64", (None,))
            if kind == "classification"
            else TensorType(number, (None, outputs))
        ),
        "batches": TensorType("int64", (None, None)),
        "learning_rate": TensorType("float32", ()),
    }
    trace = {"losses": TensorType("float32", (None,)), "finite": TensorType("bool", ())}
    answer = number if kind == "regression" else "float32"
    logits = {"logits": TensorType(answer, (None, outputs))}
    inputs = graphs["predict_adapted"].inputs if "predict_adapted" in graphs else {}
    weights = {name: tensor for name, tensor in inputs.items() if name != "images"}
    _check_tensors(
        graphs,
        {
            "adapt": (support, {**trace, **weights}),
            "predict_adapted": ({"images": images, **weights}, logits),
        },
        where,
    )
    if any(dtype != "float32" or None in shape for dtype, shape in weights.values()):
        raise InputError(
            f"{where}: adapted weights must be float32 of fixed shapes, got {show_tensors(weights)}"
        )
    return {name: tensor.shape for name, tensor in weights.items()}


def _check_closed_form(
    graphs: dict[str, Graph],
    kind: str,
    outputs: int,
    image_shape: list[int],
    number: str,
    where: str,
) -> tuple[int, dict[str, Shape]]:
    """Hold the graphs that clients run to the format; return D and what passes between them."""
    found = graphs["embed"].outputs.get("features") if "embed" in graphs else None
    size = found.shape[1] if found and len(found.shape) == 2 else 0
    images = TensorType(number, (None, *image_shape))
    features = {"features": TensorType("float32", (None, size))}
    if kind == "classification":
        labels = {"support_labels": TensorType("int64", (None,))}
        weights = {
            "head.weight": TensorType("float32", (None, size)),
            "head.bias": TensorType("float32", (None,)),
        }
        answers = {"logits": TensorType("float32", (None, None))}
    else:
        one_more = (size or 0) + 1  # of the constant
        labels = {"support_labels": TensorType(number, (None, outputs))}
        weights = {
            "head.mean": TensorType("float32", (one_more, outputs)),
            "head.covariance": TensorType("float32", (one_more, one_more)),
        }
        answers = {name: TensorType(number, (None, outputs)) for name in ("logits", "variance")}
    finite = {"finite": TensorType("bool", ())}
    _check_tensors(
        graphs,
        {
            "embed": ({"images": images}, features),
            "fit": ({**features, **labels}, {**weights, **finite}),
            "adapt": ({"support_images": images, **labels}, {**features, **weights, **finite}),
            "predict_adapted": ({"images": images, **weights}, answers),
        },
        where,
    )
    if not size:
        raise InputError(f"{where}: graphs.embed.outputs must have a fixed number of features")
    return size, {name: tensor.shape for name, tensor in weights.items()}


def _check_tensors(
    graphs: dict[str, Graph],
    needed: dict[str, tuple[dict[str, TensorType], dict[str, TensorType]]],
    where: str,
) -> None:
    for name, wanted in needed.items():
        if name not in graphs:
            raise InputError(f"{where}: the graph {name!r} is missing from graphs")
        for part, found, want in zip(("inputs", "outputs"), graphs[name][1:], wanted, strict=True):
            if found != want:
                raise InputError(
                    f"{where}: graphs.{name}.{part} must be {show_tensors(want)}, got "
                    f"{show_tensors(found)}"
                )


def show_tensors(tensors: dict[str, TensorType]) -> str:
    """Return tensors by name, for messages."""
    return ", ".join(f"{name}: {tensor}" for name, tensor in tensors.items()) or "none"
