"""The rows on the bundle: adapting and predicting in ONNX Runtime, PyTorch and the kernel.

All on the same task with as many threads. Only shapes matter to the speed, so weights and images
are random.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from benchmarks.results import Line, Point, Row
from benchmarks.timing import Effort, interleave, paired, stopwatch
from reptile.export.graphs import build_graphs
from reptile.export.reference import SupportSet
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo
from reptile.learn.engines import EagerEngine
from reptile.learn.engines.native import NativeEngine
from reptile.learn.optimizer import OptimizerState
from reptile.learn.reptile import MetaState
from reptile.minibatches import mini_batches
from reptile.models import build_model, initialise
from reptile.objectives import to_unit
from reptile.runtime.provider import open_session
from reptile.settings import ModelSettings, TrainSettings
from reptile.tasks import Task

Ways = dict[str, Callable[[], Any]]

MODEL, IMAGE_SHAPE, WAYS = ModelSettings(), (1, 28, 28), 5
SHOTS = (1, 5, 20)
STEPS, BATCH, QUERIES = 50, 5, 25
ADAPT_SPEED = 1.3  # against eager, at least
BEHIND_NATIVE = 4.0  # times the native engine's time, at most
WEIGHTS_FROM_ADAPT = 2  # the outputs before them are losses and finite


def adapting(threads: int, effort: Effort) -> Row:
    """Time one adaptation to support sets of several sizes."""
    steps = 5 if effort.quick else STEPS
    sizes = {WAYS * shots: _ways(shots, threads, steps)[0] for shots in SHOTS}
    times = _interleave(sizes, threads, effort)
    lines: list[Line] = []
    for size in sizes:
        by_engine = {who: times[f"{who} {size}"] for who in ("eager", "native", "onnx")}
        for who, milliseconds in by_engine.items():
            lines.append(
                Line(
                    label=f"{size} images, {who}",
                    milliseconds=tuple(milliseconds),
                    ratios=()
                    if who == "eager"
                    else tuple(paired("speed", milliseconds, by_engine["eager"])),
                    limit=ADAPT_SPEED if who == "onnx" else None,
                    tasks=1,
                    point=Point(curve=who, x=size),
                )
            )
        lines.append(
            Line(
                label=f"{size} images, onnx beside native",
                milliseconds=tuple(by_engine["onnx"]),
                comparison="slowdown",
                ratios=tuple(paired("slowdown", by_engine["onnx"], by_engine["native"])),
                limit=BEHIND_NATIVE,
            )
        )
    return Row(
        name=f"onnx-adapt-{threads}",
        title=f"adapting to a 5-way task, {steps} steps of {BATCH} images, {_count(threads)}",
        lines=tuple(lines),
    )


def predicting(threads: int, effort: Effort) -> Row:
    """Time the prediction of many queries by one adapted model."""
    ways = {QUERIES: _ways(SHOTS[1], threads, steps=1)[1]}
    times = _interleave(ways, threads, effort)
    eager, onnx = times[f"eager {QUERIES}"], times[f"onnx {QUERIES}"]
    return Row(
        name=f"onnx-predict-{threads}",
        title=f"predicting {QUERIES} queries by an adapted model, {_count(threads)}",
        lines=(
            Line(label="eager", milliseconds=tuple(eager)),
            Line(
                label="onnx",
                milliseconds=tuple(onnx),
                ratios=tuple(paired("speed", onnx, eager)),
            ),
        ),
    )


def _interleave(sizes: dict[int, Ways], threads: int, effort: Effort) -> dict[str, list[float]]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return interleave(
            {
                f"{who} {size}": stopwatch(run)
                for size, ways in sizes.items()
                for who, run in ways.items()
            },
            effort,
        )
    finally:
        torch.set_num_threads(before)


def _count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _ways(shots: int, threads: int, steps: int) -> tuple[Ways, Ways]:
    """Return who adapts, and who predicts, by name."""
    checkpoint = _checkpoint()
    model, (weights, state), info = checkpoint.model, checkpoint.meta, checkpoint.info
    optimizer = info.settings.optimizer
    rng = np.random.default_rng(0)
    labels = np.arange(WAYS * shots) % WAYS
    pixels = rng.integers(0, 256, (len(labels), *IMAGE_SHAPE), dtype=np.uint8)
    batches = mini_batches(rng, len(labels), BATCH, steps)
    rows, no_rows = np.arange(len(labels)), np.empty(0, dtype=np.int64)
    tasks = [Task(rows, labels, no_rows, no_rows, tuple(batches))]
    eager = EagerEngine(model, optimizer, pixels, torch.device("cpu"))
    native = NativeEngine(model, optimizer, pixels, threads)

    adapt, predict = (
        open_session(_graphs()[name], name, threads=threads)
        for name in ("adapt", "predict_adapted")
    )
    feeds = SupportSet(pixels, labels, batches).feeds(checkpoint)
    names = [output.name for output in adapt.get_outputs()][WEIGHTS_FROM_ADAPT:]
    adapted = dict(zip(names, adapt.run(names, feeds), strict=True))
    queries = rng.integers(0, 256, (QUERIES, *IMAGE_SHAPE)).astype(np.float32)
    params = {name: torch.from_numpy(value) for name, value in adapted.items()}

    @torch.no_grad()
    def predict_eagerly() -> None:
        model.forward(params, to_unit(torch.from_numpy(queries)))

    return (
        {
            "eager": lambda: eager.adapt(weights, state, tasks),
            "native": lambda: native.adapt(weights, state, tasks),
            "onnx": lambda: adapt.run(None, feeds),
        },
        {
            "eager": predict_eagerly,
            "onnx": lambda: predict.run(None, {"images": queries} | adapted),
        },
    )


@cache
def _graphs() -> dict[str, bytes]:
    graphs = build_graphs(_checkpoint(), STEPS)
    return {name: graph.SerializeToString() for name, graph in graphs.items()}


@cache
def _checkpoint() -> Checkpoint:
    model = build_model(MODEL, WAYS, IMAGE_SHAPE)
    weights = initialise(model, 0)
    state = MetaState(weights, OptimizerState(torch.full_like(weights, 1e-4), 1000))
    info = CheckpointInfo(
        iteration=0,
        settings=TrainSettings(model=MODEL, ways=WAYS),
        image_shape=IMAGE_SHAPE,
        dataset="random",
        data_sha256="0" * 64,
        splits_sha256="0" * 64,
        code_sha256="0" * 64,
        versions={},
    )
    return Checkpoint(model, state, info)
