"""The traced gradient against autograd, both in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from reptile.config import ModelSettings
from reptile.export.reference import SupportSet
from reptile.export.step import convolution_backward, trace_gradient
from reptile.models import build_model, initialise, to_unit, unflatten


@pytest.fixture(autouse=True)
def trace_in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


MODELS = {
    "stride, even sizes": (ModelSettings(filters=4), (1, 12, 16)),
    "stride, odd sizes, RGB": (ModelSettings(filters=4), (3, 13, 11)),
    "pool, even sizes": (ModelSettings(filters=4, downsampling="pool"), (1, 12, 8)),
    "pool, odd sizes, RGB": (ModelSettings(filters=4, downsampling="pool"), (3, 11, 13)),
    "mlp": (ModelSettings(name="mlp", hidden=7), (1, 5, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_traced_gradient_equals_autograd(name: str, make_task: Callable[..., SupportSet]) -> None:
    settings, shape = MODELS[name]
    model = build_model(settings, 3, shape)
    traced = trace_gradient(model)
    for size in (1, 2, 7):  # none is the size it was traced with
        task = make_task(shape, size, 0)
        images = to_unit(torch.from_numpy(task.images)).double()
        labels = torch.from_numpy(task.labels)
        weights = initialise(model, size).double().requires_grad_()
        loss = F.cross_entropy(model.logits(unflatten(model, weights), images), labels)
        (wanted,) = torch.autograd.grad(loss, weights)
        gradient, value = traced(weights.detach(), images, labels)
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("downsampling", ["stride", "pool"])
def test_ties_and_dead_units_have_the_gradients_of_autograd(downsampling: str) -> None:
    model = build_model(ModelSettings(filters=4, downsampling=downsampling), 3, (1, 9, 9))
    traced = trace_gradient(model)
    weights = initialise(model, 0).double().requires_grad_()
    for images in (torch.zeros(6, 1, 9, 9), torch.ones(6, 1, 9, 9)):
        labels, images = torch.arange(6) % 3, images.double()
        loss = F.cross_entropy(model.logits(unflatten(model, weights), images), labels)
        (wanted,) = torch.autograd.grad(loss, weights)
        gradient, _ = traced(weights.detach(), images, labels)
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(7, 8), (9, 5)])
def test_convolution_backward_equals_torchs(
    stride: int, padding: int, size: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64)
    output = F.conv2d(x, weight, stride=stride, padding=padding)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [True, True, False])
    found = convolution_backward(gradient, x, weight, None, *geometry)
    wanted = torch.ops.aten.convolution_backward(gradient, x, weight, None, *geometry)
    for got, want in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(got, want)


def test_convolutions_that_no_model_has_are_refused() -> None:
    x = torch.zeros(1, 2, 4, 4)
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 2, [True, True, False])
    with pytest.raises(NotImplementedError, match="groups"):
        convolution_backward(x, x, torch.zeros(2, 1, 1, 1), None, *geometry)
