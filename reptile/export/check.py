"""Whether a network's adaptation can be written as ONNX, found in seconds and before training.

The graph of one inner step is traced, and every operator in it looked up in torch's exporter. For
the graphs themselves see `graphs`.
"""

import math

import torch
from torch._ops import OpOverload
from torch.onnx._internal.exporter._decomp import (
    create_onnx_friendly_decomposition_table,
    get_onnx_implemented_overloads,
)
from torch.onnx._internal.exporter._registration import ONNXRegistry

from reptile.bundle_format import MAX_FILE_BYTES
from reptile.errors import InputError
from reptile.export.fold import with_mask
from reptile.export.forms import form_of
from reptile.export.gradient import trace_gradient
from reptile.export.graphs import OPSET, RESERVED
from reptile.models import Model, ModuleNetwork, size

VIEWS = {torch.ops.aten.as_strided_scatter.default: torch.ops.aten.as_strided.default}
"""Writing into a view, as tracing names it in the end, to taking the view, as the module does."""


def check_export(model: Model) -> list[str]:
    """Return why the adaptation of a network cannot be exported, a sentence each; mostly nothing.

    An operator that ONNX has no form of is named with the part of the network that it is in.
    """
    if not isinstance(model, ModuleNetwork):
        return []
    problems = [
        f"{model.name}: the parameter {name!r} has the name of a tensor of the graphs; rename it"
        for name in sorted(RESERVED & set(model.shapes))
    ]
    fixed = sum(math.prod(value.shape) for value in model.fixed.values())
    stored = torch.float32.itemsize * (2 * size(model) + fixed)
    if stored > MAX_FILE_BYTES:
        problems.append(
            f"{model.name}: a graph would hold {stored / 2**30:.1f} GiB, weights and the "
            f"optimiser's state; a bundle's files are at most {MAX_FILE_BYTES / 2**30:.0f} GiB: "
            "adapt less (train.adapt), or choose a smaller network"
        )
    if problems:
        return problems
    try:
        form = form_of(with_mask(model))
        traced = [trace_gradient(form), *form.parts()]
    except InputError as error:
        return [f"{model.name}: cannot be exported to ONNX: {error}"]
    unknown: dict[str, str] = {}
    for graph, _, places in traced:
        for each in _unknown({node.target for node in graph.graph.nodes}):
            unknown.setdefault(str(each), places.get(VIEWS.get(each, each), ""))
    return [
        f"{model.name}: cannot be exported to ONNX, which has no form of {name}"
        + (f", in {place}" if place else "")
        for name, place in sorted(unknown.items())
    ]


def _unknown(targets: set[object]) -> list[OpOverload]:
    """Return the operators that torch's exporter does not write."""
    implemented = set(get_onnx_implemented_overloads(ONNXRegistry.from_torchlib(OPSET)))
    known = implemented | set(create_onnx_friendly_decomposition_table(implemented))
    known -= VIEWS.keys()  # they become others that ONNX does not have
    return [each for each in targets if isinstance(each, OpOverload) and each not in known]
