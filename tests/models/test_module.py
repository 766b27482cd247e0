"""A module of the user's own, wrapped as a pure function of its parameters."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reptile.errors import InputError
from reptile.models import Conv4, ModuleNetwork, flatten, initialise, size, unflatten
from reptile.objectives import CLASSIFICATION, REGRESSION
from reptile.settings import ModelSettings

SHAPE = (1, 8, 8)


class Conv4Module(nn.Module):
    """The paper's network with plain torch layers."""

    def __init__(self, model: Conv4) -> None:
        super().__init__()
        filters, width = model.settings.filters, model.shapes["head.weight"][1]
        for layer in range(1, 5):
            channels = 1 if layer == 1 else filters
            # Inputs of 8, 4, 2 and 1 pixels: SAME padding is (0, 1), or (1, 1) of a single pixel.
            padding = nn.ZeroPad2d((1, 1, 1, 1) if layer == 4 else (0, 1, 0, 1))
            parts = OrderedDict(
                pad=padding,
                conv=nn.Conv2d(channels, filters, 3, 2, bias=False),
                norm=nn.BatchNorm2d(filters, eps=1e-3),
            )
            self.add_module(f"block{layer}", nn.Sequential(parts))
        self.head = nn.Linear(width, model.outputs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(1, 5):
            x = torch.relu(self.get_submodule(f"block{layer}")(x))
        logits: Tensor = self.head(x.flatten(1))
        return logits


@pytest.fixture
def stock() -> Conv4:
    return Conv4(3, SHAPE, ModelSettings(filters=4))


@pytest.fixture
def wrapped(stock: Conv4) -> ModuleNetwork:
    return ModuleNetwork(Conv4Module(stock), SHAPE, 3, CLASSIFICATION)


def renamed(stock: Conv4, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stock network's weights under the names of the module."""
    found = {}
    for name, value in params.items():
        layer, part = name.split(".")
        number = layer[-1]
        module = f"head.{part}" if layer == "head" else f"block{number}.{layer[:-1]}.{part}"
        found[module] = value
    return found


def test_a_module_computes_what_the_same_stock_network_computes(
    stock: Conv4, wrapped: ModuleNetwork
) -> None:
    params = unflatten(stock, initialise(stock, 1))
    own = renamed(stock, params)
    images, queries = torch.rand(6, *SHAPE), torch.rand(4, *SHAPE)
    torch.testing.assert_close(wrapped.forward(own, images), stock.forward(params, images))
    measured, theirs = wrapped.statistics(own, images), stock.statistics(params, images)
    torch.testing.assert_close(measured, theirs)
    torch.testing.assert_close(
        wrapped.forward(own, queries, measured), stock.forward(params, queries, theirs)
    )
    assert wrapped.has_batch_norm
    assert size(wrapped) == size(stock)


def hand_written(params: dict[str, Tensor], images: Tensor) -> Tensor:
    """The features of `Conv4Module` with calls of torch.nn.functional only."""
    x = images
    for layer in range(1, 5):
        pads = (1, 1, 1, 1) if layer == 4 else (0, 1, 0, 1)
        x = F.conv2d(F.pad(x, pads), params[f"block{layer}.conv.weight"], stride=2)
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
        x = (x - mean) / (variance + 1e-3).sqrt()
        x = x * params[f"block{layer}.norm.weight"][:, None, None]
        x = (x + params[f"block{layer}.norm.bias"][:, None, None]).relu()
    return x.flatten(1)


def test_features_are_what_the_head_sees(stock: Conv4, wrapped: ModuleNetwork) -> None:
    params = renamed(stock, unflatten(stock, torch.randn(size(stock), dtype=torch.float64)))
    images = torch.rand(6, *SHAPE, dtype=torch.float64)
    features = wrapped.features(params, images)
    assert features.shape == (6, wrapped.feature_size)
    torch.testing.assert_close(features, hand_written(params, images))
    torch.testing.assert_close(
        wrapped.forward(params, images),
        features @ params["head.weight"].T + params["head.bias"],
    )


def test_given_statistics_make_features_of_each_image_alone(wrapped: ModuleNetwork) -> None:
    params = unflatten(wrapped, torch.randn(size(wrapped)))
    images = torch.rand(6, *SHAPE)
    given = wrapped.statistics(params, torch.rand(9, *SHAPE))
    alone = [wrapped.features(params, image[None], given) for image in images]
    torch.testing.assert_close(wrapped.features(params, images, given), torch.cat(alone))


def test_a_module_without_a_head_gives_its_outputs_flattened() -> None:
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh())
    wrapped = ModuleNetwork(module, SHAPE, 0, CLASSIFICATION)
    params, images = unflatten(wrapped, initialise(wrapped, 0)), torch.rand(4, *SHAPE)
    expected = module(images).flatten(1)
    assert wrapped.feature_size == expected.shape[1] == 3 * 6 * 6
    torch.testing.assert_close(wrapped.forward(params, images), expected)
    torch.testing.assert_close(wrapped.features(params, images), expected)


def test_gradients_and_vmap_pass_through_features(wrapped: ModuleNetwork) -> None:
    torch.manual_seed(0)
    weights, images = torch.randn(3, size(wrapped)), torch.rand(3, 5, *SHAPE)

    def total(weights: Tensor, images: Tensor) -> Tensor:
        return wrapped.features(unflatten(wrapped, weights), images).square().mean()

    together = torch.vmap(torch.func.grad(total))(weights, images)
    alone = []
    for each, batch in zip(weights.clone().requires_grad_(), images, strict=True):
        alone.append(torch.autograd.grad(total(each, batch), each)[0])
    torch.testing.assert_close(together, torch.stack(alone))


def test_the_users_module_stays_as_it_is(stock: Conv4) -> None:
    module = Conv4Module(stock).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    wrapped = ModuleNetwork(module, SHAPE, 3, CLASSIFICATION)
    wrapped.forward(unflatten(wrapped, initialise(wrapped, 0)), torch.rand(5, *SHAPE))
    assert module.training
    assert isinstance(module.get_submodule("block1.norm"), nn.BatchNorm2d)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_go_into_a_copy_of_the_module(wrapped: ModuleNetwork) -> None:
    params = unflatten(wrapped, torch.randn(size(wrapped)))
    module, images = wrapped.with_weights(params), torch.rand(5, *SHAPE)
    torch.testing.assert_close(module(images), wrapped.forward(params, images))


def test_what_needs_no_gradient_and_buffers_stay_fixed() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.head = nn.Linear(64, 5), nn.Linear(5, 2)
            self.frozen.requires_grad_(False)
            self.register_buffer("scale", torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.head(self.frozen(x.flatten(1)) * self.scale)
            return outputs

    module = Fixed()
    wrapped = ModuleNetwork(module, SHAPE, 2, REGRESSION)
    assert set(wrapped.shapes) == {"head.weight", "head.bias"}
    images = torch.rand(3, *SHAPE, dtype=torch.float64)
    params = {name: value.double() for name, value in module.head.named_parameters("head")}
    torch.testing.assert_close(wrapped.forward(params, images), module.double()(images))


def test_dropout_is_off_and_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16))
            self.second = nn.Linear(16, 16)
            self.third = nn.Linear(16, 16)
            self.third.weight = self.second.weight
            self.head, self.drop = nn.Linear(16, 3), nn.Dropout(0.9)

        def forward(self, x: Tensor) -> Tensor:
            x = self.third(torch.tanh(self.second(self.drop(self.first(x)))))
            outputs: Tensor = self.head(x)
            return outputs

    wrapped = ModuleNetwork(Tied().train(), SHAPE, 3, CLASSIFICATION)
    assert "third.weight" not in wrapped.shapes
    params = unflatten(wrapped, initialise(wrapped, 0))
    images = torch.rand(4, *SHAPE)
    first = wrapped.forward(params, images)
    assert torch.equal(first, wrapped.forward(params, images))
    doubled = {**params, "second.weight": 2 * params["second.weight"]}
    module = wrapped.with_weights(doubled)
    assert torch.equal(module.get_parameter("third.weight"), doubled["second.weight"])
    torch.testing.assert_close(module(images), wrapped.forward(doubled, images))


def test_flatten_inverts_unflatten(wrapped: ModuleNetwork) -> None:
    weights = torch.randn(size(wrapped))
    assert torch.equal(flatten(wrapped, unflatten(wrapped, weights)), weights)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Flatten(), "maps inputs .2, 1, 8, 8. to .2, 64.; the tasks need .2, 3."),
        (nn.Linear(7, 3), "do not pass"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "pass a batch through it first"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "the tasks need .2, 3."),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3).requires_grad_(False)), "nothing can be"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_by_name(module: nn.Module, words: str) -> None:
    with pytest.raises(InputError, match=f"torch.nn.modules.*{words}"):
        ModuleNetwork(module, SHAPE, 3, CLASSIFICATION)
