"""The networks against independent implementations of the same definitions."""

import itertools
import math
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from reptile.errors import InputError
from reptile.models import (
    BATCH_NORM_EPSILON,
    build_model,
    flatten,
    initialise,
    mask_absent_outputs,
    size,
    unflatten,
)
from reptile.objectives import REGRESSION, to_unit
from reptile.settings import ModelSettings


def same_pads(length: int, window: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: as many outputs as length / stride, the odd pad at the end."""
    total = max((math.ceil(length / stride) - 1) * stride + window - length, 0)
    return total // 2, total - total // 2


def plain_conv4(params: dict[str, np.ndarray], x: np.ndarray, downsampling: str) -> np.ndarray:
    """Conv4 in numpy, from its definition, float64."""
    for layer in range(1, 5):
        stride = 2 if downsampling == "stride" else 1
        pads = [same_pads(length, 3, stride) for length in x.shape[2:]]
        x = np.pad(x, [(0, 0), (0, 0), *pads])
        windows = sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
        x = np.einsum("bchwij,fcij->bfhw", windows, params[f"conv{layer}.weight"])
        mean = x.mean((0, 2, 3), keepdims=True)
        variance = x.var((0, 2, 3), keepdims=True)
        x = (x - mean) / np.sqrt(variance + BATCH_NORM_EPSILON)
        scale, shift = params[f"norm{layer}.weight"], params[f"norm{layer}.bias"]
        x = x * scale[:, None, None] + shift[:, None, None]
        if downsampling == "pool":
            pads = [same_pads(length, 2, 2) for length in x.shape[2:]]
            x = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=-np.inf)
            x = sliding_window_view(x, (2, 2), axis=(2, 3))[:, :, ::2, ::2].max((-1, -2))
        x = np.maximum(x, 0)
    return x.reshape(len(x), -1) @ params["head.weight"].T + params["head.bias"]


@pytest.mark.parametrize("downsampling", ["stride", "pool"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 21, 21), (1, 10, 13), (1, 5, 5)])
def test_conv4_equals_its_definition_in_numpy(
    downsampling: Literal["stride", "pool"], shape: tuple[int, int, int]
) -> None:
    model = build_model(ModelSettings(filters=4, downsampling=downsampling), 3, shape)
    weights = initialise(model, 0).double()
    weights += 0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    params = unflatten(model, weights)
    images = torch.rand(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain = plain_conv4({k: v.numpy() for k, v in params.items()}, images.numpy(), downsampling)
    torch.testing.assert_close(model.forward(params, images), torch.from_numpy(plain))


@pytest.mark.parametrize("downsampling", ["stride", "pool"])
def test_own_statistics_given_back_change_nothing(downsampling: Literal["stride", "pool"]) -> None:
    model = build_model(ModelSettings(filters=4, downsampling=downsampling), 3, (1, 14, 14))
    params = unflatten(model, initialise(model, 0).double())
    images = torch.rand(6, 1, 14, 14, dtype=torch.float64)
    frozen = model.forward(params, images, model.statistics(params, images))
    torch.testing.assert_close(frozen, model.forward(params, images))


@pytest.mark.parametrize("hidden", [(7,), (7, 3), (2, 9, 4)])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_mlp_equals_its_definition_in_numpy(hidden: tuple[int, ...], activation: str) -> None:
    settings = ModelSettings.model_validate(
        {"name": "mlp", "hidden": hidden, "activation": activation}
    )
    model = build_model(settings, 4, (1, 6, 6))
    weights = initialise(model, 0).double()
    weights += 0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    p = {name: value.numpy() for name, value in unflatten(model, weights).items()}
    images = torch.rand(3, 1, 6, 6, dtype=torch.float64)
    x = images.numpy().reshape(3, 36)
    for layer in range(1, len(hidden) + 1):
        x = x @ p[f"hidden{layer}.weight"].T + p[f"hidden{layer}.bias"]
        x = np.tanh(x) if activation == "tanh" else np.maximum(x, 0)
    plain = x @ p["head.weight"].T + p["head.bias"]
    torch.testing.assert_close(
        model.forward(unflatten(model, weights), images), torch.from_numpy(plain)
    )
    widths = (36, *hidden, 4)
    assert size(model) == sum(a * b + b for a, b in itertools.pairwise(widths))


def test_losses_equal_their_definitions() -> None:
    rng = np.random.default_rng(0)
    found = rng.normal(size=(6, 3))
    labels, values = rng.integers(0, 3, 6), rng.normal(size=(6, 3))
    probabilities = np.exp(found) / np.exp(found).sum(1, keepdims=True)
    logits, sizes = torch.from_numpy(found), (ModelSettings(name="mlp"), 3, (1, 2, 2))
    classifier, regressor = build_model(*sizes), build_model(*sizes, REGRESSION)
    entropy = -np.log(probabilities[np.arange(6), labels]).mean()
    assert float(classifier.objective.loss(logits, torch.from_numpy(labels))) == pytest.approx(
        entropy
    )
    error = ((found - values) ** 2).mean()
    assert float(regressor.objective.loss(logits, torch.from_numpy(values))) == pytest.approx(error)
    # Values of a single output may come as a plain row, and must not be broadcast.
    error = ((found[:, 0] - values[:, 0]) ** 2).mean()
    row = torch.from_numpy(values[:, 0])
    assert float(regressor.objective.loss(logits[:, :1], row)) == pytest.approx(error)


def test_published_sizes_of_the_networks() -> None:
    omniglot = build_model(ModelSettings(), 5, (1, 28, 28))
    assert size(omniglot) == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64 + 256 * 5 + 5
    imagenet = build_model(ModelSettings(filters=32, downsampling="pool"), 5, (3, 84, 84))
    # SAME pooling rounds up: 84 → 42 → 21 → 11 → 6.
    assert imagenet.shapes["head.weight"] == (5, 32 * 6 * 6)


def test_one_tiny_image_gives_the_bias_and_no_error() -> None:
    model = build_model(ModelSettings(filters=4), 2, (1, 8, 8))  # 1x1 in the last layer
    params = unflatten(model, initialise(model, 0))
    logits = model.forward(params, torch.rand(1, 1, 8, 8))
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0], params["head.bias"])


def test_flatten_undoes_unflatten_for_a_batch_of_weights() -> None:
    model = build_model(ModelSettings(filters=3), 2, (3, 9, 9))
    weights = initialise(model, 5)
    assert torch.equal(flatten(model, unflatten(model, weights)), weights)
    both = unflatten(model, torch.stack([weights, -weights]))
    assert torch.equal(both["conv2.weight"][1], -unflatten(model, weights)["conv2.weight"])


def test_initialisation_is_glorot_uniform_and_seeded() -> None:
    model = build_model(ModelSettings(), 5, (1, 28, 28))
    assert torch.equal(initialise(model, 1), initialise(model, 1))
    assert not torch.equal(initialise(model, 1), initialise(model, 2))
    params = unflatten(model, initialise(model, 1))
    limit = math.sqrt(6 / (9 * 64 + 9 * 64))
    weight = params["conv2.weight"]
    assert weight.abs().max() <= limit
    assert abs(weight.std() - limit / math.sqrt(3)) < 0.01 * limit
    assert (params["norm3.weight"] == 1).all()
    assert not params["norm3.bias"].any()


def test_too_small_images_are_refused() -> None:
    with pytest.raises(InputError, match="2x2"):
        build_model(ModelSettings(), 5, (1, 1, 28))


def test_pixels_become_the_unit_interval() -> None:
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]


def test_silenced_outputs_get_no_probability_and_no_gradient() -> None:
    model = build_model(ModelSettings(name="mlp", hidden=(8,)), 5, (1, 4, 4))
    for dtype in (torch.float32, torch.float64):
        images = torch.rand(6, 1, 4, 4, dtype=dtype)
        labels = torch.tensor([0, 2, 0, 2, 2, 0])
        present = torch.isin(torch.arange(5), labels)
        weights = mask_absent_outputs(
            model, initialise(model, 0).to(dtype), present
        ).requires_grad_()
        logits = model.forward(unflatten(model, weights), images)
        assert (logits.softmax(1)[:, ~present] == 0).all()
        heard = torch.nn.functional.cross_entropy(logits[:, [0, 2]], labels // 2)
        loss = model.objective.loss(logits, labels)
        torch.testing.assert_close(loss, heard)
        loss.backward()
        assert weights.grad is not None
        gradient = unflatten(model, weights.grad)
        for name in ("head.weight", "head.bias"):
            assert (gradient[name][~present] == 0).all()
            assert (gradient[name][present] != 0).any()


def test_where_all_labels_are_present_silencing_changes_nothing() -> None:
    model = build_model(ModelSettings(filters=4), 3, (1, 8, 8))
    weights = initialise(model, 1)
    present = torch.ones(3, dtype=torch.bool)
    assert torch.equal(mask_absent_outputs(model, weights, present), weights)
    both = mask_absent_outputs(model, weights.expand(2, -1), present)
    assert torch.equal(both, weights.expand(2, -1))
