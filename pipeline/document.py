"""The graph as Kubeflow reads it: the pipeline's and the platform's document in one YAML file."""

import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp.compiler import Compiler

from pipeline.graph import reptile


def render() -> str:
    """Return the compiled pipeline; the same source, params.yaml and data.dvc give the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reptile.yaml"
        Compiler().compile(reptile, str(path))
        return path.read_text(encoding="utf-8")


def for_this_machine(image: str) -> str:
    """Return the pipeline's document for kfp's local runner.

    It cannot fill an image in from a parameter, and a failure here is better shown than retried.
    """
    document: dict[str, Any] = next(yaml.safe_load_all(render()))
    for executor in document["deploymentSpec"]["executors"].values():
        executor["container"]["image"] = image
    for component in (document["root"], *document["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return yaml.safe_dump(document, sort_keys=False)
