"""Bundles of tables in C++ and in Node: the values, intervals and classes of the Python runtime."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machines import Made
from small_bundles import small_bundle

from reptile.minibatches import mini_batches
from reptile.runtime import FewShotModel, FewShotRegressor

Machines = Callable[[str], Made]

NODE = """
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import ort from "onnxruntime-node";
import { FewShotRegressor } from "reptile-fewshot/regressor.js";
import { checkGolden } from "reptile-fewshot/golden.js";
const input = JSON.parse(readFileSync(0));
const bundle = (path) => readFile(`${input.bundle}/${path}`);
const model = await FewShotRegressor.load(bundle, ort);
const adapted = await model.adapt(input.rows, input.values, input.options);
const when = (row) => ({ ...row, when: new Date(1000 * row.when) });
const said = (call) => call().then(() => "accepted", (error) => `${error.name}: ${error.message}`);
console.log(
  JSON.stringify({
    cases: (await checkGolden(bundle, ort)).length,
    values: await adapted.predict(input.queries.map(when)),
    intervals: model.closedForm ? await adapted.predictInterval(input.queries, 0.9) : [],
    refused: await Promise.all([
      said(() => model.adapt([{ when: 0 }], [1])),
      said(() => model.adapt(input.rows.slice(0, 1), [null])),
      said(() => model.adapt([[0, "much", "north"]], [1])),
      said(() => adapted.predictInterval(input.queries, 2)),
    ]),
  }),
);
"""


NODE_CLASSES = """
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import ort from "onnxruntime-node";
import { FewShotModel } from "reptile-fewshot";
import { FewShotRegressor } from "reptile-fewshot/regressor.js";
import { checkGolden } from "reptile-fewshot/golden.js";
const input = JSON.parse(readFileSync(0));
const bundle = (path) => readFile(`${input.bundle}/${path}`);
const model = await FewShotModel.load(bundle, ort);
const all = await model.adapt(input.rows, input.labels);
const half = await model.adapt(input.rows.slice(0, 3), input.labels.slice(0, 3));
const grown = await half.add(input.rows.slice(3), input.labels.slice(3));
const said = (call) => call().then(() => "accepted", (error) => `${error.name}: ${error.message}`);
const date = (text, i) => (i % 2 ? new Date(text) : Date.parse(text) / 1000);
const when = (row, i) => ({ ...row, when: date(row.when, i) });
console.log(
  JSON.stringify({
    cases: (await checkGolden(bundle, ort)).length,
    columns: model.columns.map(({ name }) => name),
    logits: (await all.logits(input.queries)).map((row) => [...row]),
    typed: (await all.logits(input.queries.map(when))).map((row) => [...row]),
    grown: (await grown.logits(input.queries)).map((row) => [...row]),
    labels: (await all.predict(input.queries)).labels,
    refused: await Promise.all([
      said(() => model.adapt([{ when: 0 }], ["a"])),
      said(() => model.adapt([[input.rows[0].when, 1, "north"]], ["a"])),
      said(() => model.adapt([["yesterday", 1, "north"], [0, 1, "north"]], ["a", "b"])),
      said(() => model.adapt([], [])),
      said(() => FewShotRegressor.load(bundle, ort)),
    ]),
  }),
);
"""


def rows_of(seed: int, count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "when": 1_767_500_000.0 + 3600 * float(rng.integers(200)),
            "dose": None if place == 1 else float(rng.normal(2000, 300)),
            "site": ["north", "west", "elsewhere"][place % 3],
        }
        for place in range(count)
    ]


def call(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


ROWS, QUERIES = rows_of(0, 4), rows_of(1, 5)
WEAR = [50_100.0, 49_800.0, 50_050.0, 49_950.0]


def numbers(rows: list[dict[str, Any]], made: Made) -> np.ndarray:
    places = {name: i for i, name in enumerate(made.coding.inputs[2].categories)}  # type: ignore[union-attr]
    return np.array(
        [
            [
                row["when"],
                math.nan if row["dose"] is None else row["dose"],
                places.get(row["site"], -1),
            ]
            for row in rows
        ]
    )


def wanted(made: Made) -> tuple[np.ndarray, np.ndarray | None]:
    """The runtime's values, and intervals [queries, 2] where there are any."""
    model = FewShotRegressor.load(made.folder)
    if model.bundle.learner == "gradient":
        return model.adapt(ROWS, WEAR, steps=6, seed=3, learning_rate=0.01).predict(QUERIES), None
    adapted = model.adapt(ROWS, WEAR)
    low, high = adapted.predict_interval(QUERIES, 0.9)
    return adapted.predict(QUERIES), np.hstack([low, high])


@pytest.mark.parametrize("learner", ["bayes", "reptile"])
def test_cpp_gives_the_runtimes_values_and_intervals(
    learner: str,
    machines: Machines,
    built: Path,
    tmp_path: Path,
) -> None:
    made = machines(learner)
    np.save(tmp_path / "inputs.npy", numbers(ROWS, made))
    np.save(tmp_path / "values.npy", np.array(WEAR)[:, None])
    np.save(tmp_path / "queries.npy", numbers(QUERIES, made))
    batch = FewShotRegressor.load(made.folder).bundle.batch
    np.save(tmp_path / "batches.npy", mini_batches(np.random.default_rng(3), 4, batch or 4, 6))
    done = call(built / "regressor", made.folder, tmp_path)
    assert done.returncode == 0, done.stderr
    found = np.array([[float(word) for word in line.split()] for line in done.stdout.splitlines()])
    values, intervals = wanted(made)
    atol = 1e-4 * made.coding.targets[0].deviation
    np.testing.assert_allclose(found[:, :1], values, rtol=0, atol=atol)
    if intervals is not None:
        np.testing.assert_allclose(found[:, 1:], intervals, rtol=0, atol=atol)


def test_cpp_refuses_numbers_that_are_infinite_as_float(built: Path, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle", 1, 1)
    x, y, asked = np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [3.0], [5.0]]), np.ones((1, 1))
    for name, array in (("inputs", x), ("values", y), ("queries", asked)):
        np.save(tmp_path / f"{name}.npy", array)
    done = call(built / "regressor", bundle, tmp_path)
    assert done.returncode == 0, done.stderr
    (wanted,) = FewShotRegressor.load(bundle).adapt(x, y).predict(asked)
    assert float(done.stdout.split()[0]) == pytest.approx(float(wanted[0]), abs=1e-5)


def test_cpp_gives_the_runtimes_classes(machines: Machines, built: Path, tmp_path: Path) -> None:
    """Two forms of a task: all rows at once, and the last one added."""
    made = machines("protonet")
    np.save(tmp_path / "inputs.npy", numbers(ROWS, made))
    np.save(tmp_path / "labels.npy", np.array([0, 1, 0, 1]))
    np.save(tmp_path / "queries.npy", numbers(QUERIES, made))
    done = call(built / "row_classifier", made.folder, tmp_path)
    assert done.returncode == 0, done.stderr
    found = np.array([[float(word) for word in line.split()] for line in done.stdout.splitlines()])
    wanted = FewShotModel.load(made.folder).adapt(ROWS, [0, 1, 0, 1]).logits(QUERIES)
    np.testing.assert_allclose(found, np.vstack([wanted, wanted]), rtol=0, atol=1e-4)


def test_cpp_gives_pytorchs_golden_rows(machines: Machines, built: Path) -> None:
    done = call(built / "cpp/golden", machines("protonet").folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BEYOND" not in done.stdout


def test_cpp_refuses_a_bundle_of_the_other_kind(
    machines: Machines, built: Path, tmp_path: Path
) -> None:
    for program, learner, said in (
        ("regressor", "protonet", "names classes"),
        ("row_classifier", "bayes", "predicts values"),
    ):
        done = call(built / program, machines(learner).folder, tmp_path)
        assert done.returncode == 1
        assert said in done.stderr


def in_node(script: str, given: dict[str, Any], root: Path) -> Any:
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", script],
        input=json.dumps(given),
        cwd=root / "clients/node",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_node_gives_the_runtimes_classes(machines: Machines, root: Path) -> None:
    """Dates as ISO text, as Date and as seconds."""
    made = machines("protonet")

    def dated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        days = [datetime.fromtimestamp(row["when"], UTC).isoformat() for row in rows]
        return [row | {"when": day} for row, day in zip(rows, days, strict=True)]

    labels = ["b", "a", "b", "a"]
    adapted = FewShotModel.load(made.folder).adapt(ROWS, labels)
    given = {
        "bundle": str(made.folder),
        "rows": dated(ROWS),
        "labels": labels,
        "queries": dated(QUERIES),
    }
    found = in_node(NODE_CLASSES, given, root)
    assert found["columns"] == ["when", "dose", "site"]
    for key in ("logits", "typed", "grown"):
        np.testing.assert_allclose(found[key], adapted.logits(QUERIES), rtol=0, atol=1e-4)
    assert found["labels"] == adapted.predict(QUERIES).labels
    golden = json.loads((made.folder / "golden/golden.json").read_text())
    assert found["cases"] == len(golden["cases"])
    words = ["has no dose", "add rows of another", "when is yesterday, no date", "has 0 rows"]
    words.append("use FewShotModel")
    for word, message in zip(words, found["refused"], strict=True):
        assert message.startswith("InputError: ") and word in message, message


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
@pytest.mark.parametrize("learner", ["bayes", "reptile"])
def test_node_gives_the_runtimes_values_and_intervals(
    learner: str, machines: Machines, root: Path
) -> None:
    made = machines(learner)
    options = {} if learner == "bayes" else {"steps": 6, "seed": 3, "learningRate": 0.01}
    given = {
        "bundle": str(made.folder),
        "rows": ROWS,
        "values": WEAR,
        "queries": QUERIES,
        "options": options,
    }
    found = in_node(NODE, given, root)
    values, intervals = wanted(made)
    atol = 1e-4 * made.coding.targets[0].deviation
    np.testing.assert_allclose(found["values"], values, rtol=0, atol=atol)
    if intervals is not None:
        pairs = [[each["low"], each["high"]] for (each,) in found["intervals"]]
        np.testing.assert_allclose(pairs, intervals, rtol=0, atol=atol)
    golden = json.loads((made.folder / "golden/golden.json").read_text())
    assert found["cases"] == len(golden["cases"])
    words = ["has no dose", "holds null", "dose is much, no number"]
    words.append("between 0 and 1" if learner == "bayes" else "predicts no variances")
    for word, message in zip(words, found["refused"], strict=True):
        assert message.startswith("InputError: "), message
        assert word in message
