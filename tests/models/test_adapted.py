"""What is adapted: the head, the norms, the last blocks, or named parameters."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

from reptile.errors import InputError
from reptile.models import ModuleNetwork, initialise, mask_absent_outputs, size, unflatten
from reptile.objectives import CLASSIFICATION
from reptile.settings import Adapt, LastBlocks, TrainSettings

SHAPE = (3, 32, 32)


def adapted(adapt: Adapt, module: nn.Module, outputs: int = 5) -> set[str]:
    return set(ModuleNetwork(module, SHAPE, outputs, CLASSIFICATION, adapt=adapt).shapes)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=5)


def test_all_is_every_parameter(resnet: nn.Module) -> None:
    assert adapted("all", resnet) == {name for name, _ in resnet.named_parameters()}


def test_head_is_the_last_linear_layer(resnet: nn.Module) -> None:
    assert adapted("head", resnet) == {"fc.weight", "fc.bias"}


def test_norms_are_all_norms_and_the_head(resnet: nn.Module) -> None:
    expected = {
        name
        for name, _ in resnet.named_parameters()
        if "bn" in name or "downsample.1" in name or name.startswith("fc")
    }
    assert adapted("norms", resnet) == expected
    swin = torchvision.models.shufflenet_v2_x0_5(num_classes=5)
    assert {name.split(".")[0] for name in adapted("norms", swin)} >= {"conv1", "stage4", "fc"}


@pytest.mark.parametrize(
    ("last", "stages"),
    [(1, ("layer4.1",)), (2, ("layer4",)), (4, ("layer3", "layer4")), (9, ("",))],
)
def test_last_is_the_head_and_the_blocks_before_it(
    resnet: nn.Module, last: int, stages: tuple[str, ...]
) -> None:
    expected = {
        name
        for name, _ in resnet.named_parameters()
        if any(name.startswith(stage) for stage in (*stages, "fc"))
    }
    assert adapted(LastBlocks(last=last), resnet) == expected


def test_more_blocks_than_there_are_is_refused(resnet: nn.Module) -> None:
    with pytest.raises(InputError, match=r"last: 10.*has 9 blocks below its head"):
        adapted(LastBlocks(last=10), resnet)


def test_patterns_name_parameters(resnet: nn.Module) -> None:
    assert adapted(("layer4.1.conv*", "fc.*"), resnet) == {
        "layer4.1.conv1.weight",
        "layer4.1.conv2.weight",
        "fc.weight",
        "fc.bias",
    }
    with pytest.raises(InputError, match=r"no parameter of .* matches 'layer5.\*'; they are conv1"):
        adapted(("layer5.*",), resnet)


class Body(nn.Module):
    """Nearly the whole network: blocks that run out of their order, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])
        self.norm = nn.LayerNorm(8)
        self.position = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        for number in (2, 1, 0):
            x = torch.relu(self.blocks[number](x))
        normed: Tensor = self.norm(x)
        return normed


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)
        self.body = Body()
        self.embed = nn.Linear(1, 8)
        self.embed.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(self.embed(x.flatten(1)[:, :1])))
        return outputs


def test_blocks_follow_the_forward_pass_and_fixed_parameters_stay_fixed() -> None:
    norm, head = {"body.norm.weight", "body.norm.bias"}, {"head.weight", "head.bias"}
    first = {"body.blocks.0.weight", "body.blocks.0.bias"}
    second = {"body.blocks.1.weight", "body.blocks.1.bias"}
    assert adapted(LastBlocks(last=1), Encoder()) == head | norm | first
    assert adapted(LastBlocks(last=2), Encoder()) == head | norm | first | second
    assert "embed.weight" not in adapted("all", Encoder())


def test_without_a_head_head_adapts_nothing() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())
    assert adapted("head", module, outputs=0) == set()
    model = ModuleNetwork(module, SHAPE, 0, CLASSIFICATION, adapt="head")
    images = torch.rand(2, *SHAPE)
    assert size(model) == 0
    features = model.features(unflatten(model, initialise(model, 0)), images)
    torch.testing.assert_close(features, module(images))


def test_batch_norm_is_of_the_batch_where_it_is_adapted_and_as_trained_where_it_is_fixed() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(4 * 49, 5),
    )  # fmt: skip
    with torch.no_grad():
        module(torch.rand(16, *SHAPE) * 3)
    images = torch.rand(6, *SHAPE)
    model = ModuleNetwork(module, SHAPE, 5, CLASSIFICATION, adapt=LastBlocks(last=1))
    outputs = model.forward(unflatten(model, initialise(model, 0)), images)
    expected = module.eval()
    expected[3].train()
    torch.testing.assert_close(outputs, expected(images))


def test_absent_outputs_are_masked_at_the_bias_of_any_head() -> None:
    model = ModuleNetwork(Encoder(), SHAPE, 5, CLASSIFICATION)
    present = torch.tensor([True, False, True, True, False])
    weights = mask_absent_outputs(model, initialise(model, 0), present)
    images = torch.rand(4, *SHAPE)
    masked = model.forward(unflatten(model, weights), images)
    free = model.forward(unflatten(model, initialise(model, 0)), images)
    torch.testing.assert_close(masked.softmax(1)[:, present], free[:, present].softmax(1))
    assert (masked.softmax(1)[:, ~present] == 0).all()


def test_a_head_without_an_adapted_bias_cannot_be_masked() -> None:
    softened = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5), nn.Tanh())
    cases: list[tuple[nn.Module, Adapt]] = [(softened, "all"), (Encoder(), ("body.*",))]
    for module, adapt in cases:
        model = ModuleNetwork(module, SHAPE, 5, CLASSIFICATION, adapt=adapt)
        with pytest.raises(InputError, match="a linear layer with a bias as its last"):
            mask_absent_outputs(model, initialise(model, 0), torch.ones(5, dtype=torch.bool))


@pytest.mark.parametrize("value", ["tail", {"last": 0}, {"first": 1}, [], [1], {"last": True}, 3])
def test_another_form_of_adapt_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"must be all, none, head, norms, \{last: n\}"):
        TrainSettings.model_validate({"model": {"name": "resnet12"}, "adapt": value})


def test_conv4_is_adapted_as_a_whole() -> None:
    with pytest.raises(ValueError, match="adapt: conv4 is adapted as a whole"):
        TrainSettings.model_validate({"adapt": "head"})


@pytest.mark.parametrize("value", ["norms", {"last": 2}, ["fc.*"]])
def test_adapt_survives_a_checkpoints_json(value: object) -> None:
    settings = TrainSettings.model_validate({"model": {"name": "resnet12"}, "adapt": value})
    assert TrainSettings.model_validate_json(settings.model_dump_json()) == settings
