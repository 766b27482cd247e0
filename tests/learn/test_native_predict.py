"""The native engine's predictions against eager PyTorch in float64, in the three modes."""

import numpy as np
import pytest
import torch

from reptile.data.dataset import ClassRange
from reptile.errors import InputError
from reptile.learn.engines import EagerEngine
from reptile.learn.engines.native import NativeEngine
from reptile.models import Model, build_model, initialise
from reptile.settings import BATCH_NORM_MODES, BatchNormMode, ModelSettings, OptimizerSettings
from reptile.tasks import FewShotProtocol, Purpose, Task, held_out_task, random_stream

MODELS = {
    "stride": (ModelSettings(), (1, 28, 28)),
    "odd": (ModelSettings(filters=20), (3, 15, 22)),
    "pool": (ModelSettings(filters=9, downsampling="pool"), (3, 21, 18)),
    "mlp": (ModelSettings(name="mlp", hidden=(40,)), (1, 9, 9)),
    "deep": (ModelSettings(name="mlp", hidden=(20, 40, 3), activation="tanh"), (1, 9, 9)),
}
CLASSES = ClassRange(np.arange(8) * 12, np.full(8, 12))
OPTIMIZER = OptimizerSettings()
TASKS = 5


def draw(shots: int, queries: int) -> list[Task]:
    protocol = FewShotProtocol(ways=4, shots=shots, queries=queries, steps=1, batch=4)
    streams = (random_stream(0, Purpose.EVALUATE, number) for number in range(TASKS))
    return [held_out_task(stream, CLASSES, protocol) for stream in streams]


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[Model, np.ndarray, torch.Tensor]:
    settings, shape = MODELS[request.param]
    pixels = np.random.default_rng(0).integers(0, 256, (96, *shape), dtype=np.uint8)
    model = build_model(settings, 4, shape)
    return model, pixels, torch.stack([initialise(model, seed) for seed in range(TASKS)])


@pytest.mark.parametrize("mode", BATCH_NORM_MODES)
@pytest.mark.parametrize(("shots", "queries"), [(1, 1), (3, 2)])
def test_predictions_equal_float64_for_any_number_of_threads(
    mode: BatchNormMode,
    shots: int,
    queries: int,
    case: tuple[Model, np.ndarray, torch.Tensor],
) -> None:
    model, pixels, weights = case
    tasks = draw(shots, queries)
    eager = EagerEngine(model, OPTIMIZER, pixels, torch.device("cpu"))
    expected = eager.predict(weights.double(), tasks, mode)
    one, two, three = (
        NativeEngine(model, OPTIMIZER, pixels, threads).predict(weights, tasks, mode)
        for threads in (1, 2, 3)
    )
    assert one.shape == (TASKS, 4 * queries, 4)
    assert (one - expected).abs().max() <= 5e-6 * expected.abs().max()
    assert torch.equal(one, two)
    assert torch.equal(one, three)


def test_weights_of_one_task_serve_all() -> None:
    settings, shape = MODELS["odd"]
    pixels = np.random.default_rng(1).integers(0, 256, (96, *shape), dtype=np.uint8)
    model = build_model(settings, 4, shape)
    engine, weights = NativeEngine(model, OPTIMIZER, pixels), initialise(model, 0)
    each = engine.predict(weights.expand(TASKS, -1), draw(1, 1), "frozen")
    assert torch.equal(engine.predict(weights, draw(1, 1), "frozen"), each)


def test_tasks_of_unequal_sizes_and_rows_out_of_range_are_refused() -> None:
    settings, shape = MODELS["odd"]
    pixels = np.zeros((96, *shape), dtype=np.uint8)
    model = build_model(settings, 4, shape)
    engine = NativeEngine(model, OPTIMIZER, pixels)
    weights = initialise(model, 0).expand(2, -1)
    (small, *_), (large, *_) = draw(1, 1), draw(2, 1)
    with pytest.raises(InputError, match="equally many support and query images"):
        engine.predict(weights, [small, large], "frozen")
    none = small._replace(query=small.query[:0])
    with pytest.raises(InputError, match="not none"):
        engine.predict(weights, [none, none], "transductive")
    outside = small._replace(query=small.query + 96)
    with pytest.raises(InputError, match=r"row of the images \d+: must be in 0..95"):
        engine.predict(weights, [small, outside], "transductive")
    with pytest.raises(InputError, match="weights: the native engine takes float32"):
        engine.predict(weights.double(), [small, small], "frozen")
