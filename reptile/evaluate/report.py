"""The report for people: one HTML page that holds all it shows and asks nothing of the network.

What is measured is `measure`'s business; here it is put into words, tables and pictures.
"""

import base64
import io
import math
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from reptile import __version__
from reptile.config import BatchNormMode, Section
from reptile.data.prepared import PreparedClass, PreparedData
from reptile.evaluate.charts import Axis, Line, axis, line_chart
from reptile.evaluate.confusions import Confusions, confusions, hardest
from reptile.evaluate.measure import PATH_MODES, STARTS, Evaluation, Measurement, Score, Start
from reptile.provenance import code_sha256, versions

HEADLINE_MODE: BatchNormMode = "frozen"  # each query on its own, as the exported model predicts
START_NAMES: dict[Start, str] = {"trained": "meta-trained", "random": "random start"}
STYLES = {"transductive": "dashed", "frozen": ""}
EXAMPLE_TASKS = 3
EXAMPLE_QUERIES = 3  # of each class
HARDEST = 6
DRAWINGS = 3  # of each of them
LARGEST_MATRIX = 20


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


def render_report(evaluation: Evaluation) -> str:
    """Return the page as HTML."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["score"] = _score
    text = files("reptile.evaluate").joinpath("report.html").read_text(encoding="utf-8")
    held_out = next(iter(evaluation.data))
    fewest = evaluation.fewest_classes
    matrix = confusions(evaluation.data[fewest], evaluation.of(fewest)[:1])
    return environment.from_string(text).render(
        e=evaluation,
        ways=evaluation.checkpoint.settings.ways,
        held_out=held_out,
        headline_mode=HEADLINE_MODE,
        by_step=[(m.shots, _by_step_chart(m, evaluation)) for m in evaluation.held_out],
        path_tasks=len(next(iter(evaluation.held_out[0].by_step.values()))[0]),
        examples=[_examples(m, evaluation.data[m.dataset]) for m in evaluation.measurements],
        example_tasks=EXAMPLE_TASKS,
        example_queries=EXAMPLE_QUERIES,
        matrix_data=fewest,
        matrix=_matrix(matrix, evaluation.data[fewest]),
        hardest=_hardest(evaluation, held_out),
        curves=_curves(evaluation),
        evaluate_settings=_flat(evaluation.settings),
        train_settings=_flat(evaluation.checkpoint.settings),
        code=code_sha256(),
        versions={"reptile": __version__} | versions("torch", "numpy"),
    )


def _by_step_chart(measurement: Measurement, evaluation: Evaluation) -> Markup:
    ways = evaluation.checkpoint.settings.ways
    lines = []
    for start in STARTS:
        for mode in PATH_MODES:
            if mode not in evaluation.modes:
                continue
            scores = [Score.of(100 * row) for row in measurement.by_step[start, mode]]
            means, intervals = zip(*scores, strict=True)
            label = START_NAMES[start] if mode == HEADLINE_MODE else ""
            style = f"{start} {STYLES[mode]}"
            lines.append(Line(label, style, measurement.steps, means, intervals))
    last = measurement.steps[-1]
    chance = 100 / ways
    lines.append(Line("chance", "chance", (0, last), (chance, chance)))
    ticks: list[int] = []
    for step in measurement.steps:
        if not ticks or math.sqrt(step) - math.sqrt(ticks[-1]) > 0.065 * math.sqrt(last):
            ticks.append(step)
    x = Axis("inner steps (square-root scale)", max(last, 1), ticks, scale=math.sqrt)
    return line_chart(
        f"accuracy by inner step, {measurement.shots}-shot", lines, x, _percent_axis()
    )


def _curves(evaluation: Evaluation) -> list[tuple[str, Markup]]:
    curve = evaluation.checkpoint.curve
    if not curve:
        return []
    iterations = [point.iteration for point in curve]
    x = axis("meta-iterations", evaluation.checkpoint.settings.meta_iterations)
    losses = [point.loss for point in curve]
    accuracy = Line("validation", "trained", iterations, [100 * p.score for p in curve])
    chance = 100 / evaluation.checkpoint.settings.ways
    guess = Line("chance", "chance", (0, x.high), (chance, chance))
    loss = Line("training", "trained", iterations, losses)
    return [
        (
            "Accuracy on validation tasks (1-shot, transductive)",
            line_chart("validation accuracy", [accuracy, guess], x, _percent_axis()),
        ),
        (
            "Loss in the last inner step of training tasks",
            line_chart("training loss", [loss], x, axis("", 1.05 * max(losses))),
        ),
    ]


def _percent_axis() -> Axis:
    return Axis("", 100, (0, 20, 40, 60, 80, 100), " %")


def _examples(measurement: Measurement, data: PreparedData) -> dict[str, Any]:
    logits = measurement.logits["trained", HEADLINE_MODE][:EXAMPLE_TASKS]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = weights / weights.sum(-1, keepdims=True)
    starts = [entry.start for entry in data.classes]
    tasks = []
    for task, likely in zip(measurement.tasks, probabilities, strict=False):
        columns = []
        for label in range(likely.shape[-1]):
            support = task.support[task.support_labels == label]
            asked = np.flatnonzero(task.query_labels == label)[:EXAMPLE_QUERIES]
            queries = [
                Query(
                    _image(data, task.query[i]),
                    bool(likely[i].argmax() == label),
                    _letter(int(likely[i].argmax())),
                    float(likely[i].max()),
                    float(likely[i, label]),
                )
                for i in asked
            ]
            name = data.classes[int(np.searchsorted(starts, support[0], side="right")) - 1].name
            columns.append(
                Column(_letter(label), name, [_image(data, row) for row in support], queries)
            )
        tasks.append(columns)
    return {"dataset": measurement.dataset, "shots": measurement.shots, "tasks": tasks}


def _letter(label: int) -> str:
    return chr(ord("A") + label) if label < 26 else str(label + 1)


def _matrix(found: Confusions, data: PreparedData) -> list[dict[str, Any]]:
    """Rows of shares; empty if there are too many classes to read."""
    if len(found.classes) > LARGEST_MATRIX:
        return []
    shares = found.counts / np.maximum(found.counts.sum(1, keepdims=True), 1)
    return [
        {"name": entry.name, "image": _image(data, entry.start), "shares": row.tolist()}
        for entry, row in zip(found.classes, shares, strict=True)
    ]


def _hardest(evaluation: Evaluation, dataset: str) -> list[dict[str, Any]]:
    data = evaluation.data[dataset]

    def drawings(entry: PreparedClass) -> list[str]:
        return [_image(data, entry.start + i) for i in range(min(DRAWINGS, entry.count))]

    return [
        hard._asdict() | {"images": drawings(hard.entry), "others": drawings(hard.taken_for)}
        for hard in hardest(confusions(data, evaluation.of(dataset)), HARDEST)
    ]


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
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            rows.append((prefix + name, shown))
    return rows


def _score(score: Score) -> str:
    return f"{100 * score.mean:.1f} ± {100 * score.interval:.1f}".replace("-", "\N{MINUS SIGN}")
