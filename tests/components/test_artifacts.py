"""What Kubeflow is told of a stage, where running the pipeline does not show it."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from bundles import METRICS
from training_task import write_prepared

from components.artifacts import (
    check,
    choose,
    finite,
    measure,
    prepare,
    read_confusions,
    read_point,
    shown_scores,
)
from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.evaluate import evaluate
from reptile.evaluate.metrics import Metrics
from reptile.learn.checkpoint import Checkpoint, CurvePoint, load_checkpoint, save_checkpoint
from reptile.settings import EvaluateSettings, load_settings


class Folder:
    """An artifact as KFP has it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.metadata: dict[str, object] = {}


def test_scores_that_are_not_finite_are_named_but_not_kept() -> None:
    kept = finite({"a": 1.0, "b": math.nan, "c": -math.inf, "d": "text", "e": 3})
    assert kept == {"a": 1.0, "d": "text", "e": 3, "not_finite": "b, c"}
    assert finite({"a": 0.0}) == {"a": 0.0}


def test_a_confusion_matrix_counts_every_query(tmp_path: Path) -> None:
    pairs = [("b", "a"), ("b", "b"), ("a", "c"), ("b", "a")]
    path = tmp_path / "confusion.csv"
    path.write_text("actual,predicted\n" + "".join(f"{a},{p}\n" for a, p in pairs))
    names, matrix = read_confusions(path)
    assert names == ["a", "b", "c"]
    cells = [(a, p) for a in names for p in names]
    counted = Counter(dict(zip(cells, np.ravel(matrix).tolist(), strict=True)))
    assert +counted == Counter(pairs)


@pytest.mark.parametrize(
    "point", ["", "5-way", "5-way 1-shot", "5.0-way 1-shot frozen", "5-way 0-shot frozen", "frozen"]
)
def test_a_point_that_cannot_be_read_is_an_error(point: str) -> None:
    with pytest.raises(InputError, match="5-way 1-shot frozen"):
        read_point(point)


SETTINGS = EvaluateSettings(tasks=4, shots=(1,), steps=2)


Trained = tuple[PreparedData, Checkpoint]


@pytest.fixture
def trained(data: PreparedData, checkpoint: Checkpoint) -> Trained:
    return data, checkpoint


def table(points: list[str], trained: Trained) -> dict[str, list[str]]:
    """The rows of the table of points, by the point."""
    text = measure([read_point(p) for p in points], SETTINGS, *trained, METRICS)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_points_are_measured_as_an_evaluation_of_their_own_would(
    trained: Trained,
) -> None:
    data, checkpoint = trained
    points = ["2-way 1-shot frozen", "2-way 1-shot transductive", "3-way 2-shot frozen"]
    rows = table(points, trained)
    assert list(rows) == points
    for name, cells in rows.items():
        ways, shots, mode = read_point(name)
        chosen = SETTINGS.model_copy(update={"shots": (shots,)})
        (expected,) = evaluate(chosen, checkpoint, data, {}, ways=ways).held_out
        for start, cell in zip(("trained", "random"), cells, strict=True):
            mean, interval = expected.score(start, mode).rounded()
            assert cell == f"{100 * mean:.1f} ± {100 * interval:.1f}"


def test_what_the_evaluation_has_measured_is_not_measured_again(trained: Trained) -> None:
    """Its made-up scores, which no measurement gives, are in the table."""
    rows = table([f"{METRICS.ways}-way 1-shot frozen"], trained)
    assert rows == {"3-way 1-shot frozen": ["75.0 ± 1.0", "25.0 ± 2.0"]}


def test_a_point_that_cannot_be_measured_says_why_beside_those_that_can(
    trained: Trained,
) -> None:
    rows = table(["9-way 1-shot frozen", "2-way 1-shot frozen"], trained)
    assert "is for 2 to 3 ways" in rows["9-way 1-shot frozen"][0]
    assert "±" in rows["2-way 1-shot frozen"][0]


def test_no_points_are_no_error(trained: Trained) -> None:
    assert measure([], SETTINGS, *trained, METRICS) == "No other tasks were asked for.\n"


def test_scores_for_people_name_what_was_measured_and_nothing_else() -> None:
    assert shown_scores(METRICS) == {
        "display_name": "accuracy, %, ± 95 % interval",
        "patterns, 3-way 1-shot, frozen": "75.0 ± 1.0",
    }


def test_an_error_is_not_shown_as_a_share() -> None:
    values = json.loads(METRICS.model_dump_json().replace("classification", "regression"))
    scores = shown_scores(Metrics.model_validate(values | {"metric": "mean_squared_error"}))
    assert scores["display_name"] == "mean squared error, ± 95 % interval"
    assert scores["patterns, 3-way 1-shot, frozen"] == "0.750 ± 0.010"


def candidate(checkpoint: Checkpoint, folder: Path, seed: int, score: float) -> Folder:
    settings = checkpoint.info.settings.model_copy(update={"seed": seed})
    curve = (CurvePoint(iteration=3, loss=1.0, score=score),)
    info = checkpoint.info.model_copy(update={"settings": settings, "curve": curve})
    save_checkpoint(folder / str(seed), checkpoint._replace(info=info))
    artifact = Folder(folder / str(seed))
    artifact.metadata = {"train_settings_sha256": str(seed), "display_name": "checkpoint"}
    return artifact


def test_a_sweep_keeps_the_best_by_validation_whatever_order_candidates_come_in(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    scores = {0: 0.5, 1: 0.75, 2: 0.25, 3: 0.75}
    given = [candidate(checkpoint, tmp_path, seed, score) for seed, score in scores.items()]
    kept = set()
    for number, order in enumerate((given, given[::-1])):
        best, text = Folder(tmp_path / f"best-{number}"), Folder(tmp_path / f"table-{number}")
        choose(order, best, text)
        info = load_checkpoint(Path(best.path)).info
        kept.add(info.settings.seed)
        assert info.curve[-1].score == 0.75
        assert best.metadata == {"train_settings_sha256": str(info.settings.seed)}
        lines = Path(text.path).read_text().splitlines()
        assert [line for line in lines if line.startswith("| seed")] == [
            "| seed | validation accuracy |"
        ], "settings that are the same are not shown"
        assert lines[-2:] == ["| 0 | 0.5000 |", "| 2 | 0.2500 |"]
    assert len(kept) == 1, "of equals, the same"


def test_settings_that_are_wrong_stop_before_anything_is_fetched(tmp_path: Path) -> None:
    for settings in ("", "{", '{"image_size": 0}', '{"size": 28}'):
        with pytest.raises(InputError, match="PrepareSettings"):
            prepare(settings, "nowhere", "", "data", "", "", Folder(tmp_path / "prepared"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("evaluate.shots=[1,19] export.gate.shots=1", ""),
        ("evaluate.shots=[1,20]", "for `reptile evaluate`"),
        ("export.gate.shots=3", "`reptile evaluate` measures 1, 5-shot only"),
        (
            "beside.algorithm=ridge beside.ways=30",
            "the second learner, of `beside`: training split",
        ),
        ("train.train_shots=21", "training split"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_training(
    change: str, words: str, tmp_path: Path
) -> None:
    write_prepared(tmp_path / "prepared")
    (tmp_path / "params.yaml").write_text("")
    settings = load_settings(tmp_path / "params.yaml", change.split())
    sections = ("train", "beside", "evaluate", "export", "verify")
    texts = {f"{name}_settings": getattr(settings, name).model_dump_json() for name in sections}
    prepared = Folder(tmp_path / "prepared")
    if words:
        with pytest.raises(InputError, match=re.escape(words)):
            check(**texts, prepared=prepared)
    else:
        check(**texts, prepared=prepared)
