"""How much faster the native engine adapts than eager PyTorch: `python -m benchmarks.engine`.

Both run in turn in every round, so that a busy machine slows both; the ratio is the median over
rounds of the rounds' own ratios. Only shapes matter to the speed, so the images are random.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the `reptile` command does

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from reptile.config import ModelSettings, OptimizerSettings
from reptile.episodes import Task
from reptile.files import write_json
from reptile.learn.engine import EagerEngine, Engine
from reptile.learn.inner import InnerState
from reptile.learn.native import NativeEngine
from reptile.minibatches import mini_batches
from reptile.models import build_model, initialise

IMAGES = 1000


class Case(NamedTuple):
    """The shapes of one setting."""

    model: ModelSettings
    image_shape: tuple[int, int, int]
    ways: int
    shots: int
    batch: int
    steps: int
    tasks: int


CONV, MLP = ModelSettings(), ModelSettings(name="mlp")
POOL = ModelSettings(filters=32, downsampling="pool")
CASES = {
    "omniglot-5way": Case(CONV, (1, 28, 28), ways=5, shots=10, batch=10, steps=5, tasks=5),
    "omniglot-20way": Case(CONV, (1, 28, 28), ways=20, shots=10, batch=20, steps=10, tasks=5),
    "article-mlp": Case(MLP, (1, 28, 28), ways=5, shots=10, batch=10, steps=5, tasks=5),
    "mini-imagenet": Case(POOL, (3, 84, 84), ways=5, shots=15, batch=10, steps=8, tasks=5),
    "evaluate-1shot": Case(CONV, (1, 28, 28), ways=5, shots=1, batch=5, steps=50, tasks=32),
}


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of each round for each way of adapting to the case's tasks."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (IMAGES, *case.image_shape), dtype=np.uint8)
    labels, nothing = np.repeat(np.arange(case.ways), case.shots), np.empty(0, dtype=np.int64)
    rows = [rng.permutation(IMAGES)[: labels.size] for _ in range(case.tasks)]
    batches = tuple(mini_batches(rng, labels.size, case.batch, case.steps))
    tasks = [Task(own, labels, nothing, nothing, batches) for own in rows]
    model, optimizer = build_model(case.model, case.ways, case.image_shape), OptimizerSettings()
    weights = initialise(model, 0)
    state = InnerState(torch.full_like(weights, 1e-4), 1000)

    def adapt(engine: Engine, at_once: int) -> None:
        for first in range(0, len(tasks), at_once):
            engine.adapt(weights, state, tasks[first : first + at_once])

    eager = EagerEngine(model, optimizer, pixels, torch.device("cpu"))
    native = NativeEngine(model, optimizer, pixels)
    ways: dict[str, Callable[[], None]] = {
        "eager": lambda: adapt(eager, len(tasks)),
        "native, task by task": lambda: adapt(native, 1),
        "native, tasks together": lambda: adapt(native, len(tasks)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            start = perf_counter()
            run()
            if number:  # the first round warms up
                times[name].append((perf_counter() - start) * 1e3)
    return times


def main() -> None:
    """Measure the chosen cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.engine")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write every time to this file")
    chosen = parser.parse_args()
    if chosen.rounds < 1 or not CASES.keys() >= set(chosen.cases):
        parser.error(f"give at least one round, and cases of {', '.join(CASES)}")

    table = Table("setting", "engine", "ms", "quartiles", "speed", title="One meta-batch")
    for column in table.columns[2:]:
        column.justify = "right"
    found: dict[str, Any] = {}
    for name in chosen.cases or CASES:
        found[name] = times = measure(CASES[name], chosen.rounds)
        for way, own in times.items():
            ratio = statistics.median(a / b for a, b in zip(times["eager"], own, strict=True))
            low, middle, high = np.quantile(own, (0.25, 0.5, 0.75))
            spread = f"{low:.1f}-{high:.1f}"
            table.add_row(name, way, f"{middle:.1f}", spread, f"x{ratio:.1f}")
        table.add_section()
    Console().print(table, f"{torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}")
    if chosen.json:
        write_json(chosen.json, {"threads": torch.get_num_threads(), "milliseconds": found})


if __name__ == "__main__":
    main()
