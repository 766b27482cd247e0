"""A network in two parts gives what it gives as a whole."""

import logging

import pytest
import torch
from torch import Tensor, nn

from reptile.models import ModuleNetwork, build_model, initialise, size, unflatten
from reptile.models.cut import Cut, split
from reptile.objectives import CLASSIFICATION
from reptile.settings import Adapt, LastBlocks, ModelSettings

GREY = (1, 32, 32)
SHUFFLENET = "torchvision:shufflenet_v2_x0_5"


def cut(model: ModuleNetwork) -> Cut:
    parts = split(model)
    assert parts is not None
    return parts


def network(name: str, adapt: Adapt, outputs: int = 5) -> ModuleNetwork:
    settings = ModelSettings(name=name, filters=2, mean=(0.5,))
    model = build_model(settings, outputs, GREY, adapt=adapt)
    assert isinstance(model, ModuleNetwork)
    return model


@pytest.mark.parametrize(
    ("name", "adapt"),
    [
        ("resnet12", "head"),
        ("resnet12", LastBlocks(last=1)),
        ("resnet12", ("blocks.2.norm2.*",)),
        (SHUFFLENET, "head"),
        (SHUFFLENET, "norms"),
        (SHUFFLENET, LastBlocks(last=1)),
    ],
)
def test_both_parts_together_are_the_network(name: str, adapt: Adapt) -> None:
    model = network(name, adapt)
    fixed, tail, _ = cut(model)
    assert list(tail.shapes.items()) == list(model.shapes.items())
    weights = initialise(model, 0)
    params = unflatten(model, weights + 0.1 * torch.randn(size(model)))
    images, others = torch.rand(6, *GREY), torch.rand(5, *GREY)
    with torch.no_grad():
        values, other_values = fixed(images), fixed(others)
        assert values.shape[1:] == tail.image_shape
        torch.testing.assert_close(tail.forward(params, values), model.forward(params, images))
        torch.testing.assert_close(tail.features(params, values), model.features(params, images))
        statistics = tail.statistics(params, other_values)
        torch.testing.assert_close(statistics, model.statistics(params, others))
        torch.testing.assert_close(
            tail.forward(params, values, statistics or None),
            model.forward(params, images, statistics or None),
        )


@pytest.mark.parametrize("adapt", ["head", LastBlocks(last=1)])
def test_the_tail_has_the_networks_gradient(adapt: Adapt) -> None:
    model = network("resnet12", adapt)
    fixed, tail, _ = cut(model)
    images, weights = torch.rand(6, *GREY), initialise(model, 0)
    whole = torch.func.grad(lambda w: model.forward(unflatten(model, w), images).square().sum())
    part = torch.func.grad(lambda w: tail.forward(unflatten(tail, w), fixed(images)).square().sum())
    torch.testing.assert_close(part(weights), whole(weights))


def test_the_cut_is_as_late_as_it_can_be() -> None:
    assert cut(network("resnet12", "head")).tail.image_shape == (20,)
    assert cut(network("resnet12", LastBlocks(last=1))).tail.image_shape == (10, 4, 4)
    assert cut(network("resnet12", "head")).where == "mean"
    assert cut(network("resnet12", LastBlocks(last=2))).where == "blocks.1"


def test_a_values_row_depends_on_its_image_alone() -> None:
    fixed = cut(network(SHUFFLENET, LastBlocks(last=1))).fixed
    images = torch.rand(4, *GREY)
    with torch.no_grad():
        alone = torch.cat([fixed(image[None]) for image in images])
        torch.testing.assert_close(fixed(images), alone)


def test_a_frozen_network_without_a_head_is_all_fixed() -> None:
    model = network("resnet12", "head", outputs=0)
    fixed, tail, _ = cut(model)
    images = torch.rand(3, *GREY)
    features = model.features({}, images)
    torch.testing.assert_close(tail.features({}, fixed(images)), features)
    torch.testing.assert_close(tail.forward({}, fixed(images)), features)


class Branches(nn.Module):
    """A fixed and a fixed branch that only meet behind an adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)
        self.middle, self.head = nn.Conv2d(2, 2, 1), nn.Linear(2 * 30 * 30, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        outputs: Tensor = self.head((self.middle(left) * right).flatten(1))
        return outputs


def test_without_a_single_tensor_the_whole_network_runs(caplog: pytest.LogCaptureFixture) -> None:
    model = ModuleNetwork(Branches(), GREY, 5, CLASSIFICATION, adapt=("middle.*", "head.*"))
    with caplog.at_level(logging.INFO):
        assert split(model) is None
    assert "no single tensor parts them" in caplog.text


class Choosy(nn.Module):
    """What torch.fx cannot follow, in front or behind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        outputs: Tensor = self.head(x if float(x.detach().sum()) > 0 else -x)
        return outputs


class Behind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.last = Choosy(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.front(x[:, 0, 0, :4]))
        return outputs


def test_a_fixed_part_may_do_what_cannot_be_traced_and_an_adapted_one_runs_with_the_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = Behind()
    assert cut(ModuleNetwork(module, GREY, 5, CLASSIFICATION, adapt="head")).where == "front"
    with caplog.at_level(logging.INFO):
        model = ModuleNetwork(module, GREY, 5, CLASSIFICATION, adapt=("front.head.*",))
        assert split(model) is None
    assert "it cannot be traced" in caplog.text


def test_a_network_without_a_fixed_part_is_not_cut() -> None:
    assert split(network("resnet12", "all")) is None
    assert split(build_model(ModelSettings(), 5, GREY)) is None
