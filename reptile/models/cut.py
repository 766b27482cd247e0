"""The fixed part of a module, which runs once an image, and the tail with all that is adapted.

The cut is the last single tensor that all adapted parameters lie behind. It is found in the
module's torch.fx graph, in which a part without adapted parameters is one step, whatever it does.
"""

import copy
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from reptile.models.base import Model
from reptile.models.module import BatchStatisticsNorm, ModuleNetwork

log = logging.getLogger(__name__)


class Cut(NamedTuple):
    """A network in two parts: tail(fixed(inputs)) = network(inputs)."""

    fixed: nn.Module  # inputs [B, *image_shape] to values [B, *tail.image_shape]; nothing is learnt
    tail: ModuleNetwork  # of the same weights, in the same order
    where: str  # the step whose output is cut


def split(model: Model) -> Cut | None:
    """Cut a network; None where nothing runs before what is adapted, or no single tensor does.

    The parts share the network's parameters and modules.
    """
    if not isinstance(model, ModuleNetwork) or all(
        parameter.requires_grad for parameter in model.module.parameters()
    ):
        return None
    try:
        nodes = list(_Tracer().trace(model.module).nodes)
    except Exception as error:  # whatever the module's code does that torch.fx cannot follow
        reason = " ".join(str(error).split())[:200]
        log.info(
            "%s: its fixed part runs with the rest, as it cannot be traced: %s", model.name, reason
        )
        return None
    crossing = _last_crossing(nodes, model.module)
    if crossing is None:
        log.info(
            "%s: its fixed part runs with the rest, as no single tensor parts them", model.name
        )
        return None
    fixed: nn.Module = _part(model.module, nodes, None, crossing)
    if model.preprocess is not None:
        fixed = nn.Sequential(model.preprocess, fixed)
    with torch.no_grad():
        values = fixed(torch.zeros(3, *model.image_shape))
    if not isinstance(values, Tensor) or len(values) != 3 or not values.is_floating_point():
        log.info(
            "%s: its fixed part runs with the rest, as it is not a function of each", model.name
        )
        return None
    tail = copy.copy(model)
    tail.module = _part(model.module, nodes, crossing, nodes[-1])
    tail.image_shape, tail.preprocess = tuple(values.shape[1:]), None
    tail.names = {name for name, _ in tail.module.named_parameters()}
    here = tail.names | {name for name, _ in tail.module.named_buffers()}
    tail.fixed = {name: value for name, value in model.fixed.items() if name in here}
    where = str(crossing.target) if crossing.op == "call_module" else crossing.name
    return Cut(fixed, tail, where)


class _Tracer(fx.Tracer):
    """Steps into what has adapted parameters or depends on the batch, and into nothing else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a part is one step of the graph."""
        leaf = isinstance(m, BatchStatisticsNorm) or not _in_tail(m)
        return leaf or super().is_leaf_module(m, module_qualified_name)


def _in_tail(value: object) -> bool:
    """Return whether a part or a parameter is adapted, or depends on the whole batch."""
    if isinstance(value, nn.Module):
        return any(isinstance(part, BatchStatisticsNorm) for part in value.modules()) or any(
            parameter.requires_grad for parameter in value.parameters()
        )
    return isinstance(value, nn.Parameter) and value.requires_grad


def _last_crossing(nodes: Sequence[fx.Node], module: nn.Module) -> fx.Node | None:
    """Return the last step whose output alone connects what runs before it to what is behind."""
    of_input: set[fx.Node] = set()  # what depends on the input
    behind: set[fx.Node] = set()  # what is adapted, or depends on what is
    for node in nodes:
        before = node.all_input_nodes
        if node.op == "placeholder" or any(each in of_input for each in before):
            of_input.add(node)
        part = node.op in {"call_module", "get_attr"} and _attribute(module, str(node.target))
        if node.op == "output" or _in_tail(part) or any(each in behind for each in before):
            behind.add(node)
    fixed = [node for node in nodes if node in of_input and node not in behind]
    while fixed:
        crossing = [node for node in fixed if any(user in behind for user in node.users)]
        if len(crossing) == 1:
            return None if crossing[0].op == "placeholder" else crossing[0]
        behind.add(fixed.pop())
    return None


def _attribute(module: nn.Module, path: str) -> object:
    value: object = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _part(
    module: nn.Module, nodes: Sequence[fx.Node], start: fx.Node | None, end: fx.Node
) -> fx.GraphModule:
    """Return the steps that `end` needs, from the inputs or from the value of `start`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if start is not None:
        copies[start] = graph.placeholder("values")
    needed, todo = set(copies), [end]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    for node in nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    if end.op != "output":
        graph.output(copies[end])
    return fx.GraphModule(module, graph)
