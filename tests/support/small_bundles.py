"""Closed-form bundles of any input size, made by hand in an instant: features are the inputs.

Classes by the nearest prototype, values by Bayesian linear regression.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
NAMES: dict[int, str] = {FLOAT: "float32", INT64: "int64", BOOL: "bool"}
STRENGTH, NOISE, ITERATIONS, WAYS = 1e-3, 0.01, 40, 100
Shapes = dict[str, tuple[int, list[int | str]]]

node = helper.make_node


def small_bundle(folder: Path, inputs: int, outputs: int = 0) -> Path:
    """Write a bundle of `inputs` numbers that predicts `outputs` values; 0: that names classes."""
    images: Shapes = {"images": (FLOAT, ["images", inputs])}
    features: Shapes = {"features": (FLOAT, ["support", inputs])}
    finite: Shapes = {"finite": (BOOL, [])}
    size = inputs + 1
    if outputs:
        targets: Shapes = {"support_labels": (FLOAT, ["support", outputs])}
        weights: Shapes = {
            "head.mean": (FLOAT, [size, outputs]),
            "head.covariance": (FLOAT, [size, size]),
        }
        answers: Shapes = {name: (FLOAT, ["images", outputs]) for name in ("logits", "variance")}
        fit, predict = _posterior(), _values()
    else:
        targets = {"support_labels": (INT64, ["support"])}
        weights = {
            "head.weight": (FLOAT, ["ways", inputs]),
            "head.bias": (FLOAT, ["ways"]),
        }
        answers = {"logits": (FLOAT, ["images", "ways"])}
        fit, predict = _prototypes(), [node("Gemm", ["images", *weights], ["logits"], transB=1)]
    support: Shapes = {"support_images": (FLOAT, ["support", inputs])}
    copied = [node("Identity", ["support_images"], ["features"])]
    embedded: Shapes = {"features": (FLOAT, ["images", inputs])}
    graphs = {
        "embed": ([node("Identity", ["images"], ["features"])], images, embedded),
        "fit": (fit, features | targets, weights | finite),
        "adapt": (copied + fit, support | targets, features | weights | finite),
        "predict_adapted": (predict, images | weights, answers),
    }
    listed = {}
    for name, (nodes, given, found) in graphs.items():
        path = folder / name / "1/model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(_model(name, nodes, given, found, outputs, size))
        listed[name] = {
            "path": f"{name}/1/model.onnx",
            "inputs": _described(given),
            "outputs": _described(found),
        }
    task = {"outputs": outputs} if outputs else {"ways": WAYS}
    kind = "regression" if outputs else "classification"
    manifest = {
        "format": 3,
        "name": "small",
        "task": {"kind": kind, **task, "image_shape": [inputs], "dtype": "float32"},
        "learner": "closed_form",
        "head": "bayes" if outputs else "protonet",
        "limits": {"max_support": 1000},
        "graphs": listed,
        "adapted": {each["name"]: each["shape"] for each in _described(weights)},
        "files": {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*.onnx"))
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def _prototypes() -> list[onnx.NodeProto]:
    return [
        node("ReduceMax", ["support_labels"], ["largest"], keepdims=0),
        node("Add", ["largest", "one_more"], ["ways"]),
        node("OneHot", ["support_labels", "ways", "off_on"], ["targets"]),
        node("Transpose", ["targets"], ["by_class"]),
        node("MatMul", ["by_class", "features"], ["sums"]),
        node("ReduceSum", ["by_class", "axis1"], ["counts"], keepdims=1),
        node("Div", ["sums", "counts"], ["prototypes"]),
        node("Add", ["prototypes", "prototypes"], ["head.weight"]),
        node("Mul", ["prototypes", "prototypes"], ["squares"]),
        node("ReduceSum", ["squares", "axis1"], ["lengths"], keepdims=0),
        node("Neg", ["lengths"], ["head.bias"]),
        *_finite("lengths"),
    ]


def _posterior() -> list[onnx.NodeProto]:
    """The inverse of ΦᵀΦ + λI by the iteration of Newton and Schulz, unrolled."""
    steps = []
    for step in range(ITERATIONS):
        last = "head.covariance" if step == ITERATIONS - 1 else f"inverse{step + 1}"
        steps += [
            node("MatMul", ["precision", f"inverse{step}"], [f"product{step}"]),
            node("Sub", ["twice", f"product{step}"], [f"rest{step}"]),
            node("MatMul", [f"inverse{step}", f"rest{step}"], [last]),
        ]
    return [
        *_with_constant("features"),
        node("Transpose", ["phi"], ["across"]),
        node("MatMul", ["across", "phi"], ["gram"]),
        node("Add", ["gram", "prior"], ["precision"]),
        node("Abs", ["precision"], ["sizes"]),
        node("ReduceSum", ["sizes", "axis1"], ["row_sums"], keepdims=0),
        node("ReduceMax", ["row_sums"], ["norm"], keepdims=0),
        node("Div", ["identity", "norm"], ["inverse0"]),
        *steps,
        node("MatMul", ["across", "support_labels"], ["moment"]),
        node("MatMul", ["head.covariance", "moment"], ["head.mean"]),
        node("ReduceSum", ["head.mean", "axis1"], ["total"], keepdims=0),
        *_finite("total"),
    ]


def _values() -> list[onnx.NodeProto]:
    return [
        *_with_constant("images"),
        node("MatMul", ["phi", "head.mean"], ["logits"]),
        node("MatMul", ["phi", "head.covariance"], ["spread"]),
        node("Mul", ["spread", "phi"], ["parts"]),
        node("ReduceSum", ["parts", "axis1"], ["own"], keepdims=1),
        node("Add", ["own", "float_one"], ["relative"]),
        node("Mul", ["relative", "noise"], ["variance"]),
    ]


def _with_constant(inputs: str) -> list[onnx.NodeProto]:
    return [
        node("Shape", [inputs], ["count"], start=0, end=1),
        node("Concat", ["count", "single"], ["column"], axis=0),
        node("Expand", ["float_one", "column"], ["ones"]),
        node("Concat", [inputs, "ones"], ["phi"], axis=1),
    ]


def _finite(values: str) -> list[onnx.NodeProto]:
    return [
        node("ReduceSum", [values], ["all"], keepdims=0),
        node("Sub", ["all", "all"], ["zero_or_nan"]),
        node("Equal", ["zero_or_nan", "zero"], ["finite"]),
    ]


def _model(
    name: str, nodes: list[onnx.NodeProto], given: Shapes, found: Shapes, outputs: int, size: int
) -> bytes:
    identity = np.eye(size, dtype=np.float32)
    constants: dict[str, np.ndarray] = {
        "axis1": np.array([1]),
        "single": np.array([1]),
        "one_more": np.array(1),
        "off_on": np.array([0, 1], np.float32),
        "float_one": np.ones((1, 1), np.float32),
        "zero": np.array(0, np.float32),
        "identity": identity,
        "twice": 2 * identity,
        "prior": np.float32(STRENGTH) * identity,
        "noise": np.full(max(outputs, 1), NOISE, np.float32),
    }
    used = {each for one in nodes for each in one.input}
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(key, *value) for key, value in given.items()],
        [helper.make_tensor_value_info(key, *value) for key, value in found.items()],
        [numpy_helper.from_array(value, key) for key, value in constants.items() if key in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _described(tensors: Shapes) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": NAMES[kind], "shape": shape}
        for name, (kind, shape) in tensors.items()
    ]
