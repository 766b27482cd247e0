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
from pipeline import COMPILED
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


def test_the_committed_document_is_what_the_source_compiles_to(root: Path) -> None:
    script = "from pipeline.document import render; import sys; sys.stdout.write(render())"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=root,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout == COMPILED.read_bytes(), "run `python -m pipeline compile`"


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
    wanted = {"node_selector", "tolerations", "work_volume", "work_secret"}
    assert tasks["train"].platform == wanted
    assert tasks["prepare"].platform == {"data_secret", "git_secret"}
    assert tasks["publish"].platform == {"data_secret"}
    assert pods["exec-train"]["emptyDirMounts"][0]["mountPath"] == "/dev/shm"
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
    del pods["exec-train"]["pvcMount"]
    assert before[1] == after[1], "and nothing else is gone"
    assert without.sha256 != package.sha256, "so it is a version of its own"


def test_training_is_retried_with_back_off_and_finds_its_work_again(
    documents: tuple[Document, Document], tasks: dict[str, Task]
) -> None:
    pipeline, platform = documents
    group = pipeline["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    policy = group["train"]["retryPolicy"]
    assert policy["maxRetryCount"] >= 3
    assert policy["backoffFactor"] > 1
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    (mount,) = pods["exec-train"]["pvcMount"]
    assert tasks["train"].parameters["work"] == Origin("", "work")
    assert pipeline["root"]["inputDefinitions"]["parameters"]["work"]["defaultValue"].startswith(
        mount["mountPath"]
    )


def test_the_graph_has_dvcs_stages_and_edges(root: Path, tasks: dict[str, Task]) -> None:
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    control = {"measure", "tabulate", "publish", "gate", "summarise"}
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
    for name, stage in yaml.safe_load((root / "dvc.yaml").read_text())["stages"].items():
        assert stage["params"] == [name]
        section = getattr(settings, name)
        given = inputs[f"{name}_settings"]["defaultValue"]
        assert type(section).model_validate_json(given) == section
        used = {o.name for o in tasks[name].parameters.values() if o.name.endswith("_settings")}
        assert used == {f"{name}_settings"}, "or a change would run more than it must"
    assert tasks["gate"].parameters["settings"] == Origin("", "export_settings")


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
    group = documents[0]["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert "gate" in group["export"]["dependentTasks"]
    assert "export" in group["verify"]["dependentTasks"]
    assert not {"gate", "export", "verify"} & set(conditional(documents[0])), "none is skipped"
    (publish,) = conditional(documents[0])
    assert "verify" in group[publish]["dependentTasks"]


# What a real backend does with a pipeline, where kfp's local runner does something else


def groups(pipeline: Document) -> list[Document]:
    """All graphs of a pipeline: the root's, and those of its groups of tasks."""
    return [c["dag"] for c in (pipeline["root"], *pipeline["components"].values()) if "dag" in c]


def conditional(pipeline: Document) -> dict[str, Document]:
    """The tasks that may be skipped, by name."""
    return {
        name: task
        for group in groups(pipeline)
        for name, task in group["tasks"].items()
        if "condition" in task.get("triggerPolicy", {})
    }


def test_no_output_is_one_of_several_branches(documents: tuple[Document, Document]) -> None:
    """Backends take a branch only if its group is complete, which groups with skips never are."""
    for group in groups(documents[0]):
        for output in group.get("outputs", {}).get("parameters", {}).values():
            assert "valueFromOneof" not in output
        for output in group.get("outputs", {}).get("artifacts", {}).values():
            assert len(output["artifactSelectors"]) == 1


def test_nothing_depends_on_what_may_be_skipped(documents: tuple[Document, Document]) -> None:
    """Nor on a group that holds such a task, but for the exit handler, which always runs."""
    pipeline = documents[0]
    skippable = conditional(pipeline)
    assert skippable
    held = set(skippable)
    for group in groups(pipeline):
        for name, task in group["tasks"].items():
            inner = pipeline["components"][task["componentRef"]["name"]].get("dag", {})
            if skippable.keys() & inner.get("tasks", {}).keys():
                held.add(name)
    for group in groups(pipeline):
        for name, task in group["tasks"].items():
            always = task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED"
            assert always or not held & set(task.get("dependentTasks", ())), name
    for task in skippable.values():
        for value in task["inputs"]["parameters"].values():
            assert "componentInputParameter" in value, "a run's parameter, known from the start"


def test_loops_have_the_names_that_old_backends_look_for(
    documents: tuple[Document, Document],
) -> None:
    loops = {
        name: task
        for group in groups(documents[0])
        for name, task in group["tasks"].items()
        if "parameterIterator" in task
    }
    assert loops
    assert {name: task["taskInfo"]["name"] for name, task in loops.items()} == {n: n for n in loops}


def test_no_task_is_given_the_runs_state(documents: tuple[Document, Document]) -> None:
    """A backend's is wrong after most runs: RUNNING after a success, FAILED after a retry."""
    for name, component in documents[0]["components"].items():
        kinds = component.get("inputDefinitions", {}).get("parameters", {}).values()
        assert "TASK_FINAL_STATUS" not in [kind["parameterType"] for kind in kinds], name


def test_retries_are_not_over_before_the_work_can_be(
    documents: tuple[Document, Document],
) -> None:
    """Argo counts the longest back-off from the start of the first attempt."""
    pipeline, platform = documents
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    retried = [
        (name, task["retryPolicy"])
        for group in groups(pipeline)
        for name, task in group["tasks"].items()
        if "retryPolicy" in task
    ]
    assert [name for name, _ in retried].count("train") == 1
    for name, policy in retried:
        attempts = policy["maxRetryCount"] + 1
        limit = int(pods[f"exec-{name}"]["activeDeadlineSeconds"])
        assert int(policy["backoffMaxDuration"].rstrip("s")) > attempts * limit, name


def test_points_are_measured_each_by_a_task_of_its_own(
    documents: tuple[Document, Document], tasks: dict[str, Task]
) -> None:
    assert tasks["measure"].parameters["point"].name == "item"
    assert tasks["tabulate"].parameters["rows"].task.startswith("for-loop")
    points = documents[0]["root"]["inputDefinitions"]["parameters"]["points"]["defaultValue"]
    assert points, "kfp cannot collect from nothing"
    assert all(isinstance(point, str) for point in points), "numbers would become floats"
