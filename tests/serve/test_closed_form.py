"""A closed-form bundle being served: the same routes, without steps and losses."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from reptile.runtime import FewShotModel

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
