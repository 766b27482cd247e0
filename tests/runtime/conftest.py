"""A toy bundle: a linear softmax classifier adapted by SGD, small enough to redo in numpy."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from reptile.minibatches import mini_batches
from reptile.runtime import FewShotModel

WAYS, SHAPE, FEATURES = 4, (1, 3, 5), 15
WEIGHTS = {"head.weight": [WAYS, FEATURES], "head.bias": [WAYS]}
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
node = helper.make_node
info = helper.make_tensor_value_info
NAMES = {FLOAT: "float32", INT64: "int64", BOOL: "bool"}


def initial_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {name: rng.normal(0, 0.3, size).astype(np.float32) for name, size in WEIGHTS.items()}


def constant(name: str, value: Any, dtype: type) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, dtype=dtype), name)


def pixels_to_features(images: str) -> list[onnx.NodeProto]:
    return [node("Flatten", [images], ["flat"]), node("Div", ["flat", "c255"], ["x"])]


def adapt_graph() -> onnx.GraphProto:
    body = helper.make_graph(
        [
            node("Gather", ["batches", "i"], ["rows"]),
            node("Gather", ["x", "rows"], ["xb"]),
            node("Gather", ["targets", "rows"], ["yb"]),
            node("Gemm", ["xb", "w", "b"], ["z"], transB=1),
            node("LogSoftmax", ["z"], ["logp"]),
            node("Mul", ["yb", "logp"], ["ylogp"]),
            node("ReduceSum", ["ylogp", "axis1"], ["picked"], keepdims=0),
            node("ReduceMean", ["picked"], ["mean"], keepdims=0),
            node("Neg", ["mean"], ["loss"]),
            node("Exp", ["logp"], ["p"]),
            node("Sub", ["p", "yb"], ["error"]),
            node("Shape", ["rows"], ["count"]),
            node("Cast", ["count"], ["n"], to=FLOAT),
            node("Div", ["learning_rate", "n"], ["rate"]),
            node("Transpose", ["error"], ["errorT"]),
            node("MatMul", ["errorT", "xb"], ["gw"]),
            node("Mul", ["gw", "rate"], ["dw"]),
            node("Sub", ["w", "dw"], ["w_next"]),
            node("ReduceSum", ["error", "axis0"], ["gb"], keepdims=0),
            node("Mul", ["gb", "rate"], ["db"]),
            node("Sub", ["b", "db"], ["b_next"]),
            node("Identity", ["go"], ["go_on"]),
        ],
        "step",
        [
            info("i", INT64, []),
            info("go", BOOL, []),
            info("w", FLOAT, WEIGHTS["head.weight"]),
            info("b", FLOAT, WEIGHTS["head.bias"]),
        ],
        [
            info("go_on", BOOL, []),
            info("w_next", FLOAT, WEIGHTS["head.weight"]),
            info("b_next", FLOAT, WEIGHTS["head.bias"]),
            info("loss", FLOAT, []),
        ],
    )
    nodes = [
        *pixels_to_features("support_images"),
        node("OneHot", ["support_labels", "depth", "off_on"], ["targets"]),
        node("Shape", ["batches"], ["steps"], start=0, end=1),
        node("Squeeze", ["steps"], ["trips"]),
        node("Loop", ["trips", "", "w0", "b0"], [*WEIGHTS, "losses"], body=body),
        node("ReduceSum", ["head.weight"], ["sum"], keepdims=0),
        node("Sub", ["sum", "sum"], ["zero_or_nan"]),
        node("Equal", ["zero_or_nan", "zero"], ["finite"]),
    ]
    start = initial_weights()
    return helper.make_graph(
        nodes,
        "adapt",
        [
            info("support_images", FLOAT, ["support", *SHAPE]),
            info("support_labels", INT64, ["support"]),
            info("batches", INT64, ["steps", "batch"]),
            info("learning_rate", FLOAT, []),
        ],
        [
            info("losses", FLOAT, ["steps"]),
            info("finite", BOOL, []),
            *(info(name, FLOAT, size) for name, size in WEIGHTS.items()),
        ],
        [
            constant("c255", 255, np.float32),
            constant("depth", WAYS, np.int64),
            constant("off_on", [0, 1], np.float32),
            constant("axis0", [0], np.int64),
            constant("axis1", [1], np.int64),
            constant("zero", 0, np.float32),
            numpy_helper.from_array(start["head.weight"], "w0"),
            numpy_helper.from_array(start["head.bias"], "b0"),
        ],
    )


def predict_graph() -> onnx.GraphProto:
    return helper.make_graph(
        [*pixels_to_features("images"), node("Gemm", ["x", *WEIGHTS], ["logits"], transB=1)],
        "predict_adapted",
        [
            info("images", FLOAT, ["images", *SHAPE]),
            *(info(name, FLOAT, size) for name, size in WEIGHTS.items()),
        ],
        [info("logits", FLOAT, ["images", WAYS])],
        [constant("c255", 255, np.float32)],
    )


def described(values: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": value.name,
            "dtype": NAMES[value.type.tensor_type.elem_type],
            "shape": [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        }
        for value in values
    ]


def numpy_adapt(
    images: np.ndarray, targets: np.ndarray, batches: np.ndarray, rate: float
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The adapt graph once more, in float64: losses and weights."""
    w, b = (value.astype(np.float64) for value in initial_weights().values())
    x, losses = images.reshape(len(images), -1) / 255.0, []
    for rows in batches:
        z = x[rows] @ w.T + b
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        losses.append(-np.log(p[np.arange(len(rows)), targets[rows]]).mean())
        error = p - np.eye(WAYS)[targets[rows]]
        w, b = w - rate / len(rows) * error.T @ x[rows], b - rate / len(rows) * error.sum(0)
    return np.array(losses), {"head.weight": w, "head.bias": b}


def write_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any] | None = None) -> None:
    """Write manifest.json over the files that are there, `edit`ed at the end."""
    graphs: dict[str, Any] = {}
    for name in ("adapt", "predict_adapted"):
        path = f"{name}/1/model.onnx"
        graph = onnx.load(folder / path).graph
        graphs[name] = {
            "path": path,
            "inputs": described(graph.input),
            "outputs": described(graph.output),
        }
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    manifest: dict[str, Any] = {
        "format": 1,
        "name": "toy",
        "task": {
            "ways": WAYS,
            "image_shape": list(SHAPE),
            "layout": "NCHW",
            "pixel_range": [0, 255],
            "dtype": "float32",
        },
        "inner": {"learning_rate": 0.5, "steps": 20, "batch": 3, "replacement": False},
        "limits": {"max_steps": 50, "max_support": 30},
        "graphs": graphs,
        "adapted": {
            tensor["name"]: tensor["shape"]
            for tensor in graphs["predict_adapted"]["inputs"]
            if tensor["name"] != "images"
        },
        "files": {
            p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in files
        },
    }
    if edit:
        edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def write_golden(folder: Path, images: np.ndarray) -> None:
    targets = np.arange(len(images)) % WAYS
    batches = mini_batches(np.random.default_rng(1), len(images), 3, 6)
    losses, weights = numpy_adapt(images, targets, batches, 0.5)
    inputs: dict[str, Any] = {
        "support_images": images,
        "support_labels": targets,
        "batches": batches,
        "learning_rate": np.float32(0.5),
    }
    outputs = {"losses": losses.astype(np.float32), "finite": np.array(True)}
    outputs |= {name: value.astype(np.float32) for name, value in weights.items()}
    (folder / "golden/adapt-0").mkdir(parents=True)
    for name, value in (inputs | outputs).items():
        np.save(folder / f"golden/adapt-0/{name}.npy", value)
    case = {
        "graph": "adapt",
        "inputs": {name: f"adapt-0/{name}.npy" for name in inputs},
        "outputs": {name: f"adapt-0/{name}.npy" for name in outputs},
        "atol": 1e-4,
        "rtol": 1e-3,
    }
    (folder / "golden/golden.json").write_text(json.dumps({"cases": [case]}), encoding="utf-8")


@pytest.fixture
def rewrite_manifest() -> Callable[..., None]:
    return write_manifest


@pytest.fixture
def redo_in_numpy() -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    return numpy_adapt


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Eight images, two of each of four classes that differ in brightness and place."""
    rng = np.random.default_rng(3)
    patterns = rng.integers(0, 200, (4, *SHAPE))
    noise = rng.integers(0, 50, (8, *SHAPE))
    return (np.repeat(patterns, 2, axis=0) + noise).astype(np.float32)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory, images: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "bundle"
    for graph in (adapt_graph(), predict_graph()):
        opset = helper.make_opsetid("", 18)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        path = folder / graph.name / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        onnx.save(model, path)
    write_golden(folder, images)
    write_manifest(folder)
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "bundle"))


@pytest.fixture
def model(bundle: Path) -> FewShotModel:
    return FewShotModel.load(bundle)
