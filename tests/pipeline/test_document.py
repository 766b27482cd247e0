"""The compiled pipeline: as its source has it, valid, and the same graph as dvc.yaml's."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

from components import secrets
from components.artifacts import read_point
from pipeline import COMPILED, SWEEP
from pipeline.package import load_package, without_volume
from reptile.settings import load_settings

Document = dict[str, Any]


class Origin(NamedTuple):
    """Where a task's input comes from: an output of a task, or an input of the pipeline."""

    task: str  # "" for the pipeline
    name: str


class Task(NamedTuple):
    name: str
    parameters: dict[str, Origin]
    artifacts: dict[str, Origin]
    platform: set[str]  # pipeline inputs that its pod's configuration uses


@pytest.fixture(scope="module")
def documents() -> tuple[Document, Document]:
    pipeline, platform = yaml.safe_load_all(COMPILED.read_text(encoding="utf-8"))
    return pipeline, platform


@pytest.fixture(scope="module")
def tasks(documents: tuple[Document, Document]) -> dict[str, Task]:
    pipeline, platform = documents
    bound = {
        kind: {
            name: Origin("", name) for name in pipeline["root"]["inputDefinitions"].get(kind, {})
        }
        for kind in ("parameters", "artifacts")
    }
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {task.name: task for task in walk(pipeline, pods, pipeline["root"], bound)}


def walk(
    pipeline: Document, pods: Document, group: Document, bound: dict[str, dict[str, Origin]]
) -> Iterator[Task]:
    """Yield all tasks of a group and of the groups in it, their inputs traced to the origin."""
    for name, task in group["dag"]["tasks"].items():
        component = pipeline["components"][task["componentRef"]["name"]]
        traced: dict[str, dict[str, Origin]] = {"parameters": {}, "artifacts": {}}
        for kind in traced:
            for key, source in task.get("inputs", {}).get(kind, {}).items():
                origin = trace(source, bound[kind])
                if origin:
                    traced[kind][key] = origin
        if "dag" in component:
            if "parameterIterator" in task:
                item = task["parameterIterator"]["itemInput"]
                traced["parameters"][item] = Origin(name, "item")
            declared = component.get("inputDefinitions", {})
            assert {k: set(v) for k, v in traced.items() if v} == {
                k: set(v) for k, v in declared.items()
            }
            yield from walk(pipeline, pods, component, traced)
        else:
            used = set(parameters_in(pods.get(component["executorLabel"], {})))
            assert used <= set(bound["parameters"]), f"{name}: its group is not given {used}"
            own = {bound["parameters"][parameter].name for parameter in used}
            yield Task(name, traced["parameters"], traced["artifacts"], own)


def trace(source: Mapping[str, Any], bound: Mapping[str, Origin]) -> Origin | None:
    ((kind, value),) = source.items()
    if kind.startswith("componentInput"):
        return bound[value]  # a KeyError here is an input that the group was never given
    if kind in ("taskOutputArtifact", "taskOutputParameter"):
        return Origin(value["producerTask"], value["output" + kind[10:] + "Key"])
    return None


def parameters_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "componentInputParameter":
                yield inner
            else:
                yield from parameters_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from parameters_in(inner)


def test_the_committed_documents_are_what_the_source_compiles_to(
    root: Path, tmp_path: Path
) -> None:
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "compile", "--output", str(tmp_path / seed)],
            cwd=root,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        for path in (COMPILED, SWEEP):
            made = (tmp_path / seed / path.name).read_bytes()
            assert made == path.read_bytes(), "run `python -m pipeline compile`"


def test_a_pod_can_import_what_its_task_calls(root: Path) -> None:
    """There `kfp.dsl` has nothing but the types of artifacts."""
    subprocess.run(
        [sys.executable, "-c", "from components import artifacts"],
        cwd=root,
        env=os.environ | {"_KFP_RUNTIME": "true"},
        check=True,
    )


def test_both_documents_are_what_kubeflows_own_types_hold(
    documents: tuple[Document, Document],
) -> None:
    pipeline, platform = documents
    json_format.ParseDict(pipeline, PipelineSpec())
    json_format.ParseDict(platform, PlatformSpec())
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(pods) == set(pipeline["deploymentSpec"]["executors"]), "every task has a time limit"
    for pod in pods.values():
        config = json_format.ParseDict(pod, KubernetesExecutorConfig())
        assert config.active_deadline_seconds > 0


def test_a_pod_gets_its_gpu_secret_volume_and_place_from_the_run(
    documents: tuple[Document, Document], tasks: dict[str, Task]
) -> None:
    pipeline, platform = documents
    executors = pipeline["deploymentSpec"]["executors"]
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    wanted = {"node_selector", "tolerations", "work_volume", "work_secret", "pull_secret"}
    assert tasks["train"].platform == wanted
    assert tasks["prepare"].platform == {"data_secret", "git_secret", "pull_secret"}
    assert tasks["publish"].platform == {"data_secret", "pull_secret"}
    assert "/dev/shm" in [each["mountPath"] for each in pods["exec-train"]["emptyDirMounts"]]
    resources = executors["exec-train"]["container"]["resources"]
    placeholder = "{{{{$.inputs.parameters['pipelinechannel--{}']}}}}"
    assert resources == {
        "accelerator": {
            "resourceType": placeholder.format("accelerator"),
            "resourceCount": placeholder.format("accelerators"),
        },
        "resourceCpuLimit": placeholder.format("cpu"),
        "resourceMemoryLimit": placeholder.format("memory"),
    }
    for name in ("accelerator", "accelerators", "cpu", "memory"):
        assert tasks["train"].parameters[f"pipelinechannel--{name}"] == Origin("", name)
    for task in tasks.values():
        assert task.parameters["pipelinechannel--image"] == Origin("", "image"), task.name
    assert not [name for name in executors if "env" not in executors[name]["container"]]


def test_secrets_are_files_and_never_in_the_environment_that_the_launcher_reads(
    documents: tuple[Document, Document],
) -> None:
    _, platform = documents
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    mounted = {
        name: {each["mountPath"] for each in pod["secretAsVolume"]}
        for name, pod in pods.items()
        if "secretAsVolume" in pod
    }
    assert mounted == {
        "exec-prepare": {str(secrets.DATA), str(secrets.GIT)},
        "exec-publish": {str(secrets.DATA)},
        "exec-train": {str(secrets.WORK)},
        "exec-train-beside": {str(secrets.WORK)},
    }
    assert all(each["optional"] for pod in pods.values() for each in pod.get("secretAsVolume", ()))
    assert not [name for name, pod in pods.items() if "secretAsEnv" in pod]


def test_with_a_store_for_unfinished_training_no_pod_waits_for_a_volume(root: Path) -> None:
    package = load_package(root / "pipeline/reptile.yaml")
    without = without_volume(package)
    before, after = (list(yaml.safe_load_all(each.text)) for each in (package, without))
    assert before[0] == after[0], "the graph is the same"
    assert "pvcMount" in package.text.decode()
    assert "pvcMount" not in without.text.decode()
    pods = before[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name in ("exec-train", "exec-train-beside"):
        del pods[name]["pvcMount"]
    assert before[1] == after[1], "and nothing else is gone"
    assert without.sha256 != package.sha256, "so it is a version of its own"


def test_training_is_retried_with_back_off_and_finds_its_work_again(
    documents: tuple[Document, Document], tasks: dict[str, Task]
) -> None:
    pipeline, platform = documents
    group = pipeline["root"]["dag"]["tasks"]
    policy = group["train"]["retryPolicy"]
    assert policy["maxRetryCount"] >= 3
    assert policy["backoffFactor"] > 1
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    (mount,) = pods["exec-train"]["pvcMount"]
    assert tasks["train"].parameters["work"] == Origin("", "work")
    assert pipeline["root"]["inputDefinitions"]["parameters"]["work"]["defaultValue"].startswith(
        mount["mountPath"]
    )


def dvc_stages(root: Path) -> Document:
    stages: Document = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    return stages


def test_the_graph_has_dvcs_stages_and_edges(root: Path, tasks: dict[str, Task]) -> None:
    stages = dvc_stages(root)
    control = {"publish", "gate", "check"}
    assert set(tasks) - control == set(stages)
    made = {out: name for name, stage in stages.items() for out in stage["outs"]}
    ours = {(o.task, o.name, t.name) for t in tasks.values() for o in t.artifacts.values()}
    theirs = {
        (made[dep], Path(dep).stem, name)
        for name, stage in stages.items()
        for dep in stage["deps"]
        if dep in made
    }
    assert {edge for edge in ours if edge[2] not in control} == theirs
    assert ("evaluate", "evaluation", "gate") in ours


def test_the_graph_passes_dvcs_settings_each_to_its_own_stage(
    root: Path, documents: tuple[Document, Document], tasks: dict[str, Task]
) -> None:
    inputs = documents[0]["root"]["inputDefinitions"]["parameters"]
    settings = load_settings(root / "params.yaml")
    for name, stage in dvc_stages(root).items():
        title = name.removeprefix("train-")
        assert stage["params"] == [title]
        section = getattr(settings, title)
        given = inputs[f"{title}_settings"]["defaultValue"]
        assert type(section).model_validate_json(given) == section
        used = {o.name for o in tasks[name].parameters.values() if o.name.endswith("_settings")}
        assert used == {f"{title}_settings"}, "or a change would run more than it must"
    assert tasks["gate"].parameters["settings"] == Origin("", "export_settings")


def test_training_waits_for_a_check_of_all_settings_and_its_cache_does_not_go_by_them(
    documents: tuple[Document, Document], tasks: dict[str, Task]
) -> None:
    group = documents[0]["root"]["dag"]["tasks"]
    for name in ("train", "train-beside"):
        assert "check" in group[name]["dependentTasks"]
    given = {key: origin.name for key, origin in tasks["check"].parameters.items()}
    del given["pipelinechannel--image"]
    sections = ("train", "beside", "evaluate", "export", "verify")
    assert given == {f"{name}_settings": f"{name}_settings" for name in sections}
    sweep = yaml.safe_load_all(SWEEP.read_text(encoding="utf-8"))
    graphs = [
        component["dag"] for component in next(sweep)["components"].values() if "dag" in component
    ]
    (loop,) = [graph["tasks"] for graph in graphs if "train" in graph["tasks"]]
    assert "check" in loop["train"]["dependentTasks"], "each candidate is checked"


def test_what_the_data_are_is_part_of_the_cache_key(
    root: Path, documents: tuple[Document, Document], tasks: dict[str, Task]
) -> None:
    origins = {o.name for o in tasks["prepare"].parameters.values()}
    assert {"data_md5", "data_revision", "data_path", "git_commit", "image"} <= origins
    pinned = yaml.safe_load((root / "data.dvc").read_text())["outs"][0]
    inputs = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert inputs["data_md5"]["defaultValue"] == pinned["md5"]
    assert inputs["data_path"]["defaultValue"] == pinned["path"]


def test_export_and_what_follows_wait_for_a_gate_that_fails_when_it_refuses(
    documents: tuple[Document, Document],
) -> None:
    group = documents[0]["root"]["dag"]["tasks"]
    assert "gate" in group["export"]["dependentTasks"]
    assert "export" in group["verify"]["dependentTasks"]
    assert not {"gate", "export", "verify"} & set(conditional(documents[0])), "none is skipped"
    (publish,) = conditional(documents[0])
    assert "verify" in group[publish]["dependentTasks"]


def conditional(pipeline: Document) -> dict[str, Document]:
    """The tasks that may be skipped, by name."""
    graphs = [c["dag"] for c in (pipeline["root"], *pipeline["components"].values()) if "dag" in c]
    return {
        name: task
        for graph in graphs
        for name, task in graph["tasks"].items()
        if "condition" in task.get("triggerPolicy", {})
    }


def test_points_are_measured_in_the_task_that_evaluates(
    documents: tuple[Document, Document], tasks: dict[str, Task]
) -> None:
    assert tasks["evaluate"].parameters["points"] == Origin("", "points")
    points = documents[0]["root"]["inputDefinitions"]["parameters"]["points"]["defaultValue"]
    assert [str(read_point(point)) for point in points] == points
