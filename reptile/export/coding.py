"""The coding of a table's columns inside the graphs: raw rows in, raw values out.

Each graph is wrapped: nodes before its inputs and after its outputs do what `data.coding` does, in
float64, as a date in seconds since 1970 or a number with a large mean has more digits than float32.
What passes between graphs (features, weights) stays coded.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.helper import make_node
from onnx.numpy_helper import from_array

from reptile.data.coding import CategoryCoding, Coding, InputCoding, NumberCoding

ROWS = ("images", "support_images", "query_images")
TARGETS = "support_labels"
ANSWERS = ("logits", "variance")

_Part = tuple[list[onnx.NodeProto], dict[str, npt.NDArray[Any]]]


def with_coding(model: onnx.ModelProto, coding: Coding) -> onnx.ModelProto:
    """Return a graph of raw rows float64 [N, columns], and of raw targets where they are values.

    In a row, a number or date is itself, NaN where it is missing; a category is its place in the
    list of `coding`, and any other number is `other`.
    """
    wrapped = onnx.ModelProto()
    wrapped.CopyFrom(model)
    graph = wrapped.graph
    columns = len(coding.inputs)
    before: list[onnx.NodeProto] = []
    after: list[onnx.NodeProto] = []
    constants: dict[str, npt.NDArray[Any]] = {}
    renamed: dict[str, str] = {}
    for values, part in ((graph.input, before), (graph.output, after)):
        for value in values:
            make = _coding_of(value.name, coding)
            if make is None:
                continue
            renamed[value.name] = f"coded.{value.name}"
            nodes, needed = make(value.name, coding)
            part.extend(nodes)
            constants |= needed
            tensor = value.type.tensor_type
            tensor.elem_type = onnx.TensorProto.DOUBLE
            if value.name in ROWS:
                tensor.shape.dim[1].dim_value = columns
    _rename(graph, renamed)
    inner = list(graph.node)
    del graph.node[:]
    graph.node.extend([*before, *inner, *after])
    graph.initializer.extend(from_array(value, name) for name, value in constants.items())
    return wrapped


def columns_of(coding: Coding) -> dict[str, list[dict[str, Any]]]:
    """Return the manifest's columns and targets."""

    def shown(each: InputCoding) -> dict[str, Any]:
        values = each.model_dump(mode="json")
        return {"name": values.pop("column"), **values}

    return {
        "columns": [shown(each) for each in coding.inputs],
        "targets": [shown(each) for each in coding.targets],
    }


def _coding_of(name: str, coding: Coding) -> Callable[[str, Coding], _Part] | None:
    if name in ROWS:
        return _encode_rows
    if not coding.targets:
        return None
    return _encode_targets if name == TARGETS else _decode if name in ANSWERS else None


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors wherever nodes use them, in the bodies of loops too."""
    for node in graph.node:
        node.input[:] = [names.get(each, each) for each in node.input]
        node.output[:] = [names.get(each, each) for each in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, names)


def raw_tensors(
    tensors: Mapping[str, npt.NDArray[Any]], coding: Coding
) -> dict[str, npt.NDArray[Any]]:
    """Return a graph's coded tensors as the wrapped graph takes or gives them."""
    raw = dict(tensors)
    for name, value in tensors.items():
        if name in ROWS:
            raw[name] = coding.rows(value)
        elif coding.targets and name in (TARGETS, "logits"):
            raw[name] = coding.decode_targets(value)
        elif coding.targets and name == "variance":
            raw[name] = value * coding.deviations**2
    return raw


def coded_tensors(
    tensors: Mapping[str, npt.NDArray[Any]], coding: Coding
) -> dict[str, npt.NDArray[Any]]:
    """Return a wrapped graph's outputs as they were before, in float64."""
    coded = dict(tensors)
    if coding.targets and "logits" in tensors:
        coded["logits"] = (tensors["logits"] - [t.mean for t in coding.targets]) / coding.deviations
    if coding.targets and "variance" in tensors:
        coded["variance"] = tensors["variance"] / coding.deviations**2
    return coded


def _encode_rows(name: str, coding: Coding) -> _Part:
    """Rows [N, columns] to coded inputs [N, D], all D at once."""
    source, mean, deviation, count = [], [], [], []
    place: list[float] = []
    for column, each in enumerate(coding.inputs):
        number = isinstance(each, NumberCoding)
        source += [column] * each.width
        mean += [each.mean if isinstance(each, NumberCoding) else 0.0] * each.width
        deviation += [each.deviation if isinstance(each, NumberCoding) else 1.0] * each.width
        count += [float(each.width - 1)] * each.width
        place += [np.nan] if number else list(range(each.width))
    constants = {
        "coding.source": np.array(source),
        "coding.mean": np.array(mean),
        "coding.deviation": np.array(deviation),
        "coding.zero": np.array(0.0),
        "coding.nan": np.array(np.nan),
    }

    def tensor(short: str) -> str:
        return f"coding.{name}.{short}"

    def run(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        names = [each if each in constants else tensor(each) for each in inputs]
        return make_node(kind, names, [tensor(output)], tensor(output), **attributes)

    nodes = [
        make_node("Gather", [name, "coding.source"], [tensor("raw")], tensor("raw"), axis=1),
        run("Sub", ["raw", "coding.mean"], "centred"),
        run("Div", ["centred", "coding.deviation"], "scaled"),
        run("IsNaN", ["scaled"], "missing"),
        run("Where", ["missing", "coding.zero", "scaled"], "filled"),
        # tanh takes infinity for 1: as NaN it passes through any network, and `finite` is false.
        run("Cast", ["filled"], "narrow", to=onnx.TensorProto.FLOAT),
        run("IsInf", ["narrow"], "infinite"),
        run("Where", ["infinite", "coding.nan", "filled"], "numbers"),
    ]
    last = "numbers"
    if any(isinstance(each, CategoryCoding) for each in coding.inputs):
        constants |= {
            "coding.count": np.array(count),
            "coding.place": np.array(place),
            "coding.category": ~np.isnan(place),
        }
        nodes += [
            run("Floor", ["raw"], "floor"),
            run("Equal", ["raw", "floor"], "whole"),
            run("GreaterOrEqual", ["raw", "coding.zero"], "low"),
            run("Less", ["raw", "coding.count"], "high"),
            run("And", ["low", "high"], "inside"),
            run("And", ["inside", "whole"], "known"),
            run("Where", ["known", "raw", "coding.count"], "places"),
            run("Equal", ["places", "coding.place"], "chosen"),
            run("Cast", ["chosen"], "ones", to=onnx.TensorProto.DOUBLE),
            run("Where", ["coding.category", "ones", "numbers"], "both"),
        ]
        last = "both"
    cast = make_node("Cast", [tensor(last)], [f"coded.{name}"], to=onnx.TensorProto.FLOAT)
    return [*nodes, cast], constants


def _encode_targets(name: str, coding: Coding) -> _Part:
    """Values [S, outputs] to coded ones; NaN stays, so that `finite` is false."""
    centred, scaled = f"coding.{name}.centred", f"coding.{name}.scaled"
    nodes = [
        make_node("Sub", [name, "coding.target_mean"], [centred]),
        make_node("Div", [centred, "coding.target_deviation"], [scaled]),
        make_node("Cast", [scaled], [f"coded.{name}"], to=onnx.TensorProto.FLOAT),
    ]
    return nodes, _target_constants(coding)


def _decode(name: str, coding: Coding) -> _Part:
    """Coded values or variances [N, outputs] in the units of the targets, or their squares."""
    double, scaled = f"coding.{name}.double", f"coding.{name}.scaled"
    cast = make_node("Cast", [f"coded.{name}"], [double], to=onnx.TensorProto.DOUBLE)
    if name == "variance":
        constants = {"coding.target_variance": coding.deviations**2}
        return [cast, make_node("Mul", [double, "coding.target_variance"], [name])], constants
    nodes = [
        cast,
        make_node("Mul", [double, "coding.target_deviation"], [scaled]),
        make_node("Add", [scaled, "coding.target_mean"], [name]),
    ]
    return nodes, _target_constants(coding)


def _target_constants(coding: Coding) -> dict[str, npt.NDArray[Any]]:
    return {
        "coding.target_mean": np.array([target.mean for target in coding.targets]),
        "coding.target_deviation": coding.deviations,
    }
