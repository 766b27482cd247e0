"""Waiting for runs that answer as recorded from a real cluster, and what is said at their end."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Result, only, submitted
from kubeflow_server import (
    KubeflowServer,
    recorded_log,
    recorded_run,
    refused_by_the_gate,
    replay,
)
from kubernetes.client import V1PodCondition
from kubernetes_server import (
    KubernetesServer,
    container_waiting,
    ended_pod,
    removed_pod,
    waiting_pod,
    warning,
)

from pipeline import progress
from pipeline.failure import REFUSED

REASON = "1-shot transductive accuracy on glyphs is 0.7560, below the gate of 0.99"
# Of training, killed twice: the nodes of both attempts in that recorded run.
KILLED = ("reptile-bwhz7-385082932", "reptile-bwhz7-4075908849")
PREPARE = "reptile-tmmvc(0).root(0).exit-handler-1(0).prepare"


def lines(result: Result) -> list[str]:
    """What was printed while waiting, without the times."""
    return re.findall(r"^\d\d:\d\d:\d\d (.*)$", result.out, re.MULTILINE)


def failed(server: KubeflowServer, run: dict[str, Any], log: str) -> None:
    """Let the next run end as this one, whose failed pod has this log."""
    server.looks = [run]
    (children,) = (
        node["child_tasks"]
        for node in run["run_details"]["task_details"]
        if (node.get("display_name"), node.get("state")) == ("executor", "FAILED")
    )
    server.logs = {children[-1]["pod_name"]: log}


# Progress


def test_each_task_is_told_of_as_it_starts_is_retried_and_ends(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    server.looks = replay(recorded_run("killed-not-retried"))
    result = run(*submitted("--wait"))
    assert result.code == 1
    assert lines(result) == [
        "running",
        "prepare taken from the cache",
        "train started",
        "train is tried again (attempt 2)",
        "train failed after 7 min 46 s",
        "summarise started",
        "summarise succeeded after 10 s",
        "failed",
    ]


def test_what_came_from_the_cache_is_told_from_what_ran(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    server.looks = [recorded_run("succeeded-cached")]
    result = run(*submitted("--wait"))
    assert (result.code, result.error) == (0, "")
    *told, state = lines(result)
    assert state == "succeeded"
    cached = ("prepare", "train", "evaluate", "gate", "tabulate", "export", "verify")
    points = (f"measure {number}" for number in (1, 2, 3))
    assert sorted(told) == sorted(
        [*(f"{task} taken from the cache" for task in (*cached, *points)),
         "summarise succeeded after 10 s"]
    )  # fmt: skip


def test_nothing_is_told_twice(run: Callable[..., Result], server: KubeflowServer) -> None:
    server.looks = [look for look in replay(recorded_run("out-of-memory"), 5) for _ in range(3)]
    told = lines(run(*submitted("--wait")))
    assert len(told) == len(set(told)) > 3


def test_waiting_may_begin_later(run: Callable[..., Result], server: KubeflowServer) -> None:
    run(*submitted())
    server.looks = replay(recorded_run("out-of-memory"))[4:]
    result = run("status", only(server.runs)["run_id"], "--wait")
    assert result.code == 1
    assert result.out.startswith("running: http")
    assert lines(result)[-2:] == ["summarise succeeded after 10 s", "failed"]
    assert "train failed; its log" not in result.out


# Pods that do not start


@pytest.fixture
def stuck(server: KubeflowServer) -> None:
    server.looks = [recorded_run("image-pull")]


def waiting(**status: Any) -> Any:
    return waiting_pod(f"{PREPARE}(0).executor(0)", "reptile-tmmvc", **status)


@pytest.mark.usefixtures("stuck")
@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (
            waiting(container_statuses=container_waiting("ErrImagePull", "x:\n  not found")),
            "ErrImagePull: x: not found",
        ),
        (
            waiting(
                conditions=[
                    V1PodCondition(
                        type="PodScheduled",
                        status="False",
                        reason="Unschedulable",
                        message="0/1 nodes are available: 1 Insufficient cpu.",
                    )
                ]
            ),
            "Unschedulable: 0/1 nodes are available: 1 Insufficient cpu.",
        ),
        (
            waiting(container_statuses=container_waiting("ContainerCreating")),
            "FailedMount: no such volume",
        ),
    ],
)
def test_what_keeps_a_pod_from_starting_is_told_once(
    run: Callable[..., Result], kubernetes: KubernetesServer, pod: Any, reason: str
) -> None:
    other = waiting_pod("other(0).train", "other", container_statuses=container_waiting("Wrong"))
    kubernetes.things = {
        "pods": [pod, other],
        "events": [warning("1234", "FailedMount", "no such volume"), warning("5", "Other", "")],
    }
    result = run(*submitted("--wait", "--timeout", "0.4"))
    assert result.code == 5
    assert lines(result) == ["running", "prepare started", f"prepare cannot start: {reason}"]


@pytest.mark.usefixtures("stuck")
@pytest.mark.parametrize("refused", [True, False])
def test_where_pods_cannot_be_read_a_hint_is_given_after_a_while(
    run: Callable[..., Result],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    refused: bool,
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.2)
    if refused:
        kubernetes = request.getfixturevalue("kubernetes")
        kubernetes.forbidden = {"pods"}
    result = run(*submitted("--wait", "--timeout", "0.6"))
    told = lines(result)
    assert told[:2] == ["running", "prepare started"]
    assert len(told) == 3
    assert "prepare has waited" in told[2]
    assert "kubectl describe pods -l workflows.argoproj.io/workflow=reptile-tmmvc" in told[2]
    if refused:
        assert kubernetes.asked.count("/api/v1/namespaces/kubeflow/pods") == 1


# Failures


def test_a_refusal_by_the_gate_is_told_from_a_failure(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    failed(server, *refused_by_the_gate())
    result = run(*submitted("--wait"))
    assert (result.code, result.error) == (3, f"refused by the gate: {REASON}\n")


def test_a_text_like_a_refusal_in_another_tasks_log_is_none(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    _, log = refused_by_the_gate()
    failed(server, recorded_run("refused"), log)  # of the task `refuse`
    assert run(*submitted("--wait")).code == 1


def test_the_gates_component_ends_with_the_words_that_are_looked_for(root: Path) -> None:
    assert f'SystemExit(f"{REFUSED}' in (root / "components/control.py").read_text()


@pytest.mark.parametrize("name", ["out-of-memory", "killed-not-retried"])
def test_a_failed_run_says_which_task_failed_and_how_its_last_log_ends(
    run: Callable[..., Result], server: KubeflowServer, name: str
) -> None:
    failed(server, recorded_run(name), recorded_log("out-of-memory"))
    result = run(*submitted("--wait"))
    assert result.code == 1
    assert result.error.splitlines() == [
        "train failed; its log ends:",
        "  Killed",
        "  failed to execute component: exit status 137",
    ]


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (
            # As containerd does where the kernel killed a child: the launcher's exit code stays.
            ended_pod(KILLED[1], 1, "OOMKilled"),
            "OOMKilled (container main, exit code 1, memory limit 8Gi)",
        ),
        (
            removed_pod(KILLED[1], "Evicted", "The node was low on resource: memory. "),
            "Evicted: The node was low on resource: memory",
        ),
        (
            removed_pod(
                KILLED[1],
                "DeadlineExceeded",
                "Pod was active on the node longer than the specified deadline",
            ),
            "DeadlineExceeded: Pod was active on the node longer than the specified deadline",
        ),
        (
            ended_pod(
                KILLED[1],
                137,
                "ContainerStatusUnknown",
                message="The container could not be\x1b\n located when the pod was terminated",
            ),
            "ContainerStatusUnknown (container main, exit code 137): "
            "The container could not be located when the pod was terminated",
        ),
    ],
    ids=["OOMKilled", "Evicted", "DeadlineExceeded", "ContainerStatusUnknown"],
)
@pytest.mark.parametrize("log", [True, False])
def test_what_ended_the_pod_is_told_beside_its_log(
    run: Callable[..., Result],
    server: KubeflowServer,
    kubernetes: KubernetesServer,
    pod: Any,
    reason: str,
    log: bool,
) -> None:
    recorded = recorded_run("killed-not-retried")
    server.looks = [recorded]
    if log:
        server.logs = {KILLED[1]: recorded_log("out-of-memory")}
    # The first attempt ended otherwise, and what succeeded says nothing.
    kubernetes.things = {"pods": [ended_pod(KILLED[0], 137, "StartError"), pod]}
    result = run(*submitted("--wait"))
    assert result.code == 1
    first, *rest = result.error.splitlines()
    assert first == f"train failed: {reason}; " + (
        "its log ends:" if log else "no log of it can be read"
    )
    assert bool(rest) == log
    status = run("status", only(server.runs)["run_id"])
    assert (status.code, status.error) == (1, result.error)


@pytest.mark.parametrize("readable", [True, False])
def test_a_process_that_ended_by_itself_is_explained_by_its_log_alone(
    run: Callable[..., Result],
    server: KubeflowServer,
    kubernetes: KubernetesServer,
    readable: bool,
) -> None:
    server.looks = [recorded_run("killed-not-retried")]
    how = ended_pod(KILLED[1], 1, "Error" if readable else "OOMKilled")
    kubernetes.things = {"pods": [ended_pod(KILLED[0], 137, "OOMKilled"), how]}
    kubernetes.forbidden = set() if readable else {"pods"}
    result = run(*submitted("--wait"))
    assert result.error == "train failed; no log of it can be read\n"


def test_a_long_log_is_shown_from_its_end_without_control_characters(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    own = "".join(f"line {number}\x1b[31m\x07\n" for number in range(50_000))
    head, tail = recorded_log("out-of-memory").split("Killed\n")
    failed(server, recorded_run("out-of-memory"), head + own + "Killed\n" + tail)
    error = run(*submitted("--wait")).error
    assert [line.strip() for line in error.splitlines()[1:]] == [
        *(f"line {number}" for number in range(50_000 - 19, 50_000)),
        "Killed",
        "failed to execute component: exit status 137",
    ]


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("out-of-memory", ["train"]),
        ("killed-not-retried", ["train"]),
        ("upload-denied", ["prepare", "summarise"]),
        ("driver-failed", ["the driver of root"]),
    ],
)
def test_failed_tasks_are_named_where_no_log_is_left(
    run: Callable[..., Result], server: KubeflowServer, name: str, tasks: list[str]
) -> None:
    server.looks = [recorded_run(name)]
    result = run(*submitted("--wait"))
    assert result.code == 1
    assert result.error.splitlines() == [
        f"{task} failed; no log of it can be read" for task in tasks
    ]


@pytest.mark.parametrize(
    ("name", "code", "state"),
    [("succeeded-cached", 0, "succeeded"), ("image-pull", 5, "running"), ("refused", 3, "failed")],
)
def test_status_says_how_a_run_is_doing(
    run: Callable[..., Result], server: KubeflowServer, name: str, code: int, state: str
) -> None:
    run(*submitted())
    server.looks = [recorded_run(name)]
    if name == "refused":
        failed(server, *refused_by_the_gate())
    run_id = only(server.runs)["run_id"]
    result = run("status", run_id)
    assert result.code == code
    assert result.out == f"{state}: {server.address}/#/runs/details/{run_id}\n"
    assert (REASON in result.error) == (code == 3)


def test_the_status_of_a_run_that_is_not_there_is_one_line(run: Callable[..., Result]) -> None:
    result = run("status", "no-such-run")
    assert result.code == 7
    assert "Run no-such-run not found" in result.error
