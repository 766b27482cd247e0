"""The traced gradient against autograd, both in float64."""

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.export.forms import form_of
from reptile.export.gradient import trace_gradient
from reptile.export.reference import SupportSet
from reptile.export.rows import Layout
from reptile.models import Model, Network, build_model, initialise, unflatten
from reptile.objectives import to_unit
from reptile.settings import ModelSettings


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
    "mlp": (ModelSettings(name="mlp", hidden=(7,)), (1, 5, 4)),
    "deep": (ModelSettings(name="mlp", hidden=(7, 6), activation="tanh"), (1, 5, 4)),
}


Gradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def traced_gradient(model: Model) -> Gradient:
    """The traced graph with weights, images, labels and gradient as autograd has them."""
    form = form_of(model)
    graph = trace_gradient(form)

    def run(weights: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.tensor(1 / len(images))
        targets = F.one_hot(labels, model.outputs).double()
        gradient, loss = graph(form.pack(weights), form.fixed(images), targets, share)
        return form.unpack(gradient), loss

    return run


@pytest.mark.parametrize("name", MODELS)
def test_traced_gradient_equals_autograd(name: str, make_task: Callable[..., SupportSet]) -> None:
    settings, shape = MODELS[name]
    model = build_model(settings, 3, shape)
    traced = traced_gradient(model)
    for size in (1, 2, 7):  # none is the size it was traced with
        task = make_task(shape, size, 0)
        images = to_unit(torch.from_numpy(task.images)).double()
        labels = torch.from_numpy(task.labels)
        # Off the initialisation: its zero biases put dead units on the ReLU's kink, where rounding
        # decides.
        noise = torch.rand(len(initialise(model, 0)), generator=torch.Generator().manual_seed(size))
        weights = (initialise(model, size) + 0.1 * (noise - 0.5)).double().requires_grad_()
        loss = F.cross_entropy(model.forward(unflatten(model, weights), images), labels)
        (wanted,) = torch.autograd.grad(loss, weights)
        gradient, value = traced(weights.detach(), images, labels)
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("downsampling", ["stride", "pool"])
def test_ties_and_dead_units_have_the_gradients_of_autograd(
    downsampling: Literal["stride", "pool"],
) -> None:
    model = build_model(ModelSettings(filters=4, downsampling=downsampling), 3, (1, 9, 9))
    traced = traced_gradient(model)
    weights = initialise(model, 0).double().requires_grad_()
    for images in (torch.zeros(6, 1, 9, 9), torch.ones(6, 1, 9, 9)):
        labels, images = torch.arange(6) % 3, images.double()
        loss = F.cross_entropy(model.forward(unflatten(model, weights), images), labels)
        (wanted,) = torch.autograd.grad(loss, weights)
        gradient, _ = traced(weights.detach(), images, labels)
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_packing_loses_nothing(name: str) -> None:
    settings, shape = MODELS[name]
    model = build_model(settings, 3, shape)
    assert isinstance(model, Network)
    layout, weights = Layout(model), initialise(model, 0)
    packed = layout.pack(weights)
    assert torch.equal(layout.unpack(packed), weights)
    assert torch.equal(packed.sort().values, weights.sort().values)
