"""`python -m pipeline check` against stand-ins for Kubeflow, Kubernetes and a registry."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Result
from kubeflow_server import KubeflowServer
from kubernetes.client import V1ConfigMap, V1Secret
from kubernetes_server import KubernetesServer, claim, node
from registry_server import RegistryServer

from pipeline import COMPILED

# As Kubeflow Pipelines 2.17 installs it.
ON_ERROR = """
spec:
  templateDefaults:
    retryStrategy: {limit: 2, retryPolicy: OnError}
"""
AWS = ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY")
DIGEST = f"sha256:{64 * '0'}"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.__main__.console.width", 1000, raising=False)


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    server = RegistryServer(f"team/reptile-train@{DIGEST}")
    yield server
    server.close()


@pytest.fixture
def ready(kubernetes: KubernetesServer) -> KubernetesServer:
    """A cluster on which nothing is wrong."""
    config = ON_ERROR.replace("OnError", "Always")
    kubernetes.things = {
        "nodes": [node("one", cpu="8", memory="32Gi")],
        "persistentvolumeclaims/reptile-work": claim("ReadWriteMany"),
        "secrets/reptile-data": V1Secret(data=dict.fromkeys(AWS, "c2VjcmV0")),
        "configmaps/workflow-controller-configmap": V1ConfigMap(data={"workflowDefaults": config}),
    }
    return kubernetes


@pytest.fixture
def check(
    run: Callable[..., Result], registry: RegistryServer
) -> Callable[..., tuple[Result, dict[str, tuple[str, str]]]]:
    """Check; return state and sentence by what was looked at, beside what was printed."""

    def check(*options: str, image: str = "", **where: str) -> Any:
        image = image or f"{registry.host}/team/reptile-train@{DIGEST}"
        given = ("--pipeline", str(COMPILED), f"--param=image={image}", *options)
        result = run("check", *given, **where)
        rows = re.findall(r"^│ (.+?) +│ (\w+) +│ (.+?) +│$", result.out, re.MULTILINE)
        return result, {what: (state, sentence) for what, state, sentence in rows}

    return check


Check = Callable[..., tuple[Result, dict[str, tuple[str, str]]]]


@pytest.mark.usefixtures("ready")
def test_where_nothing_is_wrong_each_thing_is_named(check: Check, registry: RegistryServer) -> None:
    result, rows = check()
    assert (result.code, result.error) == (0, "")
    image = f"{registry.host}/team/reptile-train@{DIGEST}"
    expected = {
        "server": "It has version 2.17.0.",
        "rights": "This account may list experiments, pipelines, runs and schedules; with one "
        "user, it may also make them.",
        "parameters": "Image, secrets and lists are given as a run needs them.",
        "image": f"{image} can be pulled from here.",
        "nodes": "1 of 1 could hold training's cpu 4, memory 8Gi when empty.",
        "volume": "Claim reptile-work is bound, ReadWriteMany.",
        "secret reptile-data": f"It has {', '.join(AWS)}.",
        "retries": "Argo retries a process that failed and a pod that is lost.",
    }
    assert {what: ("ok", sentence) for what, sentence in expected.items()}.items() <= rows.items()
    assert "c2VjcmV0" not in result.out


def test_nothing_is_made(check: Check, server: KubeflowServer, ready: KubernetesServer) -> None:
    check()
    assert not [name for name in server.log if "list" not in name and "healthz" not in name]
    assert not [path for path in ready.asked if not path.startswith("/api/v1/")]


@pytest.mark.parametrize(
    ("what", "thing", "state", "sentence"),
    [
        ("volume", None, "wrong", "Namespace kubeflow has no volume claim reptile-work."),
        ("volume", claim("ReadOnlyMany"), "wrong", "reptile-work cannot be written to"),
        ("volume", claim("ReadWriteOnce", phase="Lost"), "wrong", "reptile-work is lost"),
        ("volume", claim("ReadWriteOnce", phase="Pending"), "weak", "not bound yet"),
        ("secret reptile-data", None, "weak", "It is not there, so a run does without"),
        (
            "secret reptile-data",
            V1Secret(data={AWS[0]: "x"}),
            "weak",
            f"It has no {AWS[1]}, {AWS[2]}",
        ),
        ("nodes", [node("one", cpu="2", memory="4Gi")], "wrong", "No node has all of cpu 4"),
        (
            "retries",
            V1ConfigMap(data={"workflowDefaults": ON_ERROR}),
            "weak",
            "a lost pod and not a failed process",
        ),
        ("retries", V1ConfigMap(data={}), "weak", "a failed process and not a lost pod"),
        (
            "retries",
            V1ConfigMap(data={"config": "workflowDefaults: {spec: {retryStrategy: "
                              "{retryPolicy: Always}}}"}),
            "ok",
            "a process that failed and a pod that is lost",
        ),
        ("retries", V1ConfigMap(data={"config": "["}), "unknown", ""),
        ("retries", None, "unknown", "has no config map workflow-controller-configmap"),
    ],
)  # fmt: skip
def test_what_is_wrong_on_the_cluster_is_told(
    check: Check, ready: KubernetesServer, what: str, thing: object, state: str, sentence: str
) -> None:
    place = {
        "volume": "persistentvolumeclaims/reptile-work",
        "secret reptile-data": "secrets/reptile-data",
        "nodes": "nodes",
        "retries": "configmaps/workflow-controller-configmap",
    }[what]
    ready.things.pop(place)
    if thing is not None:
        ready.things[place] = thing
    result, rows = check()
    assert rows[what][0] == state
    assert sentence in rows[what][1]
    assert result.code == (7 if state == "wrong" else 0)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("nodes", "nodes"),
        ("persistentvolumeclaims", "volume"),
        ("secrets", "secret reptile-data"),
        ("configmaps", "retries"),
    ],
)
def test_what_may_not_be_read_is_unknown_and_no_error(
    check: Check, ready: KubernetesServer, kind: str, what: str
) -> None:
    ready.forbidden = {kind}
    result, rows = check()
    assert result.code == 0
    assert rows[what][0] == "unknown"
    assert "may not read" in rows[what][1] and "403" in rows[what][1]


@pytest.mark.usefixtures("ready")
def test_a_server_that_is_too_old_is_wrong(check: Check, server: KubeflowServer) -> None:
    server.version = "2.14.4"
    result, rows = check()
    assert result.code == 7
    assert rows["server"][0] == "wrong"
    assert "version 2.14.4" in rows["server"][1]
    server.version = "unknown"
    result, rows = check()
    assert (result.code, rows["server"][0]) == (0, "unknown")


@pytest.mark.usefixtures("ready")
def test_a_server_that_is_not_there_leaves_the_rest_to_be_looked_at(
    check: Check, server: KubeflowServer
) -> None:
    server.html = 302
    result, rows = check()
    assert result.code == 7
    assert rows["server"][0] == "wrong"
    assert "does not answer like the API" in rows["server"][1]
    assert rows["image"][0] == rows["volume"][0] == "ok"


@pytest.mark.usefixtures("ready")
def test_a_right_that_is_lacking_is_named(check: Check, server: KubeflowServer) -> None:
    server.faults["run_service_list_runs"] = [403]
    result, rows = check()
    assert (result.code, rows["rights"][0]) == (7, "wrong")
    assert "403" in rows["rights"][1]


@pytest.mark.parametrize("allowed", [("experiments", "pipelines", "runs", "jobs"), ("runs",)])
def test_with_several_users_kubernetes_is_asked_for_the_rights(
    check: Check, ready: KubernetesServer, allowed: tuple[str, ...]
) -> None:
    server = KubeflowServer(multi_user=True)
    ready.rights = {("create", resource) for resource in allowed}
    try:
        result, rows = check("--namespace", "team", host=server.address)
    finally:
        server.close()
    assert server.broken == []
    if len(allowed) == 4:
        assert (result.code, rows["rights"][0]) == (0, "ok")
    else:
        assert (result.code, rows["rights"][0]) == (7, "wrong")
        assert "may not create experiments, pipelines, jobs" in rows["rights"][1]
    assert "/api/v1/namespaces/team/persistentvolumeclaims/reptile-work" in ready.asked
    assert "/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap" in ready.asked


def test_without_a_kubeconfig_the_rest_is_looked_at(check: Check) -> None:
    result, rows = check()
    assert result.code == 0
    assert rows["Kubernetes"][0] == "unknown"
    assert rows["image"][0] == "ok"
    assert "volume" not in rows


@pytest.mark.usefixtures("ready")
def test_an_image_that_its_registry_does_not_have_is_wrong(
    check: Check, registry: RegistryServer
) -> None:
    result, rows = check(image=f"{registry.host}/team/reptile-train:2")
    assert (result.code, rows["image"][0]) == (7, "wrong")
    assert "has no" in rows["image"][1]


@pytest.mark.usefixtures("ready")
def test_an_image_that_may_change_is_wrong(check: Check, registry: RegistryServer) -> None:
    registry.images = ("team/reptile-train:latest",)
    result, rows = check(image=f"{registry.host}/team/reptile-train")
    assert (result.code, rows["parameters"][0], rows["image"][0]) == (7, "wrong", "ok")


def test_a_wrong_option_is_an_error_of_the_command(run: Callable[..., Result]) -> None:
    assert run("check", "-P", "no_such=1").code == 2


def test_required_parameters_may_be_left_out(
    run: Callable[..., Result], tmp_path: Path, compiled: Path
) -> None:
    assert run("check", "--pipeline", str(compiled)).code == 0
