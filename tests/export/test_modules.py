"""Any module as graphs: traced gradients against autograd, adaptations against PyTorch."""

from collections.abc import Callable, Iterator

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reptile.errors import InputError
from reptile.export import reference
from reptile.export.check import check_export
from reptile.export.fold import exportable
from reptile.export.forms import form_of
from reptile.export.gradient import trace_gradient
from reptile.export.graphs import build_graphs
from reptile.export.reference import SupportSet
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo
from reptile.learn.optimizer import OptimizerState
from reptile.learn.reptile import MetaState
from reptile.minibatches import mini_batches
from reptile.models import OUTPUT_MASK, ModuleNetwork, size, unflatten
from reptile.objectives import CLASSIFICATION
from reptile.settings import Adapt, OptimizerSettings, TrainSettings

WAYS = 3


class Apply(nn.Module):
    """A function as a part of a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Last(nn.Module):
    """The last step of what a recurrent layer gives."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x)[0][:, -1]
        return outputs


def with_head(shape: tuple[int, ...], *parts: nn.Module) -> nn.Module:
    """Put a head behind parts."""
    body = nn.Sequential(*parts, nn.Flatten())
    with torch.no_grad():
        width = body(torch.rand(2, *shape)).shape[1]
    return nn.Sequential(*body, nn.Linear(width, WAYS))


IMAGE = (4, 11, 9)
MODULES: dict[str, tuple[tuple[int, ...], Callable[[], list[nn.Module]]]] = {
    "convolution": (IMAGE, lambda: [nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU()]),
    "grouped, dilated": (IMAGE, lambda: [nn.Conv2d(4, 6, 3, (2, 1), (1, 2), 2, groups=2)]),
    "depthwise": (IMAGE, lambda: [nn.Conv2d(4, 4, (5, 3), 2, 1, groups=4, bias=False)]),
    "transposed": (IMAGE, lambda: [nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)]),
    "transposed, dilated": (IMAGE, lambda: [nn.ConvTranspose2d(4, 3, 3, 1, 2, dilation=2)]),
    "1-D convolution": ((2, 19), lambda: [nn.Conv1d(2, 4, 5, 3, 2, 2, groups=2), nn.ELU()]),
    "3-D convolution": ((2, 4, 5, 3), lambda: [nn.Conv3d(2, 3, 3, 2, 1)]),
    "max-pooling": (IMAGE, lambda: [nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 2, 1)]),
    "max-pooling, ceiling": (IMAGE, lambda: [nn.Conv2d(4, 3, 1), nn.MaxPool2d(2, ceil_mode=True)]),
    "average pooling": (
        IMAGE,
        lambda: [
            nn.Conv2d(4, 3, 1),
            nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        ],
    ),
    "average pooling, 1-D": ((2, 19), lambda: [nn.Conv1d(2, 3, 1), nn.AvgPool1d(4, 3, 1)]),
    "adaptive pooling": (IMAGE, lambda: [nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d((4, 5))]),
    "adaptive max-pooling": (
        (4, 8, 6),
        lambda: [nn.Conv2d(4, 3, 1), nn.AdaptiveMaxPool2d((4, 3))],
    ),
    "pooling of channels that lie last": (
        IMAGE,
        lambda: [
            nn.Conv2d(4, 3, 1),
            Apply(lambda x: x.permute(0, 2, 3, 1)),
            nn.LayerNorm(3),
            Apply(lambda x: x.permute(0, 3, 1, 2)),
            nn.AdaptiveAvgPool2d(1),
        ],
    ),
    "batch norm": (IMAGE, lambda: [nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.ReLU()]),
    "batch norm without weights": (
        (7,),
        lambda: [nn.Linear(7, 6), nn.BatchNorm1d(6, affine=False)],
    ),
    "layer norm": ((5, 7), lambda: [nn.Linear(7, 6), nn.LayerNorm(6), nn.GELU()]),
    "group and instance norm": (
        IMAGE,
        lambda: [nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.InstanceNorm2d(6, affine=True)],
    ),
    "attention": (
        (5, 8),
        lambda: [
            nn.LayerNorm(8),
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.5, batch_first=True),
        ],
    ),
    "GRU": ((4, 3), lambda: [Last(nn.GRU(3, 5, 2, batch_first=True, bidirectional=True))]),
    "LSTM": ((4, 3), lambda: [Last(nn.LSTM(3, 5, batch_first=True))]),
    "embedding": (
        (6,),
        lambda: [Apply(lambda x: (x * 9).long()), nn.Embedding(10, 4), nn.Linear(4, 3)],
    ),
    "upsampling and padding": (
        IMAGE,
        lambda: [
            nn.Conv2d(4, 2, 1),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.ReflectionPad2d(1),
        ],
    ),
}
ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU6,
    nn.LeakyReLU,
    nn.SELU,
    nn.CELU,
    lambda: nn.GELU("tanh"),
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardshrink,
    nn.Softshrink,
    nn.PReLU,
    nn.RReLU,
    lambda: nn.Threshold(0.1, 0.2),
    nn.GLU,
    lambda: nn.Softmax(1),
    lambda: nn.LogSoftmax(1),
]


class Parallel(nn.Module):
    """All activations side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(make() for make in ACTIVATIONS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


def assign(x: Tensor) -> Tensor:
    """Write into parts of a tensor."""
    y = x * 2
    y[:, 1:3] *= x[:, :2]
    y[:, 0] = x[:, 3]
    y.unflatten(1, (2, 3)).transpose(1, 2)[:, 0].add_(1).mul_(x[:, 4:])
    return y


MODULES["assignments to views"] = ((5,), lambda: [nn.Linear(5, 6), Apply(assign)])
MODULES["activations"] = ((7,), lambda: [nn.Linear(7, 8), Parallel()])


@pytest.fixture
def in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize(
    ("name", "adapt"), [*((name, "all") for name in MODULES), ("attention", "norms")]
)
def test_the_gradient_of_a_step_equals_autograds_for_any_batch(
    name: str, adapt: Adapt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "float", nn.Module.double)
    torch.manual_seed(0)
    shape, parts = MODULES[name]
    model = ModuleNetwork(with_head(shape, *parts()), shape, WAYS, CLASSIFICATION, adapt=adapt)
    traced = trace_gradient(form_of(model))
    operators = {str(node.target) for node in traced.graph.graph.nodes}
    assert not any("backward" in each or "as_strided" in each for each in operators)
    start = model.initialise(0)
    for count in (1, 2, 5):  # none is the size it was traced with
        weights = (start + 0.1 * torch.rand(start.shape)).requires_grad_()
        inputs, labels = torch.rand(count, *shape), torch.arange(count) % WAYS
        loss = F.cross_entropy(model.forward(unflatten(model, weights), inputs), labels)
        (wanted,) = torch.autograd.grad(loss, weights)
        targets, share = F.one_hot(labels, WAYS).double(), torch.tensor(1 / count)
        gradient, value = traced(weights.detach(), inputs, targets, share)
        torch.testing.assert_close(value, loss.detach(), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-8)


def make_checkpoint(
    module: nn.Module,
    shape: tuple[int, ...],
    adapt: Adapt = "all",
    optimizer: OptimizerSettings | None = None,
) -> Checkpoint:
    """Drawn weights, with a second moment of the size of real gradients."""
    model = ModuleNetwork(module, shape, WAYS, CLASSIFICATION, adapt=adapt)
    noise = torch.rand(size(model), generator=torch.Generator().manual_seed(1))
    info = CheckpointInfo(
        iteration=0,
        settings=TrainSettings(ways=WAYS, optimizer=optimizer or OptimizerSettings()),
        image_shape=shape,
        pixels=False,
        module=model.name,
        dataset="",
        data_sha256="",
        splits_sha256="",
        code_sha256="",
        versions={},
    )
    state = MetaState(model.initialise(0), OptimizerState(1e-3 + 1e-2 * noise, 10_000))
    return Checkpoint(model, state, info)


class Exported:
    """A checkpoint's graphs in ONNX Runtime."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.sessions = {
            name: ort.InferenceSession(
                graph.SerializeToString(), providers=["CPUExecutionProvider"]
            )
            for name, graph in build_graphs(checkpoint, 20).items()
        }

    def run(self, graph: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = self.sessions[graph]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    def task(self, count: int, steps: int, labels: int = WAYS) -> SupportSet:
        rng = np.random.default_rng(count)
        inputs = rng.random((count, *self.checkpoint.info.image_shape), dtype=np.float32)
        batches = mini_batches(rng, count, min(4, count), steps)
        return SupportSet(inputs, np.arange(count) % labels, batches)


class Tower(nn.Module):
    """A fixed and an adapted part with batch norm, an assignment, and a head without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.SiLU())
        self.head = nn.Linear(4 * 6 * 5, WAYS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        features = self.block(self.stem(x))
        shade = features.new_ones(features.shape[2:])
        shade[:2] = 0.5
        logits: Tensor = self.head((features * shade).flatten(1))
        return logits


SHAPE = (3, 10, 9)


@pytest.fixture(scope="module", params=["all, adam", "block and head, sgd"])
def exported(request: pytest.FixtureRequest) -> Exported:
    torch.manual_seed(0)
    if request.param == "all, adam":
        return Exported(make_checkpoint(Tower(), SHAPE))
    sgd = OptimizerSettings(name="sgd", learning_rate=0.1, weight_decay=0.99)
    return Exported(make_checkpoint(Tower(), SHAPE, ("block.*", "head.*"), sgd))


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5, equal_nan=False)


def test_a_module_adapts_and_predicts_as_in_pytorch(exported: Exported) -> None:
    checkpoint = exported.checkpoint
    queries = exported.task(4, 0).images
    for count, steps in ((1, 3), (6, 0), (9, 8)):
        task = exported.task(count, steps)
        found = exported.run("adapt", task.feeds(checkpoint))
        wanted = reference.adapt(checkpoint, task, torch.float64)
        assert found.pop("finite")
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            close(found[name], value)
        tensors = {name: value for name, value in found.items() if name != "losses"}
        logits = exported.run("predict_adapted", {"images": queries} | tensors)["logits"]
        close(logits, reference.predict_adapted(checkpoint, wanted, queries, torch.float64))
        for one, image in zip(logits, queries, strict=True):
            alone = exported.run("predict_adapted", {"images": image[None]} | tensors)["logits"]
            close(alone[0], one)
        both = exported.run("few_shot", task.feeds(checkpoint) | {"query_images": queries})
        close(both["logits"], logits)
    logits = exported.run("predict", {"images": queries})["logits"]
    close(logits, reference.predict(checkpoint, queries, torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("adapt", ["norms", "all"])
def test_a_transformer_encoder_adapts_as_in_pytorch(adapt: Adapt) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
    checkpoint = make_checkpoint(with_head((5, 8), encoder), (5, 8), adapt)
    assert check_export(checkpoint.model) == []
    exported = Exported(checkpoint)
    for count, steps in ((1, 0), (3, 1), (7, 5)):
        task = exported.task(count, steps)
        found = exported.run("few_shot", task.feeds(checkpoint) | {"query_images": task.images})
        wanted = reference.adapt(checkpoint, task, torch.float64)
        close(found["losses"], wanted["losses"])
        logits = reference.predict_adapted(checkpoint, wanted, task.images, torch.float64)
        close(found["logits"], logits)


def test_what_a_task_holds_is_what_is_adapted_and_the_statistics(exported: Exported) -> None:
    names = {output.name for output in exported.sessions["adapt"].get_outputs()}
    norms = {"stem.1", "block.1"} if "stem.0.weight" in names else {"block.1"}
    learnt = set(exported.checkpoint.model.shapes)
    statistics = {f"{norm}.{what}" for norm in norms for what in ("mean", "variance")}
    assert names == {"losses", "finite", OUTPUT_MASK} | learnt | statistics


def test_outputs_without_examples_are_masked_in_a_network_without_a_bias(
    exported: Exported,
) -> None:
    task = exported.task(8, 5, labels=2)
    feeds = task.feeds(exported.checkpoint) | {"query_images": task.images}
    logits = exported.run("few_shot", feeds)["logits"]
    assert (np.exp(logits[:, 2] - logits[:, :2].max(1)) == 0).all()
    # As if it had two outputs: the loss of two equal logits is log 2.
    untrained = exportable(exported.checkpoint)
    assert untrained.model.shapes[OUTPUT_MASK] == (WAYS,)
    found = exported.run("adapt", task.feeds(exported.checkpoint))
    close(found["losses"], reference.adapt(exported.checkpoint, task, torch.float64)["losses"])
    assert found["finite"] and np.isfinite(found["losses"]).all()


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "an operator": (torch.digamma, r"no form of aten\.polygamma\.default, in 1 \(Apply\)"),
    "memory by strides": (
        lambda x: (x * 2).as_strided((x.shape[0], 3), (6, 1)).mul_(x[:, :3]).repeat(1, 2),
        r"no form of aten\.as_strided_scatter\.default, in 1 \(Apply\)",
    ),
    "a decision by a value": (lambda x: x if x.sum() > 0 else -x, r"1 \(Apply\): .*data-dependent"),
    "a fixed batch": (lambda x: x.view(-1, 6) if len(x) == 2 else x.reshape(3, 6), "batches of 3"),
    "numpy": (lambda x: x + float(x.detach().numpy().sum()), r"1 \(Apply\): "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_hold_is_refused_with_its_place(name: str) -> None:
    function, words = REFUSED[name]
    module = nn.Sequential(nn.Linear(4, 6), Apply(function), nn.Linear(6, WAYS))
    model = ModuleNetwork(module, (4,), WAYS, CLASSIFICATION)
    problems = check_export(model)
    assert len(problems) == 1
    with pytest.raises(InputError, match=words):
        raise InputError(problems[0])


def test_a_network_that_can_be_exported_has_no_problems_and_a_bad_name_is_one() -> None:
    assert check_export(ModuleNetwork(Tower(), SHAPE, WAYS, CLASSIFICATION)) == []

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.losses, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(x * self.losses)
            return logits

    (problem,) = check_export(ModuleNetwork(Named(), (4,), WAYS, CLASSIFICATION))
    assert "'losses'" in problem
