"""Runs that cannot succeed are refused before anything is sent to Kubeflow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Result, only
from kfp import compiler, dsl
from kubeflow_server import KubeflowServer
from kubernetes.client import V1Taint
from kubernetes_server import KubernetesServer, node

DIGEST = f"registry.example.org/team/reptile-train@sha256:{64 * '0'}"
GPU_TAINT = V1Taint(key="nvidia.com/gpu", effect="NoSchedule")
TOLERATION = '[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]'


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with the parameters that are looked at, by the names of the project's own."""

    @dsl.component(base_image="image", install_kfp_package=False)
    def measure(point: str) -> str:
        return point

    @dsl.pipeline(name="placed")
    def placed(
        image: str = "reptile-train:latest",
        points: list[str] = ["5-way 1-shot frozen"],
        data_secret: str = "reptile-data",
        git_secret: str = "",
        accelerator: str = "nvidia.com/gpu",
        accelerators: str = "0",
        cpu: str = "4",
        memory: str = "8Gi",
        node_selector: dict[str, str] = {},
        tolerations: list[dict[str, Any]] = [],
    ) -> None:
        with dsl.ParallelFor(points) as point:
            measure(point=point).set_container_image(image)

    path = tmp_path_factory.mktemp("compiled") / "placed.yaml"
    compiler.Compiler().compile(placed, str(path))
    return path


@pytest.fixture(params=["submit", "schedule"])
def send(
    request: pytest.FixtureRequest, run: Callable[..., Result], pipeline: Path
) -> Callable[..., Result]:
    """Submit or schedule the pipeline with parameters, and options."""
    command = ("submit",) if request.param == "submit" else ("schedule", "nightly", "0 0 2 * * *")

    def send(*options: str, **parameters: str) -> Result:
        pairs = [f"--param={name}={value}" for name, value in parameters.items()]
        return run(*command, *options, *pairs, "--pipeline", str(pipeline))

    return send


# Parameters


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "no image is given"),
        ("", "is not an image"),
        ("https://registry.example.org/x@sha256:1", "is not an image"),
        ("registry.example.org/x@sha256:abc", "is not an image"),
        ("Registry/X:1", "is not an image"),
        ("registry.example.org/team/reptile-train", "may be another one tomorrow"),
        ("registry.example.org:5000/reptile-train:latest", "may be another one tomorrow"),
    ],
)
def test_an_image_that_is_missing_or_may_change_is_refused(
    send: Callable[..., Result], server: KubeflowServer, image: str | None, reason: str
) -> None:
    result = send() if image is None else send(image=image)
    assert (result.code, server.heard) == (2, [])
    assert reason in result.error
    assert "reptile-train@sha256:" in result.error


@pytest.mark.parametrize(
    "image",
    [
        DIGEST,
        "registry.example.org:5000/team/x:2027-01-31",
        "localhost/x:1",
        f"team/x:latest@sha256:{64 * 'a'}",
    ],
)
def test_an_image_by_digest_or_version_is_sent(send: Callable[..., Result], image: str) -> None:
    assert send(image=image)[::2] == (0, "")


def test_an_image_that_may_change_can_be_insisted_on(
    send: Callable[..., Result], server: KubeflowServer
) -> None:
    assert send("--force").code == 0
    assert send("--force", image="registry.example.org/x").code == 0
    assert send("--force", image="").code == 2


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"data_secret": ""}, "leave it out for reptile-data"),
        ({"data_secret": "Reptile Data"}, "not the name of a secret"),
        ({"data_secret": "both", "git_secret": "both"}, "make two of it"),
        ({"points": "[]"}, "points is an empty list"),
        ({"cpu": "four"}, "cpu: 'four' is not a quantity"),
        ({"memory": "8 GB"}, "memory: '8 GB' is not a quantity"),
        ({"accelerators": "one"}, "nvidia.com/gpu: 'one' is not a quantity"),
    ],
)
def test_a_value_that_no_run_survives_is_refused(
    send: Callable[..., Result], server: KubeflowServer, parameters: dict[str, str], reason: str
) -> None:
    for options in ((), ("--force",)):
        result = send(*options, image=DIGEST, **parameters)
        assert (result.code, server.heard) == (2, [])
        assert reason in result.error


def test_a_secret_that_is_empty_by_default_may_be_empty(send: Callable[..., Result]) -> None:
    assert send(image=DIGEST, git_secret="").code == 0


def test_a_pipeline_without_such_parameters_is_sent(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    assert run("submit", "-P", "data_revision=1").code == 0
    assert len(server.runs) == 1


# Nodes

SMALL = node("small", cpu="2", memory="4Gi")
LARGE = node("large", cpu="7910m", memory="30Gi", labels={"zone": "a"})
GPU = node("gpu", GPU_TAINT, cpu="8", memory="32Gi", gpu="1", labels={"zone": "b"})


@pytest.mark.parametrize(
    ("nodes", "parameters", "reason"),
    [
        ([SMALL], {}, "no node has all of cpu 4, memory 8Gi; the most that any has: cpu 2, memory"),
        # Each has enough of one thing, and none of both.
        (
            [node("a", cpu="1", memory="64Gi"), node("b", cpu="64", memory="1Gi")],
            {},
            "the most that any has: cpu 64, memory 64Gi",
        ),
        ([LARGE], {"accelerators": "1"}, "no node has any nvidia.com/gpu"),
        ([LARGE, GPU], {"accelerators": "2", "tolerations": TOLERATION}, "nvidia.com/gpu 1"),
        ([LARGE, GPU], {"node_selector": '{"zone": "c"}'}, "no node has the labels {'zone': 'c'}"),
        ([LARGE, GPU], {"node_selector": '{"zone": "b"}'}, "a taint such as nvidia.com/gpu"),
        ([], {}, "no node takes pods"),
    ],
)
def test_a_request_that_no_node_can_hold_is_refused(
    send: Callable[..., Result],
    server: KubeflowServer,
    kubernetes: KubernetesServer,
    nodes: list[Any],
    parameters: dict[str, str],
    reason: str,
) -> None:
    kubernetes.things["nodes"] = nodes
    result = send(image=DIGEST, **parameters)
    assert (result.code, server.heard) == (2, [])
    assert reason in result.error
    assert kubernetes.address in result.error
    assert send("--force", image=DIGEST, **parameters).code == 0


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"cpu": "7.9", "memory": "30720Mi"},
        {"accelerators": "1", "tolerations": TOLERATION},
        {"node_selector": '{"zone": "b"}', "tolerations": '[{"operator": "Exists"}]'},
    ],
)
def test_a_request_that_a_node_can_hold_is_sent(
    send: Callable[..., Result], kubernetes: KubernetesServer, parameters: dict[str, str]
) -> None:
    kubernetes.things["nodes"] = [SMALL, LARGE, GPU]
    assert send(image=DIGEST, **parameters)[::2] == (0, "")


def test_nodes_that_may_not_be_read_are_not_missed(
    send: Callable[..., Result], kubernetes: KubernetesServer
) -> None:
    kubernetes.forbidden = {"nodes"}
    assert send(image=DIGEST)[::2] == (0, "")
    assert kubernetes.asked == ["/api/v1/nodes"]


def test_a_kubernetes_that_is_gone_is_not_missed(
    send: Callable[..., Result], kubernetes: KubernetesServer
) -> None:
    kubernetes.close()
    assert send(image=DIGEST)[::2] == (0, "")


@pytest.mark.usefixtures("in_cluster")
def test_in_a_pod_a_kubernetes_that_cannot_be_reached_is_not_missed(
    run: Callable[..., Result], pipeline: Path
) -> None:
    result = run("submit", "--pipeline", str(pipeline), f"--param=image={DIGEST}", host=None)
    assert result[::2] == (0, "")


def test_a_kubeconfig_that_cannot_be_read_is_not_missed(
    send: Callable[..., Result], tmp_path: Path, server: KubeflowServer
) -> None:
    (tmp_path / "kubeconfig").write_text("[")
    assert send(image=DIGEST)[::2] == (0, "")
    assert only(server.pipelines)["display_name"] == "placed"
