"""A table's bundle takes raw rows and gives raw values: from a CSV file to predictions.

Wanted are the numbers of `data.coding` and eager PyTorch in float64, with no graph in between.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from machines import INPUTS, LEARNERS, Made
from schemas import validate_bundle

from reptile.bundle_format import parse_manifest
from reptile.data.coding import CategoryCoding
from reptile.errors import InputError
from reptile.export import closed_form_reference, reference
from reptile.export.reference import SupportSet
from reptile.export.verify import verify_bundle
from reptile.runtime import FewShotModel, FewShotRegressor
from reptile.settings import VerifySettings

Machines = Callable[[str], Made]


@pytest.mark.parametrize("name", LEARNERS)
def test_verify_passes_on_raw_rows(name: str, machines: Machines) -> None:
    made = machines(name)
    validate_bundle(made.folder)
    report = verify_bundle(
        VerifySettings(tasks=5, shots=4), made.folder, made.checkpoint, made.data
    )
    assert [each for each in report["checks"] if not each["passed"]] == []
    assert sum("of raw rows equals" in each["name"] for each in report["checks"]) == 4


def test_a_bundle_whose_graph_codes_otherwise_is_found_out(
    machines: Machines, tmp_path: Path
) -> None:
    made = machines("bayes")
    inputs = [each.model_copy(update={"mean": 7.0}) for each in made.coding.inputs[:2]]
    wrong = made.coding.model_copy(update={"inputs": (*inputs, made.coding.inputs[2])})
    data = replace(made.data, index=made.data.index.model_copy(update={"coding": wrong}))
    report = verify_bundle(VerifySettings(tasks=5, shots=4), made.folder, made.checkpoint, data)
    failed = {each["name"].split(",")[0] for each in report["checks"] if not each["passed"]}
    assert "embed of raw rows equals coding and eager PyTorch" in failed


NAMED: list[dict[str, Any]] = [
    {"when": "2026-01-03T12:00:00", "dose": 2100.0, "site": "south", "wear": 50_100.0},
    {"when": datetime(2026, 1, 5, tzinfo=UTC), "dose": None, "site": "north", "wear": 49_950.0},
    {"when": date(2026, 1, 9), "dose": 1800, "site": "elsewhere", "wear": 49_800.0},
    {"when": np.datetime64("2026-01-12"), "dose": 2000.0, "site": None, "wear": 50_010.5},
]


def columns(made: Made) -> dict[str, Any]:
    """The same rows as `Coding` takes them, written out by hand."""
    days = [(2, 12), (4, 0), (8, 0), (11, 0)]
    start = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    return {
        "when": np.array([start + 86_400 * day + 3600 * hour for day, hour in days]),
        "dose": np.array([2100.0, math.nan, 1800.0, 2000.0]),
        "site": np.array(["south", "north", "elsewhere", None], dtype=object),
        "wear": np.array([row["wear"] for row in NAMED]),
    }


def numbers(made: Made) -> np.ndarray:
    """The same rows as numbers in the order of the manifest's columns."""
    given, site = columns(made), made.coding.inputs[2]
    assert isinstance(site, CategoryCoding)
    places = [site.categories.index("south"), site.categories.index("north"), 17, -1]
    return np.stack([given["when"], given["dose"], places], axis=1)


def test_named_rows_columns_and_numbers_give_what_coding_and_pytorch_do(machines: Machines) -> None:
    made = machines("bayes")
    learner = closed_form_reference.cast(made.checkpoint.closed_form, torch.float64)
    given, target = columns(made), made.coding.targets[0]
    inputs, targets = made.coding.encode_inputs(given), made.coding.encode_targets(given)
    support, asked = (closed_form_reference.embed(learner, each) for each in (inputs, inputs[:2]))
    mean, variance = learner.posterior(support, torch.from_numpy(targets)).predict(asked)
    wanted = mean.numpy() * target.deviation + target.mean
    half = 1.959964 * np.sqrt(variance.numpy()) * target.deviation

    model = FewShotRegressor.load(made.folder)
    by_column = {name: [row[name] for row in NAMED] for name in NAMED[0]}
    by_position = [[row[name] for name in INPUTS] for row in NAMED]
    wear = np.array([row["wear"] for row in NAMED])
    for rows, values in (
        (NAMED, wear),
        (by_column, by_column),
        (by_position, wear[:, None]),
        (numbers(made), NAMED),
    ):
        adapted = model.adapt(rows, values)
        found = adapted.predict(NAMED[:2])
        low, high = adapted.predict_interval(numbers(made)[:2])
        assert found.dtype == low.dtype == np.float64
        # float32 between: a ten-thousandth of the training rows' deviation
        atol = 1e-3 * target.deviation
        np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)
        np.testing.assert_allclose([low, high], [wanted - half, wanted + half], rtol=0, atol=atol)


def test_a_date_keeps_its_minutes(machines: Machines) -> None:
    """In float32, two times of 2026 that are a minute apart are the same number."""
    model = FewShotRegressor.load(machines("bayes").folder)
    adapted = model.adapt(NAMED, [row["wear"] for row in NAMED])
    rows = [NAMED[0], NAMED[0] | {"when": "2026-01-03T12:01:00"}]
    first, second = adapted.predict(rows)
    assert np.float32(columns(machines("bayes"))["when"][0]) == np.float32(
        columns(machines("bayes"))["when"][0] + 60
    )
    assert first != second


def test_a_saved_function_learns_more_rows(machines: Machines, tmp_path: Path) -> None:
    model = FewShotRegressor.load(machines("bayes").folder)
    wear = [row["wear"] for row in NAMED]
    model.adapt(NAMED[:3], wear[:3]).save(tmp_path / "machine.task")
    more = model.load_adapted(tmp_path / "machine.task").add(NAMED[3:], wear[3:])
    whole = model.adapt(NAMED, wear)
    deviation = machines("bayes").coding.targets[0].deviation
    np.testing.assert_allclose(
        more.predict(NAMED), whole.predict(NAMED), rtol=0, atol=1e-4 * deviation
    )


def test_gradient_steps_take_and_give_raw_values(machines: Machines) -> None:
    made = machines("reptile")
    target, given = made.coding.targets[0], columns(made)
    inputs, targets = made.coding.encode_inputs(given), made.coding.encode_targets(given)
    task = SupportSet(inputs, targets, np.array([[0, 1, 2, 3]] * 3))
    adapted = reference.adapt(made.checkpoint, task, torch.float64)
    logits = reference.predict_adapted(made.checkpoint, adapted, inputs, torch.float64)
    model = FewShotRegressor.load(made.folder)
    found = model.adapt(NAMED, given["wear"], steps=3).predict(NAMED)  # one batch of all four
    wanted = logits * target.deviation + target.mean
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * target.deviation)


def test_a_classifier_takes_raw_rows(machines: Machines) -> None:
    made = machines("protonet")
    given = columns(made)
    inputs = made.coding.encode_inputs(given)
    learner = closed_form_reference.cast(made.checkpoint.closed_form, torch.float64)
    adapted = closed_form_reference.adapt(learner, inputs, np.array([0, 0, 1, 1]))
    wanted = closed_form_reference.predict(learner, adapted, inputs)["logits"]
    task = FewShotModel.load(made.folder).adapt(NAMED, ["high", "high", "low", "low"])
    np.testing.assert_allclose(task.logits(numbers(made)), wanted, atol=1e-3)
    assert task.predict(NAMED).labels == [["high", "low"][i] for i in wanted.argmax(1)]


REFUSED: list[tuple[Any, str]] = [
    ([{"when": "2026-01-03", "dose": 1}], "row 0 has no 'site'"),
    ({"when": ["2026-01-03"], "dose": [1]}, "no column 'site'"),
    ({"when": ["2026-01-03"], "dose": [1, 2], "site": ["north"]}, "different lengths"),
    ([["yesterday", 1, "north"]], "row 0, column 'when': 'yesterday' is no date"),
    ([["2026-01-03", "much", "north"]], "column 'dose': 'much' is no number"),
    ([["2026-01-03", math.inf, "north"]], "row 0 is infinite in 'dose'"),
    ([["2026-01-03", 1]], "row 0 has 2 values, expected 3"),
    (np.zeros((2, 4)), "shape (2, 4), expected (N, 3)"),
    ("north", "must be rows of when, dose, site"),
    (7, "must be rows of when, dose, site, got 7"),
]


@pytest.mark.parametrize(("rows", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_rows_that_cannot_be_used_are_named(rows: Any, said: str, machines: Machines) -> None:
    model = FewShotRegressor.load(machines("bayes").folder)
    with pytest.raises(InputError) as refused:
        model.adapt(rows, [50_000.0])
    assert said in str(refused.value)


def test_a_missing_value_to_learn_is_refused(machines: Machines) -> None:
    model = FewShotRegressor.load(machines("bayes").folder)
    with pytest.raises(InputError, match="row 1 has no 'wear'"):
        model.adapt(NAMED[:2], [50_000.0, None])


def test_the_manifest_names_the_columns(machines: Machines) -> None:
    made = machines("bayes")
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["format"] == 4
    task = manifest["task"]
    kinds = {each["name"]: each["kind"] for each in task["columns"]}
    assert kinds == {"when": "date", "dose": "number", "site": "category"}
    assert set(task["columns"][2]["categories"]) == {"north", "south", "west"}
    assert [(each["name"], each["kind"]) for each in task["targets"]] == [("wear", "number")]
    assert 49_000 < task["targets"][0]["mean"] < 51_000
    for spoilt, said in (
        ({"columns": []}, "must hold a column"),
        ({"columns": [*task["columns"], {"name": "x", "kind": "colour"}]}, "kind must be"),
        ({"targets": []}, "targets must hold a column for each value"),
        ({"dtype": "float32"}, "task.dtype"),
    ):
        with pytest.raises(InputError, match=said):
            parse_manifest(json.dumps(manifest | {"task": task | spoilt}), "manifest.json")


def test_golden_tensors_are_raw_in_plain_onnxruntime(machines: Machines) -> None:
    made = machines("bayes")
    rows = np.load(made.folder / "golden/missing/images.npy")
    assert rows.dtype == np.float64 and np.isnan(rows[:, :2]).all()
    values = np.load(made.folder / "golden/some/support_labels.npy")
    assert values.dtype == np.float64 and (abs(values - 50_000) < 5_000).all()
    session = onnxruntime.InferenceSession(made.folder / "few_shot/1/model.onnx")
    names = [each.name for each in session.get_inputs()]
    feeds = {name: np.load(made.folder / f"golden/some/{name}.npy") for name in names}
    (found,) = session.run(["logits"], feeds)
    wanted = np.load(made.folder / "golden/some/logits.npy")
    np.testing.assert_allclose(found, wanted, atol=1e-3 * made.coding.targets[0].deviation)


@pytest.mark.parametrize("dose", [np.inf, 1e300])
def test_a_number_beyond_float32_is_not_taken_for_a_large_one(
    machines: Machines, dose: float
) -> None:
    made = machines("reptile")
    session = onnxruntime.InferenceSession(made.folder / "few_shot/1/model.onnx")
    case = next(path.parent for path in made.folder.glob("golden/*/support_images.npy"))
    names = [each.name for each in session.get_inputs()]
    feeds = {name: np.load(case / f"{name}.npy") for name in names}
    assert session.run(["finite"], feeds)[0]
    feeds["support_images"][:, 1] = dose
    assert not session.run(["finite"], feeds)[0]
