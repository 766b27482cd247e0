"""A closed-form bundle being served: the same routes, without steps and losses."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from reptile.runtime import AdaptedModel, FewShotModel

Serve = Callable[..., TestClient]


@pytest.fixture
def client(serve: Serve, closed_form_bundle: Path, tmp_path: Path) -> TestClient:
    return serve(bundle=closed_form_bundle, tasks=tmp_path / "tasks")


def test_a_task_gets_what_the_runtime_learns_and_survives_a_restart(
    client: TestClient,
    serve: Serve,
    closed_form_bundle: Path,
    tmp_path: Path,
    support: tuple[np.ndarray, list[str]],
    queries: np.ndarray,
) -> None:
    images, labels = support
    expected = FewShotModel.load(closed_form_bundle).adapt(images, labels).predict(queries)
    body = {"images": images.tolist(), "labels": labels}
    answer = client.post("/tasks", json=body)
    assert answer.status_code == 201, answer.text
    task = answer.json()
    assert task["labels"] == ["ring", "cross", "dot"]
    assert task["losses"] == []

    def predicted(server: TestClient) -> np.ndarray:
        path = f"/tasks/{task['id']}/predict"
        answers = server.post(path, json={"images": queries.tolist()}).json()["predictions"]
        return np.array([list(each["probabilities"].values()) for each in answers])

    np.testing.assert_allclose(predicted(client), expected.probabilities, atol=1e-6)
    client.__exit__(None, None, None)
    again = serve(bundle=closed_form_bundle, tasks=tmp_path / "tasks")
    np.testing.assert_allclose(predicted(again), expected.probabilities, atol=1e-6)


@pytest.mark.parametrize("option", [{"steps": 5}, {"learning_rate": 0.1}, {"seed": 1}])
def test_settings_of_gradient_steps_have_no_effect(
    client: TestClient, support: tuple[np.ndarray, list[str]], option: dict[str, float]
) -> None:
    """Clients that were written for the other kind of bundle go on working."""
    images, labels = support
    body = {"images": images.tolist(), "labels": labels}
    with_option, without = (client.post("/tasks", json=body | each) for each in (option, {}))
    assert with_option.status_code == without.status_code == 201
    assert with_option.json()["labels"] == without.json()["labels"]
    assert with_option.json()["losses"] == without.json()["losses"] == []


def tensor(name: str, datatype: str, values: np.ndarray) -> dict[str, object]:
    return {
        "name": name,
        "shape": list(values.shape),
        "datatype": datatype,
        "data": values.ravel().tolist(),
    }


def test_its_models_are_few_shot_and_embed(
    client: TestClient,
    closed_form_bundle: Path,
    support: tuple[np.ndarray, list[str]],
    queries: np.ndarray,
) -> None:
    images, labels = support
    names = sorted(set(labels), key=labels.index)
    inputs = [
        tensor("support_images", "UINT8", images),
        tensor("support_labels", "INT64", np.array([names.index(label) for label in labels])),
        tensor("query_images", "UINT8", queries),
    ]
    answer = client.post("/v2/models/few_shot/infer", json={"inputs": inputs}).json()
    outputs = {each["name"]: each for each in answer["outputs"]}
    assert outputs["finite"]["data"] == [True]
    assert outputs["logits"]["shape"] == [3, 3]
    adapted = FewShotModel.load(closed_form_bundle).adapt(images, labels)
    np.testing.assert_allclose(
        outputs["logits"]["data"], adapted.logits(queries).ravel(), rtol=1e-4, atol=1e-4
    )
    answer = client.post(
        "/v2/models/embed/infer", json={"inputs": [tensor("images", "UINT8", images)]}
    )
    (features,) = answer.json()["outputs"]
    assert adapted.state.examples is not None
    np.testing.assert_allclose(
        features["data"], adapted.state.examples.features.ravel(), rtol=1e-4, atol=1e-5
    )
    assert client.get("/v2/models/predict").status_code == 404


@pytest.mark.parametrize("labels", [[0, 1, -1], [0, 1, 50], [0, 1]])
def test_few_shot_refuses_labels_out_of_range(
    client: TestClient, support: tuple[np.ndarray, list[str]], labels: list[int]
) -> None:
    images, _ = support
    inputs = [
        tensor("support_images", "UINT8", images[:3]),
        tensor("support_labels", "INT64", np.array(labels)),
        tensor("query_images", "UINT8", images[:1]),
    ]
    answer = client.post("/v2/models/few_shot/infer", json={"inputs": inputs})
    assert answer.status_code == 422
    assert "support" in answer.json()["error"]


def post(server: TestClient, path: str, images: np.ndarray, labels: list[Any]) -> Any:
    return server.post(path, json={"images": images.tolist(), "labels": labels})


def probabilities(server: TestClient, task: str, queries: np.ndarray) -> dict[str, np.ndarray]:
    answer = server.post(f"/tasks/{task}/predict", json={"images": queries.tolist()})
    rows = [each["probabilities"] for each in answer.json()["predictions"]]
    return {label: np.array([row[label] for row in rows]) for label in rows[0]}


def same(actual: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert actual.keys() == wanted.keys()
    for label, values in wanted.items():
        np.testing.assert_allclose(actual[label], values, atol=1e-5)


def test_examples_that_are_added_count_as_if_they_had_always_been_there(
    client: TestClient,
    serve: Serve,
    closed_form_bundle: Path,
    tmp_path: Path,
    support: tuple[np.ndarray, list[str]],
    queries: np.ndarray,
) -> None:
    """A new label, and another image of an old one; also after a restart."""
    images, labels = support
    whole = post(client, "/tasks", images, labels).json()["id"]
    task = post(client, "/tasks", images[:5], labels[:5]).json()
    answer = post(client, f"/tasks/{task['id']}/examples", images[5:], labels[5:])
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == task["id"]
    assert answer.json()["labels"] == ["ring", "cross", "dot"]
    assert answer.json()["taught"] > task["taught"]
    wanted = probabilities(client, whole, queries)
    same(probabilities(client, task["id"], queries), wanted)
    client.__exit__(None, None, None)
    again = serve(bundle=closed_form_bundle, tasks=tmp_path / "tasks")
    same(probabilities(again, task["id"], queries), wanted)
    assert len(list((tmp_path / "tasks").iterdir())) == 3  # two tasks, the lock; nothing temporary


def test_a_label_that_is_removed_counts_as_if_it_had_never_been_there(
    client: TestClient, support: tuple[np.ndarray, list[str]], queries: np.ndarray
) -> None:
    images, labels = support
    odd = ["a/b c" if label == "cross" else label for label in labels]
    kept = np.array([label != "a/b c" for label in odd])
    rest = post(client, "/tasks", images[kept], [label for label in odd if label != "a/b c"])
    task = post(client, "/tasks", images, odd).json()["id"]
    answer = client.delete(f"/tasks/{task}/labels/a%2Fb%20c")
    assert answer.json()["labels"] == ["ring", "dot"]
    same(probabilities(client, task, queries), probabilities(client, rest.json()["id"], queries))
    assert client.delete(f"/tasks/{task}/labels/a%2Fb%20c").status_code == 404
    last = client.delete(f"/tasks/{task}/labels/dot")
    assert last.status_code == 422 and client.get(f"/tasks/{task}").json()["labels"] == [
        "ring",
        "dot",
    ]


def test_labels_of_numbers_are_removed_by_their_text(
    client: TestClient, support: tuple[np.ndarray, list[str]]
) -> None:
    images, _ = support
    task = post(client, "/tasks", images[:3], [1, 2, 3]).json()["id"]
    assert client.delete(f"/tasks/{task}/labels/2").json()["labels"] == [1, 3]
    refused = post(client, f"/tasks/{task}/examples", images[:1], ["1"])
    assert refused.status_code == 422 and "the same to some clients" in refused.json()["error"]


def test_a_change_that_is_refused_leaves_the_task_as_it_was(
    serve: Serve,
    closed_form_bundle: Path,
    tmp_path: Path,
    support: tuple[np.ndarray, list[str]],
) -> None:
    images, labels = support
    folder = tmp_path / "tasks"
    server = serve(bundle=closed_form_bundle, tasks=folder)
    task = post(server, "/tasks", images[:6], labels[:6]).json()["id"]
    size = (folder / f"{task}.safetensors").stat().st_size
    server.__exit__(None, None, None)
    server = serve(bundle=closed_form_bundle, tasks=folder, max_task_bytes=size, max_images=500)
    before = server.get(f"/tasks/{task}").json()
    path = f"/tasks/{task}/examples"
    most = FewShotModel.load(closed_form_bundle).bundle.max_support
    many = np.repeat(images[:1], min(most, 500), axis=0)
    for answer, reason in (
        (post(server, path, images[6:], labels[6:]), "max_task_bytes"),
        (post(server, path, images[:2], labels[:1]), "labels"),
        (post(server, path, many, ["ring"] * len(many)), str(most) if most <= 500 else "bytes"),
        (server.post(f"{path}?steps=1", json={"images": []}), "labels"),
    ):
        assert answer.status_code == 422 and reason in answer.json()["error"], answer.text
    assert server.get("/tasks").json() == {"tasks": [before]}
    assert [each.name for each in folder.glob("*.safetensors")] == [f"{task}.safetensors"]
    assert post(server, "/tasks/none/examples", images, labels).status_code == 404


def test_of_two_changes_at_once_one_is_told_to_try_again(
    serve: Serve,
    closed_form_bundle: Path,
    support: tuple[np.ndarray, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No example is lost in silence; nor does a task come back that was deleted meanwhile."""
    images, labels = support
    server = serve(bundle=closed_form_bundle, adaptations=2)
    task, other = (post(server, "/tasks", images[:6], labels[:6]).json()["id"] for _ in range(2))
    both, deleted = threading.Barrier(2), threading.Event()
    plain = AdaptedModel.add

    def together(self: AdaptedModel, *arguments: Any, **options: Any) -> AdaptedModel:
        added = plain(self, *arguments, **options)
        both.wait(10)
        return added

    with ThreadPoolExecutor() as pool:
        monkeypatch.setattr(AdaptedModel, "add", together)
        path = f"/tasks/{task}/examples"
        answers = [pool.submit(post, server, path, images[6:7], [name]) for name in ("a", "b")]
        first, second = sorted((each.result() for each in answers), key=lambda a: a.status_code)
        assert (first.status_code, second.status_code) == (200, 409)
        assert server.get(f"/tasks/{task}").json()["labels"] == first.json()["labels"]

        def late(self: AdaptedModel, *arguments: Any, **options: Any) -> AdaptedModel:
            assert deleted.wait(10)
            return plain(self, *arguments, **options)

        monkeypatch.setattr(AdaptedModel, "add", late)
        slow = pool.submit(post, server, f"/tasks/{other}/examples", images[6:], labels[6:])
        while server.get("/metrics").text.count("reptile_adaptations_pending 1.0") == 0:
            pass
        server.delete(f"/tasks/{other}")
        deleted.set()
        assert slow.result().status_code == 404
        assert server.get(f"/tasks/{other}").status_code == 404


def test_a_bundle_that_learns_by_gradient_steps_says_what_to_do_instead(
    serve: Serve, support: tuple[np.ndarray, list[str]]
) -> None:
    images, labels = support
    server = serve()
    task = server.post(
        "/tasks", json={"images": images.tolist(), "labels": labels, "steps": 1}
    ).json()["id"]
    for answer in (
        post(server, f"/tasks/{task}/examples", images, labels),
        server.delete(f"/tasks/{task}/labels/dot"),
    ):
        assert answer.status_code == 422
        assert "adapt again with all images" in answer.json()["error"]
