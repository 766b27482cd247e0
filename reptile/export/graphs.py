"""The bundle's four graphs: predict, adapt, predict_adapted and few_shot.

Each is a torch module; torch's exporter converts it to ONNX, and `tidy` makes it portable. For the
folder see `write`.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import onnx
import torch
from torch import Tensor, nn

from reptile import __version__
from reptile.export.fold import adapted_tensors, exportable
from reptile.export.forms import Form, form_of
from reptile.export.gradient import trace_gradient
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.optimizer import BETA2, EPSILON, decay
from reptile.learn.prototypes import with_prototypes
from reptile.models import OUTPUT_MASK, Model, mask_absent_outputs, unflatten
from reptile.objectives import CLASSIFICATION

OPSET = 18
IR_VERSION = 8  # widely supported; newer ones add no feature that these graphs use

RESERVED = {"images", "support_images", "query_images", "logits", "losses", "finite", OUTPUT_MASK}
"""Names that no parameter may have; the graphs' other inputs are no outputs of `adapt`."""

while_loop = torch.ops.higher_order.while_loop


class Spec(NamedTuple):
    """Type and shape of an input or output; a name denotes a dynamic size."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


Specs = dict[str, Spec]

DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.BOOL: "bool",
}


def build_graphs(checkpoint: Checkpoint, max_steps: int) -> dict[str, onnx.ModelProto]:
    """Build every graph of the bundle, by name; the same checkpoint gives the same bytes.

    Args:
        checkpoint: weights and optimiser state, which become constants of the graphs.
        max_steps: inner steps beyond this many are not taken.
    """
    checkpoint = exportable(checkpoint)
    model, form = checkpoint.model, form_of(checkpoint.model)
    form.trace_all(features=checkpoint.info.settings.algorithm == "proto-maml")
    task = {
        "support_images": _images(model, "support"),
        "support_labels": _targets(model),
        "batches": Spec(torch.int64, ("steps", "batch")),
        "learning_rate": Spec(torch.float32, ()),
    }
    trace = {"losses": Spec(torch.float32, ("steps",)), "finite": Spec(torch.bool, ())}
    weights = adapted_specs(model)
    images = {"images": _images(model, "images")}
    logits = {"logits": Spec(torch.float32, ("images", model.outputs))}
    graphs = {
        "predict": to_onnx("predict", Predict(checkpoint, form), images, logits),
        "adapt": to_onnx("adapt", Adapt(checkpoint, form, max_steps), task, trace | weights),
        "predict_adapted": to_onnx(
            "predict_adapted", PredictAdapted(checkpoint, form), images | weights, logits
        ),
    }
    queries = {"query_images": _images(model, "queries")}
    answers = trace | {"logits": Spec(torch.float32, ("queries", model.outputs))}
    joined = _join(graphs["adapt"], graphs["predict_adapted"], list(weights))
    return graphs | {"few_shot": tidy("few_shot", joined, task | queries, answers)}


def describe(values: Iterable[onnx.ValueInfoProto]) -> list[dict[str, Any]]:
    """Return inputs or outputs of a graph as the manifest lists them."""
    return [
        {
            "name": value.name,
            "dtype": DTYPES[value.type.tensor_type.elem_type],
            "shape": [
                size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim
            ],
        }
        for value in values
    ]


class Predict(nn.Module):
    """The meta-initialised model, before adaptation; batch norm uses the given images."""

    def __init__(self, checkpoint: Checkpoint, form: Form) -> None:
        super().__init__()
        self.form, self.network_input = form, checkpoint.info.network_input
        self.names = list(checkpoint.model.shapes)
        for name, value in unflatten(checkpoint.model, checkpoint.meta.weights).items():
            path, _, last = name.rpartition(".")
            _submodule(self, path).register_buffer(last, value.clone())

    def forward(self, images: Tensor) -> Tensor:
        """Map pixels [N, C, H, W] to logits [N, ways], or inputs to values."""
        params = {name: self.get_buffer(name) for name in self.names}
        return self.form.predict(params, self.network_input(images))


class Adapt(nn.Module):
    """The inner loop, from the checkpoint's weights and optimiser state.

    Outputs whose labels are absent from the support set are masked, so tasks with fewer classes
    than outputs work unchanged.
    """

    initial_weights: Tensor

    def __init__(self, checkpoint: Checkpoint, form: Form, max_steps: int) -> None:
        super().__init__()
        (weights, state), info = checkpoint.meta, checkpoint.info
        self.model, self.form = checkpoint.model, form
        self.network_input = info.network_input
        self.optimizer = info.settings.optimizer
        self.max_steps = max_steps
        self.gradient = trace_gradient(form)
        self.prototypes = info.settings.algorithm == "proto-maml"
        self.register_buffer("initial_weights", form.pack(weights))
        # The loop carries s = v / (1 - β): then s ← β·s + g² and, with c = √((1 - β^t) / (1 - β)),
        # Adam's step is α·c·g / (√s + ε·c), which saves two passes over the weights. Scaled SGD
        # carries the factors of its steps instead, [steps, P], plain SGD nothing.
        moment = weights.new_empty(0)
        if self.optimizer.name == "adam":
            moment = form.pack(state.second_moment.double() / (1 - BETA2)).float()
        elif self.optimizer.name == "scaled_sgd":
            each_step = state.second_moment.view(-1, len(weights))
            moment = torch.stack([form.pack(each) for each in each_step])
        self.register_buffer("second_moment", moment)
        # c of each step, exact for any step count and without a double in the graph. Epsilon has a
        # dimension because optimisers drop the addition of a scalar that they take for zero.
        taken = range(state.step + 1, state.step + max_steps + 1)
        corrections = [math.sqrt((1 - BETA2**step) / (1 - BETA2)) for step in taken]
        self.register_buffer("corrections", torch.tensor(corrections))
        self.register_buffer("epsilon", torch.tensor([EPSILON]))

    def forward(
        self, support_images: Tensor, support_labels: Tensor, batches: Tensor, learning_rate: Tensor
    ) -> tuple[Tensor, ...]:
        """Return losses [steps], finite [] and the task's tensors, in `adapted_specs`' order."""
        inputs = self.form.fixed(self.network_input(support_images))
        weights, targets = self.initial_weights, support_labels
        if self.model.objective is CLASSIFICATION:
            targets = torch.eye(self.model.outputs)[support_labels.clamp(0, self.model.outputs - 1)]
            # Packed or not, the bias of the outputs is in the same place.
            weights = mask_absent_outputs(self.model, weights, targets.sum(0) > 0)
        if self.prototypes:
            unpacked = self.form.unpack(weights)
            features = self.form.features(unflatten(self.model, unpacked), inputs)
            weights = self.form.pack(with_prototypes(self.model, unpacked, features, targets))
        losses, packed = self._loop(
            weights, inputs, targets, batches.clamp(0, inputs.shape[0] - 1), learning_rate
        )
        adapted = self.form.adapted(unflatten(self.model, self.form.unpack(packed)), inputs)
        everything = torch.cat([losses, *(value.flatten() for value in adapted.values())])
        return losses, everything.isfinite().all(), *adapted.values()

    def _loop(
        self,
        weights: Tensor,
        inputs: Tensor,
        targets: Tensor,
        batches: Tensor,
        learning_rate: Tensor,
    ) -> tuple[Tensor, Tensor]:
        def unfinished(step: Tensor, losses: Tensor, *_: Tensor) -> Tensor:
            return step < losses.shape[0]

        def body(
            step: Tensor,
            losses: Tensor,
            weights: Tensor,
            moment: Tensor,
            inputs: Tensor,
            targets: Tensor,
            batches: Tensor,
            share: Tensor,
            learning_rate: Tensor,
            corrections: Tensor,
            epsilon: Tensor,
            *constants: Tensor,
        ) -> tuple[Tensor, ...]:
            batch = batches[step]
            weights = decay(weights, self.optimizer)
            gradient, loss = self.gradient.graph(
                weights, inputs[batch], targets[batch], share, *constants
            )
            losses = losses.index_copy(0, step[None], loss[None])
            if self.optimizer.name == "scaled_sgd":
                gradient = moment[step.clamp(max=len(moment) - 1)] * gradient
            move = learning_rate * gradient
            if self.optimizer.name == "adam":
                correction = corrections[step]
                moment = BETA2 * moment + gradient * gradient
                root = moment.sqrt() + epsilon * correction
                move = (learning_rate * correction) * (gradient / root)
            # A loop may not return its input unchanged, as SGD would the moment.
            return step + 1, losses, weights - move, moment.clone()

        steps = torch.sym_min(batches.shape[0], self.max_steps)
        carried = (
            torch.zeros((), dtype=torch.int64),
            torch.zeros(steps),
            weights,
            self.second_moment,
        )
        share = 1 / torch.ones(batches.shape[1]).sum()
        constants = (self.corrections, self.epsilon, *self.gradient.constants)
        fixed = (inputs, targets, batches, share, learning_rate, *constants)
        _, losses, weights, _ = while_loop(unfinished, body, carried, fixed)
        return losses, weights


class PredictAdapted(nn.Module):
    """The network under an adapted task's tensors: each image's logits depend on it alone."""

    def __init__(self, checkpoint: Checkpoint, form: Form) -> None:
        super().__init__()
        self.form, self.network_input = form, checkpoint.info.network_input
        self.names = list(adapted_specs(checkpoint.model))

    def forward(self, images: Tensor, *weights: Tensor) -> Tensor:
        """Map pixels [N, C, H, W] to logits [N, ways], or inputs to values."""
        tensors = dict(zip(self.names, weights, strict=True))
        return self.form.predict_adapted(tensors, self.network_input(images))


def adapted_specs(model: Model) -> dict[str, Spec]:
    """Names and shapes of an adapted task's tensors, in the order `adapted_tensors` gives them."""
    params = {name: torch.zeros(shape) for name, shape in model.shapes.items()}
    with torch.no_grad():
        tensors = adapted_tensors(model, params, torch.zeros(1, *model.image_shape))
    return {name: Spec(value.dtype, tuple(value.shape)) for name, value in tensors.items()}


def _submodule(module: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path, made where it is missing."""
    for name in path.split(".") if path else ():
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


def _targets(model: Model) -> Spec:
    if model.objective is CLASSIFICATION:
        return Spec(torch.int64, ("support",))
    return Spec(torch.float32, ("support", model.outputs))


def _images(model: Model, count: str) -> Spec:
    return Spec(torch.float32, (count, *model.image_shape))


def to_onnx(name: str, module: nn.Module, inputs: Specs, outputs: Specs) -> onnx.ModelProto:
    """Export a module of tensors in and out to a portable graph."""
    free = {size for spec in inputs.values() for size in spec.shape if isinstance(size, str)}
    dims = {size: torch.export.Dim(size) for size in sorted(free)}
    dynamic = [
        {i: dims[n] for i, n in enumerate(spec.shape) if n in free} for spec in inputs.values()
    ]
    # Free sizes are 3 here: any number above 1, which torch would take for a constant.
    examples = [
        torch.ones([3 if isinstance(n, str) else n for n in spec.shape], dtype=spec.dtype)
        for spec in inputs.values()
    ]
    shapes: tuple[object, ...] = tuple(dynamic)
    if isinstance(module, PredictAdapted):  # its `*weights` are one argument
        shapes = (dynamic[0], tuple(dynamic[1:]))
    with torch.no_grad(), _quiet(), _rules_of_linear_time():
        program = torch.export.export(module, tuple(examples), dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    assert exported is not None
    return tidy(name, exported.model_proto, inputs, outputs)


def _join(
    adapt: onnx.ModelProto, predict_adapted: onnx.ModelProto, weights: list[str]
) -> onnx.ModelProto:
    prefix = "query_"  # keeps the names of the two graphs apart
    predict = onnx.compose.add_prefix(predict_adapted, prefix, rename_outputs=False)
    wires = [(name, prefix + name) for name in weights]
    joined = onnx.compose.merge_models(adapt, predict, wires)
    del joined.opset_import[1:]  # merging lists the same one twice
    return joined


def tidy(name: str, graph: onnx.ModelProto, inputs: Specs, outputs: Specs) -> onnx.ModelProto:
    """Drop what is the exporter's and this machine's, and unread constants; name free sizes."""
    graph.graph.name, graph.ir_version = name, IR_VERSION
    graph.producer_name, graph.producer_version = "reptile", __version__
    _strip(graph.graph)
    read = _read(graph.graph)  # ONNX Runtime warns of constants that nothing reads
    constants = [each for each in graph.graph.initializer if each.name in read]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(constants)
    for values, specs in ((graph.graph.input, inputs), (graph.graph.output, outputs)):
        for value, (given, spec) in zip(values, specs.items(), strict=True):
            assert value.name == given
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(given, kind, spec.shape))
    return graph


def _read(graph: onnx.GraphProto) -> set[str]:
    """Return the names that a graph's nodes and outputs read, also within loops and branches."""
    names = {value.name for value in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names |= _read(attribute.g)
    return names


def _strip(graph: onnx.GraphProto) -> None:
    """Clear descriptions, and the intermediate shapes with their sizes under made-up names."""
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    for value in (*graph.input, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            size.ClearField("dim_param")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _strip(attribute.g)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's internal messages from the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _rules_of_linear_time() -> Iterator[None]:
    """Leave out the exporter's rule that compares each node with all others.

    It writes two slices as one split, and takes half of the time or more on thousands of nodes.
    """
    from onnxscript import rewriter  # takes a second, which only an export should pay

    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", ())
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule.name != "SlicesSplit")
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules
