"""A stand-in for the API of Kubernetes: what it holds, and what the account may not read.

Its answers are made of the installed client's own types, so a field that Kubernetes does not have
cannot be sent.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from kubernetes import client

_LISTS = {
    "pods": client.V1PodList,
    "nodes": client.V1NodeList,
    "events": client.CoreV1EventList,
}


def node(name: str, *taints: Any, labels: dict[str, str] | None = None, **allocatable: str) -> Any:
    """A node that offers what is named, `gpu` for nvidia.com/gpu."""
    offered = {"nvidia.com/gpu" if k == "gpu" else k: v for k, v in allocatable.items()}
    return client.V1Node(
        metadata=client.V1ObjectMeta(name=name, labels=labels),
        spec=client.V1NodeSpec(taints=list(taints)),
        status=client.V1NodeStatus(allocatable=offered),
    )


def waiting_pod(node_name: str, workflow: str, **status: Any) -> Any:
    """A pod of a workflow that has not started."""
    return client.V1Pod(
        metadata=client.V1ObjectMeta(
            name="pod",
            uid="1234",
            labels={"workflows.argoproj.io/workflow": workflow},
            annotations={"workflows.argoproj.io/node-name": node_name},
        ),
        status=client.V1PodStatus(phase="Pending", **status),
    )


def container_waiting(reason: str, message: str | None = None) -> list[Any]:
    """The states of a pod's only container, which waits."""
    return [
        client.V1ContainerStatus(
            name="main",
            image="",
            image_id="",
            ready=False,
            restart_count=0,
            state=client.V1ContainerState(
                waiting=client.V1ContainerStateWaiting(reason=reason, message=message)
            ),
        )
    ]


def ended_pod(
    node_id: str, exit_code: int, reason: str, memory: str = "8Gi", message: str | None = None
) -> Any:
    """A failed pod of a workflow's node: its main container ended so, beside Argo's own two."""
    names = ("main", "wait")
    ended = {
        "main": client.V1ContainerStateTerminated(
            exit_code=exit_code, reason=reason, message=message
        ),
    }
    completed = client.V1ContainerStateTerminated(exit_code=0, reason="Completed")

    def status(name: str) -> Any:
        return client.V1ContainerStatus(
            name=name,
            image="",
            image_id="",
            ready=False,
            restart_count=0,
            state=client.V1ContainerState(terminated=ended.get(name, completed)),
        )

    limits = client.V1ResourceRequirements(limits={"cpu": "4", "memory": memory})
    return client.V1Pod(
        metadata=client.V1ObjectMeta(
            name="pod",
            labels={"workflows.argoproj.io/workflow": node_id.rpartition("-")[0]},
            annotations={"workflows.argoproj.io/node-id": node_id},
        ),
        spec=client.V1PodSpec(
            init_containers=[client.V1Container(name="init")],
            containers=[
                client.V1Container(name=name, resources=limits if name == "main" else None)
                for name in names
            ],
        ),
        status=client.V1PodStatus(
            phase="Failed",
            init_container_statuses=[status("init")],
            container_statuses=[status(name) for name in names],
        ),
    )


def removed_pod(node_id: str, reason: str, message: str) -> Any:
    """A failed pod that its node ended as a whole; its containers' states are then not kept."""
    pod = ended_pod(node_id, 0, "Completed")
    pod.status = client.V1PodStatus(phase="Failed", reason=reason, message=message)
    return pod


def warning(uid: str, reason: str, message: str) -> Any:
    """An event that is told of a pod."""
    return client.CoreV1Event(
        metadata=client.V1ObjectMeta(name="event"),
        involved_object=client.V1ObjectReference(uid=uid),
        type="Warning",
        reason=reason,
        message=message,
    )


def claim(*modes: str, phase: str = "Bound") -> Any:
    """A claim of a volume."""
    return client.V1PersistentVolumeClaim(
        spec=client.V1PersistentVolumeClaimSpec(access_modes=list(modes)),
        status=client.V1PersistentVolumeClaimStatus(phase=phase),
    )


class KubernetesServer:
    """State by the path below the namespace (`secrets/reptile-data`), and behaviour."""

    def __init__(self) -> None:
        self.things: dict[str, Any] = {}  # one each, or a list
        self.forbidden: set[str] = set()  # first part of the path
        self.rights: set[tuple[str, str]] = set()  # verb and resource
        self.asked: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def write_kubeconfig(self, path: Path) -> None:
        """Write what kubectl and the client find this server by."""
        context = {"context": {"cluster": "stand-in", "user": "me"}, "name": "stand-in"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "stand-in", "cluster": {"server": self.address}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [context],
            "current-context": "stand-in",
        }
        path.write_text(yaml.safe_dump(config))

    def answer(self, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        """Return status and answer of a request."""
        self.asked.append(path)
        if path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            asked = body["spec"]["resourceAttributes"]
            allowed = (asked["verb"], asked["resource"]) in self.rights
            return 201, client.V1SelfSubjectAccessReview(
                spec=client.V1SelfSubjectAccessReviewSpec(),
                status=client.V1SubjectAccessReviewStatus(allowed=allowed),
            )
        what = path.removeprefix("/api/v1/").removeprefix("namespaces/")
        namespaced = path.startswith("/api/v1/namespaces/")
        what = what.partition("/")[2] if namespaced else what
        kind = what.partition("/")[0]
        if kind in self.forbidden:
            return 403, {"kind": "Status", "status": "Failure", "reason": "Forbidden", "code": 403}
        if kind in _LISTS:
            return 200, _LISTS[kind](
                items=[i for i in self.things.get(kind, ()) if _fits(i, query)]
            )
        if what not in self.things:
            return 404, {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
        return 200, self.things[what]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                parts = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(parts.query).items()}
                status, answer = server.answer(parts.path, query, json.loads(body or "null"))
                plain = client.ApiClient().sanitize_for_serialization(answer)
                data = json.dumps(plain).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self) -> None:
                self.do_GET()

        return Handler


def _fits(item: Any, query: dict[str, str]) -> bool:
    """Whether a thing is among those that a request selects."""
    labels = item.metadata.labels or {}
    for pair in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = pair.partition("=")
        if labels.get(key) != value:
            return False
    for pair in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = pair.partition("=")
        found = {"involvedObject.uid": item.involved_object.uid, "type": item.type}[key]
        if found != value:
            return False
    return True
