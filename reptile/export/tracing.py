"""A function of tensors as a graph of forward ATen operators, with its gradients written out.

torch.export cannot differentiate, so this runs before it. Sizes of batches stay free.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.grad_mode import _force_original_view_tracking
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from reptile.errors import InputError
from reptile.export.decompositions import decompositions
from reptile.export.place import Place

BATCH = 3  # of the examples: any number above 1, which torch would treat as a constant


class Traced(NamedTuple):
    """A graph, and the tensors that it needs after its inputs: constants of the function."""

    graph: GraphModule
    constants: tuple[Tensor, ...]
    places: dict[OpOverload, str]  # parts of the module that operators come from

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the graph."""
        return self.graph(*inputs, *self.constants)


def trace(
    function: Callable[..., Any],
    examples: Sequence[Tensor],
    free: Sequence[int],
    module: nn.Module,
) -> Traced:
    """Trace a function of tensors.

    Args:
        function: from tensors to a tensor or a tuple of tensors.
        examples: of its inputs, with `BATCH` rows where the size is free.
        free: the inputs whose first size is free, the same for all of them.
        module: what the function runs, to name the part that an operator or an error comes from.

    Raises:
        InputError: the function fixes that size, or does what no graph can; after the part's name.
    """
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)

    def fake(number: int, tensor: Tensor) -> Tensor:
        first = DimDynamic.DYNAMIC if number in free else DimDynamic.STATIC
        sizes = [first, *[DimDynamic.STATIC] * tensor.ndim][: tensor.ndim]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor, symbolic_context=context)

    inputs = [fake(number, tensor) for number, tensor in enumerate(examples)]
    place = Place(module)

    def followed(*tensors: Tensor) -> Any:
        with place:
            return function(*tensors)

    with plain_operators(), place.followed():
        try:
            graph = make_fx(followed, decompositions(), "fake")(*inputs)
            if any(_changes_its_input(node) for node in graph.graph.nodes):
                graph = make_fx(torch.func.functionalize(graph), decompositions(), "fake")(*inputs)
        except Exception as error:  # whatever the module's code raises, or torch on tracing it
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            where = f"{place.last}: " if place.last else ""
            raise InputError(f"{where}{reason}") from error
    for number in free:
        size: Any = inputs[number].shape[0]
        if isinstance(size, int) or size.node.is_constant() or size.node.maybe_as_int() is not None:
            raise InputError(f"it works for batches of {BATCH} only, the size it was tried with")
    return _lift(graph, place.operators)


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Choose the form of operators that have several: the one with forward and backward in ATen.

    torch's Python kernels keep a batch's size free where the compiled ones (padding) would fix it.
    The gradient of writing into a part of a tensor takes that part again, not memory by strides,
    which no graph has; attention adds its bias so.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            enable_python_dispatcher(),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),
            _force_original_view_tracking(True),
            _PlainFunctions(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _PlainFunctions(TorchFunctionMode):
    """Linear layers as products, and pooling to one value as a mean.

    Their compiled forms fix the batch's size of sequences, and set strides that no graph can.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear and args[0].dim() > 2:
            return _linear(*args, **(kwargs or {}))
        if function is F.adaptive_avg_pool2d and args[1] in (1, (1, 1), [1, 1]):
            return args[0].mean((-2, -1), keepdim=True)
        return function(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = input @ weight.t()
    return product if bias is None else product + bias


def _changes_its_input(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _lift(module: GraphModule, places: dict[OpOverload, str]) -> Traced:
    """Turn the constants in a graph into further inputs, each once: loops need them there."""
    graph = module.graph
    constants: list[Tensor] = []
    inputs: dict[Any, Any] = {}
    after = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if key not in inputs:
            with graph.inserting_after(after):
                after = inputs[key] = graph.placeholder(f"constant_{len(constants)}")
            after.meta = dict(node.meta)
            constants.append(tensor.detach())
        node.replace_all_uses_with(inputs[key])
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return Traced(module, tuple(constants), places)
