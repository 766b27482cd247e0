"""Running the compiled pipeline on this machine with kfp's own local runner.

A run is judged by what it has left behind, never by the status that the runner reports: with
Docker that may be a success when a task has failed.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from kfp import local
from kfp.components import load_component_from_text
from kfp.dsl.graph_component import GraphComponent

from components.fetch import content_md5
from pipeline.document import for_this_machine
from pipeline.graph import reptile
from pipeline.revisions import data_md5
from reptile.data.dataset import load_prepared
from reptile.errors import InputError
from reptile.evaluate.metrics import read_metrics
from reptile.files import sha256_file
from reptile.learn.checkpoint import load_checkpoint
from reptile.runtime.bundle import open_bundle


class Outcome(IntEnum):
    """How a run ended, as an exit code."""

    DELIVERED = 0  # a bundle was exported and verified
    FAILED = 1
    REFUSED = 3  # by the gate; 2 is a mistake in the command


PASSED = "passed"


class Result(NamedTuple):
    """What one stage has left behind."""

    stage: str
    found: str  # in a few words; "" if it is nothing that can be used


class Run(NamedTuple):
    """A finished run."""

    outcome: Outcome
    folder: Path
    results: tuple[Result, ...]  # of the stages and what is between them, in their order
    message: str  # why nothing was delivered


def run_local(
    arguments: dict[str, Any],
    output: Path,
    image: str | None = None,
    graph: GraphComponent = reptile,
) -> Run:
    """Run the pipeline, each task in a process of its own, and look at what it has made.

    Args:
        arguments: the pipeline's.
        output: folder of runs; this one gets a folder of its own in it.
        image: run the tasks in containers of this image; None runs them in this environment.
        graph: the pipeline.
    """
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    before = set(output.iterdir())
    local.init(
        _docker(arguments) if image else local.SubprocessRunner(use_venv=False),
        pipeline_root=str(output),
        # Removed after the run, so nothing that is to last may lie there.
        workspace_root=tempfile.mkdtemp(prefix="reptile-workspace-"),
    )
    failure = ""
    # kfp warns that resources have no effect here, and of an image without `python` in its name.
    with warnings.catch_warnings(action="ignore"):
        try:
            load_component_from_text(for_this_machine(image or "python", graph))(**arguments)
        except Exception as error:  # whatever it is, the run has failed and its folder tells more
            failure = str(error) or type(error).__name__
    made = set(output.iterdir()) - before
    if len(made) != 1:
        more = "several runs at once; give each an --output of its own" if made else "no task ran"
        raise InputError(f"{output}: {more}" + (f" ({failure})" if failure else ""))
    (folder,) = made
    return examine(folder, failure, publishes=bool(arguments["bundle_remote"]))


def examine(folder: Path, failure: str = "", *, publishes: bool = False) -> Run:
    """Judge a run by what is in its folder.

    Args:
        folder: of the run.
        failure: what the runner says of it, if anything.
        publishes: whether the bundle was to be pushed to a DVC remote.
    """
    found: dict[str, str] = {}
    problems = [failure] if failure else []
    looks = dict(_LOOKS)
    if (folder / "choose").exists():  # a sweep: many were trained
        looks["train"] = _swept
    if publishes:
        looks["publish"] = _published
    for stage, look in looks.items():
        if failure and not (folder / stage).exists():
            found[stage] = ""  # not started, as a task before it has failed
            continue
        try:
            found[stage] = look(folder)
        except (InputError, OSError, ValueError, KeyError) as error:
            found[stage] = ""
            problems.append(f"{stage}: {error}")
    if not problems:
        outcome, message = Outcome.DELIVERED, ""
    elif found["gate"] not in ("", PASSED) and not (folder / "export").exists():
        outcome, message = Outcome.REFUSED, found["gate"]
    else:
        outcome, message = Outcome.FAILED, "\n".join(problems)
    return Run(outcome, folder, tuple(Result(*item) for item in found.items()), message)


def _docker(arguments: dict[str, Any]) -> local.DockerRunner:
    try:
        import docker
        from docker.types import Mount

        docker.from_env().ping()
    except ModuleNotFoundError:
        raise InputError("--docker needs the docker package: pip install docker") from None
    except docker.errors.DockerException as error:
        raise InputError(f"--docker needs a Docker engine: {error}") from None
    needed = arguments["repository"], arguments["work"]
    return local.DockerRunner(
        # As oneself, or the outputs would belong to another user.
        user=f"{os.getuid()}:{os.getgid()}",
        environment={"HOME": "/tmp"},
        mounts=[Mount(target=path, source=path, type="bind") for path in needed],
    )


def _prepared(folder: Path) -> str:
    data = load_prepared(folder / "prepare/prepared")
    return f"{data.name}: {len(data.images):,} images of {len(data.classes)} classes"


def _trained(folder: Path) -> str:
    return _checkpoint(folder / "train/checkpoint")


def _swept(folder: Path) -> str:
    table = (folder / "choose/candidates").read_text(encoding="utf-8")
    return f"{_lines(table)}\nthe best: {_checkpoint(folder / 'choose/best')}"


def _checkpoint(folder: Path) -> str:
    info = load_checkpoint(folder).info
    score = f"validation {info.objective.title} {info.curve[-1].score:.3f}"
    return f"{info.iteration} meta-iterations, {score}"


def _evaluated(folder: Path) -> str:
    for name in ("confusion_matrix", "report"):
        _output(folder, "evaluate", "artifacts", name)
    read_metrics(folder / "evaluate/evaluation")
    scores = dict(_output(folder, "evaluate", "artifacts", "scores", "artifacts")[0]["metadata"])
    title = scores.pop("display_name")
    others = _lines((folder / "evaluate/other_tasks").read_text(encoding="utf-8"))
    return "\n".join([f"{title}:", *(f"{k}: {v}" for k, v in scores.items()), others]).strip()


def _lines(table: str) -> str:
    """Return the rows of a Markdown table as lines, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    return "\n".join(line.strip("| ").replace(" | ", ": ", 1) for line in lines)


def _judged(folder: Path) -> str:
    verdict = (folder / "gate/verdict").read_text(encoding="utf-8")  # all that a failed task leaves
    heading, _, reason, *_ = verdict.splitlines()
    return reason if "Refused" in heading else PASSED


def _exported(folder: Path) -> str:
    bundle = open_bundle(folder / "export/bundle")
    return f"bundle {bundle.sha256[:12]}"


def _verified(folder: Path) -> str:
    checks = json.loads((folder / "verify/verification").read_text(encoding="utf-8"))["checks"]
    verified = _output(folder, "verify", "parameterValues", "Output")
    if verified != sha256_file(folder / "export/bundle/manifest.json"):
        raise InputError("what was verified is not the bundle that was exported")
    passed = sum(check["passed"] for check in checks)
    if passed < len(checks) or not checks:
        raise InputError(f"only {passed} of {len(checks)} checks passed")
    return f"{passed} checks passed"


def _published(folder: Path) -> str:
    md5 = data_md5((folder / "publish/pointer").read_text(encoding="utf-8"))
    if md5 != content_md5(folder / "export/bundle"):
        raise InputError("the pointer is not the exported bundle's")
    return f"md5 {md5}"


_LOOKS: dict[str, Callable[[Path], str]] = {
    "prepare": _prepared,
    "train": _trained,
    "evaluate": _evaluated,
    "gate": _judged,
    "export": _exported,
    "verify": _verified,
}


def _output(folder: Path, task: str, *keys: str) -> Any:
    path = folder / task / "executor_output.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        value = value[key]
    return value
