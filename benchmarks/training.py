"""Rows that run trainings as users do, not single meta-steps: overhead, processes, shared cores."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import yaml

from benchmarks.results import Row, compared
from benchmarks.timing import Effort, Measure, interleave, stopwatch
from reptile.data.dataset import PreparedData, load_prepared
from reptile.data.prepare import prepare
from reptile.data.readers.glyphs import write_glyphs
from reptile.learn.engines import Engine, make_engine
from reptile.learn.engines.native import NativeEngine
from reptile.learn.optimizer import fresh_state
from reptile.learn.reptile import MetaState, meta_step
from reptile.learn.run import run_training
from reptile.models import build_model, initialise
from reptile.settings import PrepareSettings, TrainSettings
from reptile.tasks import training_tasks

OVERHEAD = 0.08  # share of a meta-iteration that is not the inner loop, at most
SLOWDOWN = 3.0  # of training with one core kept busy by another program, at most
REPORT = re.compile(r"\s*(\d+) of \d+: loss")  # what `reptile train` prints at a checkpoint
REPORTS = 4  # in one run; the first one ends the start-up

TRAINING = "training, as it is"
KERNEL = "the inner loops alone"
REST = "everything else"
ARGUMENTS = "gathering and the meta-step, of that"
DRAWING = "drawing the tasks, of that"


def overhead(effort: Effort) -> Row:
    """Time whole training and its inner loops alone, on the same tasks."""
    iterations = 5 if effort.quick else 40
    settings = TrainSettings()
    with _prepared_glyphs() as folder:
        data = load_prepared(folder)
        classes = data.split("train")
        model = build_model(settings.model, settings.ways, data.image_shape)
        weights = initialise(model, settings.seed)
        start = MetaState(weights, fresh_state(weights))
        calls: list[float] = []
        arguments = "auto", model, settings.optimizer, data.images, torch.device("cpu")
        engine = _timed(make_engine(*arguments), calls)
        drawn = [training_tasks(classes, settings, iteration) for iteration in range(iterations)]
        inner_loops: list[float] = []

        def meta_steps() -> float:
            calls.clear()
            begin, state = perf_counter(), start
            for tasks in drawn:
                state = meta_step(engine, state, tasks, settings, 1.0).state
            total = perf_counter() - begin
            inner_loops.append(sum(calls) / iterations * 1e3)
            return total / iterations * 1e3

        alone: list[float] = []

        def training() -> float:
            seconds: list[float] = []

            def timed_engine(*arguments: Any) -> Engine:
                return _timed(make_engine(*arguments), seconds)

            with patch("reptile.learn.run.make_engine", timed_engine):
                total, inner = _train(settings, data, iterations, seconds)
            alone.append(inner)
            return total

        times = interleave(
            {
                TRAINING: training,
                ARGUMENTS: meta_steps,
                DRAWING: stopwatch(lambda: training_tasks(classes, settings, 0)),
            },
            effort,
        )
    rounds = len(times[TRAINING])  # the warm-up's is the first of the others
    times[KERNEL] = alone[-rounds:]
    times[ARGUMENTS] = _differences(times[ARGUMENTS], inner_loops[-rounds:])
    times[REST] = _differences(times[TRAINING], times[KERNEL])
    order = (TRAINING, KERNEL, REST, ARGUMENTS, DRAWING)
    return Row(
        name="overhead",
        title=f"Omniglot, 5-way: a meta-iteration of {settings.meta_batch} tasks and its parts",
        lines=compared(
            {label: times[label] for label in order},
            TRAINING,
            comparison="share",
            limits={REST: OVERHEAD},
        ),
    )


def processes(effort: Effort) -> Row:
    """Time `reptile train` in one process and, by torchrun, in two; from checkpoint to checkpoint.

    Start-up is left out. Five tasks on two processes are three and two, so that two processes can
    at best be 1.67 times as fast as one with as many threads as each of them.
    """
    every = 5 if effort.quick else 60
    cases = {
        "1 process, 2 threads": (1, 2),
        "1 process, 1 thread": (1, 1),
        "2 processes, 1 thread each": (2, 1),
    }
    with _prepared_glyphs() as folder:
        # All runs read one prepared dataset, and each writes to a separate folder.
        measures: dict[str, Measure] = {
            label: _Command(folder, every, *case) for label, case in cases.items()
        }
        rounds = 1 if effort.quick else 4
        times = interleave(measures, effort._replace(least=rounds, most=rounds), warm_up=False)
    return Row(
        name="processes",
        title="Omniglot, 5-way: a meta-iteration of `reptile train`, state in parallel",
        lines=compared(times, next(iter(cases)), tasks=TrainSettings().meta_batch),
    )


def busy_core(effort: Effort) -> Row:
    """Time training on idle cores, and while a program keeps one of them busy."""
    iterations = 5 if effort.quick else 40
    settings = TrainSettings()
    with _prepared_glyphs() as folder, _busy_loop() as loop:
        data = load_prepared(folder)

        def busy() -> float:
            loop.send_signal(signal.SIGCONT)
            try:
                return _train(settings, data, iterations)[0]
            finally:
                loop.send_signal(signal.SIGSTOP)

        times = interleave(
            {"quiet": lambda: _train(settings, data, iterations)[0], "one core busy": busy},
            effort,
        )
    return Row(
        name="busy-core",
        title="Omniglot, 5-way: a meta-iteration of training beside a busy loop",
        lines=compared(times, "quiet", comparison="slowdown", limits={"one core busy": SLOWDOWN}),
    )


class _Command:
    """Measures `reptile train` in a separate process, or several."""

    def __init__(self, folder: Path, every: int, processes: int, threads: int) -> None:
        self._artifacts = folder.parent / f"{processes}x{threads}"
        self._artifacts.mkdir()
        (self._artifacts / "prepared").symlink_to(folder)
        params = self._artifacts / "params.yaml"
        settings: dict[str, Any] = {
            "optimizer": {"state": "parallel"},
            "checkpoint_every": every,
            "meta_iterations": REPORTS * every,
            "validation_tasks": 1,
        }
        params.write_text(yaml.safe_dump({"train": settings}))
        torchrun = f"torch.distributed.run --standalone --nproc-per-node {processes} -m"
        train_here = f"reptile train --params {params.name} --artifacts ."
        self._arguments = [*torchrun.split() * (processes > 1), *train_here.split()]
        self._every, self._threads = every, threads

    def __call__(self) -> float:
        """Return the milliseconds of a meta-iteration, the start-up left out."""
        variables = {"OMP_NUM_THREADS": str(self._threads), "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(
            [sys.executable, "-m", *self._arguments],
            cwd=self._artifacts,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout and process.stderr
                stamps = [perf_counter() for line in process.stdout if REPORT.match(line)]
                errors = process.stderr.read()
            except BaseException:
                process.terminate()
                raise
        if process.returncode or len(stamps) != REPORTS:
            raise RuntimeError(f"`{' '.join(self._arguments)}` failed: {errors.strip()[-500:]}")
        return (stamps[-1] - stamps[0]) / (REPORTS - 1) / self._every * 1e3


def _train(
    settings: TrainSettings, data: PreparedData, iterations: int, calls: Sequence[float] = ()
) -> tuple[float, float]:
    """Return the milliseconds of a meta-iteration in the midst of a training, and of its `calls`.

    The calls are the seconds of each inner loop, one entry more for each while it trains.
    """
    whole = iterations + 2  # the first has the start in it, the last a checkpoint
    changes = {"meta_iterations": whole, "checkpoint_every": whole, "validation_tasks": 1}
    stamps: list[tuple[float, float]] = []
    with TemporaryDirectory() as work:
        run_training(
            settings.model_copy(update=changes),
            data,
            Path(work),
            on_progress=lambda progress: stamps.append((perf_counter(), sum(calls))),
        )
    (start, before), (end, after) = stamps[0], stamps[iterations]
    return (end - start) / iterations * 1e3, (after - before) / iterations * 1e3


def _timed(engine: Engine, seconds: list[float]) -> Engine:
    """Make an engine note the seconds of each of its inner loops."""

    def timed(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = perf_counter()
            result = run(*arguments)
            seconds.append(perf_counter() - start)
            return result

        return call

    watched: Any = engine
    if isinstance(engine, NativeEngine):  # only the kernel: what is done for it is not the loop
        kernel = SimpleNamespace(
            reptile_adapt=timed(engine._kernel.reptile_adapt),
            reptile_predict=engine._kernel.reptile_predict,
        )
        watched._kernel = kernel
    else:
        watched.adapt = timed(engine.adapt)
    return engine


def _differences(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


@contextmanager
def _prepared_glyphs() -> Iterator[Path]:
    """Draw and prepare a small dataset for as long as the block runs."""
    with TemporaryDirectory() as name:
        source, folder = Path(name) / "glyphs.zip", Path(name) / "prepared"
        write_glyphs(source, alphabets=5, characters=6)
        prepare(PrepareSettings(source=str(source), cross_domain=()), folder)
        yield folder


@contextmanager
def _busy_loop() -> "Iterator[subprocess.Popen[bytes]]":
    """Start a stopped program that, when continued, keeps one of our cores busy."""
    lives_with_us = f"import os\nwhile os.getppid() == {os.getpid()}:\n for _ in range(10**6): pass"
    with subprocess.Popen([sys.executable, "-c", lives_with_us]) as loop:
        try:
            loop.send_signal(signal.SIGSTOP)
            if sys.platform == "linux":
                os.sched_setaffinity(loop.pid, {min(os.sched_getaffinity(0))})
            yield loop
        finally:
            loop.kill()
