"""The files: readable by DVC and by people, self-contained, and the same bytes each time."""

import csv
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal
from unittest.mock import ANY
from xml.etree import ElementTree

import numpy as np
import pytest
from checkpoints import make_checkpoint
from rich.console import Console

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.evaluate import Evaluation, evaluate, summary_table, write_evaluation
from reptile.evaluate.metrics import read_metrics
from reptile.evaluate.report import render_report
from reptile.evaluate.report.charts import LABEL_HEIGHT, Line, _spread, axis, line_chart
from reptile.evaluate.write import metrics
from reptile.learn.checkpoint import Checkpoint, CurvePoint
from reptile.learn.optimizer import fresh_state
from reptile.learn.reptile import MetaState
from reptile.learn.run import run_training
from reptile.settings import BATCH_NORM_MODES, EvaluateSettings, TrainSettings

SETTINGS = EvaluateSettings(tasks=5, shots=(1, 2), queries=2, steps=3, batch=3)
GRADIENT = {"trained", "random"}
UNADAPTED = (
    "prototypes",
    "ridge",
    "linear_probe",
    "prototype_steps",
    "random_prototypes",
    "random_ridge",
    "nearest_mean",
    "input_ridge",
)
VOID = {"meta", "img", "hr", "br", "link", "input"}


def checkpoint_of(data: PreparedData, name: Literal["conv4", "mlp"] = "conv4") -> Checkpoint:
    checkpoint = make_checkpoint(data, name)
    curve = tuple(CurvePoint(iteration=i, loss=1 / i, score=0.5) for i in (200, 400))
    info = checkpoint.info.model_copy(update={"curve": curve})
    state = MetaState(checkpoint.meta.weights, fresh_state(checkpoint.meta.weights))
    return Checkpoint(checkpoint.model, state, info)


def run(
    data: PreparedData,
    name: Literal["conv4", "mlp"] = "conv4",
    settings: EvaluateSettings = SETTINGS,
) -> Evaluation:
    other = PreparedData(data.images, data.index.model_copy(update={"name": "other"}))
    return evaluate(settings, checkpoint_of(data, name), data, {"other": other})


@pytest.fixture(scope="module")
def evaluation(data: PreparedData) -> Evaluation:
    return run(data)


@pytest.fixture(scope="module")
def folder(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    write_evaluation(evaluation, path)
    return path


class Balance(HTMLParser):
    """Fails on a tag that closes what is not open; keeps text and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_metrics_hold_every_method_in_plain_rounded_numbers(
    evaluation: Evaluation, folder: Path
) -> None:
    nested = json.loads((folder / "metrics.json").read_text())
    assert nested["held_out"] == "patterns"
    assert set(nested["scores"]) == {"patterns", "other"}
    for measured in evaluation.measurements:
        methods = nested["scores"][measured.dataset][str(measured.shots)]
        assert set(methods) == GRADIENT | set(UNADAPTED)
        for start in ("trained", "random"):
            assert set(methods[start]) == set(BATCH_NORM_MODES)
            for mode in BATCH_NORM_MODES:
                mean, interval = measured.score(start, mode)
                expected = {"mean": round(mean, 5), "interval": round(interval, 5)}
                assert methods[start][mode] == expected
        for method in UNADAPTED:
            mean = measured.score(method, "none").mean
            assert methods[method] == {"none": {"mean": round(mean, 5), "interval": ANY}}


def test_metrics_read_what_they_write(evaluation: Evaluation, folder: Path) -> None:
    read = read_metrics(folder)
    assert read == metrics(evaluation)
    assert read.fewest_shots == 1
    assert len(list(read.rows())) == 2 * 2 * (3 + 3 + len(UNADAPTED))
    flat = read.flat()
    assert (
        flat["patterns/2-shot/trained/frozen/accuracy"]
        == read.score("patterns", 2, "trained", "frozen").mean
    )
    assert "other/1-shot/nearest_mean/interval" in flat
    assert len(flat) == 2 * len(list(read.rows()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"patterns": {}}', "of an earlier version; run `reptile evaluate` again"),
        ('{"format": 4}', "format"),
        ('{"format": 2}', "objective"),
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_other_metrics_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(InputError, match=words):
        read_metrics(tmp_path)


def test_accuracy_by_step_starts_unadapted_and_ends_adapted(
    evaluation: Evaluation, folder: Path
) -> None:
    with (folder / "accuracy_by_step.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    expected = evaluation.held_out[0].score("trained", "frozen").mean
    assert float(rows[-1]["trained_frozen"]) == pytest.approx(expected, abs=1e-4)
    assert set(rows[0]) == {
        "step",
        "trained_transductive",
        "trained_frozen",
        "random_transductive",
        "random_frozen",
    }


def test_confusion_has_a_row_for_each_query(data: PreparedData, folder: Path) -> None:
    with (folder / "confusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {entry.name for entry in data.classes if entry.split == "test"}
    assert len(rows) == 5 * 3 * 2  # tasks x ways x queries
    assert {row["actual"] for row in rows} | {row["predicted"] for row in rows} <= names


def test_report_is_well_formed_and_asks_nothing_of_the_network(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Balance(text)
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"data:[^\"]*", "", text))
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_differences_are_those_of_each_method_to_the_learner_on_the_same_tasks(
    evaluation: Evaluation, folder: Path
) -> None:
    read = read_metrics(folder)
    assert read.learner == "trained"
    for measured in evaluation.measurements:
        found = read.differences[measured.dataset][measured.shots]
        assert set(found) == {"random", *UNADAPTED}
        for method, by_mode in found.items():
            assert set(by_mode) == set(BATCH_NORM_MODES)
            for mode in BATCH_NORM_MODES:
                each = measured.scores(method, mode) - measured.scores("trained", mode)
                half = 1.96 * each.std(ddof=1) / len(each) ** 0.5
                assert by_mode[mode].mean == pytest.approx(each.mean(), abs=1e-5)
                assert by_mode[mode].interval == pytest.approx(half, abs=1e-5)


def test_metrics_of_format_2_are_read(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "metrics.json").read_text())
    old = {"format": 2} | {
        name: values[name] for name in ("objective", "metric", "ways", "held_out", "scores")
    }
    (tmp_path / "metrics.json").write_text(json.dumps(old))
    read, now = read_metrics(tmp_path), read_metrics(folder)
    assert read.scores == now.scores
    assert read.learner == "trained"
    assert read.differences == {}


def test_report_opens_with_every_method_and_its_difference(
    evaluation: Evaluation, folder: Path
) -> None:
    text = (folder / "report.html").read_text()
    tables = re.findall(r'<table class="numbers compared">.*?</table>', text, re.DOTALL)
    assert len(tables) == len(evaluation.data)
    first = evaluation.held_out[0]
    for method in first.methods:
        mean, interval = first.score(method, "frozen")
        assert f"<td>{100 * mean:.1f} ± {100 * interval:.1f}</td>" in tables[0]
    assert len(re.findall(r"<tr class=\"learner", tables[0])) == 1
    assert "validation tasks of" in text
    assert "the simplest learner within one standard error of the best" in text


def test_report_shows_the_scores(evaluation: Evaluation, folder: Path) -> None:
    text = (folder / "report.html").read_text()
    for measured in evaluation.measurements:
        for mode in BATCH_NORM_MODES:
            mean, interval = measured.score("trained", mode)
            assert f"{100 * mean:.1f} ± {100 * interval:.1f}" in text


def test_the_same_inputs_give_the_same_bytes(
    data: PreparedData, folder: Path, tmp_path: Path
) -> None:
    write_evaluation(run(data), tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "accuracy_by_step.csv",
        "confusion.csv",
        "metrics.json",
        "report.html",
        "settings.json",
    ]
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_names_from_folders_cannot_write_html(data: PreparedData, tmp_path: Path) -> None:
    evil = "<b onclick=x>&\"'"
    classes = tuple(c.model_copy(update={"name": c.name + evil}) for c in data.classes)
    index = data.index.model_copy(update={"classes": classes, "name": evil})
    write_evaluation(run(PreparedData(data.images, index)), tmp_path)
    text = (tmp_path / "report.html").read_text()
    Balance(text)
    assert "<b onclick" not in text


@pytest.mark.parametrize("change", [{"steps": 0}, {"tasks": 2}, {"queries": 7}, {"shots": (3,)}])
def test_unusual_protocols_can_be_reported(
    data: PreparedData, change: dict[str, object], tmp_path: Path
) -> None:
    write_evaluation(run(data, settings=SETTINGS.model_copy(update=change)), tmp_path)
    Balance((tmp_path / "report.html").read_text())


def test_a_network_without_batch_norm_gets_one_row_and_an_explanation(
    data: PreparedData, tmp_path: Path
) -> None:
    write_evaluation(run(data, "mlp"), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "no batch norm" in text
    assert "<dt>transductive" not in text
    assert read_metrics(tmp_path).modes == ("frozen",)


def test_colour_images_can_be_shown(tmp_path: Path, data: PreparedData) -> None:
    index = data.index.model_copy(update={"image_shape": (3, 12, 12)})
    write_evaluation(run(PreparedData(data.images.repeat(3, axis=1), index)), tmp_path)
    assert "data:image/png" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("shape", [(144,), (12, 12), (1, 12, 12)])
def test_inputs_that_are_no_images_are_shown_by_their_names(
    tmp_path: Path, data: PreparedData, shape: tuple[int, ...]
) -> None:
    signals = (data.images / 255).astype(np.float32).reshape(-1, *shape)
    index = data.index.model_copy(update={"image_shape": shape, "dtype": "float32"})
    write_evaluation(run(PreparedData(signals, index), "mlp"), tmp_path)
    text = (tmp_path / "report.html").read_text()
    Balance(text)
    assert "<img" not in text and "Tasks as they were" not in text
    assert "the hardest of the held-out classes" in text


def test_summary_table_has_a_row_for_each_mode(evaluation: Evaluation) -> None:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as captured:
        console.print(summary_table(metrics(evaluation)))
    text = captured.get()
    for word in ("patterns", "other", "non-transductive", "frozen", "trained", "linear_probe", "±"):
        assert word in text


def test_labels_of_a_chart_do_not_overlap() -> None:
    placed = sorted(_spread([100.0, 102.0, 103.0, 40.0]))
    assert all(b - a >= LABEL_HEIGHT - 1e-9 for a, b in itertools.pairwise(placed))
    assert _spread([40.0, 90.0]) == [40.0, 90.0]


@pytest.mark.parametrize("high", [0.3, 1, 7, 600, 2000, 100000])
def test_an_axis_has_a_few_round_ticks_within_its_range(high: float) -> None:
    ticks = axis("x", high).ticks
    assert 3 <= len(ticks) <= 6
    assert ticks[-1] <= high + 1e-9


def test_a_line_of_one_point_is_a_dot() -> None:
    chart = line_chart("dot", [Line("a", "trained", [1], [0.5])], axis("x", 2), axis("y", 1))
    assert "<circle" in chart


def test_a_closed_form_learner_is_reported_without_steps(
    data: PreparedData, tmp_path: Path
) -> None:
    values = {
        "algorithm": "protonet",
        "model": {"filters": 4},
        "ways": 3,
        "engine": "eager",
        "device": "cpu",
        "meta_iterations": 4,
        "checkpoint_every": 4,
        "validation_tasks": 2,
        "episode": {"shots": [1], "queries": 1},
    }
    closed = run_training(TrainSettings.model_validate(values), data)
    write_evaluation(evaluate(SETTINGS, closed, data, {}), tmp_path)
    text = (tmp_path / "report.html").read_text()
    Balance(text)
    assert "trained learner (protonet)" in text
    assert "closed form" in text
    assert not (tmp_path / "accuracy_by_step.csv").exists()
    read = read_metrics(tmp_path)
    assert (
        read.find("patterns", 1, "trained", "frozen")
        == read.scores["patterns"][1]["trained"]["none"]
    )
    assert set(read.differences["patterns"][1]["nearest_mean"]) == {"none"}
    beside = evaluate(SETTINGS, checkpoint_of(data), data, {}, beside={"second": closed})
    write_evaluation(beside, tmp_path)
    text = (tmp_path / "report.html").read_text()
    Balance(text)
    assert "second (protonet)" in text
    named = evaluate(SETTINGS, checkpoint_of(data), data, {}, beside={"protonet-trained": closed})
    text = render_report(named)
    assert "second learner, trained through nearest prototypes" in text
    assert "protonet-trained (protonet)" not in text
    assert "Ship a closed-form learner where it is at least as good" in text
