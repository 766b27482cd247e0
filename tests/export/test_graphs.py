"""The exported graphs in ONNX Runtime against the eager engine."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from reptile.export import reference
from reptile.export.fold import fold
from reptile.export.forms import form_of
from reptile.export.graphs import Adapt, Spec, build_graphs, tidy
from reptile.export.reference import SupportSet
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.reptile import MetaState
from reptile.models import build_model, flatten, unflatten
from reptile.objectives import to_unit
from reptile.settings import ModelSettings, OptimizerSettings

MAX_STEPS = 12
HEAD = ("head.weight", "head.bias")
CASES: dict[str, tuple[ModelSettings, tuple[int, int, int], OptimizerSettings]] = {
    "conv4 stride, odd RGB, adam with decay": (
        ModelSettings(filters=8),
        (3, 13, 10),
        OptimizerSettings(weight_decay=0.99),
    ),
    "conv4 pool, odd grey, sgd": (
        ModelSettings(filters=8, downsampling="pool"),
        (1, 15, 13),
        OptimizerSettings(name="sgd", learning_rate=0.1),
    ),
    "mlp, adam": (
        ModelSettings(name="mlp", hidden=(16,)),
        (1, 6, 6),
        OptimizerSettings(learning_rate=0.01),
    ),
}
Run = Callable[[str, dict[str, Any]], dict[str, Any]]


class Exported:
    """One case: its checkpoint, and its graphs in ONNX Runtime."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.graphs = build_graphs(checkpoint, MAX_STEPS)
        self.sessions = {
            name: ort.InferenceSession(
                graph.SerializeToString(), providers=["CPUExecutionProvider"]
            )
            for name, graph in self.graphs.items()
        }

    def run(self, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        session = self.sessions[graph]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Checkpoint]) -> Exported:
    return Exported(make_checkpoint(*CASES[request.param]))


@pytest.fixture(scope="module")
def tiny(make_checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    return make_checkpoint(*CASES["mlp, adam"])


def close(found: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=False)


def test_adapt_equals_the_eager_engine(
    case: Exported, make_task: Callable[..., SupportSet]
) -> None:
    shape = case.checkpoint.model.image_shape
    for size, steps, batch in ((1, 3, 2), (5, 1, 4), (9, 8, 5), (30, 4, 30)):
        task = make_task(shape, size, steps, batch, seed=size)
        found = case.run("adapt", task.feeds(case.checkpoint))
        wanted = reference.adapt(case.checkpoint, task, torch.float64)
        assert found["finite"]
        assert set(found) == {*wanted, "finite"}
        for name, value in wanted.items():
            close(found[name], value)


def test_no_step_gives_the_initialisation_folded_with_the_support_set(
    case: Exported, make_task: Callable[..., SupportSet]
) -> None:
    model, state, _ = case.checkpoint
    task = make_task(model.image_shape, 6, 0)
    found = case.run("adapt", task.feeds(case.checkpoint))
    images = to_unit(torch.from_numpy(task.images))
    for name, value in fold(model, unflatten(model, state.weights), images).items():
        close(found[name], value)
    assert found["losses"].shape == (0,) and found["finite"]


def test_predicting_equals_the_model_and_few_shot_joins_the_two(
    case: Exported, make_task: Callable[..., SupportSet]
) -> None:
    model = case.checkpoint.model
    task = make_task(model.image_shape, 6, 5)
    images = make_task(model.image_shape, 4, 0, seed=3).images
    pixels = images.astype(np.float32)
    close(
        case.run("predict", {"images": pixels})["logits"],
        reference.predict(case.checkpoint, images, torch.float64),
    )
    feeds = task.feeds(case.checkpoint)
    adapted = case.run("adapt", feeds)
    weights = {name: adapted[name] for name in adapted if name not in ("losses", "finite")}
    logits = case.run("predict_adapted", {"images": pixels} | weights)["logits"]
    close(logits, reference.predict_adapted(case.checkpoint, weights, images, torch.float64))
    both = case.run("few_shot", feeds | {"query_images": pixels})
    close(both["logits"], logits)
    close(both["losses"], adapted["losses"])


def test_folding_equals_batch_norm_with_the_support_sets_statistics(
    case: Exported, make_task: Callable[..., SupportSet]
) -> None:
    model, state, _ = case.checkpoint
    support, queries = (
        to_unit(torch.from_numpy(make_task(model.image_shape, 6, 0, seed=seed).images)).double()
        for seed in (1, 2)
    )
    params = unflatten(model, state.weights.double())
    frozen = model.forward(params, queries, model.statistics(params, support))
    torch.testing.assert_close(model.forward(fold(model, params, support), queries), frozen)


def cut(checkpoint: Checkpoint, labels: list[int]) -> Checkpoint:
    """The same network with these outputs alone."""
    model, (weights, inner), info = checkpoint.model, checkpoint.meta, checkpoint.info
    settings = info.settings.model_copy(update={"ways": len(labels)})
    small = build_model(settings.model, len(labels), info.image_shape)

    def select(flat: torch.Tensor) -> torch.Tensor:
        params = unflatten(model, flat)
        return flatten(small, params | {k: params[k][labels] for k in HEAD})

    state = MetaState(select(weights), inner._replace(second_moment=select(inner.second_moment)))
    return Checkpoint(small, state, info.model_copy(update={"settings": settings}))


@pytest.mark.parametrize("labels", [[0, 1], [0, 2], [1, 2]])
def test_a_task_of_fewer_classes_adapts_as_if_the_head_had_no_others(
    case: Exported, make_task: Callable[..., SupportSet], labels: list[int]
) -> None:
    checkpoint, small = case.checkpoint, cut(case.checkpoint, labels)
    task = make_task(checkpoint.model.image_shape, 8, 6)
    places = np.arange(8) % 2
    task = task._replace(labels=np.array(labels)[places])
    found = case.run("adapt", task.feeds(checkpoint))
    wanted = reference.adapt(small, task._replace(labels=places), torch.float64)
    for name, value in wanted.items():
        close(found[name][labels] if name in HEAD else found[name], value)
    queries = make_task(checkpoint.model.image_shape, 4, 0, seed=3).images.astype(np.float32)
    feeds = task.feeds(checkpoint) | {"query_images": queries}
    logits = case.run("few_shot", feeds)["logits"]
    (absent,) = set(range(3)) - set(labels)
    assert (np.exp(logits[:, absent] - logits.max(1)) == 0).all()


def test_wild_labels_positions_and_step_counts_are_clamped(
    case: Exported, make_task: Callable[..., SupportSet]
) -> None:
    ways = case.checkpoint.model.outputs
    task = make_task(case.checkpoint.model.image_shape, 6, MAX_STEPS + 5)
    feeds = task.feeds(case.checkpoint)
    wanted = case.run("adapt", task.first(MAX_STEPS).feeds(case.checkpoint))
    wild = {
        "support_labels": np.select(
            [task.labels == 0, task.labels == ways - 1], [-5, 99], task.labels
        ),
        "batches": np.select(
            [task.batches == 0, task.batches == 5], [-(2**40), 2**40], task.batches
        ),
    }
    found = case.run("adapt", feeds | wild)
    assert found["losses"].shape == (MAX_STEPS,)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def test_numbers_that_diverge_are_reported(
    case: Exported, make_task: Callable[..., SupportSet]
) -> None:
    feeds = make_task(case.checkpoint.model.image_shape, 6, 3).feeds(case.checkpoint)
    for name, value in (
        ("learning_rate", np.array(np.inf, dtype=np.float32)),
        ("support_images", np.full_like(feeds["support_images"], np.nan)),
    ):
        assert not case.run("adapt", feeds | {name: value})["finite"]


def test_a_zero_gradient_moves_nothing_even_with_no_second_moment(
    case: Exported, make_task: Callable[..., SupportSet]
) -> None:
    """Adam without its epsilon would divide zero by zero here."""
    graph = onnx.ModelProto.FromString(case.graphs["adapt"].SerializeToString())
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    for name in ("initial_weights", "second_moment"):
        if name in tensors:
            zero = np.zeros(tensors[name].dims, dtype=np.float32)
            tensors[name].CopyFrom(onnx.numpy_helper.from_array(zero, name))
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    task = make_task(case.checkpoint.model.image_shape, 3, 4)
    _, finite, first, *_ = session.run(None, task.feeds(case.checkpoint))
    assert finite
    np.testing.assert_array_equal(first, 0)


def test_bias_corrections_are_exact_for_young_and_old_states(
    tiny: Checkpoint, make_task: Callable[..., SupportSet]
) -> None:
    task = make_task(tiny.model.image_shape, 4, 3)
    feeds = [torch.from_numpy(value) for value in task.feeds(tiny).values()]
    for step in (0, 1, 10_000, 2**24 + 1):
        inner = tiny.meta.inner._replace(step=step)
        old = tiny._replace(state=tiny.meta._replace(inner=inner))
        _, _, weight, *_ = Adapt(old, form_of(old.model), MAX_STEPS)(*feeds)
        close(weight, reference.adapt(old, task, torch.float64)["hidden1.weight"])


def test_exporting_twice_gives_the_same_bytes(tiny: Checkpoint) -> None:
    first, second = build_graphs(tiny, MAX_STEPS), build_graphs(tiny, MAX_STEPS)
    for name, graph in first.items():
        bytes_of = [g.SerializeToString(deterministic=True) for g in (graph, second[name])]
        assert bytes_of[0] == bytes_of[1]


def test_plain_sgd_carries_no_second_moment(case: Exported) -> None:
    sizes = {
        t.name: onnx.numpy_helper.to_array(t).size
        for t in case.graphs["adapt"].graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT
    }
    sgd = case.checkpoint.info.settings.optimizer.name == "sgd"
    assert ("epsilon" in sizes) is not sgd
    assert sum(size > 100 for size in sizes.values()) == (1 if sgd else 2)


def test_constants_that_nothing_reads_are_dropped() -> None:
    """ONNX Runtime prints a warning of each to a consumer's terminal."""
    float32 = onnx.TensorProto.FLOAT
    out = onnx.helper.make_tensor_value_info("out", float32, [])
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["inside"], ["out"])], "inner", [], [out]
    )
    branch = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    result = onnx.helper.make_tensor_value_info("y", float32, [])
    constants = [
        onnx.helper.make_tensor("c", onnx.TensorProto.BOOL, [], [True]),
        onnx.helper.make_tensor("inside", float32, [], [1.0]),
        onnx.helper.make_tensor("unread", float32, [], [2.0]),
    ]
    graph = onnx.helper.make_graph([branch], "g", [], [result], constants)
    tidied = tidy("g", onnx.helper.make_model(graph), {}, {"y": Spec(torch.float32, ())})
    assert [each.name for each in tidied.graph.initializer] == ["c", "inside"]
    onnx.checker.check_model(tidied)
