"""The routes, in one process: what they answer, refuse and keep; the runtime is the oracle."""

import io
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pytest
from bundles import make_checkpoint, write_bundle
from httpx import Response
from PIL import Image
from starlette.routing import Route
from starlette.testclient import TestClient

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.runtime import FewShotModel
from reptile.runtime.model import softmax
from reptile.serve import examples, protocol, task_routes
from reptile.serve.access_log import JsonLines
from reptile.serve.app import make_app
from reptile.serve.errors import FAULT
from reptile.serve.run import read_token
from reptile.serve.settings import ServeSettings, changed
from reptile.serve.workers import Predictor
from reptile.settings import ModelSettings, OptimizerSettings

Serve = Callable[..., TestClient]
Support = tuple[np.ndarray, Sequence[str | float]]


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "PNG")
    return file.getvalue()


def adapt(client: TestClient, support: Support, **options: object) -> dict[str, Any]:
    images, labels = support
    body = {"images": images.tolist(), "labels": labels, **options}
    response = client.post("/tasks", json=body)
    assert response.status_code == 201, response.text
    return response.json()


def test_files_and_arrays_give_the_task_that_the_runtime_adapts_to(
    client: TestClient, exported: Path, support: Support, queries: np.ndarray
) -> None:
    images, labels = support
    adapted = FewShotModel.load(exported).adapt(images, labels, steps=7, seed=3)
    expected = adapted.predict(queries)
    files = [(name, ("a.png", png(image))) for name, image in zip(labels, images, strict=True)]
    asked = [("image", ("q.png", png(image))) for image in queries]
    by_file = client.post("/tasks", params={"steps": 7, "seed": 3}, files=files).json()
    by_array = adapt(client, support, steps=7, seed=3)
    for task in (by_file, by_array):
        assert task["labels"] == adapted.labels
        np.testing.assert_allclose(task["losses"], adapted.losses, rtol=1e-5)
        path = f"/tasks/{task['id']}/predict"
        for answer in (
            client.post(path, files=asked),
            client.post(path, json={"images": queries.tolist()}),
        ):
            named = answer.json()["predictions"]
            assert [each["label"] for each in named] == expected.labels
            rows = [[each["probabilities"][name] for name in adapted.labels] for each in named]
            np.testing.assert_allclose(rows, expected.probabilities, atol=1e-5)


def test_a_task_is_listed_shown_and_forgotten(client: TestClient, support: Support) -> None:
    task = adapt(client, support, steps=1)
    assert client.get("/tasks").json() == {"tasks": [task]}
    assert client.get(f"/tasks/{task['id']}").json() == task
    assert client.delete(f"/tasks/{task['id']}").status_code == 204
    assert client.get("/tasks").json() == {"tasks": []}
    gone = client.get(f"/tasks/{task['id']}")
    assert gone.status_code == 404 and "no task" in gone.json()["error"]


def test_labels_keep_their_type(client: TestClient, support: Support, queries: np.ndarray) -> None:
    images, _ = support
    task = adapt(client, (images, [7] * 3 + [True] * 3 + ["x"] * 3), steps=2)
    assert task["labels"] == [7, True, "x"]


@pytest.mark.parametrize(
    "pair", [(1, "1"), (True, "true"), ("2.5", 2.5), ("1", 1.0), (1, True), (False, 0.0)]
)
def test_labels_that_a_client_may_take_for_one_are_refused(
    client: TestClient, support: Support, pair: tuple[object, object]
) -> None:
    images, _ = support
    body = {"images": images[:3].tolist(), "labels": [*pair, "third"]}
    answer = client.post("/tasks", json=body)
    assert answer.status_code == 422
    assert "are the same to some clients" in answer.json()["error"]
    assert client.get("/tasks").json() == {"tasks": []}


def test_a_field_s_name_is_the_label_that_was_written(client: TestClient, support: Support) -> None:
    images, _ = support
    # httpx escapes as browsers do, by WHATWG's standard
    names = ['5" pipe', "a\r\nb", "100%", "a; filename=b", "日本", "a'b"]
    files = [(name, ("a.png", png(image))) for name, image in zip(names, images, strict=False)]
    for part in (files[:3], files[3:]):  # the bundle has three classes
        task = client.post("/tasks", params={"steps": 1}, files=part).json()
        assert task["labels"] == [name for name, _ in part]


def post_form(client: TestClient, images: np.ndarray, *names: bytes, **more: str) -> Response:
    """Send a form whose fields' names are written as these bytes."""
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="%s"; filename="a.png"\r\n\r\n%s\r\n'
        % (name, png(image))
        for name, image in zip(names, images, strict=False)
    ]
    kind = more.get("kind", "multipart/form-data; boundary=x")
    content = b"".join(parts) + b"--x--\r\n"
    return client.post("/tasks?steps=1", content=content, headers={"content-type": kind})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (b"caf\xe9", r"""not UTF-8: b'form-data; name="caf\xe9";"""),  # Latin-1
        (b"\x83R\x83\x8d", "not UTF-8"),  # Shift-JIS
        (b"a\\\\b", "write in two ways"),  # httpx's and old curl's a\b, or a browser's a\\b
        (b"a\\", "write in two ways"),  # a browser's a\, or another's a"; filename=
    ],
)
def test_a_field_s_name_that_can_be_read_in_two_ways_is_refused(
    client: TestClient, support: Support, name: bytes, said: str
) -> None:
    answer = post_form(client, support[0], name, b"other")
    assert answer.status_code == 400 and said in answer.json()["error"], answer.text
    assert client.get("/tasks").json() == {"tasks": []}


def test_a_backslash_that_all_clients_mean_alike_is_kept(
    client: TestClient, support: Support
) -> None:
    """As browsers, Node, requests and curl send it; and a quotation mark of older clients."""
    answer = post_form(client, support[0], b"C:\\x", rb"5\" pipe", b"c")
    assert answer.json()["labels"] == ["C:\\x", '5" pipe', "c"]


def test_one_name_in_two_spellings_is_one_class_in_forms_json_and_addresses(
    client: TestClient, support: Support
) -> None:
    """As `reptile prepare` reads the names of folders: é is one letter or two to a file system."""
    images, _ = support
    one, two = "caf\u00e9", "cafe\u0301"
    by_form = post_form(client, images, one.encode(), two.encode(), b"tea")
    body = {"images": images[:3].tolist(), "labels": [two, one, "tea"], "steps": 1}
    for answer in (by_form, client.post("/tasks", json=body)):
        assert answer.json()["labels"] == [one, "tea"], answer.text


@pytest.mark.parametrize(
    "kind",
    ["multipart/form-data; boundary=x; charset=utf-16", "application/json;charset=ISO-8859-1"],
)
def test_bodies_of_another_charset_are_refused(
    client: TestClient, support: Support, kind: str
) -> None:
    answer = post_form(client, support[0], "é".encode(), b"b", kind=kind)
    assert answer.status_code == 415 and "send UTF-8" in answer.json()["error"]


def test_json_may_begin_with_a_byte_order_mark(client: TestClient, support: Support) -> None:
    images, labels = support
    body = json.dumps({"images": images.tolist(), "labels": labels, "steps": 1}).encode()
    assert client.post("/tasks", content=b"\xef\xbb\xbf" + body).status_code == 201


def test_each_label_has_the_probability_of_its_name_in_json(
    client: TestClient, support: Support, queries: np.ndarray
) -> None:
    """`probabilities[label]` of JavaScript: true is "true", and 2.0 is 2."""
    images, _ = support
    task = adapt(client, (images, [True] * 3 + [2.0] * 3 + [0.5] * 3), steps=1)
    path = f"/tasks/{task['id']}/predict"
    first = client.post(path, json={"images": queries.tolist()}).json()["predictions"][0]
    assert [*first["probabilities"]] == ["true", "2", "0.5"]
    assert [json.dumps(each) for each in task["labels"]] == ["true", "2", "0.5"]


@pytest.mark.parametrize("label", [None, [1], {}, "x" * 201, 10**201, "1e400"])
def test_what_is_no_label_is_said_in_a_sentence(
    client: TestClient, support: Support, label: object
) -> None:
    body = json.dumps({"images": support[0][:2].tolist(), "labels": [label, "a"]})
    said = client.post("/tasks", content=body.replace('"1e400"', "1e400")).json()["error"]
    assert said.startswith("labels.0: a label is text of at most 200 characters, a number")


def test_the_address_of_a_new_task_leads_to_it_behind_a_path_prefix(
    client: TestClient, support: Support
) -> None:
    images, labels = support
    body = {"images": images.tolist(), "labels": labels, "steps": 1}
    answer = client.post("/tasks", json=body)
    for front in ("https://shop.example/few/shot/tasks", "http://127.0.0.1/tasks"):
        target = urljoin(front, answer.headers["location"])
        assert target == f"{front}/{answer.json()['id']}"


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd", "x", "identity, gzip"])
@pytest.mark.parametrize("path", ["/tasks", "/v2/models/few_shot/infer"])
def test_compressed_bodies_are_refused(client: TestClient, coding: str, path: str) -> None:
    headers = {"content-encoding": coding, "content-type": "application/json"}
    answer = client.post(path, content=b"{}", headers=headers)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "identity")
    headers["content-encoding"] = "identity"
    assert client.post(path, content=b"{}", headers=headers).status_code == 422


def test_the_versions_that_are_named_exist(
    client: TestClient, support: Support, queries: np.ndarray
) -> None:
    task = adapt(client, support, steps=1)
    tensor = {"name": "images", "shape": queries.shape, "datatype": "FP32"}
    body = {"inputs": [tensor | {"data": queries.ravel().tolist()}]}
    for model in (f"task-{task['id']}", "predict", "few_shot"):
        path = f"/v2/models/{model}"
        described = client.get(path).json()
        for version in described["versions"]:
            same = f"{path}/versions/{version}"
            assert client.get(same).json() == described
            assert client.get(f"{same}/ready").json() == {"name": model, "ready": True}
            if model != "few_shot":
                answers = [client.post(f"{each}/infer", json=body) for each in (path, same)]
                assert answers[0].json() == answers[1].json()
                assert answers[1].json()["model_version"] == version
        for wrong in ("2", "0", "latest"):
            answer = client.get(f"{path}/versions/{wrong}/ready")
            assert answer.status_code == 404 and "there is 1" in answer.json()["error"]


def test_headers_that_are_there_twice_are_refused(client: TestClient) -> None:
    for name, values in (
        ("host", ("127.0.0.1", "evil.test")),
        ("origin", ("http://evil.test", "http://127.0.0.1")),
        ("sec-fetch-site", ("cross-site", "same-origin")),
        ("authorization", ("Bearer a", "Bearer b")),
    ):
        for pair in (values, values[::-1]):
            answer = client.get("/tasks", headers=[(name, value) for value in pair])
            assert answer.status_code == 400 and name in answer.json()["error"]


def test_no_answer_may_be_framed_or_taken_for_another_type(client: TestClient) -> None:
    for path in ("/", "/docs", "/page/index.html", "/tasks", "/nowhere", "/bundle/manifest.json"):
        headers = client.get(path).headers
        assert headers["x-frame-options"] == "DENY", path
        assert headers["x-content-type-options"] == "nosniff", path


def test_a_bundle_s_file_is_sent_again_only_if_it_changed(
    serve: Serve, exported: Path, tmp_path: Path
) -> None:
    linked = tmp_path / "linked"
    linked.symlink_to(exported)
    client = serve(bundle=linked)
    first = client.get("/bundle/predict/1/model.onnx")
    assert first.content == (exported / "predict/1/model.onnx").read_bytes()
    again = {"if-none-match": first.headers["etag"]}
    assert client.get("/bundle/predict/1/model.onnx", headers=again).status_code == 304


def test_options_of_a_form_are_checked(client: TestClient, support: Support) -> None:
    files = [("a", ("a.png", png(support[0][0])))]
    for query, named in (({"steps": "many"}, "steps"), ({"learning_rate": "x"}, "learning_rate")):
        answer = client.post("/tasks", params=query, files=files)
        assert answer.status_code == 422 and answer.json()["error"].startswith(named)


def test_every_route_is_in_the_document_and_the_document_in_the_routes(serve: Serve) -> None:
    client = serve()
    routes = client.app._app.routes  # type: ignore[attr-defined]
    undocumented = ("/", "/metrics", "/openapi.json", "/docs", "/bundle/{path}", "/ort/{path}")
    served = {
        (route.path_format, method.lower())
        for route in routes
        if isinstance(route, Route) and route.path_format not in undocumented
        for method in (route.methods or set()) - {"HEAD"}
    }
    paths = client.get("/openapi.json").json()["paths"]
    assert served == {(path, method) for path, item in paths.items() for method in item}
    for path, item in paths.items():
        in_path = {p["name"] for each in item.values() for p in each.get("parameters", [])}
        assert set(re.findall(r"{(\w+)}", path)) <= in_path


def test_the_document_s_schemas_have_the_fields_of_the_models(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for model in (
        *(examples.Support, examples.Examples, examples.Queries, task_routes.Task),
        *(protocol.InferenceRequest, protocol.InputTensor, protocol.InferenceResponse),
        *(protocol.ServerMetadata, protocol.ModelMetadata, protocol.TensorMetadata),
    ):
        described = schemas[model.__name__]
        generated = model.model_json_schema()
        assert described["properties"].keys() == generated["properties"].keys()
        assert set(described.get("required", [])) == set(generated.get("required", []))


def test_methods_that_a_path_lacks_are_answered_with_those_it_has(client: TestClient) -> None:
    answer = client.put("/tasks")
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
    assert answer.json()["error"].endswith("it has GET, HEAD, POST")
    assert client.post("/page/page.js").headers["allow"] == "GET, HEAD"
    unknown = client.get("/task")
    assert unknown.status_code == 404 and "'/task': /docs lists" in unknown.json()["error"]


def test_a_slash_at_the_end_is_unknown_and_leads_nowhere(client: TestClient) -> None:
    for path in ("/tasks/", "/v2/", "/v2/health/ready/"):
        answer = client.get(path, follow_redirects=False)
        assert answer.status_code == 404 and "location" not in answer.headers


OTHER_SITES = [
    {"origin": "http://evil.test"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:9999"},  # another server of the same machine
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"host": "evil.test"},
    {"host": "localhost.evil.test:8080"},
    {"host": "127.0.0.1.evil.test"},
    {"host": "evil.test", "origin": "http://evil.test"},
    {"host": "127.0.0.1@evil.test"},
    {"host": "[::1].evil.test"},
    {"host": "127.0.0.1:80.evil.test"},
    {"origin": "http://127.0.0.1@evil.test"},
]


@pytest.mark.parametrize("headers", OTHER_SITES)
def test_pages_of_other_sites_neither_read_nor_change_tasks(
    serve: Serve, support: Support, headers: dict[str, str]
) -> None:
    client = serve(max_tasks=1)
    task = adapt(client, support, steps=1)
    one = f"/tasks/{task['id']}"
    for method, path in (
        *(("POST", "/tasks"), ("GET", "/tasks"), ("GET", one), ("DELETE", one)),
        *(("POST", f"{one}/predict"), ("POST", f"/v2/models/task-{task['id']}/infer")),
        *(("PUT", one), ("GET", "/bundle/manifest.json"), ("GET", "/metrics")),
    ):
        assert client.request(method, path, headers=headers).status_code == 403, path
    assert client.get("/tasks").json() == {"tasks": [task]}
    assert client.get("/v2/health/ready", headers=headers).status_code == 200


def test_the_page_itself_and_known_names_are_let_in(serve: Serve) -> None:
    for headers in (
        {"origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"},
        {"host": "localhost:8080", "origin": "http://localhost:8080"},
        {"host": "[::1]:8080"},
        {"host": "10.1.2.3"},
    ):
        assert serve().get("/tasks", headers=headers).status_code == 200, headers
    behind = serve(hosts="Shop.example, api.example")
    proxied = {"host": "shop.example", "origin": "https://shop.example"}
    assert behind.get("/tasks", headers=proxied).status_code == 200
    assert behind.get("/tasks", headers={"host": "evil.test"}).status_code == 403
    secret = {"authorization": "Bearer s", "host": "any.name"}
    assert serve("s").get("/tasks", headers=secret).status_code == 200


def test_health_is_told_as_the_protocol_says(client: TestClient) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    ready = client.get("/v2/models/few_shot/ready").json()
    assert ready == {"name": "few_shot", "ready": True}


def test_a_folder_of_tasks_has_one_server(serve: Serve, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    first = serve(tasks=folder)
    with pytest.raises(InputError, match="in use by another process"):
        make_app(FewShotModel.load(exported), ServeSettings(tasks=folder))
    first.__exit__(None, None, None)
    make_app(FewShotModel.load(exported), ServeSettings(tasks=folder))


@pytest.mark.parametrize("token", ["", " ", "\n"])
def test_an_empty_token_is_refused(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPTILE_TOKEN", token)
    with pytest.raises(InputError, match="REPTILE_TOKEN is empty"):
        read_token()


@pytest.mark.parametrize(
    "token", ["a\nb", "a\tb", "\ufeffsecret", "s\u200b", "café", "\udcff", "x" * 5000]
)
def test_a_token_that_no_header_can_carry_is_refused(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPTILE_TOKEN", token)
    with pytest.raises(InputError, match="REPTILE_TOKEN: use up to 4096 ASCII"):
        read_token()


def test_a_token_loses_the_newline_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPTILE_TOKEN", "secret\n")
    assert read_token() == "secret"


@pytest.mark.parametrize(
    "change",
    [
        *("task_days=inf", "task_days=1e7", "task_days=nan", "adaptations=1e9", "max_images=-1"),
        *("hosts=*", "hosts=https://shop.example", "hosts=shop.example:443", "hosts=münchen.de"),
        *("hosts=*.shop.example", "hosts=a b", "hosts=", "max_tasks=", "tasks= "),
        # without effect beyond another limit
        *("max_json_bytes=1000000000", "max_body_bytes=1000000000", "body_seconds=100"),
        "max_image_pixels=1000000000",
    ],
)
def test_settings_that_cannot_work_are_refused_when_read(change: str) -> None:
    with pytest.raises(InputError, match=change.partition("=")[0]):
        changed(None, [change])


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "1e308", "9" * 400, "x", ""])
def test_every_setting_is_checked_when_read(value: str) -> None:
    """Other settings than these are refused with their name, or work: never another error."""
    for name in ServeSettings.model_fields.keys() - {"tasks", "hosts"}:
        if (name, value) == ("waiting_adaptations", "0"):
            continue  # none waits
        with pytest.raises(InputError, match=name):
            changed(None, [f"{name}={value}"])


def test_a_body_that_all_bodies_together_may_not_have_is_too_large(serve: Serve) -> None:
    answer = serve(max_held_bytes=100).post("/tasks", content=b"x" * 101)
    assert answer.status_code == 413 and "larger than 100" in answer.json()["error"]


def test_few_shot_is_the_graph(client: TestClient, exported: Path) -> None:
    golden = json.loads((exported / "golden/golden.json").read_text())
    case = next(case for case in golden["cases"] if case["graph"] == "few_shot")
    inputs = {name: np.load(exported / "golden" / path) for name, path in case["inputs"].items()}
    kinds = {"float32": "FP32", "int64": "INT64"}
    body = {
        "inputs": [
            {
                "name": name,
                "shape": array.shape,
                "datatype": kinds[str(array.dtype)],
                "data": array.ravel().tolist(),
            }
            for name, array in inputs.items()
        ],
        "outputs": [{"name": "logits"}],
    }
    answer = client.post("/v2/models/few_shot/infer", json=body).json()
    (logits,) = answer["outputs"]
    expected = np.load(exported / "golden" / case["outputs"]["logits"])
    np.testing.assert_allclose(
        np.reshape(logits["data"], logits["shape"]), expected, atol=1e-3, rtol=1e-3
    )


def test_models_describe_themselves_and_a_task_is_one(
    client: TestClient, exported: Path, support: Support, queries: np.ndarray
) -> None:
    task = adapt(client, support, steps=2)
    name = f"task-{task['id']}"
    described = client.get(f"/v2/models/{name}").json()
    assert described["inputs"] == [
        {"name": "images", "datatype": "FP32", "shape": [-1, *queries.shape[1:]]}
    ]
    assert client.get(f"/v2/models/{name}/ready").status_code == 200
    tensor = {"name": "images", "shape": queries.shape, "datatype": "UINT8"}
    body = {"id": "x", "inputs": [tensor | {"data": queries.ravel().tolist()}]}
    answer = client.post(f"/v2/models/{name}/infer", json=body).json()
    assert (answer["id"], answer["model_name"]) == ("x", name)
    named = client.post(f"/tasks/{task['id']}/predict", json={"images": queries.tolist()}).json()
    rows = [list(each["probabilities"].values()) for each in named["predictions"]]
    probabilities, logits = (np.reshape(out["data"], out["shape"]) for out in answer["outputs"])
    np.testing.assert_allclose(rows, probabilities, atol=1e-6)
    images, labels = support
    here = FewShotModel.load(exported).adapt(images, labels, steps=2)
    np.testing.assert_allclose(logits, here.logits(queries), atol=1e-4)
    assert client.get("/v2/models/none").status_code == 404


def test_dark_images_are_taken_as_the_runtime_takes_them(
    client: TestClient, exported: Path, support: Support
) -> None:
    images, labels = support
    dark = (images > 128).astype(np.uint8)  # pixels 0 and 1, which as floats would be refused
    here = FewShotModel.load(exported).adapt(dark, labels, steps=2)
    task = adapt(client, (dark, labels), steps=2)
    np.testing.assert_allclose(task["losses"], here.losses, rtol=1e-5)
    path = f"/tasks/{task['id']}/predict"
    named = client.post(path, json={"images": dark.tolist()}).json()["predictions"]
    assert [each["label"] for each in named] == here.predict(dark).labels
    floats = client.post(path, json={"images": (dark * 1.0).tolist()})
    assert floats.status_code == 422 and "multiply by 255" in floats.json()["error"]


def binary(inputs: dict[str, np.ndarray], **more: object) -> dict[str, Any]:
    """A request whose tensors come after its JSON, as httpx sends it."""
    kinds = {"float32": "FP32", "int64": "INT64", "uint8": "UINT8"}
    tensors = [
        {
            "name": name,
            "shape": array.shape,
            "datatype": kinds[str(array.dtype)],
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in inputs.items()
    ]
    told = json.dumps({"inputs": tensors, **more}).encode()
    return {
        "content": told + b"".join(array.tobytes() for array in inputs.values()),
        "headers": {"inference-header-content-length": str(len(told))},
    }


def test_binary_tensors_give_what_json_gives(
    client: TestClient, exported: Path, support: Support, queries: np.ndarray
) -> None:
    task = adapt(client, support, steps=2)
    place = f"/v2/models/task-{task['id']}/infer"
    named = client.post(f"/tasks/{task['id']}/predict", json={"images": queries.tolist()}).json()
    expected = [list(each["probabilities"].values()) for each in named["predictions"]]
    for images in (queries, queries.astype(np.float32)):
        answer = client.post(
            place, **binary({"images": images}, parameters={"binary_data_output": True}, id="x")
        )
        told, after = parts(answer)
        assert told["id"] == "x"
        size = 4 * len(queries) * 3
        for output, start in zip(told["outputs"], (0, size), strict=True):
            assert "data" not in output and output["parameters"] == {"binary_data_size": size}
            found = np.frombuffer(after[start : start + size], "<f4").reshape(output["shape"])
            if output["name"] == "logits":
                found = softmax(found)
            np.testing.assert_allclose(found, expected, atol=1e-6)

    golden = json.loads((exported / "golden/golden.json").read_text())
    case = next(case for case in golden["cases"] if case["graph"] == "few_shot")
    inputs = {name: np.load(exported / "golden" / path) for name, path in case["inputs"].items()}
    inputs["learning_rate"] = inputs["learning_rate"].reshape(1)
    wanted = [{"name": "losses"}, {"name": "logits", "parameters": {"binary_data": True}}]
    answer = client.post("/v2/models/few_shot/infer", **binary(inputs, outputs=wanted))
    told, after = parts(answer)
    losses, logits = told["outputs"]
    assert len(losses["data"]) == len(inputs["batches"])
    np.testing.assert_allclose(
        np.frombuffer(after, "<f4").reshape(logits["shape"]),
        np.load(exported / "golden" / case["outputs"]["logits"]),
        atol=1e-3,
        rtol=1e-3,
    )


def parts(answer: Response) -> tuple[dict[str, Any], bytes]:
    """An answer's JSON and what comes after it."""
    assert answer.status_code == 200, answer.text
    size = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.content[:size]), answer.content[size:]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"size": 3}, 422, "images: 3 bytes of the binary_data_size 3 came"),
        ({"size": 10**6}, 422, "came; the shape"),
        ({"more": b"xyz"}, 422, "bytes after the JSON"),
        ({"data": [1]}, 422, "give its values as data, or their binary_data_size"),
        ({"length": "99999999"}, 400, "give the bytes of the JSON"),
        ({"length": "-1"}, 400, "give the bytes of the JSON"),
        ({"length": "1e3"}, 400, "give the bytes of the JSON"),
        ({"length": "5"}, 400, "not JSON"),
        ({"nan": True}, 422, "NaN"),
    ],
)
def test_binary_tensors_that_lie_are_refused(
    client: TestClient, queries: np.ndarray, change: dict[str, Any], status: int, message: str
) -> None:
    pixels = queries.astype(np.float32)
    if "nan" in change:
        pixels[0, 0, 0, 0] = np.nan
    size = change.get("size", pixels.nbytes)
    tensor = {"name": "images", "shape": pixels.shape, "datatype": "FP32"} | {
        "parameters": {"binary_data_size": size}
    }
    told = json.dumps({"inputs": [tensor | {k: change[k] for k in ("data",) if k in change}]})
    answer = client.post(
        "/v2/models/predict/infer",
        content=told.encode() + pixels.tobytes()[:size] + change.get("more", b""),
        headers={"inference-header-content-length": change.get("length", str(len(told)))},
    )
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]


def test_a_fault_is_answered_in_one_sentence_and_logged(
    serve: Serve,
    support: Support,
    queries: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = serve()
    task = adapt(client, support, steps=1)

    async def fails(self: Predictor, *arguments: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(Predictor, "predict", fails)
    path = f"/tasks/{task['id']}/predict"
    caplog.set_level(logging.INFO, "reptile.serve")
    caplog.clear()
    answer = client.post(path, json={"images": queries.tolist()}, headers={"x-request-id": "7"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "7")
    assert answer.json() == {"error": FAULT}
    records = [record for record in caplog.records if record.name.startswith("reptile.serve")]
    lines = [json.loads(line) for each in records for line in JsonLines().format(each).split("\n")]
    failed, request = lines
    assert failed["event"] == "failed" and failed["id"] == "7"
    assert "a secret of the inside" in failed["exception"]
    assert (request["event"], request["id"], request["status"]) == ("request", "7", 500)


def test_tasks_survive_a_restart_and_what_cannot_be_read_does_no_harm(
    serve: Serve, support: Support, queries: np.ndarray, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    first = serve(tasks=folder)
    task = adapt(first, support, steps=3)
    path = f"/tasks/{task['id']}/predict"
    before = first.post(path, json={"images": queries.tolist()}).json()
    first.__exit__(None, None, None)
    (file,) = folder.glob("*.safetensors")
    (folder / "00000000-0000-0000-0000-000000000000.safetensors").write_bytes(
        file.read_bytes()[:99]
    )
    (folder / "notes.txt").write_text("not a task")
    (folder / "11111111-0000-0000-0000-000000000000.safetensors").mkdir()
    second = serve(tasks=folder)
    assert [each["id"] for each in second.get("/tasks").json()["tasks"]] == [task["id"]]
    assert second.post(path, json={"images": queries.tolist()}).json() == before


def test_the_store_forgets_the_one_used_longest_ago(
    serve: Serve, support: Support, tmp_path: Path
) -> None:
    client = serve(tasks=tmp_path, max_tasks=2)
    first, second = (adapt(client, support, steps=0)["id"] for _ in range(2))
    assert client.get(f"/tasks/{first}").status_code == 200  # now the second is the oldest
    third = adapt(client, support, steps=0)["id"]
    assert {t["id"] for t in client.get("/tasks").json()["tasks"]} == {first, third}
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == {first, third}
    assert client.get(f"/tasks/{second}").status_code == 404


def test_a_task_expires(serve: Serve, support: Support, tmp_path: Path) -> None:
    client = serve(tasks=tmp_path, task_days=0.5 / 86400)
    task = adapt(client, support, steps=0)
    time.sleep(0.6)
    assert client.get(f"/tasks/{task['id']}").status_code == 404
    assert list(tmp_path.glob("*.safetensors")) == []


def test_bounds_are_kept(serve: Serve, support: Support, queries: np.ndarray) -> None:
    client = serve(max_images=4, max_body_bytes=20_000, max_image_pixels=100)
    images, labels = support
    too_many = client.post("/tasks", json={"images": images.tolist(), "labels": labels})
    assert too_many.status_code in (413, 422)
    large = client.post("/tasks", content=b"x" * 20_001, headers={"content-type": "text/json"})
    assert large.status_code == 413 and "20000" in large.json()["error"]
    wide = client.post("/tasks", files=[("a", ("a.png", png(np.zeros((11, 10), np.uint8))))])
    assert wide.status_code == 422 and "110" not in wide.headers
    assert "at most 100" in wide.json()["error"]


def test_a_full_queue_and_a_deadline_are_answered_at_once(serve: Serve, support: Support) -> None:
    client = serve(waiting_adaptations=0, request_seconds=60)
    answers = []

    def run() -> None:
        images, labels = support
        body = {"images": images.tolist(), "labels": labels, "learning_rate": 100, "steps": 60}
        answers.append(client.post("/tasks", json=body))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) <= {201, 429} and 201 in codes
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
    late = serve(request_seconds=0.001)
    images, labels = support
    answer = late.post("/tasks", json={"images": images.tolist(), "labels": labels, "steps": 60})
    assert answer.status_code == 503 and "retry-after" in answer.headers


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Basic right", "Bearer "])
def test_a_token_is_asked_of_everything_but_health_and_the_page(
    serve: Serve, given: str | None
) -> None:
    client = serve(token="right")
    headers = {"authorization": given} if given else {}
    for path in ("/tasks", "/v2", "/metrics", "/bundle/manifest.json", "/openapi.json"):
        assert client.get(path, headers=headers).status_code == 401
    for path in ("/", "/page/page.js", "/v2/health/ready"):
        assert client.get(path, headers=headers).status_code == 200
    assert client.get("/v2", headers={"authorization": "Bearer right"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "JSON"),
        (b"[]", 422, ""),
        (b'{"images": [], "labels": []}', 422, "images"),
        (b'{"images": [[[NaN]]], "labels": ["a"]}', 400, "JSON"),
        (b'{"images": [[[1, 2]]], "labels": ["a"]}', 422, "shape"),
        (b'{"images": "x", "labels": ["a"]}', 422, "images"),
        (b'{"labels": ["a"], "pictures": []}', 422, "images"),
        (b"\xff\xfe", 400, "JSON"),
    ],
)
def test_bad_bodies_are_refused_in_one_sentence(
    client: TestClient, body: bytes, status: int, said: str
) -> None:
    answer = client.post("/tasks", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1},
        {"steps": 10**9},
        {"learning_rate": 0},
        {"learning_rate": 1e400},
        {"seed": -1},
        {"labels": ["a"] * 9},
        {"labels": ["a", "b"]},
        {"labels": [str(i) for i in range(9)]},
        {"labels": ["x" * 300, *"abbbbbbb"]},
        {"surprise": 1},
    ],
)
def test_bad_values_are_refused_in_one_sentence(
    client: TestClient, support: Support, change: dict[str, object]
) -> None:
    images, labels = support
    body = {"images": images.tolist(), "labels": labels} | change
    answer = client.post("/tasks", content=json.dumps(body).replace("Infinity", "1e400"))
    assert answer.status_code == 422, answer.text
    assert "\n" not in answer.json()["error"]
    assert client.get("/tasks").json() == {"tasks": []}


def test_a_diverging_adaptation_is_refused_counted_and_not_kept(
    data: PreparedData, support: Support, tmp_path: Path
) -> None:
    # Four layers by plain SGD: each makes the next one's gradient larger.
    deep = ModelSettings(name="mlp", hidden=(32, 32, 32, 32))
    plain = OptimizerSettings(name="sgd", learning_rate=0.01)
    checkpoint = make_checkpoint(deep, data.image_shape, plain)
    write_bundle(tmp_path / "bundle", data, checkpoint)
    app = make_app(FewShotModel.load(tmp_path / "bundle"), ServeSettings())
    images, labels = support
    with TestClient(app, "http://127.0.0.1") as client:
        body = {"images": images.tolist(), "labels": labels, "learning_rate": 100, "steps": 60}
        answer = client.post("/tasks", json=body)
        assert answer.status_code == 422 and "diverged" in answer.json()["error"]
        assert "reptile_not_finite_total 1.0" in client.get("/metrics").text
        assert client.get("/tasks").json() == {"tasks": []}


def test_only_the_bundle_s_own_files_are_given_out(client: TestClient, exported: Path) -> None:
    manifest = client.get("/bundle/manifest.json")
    assert manifest.content == (exported / "manifest.json").read_bytes()
    graph = client.get("/bundle/adapt/1/model.onnx")
    assert graph.content == (exported / "adapt/1/model.onnx").read_bytes()
    for path in ("../manifest.json", "%2e%2e/%2e%2e/etc/passwd", "", "golden", "/etc/passwd"):
        assert client.get(f"/bundle/{path}").status_code == 404


def test_metrics_requests_and_the_document(client: TestClient, support: Support) -> None:
    adapt(client, support, steps=1)
    answer = client.get("/v2", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert client.get("/v2", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"
    told = client.get("/metrics").text
    assert "reptile_tasks 1.0" in told
    assert 'route="/tasks",status="201"' in told
    document = client.get("/openapi.json").json()
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert references <= set(document["components"]["schemas"])
    assert "/v2/models/{model}/infer" in document["paths"]
    assert "http" not in client.get("/docs").text.replace("http://127.0.0.1", "")
