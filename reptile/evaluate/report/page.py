"""The report for people: one self-contained HTML page.

Measuring is in `measure`; here results become words, tables and pictures.
"""

import base64
import io
import math
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from reptile import __version__
from reptile.data.dataset import PreparedClass, PreparedData
from reptile.evaluate.adapting import PATH_MODES, PATH_TASKS
from reptile.evaluate.confusions import Confusions, confusions, hardest
from reptile.evaluate.measure import Evaluation, Measurement
from reptile.evaluate.methods import title
from reptile.evaluate.metrics import Score
from reptile.evaluate.report.advice import advice
from reptile.evaluate.report.charts import Axis, Dots, Line, axis, line_chart, symmetric_axis
from reptile.evaluate.report.comparison import HEADLINE_MODE, comparison_tables, notes, shown_title
from reptile.objectives import CLASSIFICATION, Objective
from reptile.provenance import code_sha256, versions
from reptile.settings import Section

START_NAMES: dict[str, str] = {
    "trained": "trained",
    "random": "untrained start",
    "joint": "jointly trained",
}
STYLES = {"transductive": "dashed", "frozen": ""}
EXAMPLE_TASKS = 3
EXAMPLE_QUERIES = 3  # of each class
HARDEST = 6
DRAWINGS = 3  # of each of them
LARGEST_MATRIX = 20
LARGEST_ENLARGED = 46  # pixels: smaller images are shown enlarged


class Query(NamedTuple):
    """One query of an example task."""

    image: str
    right: bool
    answer: str  # letter of the class it was taken for
    probability: float
    probability_of_truth: float


class Column(NamedTuple):
    """One class of an example task."""

    letter: str
    name: str
    support: list[str]
    queries: list[Query]


def templates(package: str) -> Environment:
    """Return the HTML templates in a package's folder; a variable that is missing is an error."""
    return Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def render_report(evaluation: Evaluation) -> str:
    """Return the page as HTML."""
    environment = templates("reptile.evaluate.report")
    objective = evaluation.objective
    environment.filters["score"] = lambda score: objective.show(*score)
    environment.filters["signed"] = lambda score: "+" * (score.mean > 0) + objective.show(*score)
    return environment.get_template(f"{objective.name}.html").render(
        e=evaluation,
        ways=evaluation.ways,
        held_out=next(iter(evaluation.data)),
        headline_mode=HEADLINE_MODE,
        methods=comparison_tables(evaluation),
        notes=notes(evaluation),
        learner_title=shown_title(evaluation, evaluation.learner),
        advice=advice(evaluation),
        by_step=[(m.shots, _by_step_chart(m, evaluation)) for m in evaluation.held_out if m.steps],
        path_tasks=min(PATH_TASKS, evaluation.settings.tasks),
        **(_named(evaluation) if objective is CLASSIFICATION else _valued(evaluation)),
        curves=_curves(evaluation),
        evaluate_settings=_flat(evaluation.settings),
        train_settings=_flat(evaluation.checkpoint.settings),
        code=code_sha256("evaluate"),
        versions={"reptile": __version__} | versions("torch", "numpy"),
    )


def _named(evaluation: Evaluation) -> dict[str, Any]:
    """Return the parts for classifiers: classified images, right or wrong, and what is confused.

    Where inputs are no images there are names alone.
    """
    held_out, fewest = next(iter(evaluation.data)), evaluation.fewest_classes
    matrix = confusions(evaluation.data[fewest], evaluation.of(fewest)[:1])
    images = _has_images(evaluation.data[held_out])
    measurements = evaluation.measurements if images else ()
    return {
        "examples": [_examples(m, evaluation.data[m.dataset]) for m in measurements],
        "enlarge": images and evaluation.checkpoint.image_shape[1] <= LARGEST_ENLARGED,
        "example_tasks": EXAMPLE_TASKS,
        "example_queries": EXAMPLE_QUERIES,
        "matrix_data": fewest,
        "matrix": _matrix(matrix, evaluation.data[fewest]),
        "hardest": _hardest(evaluation, held_out),
    }


def _valued(evaluation: Evaluation) -> dict[str, Any]:
    """Return the parts for regressors."""
    titles = {name: shown_title(evaluation, name) for name in evaluation.held_out[0].coverage}
    return {"fits": _fits(evaluation), "titles": titles}


def _fits(evaluation: Evaluation) -> list[Markup]:
    """Draw the functions before adaptation, after one step and after all, and the points."""
    charts = []
    x_high = max((float(np.abs(fit.x).max()) for fit in evaluation.fits), default=1.0)
    for fit in evaluation.fits:
        steps = sorted(fit.by_step)
        last = f"{steps[-1]} steps" if fit.deviation is None else "after"
        names = {0: "before", steps[-1]: last}
        styles = {0: "random", steps[-1]: "trained"}
        lines = [
            Line(
                names.get(step, f"{step} step"),
                styles.get(step, "trained dashed"),
                fit.x.tolist(),
                fit.by_step[step].tolist(),
                (1.96 * fit.deviation).tolist()
                if fit.deviation is not None and step == steps[-1]
                else (),
            )
            for step in steps
        ]
        values = [fit.shown.y, fit.queries.y, *fit.by_step.values()]
        y_high = 1.05 * max(float(np.abs(value).max()) for value in values)
        dots = [
            Dots("ring", 2.4, fit.queries.x.tolist(), fit.queries.y.tolist()),
            Dots("shown", 3.6, fit.shown.x.tolist(), fit.shown.y.tolist()),
        ]
        axes = symmetric_axis("x", x_high), symmetric_axis("", y_high)
        charts.append(line_chart("the function before and after adaptation", lines, *axes, dots))
    return charts


def _by_step_chart(measurement: Measurement, evaluation: Evaluation) -> Markup:
    objective = evaluation.objective
    lines = []
    for start in evaluation.starts:
        for mode in PATH_MODES:
            if mode not in evaluation.modes:
                continue
            scores = [Score.of(objective.scale * row) for row in measurement.by_step[start, mode]]
            means, intervals = zip(*scores, strict=True)
            label = START_NAMES[start] if mode == HEADLINE_MODE else ""
            style = f"{start} {STYLES[mode]}"
            lines.append(Line(label, style, measurement.steps, means, intervals))
    last = measurement.steps[-1]
    level, what = _without_a_network(evaluation)
    lines.append(Line(what, "chance", (0, last), (level, level)))
    ticks: list[int] = []
    for step in measurement.steps:
        if not ticks or math.sqrt(step) - math.sqrt(ticks[-1]) > 0.065 * math.sqrt(last):
            ticks.append(step)
    x = Axis("inner steps (square-root scale)", max(last, 1), ticks, scale=math.sqrt)
    high = max(max(line.y) + max(line.intervals, default=0) for line in lines)
    what = f"{objective.title} by inner step, {measurement.shots}-shot"
    return line_chart(what, lines, x, score_axis(objective, high))


def _without_a_network(evaluation: Evaluation) -> tuple[float, str]:
    """Return what guessing scores, as the charts show it, and its name."""
    if evaluation.objective is CLASSIFICATION:
        return 100 / evaluation.ways, "chance"
    first = evaluation.held_out[0]
    if "zero" not in first.methods:
        return 0.0, ""
    return first.score("zero", HEADLINE_MODE).mean, title("zero")


def _curves(evaluation: Evaluation) -> list[tuple[str, Markup]]:
    curve = evaluation.checkpoint.curve
    if not curve:
        return []
    iterations = [point.iteration for point in curve]
    x = axis("meta-iterations", evaluation.checkpoint.settings.meta_iterations)
    losses = [point.loss for point in curve]
    objective = evaluation.objective
    level, what = _without_a_network(evaluation)
    score = Line("validation", "trained", iterations, [objective.scale * p.score for p in curve])
    guess = Line(what, "chance", (0, x.high), (level, level))
    high = max(level, *score.y)
    loss = Line("training", "trained", iterations, losses)
    # The negative logarithm of a density has any sign.
    loss_axis = (symmetric_axis if min(losses) < 0 else axis)("", 1.05 * max(map(abs, losses)))
    return [
        (
            f"{objective.title.capitalize()} on validation tasks ({objective.validation.shots}-shot"
            f"{', transductive' if evaluation.has_batch_norm else ''})",
            line_chart(
                f"validation {objective.title}", [score, guess], x, score_axis(objective, high)
            ),
        ),
        (
            "Loss in the last inner step of training tasks",
            line_chart("training loss", [loss], x, loss_axis),
        ),
    ]


def score_axis(objective: Objective, high: float) -> Axis:
    """Return the axis of scores up to `high`: of a share in percent, always to 100."""
    if objective.unit == "%":
        return Axis("", 100, (0, 20, 40, 60, 80, 100), " %")
    return axis("", 1.05 * high)


def _examples(measurement: Measurement, data: PreparedData) -> dict[str, Any]:
    logits = measurement.outputs(HEADLINE_MODE)[:EXAMPLE_TASKS]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = weights / weights.sum(-1, keepdims=True)
    starts = [entry.start for entry in data.classes]
    tasks = []
    for task, likely in zip(measurement.tasks, probabilities, strict=False):
        columns = []
        for label in range(likely.shape[-1]):
            support = task.support[task.support_targets == label]
            query_rows = np.flatnonzero(task.query_targets == label)[:EXAMPLE_QUERIES]
            queries = [
                Query(
                    _image(data, task.query[i]),
                    bool(likely[i].argmax() == label),
                    _letter(int(likely[i].argmax())),
                    float(likely[i].max()),
                    float(likely[i, label]),
                )
                for i in query_rows
            ]
            name = data.classes[int(np.searchsorted(starts, support[0], side="right")) - 1].name
            columns.append(
                Column(_letter(label), name, [_image(data, row) for row in support], queries)
            )
        tasks.append(columns)
    return {"dataset": measurement.dataset, "shots": measurement.shots, "tasks": tasks}


def _letter(label: int) -> str:
    return chr(ord("A") + label) if label < 26 else str(label + 1)


def _matrix(confusion: Confusions, data: PreparedData) -> list[dict[str, Any]]:
    """Rows of shares; empty if there are too many classes to read."""
    if len(confusion.classes) > LARGEST_MATRIX:
        return []
    shares = confusion.counts / np.maximum(confusion.counts.sum(1, keepdims=True), 1)
    return [
        {"name": entry.name, "images": _drawings(data, entry, 1), "shares": row.tolist()}
        for entry, row in zip(confusion.classes, shares, strict=True)
    ]


def _hardest(evaluation: Evaluation, dataset: str) -> list[dict[str, Any]]:
    data = evaluation.data[dataset]
    return [
        hard._asdict()
        | {
            "images": _drawings(data, hard.entry, DRAWINGS),
            "others": _drawings(data, hard.taken_for, DRAWINGS),
        }
        for hard in hardest(confusions(data, evaluation.of(dataset)), HARDEST)
    ]


def _has_images(data: PreparedData) -> bool:
    return data.images.dtype == np.uint8


def _drawings(data: PreparedData, entry: PreparedClass, most: int) -> list[str]:
    """Return some images of a class; none where inputs are no images."""
    count = min(most, entry.count) if _has_images(data) else 0
    return [_image(data, entry.start + place) for place in range(count)]


def _image(data: PreparedData, row: int | np.integer[Any]) -> str:
    """Return an image as a data URI."""
    pixels = np.asarray(data.images[row])
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    png = io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def _flat(section: Section, prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in section:
        if isinstance(value, Section):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            several = isinstance(value, tuple)
            shown = ", ".join(map(str, value)) or "none" if several else str(value)
            rows.append((prefix + name, shown))
    return rows
