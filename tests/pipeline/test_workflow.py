"""Tasks of recorded runs, and of one on a backend that retries no pod by itself."""

import json
from types import SimpleNamespace
from typing import Any

import kfp_server_api as api
import pytest
from kubeflow_server import node_id, recorded_run

from pipeline.workflow import task_name, tasks, workflow_name

HANDLER = "reptile-bwhz7(0).root(0).exit-handler-1(0)"


def as_kfp_gives_it(run: dict[str, Any]) -> Any:
    return api.ApiClient().deserialize(SimpleNamespace(data=json.dumps(run)), "V2beta1Run")


def names(run: dict[str, Any]) -> dict[str, str]:
    return {task.name: task.state for task in tasks(as_kfp_gives_it(run))}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("out-of-memory", "prepare CACHED, train FAILED, summarise SUCCEEDED"),
        ("killed-not-retried", "prepare CACHED, train FAILED, summarise SUCCEEDED"),
        ("upload-denied", "prepare FAILED, summarise FAILED"),
        ("driver-failed", "the driver of root FAILED"),
        ("image-pull", "prepare RUNNING"),
        (
            "succeeded-cached",
            "prepare CACHED, train CACHED, evaluate CACHED, gate CACHED, measure 1 CACHED, "
            "measure 2 CACHED, measure 3 CACHED, tabulate CACHED, export CACHED, verify CACHED, "
            "summarise SUCCEEDED",
        ),
    ],
)
def test_the_tasks_of_a_recorded_run_are_those_that_began(name: str, expected: str) -> None:
    found = names(recorded_run(name)).items()
    assert ", ".join(" ".join(pair) for pair in found) == expected


def test_the_pods_of_a_task_are_its_attempts_in_turn() -> None:
    found = tasks(as_kfp_gives_it(recorded_run("killed-not-retried")))
    (train,) = (task for task in found if task.name == "train")
    assert train.pods == tuple(
        node_id("reptile-bwhz7", f"{HANDLER}.train(0).executor({attempt})") for attempt in (0, 1)
    )


def node(full: str, state: str, seconds: int, *children: str) -> dict[str, Any]:
    return {
        "display_name": full.rpartition(".")[2],
        "state": state,
        "start_time": "2026-11-27T13:00:00Z",
        "end_time": f"2026-11-27T13:00:{seconds:02}Z",
        "child_tasks": [{"pod_name": node_id("w", child)} for child in children],
    }


def test_where_argo_retries_nothing_by_itself_the_pod_is_the_executor() -> None:
    """As releases before 2.17 have it; a pod that the pipeline retries is still below it."""
    run = {
        "state": "FAILED",
        "run_details": {
            "task_details": [
                node("w", "FAILED", 50, "w.root-driver"),
                node("w.root-driver", "SUCCEEDED", 5, "w.root"),
                node("w.root", "FAILED", 50, "w.root.prepare-driver"),
                node("w.root.prepare-driver", "SUCCEEDED", 5, "w.root.prepare"),
                node("w.root.prepare", "SUCCEEDED", 0, "w.root.prepare.executor"),
                node("w.root.prepare.executor", "SKIPPED", 0, "w.root.train-driver"),
                node("w.root.train-driver", "SUCCEEDED", 5, "w.root.train"),
                node("w.root.train", "FAILED", 40, "w.root.train.executor"),
                node("w.root.train.executor", "FAILED", 40, "w.root.train.executor(0)"),
                node("w.root.train.executor(0)", "FAILED", 40, "w.root.gate-driver"),
                node("w.root.gate-driver", "FAILED", 5, "w.root.verify"),
                node("w.root.verify", "FAILED", 9, "w.root.verify.executor"),
                node("w.root.verify.executor", "FAILED", 9),
            ]
        },
    }
    found = tasks(as_kfp_gives_it(run))
    assert workflow_name(as_kfp_gives_it(run)) == "w"
    assert {(task.name, task.state, task.pods) for task in found} == {
        ("prepare", "CACHED", ()),
        ("train", "FAILED", (node_id("w", "w.root.train.executor(0)"),)),
        ("the driver of gate", "FAILED", (node_id("w", "w.root.gate-driver"),)),
        ("verify", "FAILED", (node_id("w", "w.root.verify.executor"),)),
    }


def test_a_run_without_nodes_has_no_tasks() -> None:
    assert names({"state": "PENDING"}) == {}
    assert workflow_name(as_kfp_gives_it({"state": "PENDING"})) == ""


def test_nodes_with_ids_that_cannot_be_read_are_left_out() -> None:
    """Should a later Argo name its nodes in another way."""
    run = {"run_details": {"task_details": [node("w.root", "FAILED", 5, "x")]}}
    assert names(run) == {}


@pytest.mark.parametrize(
    ("full", "name"),
    [
        ("w(0).root(0).prepare(0).executor(0)", "prepare"),
        ("w.root.prepare-driver", "the driver of prepare"),
        ("w(0).root(0).for-loop-2(0).iteration-iterations(1:1)(0).iteration-item(0).measure",
         "measure 2"),
        ("w.root.for-loop-2.iteration-iterations(9:9).iteration-item.train-driver",
         "the driver of train 10"),
    ],
)  # fmt: skip
def test_a_node_belongs_to_a_task(full: str, name: str) -> None:
    assert task_name(full) == name
