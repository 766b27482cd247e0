"""The graphs of a learner with a closed-form head: embed, fit, adapt, predict_adapted, few_shot.

None has a Loop, an If or a Scan, so that runtimes without control flow (WebGPU, tract) run them.
Batch norm uses the population statistics, constants that the exporter folds into the convolutions.
For learners by gradient steps see `graphs`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array
from torch import Tensor, nn

from reptile.errors import InputError
from reptile.export.graphs import OPSET, Spec, Specs, tidy, to_onnx
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.episodic import ClosedForm
from reptile.learn.heads import BayesHead, ClassifierHead, Prior
from reptile.models import MASK_BIAS, LayerStatistics

FLOAT, INT64, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL
CONDITION = 1e6  # float32 resolves no smaller eigenvalue beside the largest: its epsilon is 1.2e-7
MAX_RIDGE_SUPPORT = 1000  # as far as `newton_schulz` was measured; its time grows with the cube


def check_support(algorithm: str, examples: int) -> None:
    """Refuse a support set for which the graphs of an algorithm were not measured.

    Raises:
        InputError: it is larger.
    """
    if examples <= MAX_RIDGE_SUPPORT:
        return
    if algorithm == "ridge":
        raise InputError(
            f"export.max_support = {examples}: ridge solves a system of as many equations, at most "
            f"{MAX_RIDGE_SUPPORT}; lower it, or train with algorithm: protonet"
        )
    if algorithm == "bayes":
        raise InputError(
            f"export.max_support = {examples}: bayes was measured in float32 with at most "
            f"{MAX_RIDGE_SUPPORT} points; lower it"
        )


def newton_schulz(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve matrix · X = right, symmetric positive definite [S, S] and [S, W], by products alone.

    The Newton-Schulz iteration Z ← Z(2I - matrix·Z) converges to the inverse from I / ‖matrix‖∞,
    and doubles the right digits in each step. Z is scaled before each step so that the eigenvalues
    of matrix·Z, in [lower, 1], spread evenly about 1 (Pan and Schreiber, An improved Newton
    iteration for the generalized inverse of a matrix, 1991); the smallest then grows fourfold. As
    `lower` starts at 1 / CONDITION, the number of steps is fixed: 13. The last, on `right` alone,
    corrects the rounding of the others.

    Measured on ridge's matrices of ReLU features, against a float64 solution, as the largest
    difference of a query's logits (one-hot targets, so logits are of the order of 1):

        S     condition   LAPACK, float32   this      conjugate gradients, 60 steps
        25    1e3         5e-7              5e-7      1e-6
        100   2e4         4e-6              5e-6      8e-4
        500   4e4         4e-6              9e-6      1e-3
        1000  7e4         9e-6              2e-5      3e-2
        1000  2e6         5e-5              1e-4      4e-2
        500   4e7         6e-3              3e-3      (both beyond what float32 resolves)

    In ONNX Runtime on one core, with all that `Fit` does: 0.1 ms at S = 25, 0.8 at 100, 340 at 500,
    2500 at 1000. Conjugate gradients are several times as fast from S = 500 on, but how many steps
    they need depends on the features.
    Beyond CONDITION, eigenvalues that are too small to resolve act as if ridge were stronger.
    """
    inverse = torch.eye(matrix.shape[0]) / matrix.abs().sum(1).max()
    lower = 1 / CONDITION
    while lower < 1 - 1e-4:
        inverse = (2 / (1 + lower)) * inverse
        inverse = 2 * inverse - inverse @ (matrix @ inverse)
        lower = 4 * lower / (1 + lower) ** 2
    solution = inverse @ right
    return solution + inverse @ (right - matrix @ solution)


class Embed(nn.Module):
    """The network without a head: each image's features depend on that image alone."""

    def __init__(self, learner: ClosedForm) -> None:
        super().__init__()
        self.model, self.network_input = learner.model, learner.network_input
        self.names = list(learner.model.shapes)
        for name in self.names:
            self.register_buffer(_plain(name), learner.params[name].clone())
        for layer, (mean, variance) in enumerate(learner.statistics):
            self.register_buffer(f"mean{layer}", mean.clone())
            self.register_buffer(f"variance{layer}", variance.clone())
        self.layers = len(learner.statistics)

    def forward(self, images: Tensor) -> Tensor:
        """Map pixels [N, C, H, W] to features [N, D]."""
        params = {name: self.get_buffer(_plain(name)) for name in self.names}
        statistics = tuple(
            LayerStatistics(self.get_buffer(f"mean{layer}"), self.get_buffer(f"variance{layer}"))
            for layer in range(self.layers)
        )
        return self.model.features(params, self.network_input(images), statistics or None)


class _Bayes(nn.Module):
    """The constants of a Bayesian head, computed in float64."""

    def __init__(self, learner: ClosedForm) -> None:
        super().__init__()
        assert isinstance(learner.head, BayesHead)
        for name, value in learner.head.prior(learner.params)._asdict().items():
            self.register_buffer(name, value.float())

    @property
    def prior(self) -> Prior:
        return Prior(*(self.get_buffer(name) for name in Prior._fields))


class FitValues(_Bayes):
    """The posterior of a Bayesian linear regression from features and values.

    Measured on the network of `sinusoid-bayes` (33 weights in the head, values up to 5), against
    `BayesHead.fit` in float64, as the largest difference over 201 places and 10 tasks:

        S      mean    variance, relative   condition of the system
        1      3e-5    7e-5
        10     4e-5    9e-5                 2e3
        100    4e-5    3e-4                 2e4
        500    3e-5    6e-4                 1e5
        1000   5e-5    9e-4                 2e5
    """

    def forward(self, features: Tensor, support_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map [S, D] and [S, outputs] to mean, covariance and finite []; see `Prior.given`."""
        mean, covariance = self.prior.given(features, support_labels, newton_schulz)
        return mean, covariance, mean.isfinite().all() & covariance.isfinite().all()


class PredictValues(_Bayes):
    """Values and their variances from features and a posterior."""

    def forward(self, features: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Map [N, D] and the posterior to values and variances, both [N, outputs]."""
        return self.prior.predict(mean, covariance, features)


class Fit(nn.Module):
    """The head: a linear classifier from features and labels, of max(labels) + 1 classes."""

    def __init__(self, learner: ClosedForm, max_ways: int) -> None:
        super().__init__()
        assert isinstance(learner.head, ClassifierHead)
        self.head, self.max_ways = learner.head, max_ways
        self.names = list(learner.head.shapes)
        for name in self.names:
            self.register_buffer(_plain(name), learner.params[name].clone())

    def forward(self, features: Tensor, support_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map [S, D] and [S] to weight [W, D], bias [W] and finite []."""
        labels = support_labels.clamp(0, self.max_ways - 1)
        ways = (labels.max() + 1).item()
        torch._check(ways >= 1)
        targets = (labels[:, None] == torch.arange(ways)).to(features.dtype)  # `one_hot`, W free
        params = {name: self.get_buffer(_plain(name)) for name in self.names}
        weight, bias = self.head.fit(params, features, targets, newton_schulz)
        bias = torch.where(targets.sum(0) > 0, bias, MASK_BIAS)
        return weight, bias, weight.isfinite().all() & bias.isfinite().all()


def build_closed_form_graphs(checkpoint: Checkpoint, max_ways: int) -> dict[str, onnx.ModelProto]:
    """Build every graph of the bundle, by name; the same checkpoint gives the same bytes.

    Args:
        checkpoint: of a learner in closed form.
        max_ways: larger labels count as the largest of so many; of no concern to a regressor.
    """
    learner = checkpoint.closed_form
    shape, size = checkpoint.model.image_shape, checkpoint.model.feature_size

    def images(count: str) -> Spec:
        return Spec(torch.float32, (count, *shape))

    def floats(*sizes: int | str) -> Spec:
        return Spec(torch.float32, sizes)

    if isinstance(learner.head, ClassifierHead):
        fit: nn.Module = Fit(learner, max_ways)
        labels = {"support_labels": Spec(torch.int64, ("support",))}
        weights = {"head.weight": floats("ways", size), "head.bias": floats("ways")}
        answers: dict[str, tuple[int | str]] = {"logits": ("ways",)}
        predict = _linear
    else:
        outputs = learner.params["head.noise"].shape[0]
        fit = FitValues(learner)
        labels = {"support_labels": floats("support", outputs)}
        weights = {
            "head.mean": floats(size + 1, outputs),
            "head.covariance": floats(size + 1, size + 1),
        }
        answers = {"logits": (outputs,), "variance": (outputs,)}
        predicting = to_onnx(
            "predict",
            PredictValues(learner),
            {"features": floats("images", size)} | weights,
            {name: floats("images", *sizes) for name, sizes in answers.items()},
        )

        def predict(features: str) -> _Part:
            return _part(predicting, features=features)

    task = {"support_images": images("support"), **labels}
    features = {"features": floats("support", size)}
    finite = {"finite": Spec(torch.bool, ())}
    queries = {"images": images("images")}
    embedding = to_onnx("embed", Embed(learner), queries, {"features": floats("images", size)})
    fitting = to_onnx("fit", fit, features | labels, weights | finite)
    return {
        "embed": embedding,
        "fit": fitting,
        "adapt": _join(
            "adapt",
            [_part(embedding, images="support_images"), _part(fitting)],
            task,
            features | weights | finite,
        ),
        "predict_adapted": _join(
            "predict_adapted",
            [_part(embedding), predict("features")],
            queries | weights,
            {name: floats("images", *sizes) for name, sizes in answers.items()},
        ),
        "few_shot": _join(
            "few_shot",
            [
                _together(),
                _part(embedding, features="both"),
                _apart(),
                _part(fitting),
                predict("query_features"),
            ],
            task | {"query_images": images("queries")},
            finite | {name: floats("queries", *sizes) for name, sizes in answers.items()},
        ),
    }


class _Part(NamedTuple):
    """Some nodes of a graph and their constants; parts are joined by their tensors' names."""

    nodes: list[onnx.NodeProto]
    constants: list[onnx.TensorProto]


def _part(model: onnx.ModelProto, **renamed: str) -> _Part:
    """Return a graph as a part: inner tensors get its name as a prefix, others may be renamed."""
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    outer = {value.name: value.name for value in (*graph.input, *graph.output)} | renamed

    def name(old: str) -> str:
        return outer.get(old, f"{graph.name}.{old}") if old else ""  # "": an input left out

    for node in graph.node:
        node.name = name(node.name)
        node.input[:] = map(name, node.input)
        node.output[:] = map(name, node.output)
    for tensor in graph.initializer:
        tensor.name = name(tensor.name)
    return _Part(list(graph.node), list(graph.initializer))


def _linear(features: str) -> _Part:
    """Features to logits."""
    inputs = [features, "head.weight", "head.bias"]
    return _Part([make_node("Gemm", inputs, ["logits"], transB=1)], [])


def _together() -> _Part:
    """Join images, so that all pass the network at once and its weights are stored once."""
    return _Part([make_node("Concat", ["support_images", "query_images"], ["images"], axis=0)], [])


def _apart() -> _Part:
    """Divide the features of both into those of the support set and those of the queries."""
    nodes = [
        make_node("Shape", ["support_images"], ["size"], start=0, end=1),
        make_node("Slice", ["both", "first", "size", "first"], ["features"]),
        make_node("Slice", ["both", "size", "last", "first"], ["query_features"]),
    ]
    constants = {"first": 0, "last": np.iinfo(np.int64).max}  # `first` is also the axis
    return _Part(nodes, [from_array(np.array([n]), name) for name, n in constants.items()])


def _join(name: str, parts: Sequence[_Part], inputs: Specs, outputs: Specs) -> onnx.ModelProto:
    """Return the graph that runs the parts one after another."""

    def values(specs: Specs) -> list[onnx.ValueInfoProto]:
        kinds = {torch.float32: FLOAT, torch.int64: INT64, torch.bool: BOOL}
        return [
            make_tensor_value_info(each, kinds[spec.dtype], spec.shape)
            for each, spec in specs.items()
        ]

    nodes = [node for part in parts for node in part.nodes]
    constants = [constant for part in parts for constant in part.constants]
    graph = make_graph(nodes, name, values(inputs), values(outputs), constants)
    model = make_model(graph, opset_imports=[make_opsetid("", OPSET)])
    return tidy(name, model, inputs, outputs)


def _plain(name: str) -> str:
    return name.replace(".", "_")  # buffers have no dots in their names
