"""Training on several nodes: a TrainJob of Kubeflow Trainer, each of whose pods is like this one.

The job has the image, resources, volume and place of the pod that starts it, so that the pipeline's
parameters count for both. This pod waits for it, and shows the log of its first pod.
"""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from components.supervise import RESTARTS
from reptile.errors import ClusterError

RUNTIME = "torch-distributed"
"""The runtime that Kubeflow Trainer installs for torchrun."""
OLDEST = "2.2"
"""The first release of Kubeflow Trainer whose TrainJob has the SDK's `runtimePatches`."""
NODE = "node"  # Trainer's name for the pods' container and for their job
COMPLETE, FAILED = "Complete", "Failed"
TEMPORARY = ("/dev/shm", "/tmp")  # of this pod's mounts, those that the nodes get besides volumes
PATIENCE = 60  # looks in a row at the job that may fail


def train_on_nodes(nodes: int, name: str, command: Sequence[str], interval: float = 5.0) -> None:
    """Run a command under torchrun on several nodes; start it again if it fails, a few times.

    A job of that name that is there already, as after this pod was lost, is waited for.

    Args:
        nodes: how many pods.
        name: of the TrainJob.
        command: of each pod, whose processes torchrun has told of each other.
        interval: seconds between looks at the job.

    Raises:
        ClusterError: there is no Trainer, the account may not use it, or the job failed for good.
    """
    from kubeflow.trainer import TrainerClient
    from kubernetes.client import ApiException
    from kubernetes.config import ConfigException

    # It warns of a config map of Trainer's that the account need not be able to read.
    logging.getLogger("kubeflow.trainer").setLevel(logging.ERROR)
    try:
        client: Any = TrainerClient()
        pod = _this_pod(client.backend.core_api, client.backend.namespace)
        for restart in range(1, RESTARTS + 2):
            if _status(client, name) == FAILED:
                _delete(client, name, interval)
            if _status(client, name) is None:
                client.train(client.get_runtime(RUNTIME), None, *_like(pod, nodes, name, command))
                _check_release(client, name)
            if _follow(client, name, interval) == COMPLETE:
                client.delete_job(name)
                return
            if restart <= RESTARTS:
                print(
                    f"TrainJob {name} failed; starting again from the latest checkpoint "
                    f"(restart {restart} of {RESTARTS})",
                    flush=True,
                )
    except (RuntimeError, TimeoutError, ApiException, ConfigException) as error:
        reason = getattr(error.__cause__ or error, "reason", "") or error
        raise ClusterError(
            f"TrainJob {name}: {str(error).partition(chr(10))[0]} ({reason}); nodes = {nodes} "
            f"needs Kubeflow Trainer with its runtime {RUNTIME}, and the rights in deploy/trainer"
        ) from error
    raise ClusterError(f"TrainJob {name} failed {RESTARTS + 1} times; its pods' logs say why")


def _check_release(client: Any, name: str) -> None:
    """Remove the job again if the cluster has dropped the part that makes its pods like this one.

    A release of Trainer whose TrainJob has no such field does that without a word.
    """
    from kubeflow.trainer.constants import constants

    place = (constants.GROUP, constants.VERSION, client.backend.namespace)
    read = client.backend.custom_api.get_namespaced_custom_object
    if not read(*place, constants.TRAINJOB_PLURAL, name)["spec"].get("runtimePatches"):
        client.delete_job(name)
        raise ClusterError(
            f"TrainJob {name}: this release of Kubeflow Trainer gives a job's pods no volumes; "
            f"nodes needs Trainer {OLDEST} or later"
        )


def _this_pod(api: Any, namespace: str) -> dict[str, Any]:
    answer = api.read_namespaced_pod(os.environ["HOSTNAME"], namespace, _preload_content=False)
    pod: dict[str, Any] = json.loads(answer.data)["spec"]
    return pod


def _like(
    pod: Mapping[str, Any], nodes: int, name: str, command: Sequence[str]
) -> tuple[Any, list[Any]]:
    """Return the SDK's trainer and options for pods like this one."""
    from kubeflow.trainer import CustomTrainerContainer, options

    container = next(each for each in pod["containers"] if each["name"] == "main")
    claims = {each["name"] for each in pod["volumes"] if "persistentVolumeClaim" in each}
    mounts = [
        mount
        for mount in container.get("volumeMounts", ())
        if mount["name"] in claims or mount["mountPath"] in TEMPORARY
    ]
    names = {mount["name"] for mount in mounts}
    spec = options.PodSpecPatch(
        volumes=[volume for volume in pod["volumes"] if volume["name"] in names],
        containers=[
            options.ContainerPatch(
                name=NODE, volume_mounts=mounts, security_context=container.get("securityContext")
            )
        ],
        security_context=pod.get("securityContext"),
        node_selector=pod.get("nodeSelector"),
        tolerations=pod.get("tolerations"),
        image_pull_secrets=pod.get("imagePullSecrets"),
    )
    job = options.JobTemplatePatch(
        spec=options.JobSpecPatch(template=options.PodTemplatePatch(spec=spec))
    )
    jobs = options.JobSetSpecPatch(
        replicated_jobs=[options.ReplicatedJobPatch(name=NODE, template=job)]
    )
    template = options.JobSetTemplatePatch(spec=jobs)
    trainer = CustomTrainerContainer(
        image=container["image"],
        num_nodes=nodes,
        resources_per_node=container.get("resources", {}).get("limits"),
    )
    return trainer, [
        options.Name(name),
        options.TrainerCommand(list(command)),
        options.RuntimePatch(options.TrainingRuntimeSpecPatch(template=template)),
    ]


def _status(client: Any, name: str) -> str | None:
    """Return the status of the job; None if there is none."""
    try:
        return str(client.get_job(name).status)
    except RuntimeError as error:
        if getattr(error.__cause__, "status", None) == 404:
            return None
        raise


def _follow(client: Any, name: str, interval: float) -> str:
    """Print the log of the job's first pod until the job has ended; return its status."""
    shown: set[str] = set()
    failures = 0
    while True:
        try:
            job = client.get_job(name)
            failures = 0
            for step in job.steps:
                started = step.status in ("Running", "Succeeded", "Failed")
                if step.name == f"{NODE}-0" and started and step.pod_name not in shown:
                    shown.add(step.pod_name)
                    for line in client.get_job_logs(name, follow=True):
                        print(line, flush=True)
            if job.status in (COMPLETE, FAILED):
                return str(job.status)
        except (RuntimeError, TimeoutError):
            failures += 1
            if failures > PATIENCE:
                raise
        time.sleep(interval)


def _delete(client: Any, name: str, interval: float) -> None:
    client.delete_job(name)
    while _status(client, name) is not None:
        time.sleep(interval)
