"""A clone with little data, in which pipelines run quickly; and stand-ins for a cluster's APIs."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import kfp
import pytest
import yaml
from commands import Result
from kfp import compiler, dsl
from kubeflow_server import KubeflowServer
from kubernetes.client import Configuration
from kubernetes.config import incluster_config
from kubernetes_server import KubernetesServer
from patterns import draw_letters

from pipeline import __main__ as command
from pipeline import connection

ROOT = Path(__file__).parent.parent.parent

SMALL = {
    "prepare": {
        "source": "data/letters",
        "cross_domain": [],
        "image_size": 14,
        "validation": 0.2,
        "test": 0.2,
        "images_per_class": 6,
    },
    "train": {
        "model": {"filters": 8},
        "train_shots": 5,
        "inner_steps": 3,
        "inner_batch": 5,
        "meta_batch": 2,
        "meta_iterations": 6,
        "checkpoint_every": 3,
        "validation_tasks": 2,
    },
    "beside": {
        "algorithm": "ridge",
        "model": {"filters": 8},
        "ways": 3,
        "episode": {"shots": [1], "queries": 2},
        "meta_iterations": 6,
        "checkpoint_every": 3,
        "validation_tasks": 2,
    },
    "evaluate": {"tasks": 6, "shots": [1, 2], "steps": 5},
    # `insist`: so little training is worse than simpler methods.
    "export": {"gate": {"accuracy": 0.0, "above_random": -1.0, "insist": True}},
    "verify": {"tasks": 40, "steps": 5},
}


def environment() -> dict[str, str]:
    """The environment of this interpreter's programs, so that they see the same packages."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(folder: Path, *command: str) -> str:
    """Run a command that must succeed; return what it prints, on stdout and stderr."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of this project as it is committed, with small data and settings committed on top."""
    folder = tmp_path_factory.mktemp("small") / "clone"
    run(folder.parent, "git", "clone", "--quiet", str(ROOT), str(folder))
    draw_letters(folder / "data/letters")
    run(folder, "dvc", "add", "--quiet", "data")
    run(folder, "dvc", "push", "--quiet", "data.dvc")
    (folder / "params.yaml").write_text(yaml.safe_dump(SMALL))
    run(folder, "git", "add", "--all")
    author = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    run(folder, "git", *author, "commit", "--quiet", "--message", "small")
    return folder


class Pipeline:
    """`python -m pipeline run-local` in a clone, with folders of its own."""

    def __init__(self, clone: Path, folder: Path) -> None:
        self._clone = clone
        self.output, self.work = folder / "runs", folder / "work"

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Start a run, in a process group of its own."""
        places = ("--output", str(self.output), "--work", str(self.work))
        return subprocess.Popen(
            (sys.executable, "-m", "pipeline", "run-local", *places, *options),
            cwd=self._clone,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *options: str) -> tuple[int, str, Path]:
        """Run to the end; return the exit code, what was printed, and the run's folder."""
        process = self.start(*options)
        printed, _ = process.communicate()
        return process.returncode, printed, max(self.output.iterdir())


@pytest.fixture
def pipeline(clone: Path, tmp_path: Path) -> Pipeline:
    return Pipeline(clone, tmp_path)


@pytest.fixture(scope="session")
def delivered(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """A run in which nothing goes wrong."""
    points = ("--point", "2-way 1-shot frozen", "--point", "5-way 2-shot frozen")
    folder = tmp_path_factory.mktemp("delivered")
    return Pipeline(clone, folder)(*points, "--bundle-remote", str(folder / "remote"))


@pytest.fixture
def server() -> Iterator[KubeflowServer]:
    with_state = KubeflowServer()
    yield with_state
    with_state.close()
    assert with_state.broken == []


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline with every type of parameter, and tasks inside a condition."""

    @dsl.component(base_image="image", install_kfp_package=False)
    def train(seed: int) -> float:
        return float(seed)

    @dsl.pipeline(name="small")
    def small(
        data_revision: str,
        train_settings: str = "{}",
        seed: int = 1,
        rate: float = 0.5,
        deep: bool = False,
        shots: list[int] = [1, 5],
        selector: dict[str, str] = {},
    ) -> None:
        task = train(seed=seed)
        with dsl.If(task.output > 0.5):
            train(seed=seed).after(task)

    path = tmp_path_factory.mktemp("compiled") / "small.yaml"
    compiler.Compiler().compile(small, str(path))
    return path


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN", "KF_PIPELINES_UI_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(connection, "BACK_OFF", (0.01,))


@pytest.fixture
def kubernetes(tmp_path: Path) -> Iterator[KubernetesServer]:
    """The cluster of the kubeconfig, which is empty."""
    cluster = KubernetesServer()
    cluster.write_kubeconfig(tmp_path / "kubeconfig")
    yield cluster
    cluster.close()


@pytest.fixture
def in_cluster(
    server: KubeflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    """As in a pod: Kubeflow where kfp looks for it, and a Kubernetes that this pod cannot reach."""
    address = server.address.removeprefix("http://")
    monkeypatch.setattr(kfp.Client, "_IN_CLUSTER_DNS_NAME", address)
    for variable, value in (("HOST", "127.0.0.1"), ("PORT", "1")):
        monkeypatch.setenv(f"KUBERNETES_SERVICE_{variable}", value)
    for name in ("TOKEN", "CERT"):
        (tmp_path / name).write_text("x")
        monkeypatch.setattr(incluster_config, f"SERVICE_{name}_FILENAME", str(tmp_path / name))
    default = Configuration.get_default_copy()  # kfp changes it for the whole process
    yield
    Configuration.set_default(default)


@pytest.fixture(name="run")
def command_line(
    server: KubeflowServer,
    compiled: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Result]:
    """The command line as a person runs it."""

    def run(*arguments: str, host: str | None = server.address) -> Result:
        more = ["--host", host] if host else []
        if arguments[0] not in ("unschedule", "status") and "--pipeline" not in arguments:
            more += ["--pipeline", str(compiled)]
        if "--wait" in arguments:
            more += ["--poll", "0.01"]
        monkeypatch.setattr(sys, "argv", ["pipeline", *arguments, *more])
        with pytest.raises(SystemExit) as end:
            command.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + captured.out
        return Result(int(end.value.code or 0), captured.out, captured.err)

    return run
