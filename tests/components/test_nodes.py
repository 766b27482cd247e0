"""Training on several nodes: the SDK of Kubeflow Trainer against a server that acts as Trainer.

The server has no cluster, but it runs each pod's command as a process of its own, as torchrun's
agents of one job.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from patterns import make_data

from components import artifacts, nodes
from reptile.errors import ClusterError, InputError
from reptile.files import write_json
from reptile.learn.checkpoint import save_checkpoint
from reptile.learn.run import run_training
from reptile.settings import TrainSettings

SETTINGS = TrainSettings.model_validate(
    {
        "engine": "eager",
        "model": {"filters": 4},
        "ways": 3,
        "train_shots": 4,
        "inner_steps": 3,
        "inner_batch": 4,
        "meta_batch": 4,
        "meta_iterations": 40,
        "checkpoint_every": 10,
        "validation_tasks": 1,
        "device": "cpu",
        "optimizer": {"state": "parallel"},
    }
)
MOUNTS = [
    {"name": "reptile-work", "mountPath": "/workspace"},
    {"name": "shared-memory", "mountPath": "/dev/shm"},
    {"name": "kfp-launcher", "mountPath": "/kfp-launcher"},
]
POD = {
    "metadata": {"name": "this-pod"},
    "spec": {
        "containers": [
            {"name": "wait", "image": "argoexec"},
            {
                "name": "main",
                "image": "registry/reptile-train@sha256:1",
                "resources": {"limits": {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": "1"}},
                "volumeMounts": MOUNTS,
                "securityContext": {"runAsNonRoot": True},
            },
        ],
        "volumes": [
            {"name": "reptile-work", "persistentVolumeClaim": {"claimName": "reptile-work"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
            {"name": "kfp-launcher", "emptyDir": {}},
        ],
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "imagePullSecrets": [{"name": "registry"}],
    },
}
STEP = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {
        "name": "torch-distributed",
        "labels": {"trainer.kubeflow.org/framework": "torch"},
    },
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {"numProcPerNode": "auto"}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {"labels": STEP},
                            "spec": {
                                "template": {
                                    "spec": {"containers": [{"name": "node", "image": "torch"}]}
                                }
                            },
                        },
                    }
                ]
            }
        },
    },
}


def kill(pid: int) -> None:
    """Kill a process and those it started, as a container ends with its first process."""
    with suppress(OSError):  # it has ended
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, signal.SIGKILL)
        for child in children:
            kill(int(child))


class Trainer(ThreadingHTTPServer):
    """The part of the Kubernetes API that is asked, with TrainJobs that really run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.job: dict[str, Any] | None = None
        self.started: list[dict[str, Any]] = []
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.trained = True  # whether Kubeflow Trainer is installed
        self.patches = True  # whether its TrainJob has `runtimePatches`; else they are dropped

    def start_job(self, job: dict[str, Any]) -> None:
        typed = TrainerV1alpha1TrainJob.from_dict(job)
        assert typed and typed.to_dict() == job, "nothing that Trainer's own types do not have"
        if not self.patches:
            job["spec"].pop("runtimePatches")
        job["metadata"] |= {"namespace": "team", "creationTimestamp": "2027-01-31T00:00:00Z"}
        self.job = job
        self.started.append(job)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        trainer = job["spec"]["trainer"]
        program = [sys.executable, "-m", "torch.distributed.run", *trainer["command"][1:]]
        self.nodes = []
        for rank in range(trainer["numNodes"]):
            place = {  # as Trainer's plug-in for torch sets them
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": "1",
                "PET_NODE_RANK": str(rank),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(port),
            }
            with (self.folder / f"log-{len(self.started)}-{rank}").open("wb") as log:
                self.nodes.append(
                    subprocess.Popen(
                        program,
                        cwd=Path(__file__).parents[2],
                        env=os.environ | place,
                        stdout=log,
                        stderr=log,
                    )
                )

    def phase(self, rank: int) -> str:
        code = self.nodes[rank].poll()
        return "Running" if code is None else "Failed" if code else "Succeeded"

    def seen(self) -> dict[str, Any] | None:
        """The job with its condition, if it has ended."""
        if self.job is None:
            return None
        phases = {self.phase(rank) for rank in range(len(self.nodes))}
        ended = "Failed" if "Failed" in phases else "Complete" if phases == {"Succeeded"} else ""
        time_ = "2027-01-31T00:01:00Z"
        if ended == "Failed":
            for node in self.nodes:
                kill(node.pid)
        conditions = [
            {
                "type": ended,
                "status": "True",
                "reason": "x",
                "message": "",
                "lastTransitionTime": time_,
            }
        ]
        return self.job | ({"status": {"conditions": conditions}} if ended else {})

    def pods(self) -> list[dict[str, Any]]:
        name = self.job["metadata"]["name"] if self.job else ""
        return [
            {
                "metadata": {
                    "name": f"{name}-{len(self.started)}-{rank}",
                    "creationTimestamp": "2027-01-31T00:00:00Z",
                    "labels": {
                        "jobset.sigs.k8s.io/replicatedjob-name": "node",
                        "batch.kubernetes.io/job-completion-index": str(rank),
                    },
                },
                "spec": {"containers": [{"name": "node", "image": "x"}]},
                "status": {"phase": self.phase(rank)},
            }
            for rank in range(len(self.nodes))
        ]


class Handler(BaseHTTPRequestHandler):
    server: Trainer

    def answer(self, value: Any, code: int = 200) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def missing(self) -> None:
        self.answer({"kind": "Status", "reason": "NotFound", "code": 404}, 404)

    def do_GET(self) -> None:
        path, trainer = self.path.partition("?")[0], self.server
        if log := re.fullmatch(r"/api/v1/namespaces/team/pods/.*-(\d+-\d+)/log", path):
            while trainer.phase(int(log[1][-1])) == "Running":
                time.sleep(0.1)
            self.answer((trainer.folder / f"log-{log[1]}").read_bytes())
        elif path == "/api/v1/namespaces/team/pods/this-pod":
            self.answer(POD)
        elif path == "/api/v1/namespaces/team/pods":
            self.answer({"kind": "PodList", "items": trainer.pods()})
        elif path.endswith("/clustertrainingruntimes/torch-distributed") and trainer.trained:
            self.answer(RUNTIME)
        elif "/trainjobs/" in path and (job := trainer.seen()):
            self.answer(job)
        else:
            self.missing()

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path.endswith("/namespaces/team/trainjobs"), self.path
        self.server.start_job(job)
        self.answer(job, 201)

    def do_DELETE(self) -> None:
        self.server.job = None
        self.answer({"kind": "Status", "status": "Success"})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    server = Trainer(tmp_path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [
            {"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        ],
        "contexts": [
            {"name": "here", "context": {"cluster": "here", "namespace": "team", "user": "me"}}
        ],
        "users": [{"name": "me", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig")
    )
    monkeypatch.setenv("HOSTNAME", "this-pod")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield server
    server.shutdown()
    for node in server.nodes:
        kill(node.pid)


def artifact(path: Path) -> Any:
    return SimpleNamespace(path=str(path), metadata={})


def write_prepared(folder: Path) -> Any:
    data = make_data()
    folder.mkdir()
    np.save(folder / "images.npy", data.images)
    write_json(folder / "dataset.json", data.index.model_dump(mode="json"))
    return artifact(folder)


@pytest.mark.slow
def test_two_nodes_one_of_which_is_killed_give_the_bytes_of_one_process(
    trainer: Trainer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prepared = write_prepared(tmp_path / "prepared")
    checkpoint, curves = artifact(tmp_path / "checkpoint"), artifact(tmp_path / "curves")
    work = tmp_path / "work"

    def kill_one() -> None:
        while not list(work.glob("*/iteration-*")):
            time.sleep(0.02)
        kill(trainer.nodes[1].pid)

    threading.Thread(target=kill_one, daemon=True).start()
    artifacts.train(
        SETTINGS.model_dump_json(), str(work), 2, prepared, checkpoint, curves, tmp_path / "none"
    )
    save_checkpoint(tmp_path / "alone", run_training(SETTINGS, make_data()))
    for file in ("weights.safetensors", "checkpoint.json"):
        alone = (tmp_path / "alone" / file).read_bytes()
        assert (tmp_path / "checkpoint" / file).read_bytes() == alone
    assert (tmp_path / "curves/plots/metrics/loss.tsv").is_file()
    printed = capfd.readouterr().out
    assert "starting again from the latest checkpoint (restart 1 of 3)" in printed
    assert "eager on cpu, 2 processes" in printed, "the log of the job's first pod"
    assert len(trainer.started) == 2
    assert trainer.job is None, "a finished job is removed"
    assert {path.name for path in work.iterdir()} <= {".lock"}


def test_the_nodes_are_like_the_pod_that_starts_them(trainer: Trainer, tmp_path: Path) -> None:
    nodes.train_on_nodes(2, "reptile-x", ["torchrun", "--help"], interval=0.1)
    (job,) = trainer.started
    spec = job["spec"]
    assert job["metadata"]["name"] == "reptile-x"
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    assert spec["trainer"]["image"] == "registry/reptile-train@sha256:1"
    assert spec["trainer"]["numNodes"] == 2
    assert spec["trainer"]["command"] == ["torchrun", "--help"]
    limits = {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": "1"}
    assert spec["trainer"]["resourcesPerNode"]["limits"] == limits
    (patch,) = spec["runtimePatches"]
    (group,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = group["template"]["spec"]["template"]["spec"]
    this: Any = POD["spec"]
    assert pod["volumes"] == this["volumes"][:2]
    (container,) = pod["containers"]
    assert container["volumeMounts"] == MOUNTS[:2]
    assert container["securityContext"] == {"runAsNonRoot": True}
    for field in ("nodeSelector", "tolerations", "imagePullSecrets"):
        assert pod[field] == this[field]


def test_a_job_that_is_there_is_waited_for(trainer: Trainer) -> None:
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": "reptile-x"},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": {"numNodes": 2, "command": ["torchrun", "--help"]},
        },
    }
    trainer.start_job(job)
    nodes.train_on_nodes(2, "reptile-x", ["torchrun", "--no-such-option"], interval=0.1)
    assert len(trainer.started) == 1


def test_a_job_that_fails_again_and_again_is_given_up(trainer: Trainer) -> None:
    with pytest.raises(ClusterError, match="reptile-x failed 4 times"):
        nodes.train_on_nodes(1, "reptile-x", ["torchrun", "--no-such-option"], interval=0.1)
    assert len(trainer.started) == 4


def test_without_trainer_the_way_out_is_named(trainer: Trainer) -> None:
    trainer.trained = False
    with pytest.raises(ClusterError, match=r"needs Kubeflow Trainer with its runtime torch-d"):
        nodes.train_on_nodes(2, "reptile-x", ["torchrun"], interval=0.1)


def test_a_trainer_that_drops_the_volumes_is_refused(trainer: Trainer) -> None:
    trainer.patches = False
    with pytest.raises(ClusterError, match=r"no volumes; nodes needs Trainer 2\.2 or later"):
        nodes.train_on_nodes(2, "reptile-x", ["torchrun", "--help"], interval=0.1)
    assert len(trainer.started) == 1
    assert trainer.job is None


def test_nodes_that_share_no_volume_are_refused(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "prepared")
    outputs = artifact(tmp_path / "checkpoint"), artifact(tmp_path / "curves")
    with pytest.raises(InputError, match="nodes = 2: the nodes share data"):
        artifacts.train(SETTINGS.model_dump_json(), "s3://bucket/x", 2, prepared, *outputs)
