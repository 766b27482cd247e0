"""Bundles of tables and of other numbers being served; the runtime on typed rows is the oracle."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machines import INPUTS, Made
from small_bundles import small_bundle
from starlette.testclient import TestClient

from reptile.runtime import FewShotModel, FewShotRegressor

Serve = Callable[..., TestClient]
Machines = Callable[[str], Made]
Rows = list[dict[str, Any]]

KNOWN: Rows = [
    {"when": "2026-01-03T12:00:00", "dose": 2100.0, "site": "south", "wear": 50_100.0},
    {"when": "2026-01-05", "dose": None, "site": "north", "wear": 49_950.0},
    {"when": "2026-01-09 06:30:00+02:00", "dose": 1800, "site": "else, where", "wear": 49_800.0},
    {"when": "2026-01-12", "dose": 2000.0, "site": None, "wear": 50_010.5},
]
ASKED: Rows = [{key: row[key] for key in INPUTS} for row in KNOWN[:3]]
LABELS = ["high", "high", "low", "low"]


def as_csv(rows: Rows, separator: str = ",") -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, [*rows[0]], delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def post(client: TestClient, path: str, rows: Rows, by: str) -> Any:
    """Send the same rows as JSON, as CSV or as a CSV file of a form."""
    if by == "json":
        return client.post(path, json={"rows": rows})
    if by == "csv":
        return client.post(path, content=as_csv(rows), headers={"content-type": "text/csv"})
    return client.post(path, files={"rows": ("mine.csv", as_csv(rows))})


def columns(predictions: Sequence[dict[str, dict[str, float]]], key: str) -> np.ndarray:
    return np.array([list(each[key].values()) for each in predictions])


@pytest.mark.parametrize("by", ["json", "csv", "form"])
def test_rows_give_the_values_and_intervals_of_the_runtime(
    by: str, serve: Serve, machines: Machines, tmp_path: Path
) -> None:
    """Also after more rows, and after a restart."""
    made = machines("bayes")
    model = FewShotRegressor.load(made.folder)
    client = serve(bundle=made.folder, tasks=tmp_path / "tasks")
    answer = post(client, "/tasks", KNOWN[:2], by)
    assert answer.status_code == 201, answer.text
    task = answer.json()
    assert (task["labels"], task["losses"]) == ([], [])

    def check(server: TestClient, known: Rows) -> None:
        adapted = model.adapt(known, known)
        answer = post(server, f"/tasks/{task['id']}/predict", ASKED, by)
        found = answer.json()["predictions"]
        assert [each["values"].keys() for each in found] == [{"wear"}] * 3
        low, high = adapted.predict_interval(ASKED)
        atol = 1e-4 * made.coding.targets[0].deviation
        for key, wanted in (("values", adapted.predict(ASKED)), ("low", low), ("high", high)):
            np.testing.assert_allclose(columns(found, key), wanted, rtol=0, atol=atol)

    check(client, KNOWN[:2])
    assert post(client, f"/tasks/{task['id']}/examples", KNOWN[2:], by).status_code == 200
    check(client, KNOWN)
    client.__exit__(None, None, None)
    check(serve(bundle=made.folder, tasks=tmp_path / "tasks"), KNOWN)


@pytest.mark.parametrize("by", ["json", "csv", "form"])
def test_rows_are_classified_as_by_the_runtime(by: str, serve: Serve, machines: Machines) -> None:
    """Their labels are a column, whose name may be given."""
    made = machines("protonet")
    wanted = FewShotModel.load(made.folder).adapt(KNOWN, LABELS).predict(ASKED)
    client = serve(bundle=made.folder)
    for name in ("label", "grade"):
        rows = [row | {name: label} for row, label in zip(KNOWN, LABELS, strict=True)]
        path = "/tasks" if name == "label" else "/tasks?label=grade"
        task = post(client, path, rows, by).json()
        assert task["labels"] == ["high", "low"]
        found = post(client, f"/tasks/{task['id']}/predict", ASKED, by).json()["predictions"]
        assert [each["label"] for each in found] == wanted.labels
        np.testing.assert_allclose(
            columns(found, "probabilities"), wanted.probabilities, rtol=0, atol=1e-5
        )


def test_gradient_steps_give_values_without_intervals(serve: Serve, machines: Machines) -> None:
    made = machines("reptile")
    adapted = FewShotRegressor.load(made.folder).adapt(KNOWN, KNOWN, steps=2, seed=3)
    client = serve(bundle=made.folder)
    task = client.post("/tasks", json={"rows": KNOWN, "steps": 2, "seed": 3}).json()
    np.testing.assert_allclose(task["losses"], adapted.losses, rtol=1e-5)
    found = post(client, f"/tasks/{task['id']}/predict", ASKED, "json").json()["predictions"]
    assert [each.keys() for each in found] == [{"values"}] * 3
    np.testing.assert_allclose(columns(found, "values"), adapted.predict(ASKED), rtol=1e-6)
    refused = post(client, f"/tasks/{task['id']}/examples", KNOWN, "json")
    assert refused.status_code == 422 and "adapt again" in refused.json()["error"]
    assert client.delete(f"/tasks/{task['id']}/labels/x").status_code == 404


def test_intervals_have_the_level_that_a_request_names(serve: Serve, machines: Machines) -> None:
    """In the JSON or in the query; requests of two levels at once each have their own."""
    made = machines("bayes")
    adapted = FewShotRegressor.load(made.folder).adapt(KNOWN, KNOWN)
    client = serve(bundle=made.folder)
    path = f"/tasks/{post(client, '/tasks', KNOWN, 'json').json()['id']}/predict"
    atol = 1e-4 * made.coding.targets[0].deviation

    def check(answer: Any, level: float) -> None:
        found = answer.json()["predictions"]
        for key, wanted in zip(
            ("low", "high"), adapted.predict_interval(ASKED, level), strict=True
        ):
            np.testing.assert_allclose(columns(found, key), wanted, rtol=0, atol=atol)

    check(client.post(path, json={"rows": ASKED, "level": 0.8}), 0.8)
    for by in ("json", "csv", "form"):
        check(post(client, f"{path}?level=0.5", ASKED, by), 0.5)
    check(client.post(f"{path}?level=0.5", json={"rows": ASKED, "level": 0.8}), 0.5)
    check(client.post(path, json={"rows": ASKED, "level": 1 - 2**-53}), 1 - 2**-53)
    levels = [0.5, 0.8, 0.95, 0.99] * 5
    with ThreadPoolExecutor() as threads:
        answers = threads.map(
            lambda each: post(client, f"{path}?level={each}", ASKED, "csv"), levels
        )
        for level, answer in zip(levels, answers, strict=True):
            check(answer, level)


def test_a_level_that_cannot_be_used_is_one_sentence(serve: Serve, machines: Machines) -> None:
    client = serve(bundle=machines("bayes").folder)
    path = f"/tasks/{post(client, '/tasks', KNOWN, 'json').json()['id']}/predict"
    for level in (0, 1, -0.5, 95):
        for answer in (
            client.post(path, json={"rows": ASKED, "level": level}),
            post(client, f"{path}?level={level}", ASKED, "csv"),
        ):
            said = f"level must lie between 0 and 1, got {float(level)}"
            assert (answer.status_code, answer.json()["error"]) == (422, said)
    assert "got nan" in post(client, f"{path}?level=nan", ASKED, "csv").json()["error"]
    answer = post(client, f"{path}?level=high", ASKED, "json")
    assert answer.status_code == 422 and "level: Input should be a valid number" in answer.text
    answer = client.post("/tasks", json={"rows": KNOWN, "level": 0.8})
    assert answer.status_code == 422 and "the body has rows and level" in answer.text
    for learner, targets in (("reptile", {}), ("protonet", {"label": "a"})):
        client = serve(bundle=machines(learner).folder)
        rows = [row | targets for row in KNOWN]
        rows[0] |= {"label": "b"}
        task = post(client, "/tasks", rows, "json").json()["id"]
        answer = client.post(f"/tasks/{task}/predict", json={"rows": ASKED, "level": 0.8})
        assert answer.status_code == 422 and "predicts no intervals" in answer.json()["error"]


def test_other_numbers_come_as_inputs(serve: Serve, tmp_path: Path) -> None:
    functions, classes = small_bundle(tmp_path / "f", 1, 2), small_bundle(tmp_path / "c", 2)
    x, y = [0.0, 1.0, 2.0], [[0.0, 5.0], [1.0, 4.0], [2.0, 3.0]]
    client = serve(bundle=functions)
    task = client.post("/tasks", json={"inputs": x, "values": y}).json()
    answer = client.post(f"/tasks/{task['id']}/predict", json={"inputs": [0.5, 1.5]}).json()
    found = answer["predictions"]
    assert found[0]["values"].keys() == {"y0", "y1"}
    np.testing.assert_allclose(columns(found, "values"), [[0.5, 4.5], [1.5, 3.5]], atol=0.05)
    assert (columns(found, "low") < columns(found, "values")).all()

    client = serve(bundle=classes)
    corners = [[0.0, 0.0], [1.0, 1.0]]
    task = client.post("/tasks", json={"inputs": corners, "labels": ["a", "b"]}).json()
    answer = client.post(f"/tasks/{task['id']}/predict", json={"inputs": [[0.9, 0.8]]})
    assert answer.json()["predictions"][0]["label"] == "b"
    for body, said in (
        ({"inputs": corners}, "the body has inputs: this bundle needs inputs and labels"),
        ({"inputs": corners, "values": [1, 2]}, "needs inputs and labels"),
        ({"images": corners, "labels": ["a", "b"]}, "needs inputs and labels"),
        ({"inputs": [[1.0]], "labels": ["a"]}, "inputs have shape (1, 1), expected (N, 2)"),
    ):
        refused = client.post("/tasks", json=body)
        assert refused.status_code == 422 and said in refused.json()["error"], refused.text


def test_inputs_without_names_come_as_csv(serve: Serve, tmp_path: Path) -> None:
    """Numbered from 0, as the predicted values are; equal to the same numbers as JSON."""
    rng = np.random.default_rng(0)
    for inputs, outputs in ((1, 1), (3, 1), (2, 2), (3, 0)):
        client = serve(bundle=small_bundle(tmp_path / f"{inputs}{outputs}", inputs, outputs))
        x, y = rng.normal(size=(4, inputs)).round(3), rng.normal(size=(4, outputs)).round(3)
        names = ["x"] if inputs == 1 else [f"x{i}" for i in range(inputs)]
        rows: Rows = [dict(zip(names, row, strict=True)) for row in x.tolist()]
        if outputs:
            known = ["y"] if outputs == 1 else ["y0", "y1"]
            learnt = [
                row | dict(zip(known, each, strict=True))
                for row, each in zip(rows, y.tolist(), strict=True)
            ]
            targets = {"values": y.tolist()}
        else:
            learnt = [row | {"label": label} for row, label in zip(rows, LABELS, strict=True)]
            targets = {"labels": LABELS}
        sent = {"inputs": x.tolist() if inputs > 1 else x.ravel().tolist()}
        task = client.post("/tasks", json=sent | targets).json()["id"]
        expected = client.post(f"/tasks/{task}/predict", json=sent).json()
        for by in ("csv", "form"):
            answer = post(client, "/tasks", [dict(reversed(row.items())) for row in learnt], by)
            assert answer.status_code == 201, answer.text
            path = f"/tasks/{answer.json()['id']}"
            assert post(client, f"{path}/predict", rows, by).json() == expected
            assert post(client, f"{path}/examples", learnt, by).status_code == 200


def test_csv_of_numbers_that_cannot_be_used_is_one_sentence(serve: Serve, tmp_path: Path) -> None:
    client = serve(bundle=small_bundle(tmp_path / "f", 2, 1))
    for sent, said in (
        (b"", "rows: no column 'x0': give x0, x1"),
        (b"x0,y\n1,2\n", "rows: no column 'x1': give x0, x1"),
        (b"x0,x1\n1,2\n", "rows: no column 'y': give y"),
        (b"x0,x1,y\n", "0 inputs: give 1 to 1000"),
        (b"x0,x1,y\n1,,2\n", "row 0 has no 'x1': leave out rows"),
        (b"x0,x1,y\n1,2,3\n1,2,\n", "row 1 has no 'y': leave out rows"),
        (b"x0,x1,y\n1,a,2\n", "row 0, column 'x1': 'a' is no number"),
        (b"x0,x1,y\n1,1_000,2\n", "row 0, column 'x1': '1_000' is no number"),
        ("x0,x1,y\n1,\N{FULLWIDTH DIGIT ONE},2\n".encode(), "is no number"),
        (b"x0,x1,y\n1,inf,2\n", "row 0 is infinite in 'x1'"),
        (b"x0,x1,y\n1,1e39,2\n", "not finite in float32"),
    ):
        answer = client.post("/tasks", content=sent, headers={"content-type": "text/csv"})
        assert answer.status_code == 422 and said in answer.json()["error"], answer.text
    wide = serve(bundle=small_bundle(tmp_path / "w", 5000))
    answer = wide.post("/tasks", content=b"x0\n1\n", headers={"content-type": "text/csv"})
    assert answer.status_code == 422 and len(answer.text) < 1000


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_csv_of_all_sorts_is_read_as_prepare_reads_it(
    separator: str, serve: Serve, machines: Machines
) -> None:
    """A byte-order mark, spaces, empty lines, further columns, names of missing values."""
    client = serve(bundle=machines("bayes").folder)
    rows = [{"": "1", "machine": "m1", **row, "note": 'a "b"\nc'} for row in KNOWN]
    for row, missing in zip(rows, ("", "NA", "null", " NaN "), strict=True):
        row["dose"] = missing if row["dose"] is None else f" {row['dose']} "
    plain = post(client, "/tasks", KNOWN, "json").json()["id"]
    sent = b"\xef\xbb\xbf" + as_csv(rows, separator).replace(b"when", b" when ") + b"\r\n\r\n"
    answer = client.post(
        "/tasks", content=sent, headers={"content-type": "text/csv; header=present; charset=UTF-8"}
    )
    assert answer.status_code == 201, answer.text
    tasks = (plain, answer.json()["id"])
    asked = [post(client, f"/tasks/{each}/predict", ASKED, "json").json() for each in tasks]
    assert asked[0] == asked[1]
    other = {"content-type": "text/csv; charset=windows-1252"}
    assert client.post("/tasks", content=sent, headers=other).status_code == 415


REFUSED: list[tuple[str, bytes, int, str]] = [
    ("json", b'{"rows": [{"when": "2026-01-03", "dose": 1, "wear": 5}]}', 422, "0 has no 'site'"),
    ("json", b'{"rows": [{"when": "soon", "dose": 1, "site": "a", "wear": 5}]}', 422, "'soon' is"),
    ("json", b'{"rows": [{"when": [1], "dose": 1, "site": "a", "wear": 5}]}', 422, "column 'when'"),
    ("json", b'{"rows": [{"when": 1, "dose": 1, "site": {}, "wear": 5}]}', 422, "no category"),
    ("json", b'{"rows": [{"when": 1, "dose": "2", "site": "a", "wear": 5}]}', 422, "'2' is no num"),
    (
        "json",
        b'{"rows": [{"when": 1, "dose": 1e999, "site": "a", "wear": 5}]}',
        422,
        "infinite in 'dose'",
    ),
    ("json", b'{"rows": [{"when": 1, "dose": NaN, "site": "a", "wear": 5}]}', 400, "not JSON"),
    ("json", b'{"rows": [{"when": 1, "dose": 1, "site": "a"}]}', 422, "row 0 has no 'wear'"),
    ("json", b'{"rows": [{"when": 1, "dose": 1, "site": "a", "wear": null}]}', 422, "no 'wear'"),
    ("json", b'{"rows": [[1, 1, "a", 5]]}', 422, "rows.0: Input should be a valid dict"),
    ("json", b'{"rows": []}', 422, "0 rows: give 1 to 1000"),
    (
        "json",
        b'{"images": [[1]], "labels": ["a"]}',
        422,
        "images and labels: this bundle needs rows",
    ),
    ("json", b"{}", 422, "the body has no inputs: this bundle needs rows"),
    ("csv", b"", 422, "no column 'when': give when, dose, site"),
    ("csv", b"when,dose,site,wear\n", 422, "0 rows"),
    ("csv", b"when,dose,site,wear\n1,2\n", 422, "row 0 has 2 columns, the header 4"),
    ("csv", b"when,dose,site,wear\n2026-01-03,x,a,5\n", 422, "row 0, column 'dose': 'x' is no"),
    ("csv", b"when,dose,site,wear\n2026-01-03,1,a,\n", 422, "row 0 has no 'wear'"),
    ("csv", b"when,dose,wear\n2026-01-03,1,5\n", 422, "no column 'site'"),
    ("csv", b"a," * 2**20, 422, "the header has 1,048,576 characters or more"),
    ("csv", b"when,dose,dose,site,wear\n", 422, "column 'dose' is there more than once"),
    ("csv", b"when,dose,site,wear\n2026-01-03,inf,a,5\n", 422, "row 0 is infinite in 'dose'"),
    ("csv", b'when,dose,site,wear\n2026-01-03,1,"a,5\n', 400, "is not CSV: unexpected end"),
    ("csv", b"when,dose,site,wear\n2026-01-03,1,\xff,5\n", 400, "not UTF-8"),
    ("xml", b"<a/>", 415, "send application/json or multipart/form-data or text/csv"),
]


@pytest.mark.parametrize(
    ("by", "sent", "status", "said"), REFUSED, ids=[each[3] for each in REFUSED]
)
def test_what_cannot_be_used_is_one_sentence(
    by: str, sent: bytes, status: int, said: str, serve: Serve, machines: Machines
) -> None:
    client = serve(bundle=machines("bayes").folder)
    kind = {"json": "application/json", "csv": "text/csv", "xml": "text/xml"}[by]
    answer = client.post("/tasks", content=sent, headers={"content-type": kind})
    assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text
    assert "\n" not in answer.json()["error"]
    assert client.get("/tasks").json() == {"tasks": []}


def test_labels_of_rows_that_cannot_be_used_are_named(serve: Serve, machines: Machines) -> None:
    client = serve(bundle=machines("protonet").folder)
    for change, query, said in (
        ({}, "", "row 0 has no 'label', its label"),
        ({"label": None}, "", "row 0 has no 'label'"),
        ({"label": "x" * 300}, "", "column 'label'"),
        ({"label": [1]}, "", "column 'label'"),
        ({"label": "a"}, "?label=site", "column 'site' is an input"),
    ):
        rows = [row | change for row in KNOWN]
        answer = client.post(f"/tasks{query}", json={"rows": rows})
        assert answer.status_code == 422 and said in answer.json()["error"], answer.text


def test_rows_and_files_are_bounded(serve: Serve, machines: Machines) -> None:
    client = serve(bundle=machines("bayes").folder, max_images=3, max_json_bytes=1000)
    for by in ("json", "csv", "form"):
        answer = post(client, "/tasks", KNOWN, by)
        assert answer.status_code == 422 and "3" in answer.json()["error"], answer.text
        answer = post(client, "/tasks", KNOWN * 20, by)
        assert answer.status_code == 413 and "more than 1000 bytes" in answer.json()["error"]
    files = [("a", ("a.csv", as_csv(KNOWN[:1]))), ("b", ("b.csv", as_csv(KNOWN[:1])))]
    answer = client.post("/tasks", files=files)
    assert answer.status_code == 422 and "the form has 2 files" in answer.json()["error"]


@pytest.mark.parametrize("learner", ["bayes", "reptile", "protonet"])
def test_the_protocol_runs_golden_rows(learner: str, serve: Serve, machines: Machines) -> None:
    """As binary tensors, since JSON has no NaN for a missing value."""
    folder = machines(learner).folder
    client = serve(bundle=folder)
    datatypes = {"float32": "FP32", "float64": "FP64", "int64": "INT64"}
    cases = json.loads((folder / "golden/golden.json").read_text())["cases"]
    cases = [each for each in cases if each["graph"] == "few_shot" and "logits" in each["outputs"]]
    assert cases
    for case in cases:
        arrays = {n: np.load(folder / "golden" / path) for n, path in case["inputs"].items()}
        tensors = [
            {
                "name": name,
                "shape": array.shape,
                "datatype": datatypes[str(array.dtype)],
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, array in arrays.items()
        ]
        head = json.dumps({"inputs": tensors}).encode()
        answer = client.post(
            "/v2/models/few_shot/infer",
            content=head + b"".join(array.tobytes() for array in arrays.values()),
            headers={"inference-header-content-length": str(len(head))},
        )
        assert answer.status_code == 200, answer.text
        outputs = {each["name"]: each for each in answer.json()["outputs"]}
        wanted = np.load(folder / "golden" / case["outputs"]["logits"])
        np.testing.assert_allclose(
            outputs["logits"]["data"], wanted.ravel(), atol=case["atol"], rtol=case["rtol"]
        )


def test_a_task_of_rows_is_a_model_of_the_protocol(serve: Serve, machines: Machines) -> None:
    made = machines("bayes")
    client = serve(bundle=made.folder)
    task = post(client, "/tasks", KNOWN, "json").json()["id"]
    described = client.get(f"/v2/models/task-{task}").json()
    assert described["inputs"] == [{"name": "images", "datatype": "FP64", "shape": [-1, 3]}]
    assert [each["name"] for each in described["outputs"]] == ["values", "low", "high"]
    rows = np.array([[1_767_500_000.0, 2000.0, 0.0]])
    tensor = {"name": "images", "shape": [1, 3], "datatype": "FP64", "data": rows.ravel().tolist()}
    answer = client.post(f"/v2/models/task-{task}/infer", json={"inputs": [tensor]})
    adapted = FewShotRegressor.load(made.folder).adapt(KNOWN, KNOWN)
    found = {each["name"]: each["data"] for each in answer.json()["outputs"]}
    np.testing.assert_allclose(found["values"], adapted.predict(rows)[0], rtol=1e-6)
    np.testing.assert_allclose(found["low"], adapted.predict_interval(rows).low[0], rtol=1e-6)


def test_a_value_that_is_not_finite_is_an_error(serve: Serve, tmp_path: Path) -> None:
    client = serve(bundle=small_bundle(tmp_path / "f", 1, 1))
    task = client.post("/tasks", json={"inputs": [0, 1, 2], "values": [0, 100, 200]}).json()["id"]
    answer = client.post(f"/tasks/{task}/predict", json={"inputs": [1, 3e38]})
    assert answer.status_code == 422
    assert "row 1 is not finite" in answer.json()["error"]
