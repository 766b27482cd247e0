"""Which tasks get a graph of their own, and that nobody notices but by the clock."""

import gc
import logging
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest

from reptile.runtime import AdaptedModel, FewShotModel
from reptile.serve import workers
from reptile.serve.workers import OFTEN, Prediction, _Hot

Support = tuple[np.ndarray, list[str]]


@pytest.fixture
def tasks(exported: Path, support: Support) -> list[AdaptedModel]:
    model = FewShotModel.load(exported)
    return [model.adapt(*support, steps=2, seed=seed) for seed in range(4)]


def test_a_task_that_is_asked_often_keeps_its_answers(
    tasks: list[AdaptedModel], queries: np.ndarray
) -> None:
    hot = _Hot()
    for task in tasks:
        expected = task.predict(queries).probabilities
        for asked in range(0, OFTEN + 20, len(queries)):
            found = hot.predict(task, queries)
            assert isinstance(found, Prediction)
            np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
            assert (task in hot._own) == (asked + len(queries) >= OFTEN)


def test_few_have_a_graph_of_their_own_and_forgotten_tasks_none(
    tasks: list[AdaptedModel], queries: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "MOST_OWN", 2)
    hot, many = _Hot(), np.repeat(queries[:1], OFTEN, axis=0)
    first, second, third, _ = tasks
    for task in (first, second, first, third):
        hot.predict(task, many)
    assert list(hot._own) == [first, third]  # the second was asked longest ago
    hot.predict(second, many)
    assert list(hot._own) == [third, second]

    own = weakref.ref(hot._own[third])
    tasks.remove(third)
    del third, task
    gc.collect()
    assert own() is None and list(hot._own) == [second]


def test_a_bundle_replaced_in_its_folder_costs_speed_only(
    exported: Path,
    tmp_path: Path,
    support: Support,
    queries: np.ndarray,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = shutil.copytree(exported, tmp_path / "bundle")
    task = FewShotModel.load(bundle).adapt(*support, steps=2)
    expected, hot = task.logits(queries), _Hot()
    shutil.rmtree(bundle)
    with caplog.at_level(logging.WARNING, workers.__name__):
        for _ in range(0, OFTEN + 20, len(queries)):
            found = hot.predict(task, queries)
            assert isinstance(found, Prediction)
            assert (found.logits == expected).all()
    (record,) = caplog.records
    assert "is missing" in record.getMessage()
