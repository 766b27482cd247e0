"""Any network in ONNX Runtime: parity, size and speed of its adaptation beside eager PyTorch.

    python -m benchmarks.export_networks --out artifacts/networks.jsonl
    python -m benchmarks.export_networks --out artifacts/networks.jsonl --markdown

Each network, with each choice of what is adapted, is one line of the file. Lines that are there are
not measured again, so an interrupted run goes on. Weights are drawn, for speed and parity do not
depend on them; torchvision's take 64 pixels.

The gradient of a ReLU or of max-pooling jumps. Where a value lies within rounding of such a place,
two correct computations in float32 take different sides, and Adam turns the jump into different
weights. So a case counts for `error` only if float32 resolves it: if eager float32, and float64
with noise of float32's size, stay within LIMIT of float64. The others are counted, with the errors
of both.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
import torchvision.models as tv
import typer
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from reptile.errors import InputError
from reptile.export import reference
from reptile.export.check import check_export
from reptile.export.graphs import build_graphs
from reptile.export.reference import SupportSet, Tensors
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo
from reptile.learn.optimizer import OptimizerState
from reptile.learn.reptile import MetaState
from reptile.minibatches import mini_batches
from reptile.models import ModuleNetwork, size, unflatten
from reptile.models.module import BatchNorm
from reptile.models.resnet12 import ResNet12
from reptile.objectives import CLASSIFICATION
from reptile.settings import LastBlocks, TrainSettings

WAYS, BATCH = 5, 5
STEPS = (0, 1, 5)
MANY = 50  # steps where one takes less than QUICK milliseconds
QUICK = 30
SIZES = (1, 5, 12)  # of the support set
THREADS = (1, 2)
ADAPT = ("all", "last: 1", "norms", "head")  # the most telling first
LIMIT = 1e-4
DRAWS = 8  # of noise, where ONNX Runtime misses LIMIT and eager float32 does not
PICTURE = (3, 64, 64)


class Words(nn.Module):
    """An embedding, a convolution over the words and the largest of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(50, 32), nn.Conv1d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        """Map numbers of words [B, 12]."""
        words = self.embed(x.long()).transpose(1, 2)
        logits: Tensor = self.head(torch.relu(self.conv(words)).amax(2))
        return logits


class Recurrent(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = layer(8, 32, batch_first=True), nn.Linear(32, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences [B, 10, 8]."""
        logits: Tensor = self.head(self.layer(x)[0][:, -1])
        return logits


class Encoder(nn.Module):
    """A transformer encoder of two layers, and the mean of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.project, self.encode = nn.Linear(8, 32), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences [B, 10, 8]."""
        logits: Tensor = self.head(self.encode(self.project(x)).mean(1))
        return logits


class Branches(nn.Module):
    """Two branches that see different parts of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(3)
        )
        self.right = nn.Sequential(
            nn.Conv2d(3, 16, 5, dilation=2), nn.GroupNorm(4, 16), nn.SiLU(), nn.MaxPool2d(3)
        )
        self.head = nn.Linear(16 * 9 + 16 * 16, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures [B, 3, 20, 40]: a left and a right one."""
        left, right = self.left(x[..., :20]), self.right(x[..., 20:])
        logits: Tensor = self.head(torch.cat([left.flatten(1), right.flatten(1)], 1))
        return logits


def signal() -> nn.Module:
    """Return a 1-D convolution over a signal of two channels."""
    return nn.Sequential(
        nn.Conv1d(2, 16, 5, stride=2),
        nn.BatchNorm1d(16),
        nn.ELU(),
        nn.Conv1d(16, 32, 3, groups=4, dilation=2),
        nn.BatchNorm1d(32),
        nn.ELU(),
        nn.AdaptiveAvgPool1d(4),
        nn.Flatten(),
        nn.Linear(128, WAYS),
    )


class Case(NamedTuple):
    """A network and what it takes."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    words: bool = False  # whether inputs are numbers of words
    norms: bool = True  # whether it has any


def torchvision(name: str, **settings: Any) -> Case:
    """Return one of torchvision's networks, without weights."""
    return Case(lambda: tv.get_model(name, weights=None, num_classes=WAYS, **settings), PICTURE)


CASES: dict[str, Case] = {
    "1-D convolution": Case(signal, (2, 64)),
    "GRU": Case(lambda: Recurrent(nn.GRU), (10, 8), norms=False),
    "LSTM": Case(lambda: Recurrent(nn.LSTM), (10, 8), norms=False),
    "transformer encoder": Case(Encoder, (10, 8)),
    "embedding": Case(Words, (12,), words=True, norms=False),
    "two branches": Case(Branches, (3, 20, 40)),
    "vit (2 layers of 64)": Case(
        lambda: tv.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=WAYS), PICTURE
    ),
    "swin (2 + 2 layers of 24)": Case(
        lambda: tv.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=WAYS), PICTURE
    ),
    "convnext (4 stages from 24)": Case(
        lambda: tv.ConvNeXt(
            [
                CNBlockConfig(24, 48, 1),
                CNBlockConfig(48, 96, 1),
                CNBlockConfig(96, 192, 2),
                CNBlockConfig(192, None, 1),
            ],
            num_classes=WAYS,
        ),
        PICTURE,
    ),
    "shufflenet_v2_x0_5": torchvision("shufflenet_v2_x0_5"),
    "mobilenet_v3_small": torchvision("mobilenet_v3_small"),
    "regnet_y_400mf": torchvision("regnet_y_400mf"),
    "efficientnet_b0": torchvision("efficientnet_b0"),
    "resnet18": torchvision("resnet18"),
    "resnet12": Case(lambda: ResNet12(64, 3, WAYS), (3, 32, 32)),
    "densenet121": torchvision("densenet121"),
    "squeezenet1_1": torchvision("squeezenet1_1")._replace(norms=False),
}


class Row(NamedTuple):
    """What was measured of one network; errors are relative, times in milliseconds."""

    network: str
    adapt: str
    adapted: int  # weights
    refused: str
    nodes: int = 0
    megabytes: float = 0
    build_seconds: float = 0
    steps: int = 0  # the most
    cases: int = 0
    error: float = 0  # of ONNX Runtime against float64, in the cases that float32 resolves
    rounding: float = 0  # of eager float32 against float64, there
    unresolved: int = 0  # the other cases
    unresolved_error: float = 0
    unresolved_rounding: float = 0  # of eager float32 or of noise
    onnx_ms: float = 0  # a step, one thread
    eager_ms: float = 0


def measure(name: str, adapt: str) -> Row:
    """Export one network and compare it with eager PyTorch."""
    torch.set_num_threads(1)
    try:
        checkpoint = start(CASES[name], adapt)
    except InputError as problem:
        return Row(name, adapt, 0, str(problem))
    adapted = size(checkpoint.model)
    if problems := check_export(checkpoint.model):
        return Row(name, adapt, adapted, problems[0])
    begin = perf_counter()
    graphs = build_graphs(checkpoint, MANY)
    seconds = perf_counter() - begin
    content = {key: graphs[key].SerializeToString() for key in ("adapt", "predict_adapted")}
    sessions = {threads: Sessions(content, threads) for threads in THREADS}
    onnx_ms = step_time(lambda task: sessions[1].adapt(task, checkpoint), CASES[name])
    eager_ms = step_time(lambda task: reference.adapt(checkpoint, task, torch.float32), CASES[name])
    steps = (*STEPS, MANY) if max(onnx_ms, eager_ms) < QUICK else STEPS
    resolved: list[tuple[float, float]] = []
    unresolved: list[tuple[float, float]] = []
    for task, queries in tasks(CASES[name], steps):
        wanted = answers(checkpoint, task, queries, torch.float64)
        rounding = apart(answers(checkpoint, task, queries, torch.float32), wanted)
        error = max(
            apart(each.answers(task, queries, checkpoint), wanted) for each in sessions.values()
        )
        if error > LIMIT >= rounding:
            rounding = max(
                apart(answers(checkpoint, task, queries, torch.float64, noise=seed), wanted)
                for seed in range(DRAWS)
            )
        (resolved if rounding <= LIMIT else unresolved).append((error, rounding))
    error, rounding = map(max, zip((0.0, 0.0), *resolved, strict=True))
    beyond = [max(values) for values in zip((0.0, 0.0), *unresolved, strict=True)]
    return Row(
        name,
        adapt,
        adapted,
        "",
        nodes=sum(1 for _ in nodes(graphs["adapt"].graph)),
        megabytes=len(content["adapt"]) / 1e6,
        build_seconds=seconds,
        steps=max(steps),
        cases=len(resolved) + len(unresolved),
        error=error,
        rounding=rounding,
        unresolved=len(unresolved),
        unresolved_error=beyond[0],
        unresolved_rounding=beyond[1],
        onnx_ms=onnx_ms,
        eager_ms=eager_ms,
    )


def start(case: Case, adapt: str) -> Checkpoint:
    """Return drawn weights, with statistics and an optimiser's state such as training leaves.

    That is each parameter's mean squared gradient: steps are then of the learning rate's size.
    """
    torch.manual_seed(0)
    chosen: Any = LastBlocks(last=1) if adapt.startswith("last") else adapt
    module = case.make().train()
    for norm in module.modules():
        if isinstance(norm, BatchNorm):
            norm.momentum = None  # the average of all batches
    with torch.no_grad():
        module(torch.from_numpy(draw(np.random.default_rng(2), case, 4 * WAYS)))
    model = ModuleNetwork(module, case.shape, WAYS, CLASSIFICATION, adapt=chosen)
    weights = model.initialise(0).requires_grad_()
    inputs = torch.from_numpy(draw(np.random.default_rng(1), case, 2 * WAYS))
    outputs = model.forward(unflatten(model, weights), inputs)
    loss = CLASSIFICATION.loss(outputs, torch.arange(2 * WAYS) % WAYS)
    (gradient,) = torch.autograd.grad(loss, weights)
    moments = [each.square().mean().expand_as(each) for each in unflatten(model, gradient).values()]
    moment = torch.cat([each.flatten() for each in moments]) + 1e-6
    state = MetaState(weights.detach(), OptimizerState(moment, 10_000))
    info = CheckpointInfo(
        iteration=0,
        settings=TrainSettings(ways=WAYS),
        image_shape=case.shape,
        pixels=False,
        module=model.name,
        dataset="",
        data_sha256="",
        splits_sha256="",
        code_sha256="",
        versions={},
    )
    return Checkpoint(model, state, info)


def draw(rng: np.random.Generator, case: Case, count: int) -> npt.NDArray[np.float32]:
    """Draw inputs."""
    shape = (count, *case.shape)
    values = rng.integers(0, 50, shape) if case.words else rng.normal(size=shape)
    return values.astype(np.float32)


def tasks(case: Case, steps: Sequence[int]) -> Iterator[tuple[SupportSet, npt.NDArray[np.float32]]]:
    """Yield support sets of several sizes, with numbers of steps, and queries."""
    for count in SIZES:
        rng = np.random.default_rng(count)
        batches = mini_batches(rng, count, min(BATCH, count), max(steps))
        task = SupportSet(draw(rng, case, count), np.arange(count) % WAYS, batches)
        queries = draw(rng, case, 4)
        for number in steps:
            yield task.first(number), queries


def answers(
    checkpoint: Checkpoint,
    task: SupportSet,
    queries: Any,
    dtype: torch.dtype,
    *,
    noise: int | None = None,
) -> tuple[Any, Any]:
    """Return eager PyTorch's losses and logits, with noise in all weights if its seed is given."""
    if noise is not None:
        checkpoint = with_noise_in_what_is_fixed(checkpoint, noise)
    adapted = reference.adapt(checkpoint, task, dtype, noise=noise)
    return adapted["losses"], reference.predict_adapted(checkpoint, adapted, queries, dtype)


def with_noise_in_what_is_fixed(checkpoint: Checkpoint, seed: int) -> Checkpoint:
    """Return a copy with errors as large as float32's rounding; the inner loop adds the others."""
    checkpoint = copy.deepcopy(checkpoint)
    assert isinstance(checkpoint.model, ModuleNetwork)
    generator = torch.Generator().manual_seed(seed)
    for value in checkpoint.model.fixed.values():
        if value.is_floating_point():
            value.mul_(
                1 + torch.finfo(value.dtype).eps * torch.randn(value.shape, generator=generator)
            )
    return checkpoint


def apart(actual: tuple[Any, Any], wanted: tuple[Any, Any]) -> float:
    """Return the largest difference, relative to the largest value or to 1, of unmasked outputs."""
    worst = 0.0
    for got, want in zip(actual, wanted, strict=True):
        seen = np.abs(want) < 1e6
        scale = max(1.0, float(np.abs(want[seen]).max(initial=0)))
        worst = max(worst, float(np.abs(got - want)[seen].max(initial=0)) / scale)
        if not np.isfinite(got).all():
            return float("inf")
    return worst


class Sessions:
    """The two graphs in ONNX Runtime."""

    def __init__(self, content: dict[str, bytes], threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._sessions = {
            name: ort.InferenceSession(graph, options) for name, graph in content.items()
        }

    def adapt(self, task: SupportSet, checkpoint: Checkpoint) -> Tensors:
        """Run `adapt`."""
        return self._run("adapt", task.feeds(checkpoint))

    def answers(self, task: SupportSet, queries: Any, checkpoint: Checkpoint) -> tuple[Any, Any]:
        """Return losses and logits."""
        adapted = self.adapt(task, checkpoint)
        assert adapted.pop("finite")
        losses = adapted.pop("losses")
        return losses, self._run("predict_adapted", {"images": queries} | adapted)["logits"]

    def _run(self, graph: str, feeds: Tensors) -> Tensors:
        session = self._sessions[graph]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))


def step_time(adapt: Callable[[SupportSet], object], case: Case) -> float:
    """Return the milliseconds of one step on a mini-batch: of five steps, less those of none."""
    rng = np.random.default_rng(0)
    batches = mini_batches(rng, BATCH, BATCH, 5)
    task = SupportSet(draw(rng, case, BATCH), np.arange(BATCH) % WAYS, batches)
    times = []
    for number in (0, 5):
        runs = []
        for _ in range(4):
            begin = perf_counter()
            adapt(task.first(number))
            runs.append(perf_counter() - begin)
        times.append(min(runs))
    return (times[1] - times[0]) / 5 * 1e3


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield a graph's nodes, those in loops included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g)


def markdown(rows: Sequence[Row]) -> str:
    """Write the table."""
    head = (
        "network | adapted | weights | nodes | MB | steps | error | eager's "
        "| not counted | ms a step | eager's"
    )
    lines = [f"| {head} |", "|---" * 11 + "|"]
    for row in rows:
        first = f"| {row.network} | {row.adapt} | {row.adapted:,} |"
        if row.refused:
            lines.append(f"{first} refused: {row.refused} | | | | | | | |")
            continue
        beyond = f"0 of {row.cases}"
        if row.unresolved:
            beyond = (
                f"{row.unresolved} of {row.cases}: {row.unresolved_error:.0e}, "
                f"{row.unresolved_rounding:.0e}"
            )
        lines.append(
            f"{first} {row.nodes:,} | {row.megabytes:.2f} | {row.steps} | {row.error:.0e} | "
            f"{row.rounding:.0e} | {beyond} | {max(0.0, row.onnx_ms):.2f} | {row.eager_ms:.1f} |"
        )
    return "\n".join(lines)


def main(
    networks: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(CASES)}; all if none is named.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File of the results, one a line.")] = Path(
        "artifacts/networks.jsonl"
    ),
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the file's table instead of measuring.")
    ] = False,
) -> None:
    """Export networks and compare them with eager PyTorch."""
    done = (
        [Row(**json.loads(line)) for line in out.read_text().splitlines()] if out.exists() else []
    )
    if as_markdown:
        names = list(CASES)
        print(markdown(sorted(done, key=lambda row: (names.index(row.network), row.adapt))))
        return
    if unknown := set(networks or ()) - CASES.keys():
        raise typer.BadParameter(f"{', '.join(unknown)}: choose of {', '.join(CASES)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    measured = {(row.network, row.adapt) for row in done}
    for adapt in ADAPT:
        for name in networks or CASES:
            if (name, adapt) in measured or (adapt == "norms" and not CASES[name].norms):
                continue
            row = measure(name, adapt)
            with out.open("a") as file:
                file.write(json.dumps(row._asdict()) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    typer.run(main)
