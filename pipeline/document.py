"""The graph as Kubeflow reads it: the pipeline's and the platform's document in one YAML file."""

import tempfile
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml
from kfp.compiler import Compiler
from kfp.dsl.graph_component import GraphComponent

from pipeline.graph import reptile
from pipeline.package import FIRST_BACKEND, SECURITY_BACKEND
from reptile.errors import InputError

PullPolicy = Literal["Always", "IfNotPresent", "Never"]


def read_backend(text: str) -> tuple[int, int]:
    """Read a release of Kubeflow Pipelines, such as `2.16` or `2.16.1`.

    Raises:
        InputError: it is no release, or too old.
    """
    try:
        major, minor = (int(part) for part in text.split(".")[:2])
    except ValueError:
        raise InputError(f"--backend {text}: write a release such as 2.16") from None
    if (major, minor) < FIRST_BACKEND:
        raise InputError(
            f"--backend {text}: the pipeline needs Kubeflow Pipelines "
            f"{'.'.join(map(str, FIRST_BACKEND))} or later; upgrade the installation"
        )
    return major, minor


def read_pull_policy(text: str) -> PullPolicy:
    """Read a pull policy.

    Raises:
        InputError: Kubernetes has no such policy.
    """
    for policy in get_args(PullPolicy):
        if policy == text:
            return cast(PullPolicy, policy)
    raise InputError(f"--pull-policy {text}: must be {', '.join(get_args(PullPolicy))}")


def render(
    graph: GraphComponent = reptile,
    backend: tuple[int, int] = SECURITY_BACKEND,
    pull_policy: PullPolicy | None = None,
) -> str:
    """Return a compiled pipeline; the same source, params.yaml and data.dvc give the same.

    Args:
        graph: the pipeline.
        backend: the release that is to run it, at least FIRST_BACKEND; those below SECURITY_BACKEND
            refuse a security context, so it is left out.
        pull_policy: of the image; None for Kubernetes' default. Kubeflow takes no parameter for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        Compiler().compile(graph, str(path))
        text = path.read_text(encoding="utf-8")
    if backend >= SECURITY_BACKEND and pull_policy is None:
        return text
    pipeline, platform = yaml.safe_load_all(text)
    for pod in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        if backend < SECURITY_BACKEND:
            del pod["securityContext"]
        if pull_policy:
            pod["imagePullPolicy"] = pull_policy
    return yaml.safe_dump_all([pipeline, platform], sort_keys=False, allow_unicode=True)


def for_this_machine(image: str, graph: GraphComponent = reptile) -> str:
    """Return the pipeline's document for kfp's local runner.

    It cannot fill an image in from a parameter, and a failure here is better shown than retried.
    """
    document: dict[str, Any] = next(yaml.safe_load_all(render(graph)))
    for executor in document["deploymentSpec"]["executors"].values():
        executor["container"]["image"] = image
    for component in (document["root"], *document["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return yaml.safe_dump(document, sort_keys=False)
