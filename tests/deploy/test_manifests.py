"""deploy/ holds together: files, names, references, and what the code and the API say of them."""

import ipaddress
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from kubernetes import client

from components.artifacts import COMMIT_VARIABLE
from components.image import IMAGE
from components.secrets import OPTIONS
from pipeline.__main__ import app
from pipeline.cron import parse_cron
from pipeline.graph import WORK
from pipeline.package import load_package, run_parameters
from reptile.bundle_format import GRAPHS
from reptile.cli import app as reptile_app
from reptile.serve.settings import changed

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
FOLDERS = sorted(path.parent for path in DEPLOY.rglob("kustomization.yaml"))
CORE = {"v1", "batch/v1", "networking.k8s.io/v1", "rbac.authorization.k8s.io/v1"}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def kustomization(folder: Path) -> dict[str, Any]:
    (document,) = documents(folder / "kustomization.yaml")
    return document


def manifests() -> list[dict[str, Any]]:
    return [
        document
        for folder in FOLDERS
        for name in kustomization(folder).get("resources", [])
        if (folder / name).is_file()
        for document in documents(folder / name)
    ]


def manifest(kind: str, name: str) -> dict[str, Any]:
    (found,) = (m for m in manifests() if (m["kind"], m["metadata"]["name"]) == (kind, name))
    return found


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for each in manifests():
        if each["kind"] == "Job":
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]
        elif each["kind"] == "CronJob":
            template = each["spec"]["jobTemplate"]["spec"]["template"]
            yield each["metadata"]["name"], template["spec"]
        elif each["kind"] == "InferenceService" and "containers" in each["spec"]["predictor"]:
            yield each["metadata"]["name"], each["spec"]["predictor"]


def cron_container() -> dict[str, Any]:
    (container,) = dict(pods())["reptile-schedule"]["containers"]
    return container


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_kustomization_names_every_file_beside_it_and_no_other(folder: Path) -> None:
    parts = kustomization(folder)
    generated = [file for each in parts.get("configMapGenerator", []) for file in each["files"]]
    patches = [each["path"] for each in parts.get("patches", []) if "path" in each]
    named = [*parts.get("resources", []), *parts.get("components", []), *generated, *patches]
    assert all((folder / name).exists() for name in named)
    files = {path.name for path in folder.iterdir()} - {"kustomization.yaml"}
    assert files == {name for name in named if (folder / name).is_file()}


def test_nothing_holds_the_value_of_a_secret() -> None:
    assert not [m for m in manifests() if m["kind"] == "Secret"]
    assert not [f for f in FOLDERS if "secretGenerator" in kustomization(f)]


@pytest.mark.parametrize(
    "document",
    [document for document in manifests() if document["apiVersion"] in CORE],
    ids=lambda m: f"{m['kind']}-{m['metadata']['name']}",
)
def test_fields_are_those_of_the_kubernetes_api(document: dict[str, Any]) -> None:
    prefix = "".join(part.capitalize() for part in document["apiVersion"].split("/")[1:]) or "V1"
    assert unknown_fields(document, prefix + document["kind"]) == []


def unknown_fields(value: Any, kind: str, path: str = "") -> list[str]:
    """Compare a manifest with the types that the API's own description gave the Python client."""
    of_list, of_mapping = re.match(r"list\[(.+)\]", kind), re.match(r"dict\(\w+, (.+)\)", kind)
    if of_list:
        assert isinstance(value, list), path
        return [
            bad
            for n, v in enumerate(value)
            for bad in unknown_fields(v, of_list[1], f"{path}[{n}]")
        ]
    if of_mapping:
        assert isinstance(value, dict), path
        return [
            bad for k, v in value.items() for bad in unknown_fields(v, of_mapping[1], f"{path}.{k}")
        ]
    simple = {"str": str, "int": int, "bool": bool, "object": object}
    if kind in simple:
        return [] if isinstance(value, simple[kind]) else [f"{path}: no {kind}"]
    model = getattr(client, kind)
    fields = {wire: name for name, wire in model.attribute_map.items()}
    bad = [f"{path}.{key}" for key in value if key not in fields]
    for key in value.keys() & fields.keys():
        bad += unknown_fields(value[key], model.openapi_types[fields[key]], f"{path}.{key}")
    return bad


def test_a_field_that_is_none_of_the_api_s_is_noticed() -> None:
    volume = manifest("PersistentVolumeClaim", "reptile-work")
    volume = json.loads(json.dumps(volume).replace("accessModes", "accessMode"))
    assert unknown_fields(volume, "V1PersistentVolumeClaim") == [".spec.accessMode"]


@pytest.mark.parametrize("name", [name for name, _ in pods()])
def test_pods_pass_the_restricted_security_standard(name: str) -> None:
    pod = dict(pods())[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    allowed = {s["name"] for s in manifest("RoleBinding", "reptile-schedule")["subjects"]}
    assert pod["automountServiceAccountToken"] is (pod.get("serviceAccountName") in allowed)
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_images_are_the_one_that_is_built_and_that_components_name() -> None:
    name, _, tag = IMAGE.partition(":")
    used = {name: {c["image"] for c in pod["containers"]} for name, pod in pods()}
    assert used.pop("reptile-server") == {"reptile-serve"}
    assert set().union(*used.values()) == {name}
    script = (DEPLOY / "build-image").read_text(encoding="utf-8")
    stages = re.findall(r" AS (\w+)$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
    assert {name.removeprefix("reptile-"), "serve"} < set(stages)
    assert "IMAGES:-train serve" in script and "name=reptile-$image$suffix" in script
    assert f"tag=${{TAG:-{tag}}}" in script
    (example,) = kustomization(DEPLOY / "example")["images"]
    assert example["name"] == name


def test_volume_and_secret_are_those_that_the_pipeline_asks_for() -> None:
    defaults: dict[str, Any] = {
        name: definition.get("defaultValue")
        for name, definition in load_package(ROOT / "pipeline/reptile.yaml").parameters.items()
    }
    manifest("PersistentVolumeClaim", defaults["work_volume"])
    secret = manifest("ExternalSecret", defaults["data_secret"])
    assert secret["spec"]["target"]["name"] == defaults["data_secret"]
    assert {each["secretKey"] for each in secret["spec"]["data"]} <= set(OPTIONS["s3"])
    (mount,) = dict(pods())["reptile-work-access"]["containers"][0]["volumeMounts"]
    assert mount["mountPath"] == WORK


def test_pods_pull_with_the_secret_that_the_pipeline_s_pods_do() -> None:
    pipeline = load_package(ROOT / "pipeline/reptile.yaml").parameters
    name = pipeline["pull_secret"]["defaultValue"]
    for pod in ("reptile-work-access", "reptile-schedule"):
        assert dict(pods())[pod]["imagePullSecrets"] == [{"name": name}]


def test_argo_s_defaults_retry_lost_pods_and_failed_processes() -> None:
    (patch,) = documents(DEPLOY / "argo/workflow-defaults.yaml")
    assert unknown_fields(patch, "V1ConfigMap") == []
    assert patch["metadata"]["name"] == "workflow-controller-configmap"
    assert list(patch["data"]) == ["workflowDefaults"], "every other key stays as it is"
    retries = yaml.safe_load(patch["data"]["workflowDefaults"])["spec"]["templateDefaults"]
    assert retries == {"retryStrategy": {"limit": "2", "retryPolicy": "Always"}}


def test_the_policies_of_the_pipeline_s_pods_select_the_same_pods() -> None:
    policies = [m["spec"] for m in manifests() if m["kind"] == "NetworkPolicy"]
    selected = [p["podSelector"]["matchLabels"] for p in policies]
    label = {"pipelines.kubeflow.org/v2_component": "true"}
    assert selected.count(label) == 2
    inside = manifest("NetworkPolicy", "reptile-pipeline-pods-stay-inside")["spec"]
    (_, reached) = inside["egress"]
    networks = [ipaddress.ip_network(to["ipBlock"]["cidr"]) for to in reached["to"][1:]]
    assert all(network.is_private for network in networks)
    assert {network.version for network in networks} == {4, 6}


def test_the_image_knows_its_commit_by_the_name_that_the_pipeline_reads() -> None:
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    train = text[text.index(" AS train\n") : text.index(" AS serve\n")]
    assert train.index("ARG REVISION") < train.index(f"ENV {COMMIT_VARIABLE}=${{REVISION}}")
    assert "REVISION=$revision" in (DEPLOY / "build-image").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["schedule", "example"])
def test_nightly_parameters_are_those_of_the_compiled_pipeline(folder: str) -> None:
    given = yaml.safe_load((DEPLOY / folder / "nightly.yaml").read_text(encoding="utf-8"))
    run_parameters(load_package(ROOT / "pipeline/reptile.yaml"), given)  # or an InputError


def test_the_cron_job_s_command_is_one_that_the_program_takes() -> None:
    container = cron_container()
    assert container["command"] == ["python", "-m", "pipeline", "schedule"]
    command = typer.main.get_group(app).commands["schedule"]
    options = command.make_context("schedule", list(container["args"])).params
    assert parse_cron(options["cron"]).words
    assert "image=$(IMAGE)" in options["param"]
    mounted = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    (generated,) = kustomization(DEPLOY / "schedule")["configMapGenerator"]
    assert str(options["inputs"]) == f"{mounted['inputs']}/{generated['files'][0]}"
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert {"IMAGE", "NAMESPACE"} <= set(variables)
    assert variables["KF_PIPELINES_SA_TOKEN_PATH"] == f"{mounted['token']}/token"


def test_names_that_manifests_refer_to_exist() -> None:
    (generated,) = kustomization(DEPLOY / "schedule")["configMapGenerator"]
    for name, pod in pods():
        if "serviceAccountName" in pod:
            manifest("ServiceAccount", pod["serviceAccountName"])
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                manifest("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
            if "configMap" in volume:
                assert volume["configMap"]["name"] == generated["name"], name
    binding = manifest("RoleBinding", "reptile-schedule")
    manifest("Role", binding["roleRef"]["name"])
    assert [manifest(s["kind"], s["name"]) for s in binding["subjects"]]
    policy = manifest("NetworkPolicy", "reptile-schedule")["spec"]["podSelector"]["matchLabels"]
    job = manifest("CronJob", "reptile-schedule")["spec"]["jobTemplate"]["spec"]
    assert policy.items() <= job["template"]["metadata"]["labels"].items()


def test_kserve_loads_graphs_of_the_bundle_by_name_and_none_that_sees_its_batch() -> None:
    predictor = manifest("InferenceService", "reptile")["spec"]["predictor"]
    manifest("ServiceAccount", predictor["serviceAccountName"])
    arguments = predictor["model"]["args"]
    assert "--model-control-mode=explicit" in arguments
    loaded = {a.removeprefix("--load-model=") for a in arguments if a.startswith("--load-model=")}
    assert loaded == set(GRAPHS["gradient"]) - {"predict"}
    assert predictor["model"]["protocolVersion"] == "v2"


def test_the_server_s_command_and_probes_are_ones_that_it_has() -> None:
    pod = dict(pods())["reptile-server"]
    (container,) = pod["containers"]
    program, *arguments = container["args"]
    assert program == "reptile"
    command, *options = arguments
    taken = typer.main.get_group(reptile_app).commands[command]
    values = taken.make_context(command, options).params
    assert values["host"] == "0.0.0.0"
    assert str(values["tasks"]) == container["volumeMounts"][0]["mountPath"]
    (port,) = container["ports"]
    assert port["containerPort"] == values["port"]
    for probe, path in {"readinessProbe": "ready", "livenessProbe": "live"}.items():
        wanted = {"path": f"/v2/health/{path}", "port": values["port"]}
        assert container[probe]["httpGet"] == wanted
    assert unknown_fields(pod, "V1PodSpec") == [
        ".minReplicas",
        ".maxReplicas",
        ".deploymentStrategy",
        ".timeout",  # KServe's own
    ]


def test_a_rollout_lets_the_old_server_finish_before_the_new_one_uses_its_tasks() -> None:
    predictor = manifest("InferenceService", "reptile-server")["spec"]["predictor"]
    command, *options = predictor["containers"][0]["args"][1:]
    taken = typer.main.get_group(reptile_app).commands[command]
    values = taken.make_context(command, options).params
    settings = changed(values["tasks"], values["changes"] or [])
    assert predictor["deploymentStrategy"] == {"type": "Recreate"}
    assert predictor["minReplicas"] == predictor["maxReplicas"] == 1
    # The server itself waits for `request_seconds` at most; then it needs a few seconds to end.
    assert predictor["terminationGracePeriodSeconds"] >= settings.request_seconds + 10
    assert predictor["timeout"] > settings.request_seconds  # the server's own 503, not a cut
    for probe in ("readinessProbe", "livenessProbe"):
        # A kubelet asks the pod itself, without a proxy, for any name but the pod's own address.
        assert "host" not in predictor["containers"][0][probe]["httpGet"]


@pytest.mark.slow
def test_kustomize_builds_every_folder_and_the_example_is_of_one_image() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    for folder in FOLDERS:
        if kustomization(folder)["kind"] != "Component":
            built = subprocess.run(
                [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True
            ).stdout
            assert yaml.safe_load(built.split("\n---\n")[0])["kind"]
    built = subprocess.run(
        [kubectl, "kustomize", str(DEPLOY / "example")], capture_output=True, text=True, check=True
    ).stdout
    together = list(yaml.safe_load_all(built))
    assert {m["metadata"]["namespace"] for m in together} == {"team-fewshot"}
    (job,) = (m for m in together if m["kind"] == "CronJob")
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("registry.example.org/team/reptile-train@sha256:")
    assert {e["name"]: e.get("value") for e in container["env"]}["IMAGE"] == container["image"]
    (inputs,) = (m for m in together if m["kind"] == "ConfigMap")
    assert "accelerators" in inputs["data"]["nightly.yaml"]
