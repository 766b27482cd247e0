"""The native engine's features and their gradient against eager PyTorch in float64."""

import numpy as np
import pytest
import torch

from reptile.errors import InputError
from reptile.learn.engines import EagerEngine
from reptile.learn.engines.native import NativeEngine
from reptile.models import Model, build_model, initialise
from reptile.settings import ModelSettings, OptimizerSettings

pytestmark = pytest.mark.usefixtures("kernel")
MODELS = {
    "stride": (ModelSettings(), (1, 28, 28)),
    "odd": (ModelSettings(filters=20), (3, 15, 22)),
    "pool": (ModelSettings(filters=9, downsampling="pool"), (3, 21, 18)),
    "mlp": (ModelSettings(name="mlp", hidden=(40,)), (1, 9, 9)),
    "deep": (ModelSettings(name="mlp", hidden=(20, 40, 3), activation="tanh"), (1, 9, 9)),
}
OPTIMIZER = OptimizerSettings()


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[Model, np.ndarray, np.ndarray]:
    settings, shape = MODELS[request.param]
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, *shape), dtype=np.uint8)
    return build_model(settings, 0, shape), pixels, rng.integers(0, 40, 31)


def features_and_gradient(
    engine: EagerEngine | NativeEngine, weights: torch.Tensor, rows: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = weights.detach().requires_grad_()
    features = engine.features(weights, rows)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(features.shape, generator=generator).to(features.dtype)
    (gradient,) = torch.autograd.grad((features * direction).sum(), weights)
    return features.detach(), gradient


def test_features_and_gradient_equal_float64_for_any_number_of_threads(
    case: tuple[Model, np.ndarray, np.ndarray],
) -> None:
    model, pixels, rows = case
    weights = initialise(model, 0)
    eager = EagerEngine(model, OPTIMIZER, pixels, torch.device("cpu"))
    features, gradient = features_and_gradient(eager, weights.double(), rows)
    results = [
        features_and_gradient(NativeEngine(model, OPTIMIZER, pixels, threads), weights, rows)
        for threads in (1, 2, 3)
    ]
    assert results[0][0].shape == (31, model.feature_size)
    assert (results[0][0] - features).abs().max() <= 5e-6 * features.abs().max()
    assert (results[0][1] - gradient).norm() <= 2e-5 * gradient.norm()
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


def test_a_gradient_after_another_call_is_refused() -> None:
    settings, shape = MODELS["odd"]
    pixels = np.zeros((8, *shape), dtype=np.uint8)
    model = build_model(settings, 0, shape)
    engine = NativeEngine(model, OPTIMIZER, pixels)
    weights = initialise(model, 0).requires_grad_()
    first = engine.features(weights, np.arange(8))
    engine.features(weights, np.arange(8))
    with pytest.raises(RuntimeError, match="overwritten"):
        first.sum().backward()


def test_no_rows_and_rows_out_of_range_are_refused() -> None:
    settings, shape = MODELS["odd"]
    model = build_model(settings, 0, shape)
    engine = NativeEngine(model, OPTIMIZER, np.zeros((8, *shape), dtype=np.uint8))
    weights = initialise(model, 0)
    with pytest.raises(InputError, match="no rows"):
        engine.features(weights, np.empty(0, dtype=np.int64))
    with pytest.raises(InputError, match="row of the images 8"):
        engine.features(weights, np.array([0, 8]))
