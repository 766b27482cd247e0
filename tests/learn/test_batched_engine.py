"""The batched engine against the eager one, in float64 where nothing hides behind rounding."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patterns import make_data

from reptile.learn.engines import EagerEngine
from reptile.learn.engines.batched import BatchedEngine, patches
from reptile.learn.optimizer import OptimizerState
from reptile.models import Model, build_model, initialise
from reptile.objectives import REGRESSION
from reptile.settings import BATCH_NORM_MODES, BatchNormMode, ModelSettings, OptimizerSettings
from reptile.tasks import FewShotProtocol, Purpose, Task, held_out_task, random_stream

CPU = torch.device("cpu")
OPTIMIZERS = {
    "adam": OptimizerSettings(),
    "decay": OptimizerSettings(weight_decay=0.99),
    "sgd": OptimizerSettings(name="sgd", learning_rate=0.1),
}
MODELS = {
    "stride": (ModelSettings(filters=6), (1, 14, 13)),
    "pool": (ModelSettings(filters=5, downsampling="pool"), (3, 21, 18)),
    "mlp": (ModelSettings(name="mlp"), (1, 8, 8)),
    "deep": (ModelSettings(name="mlp", hidden=(9, 5), activation="tanh"), (1, 8, 8)),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[Model, np.ndarray, list[Task]]:
    settings, shape = MODELS[request.param]
    data = make_data(shape)
    protocol = FewShotProtocol(ways=4, shots=2, queries=2, steps=6, batch=3)
    streams = (random_stream(0, Purpose.EVALUATE, number) for number in range(3))
    tasks = [held_out_task(stream, data.split("test"), protocol) for stream in streams]
    return build_model(settings, 4, shape), data.images, tasks


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_adapting_side_by_side_equals_one_after_another(
    optimizer: OptimizerSettings, case: tuple[Model, np.ndarray, list[Task]]
) -> None:
    model, pixels, tasks = case
    weights = initialise(model, 0).double()
    state = OptimizerState(torch.rand_like(weights) * 1e-2, 40)
    eager = EagerEngine(model, optimizer, pixels, CPU).adapt(weights, state, tasks)
    found = BatchedEngine(model, optimizer, pixels, CPU).adapt(weights, state, tasks)
    torch.testing.assert_close(found.weights, eager.weights, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        found.state.second_moment, eager.state.second_moment, rtol=1e-9, atol=1e-15
    )
    torch.testing.assert_close(found.losses, eager.losses, rtol=1e-9, atol=1e-12)
    assert found.state.step == eager.state.step == 46


def test_regressors_adapt_side_by_side_too() -> None:
    model = build_model(MODELS["deep"][0], 2, (1, 1, 1), REGRESSION)
    rng, weights = np.random.default_rng(0), initialise(model, 0).double()
    points = rng.uniform(-5, 5, (30, 1, 1, 1)).astype(np.float32)
    nothing, batches = np.empty(0, dtype=np.int64), (np.arange(4), np.arange(4, 8))
    tasks = [
        Task(rng.permutation(30)[:8], rng.normal(size=(8, 2)), nothing, nothing, batches)
        for _ in range(3)
    ]
    state = OptimizerState(torch.zeros_like(weights), 0)
    eager, found = (
        kind(model, OPTIMIZERS["sgd"], points, CPU).adapt(weights, state, tasks)
        for kind in (EagerEngine, BatchedEngine)
    )
    torch.testing.assert_close(found.weights, eager.weights, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.losses, eager.losses, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", BATCH_NORM_MODES)
def test_predictions_equal_the_eager_engines(
    mode: BatchNormMode, case: tuple[Model, np.ndarray, list[Task]]
) -> None:
    model, pixels, tasks = case
    weights = torch.stack([initialise(model, seed) for seed in range(3)]).double()
    found = BatchedEngine(model, OPTIMIZERS["adam"], pixels, CPU).predict(weights, tasks, mode)
    eager = EagerEngine(model, OPTIMIZERS["adam"], pixels, CPU).predict(weights, tasks, mode)
    assert found.shape == (3, 8, 4)
    torch.testing.assert_close(found, eager, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0), (1, 0)])
def test_patches_convolve(stride: int, padding: int) -> None:
    images, weight, bias = torch.rand(2, 3, 9, 8), torch.rand(5, 3, 3, 2), torch.rand(5)
    torch.testing.assert_close(
        patches(images, weight, bias, stride, padding),
        F.conv2d(images, weight, bias, stride, padding),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_captured_inner_loop_equals_the_eager_one_every_time(
    case: tuple[Model, np.ndarray, list[Task]],
) -> None:
    model, pixels, tasks = case
    cuda = torch.device("cuda")
    engine = BatchedEngine(model, OPTIMIZERS["sgd"], pixels, cuda)
    for seed in (0, 1):  # the second call replays the graph on other weights
        weights = initialise(model, seed)
        state = OptimizerState(torch.zeros_like(weights), seed)
        eager = EagerEngine(model, OPTIMIZERS["sgd"], pixels, CPU).adapt(weights, state, tasks)
        there = OptimizerState(state.second_moment.to(cuda), seed)
        found = engine.adapt(weights.to(cuda), there, tasks)
        torch.testing.assert_close(found.weights.cpu(), eager.weights, rtol=1e-4, atol=1e-5)
