"""deploy/schedule's CronJob, run in the image as a pod would run it, against the API's stand-in."""

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_server import KubeflowServer

from components.image import IMAGE as DEFAULT

ROOT = Path(__file__).parent.parent.parent
ENGINE = shutil.which("docker") or shutil.which("podman") or ""
IMAGE = os.environ.get("IMAGE", DEFAULT)
PORT = 8888  # of Kubeflow Pipelines within a cluster, which kfp holds fixed
TOKEN = "of-this-audience"
PINNED = f"registry.example.org/reptile-train@sha256:{64 * '0'}"

pytestmark = [pytest.mark.images, pytest.mark.slow]


@pytest.fixture
def server() -> Iterator[KubeflowServer]:
    if (
        not ENGINE
        or subprocess.run([ENGINE, "image", "inspect", IMAGE], capture_output=True).returncode
    ):
        pytest.skip(f"there is no image {IMAGE}; build it with `make images BASE_IMAGE=…`")
    server = KubeflowServer(multi_user=True)
    server.token = TOKEN
    try:
        door = socket.create_server(("127.0.0.1", PORT))
    except OSError:
        server.close()
        pytest.skip(f"port {PORT} is taken here")
    inside = ("127.0.0.1", int(server.address.rpartition(":")[2]))
    threading.Thread(target=_forward, args=(door, inside), daemon=True).start()
    yield server
    door.close()
    server.close()
    assert server.broken == []


def _forward(door: socket.socket, inside: tuple[str, int]) -> None:
    while True:
        try:
            outer, _ = door.accept()
        except OSError:
            return
        inner = socket.create_connection(inside)
        for source, sink in ((outer, inner), (inner, outer)):
            threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


def pod(job: dict[str, Any], inputs: Path, folder: Path) -> list[str]:
    """Return the engine's command for what the kubelet would start."""
    spec = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    token = folder / "token"
    token.mkdir()
    (token / "token").write_text(TOKEN)
    mounts = {places["inputs"]: inputs, places["token"]: token}
    if spec["automountServiceAccountToken"]:
        account = folder / "account"
        account.mkdir()
        for name in ("token", "ca.crt", "namespace"):
            (account / name).write_text("another\n")
        mounts["/var/run/secrets/kubernetes.io/serviceaccount"] = account
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    values = {e["name"]: e.get("value", "team") for e in container["env"]} | {"IMAGE": PINNED}
    arguments = [*container["command"], *container["args"]]
    for name, value in values.items():
        arguments = [argument.replace(f"$({name})", value) for argument in arguments]
    variables = values | {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    return [
        *(ENGINE, "run", "--rm", "--user", "12345:0", "--read-only", "--cap-drop", "ALL"),
        *("--network", "host", "--add-host", "ml-pipeline.kubeflow.svc.cluster.local:127.0.0.1"),
        *(f"--volume={source}:{target}:ro" for target, source in mounts.items()),
        *("--tmpfs", places["temporary"]),
        *(f"--env={name}={value}" for name, value in variables.items()),
        IMAGE,
        *arguments,
    ]


def test_the_cron_job_makes_one_schedule_and_then_leaves_it_alone(
    server: KubeflowServer, tmp_path: Path
) -> None:
    job = yaml.safe_load((ROOT / "deploy/schedule/cron-job.yaml").read_text(encoding="utf-8"))
    command = pod(job, ROOT / "deploy/example", tmp_path)
    said = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    assert "schedule nightly created" in said[0]
    assert "schedule nightly unchanged" in said[1]
    (schedule,) = server.schedules.values()
    parameters = schedule["runtime_config"]["parameters"]
    assert parameters["image"] == PINNED
    assert parameters["accelerators"] == "1"
    assert {e["namespace"] for e in server.experiments.values()} == {"team"}
    assert (ROOT / "pipeline/reptile.yaml").read_bytes() in server.uploads.values()
