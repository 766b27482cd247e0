"""What Kubeflow's backends are known to need, held on the compiled pipelines.

kfp's local runner is no judge of these rules: pipelines that break them run here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import (
    any_pb2,
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    json_format,
    message_factory,
    struct_pb2,
)
from google.rpc import status_pb2

from pipeline import COMPILED, SWEEP
from pipeline.document import read_backend, read_pull_policy, render
from pipeline.graph import reptile, reptile_sweep
from pipeline.package import FIRST_BACKEND, SECURITY_BACKEND, load_package
from reptile.errors import InputError

Document = dict[str, Any]
GRAPHS = {COMPILED: reptile, SWEEP: reptile_sweep}


@pytest.fixture(params=[COMPILED, SWEEP], ids=["reptile", "sweep"])
def compiled(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def pipeline(compiled: Path) -> Document:
    document: Document = next(yaml.safe_load_all(compiled.read_text(encoding="utf-8")))
    return document


@pytest.fixture
def pods(compiled: Path) -> dict[str, Document]:
    """Kubernetes' configuration of each task's pod, by the executor's name."""
    _, platform = yaml.safe_load_all(compiled.read_text(encoding="utf-8"))
    found: dict[str, Document] = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return found


def groups(pipeline: Document) -> list[Document]:
    """All graphs of a pipeline: the root's, and those of its groups of tasks."""
    return [c["dag"] for c in (pipeline["root"], *pipeline["components"].values()) if "dag" in c]


def tasks(pipeline: Document) -> Iterator[tuple[str, Document]]:
    for group in groups(pipeline):
        yield from group["tasks"].items()


def conditional(pipeline: Document) -> dict[str, Document]:
    """The tasks that may be skipped, by name."""
    return {n: t for n, t in tasks(pipeline) if "condition" in t.get("triggerPolicy", {})}


def component(pipeline: Document, task: Document) -> Document:
    found: Document = pipeline["components"][task["componentRef"]["name"]]
    return found


def test_no_output_is_one_of_several_branches(pipeline: Document) -> None:
    """Backends take a branch only if its group is complete, which groups with skips never are."""
    for group in groups(pipeline):
        for output in group.get("outputs", {}).get("parameters", {}).values():
            assert "valueFromOneof" not in output
        for output in group.get("outputs", {}).get("artifacts", {}).values():
            assert len(output["artifactSelectors"]) == 1


def test_nothing_depends_on_what_may_be_skipped(pipeline: Document) -> None:
    """Nor on a group that holds such a task."""
    skippable = conditional(pipeline)
    held = set(skippable)
    for name, task in tasks(pipeline):
        inner = component(pipeline, task).get("dag", {}).get("tasks", {})
        if skippable.keys() & inner.keys():
            held.add(name)
    for name, task in tasks(pipeline):
        assert not held & set(task.get("dependentTasks", ())), name
    for task in skippable.values():
        for value in task["inputs"]["parameters"].values():
            assert "componentInputParameter" in value, "a run's parameter, known from the start"


def test_loops_have_the_names_that_old_backends_look_for(
    compiled: Path, pipeline: Document
) -> None:
    loops = {n: t["taskInfo"]["name"] for n, t in tasks(pipeline) if "parameterIterator" in t}
    assert loops == {name: name for name in loops}
    assert len(loops) == (compiled == SWEEP)


def test_no_task_is_given_the_runs_state(pipeline: Document) -> None:
    """A backend's is wrong after most runs: RUNNING after a success, FAILED after a retry."""
    for name, task in tasks(pipeline):
        assert task.get("triggerPolicy", {}).get("strategy") != "ALL_UPSTREAM_TASKS_COMPLETED", name
        kinds = component(pipeline, task).get("inputDefinitions", {}).get("parameters", {})
        assert "TASK_FINAL_STATUS" not in [kind["parameterType"] for kind in kinds.values()], name


def test_retries_are_not_over_before_the_work_can_be(
    pipeline: Document, pods: dict[str, Document]
) -> None:
    """Argo counts the longest back-off from the start of the first attempt."""
    retried = [
        (name, task["retryPolicy"]) for name, task in tasks(pipeline) if "retryPolicy" in task
    ]
    assert sorted(name for name, _ in retried) == ["prepare", "publish", "train", "train-beside"]
    for name, policy in retried:
        attempts = policy["maxRetryCount"] + 1
        limit = int(pods[f"exec-{name}"]["activeDeadlineSeconds"])
        assert int(policy["backoffMaxDuration"].rstrip("s")) > attempts * limit, name


def test_every_pod_passes_the_restricted_security_standard(
    pipeline: Document, pods: dict[str, Document]
) -> None:
    """Kubeflow sets the rest: no capabilities, no escalation, the runtime's seccomp profile."""
    assert set(pods) == set(pipeline["deploymentSpec"]["executors"])
    for name, pod in pods.items():
        assert pod["securityContext"] == {"runAsNonRoot": True}, name


def test_every_pod_can_write_to_tmp_on_a_read_only_root(pods: dict[str, Document]) -> None:
    for name, pod in pods.items():
        assert "/tmp" in [mount["mountPath"] for mount in pod["emptyDirMounts"]], name


def test_every_pod_pulls_its_image_with_the_run_s_secret(pods: dict[str, Document]) -> None:
    """By a name that is never empty: Argo cannot merge a reference without one."""
    for name, pod in pods.items():
        (secret,) = pod["imagePullSecret"]
        source = secret["secretNameParameter"]["componentInputParameter"]
        assert source in ("pull_secret", "pipelinechannel--pull_secret"), name
        assert "imagePullPolicy" not in pod, "Kubernetes' default"


def test_no_pod_needs_the_internet_to_start(pipeline: Document) -> None:
    for executor in pipeline["deploymentSpec"]["executors"].values():
        assert "pip" not in " ".join(executor["container"]["command"]).split()


def test_every_parameter_of_a_run_is_described(pipeline: Document) -> None:
    parameters = pipeline["root"]["inputDefinitions"]["parameters"]
    assert [name for name, each in parameters.items() if not each.get("description")] == []
    assert all("see above" not in each["description"] for each in parameters.values())
    assert pipeline["pipelineInfo"]["description"]


def test_the_sweep_differs_from_the_pipeline_in_training_alone() -> None:
    ours, swept = (
        next(yaml.safe_load_all(path.read_text(encoding="utf-8"))) for path in (COMPILED, SWEEP)
    )
    for each in (ours, swept):
        each["root"]["inputDefinitions"]["parameters"].pop("train_settings")
    assert ours["root"]["inputDefinitions"] == swept["root"]["inputDefinitions"]
    named = [{t for t in dict(tasks(each)) if "condition" not in t} for each in (ours, swept)]
    assert named[1] - named[0] == {"for-loop-1", "choose"}


def drivers_and_executors(pipeline: Document, items: int = 0) -> tuple[int, int]:
    """Count the pods of a run in which nothing is cached and every condition is false.

    Kubeflow starts a driver for the root, for each task, for each group and for each item of a
    loop, and for each task that is no group a pod of its own.
    """

    def count(graph: Document) -> tuple[int, int]:
        drivers, executors = 0, 0
        for task in graph["tasks"].values():
            drivers += 1
            inner = component(pipeline, task).get("dag")
            if inner is None:
                executors += 1
            elif "condition" not in task.get("triggerPolicy", {}):
                times = items if "parameterIterator" in task else 1
                more = count(inner)
                drivers += times * (more[0] + ("parameterIterator" in task))
                executors += times * more[1]
        return drivers, executors

    drivers, executors = count(pipeline["root"]["dag"])
    return drivers + 1, executors


def test_a_run_starts_no_more_pods_than_documented(root: Path) -> None:
    document = next(yaml.safe_load_all(COMPILED.read_text(encoding="utf-8")))
    assert drivers_and_executors(document) == (10, 8)
    text = (root / "docs/kubeflow-cluster.md").read_text(encoding="utf-8")
    assert "10 driver pods and 8 pods of the tasks" in text
    swept = next(yaml.safe_load_all(SWEEP.read_text(encoding="utf-8")))
    assert drivers_and_executors(swept, items=4) == (10 + 3 * 4, 7 + 2 * 4)


# The documents against the types of each release


def types_of(release: str) -> Callable[[str], Any]:
    """Return what gives a message class of a release by its full name."""
    path = Path(__file__).parent / f"backends/{release}.binpb"
    files = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for module in (any_pb2, duration_pb2, struct_pb2, status_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    return lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def parse(text: str, release: str) -> None:
    """Parse a compiled pipeline as a backend does: a field that it does not know is an error."""
    types = types_of(release)
    pipeline, platform = yaml.safe_load_all(text)
    json_format.ParseDict(pipeline, types("ml_pipelines.PipelineSpec")())
    json_format.ParseDict(platform, types("ml_pipelines.PlatformSpec")())
    for pod in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(pod, types("kfp_kubernetes.KubernetesExecutorConfig")())


@pytest.mark.parametrize("release", ["2.16", "2.17"])
def test_releases_from_2_16_on_take_the_committed_documents(compiled: Path, release: str) -> None:
    assert read_backend(release) >= SECURITY_BACKEND
    parse(compiled.read_text(encoding="utf-8"), release)


def test_2_15_takes_a_document_compiled_for_it_and_not_the_committed_one(
    compiled: Path, tmp_path: Path
) -> None:
    with pytest.raises(json_format.ParseError, match="securityContext"):
        parse(compiled.read_text(encoding="utf-8"), "2.15")
    text = render(GRAPHS[compiled], read_backend("2.15"))
    parse(text, "2.15")
    parse(text, "2.17")
    (tmp_path / "older.yaml").write_text(text, encoding="utf-8")
    assert load_package(tmp_path / "older.yaml").backend == FIRST_BACKEND
    assert load_package(compiled).backend == SECURITY_BACKEND
    for ours, theirs in zip(
        yaml.safe_load_all(compiled.read_text(encoding="utf-8")),
        yaml.safe_load_all(text),
        strict=True,
    ):
        executors = ours.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {})
        for pod in executors.get("executors", {}).values():
            del pod["securityContext"]
        assert ours == theirs, "nothing else differs"


def test_releases_before_2_15_were_not_tried_and_are_refused(compiled: Path) -> None:
    assert FIRST_BACKEND == (2, 15)
    with pytest.raises(json_format.ParseError, match="securityContext"):
        parse(compiled.read_text(encoding="utf-8"), "2.14")
    with pytest.raises(InputError, match=r"2\.15 or later"):
        read_backend("2.14.6")
    with pytest.raises(InputError, match=r"such as 2\.16"):
        read_backend("newest")


def test_a_pull_policy_is_compiled_into_every_pod() -> None:
    _, platform = yaml.safe_load_all(render(pull_policy="Never"))
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    assert {pod["imagePullPolicy"] for pod in pods} == {"Never"}
    parse(render(pull_policy="Never"), "2.17")
    assert read_pull_policy("Never") == "Never"
    with pytest.raises(InputError, match="Always, IfNotPresent, Never"):
        read_pull_policy("never")
