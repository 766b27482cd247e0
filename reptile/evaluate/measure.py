"""Running test tasks: the predictions and scores of every method, all on the same tasks.

Keeps each task's score, so that any two methods can be compared task by task. Writes no files.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.evaluate.adapting import (
    FloatArray,
    adapt_along,
    engine_on,
    path_to,
)
from reptile.evaluate.comparison import Comparison, Drawn
from reptile.evaluate.fits import Fit, fit_curves, fit_posteriors
from reptile.evaluate.methods import METHODS, in_order
from reptile.evaluate.metrics import Choice, IntervalScale, Mode, Score
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo
from reptile.learn.unadapted import with_interval_scale
from reptile.objectives import Objective
from reptile.settings import BATCH_NORM_MODES, BatchNormMode, EvaluateSettings
from reptile.tasks import Task, check_classes, check_ways

log = logging.getLogger(__name__)

FITS = 6  # tasks whose functions are drawn
OF_THE_PATH = ("trained", "random", "joint")  # also scored on the way


@dataclass(frozen=True)
class Measurement:
    """Every score on one dataset at one number of shots: T tasks of Q queries."""

    dataset: str
    objective: Objective
    shots: int
    tasks: tuple[Task, ...]
    task_scores: Mapping[str, Mapping[Mode, FloatArray]]
    """By method and what batch norm sees: each task's accuracy or mean squared error, [T]."""
    logits: Mapping[Mode, FloatArray]
    """The trained learner's outputs, [T, Q, outputs]."""
    steps: tuple[int, ...] = ()  # where `by_step` was measured; empty on cross-domain data
    by_step: Mapping[tuple[str, BatchNormMode], FloatArray] = field(default_factory=dict)
    """Scores of learners of gradient steps after so many steps, [steps, first tasks]."""
    strengths: Mapping[str, float] = field(default_factory=dict)
    """Of ridge regression, by method."""
    coverage: Mapping[str, FloatArray] = field(default_factory=dict)
    """By method: the share of each task's values that lie in their 95 % intervals, [T]."""

    @property
    def methods(self) -> tuple[str, ...]:
        """All methods, in the order in which they are shown."""
        return in_order(self.task_scores)

    def modes(self, method: str) -> tuple[Mode, ...]:
        """What batch norm saw for this method; `none` where it does not matter."""
        return tuple(self.task_scores[method])

    def outputs(self, mode: BatchNormMode) -> FloatArray:
        """Return the trained learner's outputs [T, Q, outputs]."""
        return self.logits["none"] if "none" in self.logits else self.logits[mode]

    def scores(self, method: str, mode: Mode) -> FloatArray:
        """Return each task's score [T]; a method without modes has one."""
        by_mode = self.task_scores[method]
        return by_mode["none"] if "none" in by_mode else by_mode[mode]

    def score(self, method: str, mode: Mode) -> Score:
        """Return the mean score of one method in one mode of batch norm."""
        return Score.of(self.scores(method, mode))

    def difference(self, method: str, other: str, mode: Mode) -> Score:
        """Return the mean of method - other, task by task: the same tasks narrow the interval."""
        return Score.of(self.scores(method, mode) - self.scores(other, mode))


@dataclass(frozen=True)
class Evaluation:
    """All measurements, and what the report needs to show them."""

    settings: EvaluateSettings
    ways: int
    learner: str  # what a bundle is to have: `trained`, `prototypes` or `ridge`
    choice: Choice | None
    checkpoint: CheckpointInfo
    beside: Mapping[str, CheckpointInfo]
    data: Mapping[str, PreparedData]  # the held-out split's dataset first, then cross-domain
    measurements: tuple[Measurement, ...]  # by dataset, then by shots
    skipped: Mapping[str, str]  # cross-domain datasets that cannot make these tasks, and why
    has_batch_norm: bool
    adaptations: int  # how many tasks learners of gradient steps were adapted to
    fits: tuple[Fit, ...] = ()  # of the first tasks, where inputs are single numbers
    interval_scales: Mapping[str, IntervalScale] = field(default_factory=dict)
    """Of learners that give intervals, by method."""

    @property
    def objective(self) -> Objective:
        """Of the tasks."""
        return self.checkpoint.objective

    @property
    def starts(self) -> tuple[str, ...]:
        """The learners of gradient steps that were scored on the way."""
        return in_order(name for name, _ in self.held_out[0].by_step)

    @property
    def held_out(self) -> tuple[Measurement, ...]:
        """The measurements on held-out classes of the training data."""
        return self.of(next(iter(self.data)))

    def of(self, dataset: str) -> tuple[Measurement, ...]:
        """The measurements on one dataset, fewest shots first."""
        return tuple(m for m in self.measurements if m.dataset == dataset)

    @property
    def fewest_classes(self) -> str:
        """The dataset with the most readable confusion matrix."""
        return min(self.data, key=lambda name: len(self.data[name].split("test").starts))

    @property
    def modes(self) -> tuple[BatchNormMode, ...]:
        """The modes to show: where no prediction depends on a batch, all three are the same."""
        return BATCH_NORM_MODES if self.has_batch_norm else ("frozen",)


def evaluate(
    settings: EvaluateSettings,
    checkpoint: Checkpoint,
    data: PreparedData,
    cross_domain: Mapping[str, PreparedData],
    on_progress: Callable[[int, int], None] | None = None,
    *,
    beside: Mapping[str, Checkpoint] | None = None,
    ways: int | None = None,
    baselines: bool = True,
) -> Evaluation:
    """Measure few-shot scores on the held-out classes and on every cross-domain dataset.

    All methods of `evaluate.methods` that the checkpoint allows get the same tasks: the trained
    learner, its features without adaptation, the network before training, and the raw input. A
    learner of gradient steps starts each task from its checkpoint's weights and optimiser state
    and predicts the queries in all modes of batch norm. No state passes from one task to the next.

    Args:
        settings: the protocol.
        checkpoint: what was trained.
        data: what it was trained on; its test split makes tasks, its validation split chooses.
        cross_domain: further datasets of the same image shape, by name; likewise.
        on_progress: called with the number of adaptations done, and the total.
        beside: further checkpoints trained on the same data, by name.
        ways: classes of a task, instead of the settings'; outputs beyond them are masked, as in
            the bundle.
        baselines: False measures only the trained learner and its untrained start.

    Raises:
        InputError: more ways than a checkpoint has, the held-out classes cannot make the tasks,
            a dataset has another image shape or the name of the training data, or a name beside is
            that of a method.
    """
    beside = beside or {}
    classes, shots = data.split("test"), sorted(set(settings.shots))
    ways = ways or settings.task_ways(checkpoint.info.settings, len(classes.starts))
    for each in (checkpoint, *beside.values()):
        check_ways(each.info.settings, each.info.objective.least_ways, ways)
    for name, each in beside.items():
        _check_beside(name, each, checkpoint, data)
    needed = shots[-1] + settings.queries
    check_classes(classes, ways, needed, f"test split of {data.name}")
    sources, skipped = _sources(data, cross_domain, ways, needed)

    comparison = Comparison(settings, ways, checkpoint, data, beside, baselines=baselines)
    if settings.learner not in (*comparison.learners, "auto"):
        raise InputError(
            f"evaluate.learner = {settings.learner}: there is no such row for a checkpoint of "
            f"{checkpoint.info.settings.algorithm}; use trained"
        )
    of_choice = comparison.choice_adaptations if baselines else 0
    of_tests = len(sources) * len(shots) * len(comparison.adapted) * settings.tasks
    done = 0

    def count(tasks: int) -> None:
        nonlocal done
        done += tasks
        if on_progress:
            on_progress(done, of_choice + of_tests)

    choice = comparison.choose(count) if baselines else None
    measurements = []
    for name, source in sources.items():
        drawn = {number: comparison.draw(source.split("test"), number) for number in shots}
        path = path_to(settings.steps) if name == data.name else ()
        measurements += _measure(comparison, name, source, drawn, path, count)
    return Evaluation(
        settings=settings,
        ways=ways,
        learner=_learner(settings, comparison, choice),
        choice=choice,
        checkpoint=checkpoint.info,
        beside={name: each.info for name, each in beside.items()},
        data=sources,
        measurements=tuple(measurements),
        skipped=skipped,
        has_batch_norm=any(
            learner.checkpoint.model.has_batch_norm for learner in comparison.adapted.values()
        ),
        adaptations=of_choice + of_tests,
        fits=_fits(comparison, settings, data, measurements[0].tasks, checkpoint),
        interval_scales=comparison.scales,
    )


def _sources(
    data: PreparedData, cross_domain: Mapping[str, PreparedData], ways: int, needed: int
) -> tuple[dict[str, PreparedData], dict[str, str]]:
    """Return the datasets that can make the tasks, and why others cannot."""
    sources, skipped = {data.name: data}, {}
    for name, source in cross_domain.items():
        if name == data.name or source.image_shape != data.image_shape:
            raise InputError(
                f"cross-domain dataset {name} of image shape {source.image_shape}: it must have "
                f"another name than the training data and its image shape {data.image_shape}; "
                "change prepare.cross_domain"
            )
        try:
            check_classes(source.split("test"), ways, needed, f"cross-domain dataset {name}")
        except InputError as error:  # measure the rest
            skipped[name] = str(error)
            log.warning("%s; not measured", error)
        else:
            sources[name] = source
    return sources, skipped


def _check_beside(name: str, other: Checkpoint, checkpoint: Checkpoint, data: PreparedData) -> None:
    """Refuse a checkpoint that cannot be measured beside: of other data, or under a taken name."""
    if name in METHODS or not name.replace("-", "_").isidentifier():
        raise InputError(
            f"--beside {name}: a row may not be called so; use another name of letters, digits, "
            "- and _"
        )
    theirs, ours = other.info, checkpoint.info
    if (theirs.data_sha256, theirs.splits_sha256) != (ours.data_sha256, ours.splits_sha256):
        raise InputError(
            f"--beside {name}: it was trained on {theirs.dataset} (data {theirs.data_sha256[:12]}, "
            f"splits {theirs.splits_sha256[:12]}), the checkpoint on {ours.dataset} (data "
            f"{ours.data_sha256[:12]}, splits {ours.splits_sha256[:12]}); train both on {data.name}"
        )


def _learner(settings: EvaluateSettings, comparison: Comparison, choice: Choice | None) -> str:
    """Return the method of this checkpoint that its bundle is to have."""
    if settings.learner != "auto":
        return settings.learner
    if choice is None:
        log.warning(
            "evaluate.learner = auto: the validation split has one class or cannot make the tasks; "
            "took trained"
        )
        return "trained"
    return next(name for name in choice.order if name in METHODS)


def _measure(
    comparison: Comparison,
    name: str,
    data: PreparedData,
    drawn: Mapping[int, Drawn],
    path: tuple[int, ...],
    count: Callable[[int], None],
) -> list[Measurement]:
    """Run all methods on one dataset."""
    every = [task for each in drawn.values() for task in each.tasks]
    embeddings = comparison.embeddings(data, every, tuple(comparison.rows))
    measurements = []
    for shots, tasks in drawn.items():
        scores: dict[str, Mapping[Mode, FloatArray]] = {}
        logits: Mapping[Mode, FloatArray] = {}
        by_step: dict[tuple[str, BatchNormMode], FloatArray] = {}
        coverage: dict[str, FloatArray] = {}
        for method in comparison.adapted:
            along = path if method in OF_THE_PATH else ()
            found = comparison.adapt(method, data, tasks, along, count=count)
            scores[method] = {
                mode: comparison.scores(outputs, tasks) for mode, outputs in found.outputs.items()
            }
            by_step |= {(method, mode): each for mode, each in found.by_step.items()}
            if method == "trained":
                logits = dict(found.outputs.items())
        for method in comparison.rows:
            outputs = comparison.outputs(method, embeddings, tasks)
            scores[method] = {"none": comparison.scores(outputs, tasks)}
            if method == "trained":
                logits = {"none": outputs}
            inside = comparison.coverage(method, embeddings, tasks, outputs)
            if inside is not None:
                coverage[method] = inside
        strengths = {method: comparison.strength(method, shots) for method in comparison.rows}
        measurements.append(
            Measurement(
                name,
                comparison.objective,
                shots,
                tuple(tasks.tasks),
                scores,
                logits,
                path if by_step else (),
                by_step,
                {method: value for method, value in strengths.items() if value is not None},
                coverage,
            )
        )
    return measurements


def _fits(
    comparison: Comparison,
    settings: EvaluateSettings,
    data: PreparedData,
    tasks: tuple[Task, ...],
    checkpoint: Checkpoint,
) -> tuple[Fit, ...]:
    """Return the functions that the trained learner learns on the first tasks."""
    if data.values == 0 or math.prod(data.image_shape) > 1:
        return ()
    if checkpoint.info.settings.closed_form:
        if "trained" in comparison.scales:
            checkpoint = with_interval_scale(checkpoint, comparison.scales["trained"].scale)
        return fit_posteriors(checkpoint.closed_form, data, tasks[:FITS])
    trained = comparison.adapted["trained"]
    path = sorted({0, min(1, settings.steps), settings.steps})
    engine = engine_on(trained.checkpoint, data)
    along = adapt_along(engine, trained.start, tasks[:FITS], path)
    return fit_curves(engine.model, data, tasks[:FITS], dict(along))
