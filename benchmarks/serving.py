"""The load test: a served bundle under 1, 8 and 64 clients, relative to ONNX Runtime in a loop.

    python -m benchmarks.serving artifacts/bundle

Starts a real server and stops it. What is measured, and how to read it: docs/load.md.
"""

import io
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image
from pydantic import BaseModel, ConfigDict, computed_field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.load import Clients, Load, Order
from benchmarks.machine import Machine, OtherWork, describe_machine
from benchmarks.results import OTHERS, Compared
from benchmarks.server import HOST, Server, binary_request, json_request, multipart, raw_request
from reptile.errors import InputError
from reptile.files import write_json
from reptile.runtime import AdaptedModel, FewShotModel

RESULTS = Path("artifacts/load.json")
PACKAGES = ("starlette", "uvicorn", "uvloop", "httptools")
CLIENTS = (1, 8, 64)
WAYS, SHOTS = 5, 5
ADAPTERS = 4  # clients that adapt without a pause while others' predictions are timed
SHARE_OF_DIRECT = 0.5  # of the direct rate, that predictions over HTTP reach at 64 clients
SLOWER_WHILE_ADAPTING = 5.0  # times the idle p99

HEADINGS = ("what runs", "clients", "/s", "p50", "p95", "p99 ms", "refused", "ratio", "target")

console = Console(width=None if sys.stdout.isatty() else 110)
messages = Console(stderr=True)


class Effort(NamedTuple):
    """How long to measure."""

    rounds: int
    seconds: float  # of one line in one round
    warm_up: float


FULL, QUICK = Effort(rounds=3, seconds=3.0, warm_up=0.5), Effort(1, 0.3, 0.1)


class Line(Compared):
    """One line of the table: the same work, repeated in every round."""

    clients: int
    per_second: tuple[float, ...]  # one a round
    p99s: tuple[float, ...]  # milliseconds, one a round
    p50: float  # milliseconds, over all rounds
    p95: float
    p99: float
    served: int
    statuses: dict[str, int]  # answers by status; empty without HTTP
    broken: int  # connections that ended without an answer
    client_microseconds: float | None  # CPU time of the clients themselves for each answer
    ratio_to: str | None = None
    limit_is_most: bool = False

    @computed_field
    @property
    def within_limit(self) -> bool | None:
        """Whether the median ratio keeps its limit."""
        return self.keeps_limit(at_least=not self.limit_is_most)


class LoadResults(BaseModel):
    """A whole load test."""

    model_config = ConfigDict(frozen=True)

    machine: Machine
    serving_versions: dict[str, str]
    bundle: str
    started: str
    seconds: float
    quick: bool
    others: float | None  # share of the CPUs' time that went to other programs meanwhile
    peak_bytes: int  # of the server's memory
    lines: tuple[Line, ...]


def main(
    bundle: Annotated[Path, typer.Argument(help="What to serve.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Check that everything runs; its figures mean nothing.")
    ] = False,
    json: Annotated[Path, typer.Option(help="Where to write every round.")] = RESULTS,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table for a document.")
    ] = False,
) -> None:
    """Measure a served bundle under load."""
    results = measure(bundle, QUICK if quick else FULL)
    write_json(json, results.model_dump(mode="json"))
    if as_markdown:
        print(markdown(results))
    else:
        console.print(table(results))
    for warning in warnings(results):
        messages.print(f"[bold red]unreliable figures[/]: {warning}", soft_wrap=True)


class _Work(NamedTuple):
    label: str
    clients: int
    run: Callable[[], Load]


def measure(bundle: Path, effort: Effort) -> LoadResults:
    """Serve a bundle and measure all lines once in every round.

    Raises:
        InputError: the server does not start, or does not answer as it should.
    """
    machine, start, others = describe_machine(), time.perf_counter(), OtherWork()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    model = FewShotModel.load(bundle)
    images, labels = _support(model)
    loads: dict[tuple[str, int], list[Load]] = defaultdict(list)
    with Server(bundle) as server:
        support = {"images": images.tolist(), "labels": labels}
        for done in range(effort.rounds):
            # In each round anew: the tasks of a round's adapting may push out an idle one.
            adapted = server.request("POST", "/tasks", support)
            if adapted.status != 201:
                raise InputError(f"POST /tasks answered {adapted.status}: {adapted.body[:500]!r}")
            task = adapted.json()["id"]
            works = _works(model, server.port, task, images, labels, effort)
            for work in works:
                load = work.run()
                if not load.milliseconds:
                    what = f"{work.label}, {work.clients} clients"
                    raise InputError(f"{what}: nothing was answered well, only {load.statuses}")
                loads[work.label, work.clients].append(load)
            messages.print(
                f"round {done + 1} of {effort.rounds}: {time.perf_counter() - start:.0f} s",
                highlight=False,
            )
        peak = server.footprint.peak
    return LoadResults(
        machine=machine,
        serving_versions=_versions(),
        bundle=str(model.manifest["name"]),
        started=started,
        seconds=time.perf_counter() - start,
        quick=effort is QUICK,
        others=others.share(),
        peak_bytes=peak,
        lines=tuple(_line(label, clients, loads) for label, clients in loads),
    )


DIRECT, DIRECT_ADAPT = "onnxruntime predicts in a loop", "onnxruntime adapts in a loop"
PREDICT, PREDICT_PNG = "predict", "predict, a PNG file"
PREDICT_BINARY = "predict, a binary tensor"
PREDICT_BUSY, ADAPT = "predict while it adapts", "adapt"


def _works(
    model: FewShotModel,
    port: int,
    task: str,
    images: npt.NDArray[np.uint8],
    labels: list[str],
    effort: Effort,
) -> list[_Work]:
    place = f"/tasks/{task}/predict"
    predict = json_request("POST", place, {"images": images[:1].tolist()})
    predict_binary = binary_request(f"/v2/models/task-{task}/infer", images[:1], "probabilities")
    predict_png = raw_request("POST", place, *multipart([("image", "a.png", _png(images[0]))]))
    adapt = json_request("POST", "/tasks", {"images": images.tolist(), "labels": labels})

    def order(request: bytes, clients: int, more: float = 0.0) -> Order:
        return Order(
            host=HOST,
            port=port,
            request=request.decode("latin-1"),
            clients=clients,
            seconds=effort.seconds + more,
            warm_up=effort.warm_up,
        )

    def over_http(request: bytes, clients: int) -> Callable[[], Load]:
        return lambda: Clients(order(request, clients)).result()

    def while_adapting(clients: int) -> Callable[[], Load]:
        def run() -> Load:
            adapters = Clients(order(adapt, ADAPTERS, more=2 * effort.warm_up))
            try:
                time.sleep(effort.warm_up)
                return Clients(order(predict, clients)).result()
            finally:
                adapters.result()

        return run

    adapted = model.adapt(images, labels)
    adapt_directly = partial(model.adapt, images, labels)
    return [
        _Work(DIRECT, 1, lambda: _loop(_direct(model, adapted, images[:1]), effort)),
        *(_Work(PREDICT, n, over_http(predict, n)) for n in CLIENTS),
        _Work(PREDICT_BINARY, CLIENTS[-1], over_http(predict_binary, CLIENTS[-1])),
        _Work(PREDICT_PNG, CLIENTS[-1], over_http(predict_png, CLIENTS[-1])),
        *(_Work(PREDICT_BUSY, n, while_adapting(n)) for n in CLIENTS),
        _Work(DIRECT_ADAPT, 1, lambda: _loop(adapt_directly, effort)),
        *(_Work(ADAPT, n, over_http(adapt, n)) for n in CLIENTS),
    ]


def _direct(
    model: FewShotModel, adapted: AdaptedModel, image: npt.NDArray[np.uint8]
) -> Callable[[], Any]:
    session = model.bundle.open("predict_adapted", threads=1, providers=None)
    feeds = {"images": image.astype(np.float32), **adapted.state.weights}
    return lambda: session.run(["logits"], feeds)


def _loop(call: Callable[[], Any], effort: Effort) -> Load:
    call()
    milliseconds = []
    start = time.perf_counter()
    while (begin := time.perf_counter()) < start + effort.seconds:
        call()
        milliseconds.append(1000 * (time.perf_counter() - begin))
    return Load(time.perf_counter() - start, milliseconds, {}, broken=0, cpu_seconds=0.0)


def _line(label: str, clients: int, loads: dict[tuple[str, int], list[Load]]) -> Line:
    mine = loads[label, clients]
    pooled = [value for load in mine for value in load.milliseconds]
    answers: dict[str, int] = defaultdict(int)
    for load in mine:
        for status, count in load.statuses.items():
            answers[status] += count
    p50, p95, p99 = np.percentile(pooled, (50, 95, 99))
    ratio: dict[str, Any] = {}
    if label in (PREDICT, PREDICT_BINARY, PREDICT_PNG):
        ratio = _ratio("rate, to direct", mine, loads[DIRECT, 1], lambda load: load.per_second)
        if clients == CLIENTS[-1] and label != PREDICT_PNG:
            ratio["limit"] = SHARE_OF_DIRECT
    elif label == ADAPT:
        base = loads[DIRECT_ADAPT, 1]
        ratio = _ratio("rate, to direct", mine, base, lambda load: load.per_second)
    elif label == PREDICT_BUSY:
        ratio = _ratio("p99, to idle", mine, loads[PREDICT, clients], _p99)
        ratio |= {"limit": SLOWER_WHILE_ADAPTING, "limit_is_most": True}
    return Line(
        label=label,
        clients=clients,
        per_second=tuple(load.per_second for load in mine),
        p99s=tuple(map(_p99, mine)),
        p50=float(p50),
        p95=float(p95),
        p99=float(p99),
        served=len(pooled),
        statuses=dict(answers),
        broken=sum(load.broken for load in mine),
        client_microseconds=1e6 * sum(load.cpu_seconds for load in mine) / sum(answers.values())
        if answers
        else None,
        **ratio,
    )


def _ratio(
    what: str, mine: Sequence[Load], base: Sequence[Load], value: Callable[[Load], float]
) -> dict[str, Any]:
    pairs = zip(mine, base, strict=True)
    return {"ratio_to": what, "ratios": tuple(value(a) / value(b) for a, b in pairs)}


def _p99(load: Load) -> float:
    return float(np.percentile(load.milliseconds, 99))


def _support(model: FewShotModel) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Return noisy copies of one random image a class; what they show does not change the time."""
    rng = np.random.default_rng(0)
    ways = min(model.ways, WAYS)  # a closed-form bundle takes any number
    classes = rng.integers(0, 256, (ways, *model.image_shape))
    labels = np.arange(ways * SHOTS) % ways
    noise = rng.normal(0, 20, (len(labels), *model.image_shape))
    images = (classes[labels] + noise).clip(0, 255).astype(np.uint8)
    return images, [f"class {label}" for label in labels]


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def warnings(results: LoadResults) -> list[str]:
    """Return every reason why these figures are not reliable."""
    found = []
    if results.quick:
        found.append("a quick run, whose figures mean nothing")
    if (results.others or 0.0) > OTHERS:
        found.append(f"other programs took {results.others:.0%} of the CPUs")
    for line in results.lines:
        failed = {s: n for s, n in line.statuses.items() if not s.startswith("2") and s != "429"}
        if failed or line.broken:
            name = f"{line.label}, {line.clients} clients"
            found.append(f"{name}: answers {failed}, {line.broken} connections broken")
    return found


def table(results: LoadResults) -> Table:
    """Return the table for a terminal."""
    shown = Table(*HEADINGS, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=_caption(results))
    for column in shown.columns[1:]:
        column.justify = "right"
    for line in results.lines:
        shown.add_row(*_cells(line), style="red" if line.within_limit is False else "")
    return shown


def markdown(results: LoadResults) -> str:
    """Return the same table in Markdown, with the machine below it."""
    rows = [HEADINGS, ("---", *["--:"] * (len(HEADINGS) - 1)), *map(_cells, results.lines)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f"\n**Unreliable**: {warning}." for warning in warnings(results)]
    return "\n".join([*lines, "", _caption(results), *notes])


def _cells(line: Line) -> tuple[str, ...]:
    refused = line.statuses.get("429", 0)
    ratio = f"{line.ratio.median:.2f} ({line.ratio_to})" if line.ratio else ""
    limit = "" if line.limit is None else f"{'≤' if line.limit_is_most else '≥'} {line.limit:g}"
    return (
        line.label,
        str(line.clients),
        f"{np.median(line.per_second):.0f}"
        if np.median(line.per_second) >= 100
        else f"{np.median(line.per_second):.1f}",
        f"{line.p50:.2f}",
        f"{line.p95:.2f}",
        f"{line.p99:.2f}",
        str(refused) if line.statuses else "",
        ratio,
        limit,
    )


def _caption(results: LoadResults) -> str:
    machine = results.machine
    names = machine.versions | results.serving_versions
    costs = [line.client_microseconds for line in results.lines if line.label == PREDICT]
    return (
        f"{machine.cpu}, {machine.cpus} CPUs; bundle {results.bundle}; "
        f"{', '.join(f'{name} {number}' for name, number in names.items())}; "
        f"commit {(machine.commit or 'unknown')[:10]}{' with changes' if machine.changed else ''}; "
        f"{results.started}, {results.seconds:.0f} s, of which other programs used "
        f"{results.others or 0:.0%} of the CPUs; the clients themselves used "
        f"{max(cost or 0.0 for cost in costs):.0f} µs of CPU per prediction; the server's memory "
        f"peaked at {results.peak_bytes / 2**20:.0f} MiB. Rates and ratios are medians over rounds."
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.exit(f"error: {error}")
