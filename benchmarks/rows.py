"""The rows of the table, by name: what is compared with what, and on which work.

Rows that run whole trainings are in `training`; how the timing is done is in `timing`.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.bundle import adapting, predicting
from benchmarks.cases import CASES, CPU, Work, class_range
from benchmarks.peers import maml, protonet
from benchmarks.results import Line, Point, Row, compared
from benchmarks.timing import Effort, Measure, interleave, paired, stopwatch
from benchmarks.training import busy_core, overhead, processes
from reptile.learn.engines import Engine, make_engine
from reptile.learn.episodic import EpisodicState, episodic_step
from reptile.learn.heads import HEADS
from reptile.models import build_model, initialise
from reptile.settings import BATCH_NORM_MODES, EvaluateSettings, ModelSettings, TrainSettings
from reptile.tasks import FewShotProtocol, episodes, held_out_task, training_tasks

EVALUATED = 8  # test tasks in one timing
EVALUATION_SPEED = 4.0  # of 1-shot tasks against eager, at least
HEAD_SPEED = 3.0  # of training through a head against eager, at least
GROWTH = 1.5  # of the time to draw tasks from a thousand times the images, at most
META_BATCHES = (1, 2, 4, 8, 16, 32, 64)
IMAGE_SIZES = (28, 42, 56, 84)
DATASETS = {f"{20 * classes:,} images": (classes, 20) for classes in (50, 500, 5_000, 50_000)} | {
    "10 classes of 100,000": (10, 100_000)
}


def meta_iteration(name: str, effort: Effort) -> Row:
    """Time one meta-step of a setting of the paper, in both modes that keep Adam's state.

    Eager does the same operations in both, so it runs in one.
    """
    case = CASES[name]
    work = Work(case.settings, case.image_shape)
    tasks = 1 if effort.quick else case.settings.meta_batch
    ways = {
        "eager": ("eager", "sequential"),
        "auto, sequential": ("auto", "sequential"),
        "auto, parallel": ("auto", "parallel"),
    }
    times = interleave(
        {label: stopwatch(work.meta_iteration(*way, tasks)) for label, way in ways.items()}, effort
    )
    limits = {label: case.speed for label in ways if label != "eager"}
    return Row(
        name=name,
        title=f"{case.title}: a meta-iteration of {tasks} tasks",
        lines=compared(times, "eager", limits=limits, tasks=tasks),
    )


def through_a_head(downsampling: str, effort: Effort) -> Row:
    """Time a step of training through ridge regression: one episode, 20-way 1-shot, 5 queries."""
    model_settings = ModelSettings.model_validate({"downsampling": downsampling})
    settings = TrainSettings.model_validate(
        {
            "algorithm": "ridge",
            "model": model_settings,
            "ways": 20,
            "meta_batch": 1,
            "episode": {"shots": [1]},
        }
    )
    pixels = np.random.default_rng(0).integers(0, 256, (800, 1, 28, 28), dtype=np.uint8)
    model = build_model(model_settings, 0, (1, 28, 28))
    head = HEADS["ridge"]
    state = EpisodicState.start(initialise(model, 0), head)
    drawn = episodes(class_range(40, 20), settings, 0)
    engines = {
        name: make_engine(name, model, settings.optimizer, pixels, CPU)
        for name in ("eager", "auto")
    }
    times = interleave(
        {
            name: stopwatch(partial(episodic_step, engine, state, drawn, head, 1e-3))
            for name, engine in engines.items()
        },
        effort,
    )
    return Row(
        name=f"ridge-{downsampling}",
        title=f"training through ridge regression, conv4 ({downsampling}): a 20-way episode",
        lines=compared(times, "eager", limits={"auto": HEAD_SPEED}, tasks=1),
    )


def evaluation(shots: int, effort: Effort) -> Row:
    """Time adapting to test tasks and predicting their queries in every mode of batch norm."""
    case = CASES["omniglot-5way"]
    settings = EvaluateSettings(steps=5) if effort.quick else EvaluateSettings()
    work = Work(case.settings, case.image_shape)
    protocol = FewShotProtocol.of(settings, case.settings.ways, shots)
    tasks = [
        held_out_task(np.random.default_rng(number), work.classes, protocol)
        for number in range(EVALUATED)
    ]

    def evaluate(engine: Engine) -> None:
        weights = engine.adapt(*work.state, tasks).weights
        for mode in BATCH_NORM_MODES:
            engine.predict(weights, tasks, mode)

    times = interleave(
        {name: stopwatch(partial(evaluate, engine)) for name, engine in work.engines.items()},
        effort,
    )
    return Row(
        name=f"evaluate-{shots}shot",
        title=f"{EVALUATED} test tasks, 5-way {shots}-shot: {protocol.steps} steps and prediction "
        "in three modes",
        lines=compared(
            times,
            "eager",
            limits={"auto": EVALUATION_SPEED} if shots == 1 else None,
            tasks=EVALUATED,
        ),
    )


def sampling(effort: Effort) -> Row:
    """Time drawing a meta-batch from ever larger datasets; only their indexes exist."""
    settings = TrainSettings()

    def draw(classes: int, images: int) -> Callable[[], object]:
        index = class_range(classes, images)
        return lambda: training_tasks(index, settings, 0)

    times = interleave(
        {label: stopwatch(draw(*size)) for label, size in DATASETS.items()},
        effort._replace(seconds=effort.seconds / 5),
    )
    first, *others = DATASETS
    lines = compared(times, first, comparison="slowdown", limits=dict.fromkeys(others, GROWTH))
    points = [
        Point(
            curve=f"{images} images a class" if images == 20 else f"{classes} classes",
            x=classes * images,
        )
        for classes, images in DATASETS.values()
    ]
    return Row(
        name="sampling",
        title=f"drawing a meta-batch of {settings.meta_batch} tasks from",
        lines=tuple(
            line.model_copy(update={"point": point})
            for line, point in zip(lines, points, strict=True)
        ),
    )


def task_scaling(effort: Effort) -> Row:
    """Time meta-iterations of more and more tasks."""
    case = CASES["omniglot-5way"]
    work = Work(case.settings, case.image_shape)
    points = {
        number: (work, number) for number in (META_BATCHES[:3] if effort.quick else META_BATCHES)
    }
    return Row(
        name="tasks",
        title="Omniglot, 5-way: a meta-iteration of so many tasks, state in parallel",
        lines=_curve(points, "tasks: {}", effort),
    )


def image_scaling(effort: Effort) -> Row:
    """Time meta-iterations on larger and larger images."""
    settings = CASES["omniglot-5way"].settings
    tasks = 1 if effort.quick else settings.meta_batch
    points = {
        size: (Work(settings, (1, size, size)), tasks)
        for size in (IMAGE_SIZES[:2] if effort.quick else IMAGE_SIZES)
    }
    return Row(
        name="image-size",
        title=f"Omniglot, 5-way: images of so many pixels a side, {tasks} tasks, state in parallel",
        lines=_curve(points, "pixels: {}", effort),
    )


def _curve(points: dict[int, tuple[Work, int]], label: str, effort: Effort) -> tuple[Line, ...]:
    """Time both engines at all points in the same rounds; each point has its own baseline."""
    measures: dict[str, Measure] = {
        f"{engine} {x}": stopwatch(work.meta_iteration(engine, "parallel", tasks))
        for x, (work, tasks) in points.items()
        for engine in work.engines
    }
    times = interleave(measures, effort)
    return tuple(
        Line(
            label=f"{label.format(x)}, {engine}",
            milliseconds=tuple(times[f"{engine} {x}"]),
            ratios=()
            if engine == "eager"
            else tuple(paired("speed", times[f"{engine} {x}"], times[f"eager {x}"])),
            tasks=tasks,
            point=Point(curve=engine, x=x),
        )
        for x, (work, tasks) in points.items()
        for engine in work.engines
    )


ROWS: dict[str, Callable[[Effort], Row]] = {
    **{name: partial(meta_iteration, name) for name in CASES},
    **{f"ridge-{name}": partial(through_a_head, name) for name in ("stride", "pool")},
    "maml": maml,
    "protonet": protonet,
    "evaluate-1shot": partial(evaluation, 1),
    "evaluate-5shot": partial(evaluation, 5),
    **{f"onnx-adapt-{threads}": partial(adapting, threads) for threads in (1, 2)},
    **{f"onnx-predict-{threads}": partial(predicting, threads) for threads in (1, 2)},
    "overhead": overhead,
    "sampling": sampling,
    "tasks": task_scaling,
    "image-size": image_scaling,
    "processes": processes,
    "busy-core": busy_core,
}
