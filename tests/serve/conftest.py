"""A bundle being served, in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from reptile.data.dataset import PreparedData
from reptile.serve.app import make_app
from reptile.serve.run import load_model
from reptile.serve.settings import ServeSettings

Serve = Callable[..., TestClient]


@pytest.fixture
def serve(exported: Path) -> Iterator[Serve]:
    """Start applications with changed bounds; all are stopped in the end."""
    running: list[TestClient] = []

    def start(token: str | None = None, bundle: Path = exported, **bounds: object) -> TestClient:
        app = make_app(load_model(bundle), ServeSettings.model_validate(bounds), token)
        client = TestClient(app, "http://127.0.0.1")
        running.append(client.__enter__())
        return running[-1]

    yield start
    for client in running:
        if client.portal is not None:  # the test has not stopped it
            client.__exit__(None, None, None)


@pytest.fixture
def client(serve: Serve, tmp_path: Path) -> TestClient:
    return serve(tasks=tmp_path / "tasks")


@pytest.fixture
def support(data: PreparedData) -> tuple[np.ndarray, list[str]]:
    """Three images of each of three test classes."""
    start, *_ = data.split("test")
    return data.images[start[:3, None] + np.arange(3)].reshape(9, *data.image_shape), [
        name for name in ("ring", "cross", "dot") for _ in range(3)
    ]


@pytest.fixture
def queries(data: PreparedData) -> np.ndarray:
    """Another image of each of the same classes."""
    start, *_ = data.split("test")
    return np.asarray(data.images[start[:3] + 3])
