"""Checks on a bundle's files: hashes, and graphs that any consumer can load.

No graph is run here; `parity` checks what they compute.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from reptile.bundle_format import MANIFEST_FILE, Manifest
from reptile.export.graphs import IR_VERSION, OPSET, describe
from reptile.files import sha256_file
from reptile.learn.optimizer import EPSILON

CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}  # what WebGPU and tract lack


class Check(NamedTuple):
    """One claim about a bundle: `measured` (None where it is not finite) against `limit`."""

    name: str
    passed: bool
    measured: float | None
    limit: float
    detail: str = ""

    @classmethod
    def at_most(cls, name: str, measured: float, limit: float, detail: str = "") -> "Check":
        """Pass where measured <= limit; NaN fails."""
        finite = float(measured) if math.isfinite(measured) else None
        return cls(name, bool(measured <= limit), finite, float(limit), detail)

    @classmethod
    def none_of(cls, name: str, problems: list[str]) -> "Check":
        """Pass where there are no problems."""
        return cls.at_most(name, len(problems), 0, "; ".join(problems[:5]))


def check_files(folder: Path, manifest: Manifest) -> Iterator[Check]:
    """Compare the files with the manifest's list, both ways."""
    listed = manifest.files
    present = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST_FILE
    }
    problems = [f"{name} is missing" for name in sorted(listed.keys() - present)]
    problems += [f"{name} is not listed" for name in sorted(present - listed.keys())]
    problems += [
        f"{name} has another SHA-256"
        for name in sorted(present & listed.keys())
        if sha256_file(folder / name) != listed[name]
    ]
    yield Check.none_of("files match their SHA-256", problems)


def check_graph(name: str, path: Path, manifest: Manifest, adam: bool) -> Iterator[Check]:
    """Check one graph's form."""
    model = onnx.load(path, load_external_data=False)
    yield Check.none_of(f"{name}: ONNX checker and strict shape inference", _invalid(model))
    yield Check.none_of(f"{name}: opset {OPSET}, no other domain", _not_standard(model))
    yield Check.none_of(f"{name}: no descriptions or paths", _leaks(model, path.read_bytes()))
    entry, graph = manifest.raw["graphs"][name], model.graph
    actual = {"inputs": describe(graph.input), "outputs": describe(graph.output)}
    problems = [f"{kind} differ" for kind, tensors in actual.items() if entry[kind] != tensors]
    yield Check.none_of(f"{name}: tensors as in the manifest", problems)
    if manifest.learner == "closed_form":
        control = sorted({node.op_type for node in graph.node} & CONTROL_FLOW)
        yield Check.none_of(f"{name}: no control flow", [f"has {each}" for each in control])
    if adam and any(node.op_type == "Loop" for node in graph.node):
        yield Check.none_of(f"{name}: Adam's epsilon is there", _epsilon_problems(graph))


def _invalid(model: onnx.ModelProto) -> list[str]:
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return [str(error)]
    return []


def _not_standard(model: onnx.ModelProto) -> list[str]:
    opsets = [(opset.domain, opset.version) for opset in model.opset_import]
    problems = [] if opsets == [("", OPSET)] else [f"imports {opsets}"]
    if model.ir_version != IR_VERSION:
        problems.append(f"IR version {model.ir_version}")
    problems += [f"function {function.name}" for function in model.functions]
    for graph in _graphs(model.graph):
        problems += [f"{node.domain}.{node.op_type}" for node in graph.node if node.domain]
        problems += [
            f"{tensor.name} is in another file"
            for tensor in graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        ]
    return problems


def _leaks(model: onnx.ModelProto, content: bytes) -> list[str]:
    problems = ["model metadata"] if model.metadata_props or model.doc_string else []
    for graph in _graphs(model.graph):
        for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
            if part.doc_string or part.metadata_props:
                problems.append(f"description of {part.name}")
    # Shorter ones, such as "/", would occur in any weights.
    places = {place for place in (str(Path.home()), str(Path.cwd()), sys.prefix) if len(place) > 4}
    texts = sorted(places | {"site-packages", 'File "', "pkg."})
    return problems + [f"the text {text!r}" for text in texts if text.encode() in content]


def _epsilon_problems(graph: onnx.GraphProto) -> list[str]:
    """Optimisers take 1e-8 for zero: it must be a constant, scaled and added in the loop."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    epsilons = {
        name for name, value in values.items() if np.array_equal(value, [np.float32(EPSILON)])
    }
    nodes = [node for inner in _graphs(graph) if inner is not graph for node in inner.node]
    scaled = {
        node.output[0] for node in nodes if node.op_type == "Mul" and epsilons & set(node.input)
    }
    added = any(node.op_type == "Add" and scaled & set(node.input) for node in nodes)
    return [] if added else [f"no constant [{EPSILON}] is scaled and added in the loop"]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and the bodies of its loops and branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
