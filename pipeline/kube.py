"""What Kubernetes tells about a namespace: pods, nodes, volumes, secrets, rights. Only reads.

Beside Kubeflow's API, because that does not say why a pod cannot start, or what killed it. An
account that may not read here can still submit and schedule.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import kubernetes
import urllib3
import yaml
from kubernetes.client import ApiException

from pipeline.connection import ClusterError
from pipeline.workflow import task_name

NAMESPACE = "kubeflow"  # of the pods where Kubeflow has one user, and of Argo's controller
_TIMEOUT = (5, 10)  # seconds to connect, and between two parts of an answer
_PREFIX = "workflows.argoproj.io"


class Node(NamedTuple):
    """What a node offers: quantities by resource, labels, taints (as the API gives them)."""

    name: str
    allocatable: Mapping[str, str]
    labels: Mapping[str, str]
    taints: tuple[Any, ...]


class Kubernetes:
    """The API of the cluster that this process is in, or that the kubeconfig names."""

    def __init__(self, client: Any, namespace: str):
        self._core = kubernetes.client.CoreV1Api(client)
        self._rights = kubernetes.client.AuthorizationV1Api(client)
        self.namespace = namespace
        self.host = client.configuration.host
        self._pods_readable = True

    def obstacles(self, workflow: str) -> dict[str, str] | None:
        """Return what keeps pods of a workflow from starting, by the task's name.

        None if the account may not read pods, or Kubernetes cannot be reached.
        """
        if not self._pods_readable:
            return None
        try:
            waiting = [pod for pod in self._pods(workflow) if pod.status.phase == "Pending"]
            reasons = {_task(pod): _reason(pod) or self._warning(pod) for pod in waiting}
        except ClusterError:
            self._pods_readable = False
            return None
        return {name: reason for name, reason in reasons.items() if reason}

    def endings(self, workflow: str) -> dict[str, str]:
        """Return what ended pods of a workflow from outside, by the id of the workflow's node.

        A process that ended by itself is left out: its log says why. Empty if the account may not
        read pods, or Kubernetes cannot be reached.
        """
        try:
            pods = self._pods(workflow)
        except ClusterError:
            return {}
        found = {
            (pod.metadata.annotations or {}).get(f"{_PREFIX}/node-id", ""): _ending(pod)
            for pod in pods
        }
        return {node: ending for node, ending in found.items() if ending}

    def _pods(self, workflow: str) -> list[Any]:
        pods = self._read(
            "pods",
            self._core.list_namespaced_pod,
            self.namespace,
            label_selector=f"{_PREFIX}/workflow={workflow}",
        )
        return list(pods.items)

    def _warning(self, pod: Any) -> str:
        """Return the latest warning about a pod, such as that a volume cannot be mounted."""
        events = self._read(
            "events",
            self._core.list_namespaced_event,
            self.namespace,
            field_selector=f"involvedObject.uid={pod.metadata.uid},type=Warning",
        )
        return _line(events.items[-1]) if events.items else ""

    def nodes(self) -> list[Node]:
        """Return the nodes that take pods."""
        return [
            Node(
                node.metadata.name,
                node.status.allocatable or {},
                node.metadata.labels or {},
                tuple(node.spec.taints or ()),
            )
            for node in self._read("nodes", self._core.list_node).items
            if not node.spec.unschedulable
        ]

    def claim(self, name: str) -> Any:
        """Return a persistent volume claim as the API gives it."""
        return self._read(
            f"volume claim {name}",
            self._core.read_namespaced_persistent_volume_claim,
            name,
            self.namespace,
        )

    def secret_keys(self, name: str) -> set[str]:
        """Return the keys of a secret; its values are not kept."""
        secret = self._read(
            f"secret {name}", self._core.read_namespaced_secret, name, self.namespace
        )
        return set(secret.data or ())

    def config_map(self, name: str, namespace: str) -> dict[str, str]:
        """Return the texts of a config map."""
        found = self._read(
            f"config map {name}", self._core.read_namespaced_config_map, name, namespace
        )
        return dict(found.data or {})

    def may(self, verb: str, resource: str, group: str) -> bool:
        """Return whether the account has a right in the namespace."""
        review = kubernetes.client.V1SelfSubjectAccessReview(
            spec=kubernetes.client.V1SelfSubjectAccessReviewSpec(
                resource_attributes=kubernetes.client.V1ResourceAttributes(
                    namespace=self.namespace, verb=verb, resource=resource, group=group
                )
            )
        )
        create = self._rights.create_self_subject_access_review
        return bool(self._read("rights", create, review).status.allowed)

    def _read(self, what: str, function: Any, *arguments: Any, **options: Any) -> Any:
        """Call a function of the API; a ClusterError has the status, 0 if there is no answer."""
        try:
            return function(*arguments, _request_timeout=_TIMEOUT, **options)
        except ApiException as error:
            status = int(error.status or 0)
            if status == 404:
                raise ClusterError(f"namespace {self.namespace} has no {what}", status) from None
            raise ClusterError(f"this account may not read {what} ({status})", status) from None
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise ClusterError(f"{self.host} gives no {what} ({type(error).__name__})") from None


def find_kubernetes(namespace: str | None) -> Kubernetes | None:
    """Return the API of the cluster around this process, or of the kubeconfig; None without both.

    Args:
        namespace: of the pods; None where Kubeflow has one user.
    """
    configuration = kubernetes.client.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            kubernetes.config.load_incluster_config(client_configuration=configuration)
        else:
            kubernetes.config.load_kube_config(
                os.environ.get("KUBECONFIG"), client_configuration=configuration
            )
    except (kubernetes.config.ConfigException, OSError, ValueError, yaml.YAMLError):
        return None
    configuration.retries = urllib3.Retry(total=0, redirect=False)
    return Kubernetes(kubernetes.client.ApiClient(configuration), namespace or NAMESPACE)


def _task(pod: Any) -> str:
    return task_name((pod.metadata.annotations or {}).get(f"{_PREFIX}/node-name", "a task"))


def _reason(pod: Any) -> str:
    """Return why a pod has not started, as far as its status says."""
    for condition in pod.status.conditions or ():
        if condition.type == "PodScheduled" and condition.status == "False":
            return _line(condition)
    for container in _containers(pod):
        waiting = container.state and container.state.waiting
        if waiting and waiting.reason not in (None, "ContainerCreating", "PodInitializing"):
            return _line(waiting)
    return ""


def _ending(pod: Any) -> str:
    """Return what ended a pod from outside, such as OOMKilled or Evicted; "" if nothing did."""
    if pod.status.reason:  # of the whole pod
        return _line(pod.status)
    for container in _containers(pod):
        ended = container.state and container.state.terminated
        if ended and ended.reason not in (None, "", "Completed", "Error"):
            where = f"container {container.name}, exit code {ended.exit_code}"
            limit = _memory_limit(pod, container.name) if ended.reason == "OOMKilled" else ""
            told = f": {ended.message}" if ended.message else ""
            return _one_line(f"{ended.reason} ({where}{limit}){told}")
    return ""


def _memory_limit(pod: Any, name: str) -> str:
    for container in (*(pod.spec.init_containers or ()), *pod.spec.containers):
        limits = (container.resources and container.resources.limits) or {}
        if container.name == name and "memory" in limits:
            return f", memory limit {limits['memory']}"
    return ""


def _containers(pod: Any) -> list[Any]:
    """Return the states of a pod's containers in the order in which they start."""
    status = pod.status
    return [*(status.init_container_statuses or ()), *(status.container_statuses or ())]


def _line(told: Any) -> str:
    """Return reason and message of a status, a condition, a state or an event in one line."""
    return _one_line(f"{told.reason}: {told.message or 'no message'}")


def _one_line(text: str) -> str:
    """Return a text, which a container may have written, without line breaks and controls."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
