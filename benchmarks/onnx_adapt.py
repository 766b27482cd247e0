"""How fast the bundle adapts and predicts in ONNX Runtime: `python -m benchmarks.onnx_adapt`.

Against eager PyTorch and the native engine on the same task and as many threads. All run in turn
in every round; busy machines make the least of many rounds the fairest figure. Only shapes matter
to the speed, so weights and images are random.
"""

import argparse
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the `reptile` command does

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from reptile.config import ModelSettings, TrainSettings
from reptile.episodes import Task
from reptile.export.graphs import build_graphs
from reptile.export.reference import SupportSet
from reptile.files import write_json
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo
from reptile.learn.engine import EagerEngine
from reptile.learn.inner import InnerState
from reptile.learn.meta import MetaState
from reptile.learn.native import NativeEngine
from reptile.minibatches import mini_batches
from reptile.models import build_model, initialise, to_unit
from reptile.runtime.provider import open_session

MAX_STEPS = 1000
QUERIES = 25
WEIGHTS_FROM_ADAPT = 2  # the outputs before them are losses and finite


class Case(NamedTuple):
    """The shapes of one setting."""

    model: ModelSettings
    image_shape: tuple[int, int, int]
    ways: int
    shots: int
    batch: int
    steps: int


CONV, MLP = ModelSettings(), ModelSettings(name="mlp")
POOL = ModelSettings(filters=32, downsampling="pool")
CASES = {
    "conv4-1shot": Case(CONV, (1, 28, 28), ways=5, shots=1, batch=5, steps=50),
    "conv4-5shot": Case(CONV, (1, 28, 28), ways=5, shots=5, batch=5, steps=50),
    "conv4-20shot": Case(CONV, (1, 28, 28), ways=5, shots=20, batch=10, steps=50),
    "mini-imagenet": Case(POOL, (3, 84, 84), ways=5, shots=5, batch=10, steps=5),
    "article-mlp": Case(MLP, (1, 28, 28), ways=5, shots=5, batch=5, steps=50),
}


def measure(case: Case, threads: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time one adaptation, and the prediction of 25 queries by an adapted model.

    Building the graphs takes some 20 seconds the first time a network is asked for; they are kept
    for further calls.

    Args:
        case: shapes of the task.
        threads: that each of the ways may use.
        rounds: in each, every way runs once, in turn; one more warms up.

    Returns:
        Milliseconds of each round, [rounds], by what is done and by what does it: "adapt" by
        "onnx", "eager" and "native"; "predict" by "onnx" and "eager".
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ways = _ways(case, threads)
        times: dict[str, dict[str, list[float]]] = {
            what: {who: [] for who in own} for what, own in ways.items()
        }
        for number in range(rounds + 1):
            for what, own in ways.items():
                for who, run in own.items():
                    start = perf_counter()
                    run()
                    if number:
                        times[what][who].append((perf_counter() - start) * 1e3)
    finally:
        torch.set_num_threads(before)
    return times


def _ways(case: Case, threads: int) -> dict[str, dict[str, Callable[[], Any]]]:
    checkpoint = _checkpoint(case.model, case.image_shape, case.ways)
    model, (weights, state), info = checkpoint
    optimizer = info.settings.optimizer
    rng = np.random.default_rng(0)
    labels = np.arange(case.ways * case.shots) % case.ways
    pixels = rng.integers(0, 256, (len(labels), *case.image_shape), dtype=np.uint8)
    batches = mini_batches(rng, len(labels), case.batch, case.steps)
    rows, nothing = np.arange(len(labels)), np.empty(0, dtype=np.int64)
    tasks = [Task(rows, labels, nothing, nothing, tuple(batches))]
    eager = EagerEngine(model, optimizer, pixels, torch.device("cpu"))
    native = NativeEngine(model, optimizer, pixels, threads)

    graphs = _graphs(case.model, case.image_shape, case.ways)
    adapt, predict = (
        open_session(graphs[name], name, threads=threads) for name in ("adapt", "predict_adapted")
    )
    feeds = SupportSet(pixels, labels, batches).feeds(checkpoint)
    names = [output.name for output in adapt.get_outputs()][WEIGHTS_FROM_ADAPT:]
    adapted = dict(zip(names, adapt.run(names, feeds), strict=True))
    queries = rng.integers(0, 256, (QUERIES, *case.image_shape)).astype(np.float32)
    params = {name: torch.from_numpy(value) for name, value in adapted.items()}

    @torch.no_grad()
    def predict_eagerly() -> None:
        model.logits(params, to_unit(torch.from_numpy(queries)))

    return {
        "adapt": {
            "onnx": lambda: adapt.run(None, feeds),
            "eager": lambda: eager.adapt(weights, state, tasks),
            "native": lambda: native.adapt(weights, state, tasks),
        },
        "predict": {
            "onnx": lambda: predict.run(None, {"images": queries} | adapted),
            "eager": predict_eagerly,
        },
    }


@cache
def _graphs(
    settings: ModelSettings, image_shape: tuple[int, int, int], ways: int
) -> dict[str, bytes]:
    graphs = build_graphs(_checkpoint(settings, image_shape, ways), MAX_STEPS)
    return {name: graph.SerializeToString() for name, graph in graphs.items()}


def _checkpoint(
    settings: ModelSettings, image_shape: tuple[int, int, int], ways: int
) -> Checkpoint:
    model = build_model(settings, ways, image_shape)
    weights = initialise(model, 0)
    state = MetaState(weights, InnerState(torch.full_like(weights, 1e-4), 1000))
    info = CheckpointInfo(
        iteration=0,
        settings=TrainSettings(model=settings, ways=ways),
        image_shape=image_shape,
        dataset="random",
        data_sha256="0" * 64,
        splits_sha256="0" * 64,
        code_sha256="0" * 64,
        versions={},
    )
    return Checkpoint(model, state, info)


def main() -> None:
    """Measure the chosen cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.onnx_adapt")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none is named")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write every time to this file")
    chosen = parser.parse_args()
    if min(chosen.rounds, *chosen.threads) < 1 or not CASES.keys() >= set(chosen.cases):
        parser.error(f"give at least one round and thread, and cases of {', '.join(CASES)}")

    columns = ("setting", "threads", "", "by", "least ms", "median ms", "speed")
    table = Table(*columns, title="One task; speed against eager by the least times")
    for column in table.columns[4:]:
        column.justify = "right"
    found: list[dict[str, Any]] = []
    for name in chosen.cases or CASES:
        for threads in chosen.threads:
            times = measure(CASES[name], threads, chosen.rounds)
            found.append({"case": name, "threads": threads, "milliseconds": times})
            for what, own in times.items():
                for who, milliseconds in own.items():
                    least, median = min(milliseconds), float(np.median(milliseconds))
                    speed = f"x{min(own['eager']) / least:.1f}"
                    figures = (f"{least:.1f}", f"{median:.1f}", speed)
                    table.add_row(name, str(threads), what, who, *figures)
            table.add_section()
    Console().print(table, f"load {os.getloadavg()[0]:.1f}")
    if chosen.json:
        write_json(chosen.json, found)


if __name__ == "__main__":
    main()
